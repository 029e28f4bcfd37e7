"""What the page shows of one split channel, worked out from records and measures.

Nothing here reads an image or writes markup. Shapes: K concepts, J taps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch

from unbraid.finding.findings import Findings
from unbraid.measuring.reference_images import ReferenceImages
from unbraid.measuring.results import Ablation, ChannelAblation, ConceptAblation
from unbraid.reporting.words import bounded
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import ChannelSplit, Split

if TYPE_CHECKING:
    from unbraid.measuring.results import Responses


from collections import Counter
from typing import TYPE_CHECKING

from unbraid.finding.arv import ClassSums, averaged_relevance, concept_mean
from unbraid.measuring.reference_images import TopImages
from unbraid.measuring.results import ChannelEvaluation
from unbraid.networks.relevance import input_relevance
from unbraid.reporting.words import first_few, letter

if TYPE_CHECKING:
    from unbraid.measuring.evaluate import ChannelIntervals
    from unbraid.measuring.results import ChannelSemantics, Responses


# Densities of few or many values, and the axis that holds several of them to their ends.


_MAX_VALUES = 2000  # images that a density is estimated from; more would not change the curve
_REACH = 3.5  # kernel widths beyond the data; there a kernel is down to 0.2 % of its peak


def shared_grid(groups: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Lay n evenly spaced points over all groups, and as far beyond as their densities reach.

    Args:
        groups: values of each density that is to be drawn over it, at least one in each.
        n: number of points, more than 2 * 3.5 + 1.

    >>> few = np.array([0.0, 1.0])
    >>> grid = shared_grid([few], 121)
    >>> grid[[0, -1]].round(2).tolist(), density(few, grid)[[0, -1]].round(2).tolist()
    ([-2.15, 3.15], [0.0, 0.0])
    """
    ends = [(float(values.min()), float(values.max()), _width(_some(values))) for values in groups]
    low, high = _reach(ends, 0.0)
    if high == low:  # one value only
        margin = 0.05 * abs(high) or 1.0
        return np.linspace(low - margin, high + margin, n)
    # No kernel is narrower than a step, which is longer the farther the grid reaches.
    return np.linspace(*_reach(ends, (high - low) / (n - 1 - 2 * _REACH)), n)


def _reach(ends: Sequence[tuple[float, float, float]], step: float) -> tuple[float, float]:
    return (
        min(low - _REACH * max(width, step) for low, _, width in ends),
        max(high + _REACH * max(width, step) for _, high, width in ends),
    )


def density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Estimate a density by a Gaussian kernel of Scott's width, scaled to a peak of 1.

    The kernel is never narrower than a step of the grid, where it would slip through between two
    points; so a single value, or many equal ones, become a spike.

    Args:
        values: (N,), N at least 1.
        grid: evenly spaced points.

    Returns:
        The shape of `grid`.

    >>> density(np.array([2.0, 2.0]), np.linspace(0, 4, 5)).round(2).tolist()
    [0.14, 0.61, 1.0, 0.61, 0.14]
    """
    values = _some(values)
    width = max(_width(values), float(grid[1] - grid[0]))
    heights = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2).sum(1)
    return np.asarray(heights / heights.max())


def _some(values: np.ndarray) -> np.ndarray:
    return values[:: max(1, len(values) // _MAX_VALUES)]


def _width(values: np.ndarray) -> float:
    """Scott's width of a kernel."""
    return float(values.std(ddof=1)) * len(values) ** -0.2 if len(values) > 1 else 0.0


# What the page shows of a channel that was switched off.


N_OTHERS = 12  # classes of no concept that are listed


@dataclass(frozen=True)
class ClassEffect:
    """What one class loses."""

    name: str
    concept: ConceptView | None  # that it belongs to
    n_images: int
    losses: tuple[tuple[float, float], ...]  # logit and accuracy: whole channel, each concept


@dataclass(frozen=True)
class Effects:
    """What is lost with a channel off, whole or a concept at a time."""

    concepts: tuple[tuple[ConceptView, ConceptAblation], ...]
    classes: tuple[ClassEffect, ...]
    n_left_out: int  # classes that are not listed


