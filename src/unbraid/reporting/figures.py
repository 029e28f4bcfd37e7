"""Figures for papers: a split channel in one picture, sized for a column, drawn by matplotlib.

matplotlib is imported when a figure is made: `pip install matplotlib`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from unbraid.base.arguments import whole_number
from unbraid.base.errors import UsageError
from unbraid.measuring.evaluate import gather_responses
from unbraid.measuring.reference_images import ALIKE, TopImages, reference_images
from unbraid.reporting.channel import density, shared_grid
from unbraid.reporting.pictures import open_picture, refuse_other_images
from unbraid.reporting.words import letter

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from unbraid.scanning.records import Scan
    from unbraid.splitting.splits import ChannelSplit, Split
    from unbraid.visualizing.features import Features


import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator

from unbraid.finding.arv import averaged_relevance, class_sums, concept_mean
from unbraid.networks.relevance import input_relevance
from unbraid.reporting.channel import strongest_sources
from unbraid.reporting.charts import ticks

if TYPE_CHECKING:
    from unbraid.scanning.records import Scan
    from unbraid.splitting.splits import Split


from typing import TYPE_CHECKING

from unbraid.base.arguments import as_path, real_number
from unbraid.base.errors import UnbraidError
from unbraid.base.modes import in_plain_modes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.data import Dataset

    from unbraid.scanning.records import Scan
    from unbraid.splitting.splits import Split
    from unbraid.visualizing.features import Features


# What a figure shows of one split channel, as plain data: nothing here draws.


_N_GRID = 241  # points of a density curve
_SIDE = 256  # pixels of a picture at most; more would not be seen in print


@dataclass(frozen=True, eq=False)
class Shot:
    """One reference image."""

    concept: int  # that it belongs to, -1 for none
    picture: Image.Image | None  # None if it cannot be read


@dataclass(frozen=True, eq=False)
class Curve:
    """How one channel's pooled pre-activation is distributed over one concept's images."""

    heights: np.ndarray  # over the grid, peak 1
    mean: float


@dataclass(frozen=True, eq=False)
class Row:
    """The original channel, or one of its concept channels."""

    concept: int | None  # None for the original
    curves: tuple[Curve, ...]  # (K,)
    shots: tuple[Shot, ...]  # none without a data set
    feature: Image.Image | None  # made to excite it, if there is one


@dataclass(frozen=True, eq=False)
class Content:
    """One channel as the figures show it."""

    channel: int
    letters: tuple[str, ...]  # (K,)
    names: tuple[str, ...]  # (K,), of the concepts, fit to be printed
    grid: np.ndarray  # of all curves, in units of the summed pre-activation
    rows: tuple[Row, ...]  # the original, then K concept channels


def gather(
    split: Split,
    scan: Scan,
    channel: int,
    *,
    dataset: Dataset[Any] | None = None,
    features: Features | None = None,
    n: int = 1,
) -> Content:
    """Work out what figures show of a channel; arguments as in `unbraid.teaser_figure`."""
    part = find_part(split, channel)
    channel = part.channel  # a plain number
    refuse_other_scan(split, scan)
    if features is not None and features.layer != split.layer.name:
        raise UsageError(
            f"The visualisations are of layer {features.layer}, the split is of {split.layer.name};"
            " pass those of one layer."
        )
    split = replace(split, channels=(part,))
    answers = gather_responses(split, scan)[channel]
    concept = answers.concept.numpy()
    numbers = range(len(part.concepts))
    columns = [answers.original, *answers.concepts.T]
    values = [[z.double().numpy()[concept == k] for k in numbers] for z in columns]
    grid = shared_grid([v for per_concept in values for v in per_concept], _N_GRID)
    shots: tuple[tuple[Shot, ...], ...] = ((),) * len(columns)
    if dataset is not None:
        shots = _shots(split, scan, channel, dataset, n)
    return Content(
        channel=channel,
        letters=tuple(map(letter, numbers)),
        names=tuple(printable(split.name(classes)) for classes in part.concepts),
        grid=grid,
        rows=tuple(
            Row(
                concept=k,
                curves=tuple(Curve(density(v, grid), float(v.mean())) for v in per_concept),
                shots=seen,
                feature=_feature(features, channel, k),
            )
            for k, per_concept, seen in zip((None, *numbers), values, shots, strict=True)
        ),
    )


def refuse_other_scan(split: Split, scan: Scan) -> None:
    """Raise unless a scan is of the network and layer that were split."""
    if scan.manifest.weights != split.weights or scan.layer != split.layer:
        raise UsageError(
            "The scan is of another network or layer than the split; pass one of the network and "
            "layer that were split."
        )


def find_part(split: Split, channel: int) -> ChannelSplit:
    """Return the division of a channel, or raise and name those that there are."""
    channel = whole_number("channel", channel)
    try:
        return split[channel]
    except KeyError:
        known = [str(part.channel) for part in split.channels]
        more = " ..." if len(known) > 20 else ""
        raise UsageError(
            f"Channel {channel} was not split; those that were are {', '.join(known[:20])}{more}."
        ) from None


def _shots(
    split: Split, scan: Scan, channel: int, dataset: Dataset[Any], n: int
) -> tuple[tuple[Shot, ...], ...]:
    """Read the reference images of the original and of each concept channel."""
    top = reference_images(scan, split, n=n, alike=ALIKE)[channel]
    rows = (top.original, *top.concepts)
    labels = {
        index: label
        for images in rows
        for index, label in zip(images.index.tolist(), images.label.tolist(), strict=True)
    }
    refuse_other_images(dataset, labels)
    pictures = {index: _read(dataset, index) for index in labels}

    def shots(images: TopImages) -> tuple[Shot, ...]:
        places = zip(images.index.tolist(), images.concept.tolist(), strict=True)
        return tuple(Shot(concept, pictures[index]) for index, concept in places)

    return tuple(map(shots, rows))


def _read(dataset: Dataset[Any], index: int) -> Image.Image | None:
    try:
        return _square(open_picture(dataset, index))
    except Exception:  # whatever a data set raises, one image is not worth the figure
        return None


def _feature(features: Features | None, channel: int, concept: int | None) -> Image.Image | None:
    """Get a visualisation as it looks on white paper."""
    made = features.of(channel, concept) if features is not None else ()
    if not made:  # not every channel was visualised
        return None
    picture = made[0].picture
    paper = Image.new("RGBA", picture.size, "white")
    return _square(Image.alpha_composite(paper, picture))


def _square(picture: Image.Image) -> Image.Image:
    """Cut out a picture's middle, no larger than print can show."""
    side = min(*picture.size, _SIDE)
    return ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def printable(name: str, limit: int = 200) -> str:
    r"""Make a name fit for print: one line, without control characters, not endless.

    >>> printable("digital\n clock\u202e"), printable("")
    ('digital clock', '(no name)')
    """
    line = " ".join(name[: 4 * limit].split())
    return "".join(c for c in line if c.isprintable())[:limit] or "(no name)"


