"""What the page shows of one split channel, as plain data. Shapes: K concepts, J taps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from unbraid.base.errors import UsageError
from unbraid.finding.arv import ClassSums, averaged_relevance, class_sums, concept_mean
from unbraid.measuring.circuit_graph import CircuitGraph, draw_circuits
from unbraid.measuring.evaluate import gather_responses, intervals
from unbraid.measuring.reference_images import ALIKE, ReferenceImages, TopImages, reference_images
from unbraid.networks.relevance import input_relevance
from unbraid.reporting.words import bounded, first_few, letter

if TYPE_CHECKING:
    from unbraid.finding.findings import Findings
    from unbraid.measuring.evaluate import ChannelIntervals
    from unbraid.measuring.likeness import ChannelSemantics
    from unbraid.measuring.results import (
        Ablation,
        ChannelAblation,
        Evaluation,
        Responses,
    )
    from unbraid.scanning.records import Scan
    from unbraid.splitting.splits import ChannelSplit, Split

N_IMAGES = 8  # reference images in a row
N_TONES = 8  # colours in the style sheet
N_CLASSES = 12  # classes with a ridge of their own
N_POINTS = 240  # of a scatter plot; spread evenly over each class's images
N_SHADES = 3  # of a concept's colour
N_SOURCES = 12  # input channels in the bars
N_OTHERS = 12  # classes of no concept that are listed when a channel is switched off
N_FIRSTS = 4  # images in a row that are not there for their strength
_MAX_VALUES = 2000  # images that a density is estimated from; more would not change the curve
_REACH = 3.5  # kernel widths beyond the data; there a kernel is down to 0.2 % of its peak


@dataclass(frozen=True)
class ConceptView:
    """A concept, its letter and its colour."""

    letter: str
    tone: int
    names: tuple[str, ...]  # of its classes or clusters
    shown: Sequence[str]  # those that stand for it, where there are too many to list
    rest: str  # what to put after them


@dataclass(frozen=True)
class Shot:
    """One reference image."""

    index: int
    label: int
    name: str  # of its class
    image: str  # what the image itself is called
    activation: float
    concept: ConceptView | None  # that it, or its class, belongs to
    rank: int | None = None  # among all images, of one that is not shown for its strength


class ReferenceRow(NamedTuple):
    """The images that excite the original channel (k is None) or a concept channel most."""

    k: int | None
    # Strongest first; the original's end with the first image of each concept that has none among
    # them, in place of the weakest.
    shots: Sequence[Shot]

    @property
    def counts(self) -> list[tuple[ConceptView | None, int]]:
        """Number of the strongest of each concept, most frequent first; None is no concept."""
        return Counter(shot.concept for shot in self.shots if not shot.rank).most_common()


class Curves(NamedTuple):
    """Densities over one axis, in rows."""

    grid: np.ndarray  # (G,)
    heights: np.ndarray  # (rows, columns, G), each with peak 1
    means: np.ndarray  # (rows, columns)


class ClassImages(NamedTuple):
    """The images of one class that belong to one concept."""

    name: str
    concept: ConceptView
    place: int  # among the classes of the concept
    images: np.ndarray  # which of the responses

    @property
    def shade(self) -> int:
        """Which shade of the concept's colour stands for it."""
        return self.place % N_SHADES


class Ridges(NamedTuple):
    """How the original and each concept channel respond to single classes."""

    classes: Sequence[ClassImages]
    curves: Curves  # a row per class; a column for the original and each concept channel


class Scatter(NamedTuple):
    """Responses of the concept channels, to be set against each other."""

    classes: Sequence[ClassImages]
    points: Sequence[np.ndarray]  # of each class, (n, K), summed pre-activation


class Bars(NamedTuple):
    """The strongest input channels of a channel's concepts."""

    inputs: Sequence[int]  # (n,)
    relevance: np.ndarray  # (K, n), for the original channel, mean over the concept's images
    kept: np.ndarray  # (K, n), of that, what the concept's own channel keeps


class ClassLoss(NamedTuple):
    """What one class loses when a channel is switched off."""

    name: str
    concept: ConceptView | None  # that it belongs to
    n_images: int
    lost: Sequence[tuple[float, float]]  # logit and accuracy: whole, each concept channel, rest


@dataclass(frozen=True, eq=False)
class ChannelView:
    """One channel's section of the page; what is None is left out."""

    number: int
    concepts: tuple[ConceptView, ...]
    info: Mapping[str, str]  # how it was split
    rows: Sequence[ReferenceRow]
    intervals: ChannelIntervals | None  # of the measures
    densities: Curves | None  # rows: the original, each concept channel, the rest; a column each
    ridges: Ridges | None
    scatter: Scatter | None
    bars: Bars | None
    circuit: CircuitGraph | None  # from its input channels
    kept: np.ndarray  # (K, C_in), what a concept channel keeps of each input channel, 0 to 1
    losses: Sequence[ClassLoss]  # when it is switched off
    semantics: ChannelSemantics | None


