"""The page's charts as SVG; colours and fonts come from the style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

import numpy as np
from markupsafe import Markup

from unbraid.reporting.alt_text import (
    describe_bars,
    describe_densities,
    describe_ridges,
    describe_scatter,
)
from unbraid.reporting.channel import Bars, ConceptView, Curves, Ridges, Scatter
from unbraid.reporting.words import ems, isolate, listed, significant

Concepts = Sequence[ConceptView]
WIDTH = 440.0  # units of most charts; the page scales them to their box
FONT = 16.5  # largest size of letters, in these units, that the style sheet sets: on a phone
_VISIBLE = 0.004  # of a curve's peak; lower, it would only cover the axis
_UNIT = "summed pre-activation"
_N_AXES = 3  # concepts of which every two are set against each other


def _svg(title: str, height: float, parts: Iterable[Markup], width: float = WIDTH) -> Markup:
    """Put shapes and words together into a picture with a title for those who cannot see it."""
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(_units(width), _units(height), title, Markup("").join(parts))


def _text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        kind, _units(x), _units(y), anchor, words
    )


def _shape(kind: str, d: str, title: str = "") -> Markup:
    """Draw a path, which tells its title to a pointer."""
    told = Markup("<title>{}</title>").format(title) if title else ""
    return Markup('<path class="{}" d="{}">{}</path>').format(kind, d, told)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return _shape(kind, _path([(x1, y1), (x2, y2)]))


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_units(x)},{_units(y)}" for x, y in points)


def _units(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Choose round values that divide an axis into about n.

    >>> ticks(-3, 21), ticks(-3, 21, 2)
    ([0.0, 5.0, 10.0, 15.0, 20.0], [0.0, 20.0])
    """
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