def effects(ablation: Ablation, channel: ChannelAblation, views: Sequence[ConceptView]) -> Effects:
    """List what is lost, by concept, and by class: the concepts' own and those hit hardest."""
    runs = [channel.whole, *(concept.by_class for concept in channel.concepts)]
    owner = {
        label: view
        for view, concept in zip(views, channel.concepts, strict=True)
        for label in concept.classes
    }
    everyone = [
        ClassEffect(
            name=bounded(output.name),
            concept=owner.get(output.label),
            n_images=output.n_images,
            losses=tuple((run.logit[n], run.accuracy[n]) for run in runs),
        )
        for n, output in enumerate(ablation.classes)
    ]
    others = [row for row in everyone if row.concept is None]
    others.sort(key=lambda row: -max(abs(logit) for logit, _ in row.losses))
    own = [row for view in views for row in everyone if row.concept is view]
    return Effects(
        concepts=tuple(zip(views, channel.concepts, strict=True)),
        classes=(*own, *others[:N_OTHERS]),
        n_left_out=max(0, len(others) - N_OTHERS),
    )


# Which image of a concept excites the original channel most, and how many stand before it.


N_FIRSTS = 4  # images in a row that are not there for their strength


@dataclass(frozen=True)
class First:
    """The image of a concept that excites the original channel most."""

    index: int  # place in the data set
    label: int
    activation: float  # summed pre-activation of the original channel
    rank: int  # among all images, from 1; equally exciting ones share it


def first_images(
    scan: Scan, split: Split, wanted: Mapping[int, Set[int]]
) -> dict[tuple[int, int], First]:
    """Find the first image of some concepts among all images that excite a channel.

    Args:
        scan: of the images.
        split: whose channels to look at.
        wanted: concepts by channel.

    Returns:
        By channel and concept; nothing of a concept without images.
    """
    members = split.members_in(scan)
    first: dict[tuple[int, int], First] = {}
    everything: dict[int, list[torch.Tensor]] = {channel: [] for channel in wanted}
    for records in scan.shards() if wanted else ():
        for part in split.channels:
            if part.channel not in wanted:
                continue
            pooled = records.pooled[:, scan.layer.group_of(part.channel)]
            # As reference images have it, to the last bit: ranks must agree with them.
            z = part.pooled_responses(pooled, records.n_positions)[:, 0]
            everything[part.channel].append(z)
            concept = members.concept_of(records, part.concepts)
            for k in wanted[part.channel]:
                own = (concept == k).nonzero()[:, 0]
                if len(own) == 0:
                    continue
                best = int(own[z[own].argmax()])
                known = first.get((part.channel, k))
                if known is None or float(z[best]) > known.activation:
                    first[part.channel, k] = First(
                        int(records.index[best]), int(records.label[best]), float(z[best]), 0
                    )
    before = {channel: torch.cat(z) for channel, z in everything.items() if z}
    return {
        (channel, k): replace(one, rank=1 + int((before[channel] > one.activation).sum()))
        for (channel, k), one in first.items()
    }


def missing(top: ReferenceImages, n_concepts: int) -> frozenset[int]:
    """Say which concepts have no image in the original's row once room is made for their own."""
    n = len(top.original.concept)
    gone: frozenset[int] = frozenset()
    while True:
        kept = top.original.concept[: max(1, n - min(len(gone), N_FIRSTS))].tolist()
        now = frozenset(range(n_concepts)) - frozenset(kept)
        if now == gone:
            return gone
        gone = now


# How much of each input channel every concept channel keeps.


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of a channel's concepts."""

    concepts: tuple[ConceptView, ...]
    kept: np.ndarray  # (K, C_in), mean over an input channel's taps, 0 to 1
    order: np.ndarray  # (C_in,), by the concept that keeps most, and how much it keeps


def masks(views: Sequence[ConceptView], part: ChannelSplit, taps_per_input: int) -> Masks:
    """Average masks over the taps of each input channel, and put the input channels in order."""
    kept = part.masks.double().view(len(views), -1, taps_per_input).mean(2).numpy()
    order = np.lexsort((-kept.max(0), kept.argmax(0)))
    return Masks(tuple(views), kept, order)


# What the page shows of single images' responses: a ridge per class, and concept against concept.


