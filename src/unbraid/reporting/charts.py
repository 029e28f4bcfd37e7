"""Bars of the strongest input channels; see `svg.py` on how texts go in."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from unbraid.base.tables import count
from unbraid.reporting.alt_text import of_bars, of_densities, of_masks, of_ridges, of_scatter
from unbraid.reporting.channel import (
    Bars,
    Cloud,
    ConceptView,
    Curve,
    Densities,
    Masks,
    Ridges,
    Scatter,
    Source,
)
from unbraid.reporting.words import MINUS, isolate, significant

# How much of each input channel every concept channel keeps.


_MASKS_MAX_STEPS = 220  # of a chart, each two units wide
_MASKS_LEFT, _MASKS_ROW, _MASKS_HEIGHT, _MASKS_TOP = 34.0, 46.0, 30.0, 26.0


def draw_masks(data: Masks, channel: int) -> Markup:
    """Draw a row of steps per concept, as high as what it keeps; all in one order."""
    kept = _in_steps(data.kept[:, data.order])
    wide = (WIDTH - _MASKS_LEFT) / kept.shape[1]
    parts = [text("tick", 0, 13, "part of the weights kept")]
    for k, (concept, row) in enumerate(zip(data.concepts, kept, strict=True)):
        base = _MASKS_TOP + k * _MASKS_ROW + _MASKS_HEIGHT
        path = [f"M{units(_MASKS_LEFT)},{units(base)}"]
        for n, height in enumerate(row.tolist()):
            path.append(
                f"V{units(base - _MASKS_HEIGHT * height)}H{units(_MASKS_LEFT + (n + 1) * wide)}"
            )
        path.append(f"V{units(base)}z")
        parts += [
            line("grid", _MASKS_LEFT, base - _MASKS_HEIGHT, WIDTH, base - _MASKS_HEIGHT),
            Markup('<path class="kept k{}" d="{}"/>').format(concept.tone, "".join(path)),
            line("axis", _MASKS_LEFT, base, WIDTH, base),
            text("tick", _MASKS_LEFT - 4, base - _MASKS_HEIGHT + 5, "1", "end"),
            text("tick", _MASKS_LEFT - 4, base + 5, "0", "end"),
            text(f"letter k{concept.tone}", 0, base - _MASKS_HEIGHT / 2 + 6, concept.letter),
        ]
    bottom = _MASKS_TOP + (len(kept) - 1) * _MASKS_ROW + _MASKS_HEIGHT
    words = f"{count(data.kept.shape[1], 'input channel')}, by who keeps most"
    parts.append(text("label", (_MASKS_LEFT + WIDTH) / 2, bottom + 23, words, "middle"))
    return svg(of_masks(data, channel), bottom + 30, parts)


def _in_steps(kept: np.ndarray) -> np.ndarray:
    """Average neighbours, if there are more input channels than steps fit in."""
    n = kept.shape[1]
    if n <= _MASKS_MAX_STEPS:
        return kept
    edges = np.linspace(0, n, _MASKS_MAX_STEPS + 1).astype(np.int64)
    return np.asarray(np.add.reduceat(kept, edges[:-1], axis=1) / np.diff(edges))


# Shapes and texts of the charts.


WIDTH = 440.0  # units of most charts; the page scales them to their box


def svg(title: str, height: float, parts: Iterable[Markup], width: float = WIDTH) -> Markup:
    """Put shapes and texts together into a picture with a title for those who cannot see it."""
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
    return Markup('<path class="{}" d="M{},{}L{},{}"/>').format(
        kind, units(x1), units(y1), units(x2), units(y2)
    )


def rect(kind: str, start: float, y: float, length: float, height: float) -> Markup:
    """Draw a rectangle; a length below zero runs to the left."""
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
        kind, units(min(start, start + length)), units(y), units(abs(length)), units(height)
    )


def path(points: Iterable[tuple[float, float]]) -> str:
    """Write a line through points, each from the one before: that takes fewest characters.

    >>> path([(3.14, 2.0), (5.0, 1.0), (5.5, 4.25)])
    'M3.1 2l1.9-1 .5 3.2'
    """
    tenths = [(round(10 * x), round(10 * y)) for x, y in points]
    x, y = tenths[0]
    steps = [
        _step(x2 - x1) + (step if (step := _step(y2 - y1)).startswith("-") else f" {step}")
        for (x1, y1), (x2, y2) in pairwise(tenths)
    ]
    line = steps[0] if steps else ""
    for step in steps[1:]:
        line += step if step.startswith("-") else f" {step}"
    return f"M{units(x / 10)} {units(y / 10)}" + (f"l{line}" if line else "")


def _step(tenths: int) -> str:
    """Write a distance without the zeros that say nothing."""
    return units(tenths / 10).replace("0.", ".", 1) if abs(tenths) < 10 else units(tenths / 10)


def units(value: float) -> str:
    """Write a coordinate.

    >>> units(3.14159), units(2.0)
    ('3.1', '2')
    """
    return f"{value:.1f}".removesuffix(".0")


# How much room words take in a chart, where nothing can be measured before a browser shows it.


# Font sizes in units of a chart, at which a chart is legible in a wide box and in a phone's. The
# style sheet takes a step between the two as well; a test in a browser measures what comes of it.
WIDE, NARROW = 12.5, 16.5

_SLIM = frozenset("iljtfrI.,:;'|!()[]/\\ -\N{FIRST STRONG ISOLATE}\N{POP DIRECTIONAL ISOLATE}")
_BROAD = frozenset("mwMW@%&…\N{EM DASH}")


def ems(words: str) -> float:
    """Estimate how wide words are, in font sizes; of most fonts rather too much.

    >>> round(ems("Ankle boot"), 2), round(ems("WWW"), 2), round(ems("時計"), 2)
    (6.02, 3.06, 2.2)
    """
    return sum(map(_em, words))


def _em(character: str) -> float:
    if character in _SLIM:
        return 0.42
    if character in _BROAD:
        return 1.02
    if unicodedata.combining(character):
        return 0.0
    if unicodedata.east_asian_width(character) in "WF":
        return 1.1
    return 0.8 if character.isupper() else 0.66


def cut(words: str, room: float) -> str:
    """Shorten words to a room in font sizes.

    >>> cut("Ankle boot", 6.1), cut("Ankle boot", 5)
    ('Ankle boot', 'Ankle…')
    """
    if ems(words) <= room:
        return words
    used = ems("…")
    for n, character in enumerate(words):
        used += _em(character)
        if used > room:
            return words[:n].rstrip() + "…"
    return words


def listed(names: Sequence[str], room: float) -> str:
    """List names in a room in font sizes; each keeps its own writing direction."""
    shown: list[str] = []
    for name in names:
        left = room - ems("".join(f"{one}, " for one in shown))
        if shown and left < 4:
            return ", ".join(map(isolate, shown)) + ", …"
        shown.append(cut(name, left))
    return ", ".join(map(isolate, shown))


def name_in(names: Sequence[str], room: float) -> Markup:
    """Write names for a room in units of a chart, shorter where the page shows larger letters."""
    wide, narrow = listed(names, room / WIDE), listed(names, room / NARROW)
    if wide == narrow:
        return Markup('<tspan class="name">{}</tspan>').format(wide)
    return Markup(
        '<tspan class="name roomy">{}</tspan><tspan class="name tight">{}</tspan>'
    ).format(wide, narrow)


# Axes and densities as small SVG texts; colours and fonts come from the page's style sheet.


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


# Charts of single images' responses: ridges and scatter plots, as in `charts`.


Place = Callable[[float], float]

_LETTER = 20.0  # room for the letters of concepts
_CLASS_NAMES = 150.0  # and for the names of classes, at most
_RIDGE_PEAK, _TOP = 30.0, 34.0
_HIGHEST_ROW, _LOWEST_ROW, _ROWS_HEIGHT = 36.0, 21.0, 230.0  # few classes have more room each
_PLOT = 300.0  # width of a scatter plot
_PLOT_FONT = 15.0  # the largest in it
_VISIBLE = 0.01  # of a curve's peak


def ridges(data: Ridges, channel: int) -> Markup:
    """Draw a row per class: the original as a line, each concept channel as an area."""
    low, high = float(data.grid[0]), float(data.grid[-1])
    names = min(_CLASS_NAMES, NARROW * max(ems(row.name) for row in data.rows))
    left, right = _LETTER + names + 10, WIDTH - 8

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    xs = [place(value) for value in data.grid.tolist()]
    marks, labels = axis(low, high, right - left, NARROW)
    pitch = max(_LOWEST_ROW, min(_HIGHEST_ROW, _ROWS_HEIGHT / len(data.rows)))
    bottom = _TOP + (len(data.rows) - 1) * pitch
    parts = [
        line("grid" if mark else "zero", place(mark), _TOP - _RIDGE_PEAK, place(mark), bottom)
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
    inner = [(xs[i], base - _RIDGE_PEAK * float(heights[i])) for i in range(first, last + 1)]
    line = path([(xs[first], base), *inner, (xs[last], base)])
    return Markup('<path class="{}" d="{}"/>').format(kind, line)


# Bars of the strongest input channels; see `svg.py` on how texts go in.


_AXIS = "relevance, in summed pre-activation"
_HEAD, _FOOT = 26.0, 28.0  # room above and below the bars


def draw_bars(data: Bars, channel: int) -> Markup:
    """Draw the strongest input channels: two concepts mirrored, more of them grouped."""
    title = of_bars(data, channel)
    largest = max((abs(v) for s in data.sources for v in (*s.relevance, *s.kept)), default=0.0)
    scale = 1 / largest if largest else 0.0
    if len(data.concepts) == 2:
        return _mirrored(title, data, scale)
    return _grouped(title, data, scale)


def _mirrored(title: str, data: Bars, scale: float) -> Markup:
    half, row = _numbers(data) / 2 + 4, 20.0
    values = [significant(v, 2) for source in data.sources for v in source.relevance]
    longest = WIDTH / 2 - half - 8 - NARROW * max(map(ems, values))
    left, right = data.concepts
    bottom = _HEAD + len(data.sources) * row
    parts = [
        _head(left, WIDTH / 2 - half - 4, "end", WIDTH / 2 - half),
        _head(right, WIDTH / 2 + half + 4, "start", WIDTH / 2 - half),
        text("tick", WIDTH / 2, 14, "input", "middle"),
        *(line("axis", x, _HEAD - 2, x, bottom) for x in (WIDTH / 2 - half, WIDTH / 2 + half)),
        text("label", WIDTH / 2, bottom + 20, _AXIS, "middle"),
    ]
    for k, source in enumerate(data.sources):
        y = _HEAD + k * row
        parts.append(text("source", WIDTH / 2, y + 12.5, str(source.channel), "middle"))
        for side, (concept, start) in enumerate(
            ((left, WIDTH / 2 - half), (right, WIDTH / 2 + half))
        ):
            sign = 2 * side - 1
            full = source.relevance[side] * scale * longest
            parts.append(_bar(concept, source, side, start, y, 15.0, sign, scale * longest))
            end = start + sign * (abs(full) + 5)
            label = significant(source.relevance[side], 2)
            parts.append(text("value", end, y + 12.5, label, "start" if side else "end"))
    return svg(title, bottom + _FOOT, parts)


def _grouped(title: str, data: Bars, scale: float) -> Markup:
    left, pitch, gap = _numbers(data) + 8, 16.0, 8.0
    labels = [
        [f"{c.letter} {significant(v, 2)}" for c, v in zip(data.concepts, s.relevance, strict=True)]
        for s in data.sources
    ]
    longest = WIDTH - left - 8 - NARROW * max(ems(label) for row in labels for label in row)
    height = len(data.concepts) * pitch + gap
    bottom = _HEAD + len(data.sources) * height - gap
    parts = [text("tick", left - 6, 14, "input", "end")]
    for n, source in enumerate(data.sources):
        y = _HEAD + n * height
        middle = y + len(data.concepts) * pitch / 2 + 4
        parts.append(text("source", left - 6, middle, str(source.channel), "end"))
        for k, concept in enumerate(data.concepts):
            place = y + k * pitch
            full = abs(source.relevance[k]) * scale * longest
            parts.append(_bar(concept, source, k, left, place, pitch - 3, 1, scale * longest))
            parts.append(text("value", left + full + 5, place + 11.5, labels[n][k]))
    parts += [
        line("axis", left, _HEAD - 2, left, bottom),
        text("label", left, bottom + 20, _AXIS),
    ]
    return svg(title, bottom + _FOOT, parts)


def _numbers(data: Bars) -> float:
    """Room for the numbers of input channels, and the word above them."""
    words = ["input", *(str(source.channel) for source in data.sources)]
    return NARROW * max(map(ems, words))


def _head(concept: ConceptView, x: float, anchor: str, room: float) -> Markup:
    return Markup(
        '<text class="title" x="{}" y="14" text-anchor="{}"><tspan class="letter k{}">{}</tspan> '
        "{}</text>"
    ).format(
        units(x),
        anchor,
        concept.tone,
        concept.letter,
        name_in(concept.names, room - NARROW * (ems(concept.letter) + 0.5)),
    )


def _bar(
    concept: ConceptView,
    source: Source,
    k: int,
    start: float,
    y: float,
    height: float,
    sign: int,
    scale: float,
) -> Markup:
    """Draw an input channel's relevance pale and, over it, what the concept channel keeps."""
    full, kept = source.relevance[k], source.kept[k]
    words = (
        f"input channel {source.channel}, concept {concept.letter}: {significant(full)} in the "
        f"original channel, {significant(kept)} in concept channel {concept.letter}"
    )
    rects = [
        rect(f"{kind} k{concept.tone}{' against' if value < 0 else ''}", start, y, length, height)
        for kind, value in (("full", full), ("kept", kept))
        if (length := sign * abs(value) * scale)
    ]
    return Markup("<g><title>{}</title>{}</g>").format(words, Markup("").join(rects))
