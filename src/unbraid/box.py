"""Box-constrained least squares: many small strictly convex problems at once.

    minimise  m.H.m / 2 - c.m   over  0 <= m <= 1,   H symmetric and positive definite

has one answer, and the KKT residual tells how far from it a point is. Shapes: B problems, J
unknowns.

Source: projected Newton steps, Bertsekas 1982, SIAM Journal on Control and Optimization 20(2).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_STEPS = 200
_HALVINGS = 30


def solve_box(hessian: Tensor, linear: Tensor, start: Tensor, tolerance: float = 1e-9) -> Tensor:
    """Solve B problems.

    Args:
        hessian: (B, J, J), symmetric and positive definite.
        linear: (B, J).
        start: (B, J), where to begin; the answer does not depend on it, the time does.
        tolerance: largest KKT residual of an answer.

    Returns:
        (B, J), in [0, 1].

    >>> solve_box(torch.eye(2)[None], torch.tensor([[0.3, 2.0]]), torch.zeros(1, 2))
    tensor([[0.3000, 1.0000]])
    """
    answer = start.clamp(0, 1)
    todo = torch.arange(len(answer))
    for _ in range(_MAX_STEPS):
        h, c, m = hessian[todo], linear[todo], answer[todo]
        open_ = kkt_residual(h, c, m) > tolerance
        if not open_.any():
            break
        todo, h, c, m = todo[open_], h[open_], c[open_], m[open_]
        gradient = _gradient(h, c, m)
        # A bound that holds its unknown against the gradient drops out of the Newton system.
        held = ((m <= 0) & (gradient > 0)) | ((m >= 1) & (gradient < 0))
        free = (~held).to(h)
        system = h * free[:, :, None] * free[:, None, :] + torch.diag_embed(1 - free)
        downhill = (-gradient * free).unsqueeze(-1)
        step = torch.cholesky_solve(downhill, torch.linalg.cholesky(system)).squeeze(-1)
        answer[todo] = _search(h, c, m, gradient, step)
    return answer


def kkt_residual(hessian: Tensor, linear: Tensor, m: Tensor) -> Tensor:
    """How far points are from the answer: zero exactly there.

    The gradient is divided by the largest curvature, so that the residual is in units of m.

    Args:
        hessian: (B, J, J).
        linear: (B, J).
        m: (B, J), in [0, 1].

    Returns:
        (B,), the largest change that a projected gradient step would make.
    """
    scale = hessian.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
    stepped = (m - _gradient(hessian, linear, m) / scale).clamp(0, 1)
    return (m - stepped).abs().amax(1)


def _gradient(hessian: Tensor, linear: Tensor, m: Tensor) -> Tensor:
    return torch.einsum("bij,bj->bi", hessian, m) - linear


def _search(hessian: Tensor, linear: Tensor, m: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
    """Halve each step until the projected point is better by enough (Armijo's rule)."""
    size = torch.ones(len(m), 1, dtype=m.dtype)
    for _ in range(_HALVINGS):
        moved = (m + size * step).clamp(0, 1)
        change = moved - m
        # The exact change of the objective, without the rounding of two large values.
        rise = (gradient * change).sum(1) + torch.einsum(
            "bi,bij,bj->b", change, hessian, change
        ) / 2
        enough = rise <= 1e-4 * (gradient * change).sum(1)
        if enough.all():
            break
        size = torch.where(enough[:, None], size, size / 2)
    return moved
