"""What images are like to a network, and images as functions of Fourier coefficients."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from checks import assert_close
from tiny_networks import SyntheticImages, WithBroken
from unbraid.base.errors import DataError, UsageError
from unbraid.visualizing.canvas import Pixels, blank_canvas, pixels_of, shake

SIZES = [(6, 5), (5, 6), (4, 4), (7, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n_colours", [1, 3])
def test_pixels_of_images_are_what_loops_say(size, n_colours):
    dataset = SyntheticImages(9, size=(n_colours, *size))
    found = pixels_of(dataset)
    values = [[dataset.images[:, c].min(), dataset.images[:, c].max()] for c in range(n_colours)]
    assert_close(found.low, torch.tensor([v[0] for v in values]), tolerance=1e-6)
    assert_close(found.high, torch.tensor([v[1] for v in values]), tolerance=1e-6)
    scaled = torch.stack(
        [(dataset.images[:, c] - low) / (high - low) for c, (low, high) in enumerate(values)], 1
    )
    assert found.size == size
    assert_close(found.mean, scaled.mean((0, 2, 3)), tolerance=1e-6)
    covariance = np.cov(scaled.movedim(1, 0).flatten(1).numpy()).reshape(n_colours, n_colours)
    square = found.colours @ found.colours.T
    assert_close(square, torch.from_numpy(covariance), tolerance=1e-6)
    uncorrelated = torch.linalg.inv(found.colours.double())
    for c in range(n_colours):
        expected = np.zeros((size[0], size[1] // 2 + 1))
        for image in scaled:
            plain = sum(
                uncorrelated[c, d] * (image[d] - found.mean[d].double()) for d in range(n_colours)
            )
            expected += np.abs(np.fft.rfft2(plain.numpy(), norm="ortho")) / len(scaled)
        assert_close(found.magnitude[c], torch.from_numpy(expected), tolerance=1e-5)


def test_pixels_of_broken_images_grey_ones_and_another_size():
    dataset = WithBroken(6)
    dataset.broken = (0, 2, 3, 5)
    found = pixels_of(dataset)
    assert_close(found.low, dataset.images[[1, 4]].amin((0, 2, 3)), tolerance=1e-6)
    grey = SyntheticImages(6)
    grey.images[:, 1:] = grey.images[:, :1]  # stored in three colours
    found = pixels_of(grey, (9, 8))
    assert found.magnitude.shape == (3, 9, 5)
    assert bool(found.magnitude.isfinite().all())
    assert bool(found.colours.isfinite().all())


class Sizes(SyntheticImages):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(3, 5 + index, 5), 0


def all_broken() -> SyntheticImages:
    dataset = WithBroken(6)
    dataset.broken = range(6)
    return dataset


def with_value(value: float, n_images: int) -> SyntheticImages:
    dataset = SyntheticImages(4)
    dataset.images[:n_images] = value
    return dataset


@pytest.mark.parametrize(
    ("dataset", "size", "error", "sentence"),
    [
        (all_broken(), None, DataError, "None of 6 images"),
        (Sizes(4), None, DataError, "bring all to one size"),
        (with_value(math.nan, 1), None, DataError, "NaN"),
        (with_value(0.5, 4), None, DataError, "one colour"),
        (SyntheticImages(4, size=(3, 12)), None, DataError, "channels, height, width"),
        (SyntheticImages(4), (9, 1), UsageError, "size is"),
        (SyntheticImages(4), (5000, 50), UsageError, "size is"),
    ],
)
def test_pixels_of_what_cannot_be_measured_are_refused(dataset, size, error, sentence):
    with pytest.raises(error, match=sentence):
        pixels_of(dataset, size)


# --- canvas ---------------------------------------------------------------------------------------


def inverse_transform(spectrum: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A real image from half of its spectrum, (H, W // 2 + 1), by the definition."""
    height, width = size
    image = np.zeros(size)
    for y in range(height):
        for x in range(width):
            total = 0j
            for v in range(height):
                for u in range(width):
                    half = u < width // 2 + 1
                    value = spectrum[v, u] if half else np.conj(spectrum[-v % height, width - u])
                    total += value * cmath.exp(2j * math.pi * (v * y / height + u * x / width))
            image[y, x] = total.real / math.sqrt(height * width)
    return image