# Paper: figures of a stated size, in a style of their own, whatever matplotlib is set to.


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


# Densities of a channel and its concept channels, in panels over one axis.


AXIS_LABEL = "summed pre-activation"
BELOW = 0.30  # inches for tick labels and the axis label
_TITLE = 0.17  # for a panel's title
_PANEL = 0.52  # for its curves and letters
_GAP = 0.10
_DENSITY_SIDE = 0.06
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
            write_row_title(
                figure, content, row, _DENSITY_SIDE, top - 0.11, width - 2 * _DENSITY_SIDE
            )
            bottom = top - _TITLE - _PANEL
            axes = axes_at(figure, _DENSITY_SIDE, bottom, width - 2 * _DENSITY_SIDE, _PANEL)
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


# Where a channel's concepts come from: the input channels that feed each of them.


_MARGIN = 0.04
_NUMBERS = 0.32  # inches for the input channels' numbers
_SOURCES_TITLE = 0.20
_PITCH = 0.115  # from one input channel to the next
_BELOW = 0.30
_BETWEEN = 0.10  # panels
_LEAST_PANEL, _WIDE = 0.5, 1.2  # from the latter on there is room for every tick's number


@dataclass(frozen=True, eq=False)
class Sources:
    """The strongest input channels of one channel's concepts. Shapes: K concepts, n sources."""

    letters: tuple[str, ...]  # (K,)
    names: tuple[str, ...]  # (K,)
    inputs: tuple[int, ...]  # (n,), channels of the layer's input
    relevance: np.ndarray  # (K, n), for the original channel, mean over the concept's images
    kept: np.ndarray  # (K, n), for the concept's own channel


