"""Second moments of pooled inputs, shrunk as far as few images leave them uncertain.

An augmented input is the pooled input with the number of positions behind it, which a channel's
bias multiplies. Shapes: n images, J taps. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.scanning.records import Scan

_CONSTANT = 1e-12  # part of a column's rms: a smaller spread is rounding
_LEAST_IMAGES = 3  # below which correlations say nothing


@dataclass(frozen=True)
class Moment:
    """The mean outer product of augmented inputs over some images: rows^T rows + diag(diagonal)."""

    rows: Tensor  # (R, J + 1)
    diagonal: Tensor  # (J + 1,)
    mean: Tensor  # (J + 1,), of the inputs
    n_images: int
    shrinkage: float  # alpha, between 0 and 1

    def times(self, x: Tensor) -> Tensor:
        """Multiply a vector, (J + 1,)."""
        return self.rows.T @ (self.rows @ x) + self.diagonal * x


def augment(pooled: Tensor, n_positions: Tensor) -> Tensor:
    """Put the number of positions behind the inputs: (n, J) to (n, J + 1), float64."""
    return torch.cat([pooled.double(), n_positions.double()[:, None]], 1)


def augmented_row(scan: Scan, channel: int) -> Tensor:
    """Put a channel's bias behind its weights: (J + 1,), float64."""
    return torch.cat([scan.weight[channel], scan.bias[channel, None]]).double()


def moment(inputs: Tensor, shrink: bool = True) -> Moment:
    """The moment of one class's augmented inputs, (n, J + 1).

    The covariance is pulled to its diagonal by the estimated best alpha; the mean stays.

    Source:
        Schaefer and Strimmer 2005, Statistical Applications in Genetics and Molecular Biology 4(1).
    """
    mean = inputs.mean(0)
    deviations = inputs - mean
    alpha = _shrinkage(deviations[:, :-1]) if shrink else 0.0
    rows = torch.cat([deviations * ((1 - alpha) / len(inputs)) ** 0.5, mean[None]])
    return Moment(rows, alpha * deviations.square().mean(0), mean, len(inputs), alpha)


def _shrinkage(deviations: Tensor) -> float:
    """Alpha of deviations from the mean, (n, J): sum of Var(r_ij) to that of r_ij^2, i != j."""
    n = len(deviations)
    spread = deviations.square().mean(0).sqrt()
    varies = spread > _CONSTANT * spread.amax()
    if n < _LEAST_IMAGES or not varies.any():
        return 1.0
    u = deviations[:, varies] / spread[varies]
    small = u @ u.T if n < u.shape[1] else u.T @ u  # of either the squares have the same sum
    correlations = float((small / n).square().sum()) - u.shape[1]
    products = float((u.square().sum(1).square() - u.pow(4).sum(1)).sum())
    variance = n / (n - 1) ** 3 * (products - n * correlations)
    return min(max(variance / correlations, 0.0), 1.0) if correlations > 0 else 1.0


def join_moments(parts: Sequence[Moment]) -> Moment:
    """The moment over the images of several classes."""
    n_images = sum(part.n_images for part in parts)
    shares = [part.n_images / n_images for part in parts]
    both = list(zip(parts, shares, strict=True))
    return Moment(
        rows=torch.cat([part.rows * share**0.5 for part, share in both]),
        diagonal=torch.stack([part.diagonal * share for part, share in both]).sum(0),
        mean=torch.stack([part.mean * share for part, share in both]).sum(0),
        n_images=n_images,
        shrinkage=sum(part.shrinkage * share for part, share in both),
    )


class RowPrior:
    """What rows of this layer look like: lambda (m - 1/K)' Q (m - 1/K) asks masks to agree."""

    def __init__(self, scan: Scan) -> None:
        """Invert, for every group of the layer, the mean outer product of its rows."""
        self.inverses: list[Tensor] = []
        self.rows = scan.weight.double()
        self.n_per_group = scan.layer.n_out // scan.layer.groups
        for rows in self.rows.split(self.n_per_group):
            total = rows.T @ rows
            total.diagonal().add_(0.1 * float(total.diagonal().mean()) or 1.0)
            self.inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(total)))

    def matrix(self, channel: int) -> Tensor:
        """Q (J, J) of a channel, of mean diagonal 1, from the layer's other rows."""
        row, inverse = self.rows[channel], self.inverses[channel // self.n_per_group]
        turned = inverse @ row
        others = inverse + torch.outer(turned, turned) / (1 - row @ turned)
        q = others * torch.outer(row, row)
        scale = float(q.diagonal().mean())
        return q / scale if scale > 0 else torch.eye(len(row), dtype=torch.float64)
