"""Divide points into clusters, as many as a null model of one cluster does not explain.

A set is cut in two where the cut is real, and its parts again. Two-means finds a cut in anything,
so the cut is tested on points that it was not made from: they are projected on the line between
the two centres. If they come from one cluster, however shaped, as long as its density along the
line has a single peak, then the density half-way is at least the smaller of the densities at the
two centres. The null model is rejected where significantly fewer points lie half-way. Shapes: N
points, D dimensions, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.stats import binom
from torch import Tensor

_LEVEL = 0.01  # of the test of one cut; a divided set has had several
_SMALLEST = 8  # points in a cluster: fewer cannot be tested
_MAX_STEPS = 30


@dataclass(frozen=True, eq=False)
class Cluster:
    """Images in which a channel answers for one cause."""

    channel: int
    place: int  # among the clusters of the channel
    centres: Tensor  # (K, C), of all clusters of the channel, in relevance, of length one
    least: float  # smallest answer of an image, mean pre-activation


Clusters = Mapping[int, Cluster]  # by number


def find_clusters(points: Tensor) -> tuple[Tensor, Tensor]:
    """Divide unit vectors into clusters.

    Deterministic: halves for testing are every other point, cuts start from the first principal
    direction.

    Args:
        points: (N, D), of length one.

    Returns:
        The cluster of each point, (N,), the one whose centre is nearest; and the centres, (K, D),
        of length one. K is 1 if nothing contradicts a single cluster.

    >>> corners = torch.eye(4).repeat_interleave(20, 0)
    >>> find_clusters(corners)[0].bincount()
    tensor([20, 20, 20, 20])
    """
    parts = _divide(points, torch.arange(len(points)))
    centres = F.normalize(torch.stack([points[part].mean(0) for part in parts]), dim=1)
    nearest = (points @ centres.T).argmax(1)
    for _ in range(_MAX_STEPS):
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = sums.norm(dim=1, keepdim=True) == 0
        centres = torch.where(empty, centres, F.normalize(sums, dim=1))
        before, nearest = nearest, (points @ centres.T).argmax(1)
        if nearest.equal(before):
            break
    return nearest, centres


def chance_of_one(points: Tensor) -> float:
    """Probability that so few points lie half-way if all come from one cluster.

    Each half of the points is cut, and its cut is tested on the other half.

    Args:
        points: (N, D).

    Source:
        The exact binomial test of two windows' counts; METHOD.md section 5 asks for a null model.
    """
    halves = points[0::2], points[1::2]
    counts = torch.zeros(3)  # near one centre, half-way, near the other
    first: Tensor | None = None
    for half, other in (halves, halves[::-1]):
        side = two_means(half)
        if side.all() or not side.any():
            return 1.0
        start, line = half[~side].mean(0), half[side].mean(0) - half[~side].mean(0)
        if first is None:
            first = line
        elif first @ line < 0:  # name the sides alike in both halves
            start, line = start + line, -line
        place = (other - start) @ line / (line @ line)  # 0 at one centre, 1 at the other
        counts += torch.stack([((place - at).abs() <= 1 / 6).sum() for at in (0, 0.5, 1)])
    smaller, half_way = float(counts[[0, 2]].min()), float(counts[1])
    return float(binom.cdf(half_way, half_way + smaller, 0.5))


def two_means(points: Tensor) -> Tensor:
    """Cut points in two where the squared distances to the parts' centres are least.

    Args:
        points: (N, D).

    Returns:
        (N,), true on one side; all false if the points do not differ.
    """
    centred = points - points.mean(0)
    direction = centred[centred.norm(dim=1).argmax()]
    for _ in range(_MAX_STEPS):
        direction = F.normalize(centred.T @ (centred @ direction), dim=0)
    side = centred @ direction > 0
    for _ in range(_MAX_STEPS):
        if side.all() or not side.any():
            break
        line = centred[side].mean(0) - centred[~side].mean(0)
        middle = (centred[side].mean(0) + centred[~side].mean(0)) / 2
        before, side = side, (centred - middle) @ line > 0
        if side.equal(before):
            break
    return side


def _divide(points: Tensor, members: Tensor) -> list[Tensor]:
    """Cut a set for as long as the parts' unity can be rejected."""
    if len(members) < 2 * _SMALLEST or chance_of_one(points[members]) >= _LEVEL:
        return [members]
    side = two_means(points[members])
    if min(int(side.sum()), int((~side).sum())) < _SMALLEST:
        return [members]
    return [*_divide(points, members[side]), *_divide(points, members[~side])]
