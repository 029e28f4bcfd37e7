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

    def system(self, ridge: float | Tensor, free: Tensor) -> WholeSystem:
        """Prepare to solve (matrix + ridge) y = x in some unknowns alone.

        Args:
            ridge: added to the diagonal; one number, or (unknowns,).
            free: (unknowns,), which they are.
        """
        part = _part(self.rough, free)
        part.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(part)
        return WholeSystem(self, ridge, free, None if failed else factor)


@dataclass(frozen=True)
class WholeSystem:
    """(matrix + ridge) y = x in some of the unknowns."""

    whole: Whole
    ridge: float | Tensor
    free: Tensor
    factor: Tensor | None  # of the matrix in float32, unless rounding makes it indefinite

    def nearly(self, x: Tensor) -> Tensor:
        """Solve as well as float32 can, in a fraction of the time."""
        if self.factor is None:
            return self.exactly(x)
        return torch.cholesky_solve(x.float()[:, None], self.factor)[:, 0].to(x)

    def exactly(self, x: Tensor) -> Tensor:
        """Solve, refining what float32 gives; in float64 throughout where that does not help."""
        y, rest = torch.zeros_like(x), x
        for _ in range(_REFINEMENTS if self.factor is not None else 0):
            y = y + self.nearly(rest)
            spread = x.new_zeros(len(self.whole.matrix)).index_copy(0, self.free, y)
            rest = x - self.whole.times(spread)[self.free] - self.ridge * y
            if rest.norm() <= _SMALLEST_REST * x.norm():
                return y
        part = _part(self.whole.matrix, self.free)
        part.diagonal().add_(self.ridge)
        return torch.cholesky_solve(x[:, None], torch.linalg.cholesky(part))[:, 0]


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

    def system(self, ridge: float | Tensor, free: Tensor) -> RowsSystem:
        """Prepare to solve (matrix + ridge) y = x in some unknowns alone."""
        rows = self.rows.index_select(1, free)
        scaled = rows / ridge
        part = scaled @ rows.T
        part.diagonal().add_(1)
        return RowsSystem(scaled, ridge, torch.linalg.cholesky(part))


@dataclass(frozen=True)
class RowsSystem:
    """(rows^T rows + ridge) y = x in some of the unknowns, by Woodbury's identity."""

    scaled: Tensor  # (R, unknowns), rows / ridge
    ridge: float | Tensor
    factor: Tensor  # (R, R), of 1 + scaled rows^T

    def nearly(self, x: Tensor) -> Tensor:
        """Solve; systems of few rows are small, so exactly."""
        return self.exactly(x)

    def exactly(self, x: Tensor) -> Tensor:
        """Solve."""
        inner = torch.cholesky_solve((self.scaled @ x)[:, None], self.factor)[:, 0]
        return x / self.ridge - inner @ self.scaled


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