def gather_sources(split: Split, scan: Scan, channel: int, n: int) -> Sources:
    """Find the strongest input channels; arguments as in `unbraid.source_figure`."""
    n = whole_number("n", n, 1)
    part = find_part(split, channel)
    refuse_other_scan(split, scan)
    sums = class_sums(scan, (), split.clusters)
    means = []
    for classes in part.concepts:
        there = tuple(label for label in classes if label < len(sums.n_images))
        if not there or not sums.n_images[list(there)].sum():
            raise UsageError(
                f"The scan has no image of {split.name(classes)}; scan images of all concepts."
            )
        means.append(concept_mean(sums, there))
    spec = split.layer
    group = spec.group_of(channel)
    pooled = torch.stack(means)  # (K, G, J)
    relevance = averaged_relevance(scan, channel, pooled).numpy()  # (K, C_in / G)
    kept = input_relevance(part.rows.double(), pooled[:, group], spec.taps_per_input).numpy()
    chosen = strongest_sources(relevance, n)
    first = group * spec.n_in_per_group
    return Sources(
        letters=tuple(map(letter, range(len(part.concepts)))),
        names=tuple(printable(split.name(classes)) for classes in part.concepts),
        inputs=tuple(first + i for i in chosen),
        relevance=relevance[:, chosen],
        kept=kept[:, chosen],
    )


def draw_sources(data: Sources, width: float) -> Figure:
    """Draw the figure; arguments as in `unbraid.source_figure`."""
    k_concepts, n = data.relevance.shape
    tall = n * _PITCH
    with own_style():
        figure = blank(width, _SOURCES_TITLE + tall + _BELOW)
        left = _MARGIN + _NUMBERS
        each = (width - left - _MARGIN - (k_concepts - 1) * _BETWEEN) / k_concepts
        if each < _LEAST_PANEL:
            raise UsageError(
                f"The channel has {k_concepts} concepts, too many for {width:g} inches; ask for a "
                "wider figure."
            )
        top = _BELOW + tall + 0.08
        write(figure, left - 0.06, top, "input", fontsize=SMALL, ha="right")
        for row, number in enumerate(data.inputs):
            middle = _BELOW + tall - (row + 0.5) * _PITCH
            style = {"fontsize": SMALL, "ha": "right", "va": "center_baseline"}
            write(figure, left - 0.06, middle, str(number), **style)
        values = np.concatenate([data.relevance, data.kept])
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        margin = 0.04 * (high - low) or 1.0
        for k in range(k_concepts):
            x = left + k * (each + _BETWEEN)
            axes = axes_at(figure, x, _BELOW, each, tall)
            axes.set_xlim(low - margin, high + margin)
            _bars(axes, data, k, wide=each > _WIDE)
            title: list[tuple[str, dict[str, Any]]] = [
                (data.letters[k], {"fontsize": SIZE, "weight": "bold", "color": colour(k)}),
                ("  " + data.names[k], {"fontsize": SIZE}),
            ]
            write_title(figure, x, top, each, title)
        label = "mean relevance for the original (pale) and the concept channel"
        write(figure, left + (width - left) / 2, 0.03, label, fontsize=SMALL, ha="center")
    return figure


