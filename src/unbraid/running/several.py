"""Several layers in one run: what each finds, which are worth a full run, and their index page."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from itertools import count as numbers
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from unbraid.base.errors import LayerError, ModelError, OutputChangedError
from unbraid.base.modes import in_plain_modes
from unbraid.base.tables import count
from unbraid.finding.find import find
from unbraid.finding.findings import Findings
from unbraid.measuring.compare import OutputComparison, compare_outputs
from unbraid.measuring.evaluate import evaluate
from unbraid.networks.layers import ALL, is_pattern, layer_folder, layer_names
from unbraid.reporting.layers import DATA, LayerRow, Layers, describe_layer, read_layers
from unbraid.reporting.layers_page import write_index
from unbraid.running.circuits import follow_layers
from unbraid.running.finished import Run, looked_at, seen_in
from unbraid.running.folders import SCANS, Settings, look_in_words
from unbraid.running.measures import formatted_as, of_all
from unbraid.running.run import (
    Job,
    broken_names,
    prepare,
    run_each,
    run_layer,
    scan_each,
    tell_unseen,
    try_layer,
    try_scan,
)
from unbraid.running.sample import by_cosine
from unbraid.scanning.accuracy import scanned_accuracy
from unbraid.scanning.every import as_many_as_fit, as_options, tell_rest
from unbraid.scanning.records import Scan
from unbraid.scanning.scan import usable_in
from unbraid.scanning.targets import read_target
from unbraid.splitting.split import split
from unbraid.surgery.apply import apply

# Of all layers, those with most channels that are surely polysemantic get a run of their own.
N_FULL = 3
FULL_SECONDS = 1800.0  # after which none is begun
N_MEASURED = 16  # channels of each other layer, those with the lowest cosines
MEASURED_SECONDS = 1800.0  # after which no other layer is measured


@dataclass(frozen=True)
class LayerRuns:
    """What a run over several layers leaves: a run's folder for each, in the run's folder."""

    runs: dict[str, Run]  # by layer
    output: OutputComparison | None  # with all of several layers split; None if none was
    layers: Layers | None = None  # beside each other; None of one
    index: Path | None = None  # the page of these
    searched: bool = False  # whether every layer was asked for
    broken: tuple[str, ...] = ()  # names of images that the scans then left out


def run_layers(
    model: nn.Module,
    layers: Sequence[str],
    train: Dataset[Any],
    val: Dataset[Any],
    out: Path,
    **options: Any,
) -> LayerRuns:
    """Do everything for one or several layers, which share the passes over all images.

    As `run`, but for `layers`, names or patterns as `unbraid.scan` takes them. Of several layers,
    or those of a pattern, each has a run's folder of its name in `out`, and an index page lies in
    `out`. Titles end in its name. With "all", every layer is searched, and those that are worth
    opening get a run (docs/layers.md).
    """
    job = Job(model, train, val, **options)
    tell_unseen(job)
    every = partial(usable_in, model, train, job.target)
    names = layer_names(model, layers, every)
    if any(layer == ALL and is_pattern(model, layer) for layer in layers):
        return _run_all(job, layers, names, out)
    if len(layers) == 1 and not is_pattern(model, layers[0]) and not _holds_layers(out):
        looks = {names[0]: job.first_look} if job.first_look else {}
        return LayerRuns(run_each(job, {names[0]: out}, looks, named=True), None)
    places = {name: layer_folder(out, name) for name in names}
    runs = run_each(job, places, _looks(job, names), named=True)
    index = _Index(job, out, [spec.name for spec in every()])
    for made in runs.values():
        index.put_run(made)
    n_missing = len(index.missing)
    if n_missing:
        index.notes += [
            f"{n_missing} of {count(len(index.every), 'layer')} that can be split were not "
            f"searched; --layer {ALL} searches every one."
        ]
    output = _compare_together(job, runs) if len(runs) > 1 else None
    page = index.write()
    follow_layers(job, runs)
    return LayerRuns(runs, output, index.layers, page)


@in_plain_modes
def _run_all(job: Job, asked: Sequence[str], every: Sequence[str], out: Path) -> LayerRuns:
    """Search all layers in one pass, and make a run of those that are worth it."""
    sets = [job.train, job.val]
    chosen, left_out = as_many_as_fit(job.model, asked, every, sets, job.places)
    encoder = prepare(job, {})
    names, notes = _usable(job, chosen)
    if left_out:
        notes.insert(0, tell_rest(chosen, left_out))
    for note in notes:
        job.say(note)
    places = {name: layer_folder(out, name) for name in names}
    train_scans, val_scans = scan_each(job, places, _looks(job, names))
    fit = scanned_accuracy(train_scans[names[0]])
    if fit is not None and fit.warning:  # the run says it too
        notes.append(fit.warning)
    index = _Index(job, out, every)
    notes = [*index.notes, *notes]
    index.notes = notes
    begun = time.monotonic()
    for k, name in enumerate(names, start=1):
        scans = (train_scans[name], val_scans[name])
        row = index.known(name, scans)
        if row is None:
            measured = time.monotonic() - begun < MEASURED_SECONDS
            row = _search(job, scans, index.depth(name), measured)
        index.put(row)
        index.write()
        job.say(f"Layer {name} ({k} of {len(names)}): {row.in_words}.")
    runs: dict[str, Run] = {}
    begun = time.monotonic()
    for row in index.layers.worth_opening[:N_FULL]:
        if time.monotonic() - begun > FULL_SECONDS:
            break
        name = row.layer
        own = replace(job, title=f"{job.title} · {name}", keep=True)
        try:
            try_layer(job, name)
            job.say(f"Layer {name} in full.")
            runs[name] = run_layer(own, places[name], train_scans[name], val_scans[name], encoder)
        except (LayerError, ModelError, OutputChangedError) as error:  # of this layer alone
            notes.append(f"Layer {name} has no report: {error}")
            job.say(notes[-1])
        else:
            index.put_run(runs[name])
        index.write()
    index.notes = [*notes, *_tell_unmeasured(index.layers), *_tell_without_page(index.layers)]
    output = _compare_together(job, runs) if len(runs) > 1 else None
    broken = broken_names(job, train_scans[names[0]], val_scans[names[0]])
    page = index.write()
    follow_layers(job, runs)
    return LayerRuns(runs, output, index.layers, page, True, tuple(broken))


def _looks(job: Job, names: Sequence[str]) -> dict[str, Path]:
    """Folders of a first look at several layers, if there may be one."""
    return {name: layer_folder(job.first_look, name) for name in names} if job.first_look else {}


def _usable(job: Job, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Leave out layers that cannot be scanned after all, and say why; raise if none is left."""
    with suppress(LayerError, ModelError):
        try_scan(job, names, positions=False)
        return list(names), []
    usable, notes, faults = [], [], []
    for name in names:
        try:
            try_scan(job, [name], positions=False)
            usable.append(name)
        except (LayerError, ModelError) as error:
            faults.append(error)
            notes.append(f"Layer {name} is left out: {error}")
    if faults and not usable:
        raise faults[0]
    return usable, notes


