"""Concepts without labels: the images that a channel responds to most, clustered by what fed it.

Shapes: N points, D dimensions, K clusters, S starts of a cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.stats import binom
from scipy.stats.contingency import crosstab
from torch import Tensor

from unbraid.finding.arv import cosines_of, group_classes
from unbraid.finding.findings import Concept, Found, pairs_of
from unbraid.finding.membership import Cluster, mean_responses, name_of, relevance_for_channel
from unbraid.scanning.records import Scan

_N_TOP = 1000  # images of a channel
_N_STRONGEST = 10  # that tell how strong a response can be
_LEAST_PART = 0.25  # of the way from the mean response to the strongest
_BYTES_AT_ONCE = 1 << 30  # of pooled inputs held in memory
_ENOUGH = 8  # top images of a class, for it to be compared with clusters
_NAMED = 0.1  # part of a cluster's images, for a class to be named beside the largest
_LEVEL = 0.01  # of the test of one cut; a divided set has had several
_SMALLEST = 8  # points in a cluster: fewer cannot be tested
_MAX_STEPS = 30
_N_STARTS = 4  # of a cut; with several equal clusters one alone often ends within a cluster
_N_TURNS = 10  # that bring the starts near the principal directions


def search_clusters(scan: Scan, gamma: float) -> Found:
    """Cluster the top images of every channel, and compare the clusters by their ARVs."""
    found = Found()
    first = first_free(scan)
    nearest = (1.0, -1)  # lowest cosine, and channel
    for channel, top in top_images(scan):
        clusters, number = cluster_images(top, channel, first)
        if len(clusters) < 2:
            continue
        numbers = sorted(clusters)
        cosines = _cosines(top, number, numbers)
        nearest = min(nearest, (float(cosines.min()), channel))
        if not (cosines < gamma).any():
            continue
        part = [float((number == n).double().mean()) for n in numbers]
        found.pairs += pairs_of(channel, numbers, cosines, cosines < gamma, part)
        found.concepts[channel] = group_classes(numbers, cosines, gamma)
        found.clusters |= clusters
        for k, n in enumerate(numbers):
            found.names[n] = name_cluster(scan, k, top.label[number == n])
        found.agreement[channel] = _agreement(top, number, found.concepts[channel], gamma)
        first += len(numbers)
    least = math.ceil(nearest[0] * 1000) / 1000  # above the cosine as printed, it is found
    if not found.pairs and least < 1:
        told = f"channel {nearest[1]} has clusters with a cosine of {least:.3f}"
        found.hint = f"Nearest: {told}, which gamma would have to exceed."
    elif not found.pairs:
        found.hint = "No channel's top images form clusters that differ."
    return found


def adjusted_rand_index(one: Sequence[int], other: Sequence[int]) -> float:
    """Agreement of two partitions: 1 for equal ones, 0 by chance (Hubert, Arabie 1985)."""
    table = crosstab(one, other).count
    sizes = table, table.sum(1), table.sum(0), table.sum()
    together, pairs1, pairs2, every = (float((n * (n - 1) / 2).sum()) for n in sizes)
    expected = pairs1 * pairs2 / max(every, 1.0)
    most = (pairs1 + pairs2) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)


def _cosines(top: DescribedImages, number: Tensor, numbers: Sequence[int]) -> Tensor:
    return cosines_of(torch.stack([top.relevance[number == n].mean(0) for n in numbers]))


def first_free(scan: Scan) -> int:
    """The first number that is no class."""
    seen = scan.labels_seen() | {int(c) for column in scan.columns("prediction") for c in column}
    return max(len(scan.class_names), max(seen, default=-1) + 1)


def name_cluster(scan: Scan, place: int, labels: Tensor) -> str:
    """Name a cluster by the classes that it mostly holds, with their share of its images."""
    counts = labels.bincount()
    named = [
        f"{name_of(scan.class_names, c)} {int(counts[c]) / len(labels):.0%}"
        for k, c in enumerate(counts.argsort(descending=True, stable=True).tolist()[:3])
        if k == 0 or counts[c] >= _NAMED * len(labels)
    ]
    return f"cluster {place + 1} ({', '.join(named)})"


def _agreement(
    top: DescribedImages, number: Tensor, concepts: Sequence[Concept], gamma: float
) -> float:
    """Compare concepts of clusters with those that classes make of the same images."""
    labels = [int(c) for c in top.label.unique() if (top.label == c).sum() >= _ENOUGH]
    if not labels:
        return float("nan")
    groups = group_classes(labels, _cosines(top, top.label, labels), gamma)
    of_label = {c: k for k, group in enumerate(groups) for c in group}
    of_number = {n: k for k, concept in enumerate(concepts) for n in concept}
    both = zip(top.label.tolist(), number.tolist(), strict=True)
    known = [(of_label[c], of_number[n]) for c, n in both if c in of_label]
    return adjusted_rand_index(*zip(*known, strict=True))


@dataclass(frozen=True, eq=False)
class DescribedImages:
    """The images that a channel responds to most, and what fed it there."""

    label: Tensor  # (N,)
    relevance: Tensor  # (N, C), of the input channels for the channel; never all zero
    least: float  # the smallest response among them


def top_images(
    scan: Scan, channels: Sequence[int] | None = None
) -> Iterator[tuple[int, DescribedImages]]:
    """Gather the top images of channels, or all, as many channels at a time as memory holds."""
    channels = range(scan.layer.n_out) if channels is None else channels
    values, places = _strongest(scan, channels)
    if not len(values):  # no image could be read
        return
    bytes_each = scan.layer.n_taps * scan.weight.element_size() * len(values)
    at_once = max(1, _BYTES_AT_ONCE // bytes_each)
    for first in range(0, len(channels), at_once):
        some = range(first, min(first + at_once, len(channels)))
        strong = {channels[k]: values[:, k][values[:, k].isfinite()] for k in some}
        chosen = {channels[k]: places[values[:, k].isfinite(), k].sort().values for k in some}
        for o, (labels, pooled) in _gather(scan, chosen).items():
            relevance = relevance_for_channel(scan, pooled, o)
            fed = relevance.norm(dim=1) > 0
            responses = strong[o]
            # A little less, since the same response may be rounded otherwise in another batch.
            rounding = torch.finfo(scan.weight.dtype).eps ** 0.5 * responses.abs().max()
            least = float(responses.min() - rounding)
            yield o, DescribedImages(labels[fed], relevance[fed], least)


def _strongest(scan: Scan, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Strongest mean responses and their places in the scan, (n, C_out); -inf where too weak."""
    values = torch.zeros(0, len(channels), dtype=torch.float64)
    places = torch.zeros(0, len(channels), dtype=torch.int64)
    total, n_images = torch.zeros(len(channels), dtype=torch.float64), 0
    for records in scan.shards():
        new = mean_responses(scan, records.pooled, records.n_positions, channels)
        place = torch.arange(n_images, n_images + len(new), dtype=torch.int64)
        total += new.sum(0)
        n_images += len(new)
        values = torch.cat([values, new])
        places = torch.cat([places, place[:, None].expand_as(new)])
        values, order = values.topk(min(_N_TOP, len(values)), dim=0)
        places = places.gather(0, order)
    if n_images == 0:
        return values, places
    mean, strongest = total / n_images, values[:_N_STRONGEST].mean(0)
    least = mean + _LEAST_PART * (strongest - mean)
    # Rounding must not put the mean of equal responses above them all.
    weak = values < least.minimum(values[0])
    return values.masked_fill(weak, -torch.inf), places


