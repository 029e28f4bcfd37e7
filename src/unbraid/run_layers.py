"""The whole job for several layers: scanned in one pass, then each as a run of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from unbraid.layer_names import is_pattern, layer_folder, layer_names
from unbraid.output import OutputComparison, compare_outputs
from unbraid.pipeline import Run, prepare, run, tell_unseen
from unbraid.scan import scan_into
from unbraid.splits import Split
from unbraid.surgery import apply
from unbraid.usable import usable_in


@dataclass(frozen=True)
class LayerRuns:
    """What a run over several layers leaves: a run's folder for each, in the run's folder."""

    runs: dict[str, Run]  # by layer
    output: OutputComparison | None  # with all of several layers split; None if none was


def run_layers(
    model: nn.Module,
    layers: Sequence[str],
    train: Dataset[Any],
    val: Dataset[Any],
    out: Path,
    *,
    title: str,
    **options: Any,
) -> LayerRuns:
    """Do everything for one or several layers, which share the passes over all images.

    Args:
        model: gives logits for a batch of images.
        layers: names or patterns, as `unbraid.scan` takes them.
        train: images to find and split with.
        val: images to evaluate on.
        out: the run's folder; of several layers, or those of a pattern, each has a run's folder of
            its name in it.
        title: of the reports, to which the layer's name is added.
        options: the others of `pipeline.run`.
    """
    tell_unseen(train, val, options.get("labels", "given"), options["say"])
    names = layer_names(model, layers, partial(usable_in, model, train))
    if len(layers) == 1 and not is_pattern(model, layers[0]):
        (name,) = names
        alone = run(model, name, train, val, out, title=f"{title} · {name}", **options)
        return LayerRuns({name: alone}, None)
    folders = {name: layer_folder(out, name) for name in names}
    prepare(model, folders, train, val, options["thresholds"], options["encoder"])
    scan_options = {name: options[name] for name in ("source", "labels")}
    loading = options["loading"]
    # The small one first, as in `run`.
    for kind, what, images in (("val", "Validation", val), ("train", "Training", train)):
        options["say"](f"{what} images:")
        places = {name: folder / f"scan-{kind}" for name, folder in folders.items()}
        scans = scan_into(model, places, images, progress=True, **scan_options, **vars(loading))
        loading = replace(loading, batch_size=scans[names[0]].manifest.batch_size)
    runs = {}
    for name, folder in folders.items():
        options["say"](f"Layer {name}.")
        runs[name] = run(model, name, train, val, folder, title=f"{title} · {name}", **options)
    divided = [name for name in names if runs[name].found.concepts]
    if not divided:
        return LayerRuns(runs, None)
    options["say"]("Checking the outputs with all layers split.")
    results = [runs[name].report.parent for name in divided]
    changed = apply(model, [Split.load(folder / "split.safetensors") for folder in results])
    output = compare_outputs(model, changed, val, tolerance=0.0, progress=True, **vars(loading))
    return LayerRuns(runs, output)
