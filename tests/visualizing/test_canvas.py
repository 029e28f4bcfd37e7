"""What images are like to a network, and images as functions of Fourier coefficients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from checks import assert_close
from tiny_networks import SyntheticImages, WithBroken
from unbraid.base.errors import DataError, UsageError
from unbraid.visualizing.canvas import blank_canvas, pixels_of, shake

SIZES = [(6, 5), (4, 4), (7, 3)]


@pytest.mark.parametrize(("size", "n_colours"), [((6, 5), 3), ((5, 6), 1), ((7, 3), 3)])
def test_pixels_of_images_are_what_loops_say(size, n_colours):
    dataset = SyntheticImages(9, size=(n_colours, *size))
    found = pixels_of(dataset)
    low, high = dataset.images.amin((0, 2, 3)), dataset.images.amax((0, 2, 3))
    assert_close(found.low, low, tolerance=1e-6)
    assert_close(found.high, high, tolerance=1e-6)
    scaled = (dataset.images - low[:, None, None]) / (high - low)[:, None, None]
    assert found.size == size
    assert_close(found.mean, scaled.mean((0, 2, 3)), tolerance=1e-6)
    covariance = np.cov(scaled.movedim(1, 0).flatten(1).numpy()).reshape(n_colours, n_colours)
    square = found.colours @ found.colours.T
    assert_close(square, torch.from_numpy(covariance), tolerance=1e-6)
    uncorrelated = torch.linalg.inv(found.colours.double())
    for c in range(n_colours):
        expected = np.zeros((size[0], size[1] // 2 + 1))
        for image in scaled:
            centred = image - found.mean.double()[:, None, None]
            plain = sum(uncorrelated[c, d] * centred[d] for d in range(n_colours))
            expected += np.abs(np.fft.rfft2(plain.numpy(), norm="ortho")) / len(scaled)
        assert_close(found.magnitude[c], torch.from_numpy(expected), tolerance=1e-5)


def test_pixels_of_broken_images_grey_ones_and_another_size():
    dataset = WithBroken(6)
    dataset.broken = (0, 2, 3, 5)
    found = pixels_of(dataset)
    assert_close(found.low, dataset.images[[1, 4]].amin((0, 2, 3)), tolerance=1e-6)
    dataset.broken = range(6)
    with pytest.raises(DataError, match="None of 6 images"):
        pixels_of(dataset)
    grey = SyntheticImages(6)
    grey.images[:, 1:] = grey.images[:, :1]  # stored in three colours
    found = pixels_of(grey, (9, 8))
    assert found.magnitude.shape == (3, 9, 5)
    assert bool(found.magnitude.isfinite().all())
    assert bool(found.colours.isfinite().all())


def test_pixels_of_what_cannot_be_measured_are_refused():
    for images, size, error, sentence in (
        ([torch.rand(3, 5, 5), torch.rand(1, 5, 5)], None, DataError, "all of as many channels"),
        ([torch.rand(3, 5, 5), torch.full((3, 5, 5), math.nan)], None, DataError, "NaN"),
        ([torch.full((3, 5, 5), 0.5)] * 2, None, DataError, "one colour"),
        ([torch.rand(3, 12)], None, DataError, "channels, height, width"),
        ([torch.rand(3, 5, 5)], (9, 1), UsageError, "size is"),
        ([torch.rand(3, 5, 5)], (5000, 50), UsageError, "size is"),
    ):
        with pytest.raises(error, match=sentence):
            pixels_of([(image, 0) for image in images], size)


def test_pixels_of_images_of_several_sizes_are_of_the_middle_one():
    torch.manual_seed(0)
    images = [torch.rand(3, n, 5) for n in (9, 7, 7, 3, 8)]
    found = pixels_of([(image, 0) for image in images])
    assert found.size == (7, 5)
    alone = pixels_of([(image, 0) for image in images[1:3]])
    assert bool((found.low <= alone.low + 1e-6).all())
    assert pixels_of([(image, 0) for image in images], (4, 6)).size == (4, 6)


@pytest.mark.parametrize("size", SIZES)
def test_a_free_canvas_is_a_sum_of_waves(size):
    pixels = pixels_of(SyntheticImages(9, size=(3, *size)))
    canvas = blank_canvas(pixels, [4], fixed_spectrum=False)
    height, width = size
    numbers = torch.view_as_complex(canvas.numbers.detach().double())[0].numpy()
    down, right = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitude = np.maximum(np.hypot(down, right), 1 / max(size)) ** -1.3
    amplitude /= math.sqrt((amplitude**2).mean())
    painted = np.fft.irfft2(numbers * amplitude, s=size, norm="ortho")
    colours = pixels.colours.double().numpy()
    colours /= max(math.sqrt((colours[:, c] ** 2).sum()) for c in range(3))
    mixed = np.einsum("cd,dhw->chw", colours, painted)
    expected = 1 / (1 + np.exp(-2 * mixed))
    assert_close(canvas.images()[0].detach(), torch.from_numpy(expected), tolerance=1e-5)


def assert_spectrum(image, pixels):
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


def test_shake_moves_all_images_alike_and_turns_without_squeezing():
    one = torch.rand(1, 3, 20, 30)
    both = shake(torch.cat([one, one]), torch.Generator().manual_seed(3))
    assert torch.equal(both[0], both[1])
    assert torch.equal(shake(one, torch.Generator().manual_seed(3))[0], both[0])
    assert not torch.equal(shake(one, torch.Generator().manual_seed(4))[0], both[0])
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


def test_no_more_images_are_read_than_the_bound():
    class Told(SyntheticImages):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read = []
    pixels_of(Told(500), None)
    assert 0 < len(set(read)) <= 128
    assert max(read) > 490  # from everywhere
