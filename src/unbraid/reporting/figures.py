"""Figures for papers: a split channel in one picture, sized for a column.

matplotlib is imported when a figure is made: `pip install matplotlib`.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from unbraid.base.arguments import as_path, real_number, whole_number
from unbraid.base.errors import UnbraidError, UsageError
from unbraid.base.files import write_whole
from unbraid.base.modes import in_plain_modes
from unbraid.finding.arv import class_sums
from unbraid.measuring.evaluate import gather_responses
from unbraid.measuring.reference_images import ALIKE, reference_images
from unbraid.reporting.channel import Bars, bars, densities
from unbraid.reporting.crops import Crops
from unbraid.reporting.pictures import read_pictures
from unbraid.reporting.words import bounded, letter

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.data import Dataset

    from unbraid.scanning.records import Scan
    from unbraid.splitting.splits import ChannelSplit, Split
    from unbraid.visualizing.features import Features

Tile = tuple[int, Image.Image | None]  # a concept, -1 for none, and a picture of it, if readable

_SUFFIXES = (".pdf", ".png", ".svg")
_N_GRID = 241  # points of a density curve
_SIDE = 256  # pixels of a picture at most; more would not be seen in print

# Lengths are in inches.
_MARGIN, _BELOW = 0.03, 0.30  # the latter for tick labels and the axis label
_HEAD, _TITLE = 0.15, 0.16  # for the columns' headings, and the title of a row
_ROWS, _COLUMNS, _TILES, _APART = 0.09, 0.14, 0.04, 0.10  # between them; visualisation and images
_DENSITIES, _PANEL = 0.34, 0.52  # the densities' part of the width; their height without pictures
_SMALLEST, _LARGEST = 0.25, 0.75  # side of a tile
_PITCH = 0.115  # from one input channel to the next


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
        UsageError: the channel was not split, n or width is too small, the scan has no image of a
            concept, or scan, data set or visualisations are of something else.
        UnbraidError: matplotlib is not installed.

    Source:
        After the first figure of Hesse et al. 2025, arXiv:2504.12939.
    """
    part = _find_part(split, scan, channel)
    if features is not None and features.layer != split.layer.name:
        raise UsageError(
            f"The visualisations are of layer {features.layer}, the split is of {split.layer.name};"
            " pass those of one layer."
        )
    tiles = [] if dataset is None else _read_tiles(split, part, scan, dataset, n)
    rows = (None, *range(len(part.concepts)))
    made = [features.of(part.channel, k) for k in rows] if features else []
    pictures = [_on_paper(of_row[0].picture) for of_row in made] if all(made) else []
    return _draw_channel(split, part, scan, width, tiles, pictures, headed=True)


@in_plain_modes
def density_figure(split: Split, scan: Scan, channel: int, *, width: float = 3.25) -> Figure:
    """Show how a channel, and each of its concept channels, responds to each concept's images.

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
        UsageError: the channel was not split, the width is too small, the scan has no image of a
            concept, or it is of something else.
        UnbraidError: matplotlib is not installed.

    Source:
        After the densities of Hesse et al. 2025, arXiv:2504.12939.
    """
    return _draw_channel(split, _find_part(split, scan, channel), scan, width)


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
        scan: of images that hold the concepts, best validation images.
        channel: a split channel.
        n: input channels to show.
        width: of the figure, in inches; 3.25 is a column of many a paper.

    Returns:
        A matplotlib Figure; `savefig` embeds fonts and writes the same bytes each time.

    Raises:
        UsageError: the channel was not split, n or the width is too small, the scan has no image
            of a concept, or it is of something else.
        UnbraidError: matplotlib is not installed.

    Source:
        "One layer" in docs/method.md.
    """
    n, part = whole_number("n", n, 1), _find_part(split, scan, channel)
    return _draw_sources(
        split, part, bars(split, part, scan, class_sums(scan, (), split.clusters), n), width
    )


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure by unbraid as PDF, PNG or SVG, whole or not at all.

    Args:
        figure: one of the figures by unbraid.
        path: the file; its suffix tells the format.

    Raises:
        UsageError: the suffix is none of those.
        RunError: the file cannot be written.
    """
    check_suffix(path)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:].lower())
    write_whole(Path(path), content.getvalue())


