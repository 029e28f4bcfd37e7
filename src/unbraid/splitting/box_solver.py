"""Box-constrained least squares: small strictly convex problems.

    minimise  m.H.m / 2 - c.m   over  0 <= m <= 1,   H = gram + ridge, ridge > 0

Guessing which unknowns lie at which bound finds the answer to rounding in a few guesses. Where they
go round in circles, an interior point comes near enough for the next guess to be right. Shapes: J
unknowns, F free ones. Everything is float64.

Source: Hintermueller, Ito, Kunisch 2002, SIAM J. Optimization 13(3), primal-dual active sets;
Mehrotra 1992, SIAM J. Optimization 2(4), interior points.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

Ridge = float | Tensor  # added to the diagonal, one number or (F,)
Solver = Callable[[Tensor], Tensor]

_REFINEMENTS = 8  # of an answer from float32; three or four are usual
_SMALLEST_REST = 1e-11  # of a system's right-hand side
_PATIENCE = 5  # guesses without progress; four to ten guesses in all are usual
_MAX_STEPS = 100  # to the interior point; ten to thirty are usual
_LEAST_RIDGE = 1e-12  # of the whole curvature: with less, rounding makes the systems indefinite
_ROUGH = 1e-6  # a tolerance that float32 meets
_ROUGH_GUESSES = 12


@dataclass(frozen=True)
class Gram:
    """A Gram matrix, (J, J): symmetric and positive semidefinite."""

    matrix: Tensor

    @property
    def diagonal(self) -> Tensor:
        """The diagonal, (J,)."""
        return self.matrix.diagonal()

    @cached_property
    def rough(self) -> Gram:
        """The same in float32."""
        return Gram(self.matrix.float())

    def solver(self, ridge: Ridge, free: Tensor) -> Solver:
        """Prepare to solve (gram + ridge) y = x for free unknowns (F,); may raise LinAlgError."""
        # Quicker than by two lists.
        part = self.matrix.index_select(0, free).index_select(1, free)
        part.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(part)
        return lambda x: torch.cholesky_solve(x[:, None], factor)[:, 0]


class System:
    """(gram + ridge) y = x for some of the unknowns, to be solved for several x (F,)."""

    def __init__(self, gram: Gram, ridge: Ridge, free: Tensor) -> None:
        """Factorise in float32, which is several times as fast; free is (F,)."""
        self.gram, self.ridge, self.free = gram, ridge, free
        self._rough: Solver | None = None
        with suppress(LinAlgError):
            self._rough = gram.rough.solver(ridge, free)

    def nearly(self, x: Tensor) -> Tensor:
        """Solve as well as float32 can."""
        return self.exactly(x) if self._rough is None else self._rough(x.float()).to(x)

    def exactly(self, x: Tensor) -> Tensor:
        """Solve, refining what float32 gives; in float64 throughout where that does not help."""
        y, rest = torch.zeros_like(x), x
        for _ in range(_REFINEMENTS if self._rough is not None else 0):
            y = y + self.nearly(rest)
            spread = x.new_zeros(len(self.gram.diagonal)).index_copy(0, self.free, y)
            rest = x - (self.gram.matrix @ spread)[self.free] - self.ridge * y
            if rest.norm() <= _SMALLEST_REST * x.norm():
                return y
        return self.gram.solver(self.ridge, self.free)(x)


@dataclass(frozen=True)
class _Box:
    gram: Gram
    ridge: float
    linear: Tensor  # (J,)

    def pull(self, m: Tensor) -> Tensor:  # which way the objective falls, (J,)
        return self.linear - self.gram.matrix @ m - self.ridge * m

    def residual(self, m: Tensor) -> Tensor:
        return kkt_residual(self.gram.matrix, self.ridge, self.linear, m)


def solve_box(
    matrix: Tensor, ridge: float, linear: Tensor, start: Tensor, tolerance: float = 1e-9
) -> Tensor:
    """Solve a problem of a matrix (J, J) and linear part (J,) to a KKT residual of `tolerance`.

    The answer, (J,), does not depend on the start, (J,), the time does.
    """
    ridge = max(ridge, _LEAST_RIDGE * float(matrix.diagonal().sum()))
    box = _Box(Gram(matrix), ridge, linear)
    start = start.clamp(0, 1)
    if tolerance >= _ROUGH:
        m = _switch_roughly(box, start)
        if m is not None and box.residual(m) <= tolerance:
            return m
    m = _switch_bounds(box, start)
    if box.residual(m) > tolerance:
        inner = _interior_point(box)
        near = [inner, _switch_bounds(box, inner)]
        m = min(near, key=lambda one: float(box.residual(one)))
    return m


def kkt_residual(matrix: Tensor, ridge: float, linear: Tensor, m: Tensor) -> Tensor:
    """How far a point m (J,) is from the answer, (): a projected gradient step's change."""
    scale = (matrix.diagonal().amax() + ridge).clamp(min=torch.finfo(m.dtype).tiny)
    gradient = matrix @ m + ridge * m - linear
    return (m - (m - gradient / scale).clamp(0, 1)).abs().amax()


