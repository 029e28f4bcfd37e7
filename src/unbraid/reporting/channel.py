"""What the page shows of one split channel, as plain data. Shapes: K concepts, J taps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch

from unbraid.base.errors import UsageError
from unbraid.finding.arv import ClassSums, averaged_relevance, concept_mean
from unbraid.measuring.reference_images import ReferenceImages, TopImages
from unbraid.networks.relevance import input_relevance
from unbraid.reporting.words import bounded, first_few, letter

if TYPE_CHECKING:
    from unbraid.finding.findings import Findings
    from unbraid.measuring.evaluate import ChannelIntervals
    from unbraid.measuring.results import (
        Ablation,
        ChannelAblation,
        ChannelEvaluation,
        ChannelSemantics,
        ConceptAblation,
        Responses,
    )
    from unbraid.scanning.records import Scan
    from unbraid.splitting.splits import ChannelSplit, Split

N_TONES = 8  # colours in the style sheet
N_CLASSES = 12  # classes with a ridge of their own
N_POINTS = 240  # of a scatter plot; spread evenly over each class's images
N_SHADES = 3  # of a concept's colour
N_SOURCES = 12  # input channels in the bars
N_OTHERS = 12  # classes of no concept that are listed when a channel is switched off
N_FIRSTS = 4  # images in a row that are not there for their strength
_N_GRID, _N_RIDGE_GRID = 121, 81  # points of a curve
_N_AXES = 3  # concepts of which every two are set against each other
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


@dataclass(frozen=True)
class ReferenceRow:
    """The images that excite the original channel or a concept channel most."""

    k: int | None  # None for the original channel
    # Strongest first; the original's end with the first image of each concept that has none among
    # them, in place of the weakest.
    shots: tuple[Shot, ...]

    @property
    def counts(self) -> list[tuple[ConceptView | None, int]]:
        """Number of the strongest of each concept, most frequent first; None is no concept."""
        return Counter(shot.concept for shot in self.shots if not shot.rank).most_common()


@dataclass(frozen=True, eq=False)
class Curves:
    """Densities over one axis, in rows."""

    grid: np.ndarray  # (G,)
    heights: np.ndarray  # (rows, columns, G), each with peak 1
    means: np.ndarray  # (rows, columns)


@dataclass(frozen=True, eq=False)
class ClassImages:
    """The images of one class that belong to one concept."""

    name: str
    concept: ConceptView
    place: int  # among the classes of the concept
    images: np.ndarray  # which of the responses

    @property
    def shade(self) -> int:
        """Which shade of the concept's colour stands for it."""
        return self.place % N_SHADES


@dataclass(frozen=True, eq=False)
class Ridges:
    """How the original and each concept channel respond to single classes."""

    classes: tuple[ClassImages, ...]
    curves: Curves  # a row per class; a column for the original and each concept channel
    n_left_out: int  # classes


@dataclass(frozen=True, eq=False)
class Scatter:
    """Concept channels against each other."""

    axes: tuple[tuple[int, int], ...]  # which concept channels
    classes: tuple[ClassImages, ...]
    points: tuple[np.ndarray, ...]  # of each class, (n, K), summed pre-activation
    low: float  # of both axes, which have one scale
    high: float


@dataclass(frozen=True, eq=False)
class Bars:
    """The strongest input channels of a channel's concepts."""

    inputs: tuple[int, ...]  # (n,)
    relevance: np.ndarray  # (K, n), for the original channel, mean over the concept's images
    kept: np.ndarray  # (K, n), of that, what the concept's own channel keeps


@dataclass(frozen=True)
class ClassEffect:
    """What one class loses when a channel is switched off."""

    name: str
    concept: ConceptView | None  # that it belongs to
    n_images: int
    losses: tuple[tuple[float, float], ...]  # logit and accuracy: whole channel, each concept


@dataclass(frozen=True)
class Effects:
    """What is lost when a channel is switched off, whole or a concept at a time."""

    concepts: tuple[ConceptAblation, ...]
    classes: tuple[ClassEffect, ...]
    n_left_out: int  # classes that are not listed