def _gather(scan: Scan, chosen: Mapping[int, Tensor]) -> dict[int, tuple[Tensor, ...]]:
    """Labels (n,) and pooled inputs (n, J) of each channel's chosen places, which are sorted."""
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {o: [] for o in chosen}
    start = 0
    for records in scan.shards():
        end = start + len(records)
        for o, places in chosen.items():
            here = places[(places >= start) & (places < end)] - start
            pooled = records.pooled[here, scan.layer.group_of(o)]
            parts[o].append((records.label[here], pooled))
        start = end
    return {o: tuple(map(torch.cat, zip(*own, strict=True))) for o, own in parts.items()}


def cluster_images(
    top: DescribedImages, channel: int, first: int
) -> tuple[dict[int, Cluster], Tensor]:
    """Cluster a channel's images: clusters by number from `first` on; each image's, (N,)."""
    nearest, centres = find_clusters(F.normalize(top.relevance, dim=1))
    clusters = {first + k: Cluster(channel, k, centres, top.least) for k in range(len(centres))}
    return clusters, nearest + first


def find_clusters(points: Tensor) -> tuple[Tensor, Tensor]:
    """Divide unit vectors (N, D) into clusters: the nearest of each, (N,), and centres (K, D)."""
    # Shuffled, since halves that are tested must not follow an order of classes in the data set.
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    parts = _divide(points, order)
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


def _divide(points: Tensor, members: Tensor) -> list[Tensor]:
    """Cut a set for as long as the parts' unity can be rejected."""
    if len(members) < 2 * _SMALLEST or chance_of_one(points[members]) >= _LEVEL:
        return [members]
    side = two_means(points[members])
    if min(int(side.sum()), int((~side).sum())) < _SMALLEST:
        return [members]
    return [*_divide(points, members[side]), *_divide(points, members[~side])]


def chance_of_one(points: Tensor) -> float:
    """Probability that so few of (N, D) points lie half-way if all come from one cluster.

    A cut of half the points is tested on the others: those of one cluster, projected on the line
    between the centres, are at least as dense half-way as at the rarer centre.
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
    """Cut points (N, D) in two, (N,), where squared distances are least; all alike if none."""
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
    size, generator = (centred.shape[1], _N_STARTS), torch.Generator().manual_seed(0)
    # Anything that is orthogonal to none of them.
    directions = torch.randn(size, generator=generator, dtype=torch.float32).to(centred.dtype)
    for _ in range(_N_TURNS):
        directions = torch.linalg.qr(centred.T @ (centred @ directions))[0]
    return directions
