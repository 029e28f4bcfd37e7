"""Concepts for the whole channel: classes that use it, and clusters of what else excites it."""

from __future__ import annotations

import torch
from torch import Tensor

from unbraid.base.progress import QUIET, Progress
from unbraid.finding.arv import ClassSums, averaged_relevance, concept_mean
from unbraid.finding.clusters import (
    ALIKE,
    cover,
    directions,
    mean_pooled,
    name_cluster,
    nearest_centres,
    top_images,
)
from unbraid.finding.findings import Concept, Found
from unbraid.finding.membership import Cluster, first_free
from unbraid.scanning.records import Scan


def add_clusters(scan: Scan, sums: ClassSums, found: Found, progress: Progress = QUIET) -> None:
    """Add to each channel's concepts clusters of its top images that are of no class among them.

    A cluster whose centre is as alike to a concept of classes as an image has to be to its cluster
    has that concept's cause, so it joins it.
    """
    first = first_free(scan)
    everywhere = mean_pooled(scan)
    for channel, top in top_images(scan, sorted(found.concepts), progress):
        concepts = found.concepts[channel]
        named = tuple(sorted(number for concept in concepts for number in concept))
        origin = averaged_relevance(scan, channel, everywhere)
        free = ~torch.isin(top.label, torch.tensor(named, dtype=torch.int64))
        points = directions(top.relevance[free], origin)
        centres = cover(points)
        if not len(centres):
            continue
        nearest = nearest_centres(points, centres)
        for k in range(len(centres)):
            cluster = Cluster(channel, k, centres, top.least, origin, ALIKE, named)
            found.clusters[first + k] = cluster
            found.names[first + k] = name_cluster(scan, k, top.label[free][nearest == k])
        arvs = [averaged_relevance(scan, channel, concept_mean(sums, c)) for c in concepts]
        cosines = centres @ directions(torch.stack(arvs), origin).T
        found.concepts[channel] = _joined(concepts, cosines, first)
        first += len(centres)


def _joined(concepts: tuple[Concept, ...], cosines: Tensor, first: int) -> tuple[Concept, ...]:
    """Concepts of classes with the clusters alike to them, then the other clusters, one by one."""
    groups = [list(concept) for concept in concepts]
    for k, (cosine, nearest) in enumerate(zip(*cosines.max(1), strict=True)):
        if cosine >= ALIKE:
            groups[nearest].append(first + k)
        else:
            groups.append([first + k])
    return tuple(tuple(group) for group in groups)
