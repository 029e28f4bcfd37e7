"""Concepts without labels: the images that a channel responds to most, clustered by what fed it.

Shapes: N images or points, C input channels, D dimensions, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.base.progress import QUIET, Progress
from unbraid.base.tables import count, percent
from unbraid.finding.arv import averaged_relevance, cosines_of, group_classes
from unbraid.finding.findings import Concept, Found
from unbraid.finding.membership import (
    Cluster,
    first_free,
    mean_responses,
    name_of,
    relevance_for_channel,
)
from unbraid.finding.pairs import pairs_of
from unbraid.scanning.records import Scan

_N_TOP = 1000  # images of a channel
_N_STRONGEST = 10  # that tell how strong a response can be
_LEAST_PART = 0.25  # of the way from the mean response to the strongest
_BYTES_AT_ONCE = 1 << 30  # of pooled inputs held in memory
_ENOUGH = 8  # top images of a class, for it to be compared with clusters
_NAMED = 0.1  # part of a cluster's images, for a class to be named beside the largest
_FEW_PLACES = 500  # of a channel, in which clusters that are there are seldom found
ALIKE = 0.45  # smallest cosine of an image with the centre of its cluster
_SHARPNESS = 4  # power of the cosines that make up a density
_MOST_CLUSTERS = 8  # of a channel
_SMALLEST = 8  # images of a cluster, half of them not seen when its centre was made
_N_RENEWALS = 8
_LOCAL = 8  # power of the cosines that tell how densely images lie
_DENSER = 1.25  # at least, how much denser than a normal cloud


def search_clusters(scan: Scan, gamma: float, progress: Progress = QUIET) -> Found:
    """Cluster the top images of every channel, and compare the clusters by their ARVs."""
    found = Found()
    first = first_free(scan)
    everywhere = mean_pooled(scan)
    nearest = (1.0, -1)  # lowest cosine, and channel
    for channel, top in top_images(scan, progress=progress):
        origin = averaged_relevance(scan, channel, everywhere)
        centres, unseen_cosine = find_clusters(top.relevance, origin)
        if len(centres) < 2:
            continue
        number = nearest_centres(directions(top.relevance, origin), centres) + first
        numbers = list(range(first, first + len(centres)))
        cosines = _cosines(top, number, numbers)
        cosine = max(float(cosines.min()), unseen_cosine)
        nearest = min(nearest, (cosine, channel))
        if cosine >= gamma:
            continue
        part = [float((number == n).double().mean()) for n in numbers]
        found.pairs += pairs_of(channel, numbers, cosines, cosines < gamma, part)
        found.concepts[channel] = group_classes(numbers, cosines, gamma)
        for k, n in enumerate(numbers):
            found.clusters[n] = Cluster(
                channel, k, centres, top.least, origin, ALIKE, places=bool(scan.manifest.places_of)
            )
            found.names[n] = name_cluster(scan, k, top.label[number == n])
        if scan.manifest.labels != "none":
            found.agreement[channel] = _agreement(top, number, found.concepts[channel], gamma)
        first += len(numbers)
    least = math.ceil(nearest[0] * 1000) / 1000  # above the cosine as printed, it is found
    if not found.pairs and least < 1:
        told = f"channel {nearest[1]} has clusters with a cosine of {least:.3f}"
        found.hint = f"Nearest: {told}, which gamma would have to exceed."
    elif not found.pairs:
        what = "strongest places" if scan.manifest.places_of else "top images"
        found.hint = f"No channel's {what} form clusters that differ."
    if not found.pairs and scan.manifest.places_of:
        found.hint += _told_of_short_lists(scan)
    return found


def _told_of_short_lists(scan: Scan) -> str:
    """Say what makes the lists of a scan of places longer, if clusters are seldom found in them."""
    n_images = len(torch.cat(list(scan.columns("image"))).unique())
    n = min(scan.manifest.places, n_images)  # of one image a list has one
    if n >= _FEW_PLACES:
        return ""
    more = [f"{_FEW_PLACES} images or more"] if n_images < _FEW_PLACES else []
    more += ["with places=1000"] if scan.manifest.places < _FEW_PLACES else []
    return f" Lists of {count(n, 'place')} are short for clusters; scan {', '.join(more)}."


def mean_pooled(scan: Scan) -> Tensor:
    """Mean pooled input of all images, (G, J); of a scan of places, of those drawn evenly."""
    layer, n_images = scan.layer, 0
    total = torch.zeros(layer.groups, layer.n_taps, dtype=torch.float64)
    for records in scan.light_shards():
        pooled = records.pooled if records.drawn is None else records.pooled[records.drawn > 0]
        total += pooled.double().sum(0)
        n_images += len(pooled)
    return total / max(n_images, 1)


def adjusted_rand_index(one: Sequence[int], other: Sequence[int]) -> float:
    """Agreement of two partitions: 1 for equal ones, 0 by chance (Hubert, Arabie 1985)."""
    from scipy.stats.contingency import crosstab  # slow to import, and seldom asked for

    table = crosstab(one, other).count
    sizes = table, table.sum(1), table.sum(0), table.sum()
    together, pairs1, pairs2, every = (float((n * (n - 1) / 2).sum()) for n in sizes)
    expected = pairs1 * pairs2 / max(every, 1.0)
    most = (pairs1 + pairs2) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)


def _cosines(top: DescribedImages, number: Tensor, numbers: Sequence[int]) -> Tensor:
    return cosines_of(torch.stack([top.relevance[number == n].mean(0) for n in numbers]))


def name_cluster(scan: Scan, place: int, labels: Tensor) -> str:
    """Name a cluster by the classes that it mostly holds, with their share of its images.

    Without labels it has its number alone.
    """
    if scan.manifest.labels == "none":
        return f"cluster {place + 1}"
    counts = labels.bincount()
    named = [
        f"{name_of(scan.class_names, c)} {percent(int(counts[c]) / len(labels))}"
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
    known = [(of_label[c], of_number[n]) for c, n in both if c in of_label and n in of_number]
    return adjusted_rand_index(*zip(*known, strict=True))


@dataclass(frozen=True, eq=False)
class DescribedImages:
    """The images that a channel responds to most, and what fed it there."""

    label: Tensor  # (N,)
    relevance: Tensor  # (N, C), of the input channels for the channel; never all zero
    least: float  # the smallest response among them


def top_images(
    scan: Scan, channels: Sequence[int] | None = None, progress: Progress = QUIET
) -> Iterator[tuple[int, DescribedImages]]:
    """Gather the top images of channels, or all, as many channels at a time as memory holds."""
    channels = range(scan.layer.n_out) if channels is None else channels
    values, places = _strongest(scan, channels, progress)
    if not len(values):  # no image could be read
        return
    bytes_each = scan.layer.n_taps * scan.weight.element_size() * len(values)
    at_once = max(1, _BYTES_AT_ONCE // bytes_each)
    with progress.of("Clustering", len(channels), "channels") as advance:
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
                advance(1)


def _strongest(scan: Scan, channels: Sequence[int], progress: Progress) -> tuple[Tensor, Tensor]:
    """Strongest mean responses and their places in the scan, (n, C_out); -inf where too weak."""
    values = torch.zeros(0, len(channels), dtype=torch.float64)
    places = torch.zeros(0, len(channels), dtype=torch.int64)
    total, n_images = torch.zeros(len(channels), dtype=torch.float64), 0
    n_even = 0  # images, or places drawn evenly, whose mean it is
    shown: tuple[Tensor, Tensor] | None = None  # group and inputs of the image before
    with progress.of("Looking for top images", scan.n_by_label.total(), "images") as advance:
        for records in scan.shards():
            new = mean_responses(scan, records.pooled, records.n_positions, channels)
            place = torch.arange(n_images, n_images + len(new), dtype=torch.int64)
            even = new if records.drawn is None else new[records.drawn > 0]
            total += even.sum(0)
            n_even += len(even)
            n_images += len(new)
            if len(records) and records.drawn is None and records.group is not None:
                own = records.group, records.pooled.flatten(1)
                new = new.masked_fill(_shown_before(*own, shown)[:, None], -torch.inf)
                shown = own[0][-1:], own[1][-1:]
            if records.kept_start is not None:  # others excite other channels most
                kept = torch.stack([records.kept_of(o) for o in channels], 1)
                new = new.masked_fill(~kept, -torch.inf)
            values = torch.cat([values, new])
            places = torch.cat([places, place[:, None].expand_as(new)])
            values, order = values.topk(min(_N_TOP, len(values)), dim=0)
            places = places.gather(0, order)
            advance(len(new))
    if n_images == 0:
        return values, places
    mean, strongest = total / max(n_even, 1), values[:_N_STRONGEST].mean(0)
    least = mean + _LEAST_PART * (strongest - mean)
    # Rounding must not put the mean of equal responses above them all.
    weak = values < least.minimum(values[0])
    return values.masked_fill(weak, -torch.inf), places


def _shown_before(group: Tensor, pooled: Tensor, before: tuple[Tensor, Tensor] | None) -> Tensor:
    """Which images (N,) are the one before them once more, as those of several labels are.

    It is of the same group, and what feeds the layer, (N, G J), is the same but for rounding.
    """
    if before is not None:
        group, pooled = torch.cat([before[0], group]), torch.cat([before[1], pooled])
    rounding = torch.finfo(pooled.dtype).eps ** 0.5 * pooled[1:].abs().amax(1)
    same = (group[1:] == group[:-1]) & ((pooled[1:] - pooled[:-1]).abs().amax(1) <= rounding)
    return same if before is not None else F.pad(same, (1, 0))


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


def find_clusters(relevance: Tensor, origin: Tensor) -> tuple[Tensor, float]:
    """Centres of clusters of images (N, C), and the lowest cosine of two clusters' ARVs.

    Centres (K, C) are made of every other image, ARVs of the rest, and only of input channels by
    which an image was not put into its cluster; so noise, which no two input channels share, has
    ARVs that are alike. Noise that they share need not have: so where images lie hardly denser than
    in a normal cloud, the cosine is 1. The order of images counts for nothing but ties.
    """
    # By responses first, so that halves are the same in any order of the data set.
    relevance = relevance[relevance.sum(1).argsort(stable=True)]
    order = torch.randperm(len(relevance), generator=torch.Generator().manual_seed(0))
    half, rest = relevance[order[::2]], relevance[order[1::2]]
    centres = cover(directions(half, origin))
    arvs, counts = torch.zeros_like(centres), torch.zeros(2, len(centres), dtype=torch.int64)
    inputs = torch.randperm(relevance.shape[1], generator=torch.Generator().manual_seed(1))
    for k, (own, others) in enumerate(((inputs[::2], inputs[1::2]), (inputs[1::2], inputs[::2]))):
        points = directions(rest[:, own], origin[own])
        nearest = nearest_centres(points, F.normalize(centres[:, own], dim=1))
        for cluster in range(len(centres)):
            images = nearest == cluster
            counts[k, cluster] = images.sum()
            arvs[cluster, others] = rest[images][:, others].mean(0)
    kept = (counts >= _SMALLEST / 2).all(0)
    lowest = float(cosines_of(arvs[kept]).min()) if kept.any() else 1.0
    if lowest < 1 and not is_denser(relevance, origin):
        lowest = 1.0
    return centres[kept], lowest


def is_denser(relevance: Tensor, origin: Tensor) -> bool:
    """Whether images (N, C) lie denser than one normal cloud of their mean and covariance."""
    mean, generator = relevance.mean(0), torch.Generator().manual_seed(2)
    size = (len(relevance), len(relevance))
    mix = torch.randn(size, generator=generator, dtype=torch.float64) / len(relevance) ** 0.5
    cloud = mean + mix @ (relevance - mean)
    return _density(directions(relevance, origin)) >= _DENSER * _density(directions(cloud, origin))


def _density(points: Tensor) -> float:
    """How alike two different unit vectors (N, D) are on average, near ones counting most."""
    alike = (points @ points.T).clamp(min=0) ** _LOCAL
    return float(alike.fill_diagonal_(0).mean())


def directions(relevance: Tensor, origin: Tensor) -> Tensor:
    """What feeds each image (N, C) other than the mean image, as unit vectors."""
    return F.normalize(relevance - origin, dim=1)


def nearest_centres(points: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre to each unit vector, (N,), and -1 where none is alike."""
    if not len(centres):
        return torch.full((len(points),), -1, dtype=torch.int64)
    nearness, nearest = (points @ centres.T).max(1)
    return torch.where(nearness >= ALIKE, nearest, -1)


