"""Pictures of a data set's images, small enough to stand in the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import Dataset

from unbraid.data import picture_of, plain, size_of
from unbraid.errors import UsageError
from unbraid.sight import Sight, sight_of

_SMALL = 48  # from this size down, enlarging should show the pixels as they are
_N_CHECKED = 16
_DENSEST = 0.72  # opacity of a veil over places that count for nothing
_GREY = 128  # of a veil: black would not be seen on a dark picture
_MAX_POSITIONS = 16  # of a veil, each way: it is shown smoothed anyway


@dataclass(frozen=True)
class Look:
    """How much room pictures are given."""

    n_images: int  # reference images of a channel
    side: int  # pixels at most
    quality: int  # 0 to 100


@dataclass(frozen=True)
class Picture:
    """One image, in the page itself."""

    uri: str
    small: bool


class Album:
    """A data set's images, read once and kept small; None stands for one that cannot be read.

    Args:
        dataset: of (image, label).
        indices: which of its images.
        side: pixels at most.
    """

    def __init__(self, dataset: Dataset[Any], indices: Iterable[int], side: int) -> None:
        """Read the images."""
        sight = sight_of(dataset)
        self.as_seen = sight is not None  # whether positions of a layer's map can be shown
        self.images = {index: _thumbnail(dataset, index, sight, side) for index in indices}

    def pictures(self, look: Look) -> dict[int, Picture | None]:
        """Encode them all."""
        return {
            index: None if image is None else encode(image, look.side, look.quality)
            for index, image in self.images.items()
        }


def refuse_other_images(dataset: Dataset[Any], labels: Mapping[int, int]) -> None:
    """Raise if the data set is not the one scanned, for its pictures would illustrate nothing.

    The classes may go by other numbers now, as when a folder is opened without the network; but
    images of one class must still be of one class.

    Args:
        dataset: of (image, label).
        labels: recorded labels by place in the data set; the first few are compared.

    Raises:
        UsageError: it is too short, or its labels are not the recorded ones.
    """
    differs = bool(labels) and max(labels) >= size_of(dataset)
    if not differs:
        pairs = {
            (recorded, label)
            for index, recorded in list(labels.items())[:_N_CHECKED]
            if (label := _label_of(dataset, index)) is not None
        }
        differs = any(len({pair[k] for pair in pairs}) < len(pairs) for k in (0, 1))
    if differs:
        raise UsageError(
            "The data set is not the one that was scanned (its labels differ); pass the data set "
            "that the validation scan was made of."
        )


def _label_of(dataset: Dataset[Any], index: int) -> int | None:
    try:
        return int(dataset[index][1])
    except Exception:  # an image that cannot be read is shown as such
        return None


def _thumbnail(
    dataset: Dataset[Any], index: int, sight: Sight | None, side: int
) -> Image.Image | None:
    try:
        picture = open_picture(dataset, index)
        picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
        if sight is not None:
            picture = sight(picture)
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    except Exception:  # whatever a data set raises, one image is not worth the page
        return None
    return picture


def open_picture(dataset: Dataset[Any], index: int) -> Image.Image:
    """Get a picture as it was before the transform where the data set can give it."""
    picture = picture_of(dataset, index)
    if picture is not None:
        return picture
    image = dataset[index][0]
    return image if isinstance(image, Image.Image) else to_picture(plain(image, index))


def to_picture(image: Tensor) -> Image.Image:
    """Make a picture of an image tensor, its values stretched to the full range.

    Args:
        image: (C, H, W) or (H, W); three channels are taken for red, green and blue, of any other
            number the mean is shown.

    Raises:
        ValueError: it has another shape.
    """
    image = image.detach().cpu().float().nan_to_num()
    image = image[None] if image.dim() == 2 else image
    if image.dim() != 3 or image.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(image.shape)} is no picture")
    if len(image) != 3:
        image = image.mean(0, keepdim=True)
    low, high = image.min(), image.max()
    scaled = (255 * (image - low) / (high - low).clamp(min=1e-12)).round().to(torch.uint8)
    values = scaled.movedim(0, -1).numpy()
    return Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)


def encode(picture: Image.Image, side: int, quality: int) -> Picture:
    """Make a picture small enough for the page; a tiny one keeps every pixel."""
    small = max(picture.size) <= _SMALL
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    if small:
        picture.save(content, "PNG", optimize=True)
    else:
        picture.save(content, "WEBP", quality=quality)
    return Picture(_data_uri("png" if small else "webp", content), small)


def veil(shade: Tensor) -> str:
    """Make a picture that hides places of shade 0 and leaves those of shade 1 as they are.

    Args:
        shade: (h, w), 0 to 1.
    """
    height, width = (min(side, _MAX_POSITIONS) for side in shade.shape)
    shade = adaptive_avg_pool2d(shade[None].float(), (height, width))[0]
    opacity = (255 * _DENSEST * (1 - shade)).round().to(torch.uint8).numpy()
    grey = Image.new("L", (width, height), _GREY)
    content = io.BytesIO()
    Image.merge("LA", (grey, Image.fromarray(opacity))).save(content, "PNG", optimize=True)
    return _data_uri("png", content)


def _data_uri(kind: str, content: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
