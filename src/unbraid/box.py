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
    return torch.stack(
        [_solve(*one, tolerance) for one in zip(hessian, linear, start.clamp(0, 1), strict=True)]
    )


def _solve(hessian: Tensor, linear: Tensor, m: Tensor, tolerance: float) -> Tensor:
    """Solve one problem, (J, J), (J,), from (J,).

    A bound that holds its unknown against the gradient drops out of the Newton system; as most
    are held, the system that is left is small.
    """
    for _ in range(_MAX_STEPS):
        if not kkt_residual(hessian[None], linear[None], m[None]) > tolerance:
            break  # also if there is no curvature at all, and so no residual
        gradient = hessian @ m - linear
        free = ~(((m <= 0) & (gradient > 0)) | ((m >= 1) & (gradient < 0)))
        factor = torch.linalg.cholesky(hessian[free][:, free])
        step = torch.zeros_like(m)
        step[free] = torch.cholesky_solve(-gradient[free, None], factor)[:, 0]
        m = _search(hessian, m, gradient, step)
    return m


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
    gradient = torch.einsum("bij,bj->bi", hessian, m) - linear
    stepped = (m - gradient / scale).clamp(0, 1)
    return (m - stepped).abs().amax(1)


def _search(hessian: Tensor, m: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
    """Halve a step until the projected point is better by enough (Armijo's rule)."""
    for _ in range(_HALVINGS):
        moved = (m + step).clamp(0, 1)
        change = moved - m
        # The exact change of the objective, without the rounding of two large values.
        rise = gradient @ change + change @ hessian @ change / 2
        if rise <= 1e-4 * (gradient @ change):
            break
        step = step / 2
    return moved