def channel_views(
    split: Split,
    found: Findings,
    scan: Scan,
    train_scan: Scan | None,
    evaluation: Evaluation | None,
) -> tuple[list[ChannelView], list[str]]:
    """Describe every channel of a split, and say what is left out; `scan` is for validation."""
    top = reference_images(scan, split, n=N_IMAGES, alike=ALIKE)
    firsts = first_images(scan, split, {c: missing_concepts(images) for c, images in top.items()})
    rows = [images for own in top.values() for images in (own.original, *own.concepts)]
    shown = {index for images in rows for index in images.index.tolist()}
    ids = scan.ids(shown | {first[0] for own in firsts.values() for first in own.values()})
    sums = None
    if train_scan:  # of the clusters of these channels alone, as a page may show few of many
        numbers = {n for part in split.channels for concept in part.concepts for n in concept}
        used = {n: cluster for n, cluster in found.clusters.items() if n in numbers}
        sums = class_sums(train_scan, [], used)
    there = set(sums.n_images.nonzero().flatten().tolist()) if sums else set()
    semantics = evaluation.semantics if evaluation else None
    ablation = evaluation.ablation if evaluation else None
    off = {one.channel: one for one in ablation.channels} if ablation else {}
    responses: Mapping[int, Responses] = {}
    notes, bare, channels = [], [], []
    circuits = draw_circuits(split, scan, sums, there) if sums else {}
    try:
        responses = evaluation.responses if evaluation else gather_responses(split, scan)
    except UsageError as error:
        notes.append(f"Densities are left out: {error}")
    for part in split.channels:
        channel, views = part.channel, concept_views(found, part.concepts)
        own, sources = responses.get(channel), None
        classes = by_class(found, views, own) if own else []
        if train_scan and sums:
            if {label for concept in part.concepts for label in concept} <= there:
                sources = bars(split, part, train_scan, sums)
            else:
                bare.append(str(channel))
        masks = part.masks.double().view(len(views), -1, scan.layer.taps_per_input)
        channels.append(
            ChannelView(
                number=channel,
                concepts=views,
                info=_how_split(part.info),
                rows=reference_rows(found, views, top[channel], ids, firsts[channel]),
                intervals=intervals(own) if own else None,
                densities=densities(own, rest=True) if own else None,
                ridges=ridges(classes, own) if own else None,
                scatter=scatter(classes, own) if own else None,
                bars=sources,
                circuit=circuits.get(channel),
                kept=masks.mean(2).numpy(),
                losses=class_losses(ablation, off.get(channel), views),
                semantics=semantics.channels.get(channel) if semantics else None,
            )
        )
    if bare:
        notes.append(
            f"The input channels of channel {', '.join(bare)} are left out: the training scan has "
            "no image of a concept."
        )
    return channels, notes


def _how_split(info: Mapping[str, Any]) -> dict[str, str]:
    """Tell how a channel's masks were chosen, without what only says that the solver is done."""
    return {
        bounded(key): bounded(f"{value:.4g}" if isinstance(value, float) else str(value))
        for key, value in info.items()
        if key != "kkt_residual"
    }


def concept_views(found: Findings, concepts: Sequence[Sequence[int]]) -> tuple[ConceptView, ...]:
    """Give a channel's concepts letters and colours."""
    names = [tuple(bounded(found.name(label)) for label in classes) for classes in concepts]
    return tuple(ConceptView(letter(k), k % N_TONES, n, *first_few(n)) for k, n in enumerate(names))


# The image of a concept that excites the original channel most: its index, its label, what it
# excites, and its rank among all images, from 1; equally exciting ones share it.
First = tuple[int, int, float, int]


def first_images(
    scan: Scan, split: Split, wanted: Mapping[int, Collection[int]]
) -> dict[int, dict[int, First]]:
    """Find the first image of some concepts of each channel, by concept; none of one without."""
    members = split.members_in(scan)
    seen: dict[int, list[torch.Tensor]] = {channel: [] for channel, ks in wanted.items() if ks}
    for records in scan.shards() if seen else ():
        for channel, columns in seen.items():
            part = split[channel]
            pooled = records.pooled[:, scan.layer.group_of(channel)]
            # As for the reference images, to the last bit: ranks must agree with them.
            z = part.pooled_responses(pooled, records.n_positions)[:, 0]
            concept = members.concept_of(records, part.concepts)
            columns.append(torch.stack([z.double(), concept, records.index, records.label]))
    first: dict[int, dict[int, First]] = {channel: {} for channel in wanted}
    for channel, columns in seen.items():
        z, concept, index, label = torch.cat(columns, 1)
        for k in wanted[channel]:
            own = (concept == k).nonzero().flatten()
            if len(own):
                best = int(own[z[own].argmax()])
                rank = 1 + int((z > z[best]).sum())
                first[channel][k] = (int(index[best]), int(label[best]), float(z[best]), rank)
    return first