@pytest.mark.parametrize("size", SIZES)
def test_a_free_canvas_is_a_sum_of_waves(size):
    pixels = pixels_of(SyntheticImages(9, size=(3, *size)))
    canvas = blank_canvas(pixels, [4], fixed_spectrum=False)
    height, width = size
    numbers = torch.view_as_complex(canvas.numbers.detach().double())[0].numpy()
    amplitude = np.zeros((height, width // 2 + 1))
    for v in range(height):
        for u in range(width // 2 + 1):
            frequency = math.hypot(min(v, height - v) / height, u / width)
            amplitude[v, u] = max(frequency, 1 / max(size)) ** -1.3
    amplitude /= math.sqrt((amplitude**2).mean())
    painted = np.stack([inverse_transform(numbers[c] * amplitude, size) for c in range(3)])
    colours = pixels.colours.double().numpy()
    colours /= max(math.sqrt((colours[:, c] ** 2).sum()) for c in range(3))
    mixed = np.einsum("cd,dhw->chw", colours, painted)
    expected = 1 / (1 + np.exp(-2 * mixed))
    assert_close(canvas.images()[0].detach(), torch.from_numpy(expected), tolerance=1e-5)


def assert_spectrum(image: Tensor, pixels: Pixels) -> None:
    """Magnitudes are those of the data set, but for one factor and the mean."""
    uncorrelated = torch.linalg.inv(pixels.colours)
    plain = torch.einsum("dc,chw->dhw", uncorrelated, image - pixels.mean[:, None, None])
    found, wanted = torch.fft.rfft2(plain, norm="ortho").abs(), pixels.magnitude.clone()
    found[:, 0, 0] = wanted[:, 0, 0] = 0
    assert_close(found / found.norm(), wanted / wanted.norm(), tolerance=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_a_canvas_of_fixed_spectrum_keeps_it_whatever_the_phases(size):
    whole = pixels_of(SyntheticImages(9, size=(3, *size)))
    # Pale colours around grey, so that nothing is clamped.
    pixels = replace(whole, colours=0.02 * whole.colours, mean=torch.full((3,), 0.5))
    canvas = blank_canvas(pixels, [0, 1], fixed_spectrum=True)
    numbers = canvas.numbers.detach()
    moved = replace(canvas, numbers=numbers + torch.randn(numbers.shape))
    for image in (*canvas.images().detach(), *moved.images()):
        assert_spectrum(image, pixels)
    with pytest.raises(AssertionError):
        assert_spectrum(torch.rand(3, *size), pixels)


@pytest.mark.parametrize("spectrum", [False, True])
def test_images_stay_in_range(spectrum):
    canvas = blank_canvas(pixels_of(SyntheticImages(9)), [0], spectrum)
    wild = replace(canvas, numbers=100 * torch.randn_like(canvas.numbers)).images()
    assert 0 <= float(wild.min()) < float(wild.max()) <= 1


def test_shake_moves_all_images_alike_and_is_reproducible():
    one = torch.rand(1, 3, 20, 30)
    both = shake(torch.cat([one, one]), torch.Generator().manual_seed(3))
    assert torch.equal(both[0], both[1])
    assert torch.equal(shake(one, torch.Generator().manual_seed(3))[0], both[0])
    assert not torch.equal(shake(one, torch.Generator().manual_seed(4))[0], both[0])


def test_shake_turns_without_squeezing():
    """A disc stays a disc, of about its size and near its place, also where sides differ."""
    down, right = torch.meshgrid(torch.arange(60), torch.arange(120), indexing="ij")
    disc = ((down - 30) ** 2 + (right - 60) ** 2 < 15**2).float()[None, None]
    for seed in range(20):
        moved = shake(disc, torch.Generator().manual_seed(seed))[0, 0] > 0.5
        rows, columns = moved.nonzero(as_tuple=True)
        height, width = (int(line.max() - line.min()) + 1 for line in (rows, columns))
        assert abs(height - width) <= 2
        assert 26 <= height <= 34
        assert abs(float(rows.float().mean()) - 30) <= 7
        assert abs(float(columns.float().mean()) - 60) <= 12