class _Axis:
    """Values from low to high laid between two coordinates, and about n round ones among them."""

    def __init__(self, low: float, high: float, start: float, end: float, n: int = 4) -> None:
        self.low, self.start = low, start
        self.scale = (end - start) / (high - low)
        self.marks = ticks(low, high, n)

    def place(self, value: float) -> float:
        return self.start + (value - self.low) * self.scale

    def labels(self) -> list[str]:
        return list(map(significant, self.marks))

    def lines(self, top: float, bottom: float) -> list[Markup]:
        places = [(mark, self.place(mark)) for mark in self.marks]
        return [_line("grid" if mark else "zero", x, top, x, bottom) for mark, x in places]

    def numbers(self, y: float) -> list[Markup]:
        pairs = zip(self.marks, self.labels(), strict=True)
        return [_text("tick", self.place(mark), y, label, "middle") for mark, label in pairs]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart that would cover each other, keeping their order and within bounds.

    >>> spread([1.0, 1.0, 9.0], 2.0, 0.0, 9.0), spread([9.0, 8.5], 2.0, 0.0, 9.0)
    ([1.0, 3.0, 9.0], [9.0, 7.0])
    """
    order = sorted(range(len(places)), key=lambda k: places[k])
    moved = [max(place, low) for place in places]
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    edge = high
    for k in reversed(order):
        moved[k] = min(moved[k], edge)
        edge = moved[k] - gap
    return moved


def _curve(kind: str, xs: Sequence[float], heights: np.ndarray, base: float, peak: float) -> Markup:
    """Draw a curve from where it leaves the axis to where it comes back."""
    visible = np.flatnonzero(heights > _VISIBLE)
    first, last = max(0, visible[0] - 1), min(len(heights) - 1, visible[-1] + 1)
    inner = [(xs[i], base - peak * float(heights[i])) for i in range(first, last + 1)]
    return _shape(kind, _path([(xs[first], base), *inner, (xs[last], base)]))


def draw_densities(data: Curves, concepts: Concepts, channel: int) -> Markup:
    """Draw one panel for the original channel and one for each concept channel."""
    side, panel, title, base, peak = 10.0, 102.0, 14.0, 86.0, 46.0
    axis = _Axis(data.grid[0], data.grid[-1], side, WIDTH - side)
    xs = [axis.place(value) for value in data.grid.tolist()]
    head = Markup('<tspan class="roomy">Concept channel </tspan>{}: {}')
    heads = [head.format(concept.letter, listed(concept.names, 21.0)) for concept in concepts]
    heads.insert(0, Markup("Original channel"))
    parts, bottom = [], base
    for row, (heights, means) in enumerate(zip(data.heights, data.means, strict=True)):
        top, bottom = row * panel, row * panel + base
        parts += axis.lines(top + title + 8, bottom)
        parts.append(_text("title", side, top + title, heads[row]))
        parts.append(_line("axis", side, bottom, WIDTH - side, bottom))
        places = spread([xs[i] for i in heights.argmax(1)], 16.0, 8.0, WIDTH - 8.0)
        columns = list(zip(concepts, heights, means.tolist(), places, strict=True))
        for concept, curve, mean, _ in columns:
            kind, at = f"k{concept.tone}", _units(axis.place(mean))
            told = f"mean over images of {concept.letter}: {significant(mean)}"
            parts.append(_curve(f"curve {kind}", xs, curve, bottom, peak))
            parts.append(_shape(f"mean {kind}", f"M{at},{_units(bottom)}l-4,6h8z", told))
        for concept, _, _, x in columns:
            parts.append(_text(f"letter k{concept.tone}", x, top + 34, concept.letter, "middle"))
    parts += axis.numbers(bottom + 21)
    parts.append(_text("label", WIDTH / 2, bottom + 41, _UNIT, "middle"))
    return _svg(describe_densities(data, concepts, channel), bottom + 48, parts)


def draw_ridges(data: Ridges, concepts: Concepts, channel: int) -> Markup:
    """Draw a row per class: the original as a line, each concept channel as an area."""
    letters, top, peak, grid = 20.0, 34.0, 30.0, data.curves.grid
    names = min(150.0, FONT * max(ems(one.name) for one in data.classes))
    left, right = letters + names + 10, WIDTH - 8
    axis = _Axis(grid[0], grid[-1], left, right, 3)
    xs = [axis.place(value) for value in grid.tolist()]
    # Few classes have more space each.
    pitch = max(21.0, min(36.0, 230.0 / len(data.classes)))
    bottom = top + (len(data.classes) - 1) * pitch
    parts = axis.lines(top - peak, bottom)
    for n, (one, heights) in enumerate(zip(data.classes, data.curves.heights, strict=True)):
        base = top + n * pitch
        # What is beyond the inner picture is cut off, whatever a name is made of.
        name = Markup(
            '<svg x="{}" y="{}" width="{}" height="22"><text x="0" y="16">{}<title>{}</title>'
            "</text></svg>"
        ).format(
            *map(_units, (letters, base - 16, names + 4)),
            listed([one.name], names / FONT),
            isolate(one.name),
        )
        parts += [_text(f"letter k{one.concept.tone}", 0, base, one.concept.letter), name]
        parts.append(_line("grid", left, base, right, base))
        for concept, curve in zip(concepts, heights[1:], strict=True):
            parts.append(_curve(f"curve k{concept.tone}", xs, curve, base, peak))
        parts.append(_curve("outline", xs, heights[0], base, peak))
    parts += axis.numbers(bottom + 19)
    parts.append(_text("label", (left + right) / 2, bottom + 39, _UNIT, "middle"))
    return _svg(describe_ridges(data, concepts, channel), bottom + 46, parts)


def draw_scatter(data: Scatter, concepts: Concepts, channel: int) -> Markup:
    """Draw concept channels against each other, a point per image; a picture for every two."""
    width, font, top = 300.0, 15.0, 8.0
    low, high = min(map(np.min, data.points)), max(map(np.max, data.points))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    labels = _Axis(low, high, 0, 1, 3).labels()
    left = 2.0 * font + font * max(map(ems, labels), default=0.0)
    side = width - left - 10
    bottom = top + side
    across, up = _Axis(low, high, left, left + side, 3), _Axis(low, high, bottom, top, 3)
    frame = [*across.lines(top, bottom), *across.numbers(bottom + 18)]
    for mark, label in zip(up.marks, labels, strict=True):
        y = up.place(mark)
        frame.append(_line("grid" if mark else "zero", left, y, left + side, y))
        frame.append(_text("tick", left - 5, y + 5, label, "end"))
    titles = (
        f"translate({_units(left + side / 2)} {_units(bottom + 39)})",
        f"translate({_units(font)} {_units(top + side / 2)}) rotate(-90)",
    )
    pictures = []
    for axes in combinations(range(min(len(concepts), _N_AXES)), 2):
        parts = list(frame)
        for one, points in zip(data.classes, data.points, strict=True):
            spots = [(across.place(x), up.place(y)) for x, y in points[:, axes].tolist()]
            dots = "".join(f"M{_units(x)} {_units(y)}h0" for x, y in spots)
            kind = f"dots k{one.concept.tone} s{one.shade}"
            parts.append(_shape(kind, dots, f"{one.concept.letter}: {isolate(one.name)}"))
        for where, k in zip(titles, axes, strict=True):
            parts.append(
                Markup(
                    '<text class="label" transform="{}" text-anchor="middle">'
                    '<tspan class="letter k{}">{}</tspan>: {}</text>'
                ).format(where, concepts[k].tone, concepts[k].letter, _UNIT)
            )
        pictures.append(
            _svg(describe_scatter(data, concepts, axes, channel), bottom + 46, parts, width)
        )
    return Markup("").join(pictures)


def draw_bars(data: Bars, concepts: Concepts, channel: int) -> Markup:
    """Draw, below each other, how relevant the strongest input channels are for each concept."""
    top, pitch, height, gap = 22.0, 16.0, 13.0, 8.0
    left = FONT * max(map(ems, ["input", *map(str, data.inputs)])) + 8
    words = [
        [f"{concept.letter} {significant(value, 2)}" for value in row]
        for concept, row in zip(concepts, data.relevance.tolist(), strict=True)
    ]
    longest = WIDTH - left - 8 - FONT * max(ems(word) for row in words for word in row)
    largest = float(np.abs([data.relevance, data.kept]).max(initial=0.0))
    scale = longest / largest if largest else 0.0
    parts, y = [_text("tick", left - 6, 14, "input", "end")], top
    for n, number in enumerate(data.inputs):
        middle = y + len(concepts) * pitch / 2 + 4
        parts.append(_text("source", left - 6, middle, str(number), "end"))
        for k, concept in enumerate(concepts):
            values = {"full": float(data.relevance[k, n]), "kept": float(data.kept[k, n])}
            told = (
                f"input channel {number}, concept {concept.letter}: {significant(values['full'])} "
                f"in the original channel, {significant(values['kept'])} in concept channel "
                f"{concept.letter}"
            )
            for kind, value in values.items():  # a hollow bar if it is below zero
                kind += f" k{concept.tone}" + (" against" if value < 0 else "")
                end = left + abs(value) * scale
                outline = _path([(left, y), (end, y), (end, y + height), (left, y + height)]) + "z"
                parts.append(_shape(kind, outline, told))
            end = left + abs(values["full"]) * scale
            parts.append(_text("value", end + 5, y + 11.5, words[k][n]))
            y += pitch
        y += gap
    parts.append(_line("axis", left, top - 2, left, y - gap))
    parts.append(_text("label", left, y - gap + 20, f"relevance, in {_UNIT}"))
    return _svg(describe_bars(data, concepts, channel), y - gap + 28, parts)