def missing_concepts(top: ReferenceImages) -> set[int]:
    """Name the concepts without an image in the original's row, once their firsts have room."""
    shown = top.original.concept.tolist()
    most = min(N_FIRSTS, len(shown) - 1)
    missing = [
        set(range(len(top.concepts))) - set(shown[: len(shown) - n]) for n in range(most + 1)
    ]
    return next((gone for n, gone in enumerate(missing) if len(gone) <= n), missing[-1])


def reference_rows(
    found: Findings,
    views: Sequence[ConceptView],
    top: ReferenceImages,
    ids: Mapping[int, str],
    firsts: Mapping[int, First],
) -> list[ReferenceRow]:
    """Describe a channel's reference images; `firsts` are of concepts not among the strongest."""

    def shot(index: int, label: int, activation: float, k: int, rank: int | None = None) -> Shot:
        name, image = bounded(found.name(label)), bounded(ids.get(index, f"image {index}"))
        return Shot(index, label, name, image, activation, views[k] if k >= 0 else None, rank)

    def shots(images: TopImages) -> list[Shot]:
        columns = (images.index, images.label, images.activation, images.concept)
        return [shot(*values) for values in zip(*(c.tolist() for c in columns), strict=True)]

    in_order = sorted(firsts.items(), key=lambda item: item[1][-1])[:N_FIRSTS]
    at_end = [shot(index, label, z, k, rank) for k, (index, label, z, rank) in in_order]
    strongest = shots(top.original)[: max(1, len(top.original.index) - len(at_end))]
    concepts = (ReferenceRow(k, shots(images)) for k, images in enumerate(top.concepts))
    return [ReferenceRow(None, [*strongest, *at_end]), *concepts]


def shared_grid(groups: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Lay n evenly spaced points over all groups, and as far beyond as their densities reach."""
    lows, highs = (np.array([end(values) for values in groups]) for end in (np.min, np.max))
    widths = np.array([_kernel_width(values) for values in groups])
    low, high = (lows - _REACH * widths).min(), (highs + _REACH * widths).max()
    if high == low:  # one value only
        margin = 0.05 * abs(high) or 1.0
        return np.linspace(low - margin, high + margin, n)
    # No kernel is narrower than a step, which is longer the farther the grid reaches.
    beyond = _REACH * np.maximum(widths, (high - low) / (n - 1 - 2 * _REACH))
    return np.linspace((lows - beyond).min(), (highs + beyond).max(), n)


def density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Estimate a density by a Gaussian kernel of Scott's width, scaled to a peak of 1.

    The kernel is never narrower than a step of the grid, where it would slip through between two
    points; so a single value, or many equal ones, become a spike.

    >>> density(np.array([2.0, 2.0]), np.linspace(0, 4, 5)).round(2).tolist()
    [0.14, 0.61, 1.0, 0.61, 0.14]
    """
    width = max(_kernel_width(values), float(grid[1] - grid[0]))
    heights = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2).sum(1)
    return np.asarray(heights / heights.max())


def _kernel_width(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) * len(values) ** -0.2 if len(values) > 1 else 0.0