def _search(job: Job, scans: tuple[Scan, Scan], depth: int, measured: bool) -> LayerRow:
    """Find a layer's polysemantic channels; measure some of them, split by the records alone."""
    train_scan, val_scan = (looked_at(scan, job.places) for scan in scans)
    found = seen_in(val_scan, find(train_scan, **job.thresholds.of_find, progress=True))
    evaluation = None
    if found.concepts and measured:
        chosen = split(train_scan, _lowest(found, N_MEASURED), progress=True)
        evaluation = evaluate(chosen, val_scan, progress=True)
    return describe_layer(train_scan.layer, depth, found, evaluation, _ids(scans))


def _lowest(found: Findings, n: int) -> Findings:
    """The findings of no more than n channels, those with the lowest cosines."""
    chosen = set(by_cosine(found)[:n])
    return replace(
        found,
        pairs=tuple(pair for pair in found.pairs if pair.channel in chosen),
        concepts={o: own for o, own in found.concepts.items() if o in chosen},
        clusters={k: own for k, own in found.clusters.items() if own.channel in chosen},
    )


def _ids(scans: tuple[Scan, Scan]) -> tuple[str, str]:
    return scans[0].manifest.scan_id, scans[1].manifest.scan_id


def _tell_unmeasured(layers: Layers) -> list[str]:
    """Say of how many layers with findings nothing was measured, as time was up."""
    rest = [row for row in layers.layers if row.n_sure + row.n_uncertain and not row.n_measured]
    if not rest:
        return []
    were = "was" if len(rest) == 1 else "were"
    return [
        f"{count(len(rest), 'layer')} with polysemantic channels {were} not measured within "
        f"{MEASURED_SECONDS / 60:.0f} minutes; the same command measures more."
    ]


