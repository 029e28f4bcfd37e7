"""Pictures of what a network is given: images of any bands, signals, clips and volumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from unbraid.base.errors import UsageError
from unbraid.images.broken import first_readable
from unbraid.images.listing import ListedImages
from unbraid.images.which import holder_of

# A signal is drawn as lines if it is long beside its channels; these are the most, and how long.
_MOST_LINES, _TIMES = 16, 8
_WIDTH, _HEIGHT = 384, 192  # pixels of a signal's picture
_SPECTRUM = 2048  # from so many samples on, one channel's spectrogram stands below its line
_WINDOW = 256  # samples, of which a spectrogram's columns are made
_LOUD = 80.0  # decibels below the loudest that a spectrogram shows
_N_SLICES, _ACROSS, _GAP = 6, 3, 2  # of a clip or volume, in a row, and pixels between them
_PAPER, _INK, _AXIS = 255, 40, 200  # greys


def bands_of(dataset: Dataset[Any], index: int) -> tuple[int, ...] | None:
    """The bands that a data set wants an image shown by, its attribute `bands`; None for none."""
    held = holder_of(dataset, index, "bands")
    if held is None:
        return None
    bands = held[0].bands
    numbers = [*bands] if isinstance(bands, (list, tuple)) else [bands]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
    if len(numbers) not in (1, 3) or not whole:
        raise UsageError(
            f"The bands are {bands!r}; give three numbers of bands, from 0, for red, "
            "green and blue, or one for grey."
        )
    return tuple(numbers)


def draw_by(images: ListedImages, bands: Sequence[int] | None) -> None:
    """Let images be drawn by bands, in place of their data set's own; UsageError if they cannot."""
    if bands is None:
        return
    if not (images.read_by_code or images.of_tensors):
        raise UsageError(
            "These images are pictures, which are drawn in their colours; leave out the bands, "
            "which are those of tensors."
        )
    images.bands = [*bands]
    image = first_readable(images, range(len(images)))
    if image is not None and image.dim() < 3:
        raise UsageError(
            f"Bands are those of images (C, H, W), and these are of shape {tuple(image.shape)}; "
            "leave them out."
        )
    if image is not None:
        _colours(image, bands_of(images, 0))


def is_unprepared(dataset: Dataset[Any], index: int) -> bool:
    """Whether an image is another tensor than its network was given, of a shape of its own."""
    held = holder_of(dataset, index, "unprepared")
    return held is not None and bool(held[0].unprepared)


def tell_bands(dataset: Dataset[Any], index: int) -> str:
    """Say which bands of its images are shown, where these are neither grey nor of three colours.

    Nothing is said of a data set that gives pictures itself, nor of an image that cannot be read.
    """
    if holder_of(dataset, index, "picture") is not None:
        return ""
    if is_unprepared(dataset, index):
        return (
            "Pictures show tensors as they lie in their files; the network was given them in the "
            "preprocessing that comes with it. --bands is not followed here, as it names bands of "
            "what the network was given."
        )
    image, bands = None, bands_of(dataset, index)
    with suppress(Exception):  # of a data set of anyone's own
        image = dataset[index][0]
    if not isinstance(image, Tensor) or image.dim() < 3 or (bands is None and len(image) in (1, 3)):
        return ""
    if bands is not None:
        shown = ", ".join(map(str, bands))
        return f"Pictures show band{'s'[: len(bands) - 1]} {shown} of {len(image)}, from 0."
    return (
        f"Pictures show the mean of {len(image)} bands; --bands, or an attribute bands of the data "
        "set, such as 3,2,1, chooses what is red, green and blue."
    )


def to_picture(image: Tensor, bands: Sequence[int] | None = None) -> Image.Image:
    """Make a picture of a tensor.

    Args:
        image: (C, H, W) or (H, W): in colour of three bands or those that are chosen, else the mean
            of all, grey. (L,), or (C, L) that is long beside C: a signal's lines, and of a long one
            its spectrogram. (C, T, H, W): slices, evenly over time or depth.
        bands: one or three, by number.

    Raises:
        UsageError: there are no such bands.
        ValueError: it is of another shape.
    """
    image = image.detach().cpu().float().nan_to_num()
    if image.numel() == 0 or not 1 <= image.dim() <= 4:
        raise ValueError(f"a tensor of shape {tuple(image.shape)} is no picture")
    image = image[None] if image.dim() == 1 else image
    if image.dim() == 2:
        n_lines, length = image.shape
        if n_lines <= _MOST_LINES and length >= _TIMES * n_lines and length > _MOST_LINES:
            return _signal(image)
        image = image[None]
    image = _colours(image, bands)
    low, high = image.min(), image.max()
    scaled = (255 * (image - low) / (high - low).clamp(min=1e-12)).round().to(torch.uint8)
    if scaled.dim() == 4:
        scaled = _side_by_side(scaled)
    values = scaled.movedim(0, -1).numpy()
    return Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)


