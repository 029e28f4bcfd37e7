"""What images are like to a network, and images as functions of Fourier coefficients."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from checks import assert_close
from tiny_networks import SyntheticImages
from unbraid.base.errors import DataError, UsageError
from unbraid.visualizing.canvas import Canvas, Pixels, blank_canvas, pixels_of, shake

SIZES = [(6, 5), (5, 6), (4, 4), (7, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n_colours", [1, 3])
def test_pixels_are_what_loops_say(size, n_colours):
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


def test_pixels_of_another_size():
    assert pixels_of(SyntheticImages(4), (9, 8)).magnitude.shape == (3, 9, 5)


def test_grey_pictures_stored_in_three_colours_have_pixels():
    dataset = SyntheticImages(6)
    dataset.images[:, 1:] = dataset.images[:, :1]
    found = pixels_of(dataset)
    assert bool(found.magnitude.isfinite().all())
    assert bool(found.colours.isfinite().all())


class Holes(Dataset[tuple[Tensor, int]]):
    """A data set of which only some images can be read."""

    def __init__(self, good: set[int]) -> None:
        self.inner, self.good = SyntheticImages(6), good

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index not in self.good:
            raise OSError("damaged")
        return self.inner[index]


def test_pixels_of_broken_images_are_left_out():
    found = pixels_of(Holes({1, 4}))
    assert_close(found.low, SyntheticImages(6).images[[1, 4]].amin((0, 2, 3)), tolerance=1e-6)


class Sizes(SyntheticImages):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(3, 5 + index, 5), 0


def with_nan() -> SyntheticImages:
    dataset = SyntheticImages(4)
    dataset.images[2, 0, 0, 0] = float("nan")
    return dataset


@pytest.mark.parametrize(
    ("dataset", "size", "error", "message"),
    [
        (Holes(set()), None, DataError, "None of 6 images"),
        (Sizes(4), None, DataError, "bring all to one size"),
        (with_nan(), None, DataError, "NaN"),
        (SyntheticImages(4), (9, 1), UsageError, "size is"),
    ],
)
def test_pixels_of_what_cannot_be_measured_are_refused(dataset, size, error, message):
    with pytest.raises(error, match=message):
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


def measured_spectrum(image: Tensor, pixels: Pixels) -> Tensor:
    plain = torch.einsum(
        "dc,chw->dhw", torch.linalg.inv(pixels.colours), image - pixels.mean[:, None, None]
    )
    return torch.fft.rfft2(plain, norm="ortho").abs()


def assert_spectrum(image: Tensor, pixels: Pixels) -> None:
    """Magnitudes are those of the data set, but for one factor and the mean."""
    found, wanted = measured_spectrum(image, pixels), pixels.magnitude.clone()
    found[:, 0, 0] = wanted[:, 0, 0] = 0
    assert_close(found / found.norm(), wanted / wanted.norm(), tolerance=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_a_canvas_of_fixed_spectrum_keeps_it_whatever_the_phases(size):
    whole = pixels_of(SyntheticImages(9, size=(3, *size)))
    # Pale colours around grey, so that nothing is clamped.
    fields = {**vars(whole), "colours": 0.02 * whole.colours, "mean": torch.full((3,), 0.5)}
    pixels = Pixels(**fields)
    canvas = blank_canvas(pixels, [0, 1], fixed_spectrum=True)
    for image in canvas.images().detach():
        assert_spectrum(image, pixels)
    moved = Canvas(canvas.numbers.detach() + torch.randn(canvas.numbers.shape), pixels)
    assert_spectrum(moved.images()[0], pixels)
    with pytest.raises(AssertionError):
        assert_spectrum(torch.rand(3, *size), pixels)


@pytest.mark.parametrize("spectrum", [False, True])
def test_images_stay_in_range(spectrum):
    pixels = pixels_of(SyntheticImages(9))
    canvas = blank_canvas(pixels, [0], spectrum)
    wild = Canvas(100 * torch.randn_like(canvas.numbers), pixels)
    assert bool((wild.images() >= 0).all())
    assert bool((wild.images() <= 1).all())


def test_shaking_moves_all_images_alike_and_is_reproducible():
    one = torch.rand(1, 3, 20, 30)
    both = shake(torch.cat([one, one]), torch.Generator().manual_seed(3))
    assert torch.equal(both[0], both[1])
    assert torch.equal(shake(one, torch.Generator().manual_seed(3))[0], both[0])
    assert not torch.equal(shake(one, torch.Generator().manual_seed(4))[0], both[0])


def test_shaking_turns_without_squeezing():
    """A disc stays a disc, of about its size and near its place, also where sides differ."""
    down, right = torch.meshgrid(torch.arange(60), torch.arange(120), indexing="ij")
    disc = ((down - 30) ** 2 + (right - 60) ** 2 < 15**2).float()[None, None]
    for seed in range(20):
        moved = shake(disc, torch.Generator().manual_seed(seed))[0, 0] > 0.5
        rows, columns = moved.nonzero(as_tuple=True)
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert abs(height - width) <= 2
        assert 26 <= height <= 34
        assert abs(float(rows.float().mean()) - 30) <= 7
        assert abs(float(columns.float().mean()) - 60) <= 12