N_CLASSES = 12  # classes with a ridge of their own
N_POINTS = 240  # of a scatter plot; spread evenly over each class's images
N_SHADES = 3  # of a concept's colour
_N_AXES = 3  # concepts of which every two are set against each other
_N_RIDGE_GRID = 81


@dataclass(frozen=True, eq=False)
class Ridge:
    """How the original and each concept channel answer to one class."""

    name: str
    concept: ConceptView
    n_images: int
    means: tuple[float, ...]  # of the original channel, then the concept channels, (1 + K,)
    original: np.ndarray  # heights over the grid, peak 1
    concepts: tuple[np.ndarray, ...]  # (K,)


@dataclass(frozen=True, eq=False)
class Ridges:
    """Ridges of a channel's classes over one axis."""

    concepts: tuple[ConceptView, ...]
    grid: np.ndarray
    rows: tuple[Ridge, ...]
    n_left_out: int  # classes


@dataclass(frozen=True, eq=False)
class Cloud:
    """The images of one class."""

    name: str
    concept: ConceptView
    shade: int
    n_images: int  # of which some are points
    points: np.ndarray  # (n, K), pooled pre-activation of the concept channels


@dataclass(frozen=True, eq=False)
class Scatter:
    """Concept channels against each other."""

    axes: tuple[tuple[int, int], ...]  # which concept channels
    concepts: tuple[ConceptView, ...]
    clouds: tuple[Cloud, ...]
    low: float  # of both axes, which have one scale
    high: float


