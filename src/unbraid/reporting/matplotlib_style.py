"""How figures look and are saved: size, letters, colours, whatever matplotlib is set to."""

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
from unbraid.reporting.charts import spread, ticks
from unbraid.reporting.words import letter

# The report's colours on white. Tests hold the two equal, and apart for the colour-blind.
COLOURS = (
    *("#0072b2", "#bd4f00", "#00825d", "#b0508e"),
    *("#2d4811", "#96171b", "#613aa6", "#67275f"),
)
BLACK, SOFT, PALE = "#1c1d20", "#5d6068", "#e2e0db"
SMALL = 6.0
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure is the same everywhere
    "font.size": 7.0,
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
_AS_TEXT: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans", "sans-serif"],
}
_NO_DATES = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
_VISIBLE = 0.004  # of a curve's peak; lower, it would only cover the axis


@contextmanager
def own_style(*, text_as_text: bool = False) -> Iterator[None]:
    """Use this style and nothing else; the caller's settings are back afterwards.

    With `text_as_text` an SVG holds text, for which other fonts may stand in.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        if text_as_text:
            mpl.rcParams.update(_AS_TEXT)
        yield


class PaperFigure(Figure):
    """A figure that is saved in its own style, and that a notebook shows as a picture.

    Lengths are in inches.
    """

    def __init__(self, width: float, height: float, *, text_as_text: bool = False) -> None:
        """Make a blank figure, or raise a UsageError: its width is none of a figure."""
        if not 2.0 <= width <= 50:
            raise UsageError(
                f"width is {width:g}; figures are 2 to 50 inches wide, and columns of papers "
                "mostly 3.25 or 5.5."
            )
        super().__init__(figsize=(width, height), dpi=300, facecolor="white")
        FigureCanvasAgg(self)
        self._text_as_text = text_as_text

    def savefig(self, fname: Any, **options: Any) -> None:
        """Save as matplotlib does, fonts embedded, without the date."""
        suffix = Path(fname).suffix[1:] if isinstance(fname, (str, Path)) else "png"
        kind = str(options.get("format") or suffix).lower()
        if kind in _NO_DATES:
            options.setdefault("metadata", _NO_DATES[kind])
        with own_style(text_as_text=self._text_as_text):
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=150)
        return content.getvalue()

    def axes_at(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """Put axes at a place."""
        w, h = self.get_size_inches()
        axes = self.add_axes((left / w, bottom / h, width / w, height / h))
        axes.set_yticks([])
        return axes

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


def colour(concept: int) -> str:
    """Colour of a concept; of more than there are colours, some share one."""
    return COLOURS[concept % len(COLOURS)]


def draw_tile(axes: Axes, picture: Image.Image | None, frame: str, mark: str = "") -> None:
    """Draw a picture in a frame with a mark in its corner; one not read is crossed out."""
    axes.set_xticks([])
    if picture is None:
        axes.plot([0, 1], [0, 1], [0, 1], [1, 0], color=PALE, linewidth=0.6, label="unreadable")
        axes.set(xlim=(0, 1), ylim=(0, 1))
    else:
        axes.imshow(np.asarray(picture))
    for spine in axes.spines.values():
        spine.set(visible=True, color=frame, linewidth=1.4)
    if mark:
        axes.annotate(
            mark,
            (0, 1),
            (1.6, -1.6),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            fontsize=SMALL,
            weight="bold",
            color="white",
            bbox={"boxstyle": "square,pad=0.15", "facecolor": frame, "edgecolor": "none"},
        )


def draw_curves(axes: Axes, grid: np.ndarray, curves: np.ndarray, means: Sequence[float]) -> None:
    """Draw one curve per concept; they peak at 1, above is the place of letters."""
    low, high = float(grid[0]), float(grid[-1])
    axes.set(xlim=(low, high), ylim=(0, 1.3))
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


def draw_bars(
    axes: Axes, relevance: np.ndarray, kept: np.ndarray, span: tuple[float, float], ink: str
) -> None:
    """Draw pale and, in them, solid bars, from above."""
    places = np.arange(len(relevance))
    axes.set(xlim=span, ylim=(len(places) - 0.5, -0.5))
    # A narrow panel has no room for every tick's number.
    narrow = axes.get_window_extent().width / axes.figure.dpi <= 1.2
    axes.xaxis.set_major_locator(FixedLocator(ticks(*span)[:: 2 if narrow else 1]))
    axes.barh(places, relevance, 0.76, color=ink, alpha=0.3)
    axes.barh(places, kept, 0.4, color=ink)
    axes.axvline(0, color=BLACK, linewidth=0.6)
