"""What the page shows of one split channel, worked out from records and measures.

Nothing here reads an image or writes markup. Shapes: K concepts, J taps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from unbraid.arvs import ClassSums, averaged_relevance, concept_mean
from unbraid.evaluation import ChannelEvaluation
from unbraid.findings import Findings
from unbraid.records import Scan
from unbraid.relevance import input_relevance
from unbraid.report.density import density, shared_grid
from unbraid.report.firsts import N_FIRSTS, First
from unbraid.report.text import bounded, first_few, letter
from unbraid.splits import ChannelSplit
from unbraid.visualize.reference import ReferenceImages, TopImages

if TYPE_CHECKING:
    from unbraid.evaluation import Responses
    from unbraid.report.effects import Effects
    from unbraid.report.intervals import ChannelIntervals
    from unbraid.report.masks import Masks
    from unbraid.report.spread import Ridges, Scatter
    from unbraid.semantics import ChannelSemantics

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
