"""What each chart says, in words for those who do not see it: channel, concepts, main numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from unbraid.base.tables import count
from unbraid.reporting.words import isolate, shorten, significant

if TYPE_CHECKING:
    from unbraid.reporting.channel import Bars, ConceptView, Densities, Masks, Ridges, Scatter


_NAME = 40  # characters
_N_CLASSES = 6
_N_SOURCES = 3  # of each concept


def of_densities(data: Densities, channel: int) -> str:
    """Tell the means of every channel over the images of every concept."""
    concepts = [curve.concept for curve in data.panels[0][1]]
    panels = [
        f"{_channel(concept)} {_numbers([curve.mean for curve in curves])}"
        for concept, curves in data.panels
    ]
    return (
        f"Channel {channel}: densities of the summed pre-activation over the images of "
        f"{_all(concepts)}. Means, in this order: {'; '.join(panels)}."
    )


def of_ridges(data: Ridges, channel: int) -> str:
    """Tell the means of every channel over the images of the first classes."""
    columns = ["original channel", *(f"concept channel {c.letter}" for c in data.concepts)]
    rows = [f"{_name(row.name)} {_numbers(row.means)}" for row in data.rows[:_N_CLASSES]]
    rest = len(data.rows) - len(rows)
    more = f"; and {count(rest, 'class', 'classes')} more" if rest else ""
    return (
        f"Channel {channel}: mean summed pre-activation class by class, in {', '.join(columns)}: "
        f"{'; '.join(rows)}{more}."
    )


def of_scatter(data: Scatter, across: int, up: int, channel: int) -> str:
    """Tell where the middles of the concepts' clouds lie."""
    middles = []
    for concept in data.concepts:
        points = [cloud.points for cloud in data.clouds if cloud.concept == concept]
        if points:
            x, y = np.concatenate(points)[:, [across, up]].mean(0).tolist()
            middles.append(f"{_concept(concept)} {_numbers([x, y])}")
    first, second = data.concepts[across].letter, data.concepts[up].letter
    return (
        f"Channel {channel}: summed pre-activation of concept channels {first} and {second}, a "
        f"point per image. Means of the points: {'; '.join(middles)}."
    )


def of_bars(data: Bars, channel: int) -> str:
    """Tell the input channels that matter most to each concept."""
    concepts = []
    for k, concept in enumerate(data.concepts):
        strongest = sorted(data.sources, key=lambda source: -abs(source.relevance[k]))
        told = [
            f"{source.channel} with {significant(source.relevance[k], 2)}, of which "
            f"{significant(source.kept[k], 2)} kept"
            for source in strongest[:_N_SOURCES]
        ]
        concepts.append(f"for {_concept(concept)} {', '.join(told)}")
    return f"Channel {channel}: relevance of the strongest input channels, {'; '.join(concepts)}."


def of_masks(data: Masks, channel: int) -> str:
    """Tell how much every concept channel keeps on average."""
    shares = [
        f"{_concept(concept)} {float(row.mean()):.0%}"
        for concept, row in zip(data.concepts, data.kept, strict=True)
    ]
    return (
        f"Channel {channel}: how much each concept channel keeps of "
        f"{count(data.kept.shape[1], 'input channel')}, on average {', '.join(shares)}."
    )


def _channel(concept: ConceptView | None) -> str:
    return "original channel" if concept is None else f"concept channel {concept.letter}"


def _concept(concept: ConceptView) -> str:
    names = ", ".join(map(_name, concept.shown))
    return f"{concept.letter} ({names}{concept.rest})"


def _all(concepts: Sequence[ConceptView]) -> str:
    return ", ".join(map(_concept, concepts))


def _name(name: str) -> str:
    return isolate(shorten(name, _NAME))


def _numbers(values: Sequence[float]) -> str:
    return " and ".join(significant(value) for value in values)
