"""What a figure shows of one split channel, as plain data: nothing here draws.

Shapes: K concepts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from unbraid.errors import UsageError
from unbraid.evaluate import gather_responses
from unbraid.given import whole_number
from unbraid.report.density import density, shared_grid
from unbraid.report.pictures import open_picture, refuse_other_images
from unbraid.report.text import letter
from unbraid.visualize.reference import ALIKE, TopImages, reference_images

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from unbraid.records import Scan
    from unbraid.splits import ChannelSplit, Split
    from unbraid.visualize.features import Features

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
    answers = gather_responses(split, replace(scan, clusters=split.clusters))[channel]
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
