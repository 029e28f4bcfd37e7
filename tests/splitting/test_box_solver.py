"""The box solver: the optimum against scipy, its optimality, and both forms of a Gram matrix."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from unbraid.splitting import box_solver as box
from unbraid.splitting.box_solver import Rows, System, Whole, add, kkt_residual, solve_box


def gram_of(inputs, form):
    return Whole(inputs.mT @ inputs) if form == "whole" else Rows(inputs)


def random_problem(size, images, n=5):
    """Inputs (images, size), targets (n, images) and the linear part of n problems (n, size)."""
    inputs = torch.randn(images, size, dtype=torch.float64)
    targets = torch.randn(n, images, dtype=torch.float64)
    return inputs, targets, targets @ inputs


def assert_optimal(gram, ridge, linear, masks):
    assert ((masks >= 0) & (masks <= 1)).all()
    assert kkt_residual(gram, ridge, linear, masks).max() < 1e-8


@pytest.mark.parametrize("form", ["whole", "rows"])
@pytest.mark.parametrize(("size", "images"), [(3, 10), (20, 50), (40, 15), (60, 8)])
def test_solve_box_finds_scipys_answer_whatever_the_start(size, images, form):
    inputs, targets, linear = random_problem(size, images)
    gram, ridge = gram_of(inputs, form), 1e-3
    answers = solve_box(gram, ridge, linear, torch.full_like(linear, 0.5))
    assert_optimal(gram, ridge, linear, answers)
    x = np.vstack([inputs.numpy(), np.sqrt(ridge) * np.eye(size)])
    for target, answer in zip(targets.numpy(), answers.numpy(), strict=True):
        y = np.concatenate([target, np.zeros(size)])
        expected = lsq_linear(x, y, (0, 1), method="bvls", tol=1e-14).x
        np.testing.assert_allclose(answer, expected, atol=1e-7)
    for start in (torch.zeros_like(linear), torch.ones_like(linear), torch.rand_like(linear)):
        other = solve_box(gram, ridge, linear, start)
        torch.testing.assert_close(other, answers, rtol=0, atol=1e-7)


@pytest.mark.parametrize("place", range(3))
def test_a_moved_answer_is_seen_not_to_be_optimal(place):
    inputs, _, linear = random_problem(6, 20, 1)
    answer = solve_box(Rows(inputs), 1e-3, linear, torch.zeros_like(linear))
    answer[0, place] += 0.1 if answer[0, place] < 0.5 else -0.1
    with pytest.raises(AssertionError):
        assert_optimal(Rows(inputs), 1e-3, linear, answer)


@pytest.mark.parametrize("form", ["whole", "rows"])
def test_the_interior_point_comes_near_the_answer_alone(monkeypatch, form):
    inputs, _, linear = random_problem(30, 60 if form == "whole" else 12)
    gram, start = gram_of(inputs, form), torch.zeros_like(linear)
    expected = solve_box(gram, 1e-2, linear, start)
    monkeypatch.setattr(box, "_PATIENCE", 0)
    answer = solve_box(gram, 1e-2, linear, start)
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-4)


def test_guesses_that_go_round_in_circles_are_helped_out(monkeypatch):
    helped, found = [], box._interior_point
    monkeypatch.setattr(box, "_interior_point", lambda one: helped.append(1) or found(one))
    torch.manual_seed(1)
    inputs = torch.randn(300, 100, dtype=torch.float64)
    for tap in range(1, 100):  # neighbours much alike, as under a kernel
        inputs[:, tap] = 0.99 * inputs[:, tap - 1] + (1 - 0.99**2) ** 0.5 * inputs[:, tap]
    linear = (inputs @ (3 * torch.randn(100).double()) @ inputs)[None]
    gram = gram_of(inputs, "whole")
    assert_optimal(gram, 1e-4, linear, solve_box(gram, 1e-4, linear, torch.full_like(linear, 0.5)))
    assert helped


def test_a_problem_that_rounding_makes_indefinite_is_solved():
    inputs, _, linear = random_problem(20, 4)
    gram = Whole(inputs.mT @ inputs * 1e6)
    assert_optimal(gram, 1e-4, linear, solve_box(gram, 1e-4, linear, torch.zeros_like(linear)))


@pytest.mark.parametrize("form", ["rows", "whole"])
def test_hardly_any_ridge_is_enough(form):
    inputs = torch.randn(3, 36, generator=torch.Generator().manual_seed(0)).double()
    gram, linear = gram_of(inputs, form), 3 * torch.ones(2, 36).double()
    answer = solve_box(gram, torch.finfo(torch.float64).tiny, linear, torch.zeros_like(linear))
    assert kkt_residual(gram, 0.0, linear, answer).max() < 1e-8


def test_both_forms_of_a_gram_say_the_same():
    parts = [torch.randn(n, 60, dtype=torch.float64) for n in (4, 6)]
    weights, row, x = [0.3, 2.0], torch.randn(60).double(), torch.randn(3, 60).double()
    whole = sum(w * part.mT @ part for w, part in zip(weights, parts, strict=True))
    few = add([Rows(part) for part in parts], weights)
    many = add([Rows(parts[0]), gram_of(parts[1], "whole")], weights)
    assert isinstance(few, Rows)
    assert isinstance(many, Whole)
    matrix = (whole * row * row[:, None])[:50, :50]
    free = torch.tensor([0, 3, 4, 20, 49])
    expected = torch.linalg.solve(matrix[free][:, free] + 0.7 * torch.eye(5).double(), x[0, :5])
    for gram in (few, many):
        scaled = gram.weighted(row[:50])
        torch.testing.assert_close(scaled.times(x[:, :50]), x[:, :50] @ matrix)
        torch.testing.assert_close(scaled.diagonal, matrix.diagonal())
        system = System(scaled, 0.7, free)
        torch.testing.assert_close(system.exactly(x[0, :5]), expected)
        torch.testing.assert_close(system.nearly(x[0, :5]), expected, rtol=1e-3, atol=1e-3)
