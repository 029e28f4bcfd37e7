"""Sums of squares of inputs: symmetric matrices, kept whole or, where images are few, as rows.

With fewer images than taps the matrix of second moments is of low rank; then its rows, one per
image, say the same in less memory and are quicker to solve with. Shapes: J taps, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_REFINEMENTS = 8  # of an answer from float32; three or four are usual
_SMALLEST_REST = 1e-11  # of a system's right-hand side

MOST_ROWS = 4  # rows are quicker than a whole matrix while they are a fourth of the taps or fewer


@dataclass(frozen=True)
class Whole:
    """A symmetric positive semidefinite matrix."""

    matrix: Tensor  # (J, J)

    def times(self, x: Tensor) -> Tensor:
        """Multiply vectors, (..., J), by the matrix."""
        return x @ self.matrix

    def diagonal(self) -> Tensor:
        """Return the diagonal, (J,)."""
        return self.matrix.diagonal()

    @cached_property
    def rough(self) -> Tensor:
        """The matrix in float32, in which solving is several times as fast."""
        return self.matrix.float()

    def solve(self, x: Tensor, ridge: float | Tensor, free: Tensor, exact: bool = True) -> Tensor:
        """Solve (matrix + ridge) y = x in some unknowns alone.

        Args:
            x: (unknowns,).
            ridge: added to the diagonal; one number, or (unknowns,).
            free: (unknowns,), which they are.
            exact: or as float32 has it, in a fraction of the time.
        """
        system = _part(self.rough, free)
        system.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(system)
        if not failed:
            y = torch.cholesky_solve(x.float()[:, None], factor)[:, 0].to(x)
            for _ in range(_REFINEMENTS if exact else 0):
                spread = x.new_zeros(len(self.matrix)).index_copy(0, free, y)
                rest = x - self.times(spread)[free] - ridge * y
                if rest.norm() <= _SMALLEST_REST * x.norm():
                    return y
                y = y + torch.cholesky_solve(rest.float()[:, None], factor)[:, 0]
            if not exact:
                return y
        system = _part(self.matrix, free)
        system.diagonal().add_(ridge)
        return torch.cholesky_solve(x[:, None], torch.linalg.cholesky(system))[:, 0]


@dataclass(frozen=True)
class Rows:
    """The matrix rows^T rows."""

    rows: Tensor  # (R, J)

    def times(self, x: Tensor) -> Tensor:
        """Multiply vectors, (..., J), by the matrix."""
        return (x @ self.rows.T) @ self.rows

    def diagonal(self) -> Tensor:
        """Return the diagonal, (J,)."""
        return self.rows.square().sum(0)

    def solve(self, x: Tensor, ridge: float | Tensor, free: Tensor, exact: bool = True) -> Tensor:
        """Solve (matrix + ridge) y = x in some unknowns alone, by Woodbury's identity.

        Systems of few rows are small, so the answer is always exact.
        """
        rows = self.rows.index_select(1, free)
        scaled = rows / ridge
        system = scaled @ rows.T
        system.diagonal().add_(1)
        factor = torch.linalg.cholesky(system)
        return x / ridge - torch.cholesky_solve((scaled @ x)[:, None], factor)[:, 0] @ scaled


def _part(matrix: Tensor, chosen: Tensor) -> Tensor:
    """Choose rows and columns; quicker than indexing by two lists."""
    return matrix.index_select(0, chosen).index_select(1, chosen)


Gram = Whole | Rows


def add(parts: Sequence[Gram], weights: Sequence[float]) -> Gram:
    """Add up matrices, each times a weight of zero or more; kept as rows if those are few."""
    rows = [part.rows for part in parts if isinstance(part, Rows)]
    n_rows, size = sum(map(len, rows)), len(parts[0].diagonal())
    if len(rows) == len(parts) and n_rows * MOST_ROWS <= size:
        return Rows(torch.cat([r * w**0.5 for r, w in zip(rows, weights, strict=True)]))
    total = parts[0].diagonal().new_zeros(size, size)
    for part, weight in zip(parts, weights, strict=True):
        if isinstance(part, Rows):
            total.addmm_(part.rows.T, part.rows, alpha=weight)
        else:
            total.add_(part.matrix, alpha=weight)
    return Whole(total)


def scale(gram: Gram, row: Tensor) -> Gram:
    """Multiply the inputs by a row of weights, (J,)."""
    if isinstance(gram, Rows):
        return Rows(gram.rows * row)
    return Whole(gram.matrix * row * row[:, None])


def leading(gram: Gram, n: int) -> Gram:
    """Keep the first n inputs alone."""
    return Rows(gram.rows[:, :n]) if isinstance(gram, Rows) else Whole(gram.matrix[:n, :n])
