"""Where a run's results lie: in its folder, or in `settings-N` in it beside those of other runs.

Scans lie in the run's folder and are shared. No run ever writes over what another one found.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.base.files import refuse_file, remove_leftovers, write_new, write_whole
from unbraid.base.schema import build, in_range, read_json, unread
from unbraid.base.tables import csv_text
from unbraid.finding.find_options import Tau
from unbraid.finding.findings import COLUMNS, ConceptKind, Findings
from unbraid.images.dataset import Relabelled, lie_at, listed_labels, size_of
from unbraid.images.identity import ids_of
from unbraid.images.kept import LISTED, LISTED_PARTS
from unbraid.images.labels import Outputs, read_classes
from unbraid.images.listing import ListedImages
from unbraid.images.open import list_images
from unbraid.images.own import refuse_own
from unbraid.images.sources import SAVED, part_of
from unbraid.images.tar import is_url
from unbraid.networks.models import LoadedModel
from unbraid.reporting.drawing import draw_by
from unbraid.reporting.pictures import Sight
from unbraid.scanning.as_scanned import AsScanned, as_scanned
from unbraid.scanning.manifest import hash_indices, read_manifest
from unbraid.scanning.records import Scan
from unbraid.scanning.scan_options import MAX_PLACES

SCANS = ("scan-train", "scan-val")
SETTINGS = "settings.json"
FEATURES = "features"
CIRCUITS = "circuits.json"  # through earlier layers
NO_FEATURES = "no-features.txt"  # why they could not be made
NO_POSITIONS = "no-positions.txt"  # why none were kept, so that what asks for them is left out
FIRST_LOOK = "quick"  # folder of a run over some of the images
_RESULTS = (
    "findings.csv",
    "sensitivity.csv",
    "split.safetensors",
    "split-published.safetensors",
    "evaluation.json",
    CIRCUITS,
    NO_FEATURES,
    NO_POSITIONS,
    "report.html",
)
_OWN = {  # files by what else lies in their folder
    SETTINGS: (SETTINGS, *_RESULTS, *LISTED_PARTS.values()),
    "manifest.json": ("manifest.json", "layer.safetensors", LISTED, "shard-*.safetensors"),
    "features.json": ("features.json", "*.png"),
}
_NUMBERED = re.compile(r"settings-([2-9]|[1-9]\d+)")


@dataclass(frozen=True)
class Thresholds:
    """When a channel counts as polysemantic; "Find" in docs/method.md."""

    tau: Tau = "auto"
    p: float = 0.75
    gamma: float = 0.5
    rho: float | None = None  # of the published baseline; None: chosen per channel
    concepts: ConceptKind = "classes"  # or clusters of images

    @property
    def of_find(self) -> dict[str, Any]:
        """The arguments of `unbraid.find`."""
        return {name: value for name, value in asdict(self).items() if name != "rho"}


@dataclass(frozen=True)
class Settings:
    """What a run was asked for, kept in its folder so that it can be told from another.

    >>> str(Settings("a title", Thresholds(rho=0.5, concepts="clusters"), {}, encoder="timm:x"))
    'tau auto, p 0.75, gamma 0.5, rho 0.5, concepts clusters, encoder timm:x'
    """

    title: str
    thresholds: Thresholds
    source: dict[str, Any]  # how to find network and images again
    encoder: str | None = None
    labels: str = "given"
    sight: Sight | None = None  # the part of its pictures that the network sees, if known
    scans: tuple[str, ...] = ()  # what identifies them; older runs do not name theirs
    everything: bool = False  # whether all is measured on all images, not on a sample
    target: str = "label"  # name of the number of each image whose gradient was taken
    places: int = 0  # of each channel, that concepts are made of; 0: of whole images

    def same_results(self, other: Settings) -> bool:
        """Whether two runs come to the same results: title, source and sight change none."""
        if self.scans and other.scans and self.scans != other.scans:
            return False
        mine, theirs = (
            (s.thresholds, s.encoder, s.labels, s.everything, s.target, s.places)
            for s in (self, other)
        )
        return mine == theirs

    def __str__(self) -> str:
        """Name what results depend on, thresholds always and the rest where it is unusual."""
        told = asdict(self.thresholds) | {"labels": self.labels, "encoder": self.encoder}
        told |= {"target": self.target, "places": self.places or None}
        told |= {"images measured": "all" if self.everything else None}
        usual = {"rho": None, "concepts": "classes", "labels": "given", "encoder": None}
        usual |= {"images measured": None, "target": "label", "places": None}
        return ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in told.items()
            if name not in usual or value != usual[name]
        )


def first_look_in_words(source: Mapping[str, Any], found: Findings) -> str:
    """Say what a first look rests on, how sure it is, and what looks at the rest; else nothing."""
    n_sure = len(found.sure_channels)
    n_uncertain = len(found.concepts) - n_sure
    return look_in_words(source, (n_sure, n_uncertain))


def look_in_words(source: Mapping[str, Any], n_found: tuple[int, int] | None = None) -> str:
    """Say what a first look rests on, what was found, and what looks at the rest; else nothing.

    `n_found` counts the sure and the uncertain polysemantic channels.
    """
    look = source.get("first_look")
    if not isinstance(look, dict) or not all(
        isinstance(look.get(k), str) for k in ("images", "command")
    ):
        return ""
    found = ""
    if n_found is not None:
        found = f": {n_found[0]:,} sure, {n_found[1]:,} uncertain polysemantic channels"
    return f"First look at {look['images']}{found}. The full run: {look['command']}"


def read_settings(out: Path) -> Settings | None:
    """Read a run's settings, None if there is no run; RunError if they are something else."""
    path = out / SETTINGS
    try:
        entries = read_json(path)
        if isinstance(entries, dict):  # other versions may know of more
            names = {field.name for field in fields(Settings)}
            entries = {name: value for name, value in entries.items() if name in names}
            entries.setdefault("everything", True)  # as versions did that knew no sample
        settings = build(Settings, entries)
        if not isinstance(settings.source.get("data", ""), str):
            raise ValueError("the folder of the data is no text")
        in_range("the number of places", settings.places, 0, MAX_PLACES)
        for size in vars(settings.sight or Sight()).values():
            in_range("a size in sight", 1.0 if size is None else size, 1e-6, 1e6)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        text = f"{path} is not that of a run ({error}); name another folder."
        raise unread(error, text) from None
    return settings