def _bars(axes: Axes, data: Sources, k: int, *, wide: bool) -> None:
    """Draw one concept's bars: pale for the original channel, narrower what is kept."""
    places = np.arange(len(data.inputs))
    low, high = axes.get_xlim()
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(FixedLocator(ticks(low, high)[:: 1 if wide else 2]))
    name = data.letters[k]
    axes.barh(places, data.relevance[k], 0.76, color=colour(k), alpha=0.3, label=f"original {name}")
    axes.barh(places, data.kept[k], 0.4, color=colour(k), label=f"kept {name}")
    axes.axvline(0, color=BLACK, linewidth=0.6)


# The teaser: one channel before and after, in pictures and densities.


_TEASER_MARGIN = 0.03
_HEAD = 0.15  # inches for the columns' headings
_TEASER_TITLE = 0.16
_TEASER_GAP = 0.09
_TEASER_BETWEEN = 0.14  # columns
_NEXT = 0.04  # tiles
_APART = 0.10  # the visualisation from the images
_DENSITIES = 0.34  # part of the width that is the densities'
_SMALLEST, _LARGEST = 0.25, 0.75  # side of a tile
_TEASER_PANEL = 0.52  # height of a row without pictures


def draw_teaser(content: Content, width: float) -> Figure:
    """Draw the figure; arguments as in `unbraid.teaser_figure`."""
    with_feature = all(row.feature is not None for row in content.rows)
    n_shots = max(len(row.shots) for row in content.rows)
    n_tiles = n_shots + with_feature
    room = width - 2 * _TEASER_MARGIN
    chart = _DENSITIES * room if n_tiles else room
    side = (
        _side(n_tiles, room - chart - _TEASER_BETWEEN - _APART * with_feature)
        if n_tiles
        else _TEASER_PANEL
    )
    first = _TEASER_MARGIN + (side + _APART if with_feature else 0)  # of the reference images
    left = first + n_shots * (side + _NEXT) - _NEXT + _TEASER_BETWEEN if n_tiles else _TEASER_MARGIN
    chart = width - _TEASER_MARGIN - left
    n = len(content.rows)
    height = BELOW + n * (_TEASER_TITLE + side) + (n - 1) * _TEASER_GAP + _HEAD + _TEASER_MARGIN
    with own_style():
        figure = blank(width, height)
        top = height - _TEASER_MARGIN - _HEAD
        head = {"fontsize": SMALL, "color": SOFT}
        if with_feature:
            write(figure, _TEASER_MARGIN, top + 0.05, "visualised", **head)
        if n_shots:
            write(figure, first, top + 0.05, "images that excite the channel most", **head)
        write(figure, left, top + 0.05, "densities over the images of each concept", **head)
        for row in content.rows:
            write_row_title(
                figure, content, row, _TEASER_MARGIN, top - 0.11, left + chart - _TEASER_MARGIN
            )
            bottom = top - _TEASER_TITLE - side
            if with_feature:
                _tile(figure, _TEASER_MARGIN, bottom, side, row.feature, colour(row.concept))
            for k, shot in enumerate(row.shots):
                known = shot.concept >= 0
                frame = colour(shot.concept) if known else PALE
                tile = _tile(figure, first + k * (side + _NEXT), bottom, side, shot.picture, frame)
                if known:
                    _mark(tile, content.letters[shot.concept], frame)
            axes = axes_at(figure, left, bottom, chart, side)
            draw_curves(axes, content, row, last=row is content.rows[-1])
            top = bottom - _TEASER_GAP
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


# Figures for papers: a split channel in one picture, sized for a column, drawn by matplotlib.


SUFFIXES = (".pdf", ".png", ".svg")


