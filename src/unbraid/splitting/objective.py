"""What a mask should minimise: a quadratic and squared errors of single images.

Shapes: N images, J taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from unbraid.splitting.box_solver import solve_box
from unbraid.splitting.silence import Images, Near

_MAX_STEPS = 30
_HALVINGS = 8
_LEAST_RIDGE = 1e-9  # of the mean curvature, so that there is one answer
_ROUGH_RIDGE = 1e-5  # part of the diagonal of what float32 gives
_UNFOLLOWED = 0.01  # part of what an image counts, by which the curvature may be off


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

    def errors(self, mask: Tensor, response: Tensor | None = None) -> Tensor:
        """Weighted errors, (N,)."""

    def near(self, mask: Tensor, response: Tensor | None = None) -> Near:
        """The same, and how they change with the mask."""


@dataclass(frozen=True)
class Beyond:
    """How far pooled responses of a concept channel go beyond bounds, up or down."""

    images: Images
    row: Tensor  # (J + 1,)
    root: Tensor  # (N,), root of what an image counts, below zero where the bound is a lower one
    bound: Tensor  # (N,)

    def errors(self, mask: Tensor, response: Tensor | None = None) -> Tensor:
        """Errors, (N,)."""
        z = self.images.respond(self.row, mask) if response is None else response
        return ((z - self.bound) * self.root).clamp(min=0)

    def near(self, mask: Tensor, response: Tensor | None = None) -> Near:
        """The same, and how they change with the mask."""
        errors = self.errors(mask, response)
        none = torch.zeros_like(errors)
        return Near(errors, torch.where(errors > 0, self.root, none), none, torch.zeros_like(mask))

    def times(self, weight: float) -> Beyond:
        """The same errors, whose squares count as much less."""
        return replace(self, root=self.root * weight**0.5)


@dataclass(frozen=True)
class Objective:
    """What one mask should minimise: m.G.m - 2 l.m plus the squared errors of terms."""

    gram: Tensor  # (J, J)
    linear: Tensor  # (J,)
    terms: Sequence[Term]

    def near(self, center: Tensor, penalty: Tensor) -> Objective:
        """The same, with a penalty (J, J) on being far from a mask."""
        return replace(self, gram=self.gram + penalty, linear=self.linear + penalty @ center)

    def value(self, mask: Tensor) -> float:
        """The objective, up to a constant."""
        response = self._respond(mask)
        errors = sum(float(term.errors(mask, response).square().sum()) for term in self.terms)
        return float(mask @ (self.gram @ mask) - 2 * self.linear @ mask) + errors

    def solve(self, mask: Tensor, gain: float) -> Tensor:
        """Go down from a mask while a step gains more than a part of the objective.

        Each step holds which errors are active, and how they change, and solves what is left. How
        they change on the whole is exact, and their curvature as float32 has it, which changes the
        way, not where it ends.
        """
        value, curvature = self.value(mask), Curvature(self.terms[0].images)
        for _ in range(_MAX_STEPS):
            gradient, nears = self._gradient(mask)
            curvature.follow(_counts(nears))
            gram = self._curved(curvature.matrix, nears)
            # So that neither rounding nor what has not been followed makes a step too long.
            gram.diagonal().add_(_ROUGH_RIDGE * (gram - self.gram).diagonal())
            ridge = _LEAST_RIDGE * float(gram.diagonal().mean())
            ridge = max(ridge, torch.finfo(gram.dtype).tiny)  # a channel that never responds
            linear = gram @ mask + ridge * mask - gradient
            change = solve_box(gram, ridge, linear, mask) - mask
            for _ in range(_HALVINGS):
                ahead = self.value(mask + change)
                if ahead < value:
                    break
                change = change / 2
            else:
                break
            mask, before, value = mask + change, value, ahead
            if before - value <= gain * abs(value):
                break
        return mask

    def residual(self, mask: Tensor) -> float:
        """How far a mask is from the nearest answer: a projected gradient step's change."""
        gradient, nears = self._gradient(mask)
        images, row = self.terms[0].images, self.terms[0].row
        diagonal = (_counts(nears) @ images.inputs.square() * row.square())[:-1]
        diagonal += self.gram.diagonal()
        for cross, near in zip(self._crosses(nears), nears, strict=True):
            diagonal += 2 * cross * near.turn
        scale = diagonal.amax().clamp(min=torch.finfo(diagonal.dtype).tiny)
        return float((mask - (mask - gradient / scale).clamp(0, 1)).abs().amax())

    def _respond(self, mask: Tensor) -> Tensor:
        """Pooled responses, (N,)."""
        return self.terms[0].images.respond(self.terms[0].row, mask)

    def _gradient(self, mask: Tensor) -> tuple[Tensor, list[Near]]:
        """Half the gradient at a mask, (J,), and the errors near it."""
        response = self._respond(mask)
        nears = [term.near(mask, response) for term in self.terms]
        pull = torch.stack([near.along * near.errors for near in nears]).sum(0)  # (N,)
        gradient = self.gram @ mask - self.linear
        gradient += (pull @ self.terms[0].images.inputs * self.terms[0].row)[:-1]
        for near in nears:
            gradient += (near.across @ near.errors) * near.turn
        return gradient, nears

    def _curved(self, moments: Tensor, nears: Sequence[Near]) -> Tensor:
        """Half the curvature near a mask, (J, J), from weighted moments of augmented inputs."""
        row = self.terms[0].row[:-1]
        gram = moments[:-1, :-1] * row[:, None]
        gram.mul_(row).add_(self.gram)
        for cross, near in zip(self._crosses(nears), nears, strict=True):
            gram.addr_(cross, near.turn).addr_(near.turn, cross)
        return gram

    def _crosses(self, nears: Sequence[Near]) -> list[Tensor]:
        """What each near's turn meets in half the curvature, (J,), once from either side."""
        images, row = self.terms[0].images, self.terms[0].row
        return [
            ((near.along * near.across) @ images.inputs * row)[:-1]
            + near.across.square().sum() / 2 * near.turn
            for near in nears
        ]


class Curvature:
    """Weighted moments of images' inputs, in float32, which follow the weights from step to step.

    Few images change sides between steps, so only those are put in and taken out.
    """

    def __init__(self, images: Images) -> None:
        """Begin without images."""
        self.images, n_inputs = images, images.inputs.shape[1]
        self.matrix = images.inputs.new_zeros(n_inputs, n_inputs)
        self.counts = images.inputs.new_zeros(len(images.inputs))

    def follow(self, counts: Tensor) -> None:
        """Go on to what images count now, (N,), but for small changes."""
        change = counts - self.counts
        changed = change.abs() > _UNFOLLOWED * torch.maximum(counts, self.counts)
        if 2 * int(changed.sum()) > int((counts > 0).sum()):
            self.matrix, self.counts = torch.zeros_like(self.matrix), torch.zeros_like(counts)
            change, changed = counts, counts > 0
        if changed.any():
            most = change[changed].abs().amax()  # or float32 could overflow
            rows, shares = self.images.rough[changed], (change[changed] / most).float()
            self.matrix = self.matrix + ((rows * shares[:, None]).T @ rows).double() * most
            self.counts = torch.where(changed, counts, self.counts)


def _counts(nears: Sequence[Near]) -> Tensor:
    """What images count in the curvature, (N,)."""
    return torch.stack([near.along.square() for near in nears]).sum(0)
