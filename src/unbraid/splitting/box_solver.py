"""Box-constrained least squares: small strictly convex problems that share their curvature.

    minimise  m.H.m / 2 - c.m   over  0 <= m <= 1,   H = gram + ridge, ridge > 0

has one answer, and the KKT residual tells how far from it a point is. Guessing which unknowns lie
at which bound finds it to rounding in a few guesses; where these go round in circles, as they can
if inputs are much alike, an interior point comes near enough for the next guess to be right.
Shapes: K problems, J unknowns.

Source: Hintermueller, Ito, Kunisch 2002, SIAM Journal on Optimization 13(3), primal-dual active
sets; Mehrotra 1992, SIAM Journal on Optimization 2(4), interior points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

# Run many small jobs side by side, each on one processor.


Job = TypeVar("Job")
Answer = TypeVar("Answer")


def side_by_side(work: Callable[[Job], Answer], jobs: Iterable[Job]) -> list[Answer]:
    """Do the jobs on as many processors as torch may use, and return the answers in order.

    >>> side_by_side(abs, [-1, 2, -3])
    [1, 2, 3]
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            n_threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return list(pool.map(work, jobs))
    finally:
        torch.set_num_threads(n_threads)


# Sums of squares of inputs: symmetric matrices, kept whole or, where images are few, as rows.


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


# Box-constrained least squares: small strictly convex problems that share their curvature.


_PATIENCE = 5  # guesses without progress; four to ten guesses in all are usual
_MAX_STEPS = 100  # to the interior point; ten to thirty are usual
_LEAST_RIDGE = 1e-12  # of the whole curvature: with less, rounding makes the systems indefinite


def solve_box(
    gram: Gram, ridge: float, linear: Tensor, start: Tensor, tolerance: float = 1e-9
) -> Tensor:
    """Solve K problems.

    Args:
        gram: the curvature, (J, J), positive semidefinite; float64, as all that follows.
        ridge: added to its diagonal, or a trillionth of the diagonal's sum if that is more.
        linear: (K, J).
        start: (K, J), where to begin; the answer does not depend on it, the time does.
        tolerance: largest KKT residual of an answer.

    Returns:
        (K, J), in [0, 1].

    >>> from unbraid.splitting.box_solver import Whole
    >>> linear, start = torch.tensor([[0.6, 4.0]]).double(), torch.zeros(1, 2).double()
    >>> solve_box(Whole(torch.eye(2).double()), 1.0, linear, start)
    tensor([[0.3000, 1.0000]], dtype=torch.float64)
    """
    ridge = max(ridge, _LEAST_RIDGE * float(gram.diagonal().sum()))
    answers = []
    for c, m in zip(linear, start.clamp(0, 1), strict=True):
        m = _switch_bounds(gram, ridge, c, m)
        if kkt_residual(gram, ridge, c, m) > tolerance:
            inner = _interior_point(gram, ridge, c)
            near = torch.stack([inner, _switch_bounds(gram, ridge, c, inner)])
            m = near[kkt_residual(gram, ridge, c, near).argmin()]
        answers.append(m)
    return torch.stack(answers)


def kkt_residual(gram: Gram, ridge: float, linear: Tensor, m: Tensor) -> Tensor:
    """How far points are from the answer: zero exactly there.

    The gradient is divided by the largest curvature, so that the residual is in units of m.

    Args:
        gram: as of `solve_box`.
        ridge: likewise.
        linear: (..., J).
        m: (..., J), in [0, 1].

    Returns:
        (...,), the largest change that a projected gradient step would make.
    """
    scale = gram.diagonal().amax() + ridge
    gradient = gram.times(m) + ridge * m - linear
    return (m - (m - gradient / scale).clamp(0, 1)).abs().amax(-1)


