"""The page's charts as SVG; colours and fonts come from the style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

import numpy as np
from markupsafe import Markup

from unbraid.base.tables import count
from unbraid.finding.sensitivity import Sensitivity
from unbraid.reporting.alt_text import (
    describe_bars,
    describe_densities,
    describe_masks,
    describe_ridges,
    describe_scatter,
)
from unbraid.reporting.channel import Bars, ConceptView, Curves, Ridges, Scatter
from unbraid.reporting.words import MINUS, ems, isolate, listed, short, significant

Concepts = Sequence[ConceptView]
WIDTH = 440.0  # units of most charts; the page scales them to their box
# Font sizes in units of a chart, at which a chart is legible in a wide box and in a phone's. The
# style sheet takes a step between the two as well; a test in a browser measures what comes of it.
WIDE, NARROW = 12.5, 16.5
_UNIT = "summed pre-activation"
_N_AXES = 3  # concepts of which every two are set against each other
_N_STEPS = 220  # of a chart of masks, each two units wide


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


def shape(kind: str, d: str, title: str = "") -> Markup:
    """Draw a path, which tells its title to a pointer."""
    if not title:
        return Markup('<path class="{}" d="{}"/>').format(kind, d)
    return Markup('<path class="{}" d="{}"><title>{}</title></path>').format(kind, d, title)


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    """Draw a line from one place to another."""
    return shape(kind, f"M{units(x1)},{units(y1)}L{units(x2)},{units(y2)}")


def _path(points: Iterable[tuple[float, float]]) -> str:
    """Write a line through points, each from the one before: that takes fewest characters.

    >>> _path([(3.14, 2.0), (5.0, 1.0), (5.5, 4.25)])
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


def _names_in(names: Sequence[str], width: float) -> Markup:
    """Write names in a width in units of a chart, shorter where the page shows larger letters."""
    wide, narrow = listed(names, width / WIDE), listed(names, width / NARROW)
    if wide == narrow:
        return Markup('<tspan class="name">{}</tspan>').format(wide)
    return Markup(
        '<tspan class="name roomy">{}</tspan><tspan class="name tight">{}</tspan>'
    ).format(wide, narrow)


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
    if not marks or max(map(abs, marks)) >= 1e5 or step < 1e-4:
        return [significant(mark, 4) for mark in marks]
    digits = max(0, -math.floor(math.log10(step)))
    return [f"{mark:.{digits}f}".replace("-", MINUS) for mark in marks]