def _colours(image: Tensor, bands: Sequence[int] | None) -> Tensor:
    """Choose one or three of an image's bands, or take the mean of all."""
    if bands is not None:
        if max(bands) >= len(image):
            raise UsageError(
                f"The bands are {', '.join(map(str, bands))}, and an image has "
                f"{len(image)}; give numbers from 0 to {len(image) - 1}."
            )
        return image[list(bands)]
    return image if len(image) == 3 else image.mean(0, keepdim=True)


def as_drawn(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Lay values at positions of an image out as `to_picture` draws it, (h, w).

    Of a signal they are (l,), of a picture (h, w), and of a clip or volume (d, h, w); `sizes` are
    the image's own.
    """
    if values.dim() < 3:
        return values[None] if values.dim() == 1 else values
    slices = _slices(values[None], min(_N_SLICES, sizes[0])).float()
    whole = F.interpolate(slices, list(sizes[1:]), mode="bilinear")
    return _side_by_side(whole, 0)[0]


def _slices(clip: Tensor, n_slices: int) -> Tensor:
    """Choose slices of (C, T, H, W), evenly over T."""
    return clip[:, [(2 * k + 1) * clip.shape[1] // (2 * n_slices) for k in range(n_slices)]]


def _side_by_side(clip: Tensor, between: float = _PAPER) -> Tensor:
    """Lay slices of (C, T, H, W) side by side, in time's order, row by row."""
    n_slices = min(_N_SLICES, clip.shape[1])
    chosen = _slices(clip, n_slices).unbind(1)
    across = min(_ACROSS, n_slices)
    n_rows = math.ceil(n_slices / across)
    height, width = clip.shape[2] + _GAP, clip.shape[3] + _GAP
    sheet = clip.new_full((len(clip), n_rows * height - _GAP, across * width - _GAP), between)
    for place, one in enumerate(chosen):
        y, x = place // across * height, place % across * width
        sheet[:, y : y + clip.shape[2], x : x + clip.shape[3]] = one
    return sheet


def _signal(signal: Tensor) -> Image.Image:
    """Draw channels (C, L) as lines, one below the other; in each column from least to most."""
    whole = Image.new("L", (_WIDTH, _HEIGHT), _PAPER)
    has_spectrum = len(signal) == 1 and signal.shape[1] >= _SPECTRUM
    height = (_HEIGHT // 2 if has_spectrum else _HEIGHT) / len(signal)
    pen = ImageDraw.Draw(whole)
    values = signal.numpy()
    for place, line in enumerate(values):
        low, high = float(line.min()), float(line.max())
        top, reach = place * height + 2, max(height - 5, 1)
        ys = top + reach * (high - line) / max(high - low, 1e-12)
        if low <= 0 <= high:
            zero = top + reach * high / max(high - low, 1e-12)
            pen.line([(0, zero), (_WIDTH, zero)], _AXIS)
        if len(line) <= _WIDTH:
            xs = np.linspace(0, _WIDTH - 1, len(line))
            pen.line([*zip(xs.tolist(), ys.tolist(), strict=True)], _INK)
        else:
            for x, part in enumerate(np.array_split(ys, _WIDTH)):
                pen.line([(x, float(part.min())), (x, float(part.max()))], _INK)
    if has_spectrum:
        whole.paste(_spectrogram(signal[0]), (0, _HEIGHT // 2))
    return whole


def _spectrogram(line: Tensor) -> Image.Image:
    """Draw how strong frequencies are over time, low ones below, in decibels: black is loudest."""
    hop = max(1, len(line) // _WIDTH)
    window = torch.hann_window(_WINDOW, dtype=torch.float32)
    power = torch.stft(line, _WINDOW, hop, window=window, return_complex=True).abs().square()
    decibels = 10 * (power / power.max().clamp(min=1e-12)).clamp(min=1e-12).log10()
    shade = _PAPER * (decibels / -_LOUD).clamp(0, 1)
    grey = Image.fromarray(shade.flip(0).round().to(torch.uint8).numpy())
    return grey.resize((_WIDTH, _HEIGHT // 2))
