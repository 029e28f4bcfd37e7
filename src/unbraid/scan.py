"""One pass of a network over images: the only step that runs it over the data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack, overload

import torch
from torch import nn
from torch.utils.data import Dataset

from unbraid.accuracy import Accuracy
from unbraid.batch_size import batch_size_for
from unbraid.before_scan import LONG, describe_fit, sampled_accuracy, scanned_accuracy
from unbraid.claims import Target, claim_together
from unbraid.data import class_names_of, first_readable, labels_of, size_of
from unbraid.describe import describe, resolve_layer, weight_rows
from unbraid.doors import in_plain_modes
from unbraid.errors import DataError
from unbraid.given import as_path
from unbraid.identity import fingerprint
from unbraid.layer_names import LayerName, is_pattern, layer_folder, layer_names
from unbraid.manifest import Manifest, hash_places, read_manifest
from unbraid.networks import picked_by, unwrap
from unbraid.preprocessing import as_recorded, preprocessing_of
from unbraid.progress import say
from unbraid.records import Scan, open_scan
from unbraid.scan_options import MIN_SHARE, Labels, Options, places_of, refuse_impossible, settle
from unbraid.scan_pass import library_versions, scan_shards
from unbraid.team import team as gather_team
from unbraid.usable import usable_in
from unbraid.weights import hash_weights, refuse_broken_weights


@overload
def scan(  # type: ignore[overload-overlap]  # a name is a sequence too; it comes first
    model: nn.Module,
    layer: LayerName,
    dataset: Dataset[Any],
    out: str | Path,
    **options: Unpack[Options],
) -> Scan: ...


@overload
def scan(
    model: nn.Module,
    layer: Sequence[LayerName],
    dataset: Dataset[Any],
    out: str | Path,
    **options: Unpack[Options],
) -> dict[str, Scan]: ...


@in_plain_modes
def scan(
    model: nn.Module,
    layer: LayerName | Sequence[LayerName],
    dataset: Dataset[Any],
    out: str | Path,
    *,
    labels: Labels = "given",
    classes: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    positions: bool = False,
    min_share: float = MIN_SHARE,
    batch_size: int | None = None,
    workers: int = 0,
    skip_broken: bool = False,
    progress: bool = False,
    source: dict[str, Any] | None = None,
    threads: int | None = None,
    autocast: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> Scan | dict[str, Scan]:
    """Run a network over images once and keep one small record per image.

    Started again with the same arguments it goes on where it stopped; a finished shard is not
    computed again. Processes that torchrun starts share the work (docs/scale.md). The network is
    used in eval mode, on the device that it is on, and left exactly as it was.

    Args:
        model: gives logits (N, T) for a batch of images, or (N,) or (N, 1) to tell two classes
            apart; `unbraid.with_logits` picks them out of a larger output.
        layer: a convolution or fully connected layer, by `named_modules()` name or itself. Several
            layers, as a list, are scanned in the same pass; a pattern such as "layer4.*.conv3",
            alone or in a list, stands for all layers of such names that can be scanned.
        dataset: map-style, of (image tensor, label). Its `groups`, one id for each image, may say
            which belong together, such as crops of one photograph; none is then judged by another.
            Its `ids`, a text for each, name images for good, whatever their order (docs/data.md).
        out: folder for the records; of several layers, each has a folder of its name in it.
        labels: "predicted" takes each image for what the network takes it for, whatever the data
            set's label, so data sets without labels will do (any number stands for a label).
        classes: scan only images with these given labels.
        indices: scan only the images at these places in the data set.
        positions: also keep the layer's input maps, which the published rho criterion and the
            rectified measures need.
        min_share: the smallest share kept; thresholds below it need a new scan.
        batch_size: images per forward pass; by default that of the scan which goes on, else what
            2 GiB, or a quarter of an accelerator's memory, are sure to hold, at most 64 or 256.
            Halved as long as the device's memory is too small.
        workers: processes that load images, 0 for none.
        skip_broken: leave out images that cannot be read instead of stopping at the first.
        progress: show a progress bar on standard error.
        source: how to find network and images again, kept in the manifest for later commands.
        threads: to compute with, of each process; by default torch's setting, or that of the scan
            which goes on. Records are the same to the last bit with the same number, batch size
            and kind of device, whoever computed them.
        autocast: run the network in bfloat16 where torch sees fit, which is faster where the device
            has it; sums are of float32 all the same.
        channels_last: keep the weights of 2-D convolutions channels last meanwhile, which is
            faster on most devices; a network that is so already needs no telling.
        compiled: let torch compile the network for full batches, which takes seconds to minutes
            before the first and makes long scans faster; rounding differs a little.

    Returns:
        The finished Scan; for a list or pattern, a dictionary of Scans by the layers' names.

    Raises:
        LayerError: a layer does not exist, cannot be split or does not reach the logits, or no
            layer fits a pattern.
        DataError: an image cannot be read, or labels do not fit the network.
        ModelError: the network holds or computes NaN or infinite numbers, or cannot run.
        RunError: the folder belongs to another network, layer or data set, or the disk is full.
        UsageError: an argument is out of range or of another type.

    Source:
        METHOD.md sections 2 and 4.
    """
    model = unwrap(model)
    out = as_path("out", out)
    if isinstance(layer, (str, nn.Module)) or not isinstance(layer, Iterable):
        asked, one = [layer], not is_pattern(model, layer)
    else:
        asked, one = list(layer), False
    names = layer_names(model, asked, partial(usable_in, model, dataset))
    scans = scan_into(
        model,
        {name: out if one else layer_folder(out, name) for name in names},
        dataset,
        labels=labels,
        classes=classes,
        indices=indices,
        positions=positions,
        min_share=min_share,
        batch_size=batch_size,
        workers=workers,
        skip_broken=skip_broken,
        progress=progress,
        source=source,
        threads=threads,
        autocast=autocast,
        channels_last=channels_last,
        compiled=compiled,
    )
    return scans[names[0]] if one else scans


def scan_into(
    model: nn.Module,
    folders: Mapping[str, Path],
    dataset: Dataset[Any],
    **options: Unpack[Options],
) -> dict[str, Scan]:
    """Scan several layers in one pass, each into a folder of its own; the rest is as in `scan`."""
    asked = settle(**options)
    model = unwrap(model)
    modules = {name: resolve_layer(model, name)[1] for name in folders}
    specs = {name: describe(name, module) for name, module in modules.items()}
    refuse_broken_weights(model)
    size_of(dataset)
    given = labels_of(dataset, needed=asked.labels == "given" or asked.classes is not None)
    places = places_of(asked, given)
    weights, data = hash_weights(model), fingerprint(dataset, given)
    begun = next(filter(None, map(read_manifest, folders.values())), None)  # a scan that goes on
    threads, batch_size = asked.threads, asked.batch_size
    if threads is None:
        threads = begun.threads if begun else torch.get_num_threads()
    # So that a data set of something else is told before anything is written.
    image = first_readable(dataset, places) if begun is None else None
    if batch_size is None and begun:
        batch_size = begun.batch_size
    elif batch_size is None:
        batch_size = batch_size_for(model, list(modules.values()), image)
    names, preprocessing = class_names_of(dataset), preprocessing_of(dataset)
    if begun and as_recorded(preprocessing, begun.preprocessing):
        warnings.warn(
            "The scan was begun by a version that did not see changes of a transform's own code; "
            "make sure that it is still the same.",
            stacklevel=2,
        )
        preprocessing = begun.preprocessing
    targets = []
    for name, folder in folders.items():
        manifest = Manifest(
            weights=weights,
            layer=specs[name],
            data=data,
            n_images=len(places),
            class_names=names,
            preprocessing=preprocessing,
            dtype=str(weight_rows(modules[name]).dtype).removeprefix("torch."),
            min_share=asked.min_share,
            classes=asked.classes,
            positions=asked.positions,
            # Input maps are large, pooled inputs are not.
            shard_size=128 if asked.positions else 1024,
            batch_size=batch_size,
            skip_broken=asked.skip_broken,
            source=asked.source or {},
            versions=library_versions(),
            labels=asked.labels,
            indices=hash_places(asked.indices),
            output=picked_by(model),
            threads=threads,
            autocast=asked.autocast,
            channels_last=asked.channels_last,
            compiled=asked.compiled,
        )
        refuse_impossible(manifest)
        targets.append(Target(modules[name], manifest, folder))
    team = gather_team()
    claim_together(targets, team)
    tell = partial(_tell_fit, preprocessing=targets[0].manifest.preprocessing, aloud=asked.progress)
    part = asked.classes is not None or asked.indices is not None
    # Input maps of a part are asked for after a scan of all, which has told.
    tells = asked.labels == "given" and team.first and not (asked.positions and part)
    at_start = tells and not begun and len(places) >= LONG
    if at_start:
        tell(sampled_accuracy(model, dataset, places, batch_size))
    work: dict[str, Any] = {"team": team, "workers": asked.workers, "progress": asked.progress}
    scan_shards(model, targets, dataset, given, places, **work)
    finished = {name: open_scan(folder) for name, folder in folders.items()}
    for done in finished.values():
        if len(done.broken()) == len(places):
            raise DataError(f"None of the {len(places)} images could be read; mend the data set.")
    if tells and not at_start:
        tell(scanned_accuracy(next(iter(finished.values()))))
    return finished


def _tell_fit(accuracy: Accuracy | None, preprocessing: str, *, aloud: bool) -> None:
    """Say how often the network is right, and warn where it does not fit labels or images."""
    if accuracy is None:
        return
    if aloud:
        say(describe_fit(accuracy, preprocessing))
    if accuracy.warning:
        warnings.warn(accuracy.warning, stacklevel=5)
