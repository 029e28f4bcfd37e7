"""What a mask should minimise: a quadratic and squared errors of single images.

Shapes: N images, J taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from unbraid.splitting.box_solver import solve_box
from unbraid.splitting.conjugate import Common, step_in_box
from unbraid.splitting.moments import products_of
from unbraid.splitting.silence import Images, Near

_MAX_STEPS = 30
_HALVINGS = 8
_LEAST_RIDGE = 1e-9  # of the mean curvature, so that there is one answer
_ROUGH_RIDGE = 1e-5  # part of the diagonal of what float32 gives
_STILL = 300.0  # times the least gain: a step that would move no tap further is not taken
_NEAR = 1e-6  # KKT residual of a step, whose curvature is no more exact
_BLURRED = 1e4  # times a diagonal: of a larger one, taken out again, rounding is left
UNSOLVED = 0.1  # KKT residual of masks that are no answer
_UNFOLLOWED = 0.1  # part of what an image counts, by which the curvature may be off


class Term(Protocol):
    """Errors of single images, beyond the quadratic, whose squares count.

    `response` is what the images give on the whole with a mask, where it is known already.
    """

    @property
    def images(self) -> Images:
        """The N images, the same of all terms."""

    @property
    def row(self) -> Tensor:
        """The channel's weights and bias, (J + 1,)."""

    def near(self, mask: Tensor, response: Tensor | None = None) -> Near:
        """Weighted errors near a mask, and how they change with it."""


@dataclass(frozen=True)
class Beyond:
    """How far pooled responses of a concept channel go beyond bounds, up or down."""

    images: Images
    row: Tensor  # (J + 1,)
    root: Tensor  # (N,), root of what an image counts, below zero where the bound is a lower one
    bound: Tensor  # (N,)

    def near(self, mask: Tensor, response: Tensor | None = None) -> Near:
        """Errors near a mask, and how they change with it."""
        z = self.images.respond(self.row, mask) if response is None else response
        errors = ((z - self.bound) * self.root).clamp(min=0)
        none = torch.zeros_like(errors)
        return Near(errors, torch.where(errors > 0, self.root, none), none, torch.zeros_like(mask))

    def times(self, weight: float) -> Beyond:
        """The same errors, whose squares count as much less."""
        return replace(self, root=self.root * weight**0.5)


@dataclass(frozen=True)
class Background:
    """Pooled responses of a concept channel, of either sign, to images of no concept."""

    images: Images
    row: Tensor  # (J + 1,)
    root: Tensor  # (N,), root of what an image counts

    def near(self, mask: Tensor, response: Tensor | None = None) -> Near:
        """Errors near a mask, and how they change with it."""
        z = self.images.respond(self.row, mask) if response is None else response
        return Near(z * self.root, self.root, torch.zeros_like(z), torch.zeros_like(mask))

    def diagonal(self) -> Tensor:
        """Of half the curvature, (J,)."""
        return diagonal_of(self.images, self.row, self.root.square())

    def times(self, weight: float) -> Background:
        """The same errors, whose squares count as much less."""
        return replace(self, root=self.root * weight**0.5)


