"""Shapes and texts of the charts.

Every text goes in through `Markup.format`, which escapes it: class names are anybody's.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from markupsafe import Markup

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