def axis(low: float, high: float, length: float, font: float) -> list[tuple[float, str]]:
    """Choose round values, and write them, as many as fit beside each other.

    The length of the axis and the font's size are in units of the chart.

    >>> axis(-3, 21, 80, 16)
    [(0.0, '0'), (10.0, '10'), (20.0, '20')]
    """
    for n in (6, 5, 4, 3, 2):
        marks = ticks(low, high, n)
        labels = tick_labels(marks)
        step = length * (marks[1] - marks[0]) / (high - low) if len(marks) > 1 else length
        if font * (max(map(ems, labels), default=0.0) + 0.6) <= step:
            break
    return list(zip(marks, labels, strict=True))


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart that would cover each other, keeping their order and within bounds.

    >>> spread([1.0, 1.0, 9.0], 2.0, 0.0, 9.0), spread([9.0, 8.5], 2.0, 0.0, 9.0)
    ([1.0, 3.0, 9.0], [9.0, 7.0])
    """
    order = sorted(range(len(places)), key=lambda k: places[k])
    moved = [min(max(place, low), high) for place in places]
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    edge = high
    for k in reversed(order):
        moved[k] = min(moved[k], edge)
        edge = moved[k] - gap
    return moved


class _Axis:
    """The axis below curves, from left to right in units of the chart."""

    def __init__(self, grid: np.ndarray, left: float, right: float) -> None:
        self.low, self.high = float(grid[0]), float(grid[-1])
        self.left, self.right = left, right
        self.xs = [self.place(value) for value in grid.tolist()]
        self.marks = axis(self.low, self.high, right - left, NARROW)

    def place(self, value: float) -> float:
        return self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left)

    def lines(self, top: float, bottom: float) -> list[Markup]:
        places = [(mark, self.place(mark)) for mark, _ in self.marks]
        return [line("grid" if mark else "zero", x, top, x, bottom) for mark, x in places]

    def numbers(self, y: float) -> list[Markup]:
        return [text("tick", self.place(mark), y, label, "middle") for mark, label in self.marks]

    def curve(
        self, kind: str, heights: np.ndarray, base: float, peak: float, least: float
    ) -> Markup:
        """Draw a curve from where it leaves the axis, higher than `least`, to where it is back."""
        visible = np.flatnonzero(heights > least)
        first, last = max(0, visible[0] - 1), min(len(heights) - 1, visible[-1] + 1)
        inner = [(self.xs[i], base - peak * float(heights[i])) for i in range(first, last + 1)]
        return shape(kind, _path([(self.xs[first], base), *inner, (self.xs[last], base)]))


def draw_densities(data: Curves, concepts: Concepts, channel: int) -> Markup:
    """Draw one panel for the original channel, one for each concept channel, one for the rest."""
    side, panel, title, base, peak = 10.0, 102.0, 14.0, 86.0, 46.0
    across = _Axis(data.grid, side, WIDTH - side)
    head = Markup(
        '<text class="title" x="{}" y="{}"><tspan class="roomy">Concept channel </tspan>{}: '
        '<tspan class="name">{}</tspan></text>'
    )
    parts, bottom = [], base
    for row, (heights, means) in enumerate(zip(data.heights, data.means.tolist(), strict=True)):
        top, bottom = row * panel, row * panel + base
        parts += across.lines(top + title + 8, bottom)
        if 0 < row <= len(concepts):
            names = listed(concepts[row - 1].names, 21.0)
            at = (units(side), units(top + title))
            parts.append(head.format(*at, concepts[row - 1].letter, names))
        else:
            words = "The rest, what no concept names" if row else "Original channel"
            parts.append(text("title", side, top + title, words))
        parts.append(line("axis", side, bottom, WIDTH - side, bottom))
        for concept, curve in zip(concepts, heights, strict=True):
            parts.append(across.curve(f"curve k{concept.tone}", curve, bottom, peak, 0.004))
        for concept, mean in zip(concepts, means, strict=True):
            triangle = f"M{units(across.place(mean))},{units(bottom)}l-4,6h8z"
            told = f"mean over images of {concept.letter}: {significant(mean)}"
            parts.append(shape(f"mean k{concept.tone}", triangle, told))
        places = spread([across.xs[i] for i in heights.argmax(1)], 16.0, 8.0, WIDTH - 8.0)
        for concept, x in zip(concepts, places, strict=True):
            parts.append(text(f"letter k{concept.tone}", x, top + 34, concept.letter, "middle"))
    parts += across.numbers(bottom + 21)
    parts.append(text("label", WIDTH / 2, bottom + 42, _UNIT, "middle"))
    return svg(describe_densities(data, concepts, channel), bottom + 48, parts)


def draw_ridges(data: Ridges, concepts: Concepts, channel: int) -> Markup:
    """Draw a row per class: the original as a line, each concept channel as an area."""
    letters, top, peak, least = 20.0, 34.0, 30.0, 0.01
    names = min(150.0, NARROW * max(ems(one.name) for one in data.classes))
    left, right = letters + names + 10, WIDTH - 8
    across = _Axis(data.curves.grid, left, right)
    # Few classes have more space each.
    pitch = max(21.0, min(36.0, 230.0 / len(data.classes)))
    bottom = top + (len(data.classes) - 1) * pitch
    parts = across.lines(top - peak, bottom)
    for n, (one, heights) in enumerate(zip(data.classes, data.curves.heights, strict=True)):
        base = top + n * pitch
        # What is beyond the inner picture is cut off, whatever a name is made of.
        name = Markup(
            '<svg x="{}" y="{}" width="{}" height="22"><text x="0" y="16">{}<title>{}</title>'
            "</text></svg>"
        ).format(
            *map(units, (letters, base - 16, names + 4)),
            _names_in([one.name], names),
            isolate(one.name),
        )
        parts += [text(f"letter k{one.concept.tone}", 0, base, one.concept.letter), name]
        parts.append(line("grid", left, base, right, base))
        for concept, curve in zip(concepts, heights[1:], strict=True):
            parts.append(across.curve(f"curve k{concept.tone}", curve, base, peak, least))
        parts.append(across.curve("outline", heights[0], base, peak, least))
    parts += across.numbers(bottom + 19)
    parts.append(text("label", (left + right) / 2, bottom + 39, _UNIT, "middle"))
    return svg(describe_ridges(data, concepts, channel), bottom + 46, parts)


def draw_scatter(data: Scatter, concepts: Concepts, channel: int) -> Markup:
    """Draw concept channels against each other, a point per image; a picture for every two."""
    width, font, top = 300.0, 15.0, 8.0
    low, high = (float(end(np.concatenate(data.points))) for end in (np.min, np.max))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    marks = axis(low, high, 0.7 * width, font)
    left = 2.0 * font + font * max((ems(label) for _, label in marks), default=0.0)
    side = width - left - 10
    bottom, scale = top + side, side / (high - low)

    def place(across: float, up: float) -> tuple[float, float]:
        return left + (across - low) * scale, bottom - (up - low) * scale

    frame = []
    for mark, label in marks:
        (x, y), kind = place(mark, mark), "grid" if mark else "zero"
        frame += [line(kind, x, top, x, bottom), line(kind, left, y, left + side, y)]
        frame.append(text("tick", x, bottom + 18, label, "middle"))
        frame.append(text("tick", left - 5, y + 5, label, "end"))
    titles = (
        f"translate({units(left + side / 2)} {units(bottom + 39)})",
        f"translate({units(font)} {units(top + side / 2)}) rotate(-90)",
    )
    pictures = []
    for axes in combinations(range(min(len(concepts), _N_AXES)), 2):
        parts = list(frame)
        for one, points in zip(data.classes, data.points, strict=True):
            spots = [place(x, y) for x, y in points[:, axes].tolist()]
            dots = "".join(f"M{units(x)} {units(y)}h0" for x, y in spots)
            kind = f"dots k{one.concept.tone} s{one.shade}"
            parts.append(shape(kind, dots, f"{one.concept.letter}: {isolate(one.name)}"))
        for where, k in zip(titles, axes, strict=True):
            parts.append(
                Markup(
                    '<text class="label" transform="{}" text-anchor="middle">'
                    '<tspan class="letter k{}">{}</tspan>: {}</text>'
                ).format(where, concepts[k].tone, concepts[k].letter, _UNIT)
            )
        title = describe_scatter(data, concepts, axes, channel)
        pictures.append(svg(title, bottom + 46, parts, width))
    return Markup("").join(pictures)


def draw_bars(data: Bars, concepts: Concepts, channel: int) -> Markup:
    """Draw how relevant the strongest input channels are: two concepts mirrored, more grouped."""
    numbers = NARROW * max(map(ems, ["input", *map(str, data.inputs)]))
    draw = _draw_mirrored if len(concepts) == 2 else _draw_grouped
    bottom, parts = draw(data, concepts, 26.0, numbers)
    return svg(describe_bars(data, concepts, channel), bottom + 28, parts)


def _draw_mirrored(
    data: Bars, concepts: Concepts, top: float, numbers: float
) -> tuple[float, list[Markup]]:
    half, pitch, middle = numbers / 2 + 4, 20.0, WIDTH / 2
    starts, signs, anchors = (middle - half, middle + half), (-1, 1), ("end", "start")
    values = [[significant(value, 2) for value in row] for row in data.relevance.tolist()]
    longest = middle - half - 8 - NARROW * max(ems(value) for row in values for value in row)
    scale, bottom = _scale(data, longest), top + len(data.inputs) * pitch
    head = Markup(
        '<text class="title" x="{}" y="14" text-anchor="{}"><tspan class="letter k{}">{}</tspan> '
        "{}</text>"
    )
    parts = []
    for concept, start, sign, anchor in zip(concepts, starts, signs, anchors, strict=True):
        names = _names_in(concept.names, middle - half - NARROW * (ems(concept.letter) + 0.5))
        at = units(start + 4 * sign)
        parts.append(head.format(at, anchor, concept.tone, concept.letter, names))
    parts.append(text("tick", middle, 14, "input", "middle"))
    parts += [line("axis", x, top - 2, x, bottom) for x in starts]
    parts.append(text("label", middle, bottom + 20, f"relevance, in {_UNIT}", "middle"))
    for n, number in enumerate(data.inputs):
        y = top + n * pitch
        parts.append(text("source", middle, y + 12.5, str(number), "middle"))
        for k, (start, sign, anchor) in enumerate(zip(starts, signs, anchors, strict=True)):
            parts.append(_bar(data, concepts[k], k, n, start, y, sign * scale, 15.0))
            end = start + sign * (abs(data.relevance[k, n]) * scale + 5)
            parts.append(text("value", end, y + 12.5, values[k][n], anchor))
    return bottom, parts


def _draw_grouped(
    data: Bars, concepts: Concepts, top: float, numbers: float
) -> tuple[float, list[Markup]]:
    left, pitch, gap = numbers + 8, 16.0, 8.0
    values = [
        [f"{concept.letter} {significant(value, 2)}" for value in row]
        for concept, row in zip(concepts, data.relevance.tolist(), strict=True)
    ]
    longest = WIDTH - left - 8 - NARROW * max(ems(value) for row in values for value in row)
    scale = _scale(data, longest)
    parts, y = [text("tick", left - 6, 14, "input", "end")], top
    for n, number in enumerate(data.inputs):
        middle = y + len(concepts) * pitch / 2 + 4
        parts.append(text("source", left - 6, middle, str(number), "end"))
        for k, concept in enumerate(concepts):
            parts.append(_bar(data, concept, k, n, left, y, scale, pitch - 3))
            end = left + abs(data.relevance[k, n]) * scale + 5
            parts.append(text("value", end, y + 11.5, values[k][n]))
            y += pitch
        y += gap
    parts.append(line("axis", left, top - 2, left, y - gap))
    parts.append(text("label", left, y - gap + 20, f"relevance, in {_UNIT}"))
    return y - gap, parts


def _scale(data: Bars, longest: float) -> float:
    """Units of the chart per relevance, where the longest bar is `longest`."""
    largest = float(np.abs([data.relevance, data.kept]).max(initial=0.0))
    return longest / largest if largest else 0.0


def _bar(
    data: Bars, concept: ConceptView, k: int, n: int, x: float, y: float, scale: float, high: float
) -> Markup:
    """Draw an input channel's relevance pale and, over it, what the concept channel keeps."""
    values = {"full": float(data.relevance[k, n]), "kept": float(data.kept[k, n])}
    told = (
        f"input channel {data.inputs[n]}, concept {concept.letter}: {significant(values['full'])} "
        f"in the original channel, {significant(values['kept'])} in concept channel "
        f"{concept.letter}"
    )
    rects = []
    for kind, value in values.items():
        if length := abs(value) * scale:  # to the left if the scale is below zero
            kind += f" k{concept.tone}" + (" against" if value < 0 else "")
            rects.append(
                Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                    kind, *map(units, (min(x, x + length), y, abs(length), high))
                )
            )
    return Markup("<g><title>{}</title>{}</g>").format(told, Markup("").join(rects))


