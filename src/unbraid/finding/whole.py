"""Concepts for the whole channel: beside the classes that use it, clusters of what else excites it.

Shapes: N images, D input channels, K clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.finding.arv import ClassSums, averaged_relevance, concept_mean
from unbraid.finding.clusters import first_free, name_cluster, top_images
from unbraid.finding.findings import Concept, Found
from unbraid.finding.membership import Cluster
from unbraid.scanning.records import Scan

_ALIKE = 0.45  # smallest cosine of an image with the centre of its cluster
_MOST_CLUSTERS = 8  # of a channel
_ENOUGH = 0.7  # of the images in clusters, and no more clusters are made
_SMALLEST = 8  # images of a cluster, half of them not seen when its centre was made
_N_STARTS = 4  # of a search for centres
_MAX_STEPS = 30
_N_RENEWALS = 5  # of the centres, from images alike alone


def add_clusters(scan: Scan, sums: ClassSums, found: Found) -> None:
    """Add to each channel's concepts clusters of its top images that are of no class among them.

    A cluster whose centre is as alike to a concept of classes as an image has to be to its cluster
    has that concept's cause, so it joins it.
    """
    first = first_free(scan)
    everywhere = sums.pooled.sum(0) / sums.n_images.sum()
    for channel, top in top_images(scan, sorted(found.concepts)):
        concepts = found.concepts[channel]
        named = tuple(sorted(number for concept in concepts for number in concept))
        origin = averaged_relevance(scan, channel, everywhere)
        free = ~torch.isin(top.label, torch.tensor(named, dtype=torch.int64))
        points = F.normalize(top.relevance[free] - origin, dim=1)
        centres = cover(points)
        if not len(centres):
            continue
        nearness, nearest = (points @ centres.T).max(1)
        for k in range(len(centres)):
            cluster = Cluster(channel, k, centres, top.least, origin, _ALIKE, named)
            found.clusters[first + k] = cluster
            labels = top.label[free][(nearest == k) & (nearness >= _ALIKE)]
            found.names[first + k] = name_cluster(scan, k, labels)
        arvs = [averaged_relevance(scan, channel, concept_mean(sums, c)) for c in concepts]
        directions = F.normalize(torch.stack(arvs) - origin, dim=1)
        found.concepts[channel] = _joined(concepts, centres @ directions.T, first)
        first += len(centres)


def _joined(concepts: tuple[Concept, ...], cosines: Tensor, first: int) -> tuple[Concept, ...]:
    """Concepts of classes with the clusters alike to them, then the other clusters, one by one."""
    groups = [list(concept) for concept in concepts]
    for k, (cosine, nearest) in enumerate(zip(*cosines.max(1), strict=True)):
        if cosine >= _ALIKE:
            groups[nearest].append(first + k)
        else:
            groups.append([first + k])
    return tuple(tuple(group) for group in groups)


def cover(points: Tensor) -> Tensor:
    """Centres (K, D), largest cluster first, to which most unit vectors (N, D) are alike.

    Centres are made of every other point, and counted is what is alike to them among the rest, so
    that noise has no clusters. There are as many as it takes until enough of the points are alike
    to one, or as cover most.
    """
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    half, rest = points[order[::2]], points[order[1::2]]
    best, centres = 0, points[:0]
    for n_clusters in range(1, min(_MOST_CLUSTERS, len(half)) + 1):
        tried = _renew(half, _k_means(half, n_clusters))
        counts = _counts(rest, tried)
        large = counts >= _SMALLEST / 2
        n_covered = int(counts[large].sum())
        if n_covered > best:
            best, centres = n_covered, tried[large]
        if best >= _ENOUGH * len(rest):
            break
    centres = _renew(points, centres)
    counts = _counts(points, centres)
    order = counts.argsort(descending=True, stable=True)
    return centres[order[counts[order] >= _SMALLEST]]


def _counts(points: Tensor, centres: Tensor) -> Tensor:
    """How many points are alike to each centre, and nearest to it, (K,)."""
    if not len(centres) or not len(points):
        return torch.zeros(len(centres), dtype=torch.int64)
    nearness, nearest = (points @ centres.T).max(1)
    return nearest[nearness >= _ALIKE].bincount(minlength=len(centres))


def _renew(points: Tensor, centres: Tensor) -> Tensor:
    """Move centres to the mean direction of the points that are alike to them."""
    for _ in range(_N_RENEWALS if len(centres) else 0):
        nearness, nearest = (points @ centres.T).max(1)
        alike = nearness >= _ALIKE
        centres = _mean_directions(points[alike], nearest[alike], centres)
    return centres


def _mean_directions(points: Tensor, nearest: Tensor, centres: Tensor) -> Tensor:
    sums = torch.zeros_like(centres).index_add_(0, nearest, points)
    empty = sums.norm(dim=1, keepdim=True) == 0
    return torch.where(empty, centres, F.normalize(sums, dim=1))


def _k_means(points: Tensor, n_clusters: int) -> Tensor:
    """Centres (K, D) by angle, the best of several starts far apart."""
    generator = torch.Generator().manual_seed(0)
    best, found = -torch.inf, points[:0]
    for _ in range(_N_STARTS):
        centres = points[torch.randint(len(points), (1,), generator=generator)]
        for _ in range(n_clusters - 1):
            far = (1 - (points @ centres.T).max(1).values).clamp(min=1e-12)
            centres = torch.cat([centres, points[far.multinomial(1, generator=generator)]])
        nearest = (points @ centres.T).argmax(1)
        for _ in range(_MAX_STEPS):
            centres = _mean_directions(points, nearest, centres)
            before, nearest = nearest, (points @ centres.T).argmax(1)
            if nearest.equal(before):
                break
        score = float((points @ centres.T).max(1).values.sum())
        if score > best:
            best, found = score, centres
    return found
