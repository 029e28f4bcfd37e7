"""A finished run: what lies in its folder, each result read once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import Dataset

from unbraid.base.errors import RunError
from unbraid.base.tables import count, one_line
from unbraid.finding.find import find
from unbraid.finding.findings import Findings
from unbraid.finding.sensitivity import Sensitivity, sensitivity
from unbraid.images.open import absolute
from unbraid.images.own import own_named
from unbraid.measuring.circuit_graph import CircuitGraph, read_graphs
from unbraid.measuring.evaluate import evaluate
from unbraid.measuring.results import Evaluation, read_ablation, read_output, read_semantics
from unbraid.networks.models import LoadedModel
from unbraid.reporting.figures import density_figure, source_figure, teaser_figure
from unbraid.reporting.report import report as write_report
from unbraid.running import folders
from unbraid.running.folders import as_labelled, those_scanned, validation_images
from unbraid.running.sample import choose_for_positions, concerned_in, draw_sample
from unbraid.scanning.accuracy import scanned_accuracy
from unbraid.scanning.many import open_scan
from unbraid.scanning.records import Scan
from unbraid.scanning.targets import is_named, read_target
from unbraid.splitting.splits import Split
from unbraid.visualizing.features import Features

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run:
    """A run over one layer. Each result is read from its folder once, unless it was just made."""

    def __init__(
        self, folder: Path, data: str | None = None, bands: Sequence[int] | None = None
    ) -> None:
        """Read the settings; RunError if the folder holds no run.

        `data` names its images where they lie elsewhere now, or are code of one's own, and `bands`
        those of their bands that are drawn.
        """
        settings = folders.read_settings(folder)
        if settings is None:
            raise RunError(f"{folder} holds no finished run; make one with `unbraid run`.")
        source = settings.source
        if data is not None:
            source = {**source, "data": absolute(own_named(data))}
        if bands is not None:
            source = {**source, "bands": [*bands]}
        self.folder, self.settings = folder, replace(settings, source=source)
        self.page = folder / "report.html"
        self.broken: list[str] = []  # names of images that its scans left out

    @property
    def target(self) -> str:
        """What `unbraid.scan` took as its target; RunError if that was a function."""
        name, told = self.settings.target, self.settings.source.get("target", self.settings.target)
        if not is_named(told) or read_target(told).name != name:
            raise RunError(
                f"The run's target, {one_line(name)}, is not in its folder; give it to "
                "unbraid.explain in Python."
            )
        return str(told)

    @cached_property
    def train_scan(self) -> Scan:
        """Of all training images."""
        return self._open_scan(0)

    @cached_property
    def val_scan(self) -> Scan:
        """Of all validation images."""
        return self._open_scan(1)

    def _open_scan(self, which: int) -> Scan:
        """Open one of the run's scans; RunError if another has come in its place."""
        scan = open_scan(folders.home_of(self.folder) / folders.SCANS[which])
        known = self.settings.scans[which : which + 1]  # older runs do not name theirs
        if known and known != (scan.manifest.scan_id,):
            raise RunError(
                f"{scan.path} is another scan than the one that the run in {self.folder} is of; "
                "start the run again."
            )
        return scan

    @cached_property
    def searched(self) -> Scan:
        """What was searched and split by: of the training images, or of their places."""
        return looked_at(self.train_scan, self.settings.places)

    @cached_property
    def measured(self) -> Scan:
        """What was measured on and is shown: of the validation images, or of their places."""
        return looked_at(self.val_scan, self.settings.places)

    @cached_property
    def found(self) -> Findings:
        """The polysemantic channels."""
        found = find(self.searched, **self.settings.thresholds.of_find)
        return seen_in(self.measured, found)

    @cached_property
    def sensitivity(self) -> Sensitivity | None:
        """What other thresholds would find; None of clusters, which ask neither tau nor p."""
        if self.settings.thresholds.concepts == "clusters":
            return None
        return sensitivity(self.train_scan, found=self.found)

    @cached_property
    def val_maps(self) -> Scan | None:
        """Of the validation images concerned, with positions; None where none were kept."""
        if self.without_positions:
            return None
        of_all = concerned_in(self.val_scan, self.found)  # as older runs have them
        for which in (self.with_positions("val"), of_all):
            folder = folders.positions_folder(self.folder, "val", self.val_scan, **which)
            if folder.exists():
                break
        else:
            raise RunError(f"{folder} is gone, which the page shows; start the run again.")
        return open_scan(folder)

    @property
    def without_positions(self) -> bool:
        """Whether no positions were kept: of places, or as images are of different sizes."""
        return bool(self.settings.places) or (self.folder / folders.NO_POSITIONS).exists()

    def with_positions(self, kind: Literal["train", "val"]) -> dict[str, Any]:
        """Which images are scanned with positions, as `unbraid.scan` takes it."""
        scan = self.train_scan if kind == "train" else self.val_scan
        if self.settings.everything:
            return concerned_in(scan, self.found)
        return choose_for_positions(scan, self.found, None if kind == "train" else self.split)

    @cached_property
    def split(self) -> Split:
        """By least squares; RunError if there is none."""
        path = self.folder / "split.safetensors"
        if not path.exists():
            raise RunError(
                f"{self.folder} holds no split, so there are no concept channels; start the run "
                "again unless its report says that nothing was found."
            )
        return Split.load(path)

    @cached_property
    def baseline(self) -> Split | None:
        """By the published rule; None of a run of places, or where that asks for positions."""
        path = self.folder / "split-published.safetensors"
        if self.settings.places or (self.without_positions and not path.exists()):
            return None
        return Split.load(path)

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """All measures; None if nothing was found."""
        if not self.found.concepts:
            return None
        path = self.folder / "evaluation.json"
        if not path.exists():
            raise RunError(
                f"{path.parent} holds an unfinished run; start it again, it goes on there."
            )
        measures: dict[str, Any] = {
            "output": read_output(path),
            "ablation": read_ablation(path),
            "semantics": read_semantics(path),
        }
        measures |= {"baseline": self.baseline, "maps": self.val_maps}
        return evaluate(self.split, self.measured, **measures)

    @cached_property
    def features(self) -> Features | None:
        """Feature visualisations; None if there are none."""
        folder = self.folder / folders.FEATURES
        return Features.load(folder) if folder.exists() else None

    @property
    def sample(self) -> list[int] | None:
        """Indices of the validation images that networks are compared on; None for all."""
        return draw_sample(self.val_scan, self.found, self.measured)

    @property
    def split_hash(self) -> str:
        """Hash of the split's file."""
        content = (self.folder / "split.safetensors").read_bytes()
        return hashlib.sha256(content).hexdigest()

    @property
    def circuits(self) -> list[CircuitGraph]:
        """Circuits through earlier layers that fit the split; none where the run has one layer."""
        with suppress(RunError):  # those that cannot be read are left out
            stored = read_graphs(self.folder / folders.CIRCUITS)
            if stored.split == self.split_hash:
                known = {
                    index for column in self.val_scan.columns("index") for index in column.tolist()
                }
                return [graph for graph in stored.graphs if graph.indices <= known]
        return []

    @cached_property
    def images(self) -> Dataset[Any]:
        """Validation images to look at, labelled as scanned; UsageError of other images."""
        return self.images_of("val")

    @cached_property
    def train_images(self) -> Dataset[Any]:
        """Training images to look at, likewise."""
        return self.images_of("train")

    def images_of(
        self, part: Literal["train", "val"], network: LoadedModel | None = None
    ) -> Dataset[Any]:
        """Images to look at, likewise, or in a network's preprocessing."""
        scan, settings = self.train_scan if part == "train" else self.val_scan, self.settings
        opened = validation_images(settings.source, scan, settings.sight, part, network)
        return as_labelled(those_scanned(opened, scan), scan)

    def is_finished(self, features: bool) -> bool:
        """Whether all results are there, those that may be asked for too."""
        names = ["findings.csv", "report.html"]
        if self.found.concepts:
            names += ["split.safetensors", "evaluation.json"]
            names += ["split-published.safetensors"] * (not self.without_positions)
            refused = (self.folder / folders.NO_FEATURES).exists()  # as it would be again
            names += [folders.FEATURES] * (features and not refused)
        return all((self.folder / name).exists() for name in names)

    @property
    def shown_on_page(self) -> dict[str, Any]:
        """What the page shows, but for pictures, as `unbraid.report` takes it."""
        shown: dict[str, Any] = {"scan": self.measured, "train_scan": self.searched}
        shown |= {"found": self.found, "sensitivity": self.sensitivity}
        if self.evaluation is not None:
            shown |= {"evaluation": self.evaluation, "split": self.split}
            shown |= {"maps": self.val_maps, "features": self.features}
        return shown

    @property
    def doubts(self) -> list[str]:
        """Whether labels or preprocessing seem not to fit the network, as its scan said."""
        accuracy = scanned_accuracy(self.train_scan)
        return [accuracy.warning] if accuracy is not None and accuracy.warning else []

    def report(self) -> Path:
        """Write the page; RunError if the run is not finished, DataError if its images are gone."""
        lead = folders.first_look_in_words(self.settings.source, self.found)
        if self.settings.places and (n_broken := len(self.val_scan.broken())):
            broken = f"{count(n_broken, 'validation image')} could not be read."
            lead = f"{lead} {broken}".lstrip()
        command, assumed = (self.settings.source.get(name) for name in ("command", "assumed"))
        pictured: dict[str, Any] = {
            "dataset": self.images,
            "title": self.settings.title,
            "lead": lead,
            "command": command if isinstance(command, str) else "",
            "notes": [*([assumed] if isinstance(assumed, str) else []), *self.doubts],
        }
        if self.evaluation is not None:
            pictured["circuits"] = self.circuits
        return write_report(self.page, **pictured, **self.shown_on_page)

    def figure(
        self, channel: int, kind: Literal["teaser", "densities", "sources"] = "teaser"
    ) -> Figure:
        """Draw a split channel as `unbraid.teaser_figure` and its like; RunError if none is."""
        drawn = (self.split, self.measured, channel)
        if kind == "teaser":
            return teaser_figure(*drawn, dataset=self.images, features=self.features)
        return (density_figure if kind == "densities" else source_figure)(*drawn)


def looked_at(scan: Scan, places: int) -> Scan:
    """What a run with so many places of each channel looks at: these, or the images."""
    return scan.places if places else scan


def seen_in(val_scan: Scan, found: Findings) -> Findings:
    """Leave out channels of which a concept has no validation image, and note how many.

    Of what else excites a channel, beside its classes, only the concept without images is left out.
    """
    counts = found.members_in(val_scan).count(found.classes)
    concepts = {}
    for channel, groups in found.concepts.items():
        seen = tuple(group for group in groups if any(counts[number] for number in group))
        unseen = [number for group in groups if group not in seen for number in group]
        if not unseen or (found.kind == "whole" and found.clusters.keys() >= set(unseen)):
            concepts[channel] = seen
    n_left_out = len(found.concepts) - len(concepts)
    if n_left_out == 0:
        return replace(found, concepts=concepts)
    pairs = tuple(pair for pair in found.pairs if pair.channel in concepts)
    clusters = {n: c for n, c in found.clusters.items() if c.channel in concepts}
    note = (
        f"{found.note} {count(n_left_out, 'channel')} left out, as the validation images have none "
        "of one of the concepts; add some."
    )
    return replace(found, pairs=pairs, concepts=concepts, clusters=clusters, note=note.lstrip())