def is_numbered(folder: Path) -> bool:
    """Whether a folder has the name of one for a run with other settings."""
    return _NUMBERED.fullmatch(os.path.basename(os.path.abspath(folder))) is not None


def home_of(folder: Path) -> Path:
    """Return the run's folder, where scans lie, of a folder with results; perhaps the same."""
    if not is_numbered(folder) or any((folder / name).exists() for name in SCANS):
        return folder
    absolute = Path(os.path.abspath(folder))
    home = folder.parent if folder.name == absolute.name else absolute.parent
    return home if any((home / name).exists() for name in SCANS) else folder


def results_in(home: Path) -> list[Path]:
    """Return the folders of a run's folder that may hold results: itself, then by number."""
    inside = [path for path in home.glob("settings-*") if is_numbered(path) and path.is_dir()]
    return [home, *sorted(inside, key=lambda path: int(path.name.removeprefix("settings-")))]


def holds_results(folder: Path) -> bool:
    """Whether a run has begun to write results that took time into a folder."""
    names = (SETTINGS, "split.safetensors", "evaluation.json", FEATURES)
    return any(os.path.lexists(folder / name) for name in names)


def refuse_result(file: Path | None) -> None:
    """UsageError if a file is part of a run or scan, or cannot lie where it is to be written."""
    if file is None:
        return
    refuse_file(file.parent)
    for mark, patterns in _OWN.items():
        own = any(fnmatchcase(file.name, pattern) for pattern in patterns)
        if own and (file.parent / mark).exists():
            raise UsageError(f"{file} belongs to what lies in {file.parent}; name another file.")


def refuse_folder(folder: Path | None) -> None:
    """UsageError if a folder is a file, or that of a run or scan, which takes no other files."""
    if folder is None:
        return
    refuse_file(folder)
    if any((folder / mark).exists() for mark in (SETTINGS, "manifest.json")):
        raise UsageError(f"{folder} holds a run or scan; name another folder.")


