"""Figures for papers: a split channel in one picture, sized for a column, drawn by matplotlib.

matplotlib is imported when a figure is made: `pip install matplotlib`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.doors import in_plain_modes
from unbraid.errors import UnbraidError, UsageError
from unbraid.given import as_path, real_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.data import Dataset

    from unbraid.records import Scan
    from unbraid.splits import Split
    from unbraid.visualize.features import Features

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
    from unbraid.figures.content import gather
    from unbraid.figures.teaser import draw_teaser

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
    from unbraid.figures.content import gather
    from unbraid.figures.densities import draw_densities

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
    from unbraid.figures.sources import draw_sources, gather_sources

    return draw_sources(gather_sources(split, scan, channel, n), real_number("width", width))


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure by unbraid as PDF, PNG or SVG, whole or not at all.

    Raises:
        UsageError: the suffix is none of those.
        RunError: the file cannot be written.
    """
    import io

    from unbraid.files import write_whole

    check_suffix(path)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:].lower())
    write_whole(Path(path), content.getvalue())


def check_suffix(path: str | Path) -> None:
    """Raise unless a file name says which of the formats to write.

    >>> check_suffix("figure.pdf")
    >>> check_suffix("figure.doc")
    Traceback (most recent call last):
        ...
    unbraid.errors.UsageError: figure.doc ends in none of .pdf, .png, .svg; name a file that does.
    """
    if as_path("path", path).suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} ends in none of {', '.join(SUFFIXES)}; name a file that does.")


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnbraidError("matplotlib is not installed; pip install matplotlib.") from None
