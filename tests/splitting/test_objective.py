"""The objective of one mask: its gradient, its curvature, and where it ends."""

import pytest
import torch

from unbraid.splitting import objective
from unbraid.splitting.objective import Beyond, Curvature, Objective
from unbraid.splitting.rectified import Rectified, Shape
from unbraid.splitting.silence import Images


def objective_of(n_images=60, n_taps=7):
    torch.manual_seed(0)
    inputs = torch.rand(n_images, n_taps + 1).double() + 0.1
    inputs[:, -1] = 9
    concept = torch.arange(n_images) % 4 - 2
    images = Images(inputs, concept.clamp(min=-1), torch.ones(n_images).double(), concept)
    row = torch.randn(n_taps + 1).double()
    roots = torch.where(images.concept == 0, -0.3, 0.2).double()
    beyond = Beyond(images, row, roots, torch.full((n_images,), 0.1).double())
    spread = torch.randn(20, n_taps).double()
    shaped = Rectified.of(Shape.of(row, images, spread), 0, 3.0, 0.5)
    half = torch.randn(n_taps, n_taps).double()
    return Objective(half @ half.T, torch.randn(n_taps).double(), [beyond, shaped])


def slow_moments(images, counts):
    return torch.einsum("n,ni,nj->ij", counts, images.inputs, images.inputs)


def test_residual_is_a_gradient_step_of_the_objective():
    objective = objective_of()
    mask = torch.rand(7).double()
    step, slopes = 1e-6, []
    for unit in torch.eye(7).double():
        ahead, behind = (objective.value(mask + sign * step * unit) for sign in (1, -1))
        slopes.append((ahead - behind) / (4 * step))  # half the gradient
    gram = objective.gram.clone()
    for term in objective.terms:
        near = term.near(mask)
        rows = near.along[:, None] * term.images.inputs[:, :-1] * term.row[:-1]
        rows = rows + near.across[:, None] * near.turn
        gram += rows.T @ rows
    moved = (mask - torch.tensor(slopes).double() / gram.diagonal().amax()).clamp(0, 1)
    expected = float((mask - moved).abs().amax())
    assert objective.residual(mask) == pytest.approx(expected, rel=1e-4)
    assert objective.residual(0.9 * mask) != pytest.approx(expected, rel=1e-2)
    assert objective.residual(objective.solve(mask, 1e-14)[0]) < 1e-4


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_curvature_follows_what_images_count(scale):
    images = objective_of().terms[0].images
    curvature = Curvature(images)
    counts = torch.rand(60).double()
    for n_changed in (60, 3, 1, 0, 50):
        counts = counts.clone()
        counts[:n_changed] = torch.rand(n_changed).double() * (torch.rand(n_changed) > 0.3)
        curvature.follow(scale * counts)
        expected = scale * slow_moments(images, counts)
        torch.testing.assert_close(curvature.matrix, expected, rtol=1e-5, atol=0)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(1.001 * curvature.matrix, expected, rtol=1e-4, atol=0)
    before = curvature.matrix
    curvature.follow(scale * counts * 1.001)  # too little to be worth it
    assert torch.equal(curvature.matrix, before)


def test_a_descent_ends_after_so_many_steps(monkeypatch):
    task, mask, n = objective_of(), torch.rand(7).double(), []
    slopes = Objective._slopes
    monkeypatch.setattr(Objective, "_slopes", lambda *own: n.append(1) or slopes(*own))
    n_steps = []
    for most in (30, 1):
        monkeypatch.setattr(objective, "_MAX_STEPS", most)
        n.clear()
        task.solve(mask, 0.0)
        n_steps.append(len(n))
    assert n_steps[0] > n_steps[1] + 1