def draw_masks(kept: np.ndarray, concepts: Concepts, channel: int) -> Markup:
    """Draw how much every concept channel keeps of each input channel, (K, C_in), as steps."""
    left, pitch, peak, top = 34.0, 46.0, 30.0, 26.0
    steps, n_inputs = kept[:, np.lexsort((-kept.max(0), kept.argmax(0)))], kept.shape[1]
    if n_inputs > _N_STEPS:  # neighbours are averaged
        edges = np.linspace(0, n_inputs, _N_STEPS + 1).astype(np.int64)
        steps = np.add.reduceat(steps, edges[:-1], axis=1) / np.diff(edges)
    wide = (WIDTH - left) / steps.shape[1]
    parts, base = [text("tick", 0, 13, "part of the weights kept")], top + peak
    for k, (concept, heights) in enumerate(zip(concepts, steps.tolist(), strict=True)):
        base = top + k * pitch + peak
        outline = "".join(
            f"V{units(base - peak * height)}H{units(left + n * wide)}"
            for n, height in enumerate(heights, start=1)
        )
        area = f"M{units(left)},{units(base)}{outline}V{units(base)}z"
        parts.append(line("grid", left, base - peak, WIDTH, base - peak))
        parts.append(shape(f"kept k{concept.tone}", area))
        parts.append(line("axis", left, base, WIDTH, base))
        parts.append(text("tick", left - 4, base - peak + 5, "1", "end"))
        parts.append(text("tick", left - 4, base + 5, "0", "end"))
        parts.append(text(f"letter k{concept.tone}", 0, base - peak / 2 + 6, concept.letter))
    words = f"{count(n_inputs, 'input channel')}, by who keeps most"
    parts.append(text("label", (left + WIDTH) / 2, base + 23, words, "middle"))
    return svg(describe_masks(kept, concepts, channel), base + 30, parts)


