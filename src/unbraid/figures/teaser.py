"""The teaser: one channel before and after, in pictures and densities."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from unbraid.errors import UsageError
from unbraid.figures.content import Content
from unbraid.figures.densities import AXIS_LABEL, BELOW, colour, draw_curves, write_row_title
from unbraid.figures.paper import PALE, SMALL, SOFT, axes_at, blank, own_style, write

_MARGIN = 0.03
_HEAD = 0.15  # inches for the columns' headings
_TITLE = 0.16
_GAP = 0.09
_BETWEEN = 0.14  # columns
_NEXT = 0.04  # tiles
_APART = 0.10  # the visualisation from the images
_DENSITIES = 0.34  # part of the width that is the densities'
_SMALLEST, _LARGEST = 0.25, 0.75  # side of a tile
_PANEL = 0.52  # height of a row without pictures


def draw_teaser(content: Content, width: float) -> Figure:
    """Draw the figure; arguments as in `unbraid.teaser_figure`."""
    with_feature = all(row.feature is not None for row in content.rows)
    n_shots = max(len(row.shots) for row in content.rows)
    n_tiles = n_shots + with_feature
    room = width - 2 * _MARGIN
    chart = _DENSITIES * room if n_tiles else room
    side = _side(n_tiles, room - chart - _BETWEEN - _APART * with_feature) if n_tiles else _PANEL
    first = _MARGIN + (side + _APART if with_feature else 0)  # of the reference images
    left = first + n_shots * (side + _NEXT) - _NEXT + _BETWEEN if n_tiles else _MARGIN
    chart = width - _MARGIN - left
    n = len(content.rows)
    height = BELOW + n * (_TITLE + side) + (n - 1) * _GAP + _HEAD + _MARGIN
    with own_style():
        figure = blank(width, height)
        top = height - _MARGIN - _HEAD
        head = {"fontsize": SMALL, "color": SOFT}
        if with_feature:
            write(figure, _MARGIN, top + 0.05, "visualised", **head)
        if n_shots:
            write(figure, first, top + 0.05, "images that excite the channel most", **head)
        write(figure, left, top + 0.05, "densities over the images of each concept", **head)
        for row in content.rows:
            write_row_title(figure, content, row, _MARGIN, top - 0.11, left + chart - _MARGIN)
            bottom = top - _TITLE - side
            if with_feature:
                _tile(figure, _MARGIN, bottom, side, row.feature, colour(row.concept))
            for k, shot in enumerate(row.shots):
                known = shot.concept >= 0
                frame = colour(shot.concept) if known else PALE
                tile = _tile(figure, first + k * (side + _NEXT), bottom, side, shot.picture, frame)
                if known:
                    _mark(tile, content.letters[shot.concept], frame)
            axes = axes_at(figure, left, bottom, chart, side)
            draw_curves(axes, content, row, last=row is content.rows[-1])
            top = bottom - _GAP
        write(figure, left + chart / 2, 0.03, AXIS_LABEL, fontsize=SMALL, ha="center")
    return figure


def _side(n_tiles: int, room: float) -> float:
    side = (room + _NEXT) / n_tiles - _NEXT
    if side < _SMALLEST:
        raise UsageError(
            f"{n_tiles} images in a row are too many for the figure's width; ask for fewer, or for "
            "a wider figure."
        )
    return min(side, _LARGEST)


def _tile(
    figure: Figure, left: float, bottom: float, side: float, picture: Image.Image | None, frame: str
) -> Axes:
    """Draw a picture in a frame; one that could not be read is crossed out."""
    axes = axes_at(figure, left, bottom, side, side)
    axes.set_xticks([])
    axes.set_yticks([])
    if picture is None:
        axes.plot([0, 1], [0, 1], [0, 1], [1, 0], color=PALE, linewidth=0.6, label="unreadable")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
    else:
        axes.imshow(np.asarray(picture))
    for spine in axes.spines.values():
        spine.set(visible=True, color=frame, linewidth=1.4)
    return axes


def _mark(axes: Axes, letter: str, ground: str) -> None:
    """Say in a tile's corner which concept it belongs to, as the frame does by colour."""
    axes.annotate(
        letter,
        (0, 1),
        (1.6, -1.6),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="left",
        va="top",
        fontsize=SMALL,
        weight="bold",
        color="white",
        bbox={"boxstyle": "square,pad=0.15", "facecolor": ground, "edgecolor": "none"},
    )
