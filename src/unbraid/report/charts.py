"""Charts as small SVG texts; colours and fonts come from the page's style sheet.

Every text goes in through `Markup.format`, which escapes it; see `svg.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from unbraid.report.channels import Bars, ConceptView, Curve, Densities, Source
from unbraid.report.svg import WIDTH, line, path, rect, svg, text, units
from unbraid.report.text import MINUS, isolate, shorten, significant

_SIDE = 10.0  # free at both sides of a density
_PANEL = 92.0  # from one density panel to the next
_TITLE, _LETTERS, _BASE = 13.0, 27.0, 80.0  # within a panel, from above
_PEAK = 46.0  # height of a curve


def densities(data: Densities) -> Markup:
    """Draw one panel for the original channel and one for each concept channel."""
    low, high = float(data.grid[0]), float(data.grid[-1])

    def place(value: float) -> float:
        return _SIDE + (value - low) / (high - low) * (WIDTH - 2 * _SIDE)

    xs = [place(value) for value in data.grid.tolist()]
    marks = ticks(low, high)
    parts = []
    for k, (concept, curves) in enumerate(data.panels):
        top = k * _PANEL
        grid = [
            line("grid" if mark else "zero", place(mark), top + 20, place(mark), top + _BASE)
            for mark in marks
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
        text("tick", place(mark), bottom + 19, label, "middle")
        for mark, label in zip(marks, tick_labels(marks), strict=True)
    ]
    parts.append(text("label", WIDTH / 2, bottom + 36, "summed pre-activation", "middle"))
    title = "Densities of the summed pre-activation of the original and the concept channels"
    return svg(title, bottom + 42, parts)


def bars(data: Bars) -> Markup:
    """Draw the strongest input channels: two concepts mirrored, more of them grouped."""
    title = "Relevance of the strongest input channels for each concept"
    largest = max((abs(v) for s in data.sources for v in (*s.relevance, *s.kept)), default=0.0)
    scale = 1 / largest if largest else 0.0
    if len(data.concepts) == 2:
        return _mirrored(title, data, scale)
    return _grouped(title, data, scale)


def ticks(low: float, high: float) -> list[float]:
    """Choose round values that divide an axis into about five.

    >>> ticks(-3, 21)
    [0.0, 5.0, 10.0, 15.0, 20.0]
    """
    rough = (high - low) / 5
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


def _panel_title(concept: ConceptView | None, top: float) -> Markup:
    if concept is None:
        return text("title", _SIDE, top + _TITLE, "Original channel")
    return Markup(
        '<text class="title" x="{}" y="{}">Concept channel {}: <tspan class="name">{}</tspan>'
        "</text>"
    ).format(units(_SIDE), units(top + _TITLE), concept.letter, _name(concept, 44))


def _name(concept: ConceptView, limit: int) -> str:
    """Name a concept in the room there is; each name keeps its own writing direction."""
    names: list[str] = []
    for name in concept.names:
        room = limit - sum(map(len, names)) - 2 * len(names)
        if room < 4:
            return ", ".join(map(isolate, names)) + ", …"
        names.append(shorten(name, room))
    return ", ".join(map(isolate, names))


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


def _spread(places: Sequence[float], gap: float = 13.0) -> list[float]:
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


def _mirrored(title: str, data: Bars, scale: float) -> Markup:
    half, row, top = 26.0, 19.0, 26.0
    longest = WIDTH / 2 - half - 48
    left, right = data.concepts
    parts = [
        _head(left, WIDTH / 2 - half - 4, "end"),
        _head(right, WIDTH / 2 + half + 4, "start"),
        text("tick", WIDTH / 2, 14, "input", "middle"),
    ]
    for k, source in enumerate(data.sources):
        y = top + k * row
        parts.append(text("source", WIDTH / 2, y + 11.5, str(source.channel), "middle"))
        for side, (concept, start) in enumerate(
            ((left, WIDTH / 2 - half), (right, WIDTH / 2 + half))
        ):
            sign = 2 * side - 1
            full = source.relevance[side] * scale * longest
            parts.append(_bar(concept, source, side, start, y, 14.0, sign, scale * longest))
            end = start + sign * (abs(full) + 5)
            label = significant(source.relevance[side], 2)
            parts.append(text("value", end, y + 11, label, "start" if side else "end"))
    return svg(title, top + len(data.sources) * row + 2, parts)


def _grouped(title: str, data: Bars, scale: float) -> Markup:
    left, pitch, gap, top = 40.0, 11.0, 8.0, 20.0
    longest = WIDTH - left - 52
    height = len(data.concepts) * pitch + gap
    parts = [text("tick", left - 6, 12, "input", "end")]
    for n, source in enumerate(data.sources):
        y = top + n * height
        middle = y + len(data.concepts) * pitch / 2 + 3.5
        parts.append(text("source", left - 6, middle, str(source.channel), "end"))
        for k, concept in enumerate(data.concepts):
            place = y + k * pitch
            full = abs(source.relevance[k]) * scale * longest
            parts.append(_bar(concept, source, k, left, place, pitch - 2, 1, scale * longest))
            label = f"{concept.letter} {significant(source.relevance[k], 2)}"
            parts.append(text("value small", left + full + 5, place + 8, label))
    return svg(title, top + len(data.sources) * height, parts)


def _head(concept: ConceptView, x: float, anchor: str) -> Markup:
    return Markup(
        '<text class="title" x="{}" y="14" text-anchor="{}"><tspan class="letter k{}">{}</tspan> '
        '<tspan class="name">{}</tspan></text>'
    ).format(units(x), anchor, concept.tone, concept.letter, _name(concept, 24))


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