def draw_thresholds(
    counted: Sensitivity, p: float, chosen: tuple[float | None, float, float]
) -> Markup:
    """Draw what every tau and gamma finds with one p: channels, also as shade, and pairs."""
    left, top, wide, high, gap = 54.0, 40.0, 53.0, 33.0, 2.0
    width, bottom = left + len(counted.gammas) * wide, top + len(counted.taus) * high
    largest = max(1, *(cell.n_channels for cell in counted.cells))
    parts = [text("label", (left + width) / 2, 13, "gamma", "middle")]
    parts.append(text("label", left - 8, 31, "tau", "end"))
    for column, gamma in enumerate(counted.gammas):
        parts.append(text("value", left + (column + 0.5) * wide, 31, f"{gamma:g}", "middle"))
    for row, tau in enumerate(counted.taus):
        y = top + row * high
        parts.append(text("value", left - 8, y + 20, f"{tau:g}", "end"))
        for column, gamma in enumerate(counted.gammas):
            x, cell = left + column * wide, counted.at(tau, p, gamma)
            n, n_pairs = cell.n_channels, cell.n_pairs
            words = (
                f"tau {tau:g}, p {p:g}, gamma {gamma:g}: {count(n, 'channel')}, "
                f"{count(n_pairs, 'pair')}"
            )
            kind = "tile" + (" some" if n else "")
            kind += " chosen" if (tau, p, gamma) == chosen else ""
            # On any of these shades the text's colour can still be read.
            opacity = 0.1 + 0.4 * math.log1p(n) / math.log1p(largest) if n else 1.0
            tile = Markup(
                '<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="3" '
                'fill-opacity="{:.2f}"/>'
            ).format(kind, *map(units, (x + gap / 2, y + gap / 2, wide - gap, high - gap)), opacity)
            kind, at = ("count", y + 15) if n else ("count none", y + 20)
            tile += text(kind, x + wide / 2, at, f"{n:,}", "middle")
            if n_pairs:
                tile += text("value", x + wide / 2, y + 27, short(n_pairs), "middle")
            parts.append(Markup("<g><title>{}</title>{}</g>").format(words, tile))
    numbers = [cell.n_channels for cell in counted.cells if cell.p == p]
    title = (
        f"Polysemantic channels by tau and gamma at p {p:g}, from {min(numbers):,} to "
        f"{max(numbers):,}; the table below has all numbers"
    )
    return svg(title, bottom, parts, width)
