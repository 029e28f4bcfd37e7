"""Sums of squares of inputs: symmetric matrices, kept whole or, where images are few, as rows.

With fewer images than taps the matrix of second moments is of low rank; then its rows, one per
image, say the same in less memory and are quicker to solve with. Shapes: J taps, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

Ridge = float | Tensor
Solver = Callable[[Tensor], Tensor]

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
        """The matrix in float32."""
        return self.matrix.float()

    def solver(self, ridge: Ridge, free: Tensor, dtype: torch.dtype) -> Solver:
        """Prepare to solve (matrix + ridge) y = x in some unknowns alone.

        Args:
            ridge: added to the diagonal; one number, or (unknowns,).
            free: (unknowns,), which they are.
            dtype: to compute in; float32 is several times as fast.

        Raises:
            LinAlgError: rounding made the system indefinite.
        """
        matrix = self.matrix if dtype == torch.float64 else self.rough
        part = matrix.index_select(0, free).index_select(1, free)  # quicker than by two lists
        part.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(part)
        return lambda x: torch.cholesky_solve(x[:, None], factor)[:, 0]


@dataclass(frozen=True)
class Rows:
    """The matrix rows^T rows."""

    rows: Tensor  # (R, J)

    def times(self, x: Tensor) -> Tensor:
        """Multiply vectors, (..., J), by the matrix."""
        return (x @ self.rows.T) @ self.rows

    def diagonal(self) -> Tensor:
        """Return the diagonal, (J,)."""
        return self.squares

    @cached_property
    def squares(self) -> Tensor:
        """The diagonal, (J,)."""
        return self.rows.square().sum(0)

    @cached_property
    def rough(self) -> Tensor:
        """The rows in float32."""
        return self.rows.float()

    def solver(self, ridge: Ridge, free: Tensor, dtype: torch.dtype) -> Solver:
        """Prepare the same as `Whole.solver`, by Woodbury's identity.

        Raises:
            LinAlgError: rounding made the system indefinite.
        """
        rows = (self.rows if dtype == torch.float64 else self.rough).index_select(1, free)
        weight = ridge.to(dtype) if isinstance(ridge, Tensor) else ridge
        scaled = rows / weight
        part = scaled @ rows.T
        part.diagonal().add_(1)
        factor = torch.linalg.cholesky(part)

        def solve(x: Tensor) -> Tensor:
            return x / weight - torch.cholesky_solve((scaled @ x)[:, None], factor)[:, 0] @ scaled

        return solve


Gram = Whole | Rows


class System:
    """(gram + ridge) y = x in some of the unknowns."""

    def __init__(self, gram: Gram, ridge: Ridge, free: Tensor) -> None:
        """Prepare to solve it for several x.

        Args:
            gram: (J, J), float64.
            ridge: added to the diagonal; one number, or (unknowns,).
            free: (unknowns,), which they are.
        """
        self.gram, self.ridge, self.free = gram, ridge, free
        self.rough: Solver | None = None
        with suppress(LinAlgError):
            self.rough = gram.solver(ridge, free, torch.float32)

    def nearly(self, x: Tensor) -> Tensor:
        """Solve as well as float32 can, in a fraction of the time; x is (unknowns,)."""
        return self.exactly(x) if self.rough is None else self.rough(x.float()).to(x)

    def exactly(self, x: Tensor) -> Tensor:
        """Solve, refining what float32 gives; in float64 throughout where that does not help."""
        y, rest = torch.zeros_like(x), x
        for _ in range(_REFINEMENTS if self.rough is not None else 0):
            y = y + self.nearly(rest)
            spread = x.new_zeros(len(self.gram.diagonal())).index_copy(0, self.free, y)
            rest = x - self.gram.times(spread)[self.free] - self.ridge * y
            if rest.norm() <= _SMALLEST_REST * x.norm():
                return y
        return self.gram.solver(self.ridge, self.free, torch.float64)(x)


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