@dataclass(frozen=True)
class Objective:
    """What one mask should minimise: m.G.m - 2 l.m plus the squared errors of terms."""

    gram: Tensor  # (J, J)
    linear: Tensor  # (J,)
    terms: Sequence[Term]

    @cached_property
    def rough_gram(self) -> Tensor:
        """The quadratic's matrix in float32."""
        return self.gram.float()

    def value(self, mask: Tensor) -> float:
        """The objective, up to a constant."""
        return self.at(mask).value

    def solve(self, mask: Tensor, gain: float) -> tuple[Tensor, float]:
        """Go down from a mask as `descend` does; the second answer is the residual there."""
        return descend([self], [mask], gain)[0]

    def descend(self, point: Point, common: Common | None, gain: float) -> tuple[Tensor, float]:
        """Go down from a point while a step gains more than a part of the objective.

        Each step holds which errors are active, and how they change, and nearly solves what is
        left. Where that leads nowhere, the curvature is written down and solved by. May raise
        LinAlgError, far from an answer.
        """
        curvature = Curvature(self.terms[0].images)
        for _ in range(_MAX_STEPS):
            gradient, crosses = self._slopes(point, common)
            ahead = None
            if common is not None:
                if common.moves(point.mask, gradient) <= _STILL * gain:
                    break
                turns = [
                    (cross, near.turn)
                    for cross, near in zip(crosses, point.nears, strict=True)
                    if cross.any()
                ]
                times = common.product(self.rough_gram, counts_of(point.nears), turns)
                reached = step_in_box(times, common.inverse, gradient, point.mask)
                ahead = self._lower(point, reached - point.mask, common)
            if ahead is None:
                curvature.follow(counts_of(point.nears))
                gram = self._curved(curvature.matrix, point.nears, crosses)
                if curvature.is_blurred(gram.diagonal(), self.terms[0].row):
                    curvature = Curvature(self.terms[0].images)
                    curvature.follow(counts_of(point.nears))
                    gram = self._curved(curvature.matrix, point.nears, crosses)
                try:
                    ahead = self._lower(point, self._exact_step(point, gradient, gram), common)
                except LinAlgError:  # numbers too far apart in size to go on
                    if self._residual(point, common) > UNSOLVED:
                        raise
            if ahead is None:
                break
            before, point = point.value, ahead
            if before - point.value <= gain * abs(point.value):
                break
        return point.mask, self._residual(point, common)

    def _exact_step(self, point: Point, gradient: Tensor, gram: Tensor) -> Tensor:
        """The change of the mask, (J,), to where the model of a curvature (J, J) is least."""
        # So that neither rounding nor what has not been followed makes a step too long.
        gram.diagonal().add_(_ROUGH_RIDGE * (gram.diagonal() - self.gram.diagonal()))
        ridge = _LEAST_RIDGE * float(gram.diagonal().mean())
        ridge = max(ridge, torch.finfo(gram.dtype).tiny)  # a channel that never responds
        linear = gram @ point.mask + ridge * point.mask - gradient
        return solve_box(gram, ridge, linear, point.mask, _NEAR) - point.mask

    def _lower(self, point: Point, change: Tensor, common: Common | None) -> Point | None:
        """Where a change of the mask, or half or less of it, leads down; None if it does not."""
        for _ in range(_HALVINGS):
            ahead = self.at(point.mask + change, common)
            if ahead.value < point.value:
                return ahead
            change = change / 2
        return None

    def residual(self, mask: Tensor) -> float:
        """How far a mask is from the nearest answer: a projected gradient step's change."""
        return self._residual(self.at(mask))

    def _residual(self, point: Point, common: Common | None = None) -> float:
        gradient, crosses = self._slopes(point, common)
        images, row = self.terms[0].images, self.terms[0].row
        diagonal = self.gram.diagonal() + diagonal_of(images, row, counts_of(point.nears))
        for cross, near in zip(crosses, point.nears, strict=True):
            diagonal += 2 * cross * near.turn
        return _moved(point.mask, gradient, float(diagonal.amax()))

    def at(self, mask: Tensor, common: Common | None = None) -> Point:
        """What the objective and its errors are at a mask, in float32 if something is common."""
        if common is None:
            response = self.terms[0].images.respond(self.terms[0].row, mask)
        else:
            response = common.respond(mask)
        nears = [term.near(mask, response) for term in self.terms]
        held = self.gram @ mask
        errors = sum(float(near.errors.square().sum()) for near in nears)
        return Point(mask, held, nears, float(mask @ (held - 2 * self.linear)) + errors)

    def _slopes(self, point: Point, common: Common | None = None) -> tuple[Tensor, Tensor]:
        """Half the gradient, (J,), and what each near's turn meets in half the curvature, (T, J).

        The latter is to be taken once from either side.
        """
        images, row = self.terms[0].images, self.terms[0].row

        def met(pull: Tensor) -> Tensor:
            return (pull @ images.inputs * row)[:-1] if common is None else common.gather(pull)

        pulls = torch.stack([near.along * near.errors for near in point.nears])
        gradient = point.held - self.linear + met(pulls.sum(0))
        crosses = torch.zeros(len(point.nears), len(gradient), dtype=gradient.dtype)
        for cross, near in zip(crosses, point.nears, strict=True):
            if near.across.any():
                gradient += (near.across @ near.errors) * near.turn
                cross.copy_(met(near.along * near.across))
                cross.add_(near.turn, alpha=float(near.across.square().sum()) / 2)
        return gradient, crosses

    def _curved(self, moments: Tensor, nears: Sequence[Near], crosses: Tensor) -> Tensor:
        """Half the curvature near a mask, (J, J), from weighted moments of augmented inputs."""
        row = self.terms[0].row[:-1]
        gram = moments[:-1, :-1] * row[:, None]
        gram.mul_(row).add_(self.gram)
        for cross, near in zip(crosses, nears, strict=True):
            gram.addr_(cross, near.turn).addr_(near.turn, cross)
        return gram


