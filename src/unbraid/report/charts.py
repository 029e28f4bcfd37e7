"""Axes and densities as small SVG texts; colours and fonts come from the page's style sheet.

Every text goes in through `Markup.format`, which escapes it; see `svg.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from unbraid.report.alt import of_densities
from unbraid.report.channels import ConceptView, Curve, Densities
from unbraid.report.room import NARROW, ems, listed
from unbraid.report.svg import WIDTH, line, path, svg, text, units
from unbraid.report.text import MINUS, significant

_SIDE = 10.0  # free at both sides of a density
_PANEL = 102.0  # from one density panel to the next
_TITLE, _LETTERS, _BASE = 14.0, 34.0, 86.0  # within a panel, from above
_PEAK = 46.0  # height of a curve
_NAMES = 21.0  # room for a concept's in font sizes; where these are large, words before give way


def densities(data: Densities, channel: int) -> Markup:
    """Draw one panel for the original channel and one for each concept channel."""
    low, high = float(data.grid[0]), float(data.grid[-1])

    def place(value: float) -> float:
        return _SIDE + (value - low) / (high - low) * (WIDTH - 2 * _SIDE)

    xs = [place(value) for value in data.grid.tolist()]
    marks, labels = axis(low, high, WIDTH - 2 * _SIDE, NARROW)
    parts = []
    for k, (concept, curves) in enumerate(data.panels):
        top = k * _PANEL
        grid = [
            line("grid" if mark else "zero", x, top + _TITLE + 8, x, top + _BASE)
            for mark, x in zip(marks, map(place, marks), strict=True)
        ]
        letters = _spread([xs[int(curve.heights.argmax())] for curve in curves])
        parts += [
            *grid,
            _panel_title(concept, top),
            line("axis", _SIDE, top + _BASE, WIDTH - _SIDE, top + _BASE),
            *(_curve(curve, xs, top) for curve in curves),
            *(_mean(curve, place(curve.mean), top) for curve in curves),
            *(
                text(f"letter k{c.concept.tone}", x, top + _LETTERS, c.concept.letter, "middle")
                for c, x in zip(curves, letters, strict=True)
            ),
        ]
    bottom = (len(data.panels) - 1) * _PANEL + _BASE
    parts += [
        text("tick", place(mark), bottom + 21, label, "middle")
        for mark, label in zip(marks, labels, strict=True)
    ]
    parts.append(text("label", WIDTH / 2, bottom + 42, "summed pre-activation", "middle"))
    return svg(of_densities(data, channel), bottom + 48, parts)


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Choose round values that divide an axis into about n.

    >>> ticks(-3, 21), ticks(-3, 21, 2)
    ([0.0, 5.0, 10.0, 15.0, 20.0], [0.0, 20.0])
    """
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tick_labels(marks: Sequence[float]) -> list[str]:
    """Write the values of an axis, all with as many digits as its step needs."""
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    if not marks or max(abs(mark) for mark in marks) >= 1e5 or step < 1e-4:
        return [significant(mark, 4) for mark in marks]
    digits = max(0, -math.floor(math.log10(step)))
    return [f"{mark:.{digits}f}".replace("-", MINUS) for mark in marks]


def axis(low: float, high: float, room: float, font: float) -> tuple[list[float], list[str]]:
    """Choose round values, and write them, as many as have room beside each other.

    Args:
        low: where the axis begins.
        high: where it ends.
        room: its length in units of the chart.
        font: the size of its figures in the same units.

    >>> axis(-3, 21, 200, 16)
    ([0.0, 5.0, 10.0, 15.0, 20.0], ['0', '5', '10', '15', '20'])
    >>> axis(-3, 21, 80, 16)
    ([0.0, 10.0, 20.0], ['0', '10', '20'])
    """
    for n in (6, 5, 4, 3, 2):
        marks = ticks(low, high, n)
        labels = tick_labels(marks)
        step = room * (marks[1] - marks[0]) / (high - low) if len(marks) > 1 else room
        if font * (max(map(ems, labels), default=0.0) + 0.6) <= step:
            break
    return marks, labels


def _panel_title(concept: ConceptView | None, top: float) -> Markup:
    if concept is None:
        return text("title", _SIDE, top + _TITLE, "Original channel")
    return Markup(
        '<text class="title" x="{}" y="{}"><tspan class="roomy">Concept channel </tspan>{}: {}'
        "</text>"
    ).format(
        units(_SIDE),
        units(top + _TITLE),
        concept.letter,
        Markup('<tspan class="name">{}</tspan>').format(listed(concept.names, _NAMES)),
    )


def _curve(curve: Curve, xs: Sequence[float], top: float) -> Markup:
    """Draw a curve from where it leaves the axis to where it comes back."""
    heights = curve.heights
    visible = np.flatnonzero(heights > 0.004)
    first, last = max(0, visible[0] - 1), min(len(xs) - 1, visible[-1] + 1)
    base = top + _BASE
    inner = [(xs[i], base - _PEAK * float(heights[i])) for i in range(first, last + 1)]
    line = path([(xs[first], base), *inner, (xs[last], base)])
    return Markup('<path class="curve k{}" d="{}"/>').format(curve.concept.tone, line)


def _mean(curve: Curve, x: float, top: float) -> Markup:
    y = top + _BASE
    return Markup('<path class="mean k{}" d="M{},{}l-4,6h8z"><title>{}</title></path>').format(
        curve.concept.tone,
        units(x),
        units(y),
        f"mean over images of {curve.concept.letter}: {significant(curve.mean)}",
    )


def _spread(places: Sequence[float], gap: float = 16.0) -> list[float]:
    """Move labels apart that would cover each other, keeping their order."""
    order = sorted(range(len(places)), key=lambda k: places[k])
    moved = [min(max(x, gap / 2), WIDTH - gap / 2) for x in places]
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    edge = WIDTH - gap / 2
    for k in reversed(order):
        moved[k] = min(moved[k], edge)
        edge = moved[k] - gap
    return moved