def _estimate(rows: Sequence[Sequence[np.ndarray]], n: int) -> Curves:
    """Estimate a density of every group of values, over one grid of n points."""
    some = [[group[:: max(1, len(group) // _MAX_VALUES)] for group in row] for row in rows]
    grid = shared_grid([group for row in some for group in row], n)
    heights = np.array([[density(group, grid) for group in row] for row in some])
    return Curves(grid, heights, np.array([[group.mean() for group in row] for row in rows]))


def densities(responses: Responses, n_grid: int = 121, *, rest: bool = False) -> Curves:
    """Estimate how the channels' responses are distributed over the images of each concept.

    A row for the original and each concept channel, and if asked for one for the rest channel.
    """
    concept, channels = responses.concept.numpy(), _channels(responses)
    if rest:
        channels.append(-responses.residual.double().numpy())
    members = [concept == k for k in range(responses.concepts.shape[1])]
    return _estimate([[z[own] for own in members] for z in channels], n_grid)


def _channels(responses: Responses) -> list[np.ndarray]:
    """Responses of the original, then of each concept channel."""
    return [z.double().numpy() for z in (responses.original, *responses.concepts.T)]


def by_class(
    found: Findings, views: Sequence[ConceptView], responses: Responses
) -> list[ClassImages]:
    """Sort images by concept and class; of a concept, classes with most images come first."""
    pairs = np.stack([responses.concept.numpy(), responses.label.numpy()], axis=1)
    keys, inverse, sizes = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    classes, places = [], Counter[int]()
    for n in sorted(range(len(keys)), key=lambda n: (keys[n][0], -sizes[n], keys[n][1])):
        k, label = keys[n].tolist()
        images = np.flatnonzero(inverse.reshape(-1) == n)
        classes.append(ClassImages(bounded(found.name(label)), views[k], places[k], images))
        places[k] += 1
    return classes


def ridges(classes: Sequence[ClassImages], responses: Responses) -> Ridges:
    """Estimate densities of the first few classes of each concept, from `by_class`."""
    most = max(1, N_CLASSES // responses.concepts.shape[1])
    shown = [one for one in classes if one.place < most]
    columns = _channels(responses)
    rows = [[z[one.images] for z in columns] for one in shown]
    return Ridges(shown, _estimate(rows, 81))


def scatter(classes: Sequence[ClassImages], responses: Responses) -> Scatter:
    """Choose images of every class to set the concept channels' responses against each other."""
    z = responses.concepts.double().numpy()
    n_points = max(1, N_POINTS // max(1, len(classes)))
    points = []
    for one in classes:
        n = len(one.images)
        chosen = np.unique(np.linspace(0, n - 1, min(n, n_points)).round().astype(np.int64))
        points.append(z[one.images[chosen]])
    return Scatter(classes, points)


def bars(
    split: Split, part: ChannelSplit, scan: Scan, sums: ClassSums, n: int | None = None
) -> Bars:
    """Find the n input channels that matter most to a channel's concepts; None for as many as fit.

    Raises a UsageError if the scan, which the sums are of, has no image of a concept.
    """
    n_images = dict(enumerate(sums.n_images.tolist()))
    there = [tuple(label for label in c if n_images.get(label)) for c in part.concepts]
    if () in there:
        name = split.name(part.concepts[there.index(())])
        raise UsageError(f"The scan has no image of {name}; scan images of all concepts.")
    group = scan.layer.group_of(part.channel)
    means = torch.stack([concept_mean(sums, concept) for concept in there])  # (K, G, J)
    relevance = averaged_relevance(scan, part.channel, means).numpy()
    kept = input_relevance(part.rows.double(), means[:, group], scan.layer.taps_per_input).numpy()
    n = n or max(4, min(N_SOURCES, 24 // len(relevance)))
    chosen = strongest_sources(relevance, n)
    first = group * scan.layer.n_in_per_group
    return Bars([first + i for i in chosen], relevance[:, chosen], kept[:, chosen])


def strongest_sources(arvs: np.ndarray, n: int) -> list[int]:
    """Choose n input channels by relevance (K, C_in), grouped by the concept they matter most to.

    The concepts choose in turns, so that none is crowded out.

    >>> strongest_sources(np.array([[9.0, 8.0, 7.0, 0.0], [0.0, 0.0, 1.0, 2.0]]), 3)
    [0, 1, 3]
    """
    strength = abs(arvs)
    orders = (-strength).argsort(axis=1, kind="stable")  # (K, C_in)
    turns = dict.fromkeys(orders.T.flatten().tolist())
    return sorted(list(turns)[:n], key=lambda i: (strength[:, i].argmax(), -strength[:, i].max()))


def class_losses(
    ablation: Ablation | None, channel: ChannelAblation | None, views: Sequence[ConceptView]
) -> list[ClassLoss]:
    """List what classes lose when a channel is off: the concepts' own, then a few hit hardest."""
    if ablation is None or channel is None:
        return []
    owner = {
        label: view
        for view, concept in zip(views, channel.concepts, strict=True)
        for label in concept.classes
    }
    losses = [
        ClassLoss(
            bounded(output.name),
            owner.get(output.label),
            output.n_images,
            [(run.logit[n], run.accuracy[n]) for run in channel.runs],
        )
        for n, output in enumerate(ablation.classes)
    ]
    others = [one for one in losses if one.concept is None]
    others.sort(key=lambda one: -max(abs(logit) for logit, _ in one.lost))
    return [*(one for view in views for one in losses if one.concept is view), *others[:N_OTHERS]]
