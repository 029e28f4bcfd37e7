"""Figures for papers: a split channel in one picture, sized for a column.

matplotlib is imported when a figure is made: `pip install matplotlib`.
"""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from unbraid.base.arguments import as_path, real_number, whole_number
from unbraid.base.errors import UnbraidError, UsageError
from unbraid.base.files import write_whole
from unbraid.base.modes import in_plain_modes
from unbraid.finding.arv import class_sums
from unbraid.measuring.evaluate import gather_responses
from unbraid.measuring.reference_images import ALIKE, TopImages, reference_images
from unbraid.reporting.channel import bars, densities
from unbraid.reporting.pictures import open_picture, refuse_other_images
from unbraid.reporting.words import bounded

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.data import Dataset

    from unbraid.scanning.records import Scan
    from unbraid.splitting.splits import ChannelSplit, Split
    from unbraid.visualizing.features import Features

SUFFIXES = (".pdf", ".png", ".svg")
_N_GRID = 241  # points of a density curve
_SIDE = 256  # pixels of a picture at most; more would not be seen in print


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
    paper, part = _paper(), _find_part(split, scan, channel)
    if features is not None and features.layer != split.layer.name:
        raise UsageError(
            f"The visualisations are of layer {features.layer}, the split is of {split.layer.name};"
            " pass those of one layer."
        )
    split = replace(split, channels=(part,))
    curves = densities(gather_responses(split, scan)[part.channel], _N_GRID)
    rows = [] if dataset is None else _tiles(split, scan, dataset, n)
    made = [_feature(features, part.channel, k) for k in (None, *range(len(part.concepts)))]
    names = _names(split, part)
    figure: Figure = paper.draw_channel(
        part.channel, names, curves, real_number("width", width), rows, made, headed=True
    )
    return figure


@in_plain_modes
def density_figure(split: Split, scan: Scan, channel: int, *, width: float = 3.25) -> Figure:
    """Show how a channel, and each of its concept channels, answers to each concept's images.

    A panel for the original and one for each concept channel, with one curve per concept: the
    density of the summed pre-activation over the concept's images, by a Gaussian kernel of Scott's
    width. Each curve is scaled to its own peak, or a silenced concept's would dwarf all others. A
    triangle marks the mean.

    Arguments, result and errors are as of `teaser_figure`; 3.25 inches is a column of many a paper.

    Source:
        METHOD.md section 3, step 5: densities of the published results.
    """
    paper, part = _paper(), _find_part(split, scan, channel)
    split = replace(split, channels=(part,))
    curves = densities(gather_responses(split, scan)[part.channel], _N_GRID)
    names = _names(split, part)
    figure: Figure = paper.draw_channel(part.channel, names, curves, real_number("width", width))
    return figure


@in_plain_modes
def source_figure(
    split: Split, scan: Scan, channel: int, *, n: int = 12, width: float = 3.25
) -> Figure:
    """Show which input channels feed a channel, and which of them each concept channel keeps.

    A panel for each concept, its bars the relevance of the same n input channels: pale for the
    original channel (the ARV), narrow and solid for the concept's own channel. Concepts name their
    strongest input channel in turns, and each stands with the concept to which it matters most.

    Arguments, result and errors are as of `teaser_figure`, but n counts input channels; 3.25 inches
    is a column of many a paper.

    Source:
        METHOD.md section 2.
    """
    paper, n, part = _paper(), whole_number("n", n, 1), _find_part(split, scan, channel)
    data = bars(split, part, scan, class_sums(scan, (), split.clusters), n)
    names = _names(split, part)
    figure: Figure = paper.draw_sources(data, names, real_number("width", width))
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure by unbraid as PDF, PNG or SVG, whole or not at all.

    Raises:
        UsageError: the suffix is none of those.
        RunError: the file cannot be written.
    """
    check_suffix(path)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:].lower())
    write_whole(Path(path), content.getvalue())


def check_suffix(path: str | Path) -> None:
    """Raise unless a file name says which of the formats to write.

    >>> check_suffix("figure.pdf")
    >>> check_suffix("a.doc")
    Traceback (most recent call last):
        ...
    unbraid.base.errors.UsageError: a.doc ends in none of .pdf, .png, .svg; name a file that does.
    """
    if as_path("path", path).suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} ends in none of {', '.join(SUFFIXES)}; name a file that does.")


def _paper() -> ModuleType:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnbraidError("matplotlib is not installed; pip install matplotlib.") from None
    from unbraid.reporting import paper

    return paper


def _find_part(split: Split, scan: Scan, channel: int) -> ChannelSplit:
    """Return the split of a channel, or raise and name those that there are."""
    channel = whole_number("channel", channel)
    try:
        part = split[channel]
    except KeyError:
        known = [str(part.channel) for part in split.channels]
        more = " ..." if len(known) > 20 else ""
        raise UsageError(
            f"Channel {channel} was not split; those that were are {', '.join(known[:20])}{more}."
        ) from None
    if scan.manifest.weights != split.weights or scan.layer != split.layer:
        raise UsageError(
            "The scan is of another network or layer than the split; pass one of the network and "
            "layer that were split."
        )
    return part


def _names(split: Split, part: ChannelSplit) -> list[str]:
    """Names of a channel's concepts, fit to be printed."""
    return [printable(split.name(classes)) for classes in part.concepts]


def _tiles(
    split: Split, scan: Scan, dataset: Dataset[Any], n: int
) -> list[list[tuple[int, Image.Image | None]]]:
    """Read the reference images of each channel, and name the concepts that they belong to."""
    (top,) = reference_images(scan, split, n=n, alike=ALIKE).values()
    rows = (top.original, *top.concepts)
    labels: dict[int, int] = {}
    for images in rows:
        labels |= zip(images.index.tolist(), images.label.tolist(), strict=True)
    refuse_other_images(dataset, labels)
    pictures: dict[int, Image.Image | None] = dict.fromkeys(labels)
    for index in labels:
        with suppress(Exception):  # whatever a data set raises, one image is not worth the figure
            pictures[index] = _square(open_picture(dataset, index))

    def row(images: TopImages) -> list[tuple[int, Image.Image | None]]:
        pairs = zip(images.concept.tolist(), images.index.tolist(), strict=True)
        return [(concept, pictures[index]) for concept, index in pairs]

    return list(map(row, rows))


def _feature(features: Features | None, channel: int, concept: int | None) -> Image.Image | None:
    """Get a visualisation as it looks on white paper; not every channel has one."""
    made = features.of(channel, concept) if features is not None else ()
    if not made:
        return None
    paper = Image.new("RGBA", made[0].picture.size, "white")
    return _square(Image.alpha_composite(paper, made[0].picture))


def _square(picture: Image.Image) -> Image.Image:
    """Cut out a picture's middle, no larger than print can show."""
    side = min(*picture.size, _SIDE)
    return ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def printable(name: str) -> str:
    r"""Make a name fit for print: one line, without control characters, not endless.

    >>> printable("digital\n clock\u202e"), printable("")
    ('digital clock', '(no name)')
    """
    line = " ".join(bounded(name).split())
    return "".join(c for c in line if c.isprintable()) or "(no name)"