def cover(points: Tensor) -> Tensor:
    """Centres (K, D), largest cluster first, of clusters of unit vectors (N, D).

    Of every other point, one around which most lie that no centre has yet becomes a centre, and all
    centres move to the mean direction of the points alike to them; and so on. Counted is what is
    alike to a centre among the other half. The number of centres is that which covers most.
    """
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    half, rest = points[order[::2]], points[order[1::2]]
    density = (half @ half.T).clamp(min=0) ** _SHARPNESS
    tried = centres = points[:0]
    best = 0
    for _ in range(_MOST_CLUSTERS):
        free = nearest_centres(half, tried) < 0
        if not free.any():
            break
        densest = (density[:, free].sum(1) * free).argmax()
        tried = _renew(half, torch.cat([tried, half[densest, None]]))
        counts = _counts(rest, tried)
        large = counts >= _SMALLEST / 2
        if counts[large].sum() > best:
            best, centres = int(counts[large].sum()), tried[large]
    centres = _renew(points, centres)
    counts = _counts(points, centres)
    order = counts.argsort(descending=True, stable=True)
    return centres[order[counts[order] >= _SMALLEST]]


def _counts(points: Tensor, centres: Tensor) -> Tensor:
    """How many points are alike to each centre, and nearest to it, (K,)."""
    return (nearest_centres(points, centres) + 1).bincount(minlength=len(centres) + 1)[1:]


def _renew(points: Tensor, centres: Tensor) -> Tensor:
    """Move centres to the mean direction of the points that are alike to them."""
    for _ in range(_N_RENEWALS):
        nearest = nearest_centres(points, centres)
        alike = nearest >= 0
        sums = torch.zeros_like(centres).index_add_(0, nearest[alike], points[alike])
        empty = sums.norm(dim=1, keepdim=True) == 0
        centres = torch.where(empty, centres, F.normalize(sums, dim=1))
    return centres
