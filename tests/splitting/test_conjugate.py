"""Steps by conjugate gradients, beside those that a curvature written down gives."""

import pytest
import torch

from unbraid.splitting import conjugate
from unbraid.splitting.box_solver import solve_box
from unbraid.splitting.conjugate import Common, step_in_box
from unbraid.splitting.objective import Background, Objective
from unbraid.splitting.silence import Images

N_TAPS = 9


def common_of(n_images, scale=1.0):
    torch.manual_seed(n_images)
    inputs = torch.cat([torch.randn(n_images, N_TAPS), torch.full((n_images, 1), 4.0)], 1).double()
    concept = torch.arange(n_images) % 2
    images = Images(inputs, concept, torch.ones(n_images).double(), torch.arange(n_images))
    row = torch.randn(N_TAPS + 1).double()
    half = torch.randn(N_TAPS, N_TAPS).double()
    gram = half @ half.T + torch.eye(N_TAPS)
    counts = scale * torch.rand(n_images).double() * (torch.arange(n_images) % 3 > 0)
    return images, row, scale * gram, counts


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_sums_over_images_are_those_of_loops(scale):
    images, row, gram, counts = common_of(7, scale)
    common = Common.of(images, row, gram, counts)
    mask, turn, met = (torch.rand(N_TAPS).double() for _ in range(3))
    rows = images.inputs[:, :-1] * row[:-1]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(common.respond(mask), rows @ mask + 4 * row[-1], **close)
    pulled = sum(count * own for count, own in zip(counts, rows, strict=True))
    torch.testing.assert_close(common.gather(counts) / scale, pulled / scale, **close)
    times = common.product(gram.float(), counts, [(turn, met * scale)])
    curved = gram + sum(c * torch.outer(own, own) for c, own in zip(counts, rows, strict=True))
    curved = curved + scale * (torch.outer(turn, met) + torch.outer(met, turn))
    expected = curved @ mask / scale
    torch.testing.assert_close(times(mask.float()).double() / scale, expected, **close)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(times(mask.float()).double() / scale, 1.01 * expected, **close)


def test_what_float32_cannot_hold_has_nothing_in_common():
    images, row, gram, counts = common_of(7)
    assert Common.of(images, row, gram, counts) is not None
    assert Common.of(images, 0 * row, 0 * gram, counts) is None
    assert Common.of(images, 1e30 * row, gram, counts) is None


@pytest.mark.parametrize("n_images", [1, 4, 60])  # of 60 some stand for others
@pytest.mark.parametrize("pull", [0.1, 1.0, 30.0])  # the more, the more taps go to their bounds
def test_a_step_leads_nearly_as_low_as_the_exact_one(n_images, pull):
    images, row, gram, counts = common_of(n_images)
    common = Common.of(images, row, gram, counts)
    rows = images.inputs[:, :-1] * row[:-1]
    curved = gram + rows.T @ (rows * counts[:, None])
    mask = torch.tensor([0.0, 1, 0, 1, 0.5, 0.5, 0.5, 0.2, 0.9]).double()
    gradient = pull * torch.randn(N_TAPS).double()
    step = step_in_box(common.product(gram.float(), counts, []), common.inverse, gradient, mask)
    best = solve_box(curved, 1e-12, curved @ mask - gradient, mask)

    def model(reached):
        change = reached - mask
        return float(gradient @ change + change @ curved @ change / 2)

    assert ((step >= 0) & (step <= 1)).all()
    assert model(best) <= model(step) <= 0.98 * model(best) < 0
    uphill = step_in_box(common.product(gram.float(), counts, []), common.inverse, -gradient, mask)
    assert model(uphill) > 0.98 * model(best)


@pytest.mark.parametrize("seed", [0, 1])
def test_strong_images_that_count_little_bend_steps(seed):
    """Half of the taps are met only by images that each stand for a thousandth of the others."""
    torch.manual_seed(seed)
    weak, strong = torch.randn(300, 60).relu(), 30 * torch.randn(300, 60).relu()
    weak[:, 30:] = 0
    inputs = torch.cat([torch.cat([weak, strong]), torch.ones(600, 1)], 1).double()
    images = Images(inputs, -torch.ones(600).long(), torch.ones(600).double(), torch.arange(600))
    row = torch.cat([torch.randn(60), torch.zeros(1)]).double()
    root = torch.cat([torch.full((300,), 1000.0), torch.ones(300)]).double().sqrt()
    half = torch.randn(60, 60).double()
    gram = 1e5 * half @ half.T / 60
    objective = Objective(gram, gram @ torch.rand(60).double(), [Background(images, row, root)])
    mask, residual = objective.solve(torch.full((60,), 0.5).double(), 1e-6)
    assert residual < 1e-3
    assert residual == pytest.approx(objective.residual(mask), abs=1e-4)


def test_counts_that_are_no_numbers_have_nothing_in_common():
    images, row, gram, counts = common_of(7)
    assert Common.of(images, row, gram, counts) is not None
    for none in (float("nan"), float("inf")):
        counts[1] = none
        assert Common.of(images, row, gram, counts) is None


def test_a_step_takes_no_more_products_than_the_bounds(monkeypatch):
    images, row, gram, counts = common_of(60)
    common, n = Common.of(images, row, gram, counts), []
    product = common.product(gram.float(), counts, [])
    gradient, mask = torch.randn(N_TAPS).double(), torch.full((N_TAPS,), 0.5).double()

    def n_products():
        n.clear()
        step_in_box(lambda step: n.append(1) or product(step), common.inverse, gradient, mask)
        return len(n)

    monkeypatch.setattr(conjugate, "_PART", 0.0)  # so that only the bounds end it
    monkeypatch.setattr(conjugate, "_GUESSES", 1)
    monkeypatch.setattr(conjugate, "_MOST_TURNS", 5)
    assert n_products() > 2
    monkeypatch.setattr(conjugate, "_MOST_TURNS", 2)
    assert n_products() == 2