@in_plain_modes
def teaser_figure(
    split: Split,
    scan: Scan,
    channel: int,
    *,
    dataset: Dataset[Any] | None = None,
    features: Features | None = None,
    n: int = 6,
    width: float = 5.5,
) -> Figure:
    """Show one channel before and after: a row for the original, one for each concept channel.

    Each row holds the channel's feature visualisation, the images that excite it most, framed in
    the colour of the concept that they belong to, and its densities as `density_figure` draws them.

    Args:
        split: from `unbraid.split`.
        scan: of images that hold the concepts, best validation images.
        channel: a split channel.
        dataset: the images that `scan` was made of; without it there are no pictures.
        features: from `unbraid.visualize`, of the split network.
        n: images in a row, beside the visualisation.
        width: of the figure, in inches; 5.5 is the text width of many a paper.

    Returns:
        A matplotlib Figure; `savefig` embeds fonts and writes the same bytes each time.

    Raises:
        UsageError: the channel was not split, n or width is too small, or the scan, the
            data set or the visualisations are of something else.
        UnbraidError: matplotlib is not installed.

    Source:
        After the first figure of Hesse et al. 2025, arXiv:2504.12939.
    """
    _require_matplotlib()

    content = gather(split, scan, channel, dataset=dataset, features=features, n=n)
    return draw_teaser(content, real_number("width", width))


@in_plain_modes
def density_figure(split: Split, scan: Scan, channel: int, *, width: float = 3.25) -> Figure:
    """Show how a channel, and each of its concept channels, answers to each concept's images.

    A panel for the original and one for each concept channel, with one curve per concept: the
    density of the summed pre-activation over the concept's images, by a Gaussian kernel of Scott's
    width. Each curve is scaled to its own peak, or a silenced concept's would dwarf all others. A
    triangle marks the mean.

    Args:
        split: from `unbraid.split`.
        scan: of images that hold the concepts, best validation images.
        channel: a split channel.
        width: of the figure, in inches; 3.25 is a column of many a paper.

    Returns:
        A matplotlib Figure; `savefig` embeds fonts and writes the same bytes each time.

    Raises:
        UsageError: the channel was not split, the width is too small, or the scan is of something
            else or has no image of a concept.
        UnbraidError: matplotlib is not installed.

    Source:
        METHOD.md section 3, step 5: densities of the published results.
    """
    _require_matplotlib()

    return draw_densities(gather(split, scan, channel), real_number("width", width))


@in_plain_modes
def source_figure(
    split: Split, scan: Scan, channel: int, *, n: int = 12, width: float = 3.25
) -> Figure:
    """Show which input channels feed a channel, and which of them each concept channel keeps.

    A panel for each concept, its bars the relevance of the same n input channels: pale for the
    original channel (the ARV), narrow and solid for the concept's own channel. Concepts name their
    strongest input channel in turns, and each stands with the concept to which it matters most.

    Args:
        split: from `unbraid.split`.
        scan: of images that hold the concepts.
        channel: a split channel.
        n: input channels.
        width: of the figure, in inches; 3.25 is a column of many a paper.

    Returns:
        A matplotlib Figure; `savefig` embeds fonts and writes the same bytes each time.

    Raises:
        UsageError: the channel was not split, n or the width is too small, or the scan is of
            something else or has no image of a concept.
        UnbraidError: matplotlib is not installed.

    Source:
        METHOD.md section 2.
    """
    _require_matplotlib()

    return draw_sources(gather_sources(split, scan, channel, n), real_number("width", width))


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure by unbraid as PDF, PNG or SVG, whole or not at all.

    Raises:
        UsageError: the suffix is none of those.
        RunError: the file cannot be written.
    """
    import io

    from unbraid.base.files import write_whole

    check_suffix(path)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:].lower())
    write_whole(Path(path), content.getvalue())


def check_suffix(path: str | Path) -> None:
    """Raise unless a file name says which of the formats to write.

    >>> check_suffix("figure.pdf")
    >>> check_suffix("f.doc")
    Traceback (most recent call last):
        ...
    unbraid.base.errors.UsageError: f.doc ends in none of .pdf, .png, .svg; name a file that does.
    """
    if as_path("path", path).suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} ends in none of {', '.join(SUFFIXES)}; name a file that does.")


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnbraidError("matplotlib is not installed; pip install matplotlib.") from None
