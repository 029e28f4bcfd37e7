"""Figures as matplotlib draws them: of a stated size, in one style, whatever it is set to."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from PIL import Image

from unbraid.base.errors import UsageError
from unbraid.reporting.channel import Bars, Curves
from unbraid.reporting.charts import spread, ticks
from unbraid.reporting.words import letter

# The report's colours on white. Tests hold the two equal, and apart for the colour-blind.
COLOURS = (
    *("#0072b2", "#bd4f00", "#00825d", "#b0508e"),
    *("#2d4811", "#96171b", "#613aa6", "#67275f"),
)
BLACK, SOFT, PALE = "#1c1d20", "#5d6068", "#e2e0db"
SIZE, SMALL = 7.0, 6.0
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure is the same everywhere
    "font.size": SIZE,
    "text.parse_math": False,  # a class may be called "$"
    "text.color": BLACK,
    "axes.edgecolor": BLACK,
    "axes.linewidth": 0.6,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": BLACK,
    "xtick.labelsize": SMALL,
    "xtick.major.width": 0.6,
    "xtick.major.size": 2.0,
    "xtick.major.pad": 2.0,
    "lines.linewidth": 0.9,
    "lines.solid_joinstyle": "round",
    "pdf.fonttype": 42,  # whole TrueType fonts: publishers refuse Type 3
    "svg.fonttype": "path",
    "svg.hashsalt": "unbraid",  # else names within the file are drawn by chance
}
_NO_DATES = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}

# Lengths are in inches.
_MARGIN, _BELOW = 0.03, 0.30  # the latter for tick labels and the axis label
_HEAD, _TITLE = 0.15, 0.16  # for the columns' headings, and the title of a row
_ROWS, _COLUMNS, _TILES, _APART = 0.09, 0.14, 0.04, 0.10  # between them; visualisation and images
_DENSITIES, _PANEL = 0.34, 0.52  # the densities' part of the width; their height without pictures
_SMALLEST, _LARGEST = 0.25, 0.75  # side of a tile
_PITCH = 0.115  # from one input channel to the next
_VISIBLE = 0.004  # of a curve's peak; lower, it would only cover the axis


class PaperFigure(Figure):
    """A figure that is saved in its own style, and that a notebook shows as a picture."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """Save as matplotlib does, fonts embedded, without the date."""
        suffix = Path(fname).suffix[1:] if isinstance(fname, (str, Path)) else "png"
        kind = str(options.get("format") or suffix).lower()
        if kind in _NO_DATES:
            options.setdefault("metadata", _NO_DATES[kind])
        with _own_style():
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=150)
        return content.getvalue()

    def axes_at(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """Put axes at a place."""
        w, h = self.get_size_inches()
        return self.add_axes((left / w, bottom / h, width / w, height / h))

    def write(
        self, x: float, y: float, words: str, width: float | None = None, **style: Any
    ) -> float:
        """Write words on their baseline, cut to a width, and return where they end."""
        text = self.text(x, y, words, transform=self.dpi_scale_trans, **style)

        def length() -> float:
            return float(text.get_window_extent().width / self.dpi)

        while width is not None and words and length() > width:
            words = words[:-1]
            text.set_text(words.rstrip(" ,") + "…")
        return x + length()

    def write_small(self, x: float, y: float, words: str, side: str = "left", **style: Any) -> None:
        """Write a small text."""
        self.write(x, y, words, fontsize=SMALL, ha=side, **style)


@contextmanager
def _own_style() -> Iterator[None]:
    """Use this style and nothing else; the caller's settings are back afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def _blank(width: float, height: float) -> PaperFigure:
    if not 2.0 <= width <= 50:
        raise UsageError(
            f"width is {width:g}; figures are 2 to 50 inches wide, and columns of papers mostly "
            "3.25 or 5.5."
        )
    figure = PaperFigure(figsize=(width, height), dpi=300, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def colour(concept: int) -> str:
    """Colour of a concept; of more than there are colours, some share one."""
    return COLOURS[concept % len(COLOURS)]


# --- a row for the original, and one for each concept channel -------------------------------------


def draw_channel(
    channel: int,
    names: Sequence[str],
    curves: Curves,
    width: float,
    tiles: Sequence[Sequence[tuple[int, Image.Image | None]]] = (),
    made: Sequence[Image.Image | None] = (None,),
    *,
    headed: bool = False,
) -> PaperFigure:
    """Draw the original and then each of the K concept channels, with densities and pictures.

    `tiles` has reference images for each row, with the concept of each, or -1; `made` has a feature
    visualisation for each row.
    """
    n, n_tiles = len(curves.means), max(map(len, tiles), default=0)
    n_made = 0 if None in made else 1
    first = left = _MARGIN  # of the images, and of the densities
    side = _PANEL
    if n_tiles + n_made:
        most = (1 - _DENSITIES) * (width - 2 * _MARGIN) - _COLUMNS - _APART * n_made
        side = _tile_side(n_tiles + n_made, most)
        first += (side + _APART) * n_made
        left = first + n_tiles * (side + _TILES) - _TILES + _COLUMNS
    chart = width - _MARGIN - left
    head = _HEAD if headed else 0.0
    height = _BELOW + n * (_TITLE + side) + (n - 1) * _ROWS + head + _MARGIN
    with _own_style():
        figure = _blank(width, height)
        top = height - _MARGIN - head
        heads = {_MARGIN: "visualised"} if n_made else {}
        heads[left] = "densities over the images of each concept"
        if n_tiles:
            heads[first] = "images that excite the channel most"
        for x, words in heads.items() if headed else ():
            figure.write_small(x, top + 0.05, words, color=SOFT)
        for row in range(n):
            ink, title = (
                (colour(row - 1), f"Concept channel {letter(row - 1)}") if row else (SOFT, "")
            )
            title = title or f"Original channel {channel}"
            style: dict[str, Any] = {"fontsize": SIZE, "weight": "bold"}
            style["color"] = ink if row else BLACK
            x = figure.write(_MARGIN, top - 0.11, title, width - 2 * _MARGIN, **style)
            if row:
                name = "  " + names[row - 1]
                figure.write(x, top - 0.11, name, width - _MARGIN - x, fontsize=SIZE)
            bottom = top - _TITLE - side
            if n_made:
                _draw_tile(figure, _MARGIN, bottom, side, made[row], ink)
            for k, (concept, picture) in enumerate(tiles[row] if tiles else ()):
                frame = colour(concept) if concept >= 0 else PALE
                tile = _draw_tile(figure, first + k * (side + _TILES), bottom, side, picture, frame)
                if concept >= 0:
                    _mark(tile, letter(concept), frame)
            axes = figure.axes_at(left, bottom, chart, side)
            _draw_curves(axes, curves.grid, curves.heights[row], curves.means[row].tolist())
            axes.tick_params(labelbottom=row == n - 1)
            top = bottom - _ROWS
        figure.write_small(left + chart / 2, 0.03, "summed pre-activation", "center")
    return figure


def _tile_side(n_tiles: int, width: float) -> float:
    side = (width + _TILES) / n_tiles - _TILES
    if side < _SMALLEST:
        raise UsageError(
            f"{n_tiles} images in a row are too many for the figure's width; ask for fewer, or for "
            "a wider figure."
        )
    return min(side, _LARGEST)


def _draw_tile(
    figure: PaperFigure, left: float, bottom: float, side: float, picture: Any, frame: str
) -> Axes:
    """Draw a picture in a frame; one that could not be read is crossed out."""
    axes = figure.axes_at(left, bottom, side, side)
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


def _mark(axes: Axes, words: str, ground: str) -> None:
    """Say in a tile's corner which concept it belongs to, as the frame does by colour."""
    axes.annotate(
        words,
        (0, 1),
        (1.6, -1.6),
        xycoords="axes fraction",
        textcoords="offset points",
        va="top",
        fontsize=SMALL,
        weight="bold",
        color="white",
        bbox={"boxstyle": "square,pad=0.15", "facecolor": ground, "edgecolor": "none"},
    )


def _draw_curves(axes: Axes, grid: np.ndarray, curves: np.ndarray, means: Sequence[float]) -> None:
    """Draw one curve per concept; they peak at 1, above is the place of letters."""
    low, high = float(grid[0]), float(grid[-1])
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1.3)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(FixedLocator(ticks(low, high)))
    axes.patch.set_visible(False)
    if low < 0 < high:
        axes.plot([0, 0], [0, 1], color=PALE, linewidth=0.6, zorder=0, label="zero")
    marker: dict[str, Any] = {"marker": "^", "markersize": 3, "markeredgewidth": 0, "zorder": 3}
    gap = 0.11 * (high - low) * axes.figure.dpi / axes.get_window_extent().width
    places = spread(grid[curves.argmax(1)].tolist(), gap, low + gap / 2, high - gap / 2)
    for k, (heights, mean, place) in enumerate(zip(curves, means, places, strict=True)):
        ink, name = colour(k), letter(k)
        visible = np.where(heights > _VISIBLE, heights, np.nan)
        axes.fill_between(grid, heights, color=ink, alpha=0.22, linewidth=0)
        axes.plot(grid, visible, color=ink, label=f"density {name}")
        axes.plot([mean], [0], color=ink, label=f"mean {name}", clip_on=False, **marker)
        style: dict[str, Any] = {"fontsize": SMALL, "weight": "bold", "color": ink}
        axes.text(place, 1.06, name, ha="center", va="bottom", **style)


