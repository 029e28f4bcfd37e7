"""Circuits of a run: from a layer's input channels, and through the split layer before it."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from unbraid.base.errors import LayerError, RunError, UnbraidError, UsageError
from unbraid.base.tables import count
from unbraid.finding.arv import class_sums
from unbraid.measuring.circuit import Circuit, Through, circuit_of
from unbraid.measuring.circuit_graph import (
    N_DRAWN,
    N_FOLLOWED,
    SCHEMA,
    CircuitGraph,
    StoredGraphs,
    circuit_graph,
    circuit_graphs,
    n_sources,
    read_graphs,
)
from unbraid.networks.copying import unwrap
from unbraid.networks.models import LoadedModel
from unbraid.reporting.layers import read_layers
from unbraid.running.finished import Run
from unbraid.running.folders import CIRCUITS, home_of, read_settings, results_in
from unbraid.running.network import network_images
from unbraid.running.run import Job
from unbraid.running.sample import by_cosine
from unbraid.splitting.splits import ChannelSplit

_OF_PLACES = (
    "Circuits through earlier layers are followed in whole images, so a run of places has none."
)
N_IMAGES = 32  # of a concept, that the network is run on to follow its circuit
N_CHANNELS = 16  # of a layer, those with the lowest cosines, whose circuits its page shows


def circuits_of(
    run: Run,
    channel: int,
    concept: int | None = None,
    *,
    n: int = 4,
    network: Callable[[], LoadedModel] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[CircuitGraph]:
    """Draw what feeds a channel's concept channels, or one of them.

    Args:
        run: a finished one.
        channel: that it split.
        concept: 0 to K - 1; None for all.
        n: sources of each concept channel.
        network: gives the run's network, which is asked for where the run has an earlier layer.
        say: told why there is no circuit through an earlier layer.

    Returns:
        The circuit from the layer's input channels; in a run of several layers then that through
        the nearest layer before it that was split and feeds it, with what feeds its concept
        channels.

    Raises:
        RunError: the run found nothing.
        UsageError: there is no such concept channel.
    """
    if not (run.folder / "split.safetensors").exists():
        raise RunError(
            f"{run.folder} holds no split, so there are no circuits; start the run again unless "
            "its report says that nothing was found."
        )
    part, concepts = _asked(run, channel, concept)
    sums = class_sums(run.searched, (), run.split.clusters)
    own = [circuit_of(run.split, sums, part, k, max(n, N_FOLLOWED)) for k in concepts]
    graphs = [circuit_graph(own, [(run.split, run.measured)], n=n)]
    before = list(earlier_runs(run))
    if before and run.settings.places:
        say(f"{_OF_PLACES} Here is what feeds layer {run.split.layer.name} directly.")
    elif before and network is not None:
        try:
            loaded = network()
            images = network_images(run, loaded)
            wanted = {channel: [(part, k) for k in concepts]}
            through = through_earlier(run, before, wanted, loaded.model, images, {channel: n})
        except UnbraidError as error:
            say(f"The circuit through layer {before[0].split.layer.name} is left out: {error}")
        else:
            graphs += through.values()
    return graphs


def _asked(run: Run, channel: int, concept: int | None) -> tuple[ChannelSplit, Sequence[int]]:
    """The split of a channel, and the concepts asked for."""
    parts = {part.channel: part for part in run.split.channels}
    if channel not in parts:
        known = ", ".join(map(str, list(parts)[:20])) + (" and more" if len(parts) > 20 else "")
        raise UsageError(f"Channel {channel} was not split; those that were are {known}.")
    every = range(len(parts[channel].concepts))
    if concept is not None and concept not in every:
        raise UsageError(
            f"Channel {channel} has no concept {concept}; its concepts are 0 to {every[-1]}."
        )
    return parts[channel], every if concept is None else [concept]


def earlier_runs(run: Run) -> Iterator[Run]:
    """The runs of earlier layers of the same run that split something, nearest first."""
    asked = str(replace(run.settings, everything=False))  # which an index does not tell apart
    name = run.split.layer.name
    around = dict.fromkeys((home_of(run.folder).parent, run.folder.parent))
    for folder in (place for one in around for place in results_in(one)):
        layers = None
        with suppress(RunError):
            layers = read_layers(folder)
        rows = layers.layers if layers is not None and layers.settings == asked else ()
        depth = next((row.depth for row in rows if row.layer == name and row.page), 0)
        for row in sorted(rows, key=lambda row: -row.depth):
            if row.depth >= depth or not row.page:
                continue
            with suppress(RunError):
                other = _asked_alike(run, home_of((folder / row.page).parent))
                if other is not None and other.split.weights == run.split.weights:
                    yield other
        if depth:
            return


def _asked_alike(run: Run, home: Path) -> Run | None:
    """The run of another layer that was asked for the same as a run, None if there is none."""
    for folder in results_in(home):
        settings = read_settings(folder)
        if settings is not None and str(settings) == str(run.settings):
            return Run(folder)
    return None


def through_earlier(
    run: Run,
    before: Sequence[Run],
    wanted: Mapping[int, Sequence[tuple[ChannelSplit, int]]],
    model: nn.Module,
    images: Dataset[Any],
    n: Mapping[int, int],
    **loading: Any,
) -> dict[int, CircuitGraph]:
    """Draw circuits of concept channels, by channel, through the first of some runs that feeds it.

    Args:
        run: of the later layer.
        before: of earlier layers.
        wanted: by channel, its split and each concept.
        model: the network.
        images: the validation images, as it takes them.
        n: by channel, sources of each concept channel.
        loading: `batch_size` and `workers`.
    """
    targets = [one for own in wanted.values() for one in own]
    size = loading.get("batch_size") or run.val_scan.manifest.batch_size
    options = (unwrap(model), images, N_IMAGES, size, loading.get("workers", 0))
    for earlier in before:
        way = Through(earlier.split, run.split, run.val_scan, *options)
        with suppress(LayerError):  # it lies beside the way
            found = way.follow(targets, max(N_FOLLOWED, *n.values()), progress=True)
            break
    else:
        return {}
    by_channel = {o: [c for c in found if c.channel == o] for o in wanted}
    further = _further(earlier, by_channel, n)
    asked = [([*own, *further[o]], n[o]) for o, own in by_channel.items()]
    shown = [(run.split, run.val_scan), (earlier.split, earlier.val_scan)]
    return dict(zip(wanted, circuit_graphs(asked, shown, n_images=3), strict=True))


def _further(
    earlier: Run, by_channel: Mapping[int, Sequence[Circuit]], n: Mapping[int, int]
) -> dict[int, list[Circuit]]:
    """What feeds the concept channels that are among the n strongest sources."""
    sums = class_sums(earlier.train_scan, (), earlier.split.clusters)
    made: dict[tuple[int, int], Circuit] = {}
    further: dict[int, list[Circuit]] = {}
    for channel, circuits in by_channel.items():
        parts = dict.fromkeys(
            (source.channel, source.part)
            for circuit in circuits
            for source in circuit.sources[: n[channel]]
            if isinstance(source.part, int)
        )
        for o, k in parts:
            if (o, k) not in made:
                made[o, k] = circuit_of(earlier.split, sums, earlier.split[o], k, n[channel])
        further[channel] = [made[one] for one in parts]
    return further


def follow_layers(job: Job, runs: Mapping[str, Run]) -> None:
    """Draw on the pages of several layers what feeds their channels through the layer before."""
    for name, run in runs.items():
        if not run.found.concepts:
            continue
        before = list(earlier_runs(run))
        if not before:
            continue
        if run.settings.places:
            job.say(_OF_PLACES)
            return
        path = run.folder / CIRCUITS
        about = (run.split_hash, hash_of_all(before))
        with suppress(RunError):
            stored = read_graphs(path)
            if (stored.split, stored.before) == about:
                continue
        channels = [run.split[channel] for channel in by_cosine(run.found)[:N_CHANNELS]]
        wanted = {
            part.channel: [(part, k) for k in range(len(part.concepts[:N_DRAWN]))]
            for part in channels
        }
        n = {channel: min(3, n_sources(len(own))) for channel, own in wanted.items()}
        told = f"Following {count(len(wanted), 'circuit')} of {name} through earlier layers"
        if len(channels) < len(run.found.concepts):
            told += (
                f", those of {len(run.found.concepts):,} with the lowest cosines; "
                f"`unbraid circuit {shlex.quote(str(run.folder))} --channel N` follows another"
            )
        job.say(f"{told}.")
        loading = {"workers": job.loading.workers}
        try:
            made = through_earlier(run, before, wanted, job.model, run.images, n, **loading)
        except UnbraidError as error:  # a page without them is better than none
            job.say(f"Circuits of {name} through earlier layers are left out: {error}")
            continue
        StoredGraphs(SCHEMA, *about, tuple(made.values())).write(path)
        run.report()


def hash_of_all(runs: Sequence[Run]) -> str:
    """Hash the splits of several runs."""
    return hashlib.sha256(" ".join(run.split_hash for run in runs).encode()).hexdigest()
