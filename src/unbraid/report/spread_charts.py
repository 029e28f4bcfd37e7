"""Charts of single images' responses: ridges and scatter plots, as in `charts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from unbraid.report.alt import of_ridges, of_scatter
from unbraid.report.charts import axis
from unbraid.report.room import NARROW, ems, name_in
from unbraid.report.spread import Cloud, Ridges, Scatter
from unbraid.report.svg import WIDTH, line, path, svg, text, units
from unbraid.report.text import isolate

Place = Callable[[float], float]

_LETTER = 20.0  # room for the letters of concepts
_NAMES = 150.0  # and for the names of classes, at most
_PEAK, _TOP = 30.0, 34.0
_HIGHEST_ROW, _LOWEST_ROW, _ROWS_HEIGHT = 36.0, 21.0, 230.0  # few classes have more room each
_PLOT = 300.0  # width of a scatter plot
_PLOT_FONT = 15.0  # the largest in it
_VISIBLE = 0.01  # of a curve's peak


def ridges(data: Ridges, channel: int) -> Markup:
    """Draw a row per class: the original as a line, each concept channel as an area."""
    low, high = float(data.grid[0]), float(data.grid[-1])
    names = min(_NAMES, NARROW * max(ems(row.name) for row in data.rows))
    left, right = _LETTER + names + 10, WIDTH - 8

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    xs = [place(value) for value in data.grid.tolist()]
    marks, labels = axis(low, high, right - left, NARROW)
    pitch = max(_LOWEST_ROW, min(_HIGHEST_ROW, _ROWS_HEIGHT / len(data.rows)))
    bottom = _TOP + (len(data.rows) - 1) * pitch
    parts = [
        line("grid" if mark else "zero", place(mark), _TOP - _PEAK, place(mark), bottom)
        for mark in marks
    ]
    for n, row in enumerate(data.rows):
        base = _TOP + n * pitch
        parts += [
            text(f"letter k{row.concept.tone}", 0, base, row.concept.letter),
            _class_name(row.name, base, names),
            line("grid", left, base, right, base),
            *(
                _area(f"curve k{concept.tone}", heights, xs, base)
                for concept, heights in zip(data.concepts, row.concepts, strict=True)
            ),
            _area("outline", row.original, xs, base),
        ]
    parts += [
        text("tick", place(mark), bottom + 19, label, "middle")
        for mark, label in zip(marks, labels, strict=True)
    ]
    middle = (left + right) / 2
    parts.append(text("label", middle, bottom + 39, "summed pre-activation", "middle"))
    return svg(of_ridges(data, channel), bottom + 46, parts)


def _class_name(name: str, base: float, room: float) -> Markup:
    """Write a class's name within its room, whatever it is made of: what is beyond is cut off."""
    return Markup(
        '<svg x="{}" y="{}" width="{}" height="22"><text x="0" y="16">{}<title>{}</title></text>'
        "</svg>"
    ).format(
        units(_LETTER), units(base - 16), units(room + 4), name_in([name], room), isolate(name)
    )


def scatter(data: Scatter, channel: int) -> Markup:
    """Draw concept channels against each other, a point per image; a picture for every two."""
    return Markup("").join(
        svg(of_scatter(data, across, up, channel), *_plot(data, across, up), _PLOT)
        for across, up in data.axes
    )


def _plot(data: Scatter, across: int, up: int) -> tuple[float, list[Markup]]:
    """Return a plot's height and parts."""
    marks, labels = axis(data.low, data.high, 0.7 * _PLOT, _PLOT_FONT)
    left = 2.0 * _PLOT_FONT + _PLOT_FONT * max(map(ems, labels), default=0.0)
    top, side = 8.0, _PLOT - left - 10
    scale = side / (data.high - data.low)

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
            text("tick", x_of(mark), top + side + 18, label, "middle"),
            text("tick", left - 5, y_of(mark) + 5, label, "end"),
        ]
    parts += [_points(cloud, x_of, y_of, across, up) for cloud in data.clouds]
    below = f"translate({units(left + side / 2)} {units(top + side + 39)})"
    beside = f"translate({units(_PLOT_FONT)} {units(top + side / 2)}) rotate(-90)"
    parts += [
        Markup(
            '<text class="label" transform="{}" text-anchor="middle"><tspan class="letter k{}">{}'
            "</tspan>: summed pre-activation</text>"
        ).format(place, data.concepts[k].tone, data.concepts[k].letter)
        for place, k in ((below, across), (beside, up))
    ]
    return top + side + 46, parts


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