# --- the input channels that feed each concept ----------------------------------------------------


def draw_sources(data: Bars, names: Sequence[str], width: float) -> PaperFigure:
    """Draw a panel of bars for each concept, all of the same input channels."""
    n, tall, left, between = len(names), len(data.inputs) * _PITCH, 0.36, 0.10
    each = (width - left - 0.04 - (n - 1) * between) / n
    with _own_style():
        figure = _blank(width, 0.20 + tall + _BELOW)
        if each < 0.5:
            raise UsageError(
                f"The channel has {n} concepts, too many for {width:g} inches; ask for a wider "
                "figure."
            )
        top = _BELOW + tall + 0.08
        figure.write_small(left - 0.06, top, "input", "right")
        for row, number in enumerate(data.inputs):
            y = _BELOW + tall - (row + 0.5) * _PITCH
            figure.write_small(left - 0.06, y, str(number), "right", va="center_baseline")
        values = np.stack([data.relevance, data.kept])  # (2, K, n)
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        margin = 0.04 * (high - low) or 1.0
        places = np.arange(len(data.inputs))
        for k, name in enumerate(names):
            x, ink = left + k * (each + between), colour(k)
            axes = figure.axes_at(x, _BELOW, each, tall)
            axes.set_xlim(low - margin, high + margin)
            axes.set_ylim(len(places) - 0.5, -0.5)
            axes.set_yticks([])
            # A narrow panel has no room for every tick's number.
            marks = ticks(low - margin, high + margin)[:: 1 if each > 1.2 else 2]
            axes.xaxis.set_major_locator(FixedLocator(marks))
            axes.barh(places, data.relevance[k], 0.76, color=ink, alpha=0.3)
            axes.barh(places, data.kept[k], 0.4, color=ink)
            axes.axvline(0, color=BLACK, linewidth=0.6)
            end = figure.write(x, top, letter(k), fontsize=SIZE, weight="bold", color=ink)
            figure.write(end, top, "  " + name, x + each - end, fontsize=SIZE)
        label = "mean relevance for the original (pale) and the concept channel"
        figure.write_small(left + (width - left) / 2, 0.03, label, "center")
    return figure