def ridges(
    found: Findings, views: Sequence[ConceptView], answers: Responses, groups: Sequence[np.ndarray]
) -> Ridges:
    """Estimate, class by class, how a channel and its concept channels answer.

    Args:
        found: names the classes.
        views: of the concepts.
        answers: to the images of the concepts.
        groups: from `by_class`.
    """
    columns = [z.double().numpy() for z in (answers.original, *answers.concepts.T)]
    shown = _few_of_each(answers, groups, max(1, N_CLASSES // len(views)))
    grid = shared_grid([z[images] for images in shown for z in columns], _N_RIDGE_GRID)
    rows = []
    for images in shown:
        original, *concepts = (density(z[images], grid) for z in columns)
        rows.append(
            Ridge(
                name=_name(found, answers, images),
                concept=views[int(answers.concept[images[0]])],
                n_images=len(images),
                means=tuple(float(z[images].mean()) for z in columns),
                original=original,
                concepts=tuple(concepts),
            )
        )
    return Ridges(tuple(views), grid, tuple(rows), len(groups) - len(shown))


def scatter(
    found: Findings, views: Sequence[ConceptView], answers: Responses, groups: Sequence[np.ndarray]
) -> Scatter:
    """Set the concept channels' responses to each image against each other; as `ridges`."""
    concepts = answers.concepts.double().numpy()
    n_points = max(1, N_POINTS // max(1, len(groups)))
    clouds, shades = [], dict.fromkeys(range(len(views)), 0)
    for images in groups:
        k = int(answers.concept[images[0]])
        clouds.append(
            Cloud(
                name=_name(found, answers, images),
                concept=views[k],
                shade=shades[k] % N_SHADES,
                n_images=len(images),
                points=concepts[images[_evenly(len(images), n_points)]],
            )
        )
        shades[k] += 1
    shown = np.concatenate([cloud.points.ravel() for cloud in clouds])
    low, high = float(shown.min()), float(shown.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes = tuple(combinations(range(min(len(views), _N_AXES)), 2))
    return Scatter(axes, tuple(views), tuple(clouds), low - margin, high + margin)


def by_class(answers: Responses) -> list[np.ndarray]:
    """Sort images by concept and class, or by concept alone where clusters cut through classes.

    Returns:
        For each, which of the N images; by concept, those with most images first.
    """
    concept, label = answers.concept.numpy(), answers.label.numpy()
    pairs = np.stack([concept, label], axis=1)
    keys, inverse, sizes = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    order = sorted(range(len(keys)), key=lambda n: (keys[n][0], -sizes[n], keys[n][1]))
    return [np.flatnonzero(inverse.reshape(-1) == n) for n in order]


def _few_of_each(answers: Responses, groups: Sequence[np.ndarray], n: int) -> list[np.ndarray]:
    """Keep the first n groups of each concept."""
    owners = [int(answers.concept[images[0]]) for images in groups]
    return [group for place, group in enumerate(groups) if owners[:place].count(owners[place]) < n]


def _evenly(n: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, wanted)).round().astype(np.int64))


def _name(found: Findings, answers: Responses, images: np.ndarray) -> str:
    return bounded(found.name(int(answers.label[images[0]])))


# What the page shows of one split channel, worked out from records and measures.


N_TONES = 8  # colours in the style sheet
N_SOURCES = 12  # input channels in the bars
_N_GRID = 121  # points of a density curve


@dataclass(frozen=True)
class ConceptView:
    """A concept, its letter and its colour."""

    letter: str
    tone: int
    names: tuple[str, ...]  # of its classes or clusters

    @property
    def shown(self) -> Sequence[str]:
        """The names that stand for it, where there are too many to list."""
        return first_few(self.names)[0]

    @property
    def rest(self) -> str:
        """What to put after them."""
        return first_few(self.names)[1]


@dataclass(frozen=True)
class Shot:
    """One reference image."""

    index: int  # place in the data set
    label: int
    name: str  # of its class
    image: str  # what the image itself is called
    activation: float
    concept: ConceptView | None  # that it, or its class, belongs to
    rank: int | None = None  # among all images, of one that is not shown for its strength


@dataclass(frozen=True)
class ReferenceRow:
    """The images that excite one channel most."""

    concept: ConceptView | None  # None for the original channel
    shots: tuple[Shot, ...]  # strongest first
    # The first image of each concept that has none among them, in place of the weakest.
    firsts: tuple[Shot, ...] = ()
    n_images: int = 0  # that ranks are among

    @property
    def all(self) -> tuple[Shot, ...]:
        """Every image shown."""
        return (*self.shots, *self.firsts)

    def with_fewer(self, n: int) -> ReferenceRow:
        """Keep n images: of the strongest what the first ones of other concepts leave, or one."""
        n_strongest = max(1, n - len(self.firsts))
        return replace(
            self, shots=self.shots[:n_strongest], firsts=self.firsts[: max(0, n - n_strongest)]
        )

    @property
    def tally(self) -> list[tuple[ConceptView | None, int]]:
        """Count the images of each concept, most frequent first; None stands for no concept."""
        return Counter(shot.concept for shot in self.shots).most_common()


@dataclass(frozen=True, eq=False)
class Curve:
    """How one channel's pooled pre-activation is distributed over one concept's images."""

    concept: ConceptView
    heights: np.ndarray  # over the grid, peak 1
    mean: float


@dataclass(frozen=True, eq=False)
class Densities:
    """Curves of the original channel and each concept channel, over one axis."""

    grid: np.ndarray
    panels: tuple[tuple[ConceptView | None, tuple[Curve, ...]], ...]


@dataclass(frozen=True)
class Source:
    """An input channel and its relevance for every concept."""

    channel: int
    relevance: tuple[float, ...]  # for the original channel, (K,)
    kept: tuple[float, ...]  # of that, what the concept's own channel keeps, (K,)


@dataclass(frozen=True)
class Bars:
    """Where a channel's concepts come from."""

    concepts: tuple[ConceptView, ...]
    sources: tuple[Source, ...]


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
    densities: Densities | None
    ridges: Ridges | None
    scatter: Scatter | None
    bars: Bars | None
    masks: Masks
    effects: Effects | None  # of switching it off
    semantics: ChannelSemantics | None

    @property
    def has_strangers(self) -> bool:
        """Whether some reference image belongs to no concept."""
        return any(shot.concept is None for row in self.rows for shot in row.all)


def concept_views(found: Findings, concepts: Sequence[Sequence[int]]) -> tuple[ConceptView, ...]:
    """Give a channel's concepts letters and colours."""
    return tuple(
        ConceptView(letter(k), k % N_TONES, tuple(bounded(found.name(label)) for label in classes))
        for k, classes in enumerate(concepts)
    )


def reference_rows(
    found: Findings,
    part: ChannelSplit,
    top: ReferenceImages,
    ids: Mapping[int, str],
    firsts: Mapping[int, First],
    n_images: int,
) -> tuple[ReferenceRow, ...]:
    """Describe the reference images of a channel and its concept channels.

    Args:
        found: names the classes.
        part: the channel.
        top: its reference images.
        ids: what images are called, by place in the data set.
        firsts: the original's first image of each concept without one among the strongest.
        n_images: that they were chosen from.
    """
    views = concept_views(found, part.concepts)

    def row(concept: ConceptView | None, images: TopImages) -> ReferenceRow:
        columns = (images.index, images.label, images.activation, images.concept)
        return ReferenceRow(
            concept,
            tuple(
                Shot(
                    index,
                    label,
                    bounded(found.name(label)),
                    bounded(ids.get(index, f"image {index}")),
                    activation,
                    views[k] if k >= 0 else None,
                )
                for index, label, activation, k in zip(*(c.tolist() for c in columns), strict=True)
            ),
        )

    first = [
        Shot(
            one.index,
            one.label,
            bounded(found.name(one.label)),
            bounded(ids.get(one.index, f"image {one.index}")),
            one.activation,
            views[k],
            one.rank,
        )
        for k, one in sorted(firsts.items(), key=lambda item: item[1].rank)[:N_FIRSTS]
    ]
    original = row(None, top.original)
    if first:
        kept = original.shots[: max(1, len(original.shots) - len(first))]
        original = ReferenceRow(None, kept, tuple(first), n_images)
    return (original, *map(row, views, top.concepts))


def densities(views: Sequence[ConceptView], answers: Responses) -> Densities:
    """Estimate, per channel and concept, how pooled pre-activations are distributed."""
    columns = [answers.original, *answers.concepts.T]
    concept = answers.concept.numpy()
    panels = [
        [values[concept == k] for k in range(len(views))]
        for values in (column.double().numpy() for column in columns)
    ]
    grid = shared_grid([values for panel in panels for values in panel], _N_GRID)
    return Densities(
        grid,
        tuple(
            (
                title,
                tuple(
                    Curve(view, density(values, grid), float(values.mean()))
                    for view, values in zip(views, panel, strict=True)
                ),
            )
            for title, panel in zip([None, *views], panels, strict=True)
        ),
    )


def bars(
    views: Sequence[ConceptView], part: ChannelSplit, train_scan: Scan, sums: ClassSums
) -> Bars | None:
    """Find the input channels that matter most to a channel's concepts, and what is kept of them.

    Every concept has its turn to name a strongest input channel, so that none is crowded out.

    Returns:
        The sources by the concept that they serve most, strongest first; None if the training
        scan has no image of a concept.
    """
    labels = [label for classes in part.concepts for label in classes]
    if any(label >= len(sums.n_images) or sums.n_images[label] == 0 for label in labels):
        return None
    group = train_scan.layer.group_of(part.channel)
    taps = train_scan.layer.taps_per_input
    means = torch.stack([concept_mean(sums, concept) for concept in part.concepts])  # (K, G, J)
    arvs = averaged_relevance(train_scan, part.channel, means).numpy()
    kept = input_relevance(part.rows.double(), means[:, group], taps).numpy()
    first = group * train_scan.layer.n_in_per_group
    return Bars(
        tuple(views),
        tuple(
            Source(first + i, tuple(arvs[:, i].tolist()), tuple(kept[:, i].tolist()))
            for i in strongest_sources(arvs, max(4, min(N_SOURCES, 24 // len(arvs))))
        ),
    )


def strongest_sources(arvs: np.ndarray, n: int) -> list[int]:
    """Choose n input channels in turns, grouped by the concept to which they matter most.

    Args:
        arvs: (K, C_in).
        n: how many; fewer are given where there are fewer.

    >>> strongest_sources(np.array([[9.0, 8.0, 7.0, 0.0], [0.0, 0.0, 1.0, 2.0]]), 3)
    [0, 1, 3]
    """
    orders = (-abs(arvs)).argsort(axis=1, kind="stable")  # (K, C_in)
    turns = dict.fromkeys(orders.T.flatten().tolist())
    chosen = list(turns)[:n]
    strength = abs(arvs)
    return sorted(chosen, key=lambda i: (strength[:, i].argmax(), -strength[:, i].max()))