def check_suffix(path: str | Path) -> None:
    """Raise unless a file name says which of the formats to write."""
    if as_path("path", path).suffix.lower() not in _SUFFIXES:
        raise UsageError(f"{path} ends in none of {', '.join(_SUFFIXES)}; name a file that does.")


def need_matplotlib() -> None:
    """Raise an UnbraidError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UnbraidError("matplotlib is not installed; pip install matplotlib.")


def _find_part(split: Split, scan: Scan, channel: int) -> ChannelSplit:
    """Return the split of a channel, or raise and name those that there are."""
    need_matplotlib()
    channel = whole_number("channel", channel)
    parts = {part.channel: part for part in split.channels}
    if channel not in parts:
        known = ", ".join(map(str, list(parts)[:20])) + (" ..." if len(parts) > 20 else "")
        raise UsageError(f"Channel {channel} was not split; those that were are {known}.")
    split.require(scan)
    return parts[channel]


def _read_tiles(
    split: Split, part: ChannelSplit, scan: Scan, dataset: Dataset[Any], n: int
) -> list[list[Tile]]:
    """Read the reference images of each channel, and tell the concepts that they belong to."""
    (top,) = reference_images(scan, replace(split, channels=(part,)), n=n, alike=ALIKE).values()
    rows = (top.original, *top.concepts)
    labels: dict[int, int] = {}
    for images in rows:
        labels |= zip(images.index.tolist(), images.label.tolist(), strict=True)
    pictured = Crops(dataset, scan) if scan.manifest.places_of else dataset
    pictures = read_pictures(pictured, labels, square)
    return [
        [
            (concept, pictures[index])
            for concept, index in zip(images.concept.tolist(), images.index.tolist(), strict=True)
        ]
        for images in rows
    ]


def _on_paper(picture: Image.Image) -> Image.Image:
    return square(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture))


def square(picture: Image.Image) -> Image.Image:
    """Cut out a picture's middle, no larger than print can show."""
    side = min(*picture.size, _SIDE)
    return ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def _draw_channel(
    split: Split,
    part: ChannelSplit,
    scan: Scan,
    width: float,
    tiles: Sequence[Sequence[Tile]] = (),
    made: Sequence[Image.Image] = (),
    headed: bool = False,
) -> Figure:
    """Draw a row for the original and each concept channel: visualisation, images, densities."""
    from unbraid.reporting import matplotlib_style as style

    width = real_number("width", width)
    responses = gather_responses(replace(split, channels=(part,)), scan)[part.channel]
    curves = densities(responses, _N_GRID)
    n, n_tiles, n_made = len(curves.means), max(map(len, tiles), default=0), min(1, len(made))
    first = left = _MARGIN  # of the images, and of the densities
    side = _PANEL
    if n_tiles + n_made:
        most = (1 - _DENSITIES) * (width - 2 * _MARGIN) - _COLUMNS - _APART * n_made
        side = min((most + _TILES) / (n_tiles + n_made) - _TILES, _LARGEST)
        if side < _SMALLEST:
            raise UsageError(
                f"{n_tiles + n_made} images in a row are too many for the figure's width; ask for "
                "fewer, or for a wider figure."
            )
        first += (side + _APART) * n_made
        left = first + n_tiles * (side + _TILES) - _TILES + _COLUMNS
    chart, head = width - _MARGIN - left, _HEAD if headed else 0.0
    height = _BELOW + n * (_TITLE + side) + (n - 1) * _ROWS + head + _MARGIN
    with style.own_style():
        figure = style.PaperFigure(width, height)
        top = height - _MARGIN - head
        heads = {_MARGIN: "visualised"} if n_made else {}
        heads[left] = "densities over the images of each concept"
        if n_tiles:
            heads[first] = "images that excite the channel most"
        for x, words in heads.items() if headed else ():
            figure.write(x, top + 0.05, words, fontsize=style.SMALL, color=style.SOFT)
        for row in range(n):
            ink = style.colour(row - 1) if row else style.BLACK
            title = (
                f"Concept channel {letter(row - 1)}" if row else f"Original channel {part.channel}"
            )
            x = figure.write(
                _MARGIN, top - 0.11, title, width - 2 * _MARGIN, weight="bold", color=ink
            )
            if row:
                name = "  " + _name(split, part, row - 1)
                figure.write(x, top - 0.11, name, width - _MARGIN - x)
            bottom = top - _TITLE - side
            if made:
                axes = figure.axes_at(_MARGIN, bottom, side, side)
                style.draw_tile(axes, made[row], ink if row else style.SOFT)
            for k, (concept, picture) in enumerate(tiles[row] if tiles else ()):
                axes = figure.axes_at(first + k * (side + _TILES), bottom, side, side)
                if concept < 0:
                    style.draw_tile(axes, picture, style.PALE)
                else:
                    style.draw_tile(axes, picture, style.colour(concept), letter(concept))
            axes = figure.axes_at(left, bottom, chart, side)
            style.draw_curves(axes, curves.grid, curves.heights[row], curves.means[row].tolist())
            axes.tick_params(labelbottom=row == n - 1)
            top = bottom - _ROWS
        figure.write(
            left + chart / 2, 0.03, "summed pre-activation", fontsize=style.SMALL, ha="center"
        )
    return figure


