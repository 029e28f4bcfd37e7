"""Divide points into clusters, as many as a null model of one cluster does not explain.

A set is cut in two where the cut is real, and its parts again. Two-means finds a cut in anything,
so the cut is tested on points that it was not made from: they are projected on the line between
the two centres. If they come from one cluster, however shaped, as long as its density along the
line has a single peak, then the density half-way is at least the smaller of the densities at the
two centres. The null model is rejected where significantly fewer points lie half-way. Shapes: N
points, D dimensions, K clusters, S starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.stats import binom
from torch import Tensor

from unbraid.finding.membership import Cluster, mean_responses, relevance_for_channel
from unbraid.scanning.records import Scan

# Clusters of images that play the part of classes where concepts are sought without labels.


_N_TOP = 1000  # images of a channel
_N_STRONGEST = 10  # that tell how strong an answer can be
_LEAST_PART = 0.25  # of the way from the mean answer to the strongest
_BYTES_AT_ONCE = 1 << 30  # of pooled inputs held in memory


@dataclass(frozen=True, eq=False)
class DescribedImages:
    """The images that a channel answers to most, and what fed it there."""

    label: Tensor  # (N,)
    relevance: Tensor  # (N, C), of the input channels for the channel; never all zero
    least: float  # the smallest answer among them


def top_images(scan: Scan) -> Iterator[tuple[int, DescribedImages]]:
    """Gather the top images of every channel, as many channels at a time as memory holds.

    At most 1000 images, and only those in which the channel answers with at least a quarter of
    the way from its mean answer to its ten strongest.
    """
    channels = list(range(scan.layer.n_out))
    values, places = _strongest(scan, channels)
    if not len(values):  # no image could be read
        return
    bytes_each = scan.layer.n_taps * scan.weight.element_size() * len(values)
    at_once = max(1, _BYTES_AT_ONCE // bytes_each)
    for first in range(0, len(channels), at_once):
        part = channels[first : first + at_once]
        strong = {o: values[:, o].isfinite() for o in part}
        chosen = {o: places[strong[o], o].sort().values for o in part}
        labels, pooled = _gather(scan, chosen)
        for o in part:
            relevance = relevance_for_channel(scan, pooled[o], o)
            some = relevance.norm(dim=1) > 0
            answers = values[strong[o], o]
            # A little less, since the same answer may be rounded otherwise in another batch.
            rounding = torch.finfo(scan.weight.dtype).eps ** 0.5 * answers.abs().max()
            least = float(answers.min() - rounding)
            yield o, DescribedImages(labels[o][some], relevance[some], least)


def cluster_images(
    top: DescribedImages, channel: int, first: int
) -> tuple[dict[int, Cluster], Tensor]:
    """Cluster a channel's top images.

    Args:
        top: the images.
        channel: whose they are.
        first: number of the first cluster.

    Returns:
        The clusters by number, and the number of each image's cluster, (N,).
    """
    nearest, centres = find_clusters(F.normalize(top.relevance, dim=1))
    clusters = {first + k: Cluster(channel, k, centres, top.least) for k in range(len(centres))}
    return clusters, nearest + first


def _strongest(scan: Scan, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Strongest mean responses and their places in the scan, (n, C_out); -inf where too weak.

    Without any image, n is 0.
    """
    values = torch.zeros(0, len(channels), dtype=torch.float64)
    places = torch.zeros(0, len(channels), dtype=torch.int64)
    total, n_images = torch.zeros(len(channels), dtype=torch.float64), 0
    for records in scan.shards():
        new = mean_responses(scan, records.pooled, records.n_positions, channels)
        place = torch.arange(n_images, n_images + len(new), dtype=torch.int64)[:, None].expand_as(
            new
        )
        total += new.sum(0)
        n_images += len(new)
        values, places = torch.cat([values, new]), torch.cat([places, place])
        values, order = values.topk(min(_N_TOP, len(values)), dim=0)
        places = places.gather(0, order)
    if n_images == 0:
        return values, places
    mean, strongest = total / n_images, values[:_N_STRONGEST].mean(0)
    least = mean + _LEAST_PART * (strongest - mean)
    # Rounding must not put the mean of equal answers above them all.
    weak = values < least.minimum(values[0])
    return values.masked_fill(weak, -torch.inf), places


