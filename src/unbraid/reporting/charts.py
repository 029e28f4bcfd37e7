"""The page's charts as SVG; colours and fonts come from the style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from unbraid.base.tables import count
from unbraid.reporting.alt_text import (
    describe_bars,
    describe_densities,
    describe_masks,
    describe_ridges,
    describe_scatter,
)
from unbraid.reporting.channel import Bars, ConceptView, Curves, Ridges, Scatter
from unbraid.reporting.words import MINUS, ems, isolate, listed, significant

Concepts = Sequence[ConceptView]
WIDTH = 440.0  # units of most charts; the page scales them to their box
# Font sizes in units of a chart, at which a chart is legible in a wide box and in a phone's. The
# style sheet takes a step between the two as well; a test in a browser measures what comes of it.
WIDE, NARROW = 12.5, 16.5
_VISIBLE = 0.004  # of a curve's peak; lower, it would only cover the axis
_UNIT = "summed pre-activation"


def svg(title: str, height: float, parts: Iterable[Markup], width: float = WIDTH) -> Markup:
    """Put shapes and words together into a picture with a title for those who cannot see it."""
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(units(width), units(height), title, Markup("").join(parts))


def text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> Markup:
    """Write words at a place."""
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        kind, units(x), units(y), anchor, words
    )


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    """Draw a straight line."""
    return Markup('<path class="{}" d="M{},{}L{},{}"/>').format(kind, *map(units, (x1, y1, x2, y2)))


def path(points: Iterable[tuple[float, float]]) -> str:
    """Write a line through points, each from the one before: that takes fewest characters.

    >>> path([(3.14, 2.0), (5.0, 1.0), (5.5, 4.25)])
    'M3.1 2l1.9-1 .5 3.2'
    """
    tenths = [(round(10 * x), round(10 * y)) for x, y in points]
    words = f"M{units(tenths[0][0] / 10)} {units(tenths[0][1] / 10)}l"
    for (x1, y1), (x2, y2) in pairwise(tenths):
        for step in (x2 - x1, y2 - y1):
            short = units(step / 10).replace("0.", ".", 1) if abs(step) < 10 else units(step / 10)
            words += short if short.startswith("-") or words.endswith("l") else f" {short}"
    return words


def units(value: float) -> str:
    """Write a coordinate.

    >>> units(3.14159), units(2.0)
    ('3.1', '2')
    """
    return f"{value:.1f}".removesuffix(".0")


def name_in(names: Sequence[str], width: float) -> Markup:
    """Write names in a width in units of a chart, shorter where the page shows larger letters."""
    wide, narrow = listed(names, width / WIDE), listed(names, width / NARROW)
    if wide == narrow:
        return Markup('<tspan class="name">{}</tspan>').format(wide)
    return Markup(
        '<tspan class="name roomy">{}</tspan><tspan class="name tight">{}</tspan>'
    ).format(wide, narrow)


def _letter(concept: ConceptView) -> Markup:
    return Markup('<tspan class="letter k{}">{}</tspan>').format(concept.tone, concept.letter)


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


def axis(low: float, high: float, length: float, font: float) -> tuple[list[float], list[str]]:
    """Choose round values, and write them, as many as fit an axis of a length in a font's size.

    >>> axis(-3, 21, 200, 16)
    ([0.0, 5.0, 10.0, 15.0, 20.0], ['0', '5', '10', '15', '20'])
    >>> axis(-3, 21, 80, 16)
    ([0.0, 10.0, 20.0], ['0', '10', '20'])
    """
    for n in (6, 5, 4, 3, 2):
        marks = ticks(low, high, n)
        labels = tick_labels(marks)
        step = length * (marks[1] - marks[0]) / (high - low) if len(marks) > 1 else length
        if font * (max(map(ems, labels), default=0.0) + 0.6) <= step:
            break
    return marks, labels


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart that would cover each other, keeping their order and within bounds.

    >>> spread([1.0, 1.0, 9.0], 2.0, 0.0, 9.0)
    [1.0, 3.0, 9.0]
    >>> spread([9.0, 8.5], 2.0, 0.0, 9.0)
    [9.0, 7.0]
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


class _Horizontal:
    """The axis below curves, from left to right in units of the chart."""

    def __init__(self, grid: np.ndarray, left: float, right: float) -> None:
        self.low, self.high = float(grid[0]), float(grid[-1])
        self.left, self.right = left, right
        self.xs = [self.place(value) for value in grid.tolist()]
        self.marks, self.labels = axis(self.low, self.high, right - left, NARROW)

    def place(self, value: float) -> float:
        return self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left)

    def lines(self, top: float, bottom: float) -> list[Markup]:
        return [
            line("grid" if mark else "zero", self.place(mark), top, self.place(mark), bottom)
            for mark in self.marks
        ]

    def numbers(self, y: float) -> list[Markup]:
        """Write the values, and below them what they are."""
        middle = (self.left + self.right) / 2
        return [
            *(
                text("tick", self.place(mark), y, label, "middle")
                for mark, label in zip(self.marks, self.labels, strict=True)
            ),
            text("label", middle, y + 20, _UNIT, "middle"),
        ]

    def curve(self, kind: str, heights: np.ndarray, base: float, peak: float) -> Markup:
        """Draw a curve from where it leaves the axis to where it comes back."""
        visible = np.flatnonzero(heights > _VISIBLE)
        first, last = max(0, visible[0] - 1), min(len(heights) - 1, visible[-1] + 1)
        inner = [(self.xs[i], base - peak * float(heights[i])) for i in range(first, last + 1)]
        points = path([(self.xs[first], base), *inner, (self.xs[last], base)])
        return Markup('<path class="{}" d="{}"/>').format(kind, points)


def draw_densities(data: Curves, concepts: Concepts, channel: int) -> Markup:
    """Draw one panel for the original channel and one for each concept channel."""
    side, panel, title, base, peak = 10.0, 102.0, 14.0, 86.0, 46.0
    horizontal = _Horizontal(data.grid, side, WIDTH - side)
    parts = []
    for row, (heights, means) in enumerate(zip(data.heights, data.means, strict=True)):
        top = row * panel
        parts += horizontal.lines(top + title + 8, top + base)
        parts.append(_panel_title(concepts[row - 1] if row else None, side, top + title))
        parts.append(line("axis", side, top + base, WIDTH - side, top + base))
        letters = []
        places = spread([horizontal.xs[i] for i in heights.argmax(1)], 16.0, 8.0, WIDTH - 8.0)
        for concept, curve, mean, x in zip(concepts, heights, means.tolist(), places, strict=True):
            kind, at = f"k{concept.tone}", horizontal.place(mean)
            words = f"mean over images of {concept.letter}: {significant(mean)}"
            triangle = '<path class="mean {}" d="M{},{}l-4,6h8z"><title>{}</title></path>'
            parts += [
                horizontal.curve(f"curve {kind}", curve, top + base, peak),
                Markup(triangle).format(kind, units(at), units(top + base), words),
            ]
            letters.append(text(f"letter {kind}", x, top + 34, concept.letter, "middle"))
        parts += letters
    bottom = (len(data.heights) - 1) * panel + base
    parts += horizontal.numbers(bottom + 21)
    return svg(describe_densities(data, concepts, channel), bottom + 48, parts)


def _panel_title(concept: ConceptView | None, x: float, y: float) -> Markup:
    if concept is None:
        return text("title", x, y, "Original channel")
    words = Markup(
        '<tspan class="roomy">Concept channel </tspan>{}: <tspan class="name">{}</tspan>'
    ).format(concept.letter, listed(concept.names, 21.0))
    return text("title", x, y, words)


def draw_ridges(data: Ridges, concepts: Concepts, channel: int) -> Markup:
    """Draw a row per class: the original as a line, each concept channel as an area."""
    letters, top, peak = 20.0, 34.0, 30.0
    names = min(150.0, NARROW * max(ems(one.name) for one in data.classes))
    horizontal = _Horizontal(data.curves.grid, letters + names + 10, WIDTH - 8)
    # Few classes have more space each.
    pitch = max(21.0, min(36.0, 230.0 / len(data.classes)))
    bottom = top + (len(data.classes) - 1) * pitch
    parts = horizontal.lines(top - peak, bottom)
    for n, (one, heights) in enumerate(zip(data.classes, data.curves.heights, strict=True)):
        base = top + n * pitch
        # What is beyond the inner picture is cut off, whatever a name is made of.
        name = Markup(
            '<svg x="{}" y="{}" width="{}" height="22"><text x="0" y="16">{}<title>{}</title>'
            "</text></svg>"
        ).format(
            *map(units, (letters, base - 16, names + 4)),
            name_in([one.name], names),
            isolate(one.name),
        )
        parts += [
            text(f"letter k{one.concept.tone}", 0, base, one.concept.letter),
            name,
            line("grid", horizontal.left, base, horizontal.right, base),
            *(
                horizontal.curve(f"curve k{concept.tone}", curve, base, peak)
                for concept, curve in zip(concepts, heights[1:], strict=True)
            ),
            horizontal.curve("outline", heights[0], base, peak),
        ]
    parts += horizontal.numbers(bottom + 19)
    return svg(describe_ridges(data, concepts, channel), bottom + 46, parts)


def draw_scatter(data: Scatter, concepts: Concepts, channel: int) -> Markup:
    """Draw concept channels against each other, a point per image; a picture for every two."""
    width, font, top = 300.0, 15.0, 8.0
    marks, labels = axis(data.low, data.high, 0.7 * width, font)
    left = 2.0 * font + font * max(map(ems, labels), default=0.0)
    side = width - left - 10
    bottom, scale = top + side, side / (data.high - data.low)

    def place(across: float, up: float) -> tuple[float, float]:
        return left + (across - data.low) * scale, bottom - (up - data.low) * scale

    frame = []
    for mark, label in zip(marks, labels, strict=True):
        x, y = place(mark, mark)
        frame += [
            line("grid" if mark else "zero", x, top, x, bottom),
            line("grid" if mark else "zero", left, y, left + side, y),
            text("tick", x, bottom + 18, label, "middle"),
            text("tick", left - 5, y + 5, label, "end"),
        ]
    titles = (
        f"translate({units(left + side / 2)} {units(bottom + 39)})",
        f"translate({units(font)} {units(top + side / 2)}) rotate(-90)",
    )
    pictures = []
    for axes in data.axes:
        parts = list(frame)
        for one, points in zip(data.classes, data.points, strict=True):
            spots = [map(units, place(*point)) for point in points[:, axes].tolist()]
            dots = "".join(f"M{x} {y}h0" for x, y in spots)
            words = f"{one.concept.letter}: {isolate(one.name)}"
            shade = f"k{one.concept.tone} s{one.shade}"
            parts.append(
                Markup('<path class="dots {}" d="{}"><title>{}</title></path>').format(
                    shade, dots, words
                )
            )
        parts += [
            Markup('<text class="label" transform="{}" text-anchor="middle">{}: {}</text>').format(
                where, _letter(concepts[k]), _UNIT
            )
            for where, k in zip(titles, axes, strict=True)
        ]
        title = describe_scatter(data, concepts, axes, channel)
        pictures.append(svg(title, bottom + 46, parts, width))
    return Markup("").join(pictures)


def draw_bars(data: Bars, concepts: Concepts, channel: int) -> Markup:
    """Draw, below each other, how relevant the strongest input channels are for each concept."""
    top, pitch, height, gap = 22.0, 16.0, 13.0, 8.0
    left = NARROW * max(map(ems, ["input", *map(str, data.inputs)])) + 8
    words = [
        [f"{concept.letter} {significant(value, 2)}" for value in row]
        for concept, row in zip(concepts, data.relevance.tolist(), strict=True)
    ]
    longest = WIDTH - left - 8 - NARROW * max(ems(word) for row in words for word in row)
    largest = float(np.abs([data.relevance, data.kept]).max(initial=0.0))
    scale = longest / largest if largest else 0.0
    parts, y = [text("tick", left - 6, 14, "input", "end")], top
    for n, number in enumerate(data.inputs):
        middle = y + len(concepts) * pitch / 2 + 4
        parts.append(text("source", left - 6, middle, str(number), "end"))
        for k, concept in enumerate(concepts):
            full, kept = float(data.relevance[k, n]), float(data.kept[k, n])
            told = (
                f"input channel {number}, concept {concept.letter}: {significant(full)} in the "
                f"original channel, {significant(kept)} in concept channel {concept.letter}"
            )
            bar = [
                _bar(f"{kind} k{concept.tone}", left, y, value * scale, height)
                for kind, value in (("full", full), ("kept", kept))
                if value
            ]
            parts += [
                Markup("<g><title>{}</title>{}</g>").format(told, Markup("").join(bar)),
                text("value", left + abs(full) * scale + 5, y + 11.5, words[k][n]),
            ]
            y += pitch
        y += gap
    parts += [
        line("axis", left, top - 2, left, y - gap),
        text("label", left, y - gap + 20, f"relevance, in {_UNIT}"),
    ]
    return svg(describe_bars(data, concepts, channel), y - gap + 28, parts)


def _bar(kind: str, x: float, y: float, length: float, height: float) -> Markup:
    """Draw a bar; a hollow one if its length is below zero."""
    kind = kind if length > 0 else f"{kind} against"
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
        kind, *map(units, (x, y, abs(length), height))
    )


def draw_masks(kept: np.ndarray, concepts: Concepts, channel: int) -> Markup:
    """Draw how much every concept channel keeps of each input channel, (K, C_in), as steps."""
    left, pitch, peak, top, n_steps = 34.0, 46.0, 30.0, 26.0, 220
    steps = kept[:, np.lexsort((-kept.max(0), kept.argmax(0)))]  # by the concept that keeps most
    n_inputs = kept.shape[1]
    if n_inputs > n_steps:  # neighbours are averaged
        edges = np.linspace(0, n_inputs, n_steps + 1).astype(np.int64)
        steps = np.add.reduceat(steps, edges[:-1], axis=1) / np.diff(edges)
    wide = (WIDTH - left) / steps.shape[1]
    parts = [text("tick", 0, 13, "part of the weights kept")]
    base = top + peak
    for k, (concept, heights) in enumerate(zip(concepts, steps.tolist(), strict=True)):
        base = top + peak + k * pitch
        outline = "".join(
            f"V{units(base - peak * height)}H{units(left + n * wide)}"
            for n, height in enumerate(heights, start=1)
        )
        shape = f"M{units(left)},{units(base)}{outline}V{units(base)}z"
        parts += [
            line("grid", left, base - peak, WIDTH, base - peak),
            Markup('<path class="kept k{}" d="{}"/>').format(concept.tone, shape),
            line("axis", left, base, WIDTH, base),
            text("tick", left - 4, base - peak + 5, "1", "end"),
            text("tick", left - 4, base + 5, "0", "end"),
            text(f"letter k{concept.tone}", 0, base - peak / 2 + 6, concept.letter),
        ]
    words = f"{count(n_inputs, 'input channel')}, by who keeps most"
    parts.append(text("label", (left + WIDTH) / 2, base + 23, words, "middle"))
    return svg(describe_masks(kept, concepts, channel), base + 30, parts)
