"""What a network's images are like: size, range, colours and spectrum, from a sample of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from unbraid.data import Readable, size_of, sort_out
from unbraid.errors import DataError, UsageError
from unbraid.given import whole_numbers
from unbraid.running import stack_images
from unbraid.visualize.features import MAX_SIDE

N_SAMPLED = 128  # images
_LEAST_VARIANCE = 1e-4  # of a direction of colour, lest grey pictures stored as RGB have none


@dataclass(frozen=True, eq=False)
class Pixels:
    """What images look like to a network."""

    low: Tensor  # (C,), the network's input for the darkest pixel that the images have
    high: Tensor  # (C,), for the brightest
    mean: Tensor  # (C,), on a scale from 0 (darkest) to 1 (brightest), like the following
    colours: Tensor  # (C, C), a square root of the covariance of colours; its columns uncorrelated
    magnitude: Tensor  # (C, H, W // 2 + 1), mean over images of |orthonormal rfft2|, uncorrelated
    size: tuple[int, int]  # height and width


def pixels_of(dataset: Dataset[Any], size: tuple[int, int] | None = None) -> Pixels:
    """Measure what the images of a data set are like, from an evenly spaced sample.

    The range is that of the sample's pixels, channel by channel, so no preprocessing needs to be
    known, and an image within it is one that the data set might hold.

    Args:
        dataset: of (image (C, H, W), label).
        size: (height, width) to bring the images to; by default they stay as they are.

    Raises:
        UsageError: the size is out of range.
        DataError: none can be read, they differ in size, or all are of one colour.
    """
    if size is not None:
        size = _checked(size)
    images = _sample(dataset)
    if size is not None:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    spread = (high - low)[:, None, None]
    if not bool(spread.isfinite().all()) or not bool((spread > 0).any()):
        raise DataError(
            "The data set's images are all of one colour, or hold NaN or infinite numbers; pass "
            "images that the network is meant for."
        )
    scaled = (images - low[:, None, None]) / spread.clamp(min=torch.finfo(spread.dtype).tiny)
    by_pixel = scaled.movedim(1, 0).flatten(1)  # (C, pixels)
    mean = by_pixel.mean(1)
    variances, directions = torch.linalg.eigh(torch.cov(by_pixel).reshape(len(mean), -1))
    colours = directions * variances.clamp(min=_LEAST_VARIANCE).sqrt()
    plain = torch.einsum("dc,nchw->ndhw", torch.linalg.inv(colours), scaled - mean[:, None, None])
    magnitude = torch.fft.rfft2(plain, norm="ortho").abs().mean(0)
    height, width = images.shape[2:]
    return Pixels(low, high, mean, colours, magnitude, (height, width))


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    """A height and width, in plain types."""
    sides = whole_numbers("size", size)
    if len(sides) != 2 or not all(1 < side <= MAX_SIDE for side in sides):
        raise UsageError(f"size is {size}; give height and width, 2 to {MAX_SIDE} pixels each.")
    return sides[0], sides[1]


def _sample(dataset: Dataset[Any]) -> Tensor:
    """Read some images, (N, C, H, W), float32; those that cannot be read are left out."""
    size, readable = size_of(dataset), Readable(dataset)
    places = (
        torch.linspace(0, size - 1, min(size, N_SAMPLED), dtype=torch.float32)
        .round()
        .long()
        .tolist()
    )
    good, broken = sort_out([readable[place] for place in places], skip_broken=True)
    if not good:
        raise DataError(f"None of {len(broken)} images could be read; mend the data set.")
    images = stack_images(
        [item[1] for item in good], torch.tensor([item[0] for item in good], dtype=torch.int64)
    )
    if images.dim() != 4 or min(images.shape[2:]) < 2:
        raise DataError(
            f"The data set gives tensors of shape {tuple(images.shape[1:])}; images must be "
            "(channels, height, width)."
        )
    return images.float()
