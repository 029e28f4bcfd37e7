"""Responses after a rectifier, sum over positions of max(z, 0), without input maps.

The positions of an image are taken as normal: their mean is the pooled response over the number of
positions, their variance comes from the layer's mean within-image covariance. Shapes: N images, J
taps, M positions of some images (`Scan.spread`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unbraid.scanning.records import Scan
from unbraid.splitting.silence import MARGIN, MOST, Images, Near

_LEAST_SIGMA = 1e-6  # of the rms of mean responses


@dataclass(frozen=True)
class Shape:
    """What a channel's taps do in some images."""

    images: Images
    row: Tensor  # (J + 1,), weights and bias
    spread: Tensor  # (M, J), deviations within images times weights, over the root of M

    @classmethod
    def of(cls, row: Tensor, images: Images, spread: Tensor) -> Shape:
        """Take a channel's weights and bias, (J + 1,), and deviations within images, (M, J)."""
        weights = row[:-1] / max(1, len(spread)) ** 0.5
        scaled = spread * weights.to(spread)
        return cls(images, row, scaled if _is_small(scaled) else spread.double() * weights)

    @cached_property
    def original(self) -> Tensor:
        """Rectified responses of the whole channel, (N,)."""
        return self.near(torch.ones(len(self.row) - 1, dtype=torch.float64)).errors

    def near(self, mask: Tensor, pooled: Tensor | None = None) -> Near:
        """Rectified responses of a masked channel, and how they change with it.

        `pooled` are its responses before the rectifier, where they are known already.
        """
        pooled = self.images.respond(self.row, mask) if pooled is None else pooled
        n_positions = self.images.n_positions
        mean = pooled / n_positions
        deviations = (self.spread @ mask.to(self.spread)).double()
        floor = _LEAST_SIGMA * float(mean.square().mean().sqrt()) if len(mean) else 0.0
        sigma = max(float(deviations.norm()), floor, torch.finfo(mean.dtype).tiny)
        u = mean / sigma
        below = 0.5 * (1 + torch.erf(u / math.sqrt(2)))
        density = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
        response = n_positions * (mean * below + sigma * density)
        return Near(response, below, n_positions * density, self._turn(deviations / sigma))

    def _turn(self, deviations: Tensor) -> Tensor:
        return (deviations.to(self.spread) @ self.spread).double()


def spreads_of(scan: Scan) -> list[Tensor | None]:
    """For each group of a layer, deviations with the second moment of `Scan.spread`, (M, J).

    In float32, as they are a sample, but for huge ones.
    """
    spreads = [scan.spread(group) for group in range(scan.layer.groups)]
    few = [spread if spread is None else condense(spread) for spread in spreads]
    return [own.float() if own is not None and _is_small(own) else own for own in few]


def _is_small(spread: Tensor) -> bool:
    return not spread.numel() or float(spread.abs().amax()) <= MOST


def condense(spread: Tensor) -> Tensor:
    """At most J deviations of the same second moment, from those at M positions, (M, J)."""
    n, n_taps = spread.shape
    return torch.linalg.qr(spread)[1] * (n_taps / n) ** 0.5 if n > n_taps else spread


@dataclass(frozen=True)
class Rectified:
    """Errors of rectified responses: like the whole channel's on own images, else silent."""

    shape: Shape
    target: Tensor  # (N,), of a concept's images, else the margin
    root: Tensor  # (N,), root of what an image counts
    one_sided: Tensor  # (N,), images on which only what goes beyond the margin counts

    @property
    def images(self) -> Images:
        """The N images."""
        return self.shape.images

    @property
    def row(self) -> Tensor:
        """The channel's weights and bias, (J + 1,)."""
        return self.shape.row

    @classmethod
    def of(
        cls,
        shape: Shape,
        k: int,
        omega: float,
        weight: float,
        part: float = 1.0,
    ) -> Rectified:
        """Write down the errors of concept k.

        Silence on the images of each other concept counts a part of mimicking.
        """
        images, original = shape.images, shape.original
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

    def near(self, mask: Tensor, response: Tensor | None = None) -> Near:
        """Weighted errors near a mask, and how they change with it."""
        near = self.shape.near(mask, response)
        errors = (near.errors - self.target) * self.root
        root = torch.where(self.one_sided & (errors <= 0), 0.0, self.root)
        errors = torch.where(root > 0, errors, 0.0)
        return Near(errors, near.along * root, near.across * root, near.turn)