def _switch_bounds(box: _Box, m: Tensor) -> Tensor:
    """Guess which unknowns lie at which bound, solve for the others, and guess again, (J,)."""
    pull, bound = box.pull(m), (m == 1).to(m) - (m == 0).to(m)
    if bound.any():  # an answer to a similar problem
        bound = torch.where(bound * pull >= 0, bound, 0)
    else:
        bound = _beyond(m + pull / (box.gram.diagonal + box.ridge))
    # Exact answers to wrong guesses only where rough ones lead nowhere.
    bound, m, settled = _go_round(box, bound, m, exact=False)
    if not settled:
        m = _go_round(box, bound, m, exact=True)[1]
    return m.clamp(0, 1)


def _switch_roughly(box: _Box, m: Tensor) -> Tensor | None:
    """Guess in float32 as `_switch_bounds` does; None where that does not settle, (J,)."""
    rough = _Box(box.gram.rough, box.ridge, box.linear.float())
    pull, m = rough.pull(m.float()), m.float()
    bound = (m == 1).to(m) - (m == 0).to(m)
    bound = torch.where(bound * pull >= 0, bound, 0)
    if not bound.any():
        bound = _beyond(m + pull / (rough.gram.diagonal + rough.ridge))
    for _ in range(_ROUGH_GUESSES):
        held = (bound > 0).to(m)
        free = (bound == 0).nonzero()[:, 0]
        try:
            solve = rough.gram.solver(rough.ridge, free)
        except LinAlgError:
            return None
        m = held.index_copy(0, free, solve(rough.pull(held)[free]))
        guess = torch.where(bound * rough.pull(m) >= 0, bound, 0)
        guess[free] = _beyond(m)[free]
        if torch.equal(guess, bound):
            exact = m.double()
            rest = box.pull(exact)[free]
            return exact.index_add(0, free, solve(rest.float()).double()).clamp(0, 1)
        bound = guess
    return None


def _beyond(m: Tensor) -> Tensor:
    return (m > 1).to(m) - (m < 0).to(m)


def _go_round(box: _Box, bound: Tensor, m: Tensor, exact: bool) -> tuple[Tensor, Tensor, bool]:
    """Guess until an exact answer confirms the guess, or while ever fewer unknowns are wrong."""
    fewest, patience = len(bound) + 1, _PATIENCE
    while patience:
        held = (bound > 0).to(m)
        free = (bound == 0).nonzero()[:, 0]
        system = System(box.gram, box.ridge, free)
        pull = box.pull(held)[free]
        for solve in (system.exactly,) if exact else (system.nearly, system.exactly):
            m = held.index_copy(0, free, solve(pull))
            # Free unknowns beyond a bound go to it. Held ones that are pulled off become free.
            guess = torch.where(bound * box.pull(m) >= 0, bound, 0)
            guess[free] = _beyond(m)[free]
            n_wrong = int((guess != bound).sum())
            if n_wrong:
                break
        else:
            return bound, m, True
        patience = _PATIENCE if n_wrong < fewest else patience - 1
        fewest, bound = min(fewest, n_wrong), guess
    return bound, m, False


def _interior_point(box: _Box) -> Tensor:
    """Follow the path between the bounds nearly to the answer; lower and upper bound's rows."""
    scale = box.gram.diagonal.amax() + box.ridge
    sign = torch.tensor([[1.0], [-1.0]], dtype=box.linear.dtype)
    every = torch.arange(len(box.linear), dtype=torch.int64)
    m = torch.full_like(box.linear, 0.5)
    slack, multiplier = m.expand(2, -1), scale.expand(2, len(m))
    for _ in range(_MAX_STEPS):
        rest = box.pull(m)
        gap = (slack * multiplier).mean()
        force = (sign * multiplier).sum(0)
        if gap < 1e-13 * scale and (rest + force).abs().amax() < 1e-10 * scale:
            break
        system = System(box.gram, box.ridge + (multiplier / slack).sum(0), every)
        # The products of slack and multiplier to aim at: none, as at the answer; then, corrected
        # for what that step leaves out, those of a point on the path as far on as it would lead.
        aim = torch.zeros_like(slack)
        for _ in ("predict", "correct"):
            change = system.exactly(rest + (sign * aim / slack).sum(0))
            turn = (aim - multiplier * sign * change) / slack - multiplier
            values, changes = torch.cat([slack, multiplier]), torch.cat([sign * change, turn])
            limits = torch.where(changes < 0, -values / changes, torch.inf)
            size = min(1.0, float(limits.amin()))  # the longest step that keeps values positive
            ahead = ((slack + size * sign * change) * (multiplier + size * turn)).mean()
            aim = gap * (ahead / gap) ** 3 - sign * change * turn
        m = m + 0.995 * size * change
        slack = torch.stack([m, 1 - m])
        multiplier = multiplier + 0.995 * size * turn
    return m.clamp(0, 1)
