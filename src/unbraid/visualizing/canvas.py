"""Images as optimisable numbers, and how they are shaken so that only robust patterns survive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from unbraid.base.arguments import whole_numbers
from unbraid.base.errors import DataError, UsageError
from unbraid.images.batches import read_images
from unbraid.images.dataset import size_of
from unbraid.visualizing.features import MAX_SIDE

N_SAMPLED = 128  # images
_LEAST_VARIANCE = 1e-4  # of a direction of colour; grey pictures stored as RGB would have none

# Chosen by eye on the demo and EfficientNet-Lite0; docs/visualisation.md.
_DECAY = 1.3  # amplitude falls with frequency to this power, a bit faster than photographs' (1)
_CONTRAST = 2.0  # of the free spectrum's colours, before they are squeezed into the range
_START = 0.1  # spread of the first coefficients
_SHIFT, _TURN, _ZOOM, _NOISE = 0.06, 8.0, 0.1, 0.03  # parts of a side, degrees, part, of the range


@dataclass(frozen=True, eq=False)
class Pixels:
    """What images look like to a network."""

    low: Tensor  # (C,), the network's input for the darkest pixel that the images have
    high: Tensor  # (C,), for the brightest
    mean: Tensor  # (C,), on a scale from 0 (darkest) to 1 (brightest), like the following
    colours: Tensor  # (C, C), a square root of the covariance of colours; its columns uncorrelated
    magnitude: Tensor  # (C, H, W // 2 + 1), mean over images of |orthonormal rfft2|, uncorrelated
    size: tuple[int, int]  # height and width

    def to(self, device: torch.device) -> Pixels:
        """Return the same on another device."""
        values = vars(self).items()
        moved: dict[str, Any] = {n: v.to(device) for n, v in values if isinstance(v, Tensor)}
        return replace(self, **moved)


def pixels_of(dataset: Dataset[Any], size: tuple[int, int] | None = None) -> Pixels:
    """Measure what a data set's images are like, from an evenly spaced sample.

    The range is that of the sample's pixels, channel by channel, so no preprocessing needs to be
    known. The images are brought to `size`, height and width, if it is given; those of several
    sizes else to that of the middle one, by pixels.

    Raises:
        UsageError: the size is out of range.
        DataError: none can be read, they are no pictures, or all are of one colour.
    """
    sides = None if size is None else whole_numbers("size", size)
    if sides is not None and not (len(sides) == 2 and all(1 < s <= MAX_SIDE for s in sides)):
        raise UsageError(f"size is {size}; give height and width, 2 to {MAX_SIDE} pixels each.")
    images = _brought_to(sides, _sample(dataset))
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


def _sample(dataset: Dataset[Any]) -> list[Tensor]:
    """Read some images, (n, C, H, W) of each size, float32; unreadable ones are left out."""
    n_images = size_of(dataset)
    n_sampled = min(n_images, N_SAMPLED)
    places = torch.linspace(0, n_images - 1, n_sampled, dtype=torch.float32).round().long()
    batches = read_images(dataset, [places.tolist()], workers=0, skip_broken=True)
    found = [images.float() for _, images, _ in batches]
    if not found:
        raise DataError(f"None of {n_sampled} images could be read; mend the data set.")
    for images in found:
        if images.dim() != 4 or min(images.shape[2:]) < 2 or images.shape[1] != found[0].shape[1]:
            raise DataError(
                f"The data set gives tensors of shape {tuple(images.shape[1:])}; images must be "
                "(channels, height, width), all of as many channels."
            )
    return found


def _brought_to(sides: Sequence[int] | None, found: Sequence[Tensor]) -> Tensor:
    """Put images, (n, C, H, W) of each size, together in one size."""
    if sides is None:
        sizes = [tuple(images.shape[2:]) for images in found for _ in images]
        sides = sorted(sizes, key=math.prod)[(len(sizes) - 1) // 2]
    return torch.cat(
        [
            images
            if tuple(images.shape[2:]) == tuple(sides)
            else F.interpolate(images, sides, mode="bilinear", antialias=True)
            for images in found
        ]
    )


@dataclass(frozen=True, eq=False)
class Canvas:
    """Images, (N, C, H, W) on a scale from 0 to 1, as functions of their Fourier coefficients."""

    numbers: Tensor  # (N, C, H, W // 2 + 1, 2), free; or (N, C, H, W // 2 + 1), phases
    pixels: Pixels

    def images(self) -> Tensor:
        """Paint the images."""
        return self._free() if self.numbers.dim() == 5 else self._of_fixed_spectrum()

    def _free(self) -> Tensor:
        amplitude = _amplitudes(*self.pixels.size).to(self.numbers)
        spectrum = torch.view_as_complex(self.numbers) * amplitude
        painted = torch.fft.irfft2(spectrum, s=self.pixels.size, norm="ortho")
        colours = self.pixels.colours / self.pixels.colours.norm(dim=0).max()
        return torch.sigmoid(_CONTRAST * _mix(colours, painted))

    def _of_fixed_spectrum(self) -> Tensor:
        """Colours that do not fit the range are clamped, which a sigmoid would bend for all."""
        magnitude = self.pixels.magnitude.clone()
        magnitude[:, 0, 0] = 0  # the mean, which comes from the images' mean colour
        spectrum = torch.polar(magnitude.expand_as(self.numbers), self._phases())
        painted = torch.fft.irfft2(spectrum, s=self.pixels.size, norm="ortho")
        painted = painted / painted.std((1, 2, 3), keepdim=True)
        mean = self.pixels.mean[:, None, None]
        return (mean + _mix(self.pixels.colours, painted)).clamp(0, 1)

    def _phases(self) -> Tensor:
        """Phases that real images have: where f and -f are both listed, their sum is zero."""
        width = self.pixels.size[1]
        twice = torch.zeros(self.numbers.shape[-1], dtype=torch.bool, device=self.numbers.device)
        twice[[0, -1] if width % 2 == 0 else [0]] = True
        mirrored = self.numbers.flip(2).roll(1, 2)
        return torch.where(twice, self.numbers - mirrored, self.numbers)


def blank_canvas(pixels: Pixels, seeds: list[int], fixed_spectrum: bool) -> Canvas:
    """Fill a canvas with noise, by its seed for each image; of a fixed spectrum only phases."""
    shape, f32 = pixels.magnitude.shape, torch.float32
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if fixed_spectrum:
        numbers = [2 * math.pi * torch.rand(shape, generator=g, dtype=f32) for g in generators]
    else:
        numbers = [_START * torch.randn((*shape, 2), generator=g, dtype=f32) for g in generators]
    return Canvas(torch.stack(numbers).to(pixels.low.device).requires_grad_(), pixels)


def shake(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, turn, zoom and add noise at random, all images alike.

    Alike, so that an image does not depend on which others it is optimised beside.
    """
    height, width = images.shape[2:]
    drawn = 2 * torch.rand(4, generator=generator, dtype=torch.float32) - 1
    turn, zoom, right, down = drawn.tolist()
    scale, angle = 1 + _ZOOM * zoom, math.radians(_TURN * turn)
    sine, cosine = scale * math.sin(angle), scale * math.cos(angle)
    stretch = height / width  # the grid's coordinates run from -1 to 1 on either side
    affine = [
        [cosine, -sine * stretch, 2 * _SHIFT * right],
        [sine / stretch, cosine, 2 * _SHIFT * down],
    ]
    theta = torch.tensor([affine], dtype=torch.float32).to(images)
    grid = F.affine_grid(theta, [1, 1, height, width], align_corners=False)
    grid = grid.expand(len(images), -1, -1, -1)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    noise = torch.randn(images.shape[1:], generator=generator, dtype=torch.float32).to(images)
    return moved + _NOISE * noise


def _amplitudes(height: int, width: int) -> Tensor:
    """How strong each frequency is for coefficients alike, (H, W // 2 + 1), of mean square 1."""
    down = torch.fft.fftfreq(height, dtype=torch.float32)[:, None]
    right = torch.fft.rfftfreq(width, dtype=torch.float32)
    frequency = (down.square() + right.square()).sqrt().clamp(min=1 / max(height, width))
    amplitude: Tensor = frequency.pow(-_DECAY)
    return amplitude / amplitude.square().mean().sqrt()


def _mix(colours: Tensor, painted: Tensor) -> Tensor:
    """From uncorrelated colours to those of images."""
    mixed: Tensor = torch.einsum("cd,ndhw->nchw", colours, painted)
    return mixed