def take_folder(out: Path, settings: Settings, found: Findings) -> Path:
    """Find the folder for a run's results, and write its settings there before anything else.

    A folder is taken for good by whoever writes `settings.json` there first, so two runs that start
    at once never share one unless they are the same.
    """
    home, text = home_of(out), (json.dumps(asdict(settings), indent=2) + "\n").encode()

    def is_same(folder: Path) -> bool:
        before = read_settings(folder)
        if before is None or not settings.same_results(before):
            return False
        if before != settings:  # such as where the images now are
            write_whole(folder / SETTINGS, text)
        return True

    def take(folder: Path) -> bool:
        remove_leftovers(folder)
        return write_new(folder / SETTINGS, text) or is_same(folder)

    for folder in (out, *results_in(home)):
        if is_same(folder):
            return folder
    every = chain((out, home), (home / f"settings-{number}" for number in count(2)))
    return next(folder for folder in every if _is_free(folder, found) and take(folder))


def _is_free(folder: Path, found: Findings) -> bool:
    """Whether no results of another run would be lost: those without settings found the same."""
    if os.path.lexists(folder / SETTINGS) or (folder.exists() and not folder.is_dir()):
        return False
    if not holds_results(folder):
        return True
    with suppress(OSError):
        table = (folder / "findings.csv").read_bytes()
        return table == csv_text(COLUMNS, found.rows()).encode()
    return False


def tell_folder(out: Path, folder: Path, *, replaces: bool) -> str:
    """Say why results go into another folder than `out`, perhaps to replace those in it later."""
    if not holds_results(out):
        here = f"{folder} holds a run with these settings, which goes on there"
        return f"{here}, and then into {out}." if replaces else f"{here}."
    before = read_settings(out)
    what = f"a run with {before}" if before else "results whose settings are gone"
    if replaces:
        return f"{out} holds {what}; this one, in {folder}, takes its place when it is finished."
    return f"{out} holds {what}; this one goes into {folder}."


def replace_results(out: Path, by: Path) -> None:
    """Put the finished results of one folder in the place of those in another.

    The old ones go first and `settings.json` comes last, so that the folder never holds a mixture
    that looks like one run. Scans, those with positions too, and all other files stay.
    """
    for name in (SETTINGS, *_RESULTS):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / FEATURES, ignore_errors=True)
    for path in sorted(by.glob("positions-*")):
        path.rename(_unused(out, path.name))
    for name in (*_RESULTS, FEATURES, SETTINGS):
        if (by / name).exists():
            (by / name).rename(out / name)
    with suppress(OSError):  # it holds something else
        by.rmdir()


def positions_folder(results: Path, kind: str, scan: Scan, **which: Any) -> Path:
    """Return the folder of a scan with positions of some images: one that is there, or a new one.

    Args:
        results: the folder with the run's results.
        kind: "train" or "val".
        scan: of all images.
        which: `classes` or `indices` of the images concerned, as in `unbraid.scan`.
    """
    own = {name: sorted(set(chosen)) for name, chosen in which.items()}
    classes, indices = tuple(own["classes"]) if "classes" in own else None, own.get("indices")
    which = {"classes": classes, "indices": hash_indices(indices), "first": "", "n_first": 0}
    wanted = replace(scan.manifest, **which, positions=True)
    others = [folder for folder in results_in(home_of(results)) if folder != results]
    for folder in (results, *others):
        for path in sorted(folder.glob(f"positions-{kind}*")):
            with suppress(RunError):  # one that cannot be read is none
                there = read_manifest(path)
                # A scan keeps its own number of threads when it goes on.
                if there is not None and not replace(
                    wanted, threads=there.threads, shard_size=there.shard_size
                ).differences(there):
                    return path
    return _unused(results, f"positions-{kind}")


def _unused(folder: Path, name: str) -> Path:
    """Return a place in a folder where no scan has begun: of this name, or numbered."""
    places = chain([folder / name], (folder / f"{name}-{number}" for number in count(2)))
    return next(path for path in places if next(path.glob("shard-*"), None) is None)


def as_labelled(images: Dataset[Any], scan: Scan) -> Dataset[Any]:
    """Images with the labels that a scan took them for: predicted ones in place of given ones."""
    labels = labels_as_scanned(scan)
    return images if labels is None else Relabelled(images, labels)