def _gather(
    scan: Scan, chosen: Mapping[int, Tensor]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Labels (n,) and pooled inputs (n, J) of each channel's chosen places, which are sorted."""
    labels: dict[int, list[Tensor]] = {o: [] for o in chosen}
    pooled: dict[int, list[Tensor]] = {o: [] for o in chosen}
    start = 0
    for records in scan.shards():
        bounds = torch.tensor([start, start + len(records)], dtype=torch.int64)
        for o, places in chosen.items():
            low, high = torch.searchsorted(places, bounds).tolist()
            here = places[low:high] - start
            labels[o].append(records.label[here])
            pooled[o].append(records.pooled[here, scan.layer.group_of(o)])
        start += len(records)
    return (
        {o: torch.cat(parts) for o, parts in labels.items()},
        {o: torch.cat(parts) for o, parts in pooled.items()},
    )


# Divide points into clusters, as many as a null model of one cluster does not explain.


_LEVEL = 0.01  # of the test of one cut; a divided set has had several
_SMALLEST = 8  # points in a cluster: fewer cannot be tested
_MAX_STEPS = 30
_N_STARTS = 4  # of a cut; with several equal clusters one alone often ends within a cluster
_N_TURNS = 10  # that bring the starts near the principal directions


def find_clusters(points: Tensor) -> tuple[Tensor, Tensor]:
    """Divide unit vectors into clusters.

    Deterministic: the same points in the same order give the same clusters.

    Args:
        points: (N, D), of length one.

    Returns:
        The cluster of each point, (N,), the one whose centre is nearest; and the centres, (K, D),
        of length one. K is 1 if nothing contradicts a single cluster, and 0 without points.

    >>> corners = torch.eye(4).repeat_interleave(20, 0)
    >>> find_clusters(corners)[0].bincount()
    tensor([20, 20, 20, 20])
    """
    # Shuffled, since halves that are tested must not follow an order of classes in the data set.
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    parts = [
        order[part] for part in _divide(points[order], torch.arange(len(points), dtype=torch.int64))
    ]
    centres = F.normalize(torch.stack([points[part].mean(0) for part in parts]), dim=1)
    nearest = (points @ centres.T).argmax(1)
    for _ in range(_MAX_STEPS):
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = sums.norm(dim=1, keepdim=True) == 0
        centres = torch.where(empty, centres, F.normalize(sums, dim=1))
        before, nearest = nearest, (points @ centres.T).argmax(1)
        if nearest.equal(before):
            break
    used, nearest = nearest.unique(return_inverse=True)
    return nearest, centres[used]


def chance_of_one(points: Tensor) -> float:
    """Probability that so few points lie half-way if all come from one cluster.

    Each half of the points is cut, and its cut is tested on the other half.

    Args:
        points: (N, D), in random order: the halves are every other point.

    Source:
        The exact binomial test of two windows' counts; METHOD.md section 5 asks for a null model.
    """
    halves = points[0::2], points[1::2]
    smaller = half_way = 0
    for half, other in (halves, halves[::-1]):
        side = two_means(half)
        if side.all() or not side.any():
            return 1.0
        start, line = half[~side].mean(0), half[side].mean(0) - half[~side].mean(0)
        place = (other - start) @ line / (line @ line)  # 0 at one centre, 1 at the other
        near, middle, far = (int(((place - at).abs() <= 1 / 6).sum()) for at in (0, 0.5, 1))
        half_way += middle
        smaller += min(near, far)
    return float(binom.cdf(half_way, half_way + smaller, 0.5))


def two_means(points: Tensor) -> Tensor:
    """Cut points in two where the squared distances to the parts' centres are least.

    The best of several cuts, each improved from a start across a principal direction until it
    stands.

    Args:
        points: (N, D), N at least 2.

    Returns:
        (N,), true on one side; all alike if the points do not differ.
    """
    n_points, centred = len(points), points - points.mean(0)
    sides = centred @ _principal_directions(centred) > 0  # (N, S)
    for _ in range(_MAX_STEPS):
        n_one, sums, lengths = _parts(centred, sides)
        one = n_one.float()  # whole numbers would be divided in torch's default type
        # Nearer to the one centre, sums / n_one, than to the other, -sums / (N - n_one).
        before, sides = sides, centred @ sums > lengths * (1 / one - 1 / (n_points - one)) / 2
        if sides.equal(before):
            break
    n_one, _, lengths = _parts(centred, sides)
    return sides[:, (lengths / (n_one * (n_points - n_one))).argmax()]


def _parts(centred: Tensor, sides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Size (S,), sum (D, S) and its squared length (S,) of the one part of each cut (N, S)."""
    n_one = sides.sum(0).clamp(1, len(sides) - 1)  # an empty part has sum zero, whatever its size
    sums = centred.T @ sides.to(centred.dtype)
    return n_one, sums, sums.square().sum(0)


def _principal_directions(centred: Tensor) -> Tensor:
    """Find about the directions in which points vary most, (D, S), strongest first."""
    generator = torch.Generator().manual_seed(0)  # anything that is orthogonal to none of them
    directions = torch.randn(
        centred.shape[1], _N_STARTS, generator=generator, dtype=torch.float32
    ).to(centred.dtype)
    for _ in range(_N_TURNS):
        directions = torch.linalg.qr(centred.T @ (centred @ directions))[0]
    return directions


def _divide(points: Tensor, members: Tensor) -> list[Tensor]:
    """Cut a set for as long as the parts' unity can be rejected."""
    if len(members) < 2 * _SMALLEST or chance_of_one(points[members]) >= _LEVEL:
        return [members]
    side = two_means(points[members])
    if min(int(side.sum()), int((~side).sum())) < _SMALLEST:
        return [members]
    return [*_divide(points, members[side]), *_divide(points, members[~side])]