def _tell_without_page(layers: Layers) -> list[str]:
    """Say which layers have no report though something was found, and how to make it."""
    found = [row for row in layers.layers if row.n_sure + row.n_uncertain]
    if not found:
        return [
            "Nothing was found in any layer; a run with --layer and one of their names says which "
            "thresholds come nearest."
        ]
    rest = [row.layer for row in found if not row.page]
    if not rest:
        return []
    one = len(rest) == 1
    return [
        f"{count(len(rest), 'layer')} with polysemantic channels {'has' if one else 'have'} no "
        f"report; the same command with {as_options(rest)} in place of --layer {ALL} makes "
        f"{'it' if one else 'them'}."
    ]


class _Index:
    """The layers so far, and the folder of their page; what an earlier run knew of others stays."""

    def __init__(self, job: Job, out: Path, every: Sequence[str]) -> None:
        """Find the folder; read what is there."""
        self.title, self.every, self.notes = job.title, list(every), list[str]()
        if look := look_in_words(job.source):
            self.notes.append(look)
        named = read_target(job.target).name
        own = Settings("", job.thresholds, {}, job.encoder, job.labels, places=job.places)
        self.settings = str(replace(own, target=named))
        self.folder = out if job.overwrite else self._own_folder(out)
        before = read_layers(self.folder)
        same = before is not None and before.settings == self.settings
        rows = before.layers if before is not None and same else ()
        self._rows = {row.layer: row for row in rows if row.layer in self.every}

    def _own_folder(self, out: Path) -> Path:
        """The run's folder, or one in it, where no index of other settings is."""
        for folder in chain([out], (out / f"settings-{n}" for n in numbers(2))):
            before = read_layers(folder)
            if before is None or before.settings == self.settings:
                return folder
        raise AssertionError("numbers have no end")

    @property
    def layers(self) -> Layers:
        """All that is known, first to last."""
        rows = sorted(self._rows.values(), key=lambda row: row.depth)
        return Layers(self.title, self.settings, len(self.every), tuple(rows), tuple(self.notes))

    @property
    def missing(self) -> list[str]:
        """Layers of which nothing is known."""
        return [name for name in self.every if name not in self._rows]

    def depth(self, name: str) -> int:
        """A layer's number, from 1."""
        return self.every.index(name) + 1

    def known(self, name: str, scans: tuple[Scan, Scan]) -> LayerRow | None:
        """What an earlier run found of these scans, if that is whole."""
        row = self._rows.get(name)
        if row is None or row.scans != _ids(scans):
            return None
        lacks_measures = row.n_sure + row.n_uncertain and not row.n_measured
        lacks_page = row.page and not (self.folder / row.page).exists()
        return None if lacks_measures or lacks_page else row

    def put(self, row: LayerRow) -> None:
        """Take in a layer."""
        self._rows[row.layer] = row

    def put_run(self, made: Run) -> None:
        """Take in a layer with a report of its own."""
        scans = (made.train_scan, made.val_scan)
        spec, page = scans[0].layer, Path(os.path.relpath(made.page, self.folder)).as_posix()
        row = self.known(spec.name, scans)
        if row is None or row.page != page:
            about = (self.depth(spec.name), made.found, made.evaluation, _ids(scans))
            self.put(describe_layer(spec, *about, page))

    def write(self) -> Path:
        """Write the page and its data."""
        return write_index(self.layers, self.folder)


def _holds_layers(out: Path) -> bool:
    """Whether a folder is that of several layers, each in a folder of its own."""
    return (out / DATA).exists() and not any((out / name).exists() for name in SCANS)


def _compare_together(job: Job, runs: Mapping[str, Run]) -> OutputComparison | None:
    """Compare the outputs with all layers split that something was found in; None without."""
    found = [done for done in runs.values() if done.found.concepts]
    if not found:
        return None
    first = found[0]
    scan = first.val_scan
    drawn = None if job.everything else first.sample
    told = "Checking the outputs with all layers split"
    if drawn is not None:
        n = f"{len(drawn):,} of {count(scan.manifest.n_images, 'validation image')}"
        told += f", on a sample of {n}; --all takes all"
    job.say(f"{told}.")
    model2, loading = apply(job.model, [done.split for done in found]), job.loading_of(first)
    loading |= {"indices": drawn, "tolerance": 0.0, "progress": True, "target": job.target}
    with formatted_as(scan, job.model, model2):
        output = compare_outputs(job.model, model2, first.images, **loading)
    return output if drawn is None else of_all(output, scan)
