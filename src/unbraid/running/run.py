"""The whole job: `_make` lists the steps that fill a run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset

from unbraid.base.arguments import whole_number
from unbraid.base.errors import DataError, RunError, SizesDiffer, UnbraidError, UsageError
from unbraid.base.files import set_aside, write_whole
from unbraid.base.modes import in_plain_modes
from unbraid.base.tables import count
from unbraid.finding.find import find
from unbraid.finding.find_options import check_rho, plain_thresholds
from unbraid.finding.thresholds import ONE_CLASS
from unbraid.images.broken import UNLABELLED, Loaded, first_readable
from unbraid.images.dataset import class_names_of, listed_labels, size_of
from unbraid.images.mapped import distinct
from unbraid.images.sample import SIZES
from unbraid.images.which import images_named, name_of
from unbraid.measuring.encoders import Encoder, Penultimate, load_batches, load_encoder, ready
from unbraid.measuring.evaluate import evaluate
from unbraid.measuring.results import Evaluation
from unbraid.networks.copying import device_of, unwrap
from unbraid.networks.layers import describe, resolve_layer
from unbraid.networks.preflight import look_first
from unbraid.networks.relevance import undisturbed
from unbraid.networks.weights import hash_weights
from unbraid.reporting.pictures import sight_of_files
from unbraid.running import folders
from unbraid.running.finished import Run, looked_at, seen_in
from unbraid.running.folders import Settings, Thresholds, as_labelled
from unbraid.running.measures import Measured, Networks, formatted_as, measure
from unbraid.running.sample import by_cosine, bytes_of_positions, concerned_in
from unbraid.scanning.batch import Place, scan_batch
from unbraid.scanning.records import Scan
from unbraid.scanning.scan import scan_into
from unbraid.scanning.scan_options import MAX_PLACES, MIN_SHARE, Labels, Loading
from unbraid.scanning.targets import LABEL, GivenTarget, Scalar, read_target
from unbraid.splitting.split import split
from unbraid.splitting.splits import Split
from unbraid.surgery.apply import apply, check_in_force
from unbraid.visualizing.features import INDEX, Features
from unbraid.visualizing.visualize import visualize

SECONDS = 120.0  # of visualising, after which no more channels are begun
_N_TRIED = 20  # images, in search of one that can be read


@dataclass(frozen=True)
class Job:
    """What is asked of a run."""

    model: nn.Module  # gives logits for a batch of images
    train: Dataset[Any]  # images to find and split with
    val: Dataset[Any]  # images to evaluate on
    title: str  # of the report
    thresholds: Thresholds
    loading: Loading
    source: dict[str, Any]  # how to find network and images again
    say: Callable[[str], None]  # told of each step
    encoder: str | None = None  # for semantic measures; None: the network's penultimate layer
    labels: Labels = "given"  # "predicted" for images without, or to take them for these
    target: GivenTarget | Scalar = LABEL  # whose gradient says which channels matter
    everything: bool = False  # measure on all images, not on a sample
    features: bool = True  # make feature visualisations of the split channels
    overwrite: bool = False  # put finished results in the place of those in the folder
    first_look: Path | None = None  # folder of a run over some of the images, perhaps to come
    keep: bool = False  # leave finished results as they are, instead of making them again
    places: int = 0  # of each channel, that concepts are made of in place of whole images
    command: str = ""  # that asked for it, for people; kept with the settings

    def scan(self, images: Dataset[Any], into: Mapping[str, Path], **which: Any) -> dict[str, Scan]:
        """Scan layers into their folders."""
        options = {**vars(self.loading), "source": self.source, "labels": self.labels}
        options["target"] = self.target
        return scan_into(self.model, into, images, progress=True, **options, **which)

    def loading_of(self, made: Run) -> dict[str, Any]:
        """How images go through the network after the scans: in batches as large as theirs."""
        return {**vars(self.loading), "batch_size": made.train_scan.manifest.batch_size}


def run(
    model: nn.Module, layer: str, train: Dataset[Any], val: Dataset[Any], out: Path, **options: Any
) -> Run:
    """Do everything for one layer; `options` are the other fields of `Job`.

    Started again, finished scans are not repeated. Where `out` holds a run with other settings,
    results go into `settings-2` in it, and so on; scans are shared.
    """
    return run_each(Job(model, train, val, **options), {layer: out})[layer]


@in_plain_modes
def run_each(
    job: Job,
    places: Mapping[str, Path],
    looks: Mapping[str, Path] | None = None,
    *,
    named: bool = False,
) -> dict[str, Run]:
    """Scan all layers at once, then make a run of each in its folder."""
    encoder = prepare(job, places)
    train_scans, val_scans = scan_each(job, places, looks)
    runs = {}
    for name, out in places.items():
        if len(places) > 1:
            job.say(f"Layer {name}.")
        own = replace(job, title=f"{job.title} · {name}") if named else job
        runs[name] = run_layer(own, out, train_scans[name], val_scans[name], encoder)
    return runs


def scan_each(
    job: Job, places: Mapping[str, Path], looks: Mapping[str, Path] | None = None
) -> tuple[dict[str, Scan], dict[str, Scan]]:
    """Scan training and validation images, all layers in one pass; `looks` are first looks."""
    homes = {name: folders.home_of(out) for name, out in places.items()}
    # The smaller one first: what is wrong with its images is then told before the long one.
    val_scans, train_scans = (
        _scan_images(job, homes, looks or {}, kind) for kind in ("val", "train")
    )
    return train_scans, val_scans


def _scan_images(
    job: Job, homes: Mapping[str, Path], looks: Mapping[str, Path], kind: Literal["train", "val"]
) -> dict[str, Scan]:
    """Scan images of a kind, those of a first look first."""
    what, images = ("Training", job.train) if kind == "train" else ("Validation", job.val)
    job.say(f"{what} images:")
    own = {name: look / f"scan-{kind}" for name, look in looks.items()}
    which: dict[str, Any] = {"n_first": SIZES[kind], "looks": own} if own else {}
    if job.places:
        which["places"] = job.places
    return job.scan(images, {name: home / f"scan-{kind}" for name, home in homes.items()}, **which)


def broken_names(job: Job, train_scan: Scan, val_scan: Scan) -> list[str]:
    """Names of the images that scans left out."""
    names = [name_of(job.train, index) for index in train_scan.broken()]
    return names + [name_of(job.val, index) for index in val_scan.broken()]


def run_layer(job: Job, out: Path, train_scan: Scan, val_scan: Scan, encoder: Encoder) -> Run:
    """Find, choose a folder for the results, and make them there."""
    searched, measured = (looked_at(own, job.places) for own in (train_scan, val_scan))
    found = seen_in(measured, find(searched, **job.thresholds.of_find, progress=True))
    scans = (train_scan.manifest.scan_id, val_scan.manifest.scan_id)
    source = job.source | ({"command": job.command} if job.command else {})
    home = folders.home_of(out)
    asked = (job.title, job.thresholds, source, job.encoder, job.labels)
    named = read_target(job.target).name
    # A report that is written again knows no preprocessing.
    about = (sight_of_files(job.val), scans, job.everything, named, job.places)
    settings = Settings(*asked, *about)
    before = {path: folders.read_settings(path) for path in (out, *folders.results_in(home))}
    # Only now is it sure that the folder is this network's and these images'.
    folder = folders.take_folder(out, settings, found)
    if folder != out:
        job.say(folders.tell_folder(out, folder, replaces=job.overwrite))
    made = Run(folder)
    made.train_scan, made.val_scan, made.found = train_scan, val_scan, found
    made.images = as_labelled(job.val, val_scan)
    made.broken = broken_names(job, train_scan, val_scan)
    if job.keep and made.is_finished(job.features):
        known = before.get(folder)
        drawn = (source.get("bands"), known and known.source.get("bands"))
        if any(drawn):  # its page may be drawn by others, as a run may stop before it is
            made.report()
        return made
    _make(job, made, encoder)
    if folder != out and job.overwrite:
        folders.replace_results(out, folder)
        made.folder, made.page = out, out / made.page.name
    return made


def _make(job: Job, made: Run, encoder: Encoder) -> None:
    """Take the steps of a run from what was found to the report, and write each result."""
    found, folder = made.found, made.folder
    found.to_csv(folder / "findings.csv")
    if made.sensitivity is not None:
        made.sensitivity.to_csv(folder / "sensitivity.csv")
    if found.concepts:
        job.say(f"Found {found.pairs_in_words} in {found.channels_in_words}; splitting them.")
        made.split = split(made.searched, found, progress=True)
        made.split.save(folder / "split.safetensors")
        model2 = apply(job.model, made.split)
        if not job.places:  # both ask for whole images
            _keep_positions(job, made)
        made.evaluation = _measure(job, made, model2, encoder)
        made.evaluation.save(folder / "evaluation.json")
        made.features = _visualize(job, made, model2)
    made.report()


def _keep_positions(job: Job, made: Run) -> None:
    """Make what asks for positions, which of images of different sizes cannot be kept."""
    told = made.folder / folders.NO_POSITIONS
    made.baseline = made.val_maps = None
    try:
        made.baseline = _baseline(job, made)
        made.baseline.save(made.folder / "split-published.safetensors")
        made.val_maps = _scan_positions(job, made, "val")
    except SizesDiffer:
        rho = "" if made.baseline else ", and the published rule too, unless --rho is given"
        why = (
            f"Images are of different sizes, so rectified errors are left out{rho}. A Resize to "
            "one size in the preprocessing would keep them."
        )
        job.say(why)
        write_whole(told, f"{why}\n".encode())
    else:
        told.unlink(missing_ok=True)


def _baseline(job: Job, made: Run) -> Split:
    """Split by the published rule, whose rho, unless it is given, asks for positions."""
    asked: dict[str, Any] = {"method": "published", "everything": made.train_scan, "progress": True}
    if job.thresholds.rho is not None:
        return split(made.train_scan, made.found, rho=job.thresholds.rho, **asked)
    return split(_scan_positions(job, made, "train"), made.found, **asked)


def _scan_positions(job: Job, made: Run, kind: Literal["train", "val"]) -> Scan:
    """Scan images of what was found with positions, unless a run in the folder has."""
    images, scan = (job.train, made.train_scan) if kind == "train" else (job.val, made.val_scan)
    if len({int(n) for column in scan.columns("n_positions") for n in column.unique()}) > 1:
        raise SizesDiffer("Images are of different sizes, so no positions are kept of them.")
    which = made.with_positions(kind)
    folder = folders.positions_folder(made.folder, kind, scan, **which)
    what = "training image" if kind == "train" else "validation image"
    why = ", for the published rule" if kind == "train" else ""
    n_images = f"the {what}s of concepts"
    if "indices" in which:
        n_bytes = len(which["indices"]) * bytes_of_positions(scan)
        n_images = f"{count(len(which['indices']), what)} (about {n_bytes / 1e6:,.0f} MB)"
    more = "; --all takes all of concepts" if which != concerned_in(scan, made.found) else ""
    job.say(f"Scanning {n_images} again, with positions{why}{more}.")
    # As that of all images, however it was made, or it would be looked for in vain later.
    which |= {n: getattr(scan.manifest, n) for n in ("channels_last", "autocast", "min_share")}
    try:
        return job.scan(images, {scan.layer.name: folder}, positions=True, **which)[scan.layer.name]
    except SizesDiffer:  # of as many positions
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _measure(job: Job, made: Run, model2: nn.Module, encoder: Encoder) -> Evaluation:
    """Compare outputs, switch concept channels off, and take all measures of a split."""
    nets = Networks(job.model, model2, encoder)
    about = (made.found, made.split, made.val_scan, job.val, job.everything)
    places = made.measured if job.places else None
    measured = Measured(*about, read_target(job.target), places)
    with formatted_as(made.val_scan, job.model, model2):
        measures = measure(nets, measured, job.say, job.loading_of(made))
    measures |= {"baseline": made.baseline, "maps": made.val_maps}
    return evaluate(made.split, made.measured, progress=True, **measures)


def _visualize(job: Job, made: Run, model2: nn.Module) -> Features | None:
    """Visualise the split channels, unless that is done; None where it cannot be done."""
    folder = made.folder / folders.FEATURES
    with suppress(RunError):  # those that cannot be read are made again
        if made.features is not None and made.features.weights == hash_weights(model2):
            return made.features
    if (folder / INDEX).exists():  # else nobody finished them
        set_aside(folder, ".replaced")
    if not job.features:
        return None
    job.say("Visualising channels and concept channels.")
    asked = (made.found.layer, job.train, by_cosine(made.found))
    try:
        features = visualize(model2, *asked, seconds=SECONDS, progress=True)
    except UnbraidError as error:  # a page without them is better than none
        job.say(f"Feature visualisations are left out: {error}")
        write_whole(made.folder / folders.NO_FEATURES, f"{error}\n".encode())
        return None
    (made.folder / folders.NO_FEATURES).unlink(missing_ok=True)
    if features.left_out:
        n_made = count(len(features.channels), "channel")
        job.say(
            f"Visualised only the {n_made} with the lowest cosines, for lack of time; "
            "unbraid.visualize in Python makes the others (docs/visualisation.md)."
        )
    features.save(folder)
    return features


def prepare(job: Job, places: Mapping[str, Path]) -> Encoder:
    """Tell what is wrong with a run before anything is scanned; return its encoder of images.

    The network is run on one image, to see that each layer can be scanned, split and switched off.
    What else may be wrong with images, the scans tell at their beginning.
    """
    plain_thresholds(job.thresholds.tau, job.thresholds.p, job.thresholds.gamma, MIN_SHARE)
    check_rho(job.thresholds.rho)
    target = read_target(job.target)
    without = "a target" if target.value is None else "labels" if job.labels == "none" else ""
    if without and job.thresholds.concepts != "clusters":
        raise UsageError(
            f"Without {without} there are no classes to find concepts of; ask for "
            "concepts='clusters'."
        )
    by_class = job.labels == "given" and job.thresholds.concepts == "classes"
    if by_class and len(distinct(listed_labels(job.train) or ()) - {UNLABELLED}) == 1:
        raise UsageError(ONE_CLASS)
    _check_places(job)
    for folder in places.values():
        for own in folders.results_in(folders.home_of(folder)):
            folders.read_settings(own)  # else it would not be known whose results they are
    for layer in places:
        try_layer(job, layer)
    if job.encoder is None:
        return Penultimate(job.model)
    encoder = load_encoder(job.encoder, device=str(device_of(job.model)))
    with ready(encoder) as encode, images_named(job.val):
        for index in range(min(_N_TRIED, size_of(job.val))):
            with suppress(DataError):  # a scan tells of broken images, or leaves them out
                encode(next(load_batches(encoder, job.val, [[index]], 0)))
                break
    return encoder


def _check_places(job: Job) -> None:
    """Raise a UsageError if what is asked for cannot be made of places."""
    whole_number("places", job.places, 0, MAX_PLACES)
    if not job.places:
        return
    if job.thresholds.concepts != "clusters":
        raise UsageError(
            "Places have no classes to find concepts of; ask for concepts='clusters' with places."
        )
    if job.thresholds.rho is not None:
        raise UsageError(
            "rho is of the published rule, which is for whole images; leave it out with places."
        )
    if job.encoder is not None:
        raise UsageError(
            "An encoder compares whole images, so from places there is nothing for it to do; "
            "leave it out."
        )


def try_layer(job: Job, layer: str) -> None:
    """Run the network on an image, to see that a layer can be scanned, split and switched off."""
    images = try_scan(job, [layer], positions=True)  # as a run will scan what it finds
    if images is not None:
        check_in_force(unwrap(job.model), layer, images)


def try_scan(job: Job, layers: Sequence[str], *, positions: bool) -> torch.Tensor | None:
    """Run the network on an image twice, to see that layers can be scanned; return both, if any."""
    model = unwrap(job.model)
    image = first_readable(job.train, range(size_of(job.train)))
    if image is None:
        return None
    # Two, as some networks run on no single image.
    target = read_target(job.target)
    labels = "predicted" if target.of_class else "given"
    tried: dict[str, Any] = {"min_share": MIN_SHARE, "positions": positions, "labels": labels}
    tried["target"] = target
    twice = [Loaded(0, image, 0), Loaded(1, image, 0)]
    images = torch.stack([image, image]).to(device_of(model))
    modules = dict(resolve_layer(model, layer) for layer in layers)
    places = [Place(module, describe(name, module)) for name, module in modules.items()]
    with undisturbed(model), torch.enable_grad():
        look_first(model, images, [(place.spec, place.module) for place in places])
        scan_batch(model, places, twice, **tried, autocast=False, check=True)
    return images


def tell_unseen(job: Job) -> None:
    """Tell of classes without validation images, as their channels will be left out."""
    train, val = (listed_labels(images) for images in (job.train, job.val))
    if job.labels != "given" or train is None or val is None:
        return  # they will be known only when all images were read
    missing = sorted(distinct(train) - distinct(val) - {UNLABELLED})
    if missing:
        names = class_names_of(job.train)
        told = [names[label] if label < len(names) else str(label) for label in missing[:5]]
        more = ", ..." if len(missing) > len(told) else ""
        job.say(
            f"The validation images have none of {count(len(missing), 'class', 'classes')} "
            f"({', '.join(told)}{more}); channels that one of them uses may be left out."
        )
