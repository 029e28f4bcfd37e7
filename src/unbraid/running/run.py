"""Figures of a finished run, made from its folder without the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset

from unbraid.base.errors import DataError, ModelError, RunError, UnbraidError
from unbraid.base.files import set_aside
from unbraid.base.tables import count
from unbraid.finding.find import find
from unbraid.finding.findings import Findings
from unbraid.finding.thresholds import check_thresholds, sensitivity
from unbraid.images.broken import UNLABELLED, Loaded, first_readable
from unbraid.images.dataset import Relabelled, class_names_of, listed_labels, name_of, size_of
from unbraid.images.labels import Outputs, read_classes
from unbraid.images.listing import ListedImages, Listing
from unbraid.images.open import list_images, part_of
from unbraid.measuring.ablate import ablate
from unbraid.measuring.compare import OutputComparison, compare_outputs
from unbraid.measuring.encoders import Encoder, Penultimate, load_batches, load_encoder, ready
from unbraid.measuring.evaluate import evaluate
from unbraid.measuring.results import (
    Evaluation,
    Semantics,
    read_ablation,
    read_output,
    read_semantics,
)
from unbraid.measuring.semantics import measure_semantics
from unbraid.networks.copying import device_of, unwrap
from unbraid.networks.layers import describe, is_pattern, layer_folder, layer_names, resolve_layer
from unbraid.networks.preflight import look_first
from unbraid.networks.relevance import undisturbed
from unbraid.networks.weights import hash_weights
from unbraid.reporting.figures import density_figure, source_figure, teaser_figure
from unbraid.reporting.pictures import Sight, sight_of
from unbraid.reporting.report import report
from unbraid.running.folders import (
    Loading,
    Thresholds,
    home_of,
    is_same,
    positions_folder,
    read_settings,
    refuse_strange,
    replace_results,
    take_folder,
    tell_folder,
)
from unbraid.scanning.batch import Place, scan_batch
from unbraid.scanning.options import MIN_SHARE, Labels
from unbraid.scanning.records import Scan, open_scan
from unbraid.scanning.scan import as_scanned, scan_into, usable_in
from unbraid.splitting.split import check_rho, split
from unbraid.splitting.splits import Split
from unbraid.surgery.apply import apply, check_in_force
from unbraid.visualizing.features import INDEX, Features
from unbraid.visualizing.visualize import visualize

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Feature visualisation as a step of a run: kept in its folder, within bounds of time.


SECONDS = 120.0  # after which no more channels are begun
_FOLDER = "features"


def visualize_run(
    model: nn.Module,
    layer: str,
    images: Dataset[Any],
    channels: Sequence[int],
    out: Path,
    say: Callable[[str], None],
    *,
    make: bool = True,
) -> Features | None:
    """Visualise a run's split channels, unless that is done; write them to its folder.

    Args:
        model: the split network.
        layer: its name.
        images: training images, which tell what images are like.
        channels: the split ones, the most telling first, as time may not be enough for all.
        out: the run's folder.
        say: told of each step, and of what is left out.
        make: make them, instead of only returning those that are there.

    Returns:
        The visualisations; None where the network or its images do not allow any.
    """
    with suppress(RunError):  # those that cannot be read are made anew
        before = read_run(out)
        if before is not None and before.weights == hash_weights(model):
            return before
    if (out / _FOLDER / INDEX).exists():  # else nobody finished them
        set_aside(out / _FOLDER, ".replaced")
    if not make:
        return None
    say("Visualising channels and concept channels.")
    try:
        made = visualize(model, layer, images, channels, seconds=SECONDS, progress=True)
    except UnbraidError as error:  # a page without them is better than none
        say(f"Feature visualisations are left out: {error}")
        return None
    if made.left_out:
        say(f"Visualised only the {count(len(made.channels), 'channel')} with the lowest cosines.")
    made.save(out / _FOLDER)
    return made


def read_run(out: Path) -> Features | None:
    """Read a run's visualisations; None if it has none.

    Raises:
        RunError: they are damaged.
    """
    folder = out / _FOLDER
    return Features.load(folder) if folder.exists() else None


# The whole job for one layer: scan, find, split, apply, compare, evaluate, report.


Say = Callable[[str], None]

# As a run will scan the images of what it finds, whatever their labels.
_TRIED: dict[str, Any] = {"min_share": MIN_SHARE, "positions": True, "predicted": True}
_TRIED |= {"autocast": False, "check": True}
_N_TRIED = 20  # images, in search of one that can be read
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
    overwrite: bool = False,
) -> Run:
    """Do everything for one layer; started again, finished scans are not repeated.

    Args:
        model: gives logits for a batch of images.
        layer: a `named_modules()` name.
        train: images to find and split with.
        val: images to evaluate on.
        out: the run's folder. Where it holds a run with other settings, results go into
            `settings-2` in it, and so on; scans are shared.
        thresholds: when a channel counts as polysemantic.
        loading: how images go through the network.
        source: how to find network and images again.
        say: told of each step.
        title: of the report.
        encoder: of images, for semantic measures, as `load_encoder` takes it; by default the
            network's own penultimate layer.
        labels: "predicted" for images without labels, or to take them for what the network does.
        features: make feature visualisations of the split channels.
        overwrite: put the results, when they are finished, in the place of those in `out`.
    """
    embedding = prepare(model, {layer: out}, train, val, thresholds, encoder)
    home = home_of(out)
    sight = sight_of(val)  # a report that is written again knows no preprocessing
    options = {**vars(loading), "progress": True, "source": source, "labels": labels}
    # The smaller one first: what is wrong with its images is then told before the long one.
    say("Validation images:")
    val_scan = scan_into(model, {layer: home / "scan-val"}, val, **options)[layer]
    say("Training images:")
    train_scan = scan_into(model, {layer: home / "scan-train"}, train, **options)[layer]
    found = seen_in(val_scan, find(train_scan, **thresholds.of_find))
    settings: dict[str, Any] = {"title": title, "thresholds": vars(thresholds)}
    settings |= {"source": source, "encoder": encoder, "labels": labels}
    settings |= {"sight": sight and sight.to_dict()}
    settings |= {"scans": [train_scan.manifest.scan_id, val_scan.manifest.scan_id]}
    # Only now is it sure that the folder is this network's and these images'.
    folder = take_folder(out, settings, found)
    elsewhere = not is_same(folder, out)
    replaces = overwrite and elsewhere
    if elsewhere:
        say(tell_folder(out, folder, replaces=replaces))
    job = _Job(
        model=model,
        train=train,
        val=val,
        shown=as_labelled(val, val_scan),
        train_scan=train_scan,
        val_scan=val_scan,
        found=found,
        folder=folder,
        thresholds=thresholds,
        loading=replace(loading, batch_size=train_scan.manifest.batch_size),
        options=options,
        embedding=embedding,
        title=title,
        features=features,
        say=say,
    )
    done = _finish(job)
    if replaces:
        replace_results(out, folder)
        return replace(done, report=out / done.report.name)
    return done


@dataclass(frozen=True)
class _Job:
    """What is left to do when the scans are there."""

    model: nn.Module
    train: Dataset[Any]
    val: Dataset[Any]
    shown: Dataset[Any]  # val, labelled as it was scanned
    train_scan: Scan
    val_scan: Scan
    found: Findings
    folder: Path  # for the results
    thresholds: Thresholds
    loading: Loading
    options: dict[str, Any]  # of scans
    embedding: Encoder
    title: str
    features: bool
    say: Say


def _finish(job: _Job) -> Run:
    """Write findings; split, check, measure and show what was found."""
    found, folder = job.found, job.folder
    found.to_csv(folder / "findings.csv")
    counted = None
    if job.thresholds.concepts == "classes":  # clusters ask neither tau nor p
        counted = sensitivity(job.train_scan, found=found)
        counted.to_csv(folder / "sensitivity.csv")
    broken = [name_of(job.train, index) for index in job.train_scan.broken()]
    broken += [name_of(job.val, index) for index in job.val_scan.broken()]
    page = folder / "report.html"
    shown: dict[str, Any] = {"scan": job.val_scan, "train_scan": job.train_scan, "found": found}
    shown |= {"sensitivity": counted, "dataset": job.shown, "title": job.title}
    if not found.concepts:
        report(page, **shown)
        return Run(found, None, page, broken)
    pairs, channels = count(len(found), "pair"), count(len(found.concepts), "channel")
    job.say(f"Found {pairs} in {channels}; scanning their images again, with positions.")
    train_maps = _scan_positions(job, "train", job.train, job.train_scan)
    val_maps = _scan_positions(job, "val", job.val, job.val_scan)
    job.say("Splitting and checking the outputs.")
    divided = split(train_maps, found, everything=job.train_scan)
    divided.save(folder / "split.safetensors")
    baseline = split(train_maps, found, method="published", rho=job.thresholds.rho)
    baseline.save(folder / "split-published.safetensors")
    model2 = apply(job.model, divided)
    evaluation = _measure(job, model2, divided, baseline, val_maps)
    evaluation.save(folder / "evaluation.json")
    made = visualize_run(
        *(model2, found.layer, job.train, _by_cosine(found), folder, job.say), make=job.features
    )
    shown |= {"split": divided, "evaluation": evaluation, "maps": val_maps, "features": made}
    report(page, **shown)
    return Run(found, evaluation, page, broken)


def _measure(
    job: _Job, model2: nn.Module, divided: Split, baseline: Split, val_maps: Scan
) -> Evaluation:
    """Compare outputs, switch concept channels off, and take all measures of a split."""
    found, loading = job.found, vars(job.loading)
    output = compare_outputs(job.model, model2, job.val, tolerance=0.0, progress=True, **loading)
    ablated = _by_cosine(found)[:MAX_ABLATED]
    if len(ablated) < len(found.concepts):
        job.say(f"Switching off only the {len(ablated)} channels with the lowest cosines.")
    members = job.val_scan if found.clusters else None
    ablation = ablate(model2, job.shown, channels=ablated, scan=members, progress=True, **loading)
    return evaluate(
        divided,
        val_maps,
        baseline=baseline,
        output=output,
        ablation=ablation,
        semantics=_semantics(job, divided),
    )


def prepare(
    model: nn.Module,
    folders: Mapping[str, Path],
    train: Dataset[Any],
    val: Dataset[Any],
    thresholds: Thresholds,
    encoder: str | None,
) -> Encoder:
    """Tell what is wrong with a run before anything is scanned; get its encoder.

    Args:
        model: the network.
        folders: of the run, by layer.
        train: images that the network is tried on.
        val: images that are to be embedded.
        thresholds: of the run.
        encoder: of images, None for the network's own features.
    """
    check_thresholds(thresholds.tau, thresholds.p, thresholds.gamma, MIN_SHARE)
    check_rho(thresholds.rho)
    for folder in folders.values():
        refuse_strange(folder)
    _try_layers(unwrap(model), list(folders), train)
    if encoder is None:
        return Penultimate(model)
    loaded = load_encoder(encoder, device=str(device_of(model)))
    _try_encoder(loaded, val)
    return loaded


def _try_layers(model: nn.Module, layers: Sequence[str], images: Dataset[Any]) -> None:
    """Run the network on one image, and see that each layer can be scanned, split and switched off.

    What else may be wrong with images, the scans tell at their beginning.
    """
    image = first_readable(images, range(size_of(images)))
    if image is None:
        return
    twice = [Loaded(0, image, 0), Loaded(1, image, 0)]  # as some networks run on no single image
    images_here = torch.stack([image, image]).to(device_of(model))
    for layer in layers:
        name, module = resolve_layer(model, layer)
        place = Place(module, describe(name, module))
        with undisturbed(model), torch.enable_grad():
            look_first(model, images_here, [(place.spec, module)])
            scan_batch(model, [place], twice, **_TRIED)
        check_in_force(model, layer, images_here)


def _try_encoder(encoder: Encoder, images: Dataset[Any]) -> None:
    """Embed one image, so that an encoder that cannot is told before anything is scanned.

    Raises:
        ModelError: it cannot.
    """
    with ready(encoder) as encode:
        for place in range(min(_N_TRIED, size_of(images))):
            with suppress(DataError):  # a scan tells of broken images, or leaves them out
                encode(next(load_batches(encoder, images, [[place]], 0)))
                return


def tell_unseen(train: Dataset[Any], val: Dataset[Any], labels: Labels, say: Say) -> None:
    """Tell of classes without validation images, as their channels will be left out."""
    known = [None if labels == "predicted" else listed_labels(images) for images in (train, val)]
    if known[0] is None or known[1] is None:
        return  # they will be known only when all images were read
    missing = sorted(set(known[0]) - set(known[1]) - {UNLABELLED})
    if missing:
        names = class_names_of(train)
        told = [names[label] if label < len(names) else str(label) for label in missing[:5]]
        more = ", ..." if len(missing) > len(told) else ""
        say(
            f"The validation images have none of {count(len(missing), 'class', 'classes')} "
            f"({', '.join(told)}{more}); channels that one of them uses may be left out."
        )


def _scan_positions(job: _Job, kind: str, images: Dataset[Any], scan: Scan) -> Scan:
    """Scan the images of what was found with positions, unless a run in the folder has."""
    which = concerned_in(scan, job.found)
    folder = positions_folder(job.folder, kind, scan, **which)
    options = {**job.options, **which, "positions": True}
    name = scan.layer.name
    return scan_into(job.model, {name: folder}, images, **options)[name]


def concerned_in(scan: Scan, found: Findings) -> dict[str, Any]:
    """Say which images of a scan with positions are needed, as `unbraid.scan` takes it."""
    if scan.manifest.labels == "predicted" or found.clusters:
        return {"indices": found.members_in(scan).indices(found.classes)}
    seen = scan.labels_seen()
    return {"classes": [label for label in found.classes if label in seen]}


def _by_cosine(found: Findings) -> list[int]:
    """The channels, lowest cosine first, as time may not be enough for all."""
    by_cosine = dict.fromkeys(pair.channel for pair in found.pairs)
    return list(by_cosine | dict.fromkeys(found.channels))


def _semantics(job: _Job, divided: Split) -> Semantics | None:
    """Measure semantics; None where they were to be told by features that a network has not."""
    loading, encoder = job.loading, job.embedding
    workload: dict[str, Any] = {"batch_size": loading.batch_size, "workers": loading.workers}
    try:
        return measure_semantics(
            divided, job.val_scan, job.shown, encoder, progress=True, **workload
        )
    except ModelError as error:
        if not isinstance(encoder, Penultimate):
            raise
        job.say(f"Semantic measures are left out: {error}")
        return None


def seen_in(val_scan: Scan, found: Findings) -> Findings:
    """Leave out channels of which a concept has no validation image, and note how many."""
    counts = found.members_in(val_scan).count(found.classes)
    concepts = {
        channel: groups
        for channel, groups in found.concepts.items()
        if all(any(counts[number] for number in group) for group in groups)
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


# The whole job for several layers: scanned in one pass, then each as a run of its own.


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


# A finished run's report, written again from its folder without the network.


def report_again(out: Path) -> Path:
    """Write a finished run's report again from its folder.

    Raises:
        RunError: the folder holds no finished run.
    """
    settings = read_settings(out)
    if settings is None:
        raise RunError(f"{out} holds no finished run; make one with `unbraid run`.")
    thresholds = Thresholds(**settings["thresholds"])
    source, title = settings["source"], settings["title"]
    home = home_of(out)
    train_scan, val_scan = open_scan(home / "scan-train"), open_scan(home / "scan-val")
    found = seen_in(val_scan, find(train_scan, **thresholds.of_find))
    counted = divided = evaluation = val_maps = features = None
    if thresholds.concepts == "classes":
        counted = sensitivity(train_scan, found=found)
    if found.concepts:
        if not (out / "evaluation.json").exists():
            raise RunError(f"{out} holds an unfinished run; start it again, it goes on there.")
        divided = Split.load(out / "split.safetensors")
        measured = out / "evaluation.json"
        baseline = Split.load(out / "split-published.safetensors")
        maps = positions_folder(out, "val", val_scan, **concerned_in(val_scan, found))
        if not maps.exists():
            raise RunError(f"{maps} is gone, which the page shows; start the run again.")
        val_maps = open_scan(maps)
        features = read_run(out)
        evaluation = evaluate(
            divided,
            val_maps,
            baseline=baseline,
            output=read_output(measured),
            ablation=read_ablation(measured),
            semantics=read_semantics(measured),
        )
    return report(
        out / "report.html",
        scan=val_scan,
        train_scan=train_scan,
        found=found,
        sensitivity=counted,
        split=divided,
        evaluation=evaluation,
        maps=val_maps,
        features=features,
        dataset=as_labelled(validation_images(source, val_scan, settings.get("sight")), val_scan),
        title=title,
    )


def validation_images(
    source: dict[str, Any], scan: Scan, sight: dict[str, Any] | None = None
) -> Dataset[Any]:
    """Open a run's validation images again, for looking at.

    Args:
        source: how the run found its images.
        scan: of them.
        sight: the part of a picture that the network saw, from `Sight.to_dict`; None if unknown.

    Raises:
        DataError: they are gone; a new page would lack the pictures that the old one has.
    """
    if "demo" in source:
        from unbraid.demo.network import load_images

        return load_images("test")
    if "data" not in source:
        raise RunError("The run does not say where its images are; make it anew.")
    seen = None if sight is None else Sight(**sight)
    with_classes = source.get("class_folders", True)
    listing = list_images(part_of(source["data"], "val"), with_classes)
    labels = _labels(listing, scan) if with_classes else {}
    return as_scanned(ListedImages(listing, seen, labels, scan.class_names), scan)


def _labels(listing: Listing, scan: Scan) -> dict[str, int]:
    """Tell classes apart as the scan did; without the network their numbers may be others."""
    if not listing.classes:
        return {}
    try:
        return read_classes(listing.known, Outputs(scan.class_names, len(scan.class_names))).labels
    except DataError:  # other names were given for them
        return {name: place for place, name in enumerate(listing.known.seen)}


# Figures of a finished run, made from its folder without the network.


FigureKind = Literal["teaser", "densities", "sources"]


def figure_of_run(out: Path, channel: int, kind: FigureKind = "teaser") -> Figure:
    """Draw a figure of one channel of a finished run.

    Args:
        out: the run's folder.
        channel: one that the run split.
        kind: "teaser" as `unbraid.teaser_figure` draws it, with feature visualisations where the
            run made them; "densities" and "sources" as `unbraid.density_figure` and
            `unbraid.source_figure` do.

    Raises:
        RunError: the folder holds no finished run, or the run split no channel.
        DataError: the run's images are gone.
        UsageError: the run did not split this channel.
        UnbraidError: matplotlib is not installed.
    """
    settings = read_settings(out)
    if settings is None:
        raise RunError(f"{out} holds no finished run; make one with `unbraid run`.")
    divided = out / "split.safetensors"
    if not divided.exists():
        finished = (out / "report.html").exists()
        rest = "see its report.html" if finished else "start the run again to finish it"
        raise RunError(f"{out} holds no split, so there is nothing to draw; {rest}.")
    split, scan = Split.load(divided), open_scan(home_of(out) / "scan-val")
    if kind == "densities":
        return density_figure(split, scan, channel)
    if kind == "sources":
        return source_figure(split, scan, channel)
    images = as_labelled(validation_images(settings["source"], scan), scan)
    return teaser_figure(split, scan, channel, dataset=images, features=read_run(out))
