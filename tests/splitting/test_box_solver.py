"""The box solver: the optimum against scipy, and its optimality."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from unbraid.splitting import box_solver as box
from unbraid.splitting.box_solver import Gram, System, kkt_residual, solve_box


def random_problem(size, images):
    """Inputs (images, size), a target (images,), the Gram matrix and the linear part."""
    inputs = torch.randn(images, size, dtype=torch.float64)
    target = torch.randn(images, dtype=torch.float64)
    return inputs, target, inputs.mT @ inputs, target @ inputs


def assert_optimal(gram, ridge, linear, mask):
    assert ((mask >= 0) & (mask <= 1)).all()
    assert kkt_residual(gram, ridge, linear, mask) < 1e-8


@pytest.mark.parametrize(("size", "images"), [(3, 10), (20, 50), (40, 15), (60, 8)])
@pytest.mark.parametrize("seed", range(5))
def test_solve_box_finds_scipys_answer_whatever_the_start(size, images, seed):
    torch.manual_seed(seed)
    inputs, target, gram, linear = random_problem(size, images)
    ridge = 1e-3
    answer = solve_box(gram, ridge, linear, torch.full_like(linear, 0.5))
    assert_optimal(gram, ridge, linear, answer)
    x = np.vstack([inputs.numpy(), np.sqrt(ridge) * np.eye(size)])
    y = np.concatenate([target, np.zeros(size)])
    expected = lsq_linear(x, y, (0, 1), method="bvls", tol=1e-14).x
    np.testing.assert_allclose(answer, expected, atol=1e-7)
    for start in (torch.zeros_like(linear), torch.ones_like(linear), torch.rand_like(linear)):
        other = solve_box(gram, ridge, linear, start)
        torch.testing.assert_close(other, answer, rtol=0, atol=1e-7)


@pytest.mark.parametrize("place", range(3))
def test_a_moved_answer_is_seen_not_to_be_optimal(place):
    _, _, gram, linear = random_problem(6, 20)
    answer = solve_box(gram, 1e-3, linear, torch.zeros_like(linear))
    answer[place] += 0.1 if answer[place] < 0.5 else -0.1
    with pytest.raises(AssertionError):
        assert_optimal(gram, 1e-3, linear, answer)


@pytest.mark.parametrize("images", [60, 12])
def test_the_interior_point_comes_near_the_answer_alone(monkeypatch, images):
    _, _, gram, linear = random_problem(30, images)
    start = torch.zeros_like(linear)
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
    linear = inputs @ (3 * torch.randn(100).double()) @ inputs
    gram = inputs.mT @ inputs
    assert_optimal(gram, 1e-4, linear, solve_box(gram, 1e-4, linear, torch.full_like(linear, 0.5)))
    assert helped


def test_a_problem_that_rounding_makes_indefinite_is_solved():
    _, _, gram, linear = random_problem(20, 4)
    gram = 1e6 * gram
    assert_optimal(gram, 1e-4, linear, solve_box(gram, 1e-4, linear, torch.zeros_like(linear)))


def test_hardly_any_ridge_is_enough():
    inputs = torch.randn(3, 36, generator=torch.Generator().manual_seed(0)).double()
    gram, linear = inputs.mT @ inputs, 3 * torch.ones(36).double()
    answer = solve_box(gram, torch.finfo(torch.float64).tiny, linear, torch.zeros_like(linear))
    assert kkt_residual(gram, 0.0, linear, answer) < 1e-8


def test_a_system_is_solved_for_its_free_unknowns():
    inputs, x = torch.randn(80, 50).double(), torch.randn(50).double()
    matrix = inputs.mT @ inputs
    free = torch.tensor([0, 3, 4, 20, 49])
    expected = torch.linalg.solve(matrix[free][:, free] + 0.7 * torch.eye(5).double(), x[:5])
    system = System(Gram(matrix), 0.7, free)
    torch.testing.assert_close(system.exactly(x[:5]), expected)
    torch.testing.assert_close(system.nearly(x[:5]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_rough_answer_is_near_the_exact_one_and_exact_where_float32_fails(scale, monkeypatch):
    torch.manual_seed(0)
    for size, images in ((3, 10), (40, 60), (60, 8)):
        _, _, gram, linear = random_problem(size, images)
        gram, linear, ridge = scale * gram, scale * linear, scale * 0.1
        exact = solve_box(gram, ridge, linear, torch.rand_like(linear))
        rough = solve_box(gram, ridge, linear, torch.rand_like(linear), 1e-6)
        torch.testing.assert_close(rough, exact, rtol=0, atol=1e-4)
        with monkeypatch.context() as patched:
            patched.setattr(box, "_ROUGH_GUESSES", 0)
            fallen_back = solve_box(gram, ridge, linear, torch.rand_like(linear), 1e-6)
        torch.testing.assert_close(fallen_back, exact, rtol=0, atol=1e-7)


def test_the_interior_point_is_left_after_so_many_steps(monkeypatch):
    _, _, gram, linear = random_problem(30, 12)
    posed, made = box._Box(box.Gram(gram), 1e-2, linear), []
    monkeypatch.setattr(box, "System", lambda *own: made.append(1) or System(*own))
    box._interior_point(posed)
    n_usual = len(made)
    monkeypatch.setattr(box, "_MAX_STEPS", 3)
    made.clear()
    box._interior_point(posed)
    assert len(made) == 3 < n_usual