def _draw_sources(split: Split, part: ChannelSplit, data: Bars, width: float) -> Figure:
    """Draw a panel of bars for each concept, all of the same input channels."""
    from unbraid.reporting import matplotlib_style as style

    n, tall, left, between = len(data.kept), len(data.inputs) * _PITCH, 0.36, 0.10
    width = real_number("width", width)
    each = (width - left - 0.04 - (n - 1) * between) / n
    with style.own_style():
        figure = style.PaperFigure(width, 0.20 + tall + _BELOW)
        if each < 0.5:
            raise UsageError(
                f"The channel has {n} concepts, too many for {width:g} inches; ask for a wider "
                "figure."
            )
        top = _BELOW + tall + 0.08
        small: dict[str, Any] = {"fontsize": style.SMALL}
        figure.write(left - 0.06, top, "input", ha="right", **small)
        for row, number in enumerate(data.inputs):
            y = _BELOW + tall - (row + 0.5) * _PITCH
            figure.write(left - 0.06, y, str(number), ha="right", va="center_baseline", **small)
        values = np.stack([data.relevance, data.kept])  # (2, K, n)
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        margin = 0.04 * (high - low) or 1.0
        for k in range(n):
            x, ink = left + k * (each + between), style.colour(k)
            axes = figure.axes_at(x, _BELOW, each, tall)
            style.draw_bars(axes, values[0, k], values[1, k], (low - margin, high + margin), ink)
            end = figure.write(x, top, letter(k), weight="bold", color=ink)
            figure.write(end, top, "  " + _name(split, part, k), x + each - end)
        label = "mean relevance for the original (pale) and the concept channel"
        figure.write(left + (width - left) / 2, 0.03, label, ha="center", **small)
    return figure


def _name(split: Split, part: ChannelSplit, concept: int) -> str:
    """Name a concept on one line."""
    return one_name(split.name(part.concepts[concept]))


def one_name(name: str) -> str:
    """Write a name on one line, without control characters, not endless."""
    line = " ".join(bounded(name).split())
    return "".join(c for c in line if c.isprintable()) or "(no name)"