def labels_as_scanned(scan: Scan) -> dict[int, int] | None:
    """By index, the labels that a scan took images for where these were not given; else None."""
    if scan.manifest.labels == "given":
        return None
    labels: dict[int, int] = {}
    for own in scan.tensors("index", "label"):
        labels.update(zip(own["index"].tolist(), own["label"].tolist(), strict=True))
    return labels


def validation_images(
    source: dict[str, Any],
    scan: Scan,
    sight: Sight | None = None,
    part: Literal["train", "val"] = "val",
    network: LoadedModel | None = None,
) -> Dataset[Any]:
    """Open a run's validation images again, to look at the part that the network saw if known.

    `scan` is of them, or, with `part`, of the training images, which then are opened; DataError if
    they are gone. With a network, they are in its preprocessing.
    """
    if "demo" in source:
        if source.keys() & {"data", "bands"}:
            raise UsageError(
                "The demo's images are included and are drawn as they are; leave out --data and "
                "--bands."
            )
        from unbraid.demo.network import load_images

        return load_images("test" if part == "val" else "train")
    if "data" not in source:
        raise RunError("The run does not say where its images are; make it again.")
    refuse_own(source["data"])
    with_classes = source.get("class_folders", True)
    where = source["data"].removeprefix(SAVED)
    try:
        listing = list_images(part_of(source["data"], part), with_classes)
    except DataError:
        if os.path.exists(where) or is_url(where) or "{" in where:  # which stands for many files
            raise
        raise DataError(
            f"The run's images are no longer in {where}; bring them back, or add --data "
            "and their new place."
        ) from None
    labels: dict[str, int] = {}
    if with_classes and listing.classes:
        outputs = Outputs(scan.class_names, len(scan.class_names))
        try:
            labels = read_classes(listing.known, outputs).labels
        except DataError:  # other names were given; without the network numbers may differ
            labels = {name: number for number, name in enumerate(listing.known.seen)}
    transform: Any = sight
    if listing.of_tensors:
        transform = network and network.tensor_transform
    elif network is not None:
        transform = network.transform
    images = ListedImages(listing, transform, labels, scan.class_names)
    images.unprepared = listing.of_tensors and network is None and sight is None
    if not images.unprepared:  # whose axes may be others than those that bands were named of
        draw_by(images, source.get("bands"))
    return as_scanned(images, scan)


def those_scanned(images: Dataset[Any], scan: Scan) -> Dataset[Any]:
    """Hand images on as they are; UsageError if they are seen to be others than were scanned.

    Images with ids of their own are known by these. Others are known by their places, so no place
    may be missing, and labels of now and then go one to one: classes may go by other numbers now.
    """
    listed = images.dataset if isinstance(images, AsScanned) else images
    if not _go_by_place(images, listed, scan):
        return images
    instead = "name those that were, by --data"
    there = images.now if isinstance(images, AsScanned) else range(size_of(listed))
    if any(index not in there for own in scan.columns("index") for index in own.tolist()):
        raise UsageError(
            f"There are {size_of(listed):,} images, fewer images than were scanned; {instead}."
        )
    labels = listed_labels(images)
    if labels is None or scan.manifest.labels != "given":
        return images
    pairs = {
        (then, labels[index])
        for own in scan.tensors("index", "label")
        for index, then in zip(own["index"].tolist(), own["label"].tolist(), strict=True)
    }
    if any(len({pair[k] for pair in pairs}) < len(pairs) for k in (0, 1)):
        raise UsageError(
            f"The images are not those that were scanned (their labels differ); {instead}."
        )
    return images


def _go_by_place(images: Dataset[Any], listed: Dataset[Any], scan: Scan) -> bool:
    """Whether nothing but its place says which of a scan's images one of now is."""
    inside = listed.shown(0) if isinstance(listed, ListedImages) else None
    known = ids_of(inside[0] if isinstance(inside, tuple) else listed)
    if known is None:
        return True
    first = next(scan.ids_by_shard(), None)  # all lie at their places, or none is known
    return images is listed and (first is None or not lie_at(first, ids_of(listed) or ()))