@dataclass(frozen=True, eq=False)
class ChannelView:
    """One channel's section of the page; what is None is left out."""

    number: int
    concepts: tuple[ConceptView, ...]
    info: dict[str, str]  # how it was split
    cosine: float | None  # the lowest of any two of its classes
    rows: tuple[ReferenceRow, ...]
    measures: ChannelEvaluation | None
    intervals: ChannelIntervals | None  # of the measures
    densities: Curves | None  # a row for the original and each concept channel, columns: concepts
    ridges: Ridges | None
    scatter: Scatter | None
    bars: Bars | None
    kept: np.ndarray  # (K, C_in), what a concept channel keeps of each input channel, 0 to 1
    effects: Effects | None  # of switching it off
    semantics: ChannelSemantics | None


def concept_views(found: Findings, concepts: Sequence[Sequence[int]]) -> tuple[ConceptView, ...]:
    """Give a channel's concepts letters and colours."""
    names = [tuple(bounded(found.name(label)) for label in classes) for classes in concepts]
    return tuple(ConceptView(letter(k), k % N_TONES, n, *first_few(n)) for k, n in enumerate(names))


# --- reference images -----------------------------------------------------------------------------


@dataclass(frozen=True)
class First:
    """The image of a concept that excites the original channel most."""

    index: int
    label: int
    activation: float  # summed pre-activation of the original channel
    rank: int  # among all images, from 1; equally exciting ones share it


def first_images(
    scan: Scan, split: Split, wanted: Mapping[int, Set[int]]
) -> dict[tuple[int, int], First]:
    """Find the first image of some concepts of each channel; nothing of one without images."""
    members = split.members_in(scan)
    first: dict[tuple[int, int], First] = {}
    everything: dict[int, list[torch.Tensor]] = {channel: [] for channel in wanted}
    for records in scan.shards() if wanted else ():
        for channel, concepts in wanted.items() if len(records) else ():
            part = split[channel]
            pooled = records.pooled[:, scan.layer.group_of(channel)]
            # As for the reference images, to the last bit: ranks must agree with them.
            z = part.pooled_responses(pooled, records.n_positions)[:, 0]
            everything[channel].append(z)
            concept = members.concept_of(records, part.concepts)
            for k in concepts:
                own = z.masked_fill(concept != k, -torch.inf)
                best, known = int(own.argmax()), first.get((channel, k))
                if int(concept[best]) == k and (not known or float(z[best]) > known.activation):
                    index, label = int(records.index[best]), int(records.label[best])
                    first[channel, k] = First(index, label, float(z[best]), 0)
    for (channel, k), one in first.items():
        before = sum(int((z > one.activation).sum()) for z in everything[channel])
        first[channel, k] = replace(one, rank=1 + before)
    return first


def missing_concepts(top: ReferenceImages) -> frozenset[int]:
    """Name the concepts without an image in the original's row, once their firsts have room."""
    shown = top.original.concept.tolist()
    gone: frozenset[int] = frozenset()
    while True:
        kept = shown[: max(1, len(shown) - min(len(gone), N_FIRSTS))]
        now = frozenset(range(len(top.concepts))) - frozenset(kept)
        if now == gone:
            return gone
        gone = now


