"""Bars of the strongest input channels; see `svg.py` on how texts go in."""

from __future__ import annotations

from markupsafe import Markup

from unbraid.report.alt import of_bars
from unbraid.report.channels import Bars, ConceptView, Source
from unbraid.report.room import NARROW, ems, name_in
from unbraid.report.svg import WIDTH, line, rect, svg, text, units
from unbraid.report.text import significant

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
