"""Second moments of pooled inputs, shrunk as far as few images leave them uncertain.

An augmented input is the pooled input with the number of positions behind it, which a channel's
bias multiplies. Shapes: n images, J taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from unbraid.scanning.records import Scan

_CONSTANT = 1e-12  # part of a column's rms: a smaller spread is rounding
_LEAST_IMAGES = 3  # below which correlations say nothing
_AT_ONCE = 1024  # images whose products float32 adds up, before float64 does
_LARGE = 1e36  # variance that float32 holds
_BLOCKS, _LEAST_BLOCK = 4, 64  # of inputs, of which products of later ones with earlier are spared


@dataclass(frozen=True)
class Moment:
    """The mean outer product of augmented inputs over some images, of three parts.

    They are rows^T rows + diag(diagonal) + square; the square is there where images are more than
    inputs, so that it does not grow with them.
    """

    rows: Tensor  # (R, J + 1)
    diagonal: Tensor  # (J + 1,)
    square: Tensor | None  # (J + 1, J + 1), of the dtype of the inputs
    mean: Tensor  # (J + 1,), of the inputs
    n_images: int
    shrinkage: float  # alpha, between 0 and 1

    def times(self, x: Tensor) -> Tensor:
        """Multiply a vector, (J + 1,)."""
        product = self.rows.T @ (self.rows @ x) + self.diagonal * x
        return product if self.square is None else product + self.square.to(x) @ x


def augment(pooled: Tensor, n_positions: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Put the number of positions behind the inputs: (n, J) to (n, J + 1)."""
    inputs = pooled.new_empty((len(pooled), pooled.shape[1] + 1), dtype=dtype)
    inputs[:, :-1], inputs[:, -1] = pooled, n_positions
    return inputs


def augmented_row(scan: Scan, channel: int) -> Tensor:
    """Put a channel's bias behind its weights: (J + 1,), float64."""
    return torch.cat([scan.weight[channel], scan.bias[channel, None]]).double()


def moment(inputs: Tensor, shrink: bool = True) -> Moment:
    """The moment of one class's augmented inputs, (n, J + 1), of float32 or float64.

    The covariance is pulled to its diagonal by the estimated best alpha; the mean stays.

    Source:
        Schaefer and Strimmer 2005, Statistical Applications in Genetics and Molecular Biology 4(1).
    """
    n, n_inputs = inputs.shape
    mean = inputs.mean(0, dtype=torch.float64)
    if n > n_inputs:
        return _squared(inputs, mean, shrink)
    deviations = inputs - mean  # float64
    variance = deviations.square().mean(0)
    alpha = _shrinkage(deviations[:, :-1]) if shrink else 0.0
    rows = torch.cat([deviations * ((1 - alpha) / n) ** 0.5, mean[None]])
    return Moment(rows, alpha * variance, None, mean, n, alpha)


def _squared(inputs: Tensor, mean: Tensor, shrink: bool) -> Moment:
    """The same of more images than inputs, (n, J + 1), with their mean, (J + 1,) float64.

    Float32 is exact enough where the inputs are no more exact: a difference from the rounded mean
    is rounded once, differences are at most one long, and float64 adds up the products of some
    images at a time.
    """
    n, near = len(inputs), mean.to(inputs.dtype)
    u = inputs - near
    most = torch.maximum(u.amax(0), -u.amin(0))
    if inputs.dtype != torch.float64 and not most.isfinite().all():
        # Two numbers at either end of float32.
        return _squared(inputs.double(), mean, shrink)
    varies = _varies(most[:-1])
    counted = torch.cat([torch.where(varies, most[:-1], 0), most[-1:]])
    u.div_(torch.where(counted > 0, counted, torch.inf))
    scale = counted.double()
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for some in u.chunk(-(-n // _AT_ONCE)):
        products += products_of(some, some)
    rest = torch.where(scale > 0, (mean - near) / scale, 0)
    products.addr_(rest, rest, alpha=-n)
    alpha = _alpha_of(u[:, :-1], products[:-1, :-1]) if shrink else 0.0
    products *= scale[:, None] / n
    products *= scale
    variance = products.diagonal().clone()
    products *= 1 - alpha
    kept = products.to(inputs.dtype) if variance.amax() < _LARGE else products
    return Moment(mean[None], alpha * variance, kept, mean, n, alpha)


def _alpha_of(u: Tensor, products: Tensor) -> float:
    """Alpha of scaled deviations (n, J), zero of what does not vary, and their products (J, J)."""
    n, power = len(u), products.diagonal()
    inverse = torch.where(power > 0, 1 / power, 0)
    squares = u.square().mul_((n * inverse).to(u))  # of standardised deviations
    return _alpha(
        n,
        correlations=float(inverse @ products.square() @ inverse) - int((power > 0).sum()),
        products=float(squares.sum(1).double().square().sum()) - float(squares.norm()) ** 2,
    )


def products_of(rows: Tensor, others: Tensor) -> Tensor:
    """Others^T rows (I, I), of (N, I), where that is symmetric: half of it is copied."""
    n_inputs = rows.shape[1]
    size = max(_LEAST_BLOCK, -(-n_inputs // _BLOCKS))
    products = rows.new_empty(n_inputs, n_inputs)
    for first in range(0, n_inputs, size):
        own, behind = slice(first, first + size), slice(first + size, None)
        products[own, first:] = others[:, own].T @ rows[:, first:]
        products[behind, own] = products[own, behind].T
    return products


def _varies(spread: Tensor) -> Tensor:
    return spread > _CONSTANT * spread.amax()


def _shrinkage(deviations: Tensor) -> float:
    """Alpha of deviations from the mean, (n, J): sum of Var(r_ij) to that of r_ij^2, i != j."""
    n, spread = len(deviations), deviations.square().mean(0).sqrt()
    varies = _varies(spread)
    u = deviations[:, varies] / spread[varies]
    small = u @ u.T if n < u.shape[1] else u.T @ u  # of either the squares have the same sum
    correlations = float((small / n).square().sum()) - u.shape[1]
    products = float((u.square().sum(1).square() - u.pow(4).sum(1)).sum())
    return _alpha(n, correlations, products)


def _alpha(n: int, correlations: float, products: float) -> float:
    """The same of n images, from sums over i != j of r_ij^2 and of all images' u_i^2 u_j^2."""
    if n < _LEAST_IMAGES or correlations <= 0:
        return 1.0
    variance = n / (n - 1) ** 3 * (products - n * correlations)
    return min(max(variance / correlations, 0.0), 1.0)


def join_moments(parts: Sequence[Moment]) -> Moment:
    """The moment over the images of several classes."""
    n_images = sum(part.n_images for part in parts)
    shares = [part.n_images / n_images for part in parts]
    both = list(zip(parts, shares, strict=True))
    squares = [part.square * share for part, share in both if part.square is not None]
    return Moment(
        rows=torch.cat([part.rows * share**0.5 for part, share in both]),
        diagonal=torch.stack([part.diagonal * share for part, share in both]).sum(0),
        square=reduce(torch.add, squares) if squares else None,
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