def reference_rows(
    found: Findings,
    views: Sequence[ConceptView],
    top: ReferenceImages,
    ids: Mapping[int, str],
    firsts: Mapping[int, First],
) -> tuple[ReferenceRow, ...]:
    """Describe a channel's reference images.

    Args:
        found: names the classes.
        views: of the concepts.
        top: the images of the channel and its concept channels.
        ids: what images are called, by index.
        firsts: from `first_images`, of the concepts without one among the original's strongest.
    """

    def shot(index: int, label: int, activation: float, k: int, rank: int | None = None) -> Shot:
        name, image = bounded(found.name(label)), bounded(ids.get(index, f"image {index}"))
        return Shot(index, label, name, image, activation, views[k] if k >= 0 else None, rank)

    def shots(images: TopImages) -> tuple[Shot, ...]:
        columns = (images.index, images.label, images.activation, images.concept)
        return tuple(shot(*values) for values in zip(*(c.tolist() for c in columns), strict=True))

    in_order = sorted(firsts.items(), key=lambda item: item[1].rank)[:N_FIRSTS]
    at_end = [shot(one.index, one.label, one.activation, k, one.rank) for k, one in in_order]
    strongest = shots(top.original)[: max(1, len(top.original.index) - len(at_end))]
    concepts = (ReferenceRow(k, shots(images)) for k, images in enumerate(top.concepts))
    return (ReferenceRow(None, (*strongest, *at_end)), *concepts)


# --- densities ------------------------------------------------------------------------------------


def shared_grid(groups: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Lay n evenly spaced points over all groups, and as far beyond as their densities reach.

    >>> few = np.array([0.0, 1.0])
    >>> grid = shared_grid([few], 121)
    >>> grid[[0, -1]].round(2).tolist(), density(few, grid)[[0, -1]].round(2).tolist()
    ([-2.15, 3.15], [0.0, 0.0])
    """
    lows, highs = (np.array([end(values) for values in groups]) for end in (np.min, np.max))
    widths = np.array([_kernel_width(_thinned(values)) for values in groups])

    def reach(step: float) -> tuple[float, float]:
        beyond = _REACH * np.maximum(widths, step)
        return float((lows - beyond).min()), float((highs + beyond).max())

    low, high = reach(0.0)
    if high == low:  # one value only
        margin = 0.05 * abs(high) or 1.0
        return np.linspace(low - margin, high + margin, n)
    # No kernel is narrower than a step, which is longer the farther the grid reaches.
    return np.linspace(*reach((high - low) / (n - 1 - 2 * _REACH)), n)


def density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Estimate a density by a Gaussian kernel of Scott's width, scaled to a peak of 1.

    The kernel is never narrower than a step of the grid, where it would slip through between two
    points; so a single value, or many equal ones, become a spike.

    >>> density(np.array([2.0, 2.0]), np.linspace(0, 4, 5)).round(2).tolist()
    [0.14, 0.61, 1.0, 0.61, 0.14]
    """
    values = _thinned(values)
    width = max(_kernel_width(values), float(grid[1] - grid[0]))
    heights = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2).sum(1)
    return np.asarray(heights / heights.max())