@dataclass(frozen=True)
class Point:
    """A mask, and what an objective is there."""

    mask: Tensor  # (J,)
    held: Tensor  # (J,), the quadratic's matrix times the mask
    nears: Sequence[Near]
    value: float


def descend(
    objectives: Sequence[Objective], masks: Sequence[Tensor], gain: float
) -> list[tuple[Tensor, float]]:
    """Go down from a mask each, and tell the residual of each answer.

    The objectives are those of one channel, of about the same curvature: what it takes to invert
    one is spared for the others.
    """
    points = [own.at(mask) for own, mask in zip(objectives, masks, strict=True)]
    counts = torch.stack([counts_of(point.nears) for point in points]).mean(0)
    first = objectives[0].terms[0]
    common = Common.of(first.images, first.row, objectives[0].gram, counts)
    return [own.descend(point, common, gain) for own, point in zip(objectives, points, strict=True)]


class Curvature:
    """Weighted moments of images' inputs, in float32, which follow the weights from step to step.

    Few images change sides between steps, so only those are put in and taken out.
    """

    def __init__(self, images: Images) -> None:
        """Begin without images."""
        self.images, n_inputs = images, images.inputs.shape[1]
        self.matrix = images.inputs.new_zeros(n_inputs, n_inputs)
        self.counts = images.inputs.new_zeros(len(images.inputs))
        self._most = self.matrix.diagonal()  # so far

    def follow(self, counts: Tensor) -> None:
        """Go on to what images count now, (N,), but for small changes."""
        change = counts - self.counts
        changed = change.abs() > _UNFOLLOWED * torch.maximum(counts, self.counts)
        if 2 * int(changed.sum()) > int((counts > 0).sum()):
            self.matrix, self.counts = torch.zeros_like(self.matrix), torch.zeros_like(counts)
            self._most = self.matrix.diagonal()
            change, changed = counts, counts > 0
        if changed.any():
            self.matrix = self.matrix + weighted_moments(self.images, change * changed)
            self.counts = torch.where(changed, counts, self.counts)
            self._most = torch.maximum(self._most, self.matrix.diagonal())

    def is_blurred(self, diagonal: Tensor, row: Tensor) -> bool:
        """Whether images that count no more may have left more rounding than a diagonal, (J,)."""
        return bool(((self._most * row.square())[:-1] > _BLURRED * diagonal).any())


def weighted_moments(images: Images, weights: Tensor) -> Tensor:
    """Weighted second moments of augmented inputs, (J + 1, J + 1), as float32 has them."""
    some = weights.nonzero()[:, 0]
    most = weights.abs().amax()  # or float32 could overflow
    rows, shares = images.rough[some], (weights[some] / most).float()
    return products_of(rows, rows * shares[:, None]).double() * (most * images.unit**2)


def diagonal_of(images: Images, row: Tensor, counts: Tensor) -> Tensor:
    """The diagonal of half the curvature that images bring about who count so much, (J,)."""
    most = counts.amax().clamp(min=torch.finfo(counts.dtype).tiny)
    squares = ((counts / most).float() @ images.squares).double() * (most * images.unit**2)
    return (squares * row.square())[:-1]


def _moved(mask: Tensor, gradient: Tensor, steepest: float) -> float:
    """How far a projected gradient step moves a mask, at most in any tap."""
    scale = max(steepest, torch.finfo(gradient.dtype).tiny)
    return float((mask - (mask - gradient / scale).clamp(0, 1)).abs().amax())


def counts_of(nears: Sequence[Near]) -> Tensor:
    """What images count in the curvature, (N,)."""
    return torch.stack([near.along.square() for near in nears]).sum(0)
