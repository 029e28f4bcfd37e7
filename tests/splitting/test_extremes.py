"""Fits of numbers that are tiny, huge or far apart in size: masks, or an error that tells so."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.linalg import LinAlgError

from unbraid.splitting import least_squares as ls
from unbraid.splitting.box_solver import Gram
from unbraid.splitting.conjugate import Common, step_in_box
from unbraid.splitting.moments import RowPrior, augment, moment
from unbraid.splitting.objective import Background, Objective
from unbraid.splitting.silence import Images


def fit_at_random(seed):
    """A fit of images of any scale, each concept's own, with a bias or none."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator)

    def number(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    n_taps, n_concepts = number(1, 40), number(1, 4)
    one = 10.0 ** number(-18, 18)
    scales = [[one, 10.0 ** number(-18, 18)][number(0, 1)] for _ in range(n_concepts + 1)]
    parts = [scale * random(number(1, 30), n_taps).relu() for scale in scales]
    inputs = [augment(part, torch.ones(len(part))) for part in parts]
    numbers = torch.tensor([*range(n_concepts), -1])
    concept = numbers.repeat_interleave(torch.tensor([len(part) for part in parts]))
    n_images = len(concept)
    every = torch.arange(n_images)
    images = Images(torch.cat(inputs), concept, torch.ones(n_images).double(), every)
    weight = random(30, n_taps)
    scan = SimpleNamespace(weight=weight, layer=SimpleNamespace(n_out=30, groups=1))
    row = torch.cat([weight[0], random(1) * number(0, 1)]).double()
    problem = ls.pose(row, [moment(own) for own in inputs[:-1]], [1.0, 0.5][number(0, 1)])
    spread = [None, one * random(20, n_taps)][number(0, 1)]
    weights = ls.Weights([0.1, 3.0][number(0, 1)], [0.6, 20.0][number(0, 1)])
    return ls.solve(problem, images, weights, RowPrior(scan).matrix(0), spread=spread)


@pytest.mark.parametrize("seed", range(40))
def test_a_fit_of_any_numbers_ends_in_masks_or_tells_what_cannot_be_computed(seed):
    try:
        fit = fit_at_random(seed)
    except LinAlgError:  # of which a split makes a sentence
        return
    assert ((fit.masks >= 0) & (fit.masks <= 1)).all()


@pytest.mark.parametrize("flat", [0.0, 1e-44, float("nan"), float("inf")])
def test_a_step_ends_where_float32_sees_no_curvature(flat):
    start, gradient = torch.tensor([0.5, 0.0, 1.0]).double(), torch.tensor([1.0, -1, 1]).double()
    reached = step_in_box(lambda step: flat * step, torch.eye(3), gradient, start)
    assert ((reached >= 0) & (reached <= 1)).all()


def test_counts_beyond_float32_curve_no_less_than_the_largest_number():
    one, row = torch.ones(3).double(), torch.ones(3).double()
    images = Images(torch.eye(3).double(), torch.arange(3), one, torch.arange(3))
    common = Common.of(images, row, torch.eye(2).double(), one)
    turned = common.product(torch.eye(2), 1e300 * one, [])(torch.ones(2))
    assert (turned >= torch.finfo(torch.float32).max).all()


def test_a_fit_stops_at_an_answer_beyond_which_nothing_can_be_solved(monkeypatch):
    one, row = torch.ones(3).double(), torch.tensor([1.0, 1, 0]).double()
    images = Images(torch.eye(3).double(), torch.zeros(3).long(), one, torch.arange(3))
    quiet = Background(images, row, one)
    objective = Objective(torch.eye(2).double(), torch.ones(2).double(), [quiet])
    answer, _ = objective.solve(0 * row[:2], 1e-12)
    fail = MagicMock(side_effect=LinAlgError("no"))
    monkeypatch.setattr(Gram, "solver", fail)
    monkeypatch.setattr(Common, "of", lambda *_: None)
    mask, residual = objective.solve(answer, 1e-12)
    assert fail.called
    assert torch.equal(mask, answer)
    assert residual < 1e-3
    with pytest.raises(LinAlgError):
        objective.solve(0 * answer, 1e-12)
