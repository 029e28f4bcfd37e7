"""The whole job for one layer: scan, find, split, apply, compare, evaluate, report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from unbraid.ablate import ablate
from unbraid.clusters import concerned, numbers_seen
from unbraid.data import Relabelled, name_of
from unbraid.encoders import Encoder, Penultimate, load_encoder
from unbraid.errors import DataError, ModelError
from unbraid.evaluate import evaluate
from unbraid.evaluation import Evaluation
from unbraid.files import write_whole
from unbraid.find import find
from unbraid.findings import Findings
from unbraid.manifest import hash_places, read_manifest
from unbraid.measure_semantics import measure_semantics
from unbraid.networks import device_of
from unbraid.output import compare_outputs
from unbraid.records import Scan
from unbraid.report import report
from unbraid.scan import scan_into
from unbraid.scan_options import MIN_SHARE, Labels
from unbraid.semantics import Semantics
from unbraid.sensitivity import sensitivity
from unbraid.settings import Loading, Thresholds, read_settings, remove_results
from unbraid.sight import sight_of
from unbraid.split import check_rho, split
from unbraid.splits import Split
from unbraid.surgery import apply
from unbraid.tables import count
from unbraid.thresholds import check_thresholds
from unbraid.visualize.run import visualize_run

Say = Callable[[str], None]

MAX_ABLATED = 32  # channels; each takes a pass from the layer on per concept, and one for the whole


@dataclass(frozen=True)
class Run:
    """What a run leaves: also in its folder, as findings.csv and so on."""

    found: Findings
    evaluation: Evaluation | None  # None if nothing was found
    report: Path
    broken: list[str]  # images left out


def run(
    model: nn.Module,
    layer: str,
    train: Dataset[Any],
    val: Dataset[Any],
    out: Path,
    *,
    thresholds: Thresholds,
    loading: Loading,
    source: dict[str, Any],
    say: Say,
    title: str,
    encoder: str | None = None,
    labels: Labels = "given",
    features: bool = True,
) -> Run:
    """Do everything for one layer; started again, finished scans are not repeated.

    Args:
        model: gives logits for a batch of images.
        layer: a `named_modules()` name.
        train: images to find and split with.
        val: images to evaluate on.
        out: the run's folder.
        thresholds: when a channel counts as polysemantic.
        loading: how images go through the network.
        source: how to find network and images again.
        say: told of each step.
        title: of the report.
        encoder: of images, for semantic measures, as `load_encoder` takes it; by default the
            network's own penultimate layer.
        labels: "predicted" for images without labels, or to take them for what the network does.
        features: make feature visualisations of the split channels.
    """
    embedding = prepare(model, thresholds, encoder)
    settings: dict[str, Any] = {"title": title, "thresholds": vars(thresholds)}
    sight = sight_of(val)  # a report that is written again knows no preprocessing
    settings |= {"source": source, "encoder": encoder, "labels": labels}
    settings |= {"sight": sight and sight.to_dict()}
    before = read_settings(out)
    options = {**vars(loading), "progress": True, "source": source, "labels": labels}
    train_scan = scan_into(model, {layer: out / "scan-train"}, train, **options)[layer]
    val_scan = scan_into(model, {layer: out / "scan-val"}, val, **options)[layer]
    loading = replace(loading, batch_size=train_scan.manifest.batch_size)
    shown = as_labelled(val, val_scan)
    # Only now is it sure that the folder is this network's and these images'.
    if before is not None and before != json.loads(json.dumps(settings)):
        remove_results(out)
    found = find(train_scan, **thresholds.of_find)
    by_place = labels == "predicted" or thresholds.concepts == "clusters"
    if by_place:
        found = seen_in(val_scan, found)
    found.to_csv(out / "findings.csv")
    counted = None
    if thresholds.concepts == "classes":  # clusters ask neither tau nor p
        counted = sensitivity(train_scan, found=found)
        counted.to_csv(out / "sensitivity.csv")
    broken = [name_of(train, index) for index in train_scan.broken()]
    broken += [name_of(val, index) for index in val_scan.broken()]
    write_whole(out / "settings.json", (json.dumps(settings, indent=2) + "\n").encode())
    page = out / "report.html"
    if not found.concepts:
        report(
            page,
            scan=val_scan,
            train_scan=train_scan,
            found=found,
            sensitivity=counted,
            dataset=shown,
            title=title,
        )
        return Run(found, None, page, broken)
    if not by_place:
        _refuse_unseen(val_scan, found)
    pairs, channels = count(len(found), "pair"), count(len(found.concepts), "channel")
    say(f"Found {pairs} in {channels}; scanning their images again, with positions.")
    maps = []
    for name, dataset, seen in (("train", train, train_scan), ("val", val, val_scan)):
        which: dict[str, Any] = {"classes": found.classes}
        if by_place:
            which = {"indices": concerned(replace(seen, clusters=found.clusters), found.classes)}
        kept = {**options, **which, "positions": True}
        maps.append(_scan_positions(model, layer, dataset, out / f"positions-{name}", kept))
    train_maps, val_maps = maps
    say("Splitting and checking the outputs.")
    divided = split(train_maps, found, everything=train_scan)
    divided.save(out / "split.safetensors")
    baseline = split(train_maps, found, method="published", rho=thresholds.rho)
    baseline.save(out / "split-published.safetensors")
    model2 = apply(model, divided)
    output = compare_outputs(model, model2, val, tolerance=0.0, progress=True, **vars(loading))
    by_cosine = _by_cosine(found)
    ablated = by_cosine[:MAX_ABLATED]
    if len(ablated) < len(found.concepts):
        say(f"Switching off only the {len(ablated)} channels with the lowest cosines.")
    members = val_scan if found.clusters else None
    ablation = ablate(model2, shown, channels=ablated, scan=members, progress=True, **vars(loading))
    evaluation = evaluate(
        divided,
        val_maps,
        baseline=baseline,
        output=output,
        ablation=ablation,
        semantics=_semantics(divided, val_scan, shown, embedding, loading, say),
    )
    evaluation.save(out / "evaluation.json")
    made = visualize_run(model2, layer, train, by_cosine, out, say) if features else None
    report(
        page,
        scan=val_scan,
        train_scan=train_scan,
        found=found,
        sensitivity=counted,
        split=divided,
        evaluation=evaluation,
        maps=val_maps,
        features=made,
        dataset=shown,
        title=title,
    )
    return Run(found, evaluation, page, broken)


def prepare(model: nn.Module, thresholds: Thresholds, encoder: str | None) -> Encoder:
    """Tell what is wrong with a run before anything is scanned; get its encoder."""
    check_thresholds(thresholds.tau, thresholds.p, thresholds.gamma, MIN_SHARE)
    check_rho(thresholds.rho)
    if encoder is None:
        return Penultimate(model)
    return load_encoder(encoder, device=str(device_of(model)))


def _scan_positions(
    model: nn.Module, layer: str, dataset: Dataset[Any], folder: Path, options: dict[str, Any]
) -> Scan:
    """Scan with positions; input maps of other images, from other thresholds, make room."""
    before = read_manifest(folder)
    classes, indices = options.get("classes"), options.get("indices")
    wanted = (None if classes is None else tuple(classes), hash_places(indices))
    if before is not None and (before.classes, before.indices) != wanted:
        shutil.rmtree(folder)
    return scan_into(model, {layer: folder}, dataset, **options)[layer]


def _by_cosine(found: Findings) -> list[int]:
    """The channels, lowest cosine first, as time may not be enough for all."""
    by_cosine = dict.fromkeys(pair.channel for pair in found.pairs)
    return list(by_cosine | dict.fromkeys(found.channels))


def _semantics(
    divided: Split, scan: Scan, images: Dataset[Any], encoder: Encoder, loading: Loading, say: Say
) -> Semantics | None:
    """Measure semantics; None where they were to be told by features that a network has not."""
    workload: dict[str, Any] = {"batch_size": loading.batch_size, "workers": loading.workers}
    try:
        return measure_semantics(divided, scan, images, encoder, progress=True, **workload)
    except ModelError as error:
        if not isinstance(encoder, Penultimate):
            raise
        say(f"Semantic measures are left out: {error}")
        return None


def _refuse_unseen(val_scan: Scan, found: Findings) -> None:
    """Every class that uses a polysemantic channel must have validation images."""
    seen = val_scan.labels_seen()
    missing = [found.name(label) for label in found.classes if label not in seen]
    if missing:
        raise DataError(
            f"The validation images have none of class {', '.join(missing[:5])}, which uses a "
            "polysemantic channel; add some."
        )


def seen_in(val_scan: Scan, found: Findings) -> Findings:
    """Leave out channels of which a concept has no validation image, and note how many.

    What clusters and predicted classes hold of other images is not the user's to decide, so a lack
    is no error, unlike one of the user's own classes.
    """
    seen = numbers_seen(replace(val_scan, clusters=found.clusters), found.classes)
    concepts = {
        channel: groups
        for channel, groups in found.concepts.items()
        if all(seen.intersection(group) for group in groups)
    }
    n_left_out = len(found.concepts) - len(concepts)
    if n_left_out == 0:
        return found
    left_out = (
        f"{count(n_left_out, 'channel')} left out, as the validation images have none of one of "
        "the concepts; add some."
    )
    return replace(
        found,
        pairs=tuple(pair for pair in found.pairs if pair.channel in concepts),
        concepts=concepts,
        clusters={n: c for n, c in found.clusters.items() if c.channel in concepts},
        note=f"{found.note} {left_out}".lstrip(),
    )


def as_labelled(images: Dataset[Any], scan: Scan) -> Dataset[Any]:
    """Images with the labels that a scan took them for: predicted ones in place of given ones."""
    if scan.manifest.labels == "given":
        return images
    labels: dict[int, int] = {}
    for own in scan.tensors("index", "label"):
        labels.update(zip(own["index"].tolist(), own["label"].tolist(), strict=True))
    return Relabelled(images, labels)
