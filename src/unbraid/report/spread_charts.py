"""Charts of single images' responses: ridges and scatter plots, as in `charts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from unbraid.report.charts import tick_labels, ticks
from unbraid.report.spread import Cloud, Ridges, Scatter
from unbraid.report.svg import WIDTH, line, path, svg, text, units
from unbraid.report.text import isolate, shorten

Place = Callable[[float], float]

_NAMES = 118.0  # room for the names of classes
_PEAK, _TOP = 30.0, 34.0
_HIGHEST_ROW, _ROWS_HEIGHT = 36.0, 230.0  # few classes have more room each
_GAP = 34.0  # between scatter plots, and left of the first
_LARGEST = 300.0  # side of a scatter plot
_VISIBLE = 0.01  # of a curve's peak


def ridges(data: Ridges) -> Markup:
    """Draw a row per class: the original as a line, each concept channel as an area."""
    low, high = float(data.grid[0]), float(data.grid[-1])
    right = WIDTH - 8

    def place(value: float) -> float:
        return _NAMES + (value - low) / (high - low) * (right - _NAMES)

    xs = [place(value) for value in data.grid.tolist()]
    marks = ticks(low, high)
    pitch = min(_HIGHEST_ROW, _ROWS_HEIGHT / len(data.rows))
    bottom = _TOP + (len(data.rows) - 1) * pitch
    parts = [
        line("grid" if mark else "zero", place(mark), _TOP - _PEAK, place(mark), bottom)
        for mark in marks
    ]
    for n, row in enumerate(data.rows):
        base = _TOP + n * pitch
        parts += [
            text(f"letter k{row.concept.tone}", 0, base, row.concept.letter),
            Markup('<text class="name" x="16" y="{}">{}<title>{}</title></text>').format(
                units(base), isolate(shorten(row.name, 17)), isolate(row.name)
            ),
            line("grid", _NAMES, base, right, base),
            *(
                _area(f"curve k{concept.tone}", heights, xs, base)
                for concept, heights in zip(data.concepts, row.concepts, strict=True)
            ),
            _area("outline", row.original, xs, base),
        ]
    parts += [
        text("tick", place(mark), bottom + 18, label, "middle")
        for mark, label in zip(marks, tick_labels(marks), strict=True)
    ]
    middle = (_NAMES + right) / 2
    parts.append(text("label", middle, bottom + 34, "summed pre-activation", "middle"))
    title = "How the original and the concept channels answer to the images of each class"
    return svg(title, bottom + 40, parts)


def scatter(data: Scatter) -> Markup:
    """Draw concept channels against each other, a point per image."""
    n = len(data.axes)
    side = min(_LARGEST, (WIDTH - n * _GAP) / n)
    parts = [part for k in range(n) for part in _plot(data, k, _GAP + k * (side + _GAP), side)]
    title = "Summed pre-activation of concept channels against each other, a point per image"
    return svg(title, side + 44, parts)


def _plot(data: Scatter, k: int, left: float, side: float) -> list[Markup]:
    across, up = data.axes[k]
    top = 6.0
    scale = side / (data.high - data.low)
    marks = ticks(data.low, data.high)
    labels = tick_labels(marks)

    def x_of(value: float) -> float:
        return left + (value - data.low) * scale

    def y_of(value: float) -> float:
        return top + side - (value - data.low) * scale

    parts = []
    for mark, label in zip(marks, labels, strict=True):
        kind = "grid" if mark else "zero"
        parts += [
            line(kind, x_of(mark), top, x_of(mark), top + side),
            line(kind, left, y_of(mark), left + side, y_of(mark)),
            text("tick small", x_of(mark), top + side + 13, label, "middle"),
            text("tick small", left - 4, y_of(mark) + 3, label, "end"),
        ]
    parts += [_points(cloud, x_of, y_of, across, up) for cloud in data.clouds]
    first, second = data.concepts[across], data.concepts[up]
    parts += [
        Markup(
            '<text class="label" x="{}" y="{}" text-anchor="middle"><tspan class="letter k{}">{}'
            '</tspan> across, <tspan class="letter k{}">{}</tspan> up{}</text>'
        ).format(
            units(left + side / 2),
            units(top + side + 30),
            first.tone,
            first.letter,
            second.tone,
            second.letter,
            ": summed pre-activation" if len(data.axes) < 3 else "",
        )
    ]
    return parts


def _points(cloud: Cloud, x_of: Place, y_of: Place, across: int, up: int) -> Markup:
    dots = "".join(
        f"M{units(x_of(point[across]))} {units(y_of(point[up]))}h0"
        for point in cloud.points.tolist()
    )
    return Markup('<path class="dots k{} s{}" d="{}"><title>{}</title></path>').format(
        cloud.concept.tone, cloud.shade, dots, f"{cloud.concept.letter}: {isolate(cloud.name)}"
    )


def _area(kind: str, heights: np.ndarray, xs: Sequence[float], base: float) -> Markup:
    """Draw a curve where it can be seen."""
    visible = np.flatnonzero(heights > _VISIBLE)
    first, last = max(0, visible[0] - 1), min(len(xs) - 1, visible[-1] + 1)
    inner = [(xs[i], base - _PEAK * float(heights[i])) for i in range(first, last + 1)]
    line = path([(xs[first], base), *inner, (xs[last], base)])
    return Markup('<path class="{}" d="{}"/>').format(kind, line)
