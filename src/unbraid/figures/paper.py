"""Paper: figures of a stated size, in a style of their own, whatever matplotlib is set to.

Places and sizes are inches from the lower left corner, font sizes are points.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from unbraid.errors import UsageError

# The report's colours on white. Tests hold the two equal, and apart for the colour-blind.
COLOURS = (
    *("#0072b2", "#bd4f00", "#00825d", "#b0508e"),
    *("#2d4811", "#96171b", "#613aa6", "#67275f"),
)
BLACK, SOFT, PALE = "#1c1d20", "#5d6068", "#e2e0db"

SIZE, SMALL = 7.0, 6.0
LEAST_WIDTH = 2.0

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure is the same everywhere
    "font.size": SIZE,
    "text.parse_math": False,  # a class may be called "$"
    "text.color": BLACK,
    "axes.edgecolor": BLACK,
    "axes.labelcolor": BLACK,
    "axes.labelsize": SMALL,
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
_NO_DATES: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
    "png": {},
}


@contextmanager
def own_style() -> Iterator[None]:
    """Use this style and nothing else; the caller's settings are back afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


class PaperFigure(Figure):
    """A figure that is saved in its own style, and that a notebook shows as a picture."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """Save as matplotlib does, fonts embedded, without the date."""
        suffix = Path(fname).suffix[1:] if isinstance(fname, (str, Path)) else "png"
        kind = str(options.get("format") or suffix).lower()
        if kind in _NO_DATES:
            options.setdefault("metadata", _NO_DATES[kind])
        with own_style():
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=150)
        return content.getvalue()


def blank(width: float, height: float) -> PaperFigure:
    """Make an empty white figure.

    Raises:
        UsageError: it is too narrow for its texts.
    """
    if not LEAST_WIDTH <= width <= 50:
        raise UsageError(
            f"width is {width:g}; figures are {LEAST_WIDTH:g} to 50 inches wide, and columns of "
            "papers mostly 3.25 or 5.5."
        )
    figure = PaperFigure(figsize=(width, height), dpi=300, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Put axes at a place."""
    full_width, full_height = figure.get_size_inches()
    return figure.add_axes(
        (left / full_width, bottom / full_height, width / full_width, height / full_height)
    )


def write(figure: Figure, x: float, y: float, words: str, **style: Any) -> Text:
    """Write words on their baseline at a place."""
    return figure.text(x, y, words, transform=figure.dpi_scale_trans, **style)


def write_title(
    figure: Figure, x: float, y: float, room: float, parts: Sequence[tuple[str, dict[str, Any]]]
) -> None:
    """Write differently styled words after each other, the last of them cut where room ends."""
    end = x + room
    for n, (words, style) in enumerate(parts):
        text = write(figure, x, y, words, **style)
        if n == len(parts) - 1:
            fit(figure, text, end - x)
        x += length(figure, text)


def length(figure: Figure, text: Text) -> float:
    """Length of a text in inches."""
    return float(text.get_window_extent().width / figure.dpi)


def fit(figure: Figure, text: Text, room: float) -> None:
    """Cut a text that is longer than its room, and say so by an ellipsis."""
    words = text.get_text()
    if length(figure, text) <= room:
        return
    short, long = 0, len(words)  # characters that fit, and that do not
    while long - short > 1:
        middle = (short + long) // 2
        text.set_text(words[:middle].rstrip(" ,") + "…")
        if length(figure, text) <= room:
            short = middle
        else:
            long = middle
    text.set_text(words[:short].rstrip(" ,") + "…")