def _thinned(values: np.ndarray) -> np.ndarray:
    return values[:: max(1, len(values) // _MAX_VALUES)]


def _kernel_width(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) * len(values) ** -0.2 if len(values) > 1 else 0.0


def _estimate(values: Sequence[Sequence[np.ndarray]], n: int) -> Curves:
    """Estimate a density of every group of values, over one grid of n points."""
    grid = shared_grid([group for row in values for group in row], n)
    return Curves(
        grid,
        np.array([[density(group, grid) for group in row] for row in values]),
        np.array([[group.mean() for group in row] for row in values]),
    )


def densities(responses: Responses, n_grid: int = _N_GRID) -> Curves:
    """Estimate how the channels' responses are distributed over the images of each concept."""
    concept = responses.concept.numpy()
    members = [concept == k for k in range(responses.concepts.shape[1])]
    return _estimate([[z[own] for own in members] for z in _channels(responses)], n_grid)


def _channels(responses: Responses) -> list[np.ndarray]:
    """Responses of the original, then of each concept channel."""
    return [z.double().numpy() for z in (responses.original, *responses.concepts.T)]


# --- single classes -------------------------------------------------------------------------------


def by_class(
    found: Findings, views: Sequence[ConceptView], responses: Responses
) -> list[ClassImages]:
    """Sort images by concept and class; of a concept, classes with most images come first."""
    pairs = np.stack([responses.concept.numpy(), responses.label.numpy()], axis=1)
    keys, inverse, sizes = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    order = sorted(range(len(keys)), key=lambda n: (keys[n][0], -sizes[n], keys[n][1]))
    classes, places = [], Counter[int]()
    for n in order:
        k, label = keys[n].tolist()
        images = np.flatnonzero(inverse.reshape(-1) == n)
        classes.append(ClassImages(bounded(found.name(label)), views[k], places[k], images))
        places[k] += 1
    return classes


def ridges(classes: Sequence[ClassImages], responses: Responses) -> Ridges:
    """Estimate densities of the first few classes of each concept, from `by_class`."""
    most = max(1, N_CLASSES // responses.concepts.shape[1])
    shown = tuple(one for one in classes if one.place < most)
    columns = _channels(responses)
    curves = _estimate([[z[one.images] for z in columns] for one in shown], _N_RIDGE_GRID)
    return Ridges(shown, curves, len(classes) - len(shown))


def scatter(classes: Sequence[ClassImages], responses: Responses) -> Scatter:
    """Set the concept channels' responses to each image against each other."""
    z = responses.concepts.double().numpy()
    n_points = max(1, N_POINTS // max(1, len(classes)))
    points = []
    for one in classes:
        n = len(one.images)
        chosen = np.unique(np.linspace(0, n - 1, min(n, n_points)).round().astype(np.int64))
        points.append(z[one.images[chosen]])
    shown = np.concatenate([some.ravel() for some in points])
    low, high = float(shown.min()), float(shown.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes = tuple(combinations(range(min(z.shape[1], _N_AXES)), 2))
    return Scatter(axes, tuple(classes), tuple(points), low - margin, high + margin)


# --- input channels -------------------------------------------------------------------------------


def bars(
    split: Split, part: ChannelSplit, scan: Scan, sums: ClassSums, n: int | None = None
) -> Bars:
    """Find the n input channels that matter most to a channel's concepts; None for as many as fit.

    Raises:
        UsageError: the scan, which the sums are of, has no image of a concept.
    """
    n_images = dict(enumerate(sums.n_images.tolist()))
    there = [tuple(label for label in c if n_images.get(label)) for c in part.concepts]
    for classes, known in zip(part.concepts, there, strict=True):
        if not known:
            raise UsageError(
                f"The scan has no image of {split.name(classes)}; scan images of all concepts."
            )
    group = scan.layer.group_of(part.channel)
    means = torch.stack([concept_mean(sums, concept) for concept in there])  # (K, G, J)
    relevance = averaged_relevance(scan, part.channel, means).numpy()
    kept = input_relevance(part.rows.double(), means[:, group], scan.layer.taps_per_input).numpy()
    n = n or max(4, min(N_SOURCES, 24 // len(relevance)))
    chosen = strongest_sources(relevance, n)
    first = group * scan.layer.n_in_per_group
    return Bars(tuple(first + i for i in chosen), relevance[:, chosen], kept[:, chosen])


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


# --- switched off ---------------------------------------------------------------------------------


def effects(ablation: Ablation, channel: ChannelAblation, views: Sequence[ConceptView]) -> Effects:
    """List what is lost, by concept, and by class: the concepts' own, then those hit hardest."""
    runs = [channel.whole, *(concept.by_class for concept in channel.concepts)]
    owner = {
        label: view
        for view, concept in zip(views, channel.concepts, strict=True)
        for label in concept.classes
    }
    classes = [
        ClassEffect(
            name=bounded(output.name),
            concept=owner.get(output.label),
            n_images=output.n_images,
            losses=tuple((run.logit[n], run.accuracy[n]) for run in runs),
        )
        for n, output in enumerate(ablation.classes)
    ]
    own = [one for view in views for one in classes if one.concept is view]
    others = [one for one in classes if one.concept is None]
    others.sort(key=lambda one: -max(abs(logit) for logit, _ in one.losses))
    n_left_out = max(0, len(others) - N_OTHERS)
    return Effects(channel.concepts, (*own, *others[:N_OTHERS]), n_left_out)