def _switch_bounds(gram: Gram, ridge: float, linear: Tensor, m: Tensor) -> Tensor:
    """Guess which unknowns lie at which bound, solve for the others, and guess again from that.

    Returns:
        (J,), the answer, unless it took too many guesses in which ever as many were wrong.
    """
    pull = linear - gram.times(m) - ridge * m
    wish = m + pull / (gram.diagonal() + ridge)
    bound = (wish > 1).to(m) - (wish < 0).to(m)  # 1 for the upper, -1 for the lower, 0 for neither
    for exact in (False, True):  # exact answers to wrong guesses only where rough ones lead nowhere
        bound, m, settled = _go_round(gram, ridge, linear, bound, m, exact)
        if settled:
            break
    return m.clamp(0, 1)


def _go_round(
    gram: Gram, ridge: float, linear: Tensor, bound: Tensor, m: Tensor, exact: bool
) -> tuple[Tensor, Tensor, bool]:
    """Guess until a guess is confirmed by an exact answer, or while ever fewer are wrong.

    Returns:
        The last guess, the answer to the one before, and whether they are the same.
    """
    fewest, patience = len(bound) + 1, _PATIENCE
    while patience:
        held = (bound > 0).to(linear)
        free = (bound == 0).nonzero()[:, 0]
        system = System(gram, ridge, free)
        pull = (linear - gram.times(held) - ridge * held)[free]
        for solve in (system.exactly,) if exact else (system.nearly, system.exactly):
            m = held.index_copy(0, free, solve(pull))
            guess = _guess(bound, free, m, linear - gram.times(m) - ridge * m)
            n_wrong = int((guess != bound).sum())
            if n_wrong:
                break
        else:
            return bound, m, True
        patience = _PATIENCE if n_wrong < fewest else patience - 1
        fewest, bound = min(fewest, n_wrong), guess
    return bound, m, False


def _guess(bound: Tensor, free: Tensor, m: Tensor, pull: Tensor) -> Tensor:
    """Put the free unknowns that went beyond a bound at it, and free those that are pulled off.

    An unknown that is pulled off a bound becomes free first, however strongly it is pulled.
    """
    guess = torch.where(bound * pull >= 0, bound, 0)
    guess[free] = ((m > 1).to(m) - (m < 0).to(m))[free]
    return guess


def _interior_point(gram: Gram, ridge: float, linear: Tensor) -> Tensor:
    """Follow the path between the bounds to the answer, nearly.

    Slack and multiplier of the lower bound and of the upper one stand in the two rows of (2, J).
    """
    scale = gram.diagonal().amax() + ridge
    sign = linear.new_tensor([[1.0], [-1.0]])
    every = torch.arange(len(linear), dtype=torch.int64)
    m = torch.full_like(linear, 0.5)
    slack, multiplier = m.expand(2, -1), scale.expand(2, len(m))
    for _ in range(_MAX_STEPS):
        rest = linear - gram.times(m) - ridge * m
        gap = (slack * multiplier).mean()
        force = (sign * multiplier).sum(0)
        if gap < 1e-13 * scale and (rest + force).abs().amax() < 1e-10 * scale:
            break
        system = System(gram, ridge + (multiplier / slack).sum(0), every)
        # The products of slack and multiplier to aim at: none, as at the answer; then, corrected
        # for what that step leaves out, those of a point on the path as far on as it would lead.
        aim = torch.zeros_like(slack)
        for _ in ("predict", "correct"):
            change = system.exactly(rest + (sign * aim / slack).sum(0))
            turn = (aim - multiplier * sign * change) / slack - multiplier
            size = _longest_step(torch.cat([slack, multiplier]), torch.cat([sign * change, turn]))
            ahead = ((slack + size * sign * change) * (multiplier + size * turn)).mean()
            aim = gap * (ahead / gap) ** 3 - sign * change * turn
        m = m + 0.995 * size * change
        slack = torch.stack([m, 1 - m])
        multiplier = multiplier + 0.995 * size * turn
    return m.clamp(0, 1)


def _longest_step(values: Tensor, changes: Tensor) -> float:
    """The longest step, one at most, that keeps all values above zero."""
    limits = torch.where(changes < 0, -values / changes, torch.inf)
    return min(1.0, float(limits.amin()))
