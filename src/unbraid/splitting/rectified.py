"""Responses after a rectifier, sum over positions of max(z, 0), without input maps.

The positions of an image are taken as normal: their mean is the pooled response over the number of
positions, their variance comes from the layer's mean within-image covariance. Shapes: N images, J
taps, M positions of some images (`Scan.spread`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.splitting.silence import MARGIN, Images

_LEAST_SIGMA = 1e-6  # of the rms of mean responses


@dataclass(frozen=True)
class Shape:
    """What a channel's taps do in some images."""

    reach: Tensor  # (N, J), pooled inputs times weights
    n_positions: Tensor  # (N,)
    bias: float
    spread: Tensor  # (M, J), deviations within images times weights, over the root of M

    def respond(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rectified responses of a masked channel, (N,), and how they change with it, (N, J)."""
        response, below, density, turned = self._parts(mask)
        slopes = below[:, None] * self.reach + (self.n_positions * density)[:, None] * turned
        return response, slopes

    def responses(self, mask: Tensor) -> Tensor:
        """Rectified responses alone, (N,)."""
        return self._parts(mask)[0]

    def _parts(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean = self.reach @ mask / self.n_positions + self.bias
        deviations = self.spread @ mask
        floor = _LEAST_SIGMA * float(mean.square().mean().sqrt()) if len(mean) else 0.0
        sigma = max(float(deviations.norm()), floor, torch.finfo(mean.dtype).tiny)
        u = mean / sigma
        below = 0.5 * (1 + torch.erf(u / math.sqrt(2)))
        density = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
        response = self.n_positions * (mean * below + sigma * density)
        return response, below, density, self.spread.T @ deviations / sigma


@dataclass(frozen=True)
class Rectified:
    """Errors of rectified responses: like the whole channel's on own images, else silent."""

    shape: Shape
    target: Tensor  # (N,), of a concept's images, else the margin
    root: Tensor  # (N,), root of what an image counts
    one_sided: Tensor  # (N,), images on which only what goes beyond the margin counts

    @classmethod
    def of(
        cls,
        row: Tensor,
        images: Images,
        spread: Tensor,
        k: int,
        omega: float,
        weight: float,
        part: float = 1.0,
    ) -> Rectified:
        """Write down the errors of concept k, from the channel's weights and bias, (J + 1,).

        Silence on the images of each other concept counts a part of mimicking.
        """
        n_spread = max(1, len(spread))
        shape = Shape(
            images.inputs[:, :-1] * row[:-1],
            images.inputs[:, -1],
            float(row[-1]),
            spread * row[:-1] / n_spread**0.5,
        )
        original = shape.responses(torch.ones(len(row) - 1, dtype=torch.float64))
        tiny = torch.finfo(torch.float32).tiny
        count = torch.zeros_like(original)  # what an image counts
        for concept in images.concept.unique().tolist():
            own = images.concept == concept
            if concept >= 0:
                total = images.weight[own] @ original[own].square()
                counts = images.weight[own] / total.clamp(min=tiny)
                count[own] = counts if concept == k else part * counts
        own, rest = images.concept == k, images.concept < 0
        power = (images.weight[own] @ original[own].square()) / images.weight[own].sum()
        n_rest = images.weight[rest].sum().clamp(min=tiny)
        count[rest] = omega * images.weight[rest] / (n_rest * power.clamp(min=tiny))
        margin = MARGIN * original[own].mean()
        target = torch.where(own, original, torch.where(rest, margin, 0.0))
        return cls(shape, target, (weight * count).sqrt(), rest)

    def errors(self, mask: Tensor) -> Tensor:
        """Weighted errors, (N,)."""
        return self._from(self.shape.responses(mask))

    def active(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Errors that are not zero, and their slopes."""
        response, slopes = self.shape.respond(mask)
        errors = self._from(response)
        on = ~self.one_sided | (errors > 0)
        return errors[on], slopes[on] * self.root[on, None]

    def _from(self, response: Tensor) -> Tensor:
        errors = (response - self.target) * self.root
        return torch.where(self.one_sided, errors.clamp(min=0), errors)
