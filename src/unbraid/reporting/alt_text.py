"""What each chart says, in words for those who do not see it: channel, concepts, main numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unbraid.base.tables import count
from unbraid.reporting.channel import Bars, ConceptView, Curves, Ridges, Scatter
from unbraid.reporting.words import bounded, isolate, percent, significant

_N_CLASSES = 6
_N_SOURCES = 3  # of each concept


def describe_densities(data: Curves, concepts: Sequence[ConceptView], channel: int) -> str:
    """Tell the means of every channel over the images of every concept."""
    panels = map(_numbers, [*_channels(concepts), "the rest"], data.means)
    return (
        f"Channel {channel}: densities of the summed pre-activation over the images of "
        f"{', '.join(map(_concept, concepts))}. Means, in this order: {'; '.join(panels)}."
    )


def describe_ridges(data: Ridges, concepts: Sequence[ConceptView], channel: int) -> str:
    """Tell the means of every channel over the images of the first classes."""
    rows = [
        _numbers(_name(one.name), means)
        for one, means in zip(data.classes[:_N_CLASSES], data.curves.means, strict=False)
    ]
    rest = len(data.classes) - len(rows)
    more = f"; and {count(rest, 'class', 'classes')} more" if rest else ""
    return (
        f"Channel {channel}: mean summed pre-activation class by class, in "
        f"{', '.join(_channels(concepts))}: {'; '.join(rows)}{more}."
    )


def describe_scatter(
    data: Scatter, concepts: Sequence[ConceptView], axes: tuple[int, int], channel: int
) -> str:
    """Tell where the middles of the concepts' points lie."""
    middles = []
    for concept in concepts:
        pairs = zip(data.classes, data.points, strict=True)
        points = [some[:, axes] for one, some in pairs if one.concept == concept]
        if points:
            middles.append(_numbers(_concept(concept), np.concatenate(points).mean(0)))
    first, second = (concepts[k].letter for k in axes)
    return (
        f"Channel {channel}: summed pre-activation of concept channels {first} and {second}, a "
        f"point per image. Means of the points: {'; '.join(middles)}."
    )


def describe_bars(data: Bars, concepts: Sequence[ConceptView], channel: int) -> str:
    """Tell the input channels that matter most to each concept."""
    told = []
    for concept, relevance, kept in zip(concepts, data.relevance, data.kept, strict=True):
        strongest = (-abs(relevance)).argsort(kind="stable")[:_N_SOURCES].tolist()
        sources = [
            f"{data.inputs[n]} with {significant(float(relevance[n]), 2)}, of which "
            f"{significant(float(kept[n]), 2)} kept"
            for n in strongest
        ]
        told.append(f"for {_concept(concept)} {', '.join(sources)}")
    return f"Channel {channel}: relevance of the strongest input channels, {'; '.join(told)}."


def describe_masks(kept: np.ndarray, concepts: Sequence[ConceptView], channel: int) -> str:
    """Tell how much every concept channel keeps on average."""
    shares = [
        f"{_concept(concept)} {percent(share)}"
        for concept, share in zip(concepts, kept.mean(1).tolist(), strict=True)
    ]
    return (
        f"Channel {channel}: how much each concept channel keeps of "
        f"{count(kept.shape[1], 'input channel')}, on average {', '.join(shares)}."
    )


def _channels(concepts: Sequence[ConceptView]) -> list[str]:
    return ["original channel", *(f"concept channel {concept.letter}" for concept in concepts)]


def _concept(concept: ConceptView) -> str:
    return f"{concept.letter} ({', '.join(map(_name, concept.shown))}{concept.rest})"


def _name(name: str) -> str:
    return isolate(bounded(name, 40))


def _numbers(what: str, values: np.ndarray) -> str:
    return f"{what} {' and '.join(map(significant, values.tolist()))}"
