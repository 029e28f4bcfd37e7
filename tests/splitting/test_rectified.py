"""Rectified responses without maps: the Gaussian form, and errors that are measured with it."""

import math

import pytest
import torch

from unbraid.splitting.rectified import Rectified, Shape, condense
from unbraid.splitting.silence import Images


def images_of(inputs, concept=None, weight=None):
    n = len(inputs)
    concept = torch.full((n,), -1) if concept is None else concept
    weight = torch.ones(n).double() if weight is None else weight
    return Images(inputs, concept, weight, torch.arange(n))


def shape_of(n_taps=5, n_images=7, n_spread=40):
    torch.manual_seed(0)
    positions = torch.tensor([1.0, 4, 9, 9, 16, 25, 49])
    inputs = torch.cat([torch.randn(n_images, n_taps), positions[:, None]], 1).double()
    row = torch.cat([torch.randn(n_taps), torch.tensor([-0.1])]).double()
    return Shape(images_of(inputs), row, torch.randn(n_spread, n_taps).double() / n_spread**0.5)


def mean_of(shape, mask):
    inputs, row = shape.images.inputs, shape.row
    return (inputs[:, :-1] * row[:-1]) @ mask / inputs[:, -1] + row[-1]


def slopes_of(near, images, row):
    """Slopes of all errors, (N, J)."""
    along = near.along[:, None] * images.inputs[:, :-1] * row[:-1]
    return along + near.across[:, None] * near.turn


def slow_response(shape, mask):
    """P times the integral of max(z, 0) over a normal density."""
    grid = torch.linspace(-9, 9, 20001).double()
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    sigma = (shape.spread @ mask).norm()
    rectified = (mean_of(shape, mask)[:, None] + sigma * grid).clamp(min=0)
    return shape.images.inputs[:, -1] * torch.trapezoid(rectified * density, grid, dim=1)


def test_response_is_the_integral_of_the_rectified_normal():
    shape, mask = shape_of(), torch.rand(5).double()
    expected = slow_response(shape, mask)
    torch.testing.assert_close(shape.near(mask).errors, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(shape.near(0.9 * mask).errors, expected, rtol=1e-3, atol=1e-3)


def test_response_of_one_position_is_the_rectifier_itself():
    shape = shape_of(n_spread=0)
    mask = torch.rand(5).double()
    expected = shape.images.inputs[:, -1] * mean_of(shape, mask).clamp(min=0)
    torch.testing.assert_close(shape.near(mask).errors, expected)


def test_slopes_are_those_of_autograd():
    shape, mask = shape_of(), torch.rand(5).double()
    expected = torch.autograd.functional.jacobian(lambda m: _plain(shape, m), mask)
    slopes = slopes_of(shape.near(mask), shape.images, shape.row)
    torch.testing.assert_close(slopes, expected, rtol=1e-9, atol=1e-9)


def _plain(shape, mask):
    sigma = (shape.spread @ mask).norm()
    mean = mean_of(shape, mask)
    normal = torch.distributions.Normal(0.0, 1.0)
    density = torch.exp(normal.log_prob(mean / sigma))
    return shape.images.inputs[:, -1] * (mean * normal.cdf(mean / sigma) + sigma * density)


@pytest.mark.parametrize("n_positions", [0, 3, 50])
def test_condense_keeps_the_second_moment_in_no_more_rows_than_taps(n_positions):
    torch.manual_seed(0)
    spread = torch.randn(n_positions, 5).double()
    found = condense(spread)
    assert len(found) == min(n_positions, 5)
    if n_positions:
        moments = [rows.T @ rows / len(rows) for rows in (found, spread)]
        torch.testing.assert_close(*moments)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_errors_are_relative_and_those_of_no_concept_one_sided(k, share):
    torch.manual_seed(k)
    inputs = torch.cat([torch.randn(9, 4), torch.full((9, 1), 6.0)], 1).double()
    concept = torch.tensor([0, 0, 0, 1, 1, -1, -1, -1, -1])
    weight = torch.tensor([1.0, 1, 1, 2, 2, 1, 5, 5, 5]).double()
    images = images_of(inputs, concept, weight)
    row, spread = torch.randn(5).double(), torch.randn(30, 4).double()
    omega, mask = 3.0, torch.rand(4).double()
    term = Rectified.of(Shape.of(row, images, spread), k, omega, 0.7, share)
    shape = Shape(images, row, spread * row[:-1] / 30**0.5)
    whole, part = slow_response(shape, torch.ones(4).double()), slow_response(shape, mask)
    own = concept == k
    total = 0.0
    for other in (0, 1):
        these = concept == other
        wanted = whole if other == k else torch.zeros(9).double()
        error = (weight * (part - wanted).square())[these].sum()
        counts = 1 if other == k else share
        total += counts * float(error / (weight * whole.square())[these].sum())
    rest = concept < 0
    power = float((weight * whole.square())[own].sum() / weight[own].sum())
    margin = 0.5 * float(whole[own].mean())
    beyond = (weight * (part - margin).clamp(min=0).square())[rest].sum() / weight[rest].sum()
    total += omega * float(beyond) / power
    assert float(term.near(mask).errors.square().sum()) == pytest.approx(0.7 * total, rel=1e-5)
    near = term.near(mask)
    errors, slopes = near.errors, slopes_of(near, images, row)
    assert float(errors.square().sum()) == pytest.approx(0.7 * total, rel=1e-5)
    step = 1e-6 * torch.randn(4).double()
    ahead = term.near(mask + step).errors.square().sum() - term.near(mask).errors.square().sum()
    assert float(ahead) == pytest.approx(float(2 * errors @ slopes @ step), rel=1e-3, abs=1e-12)
