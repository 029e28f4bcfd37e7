"""Densities of a channel and its concept channels, in panels over one axis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from unbraid.figures.content import Content, Row
from unbraid.figures.paper import (
    COLOURS,
    PALE,
    SIZE,
    SMALL,
    SOFT,
    axes_at,
    blank,
    own_style,
    write,
    write_title,
)
from unbraid.report.charts import ticks

AXIS_LABEL = "summed pre-activation"
BELOW = 0.30  # inches for tick labels and the axis label
_TITLE = 0.17  # for a panel's title
_PANEL = 0.52  # for its curves and letters
_GAP = 0.10
_SIDE = 0.06
_VISIBLE = 0.004  # lower, a curve would only cover the axis
_TOP = 1.3  # of a panel; curves peak at 1, above is the place of letters


def draw_densities(content: Content, width: float) -> Figure:
    """Draw the figure; arguments as in `unbraid.density_figure`."""
    n = len(content.rows)
    height = BELOW + n * (_TITLE + _PANEL) + (n - 1) * _GAP + 0.02
    with own_style():
        figure = blank(width, height)
        top = height - 0.02
        for row in content.rows:
            write_row_title(figure, content, row, _SIDE, top - 0.11, width - 2 * _SIDE)
            bottom = top - _TITLE - _PANEL
            axes = axes_at(figure, _SIDE, bottom, width - 2 * _SIDE, _PANEL)
            draw_curves(axes, content, row, last=row is content.rows[-1])
            top = bottom - _GAP
        write(figure, width / 2, 0.03, AXIS_LABEL, fontsize=SMALL, ha="center")
    return figure


def colour(concept: int | None) -> str:
    """Colour of a concept; of more than there are colours, some share one."""
    return SOFT if concept is None else COLOURS[concept % len(COLOURS)]


def write_row_title(
    figure: Figure, content: Content, row: Row, x: float, y: float, room: float
) -> None:
    """Say which channel a row shows."""
    parts: list[tuple[str, dict[str, Any]]]
    if row.concept is None:
        parts = [(f"Original channel {content.channel}", {"weight": "bold"})]
    else:
        style = {"weight": "bold", "color": colour(row.concept)}
        parts = [
            (f"Concept channel {content.letters[row.concept]}", style),
            ("  " + content.names[row.concept], {}),
        ]
    write_title(
        figure, x, y, room, [(words, {"fontsize": SIZE, **style}) for words, style in parts]
    )


def draw_curves(axes: Axes, content: Content, row: Row, *, last: bool) -> None:
    """Draw one curve per concept; only the last panel has numbers at its axis."""
    grid = content.grid
    low, high = float(grid[0]), float(grid[-1])
    axes.set_xlim(low, high)
    axes.set_ylim(0, _TOP)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(FixedLocator(ticks(low, high)))
    axes.tick_params(labelbottom=last)
    axes.patch.set_visible(False)
    if low < 0 < high:
        axes.plot([0, 0], [0, 1], color=PALE, linewidth=0.6, zorder=0, label="zero")
    peaks = []
    for k, (name, curve) in enumerate(zip(content.letters, row.curves, strict=True)):
        visible = np.where(curve.heights > _VISIBLE, curve.heights, np.nan)
        axes.fill_between(grid, curve.heights, color=colour(k), alpha=0.22, linewidth=0)
        axes.plot(grid, visible, color=colour(k), label=f"density {name}")
        axes.plot(
            [curve.mean],
            [0],
            marker="^",
            markersize=3,
            markeredgewidth=0,
            linestyle="none",
            color=colour(k),
            clip_on=False,
            zorder=3,
            label=f"mean {name}",
        )
        peaks.append(float(grid[curve.heights.argmax()]))
    inches = axes.get_window_extent().width / axes.figure.dpi
    gap = 0.11 * (high - low) / inches
    for k, x in enumerate(spread(peaks, gap, low + gap / 2, high - gap / 2)):
        style = {"fontsize": SMALL, "weight": "bold", "color": colour(k)}
        axes.text(x, 1.06, content.letters[k], ha="center", va="bottom", **style)  # type: ignore[arg-type]


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
