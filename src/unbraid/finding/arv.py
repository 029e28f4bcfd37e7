"""Averaged relevance vectors (ARVs); C_out channels, T classes, G groups, J taps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from unbraid.base.progress import QUIET, Progress
from unbraid.finding.findings import Concept
from unbraid.finding.membership import Clusters, Members, relevance_for_channel
from unbraid.scanning.records import Scan


@dataclass(frozen=True)
class ClassSums:
    """Sums of a scan's records by class and, but for `n_matters`, by cluster."""

    n_images: Tensor  # (T,)
    pooled: Tensor  # (T, G, J), summed over the images of the class, float64
    n_matters: Tensor  # (tau, T, C_out), images of the class in which the channel matters


def class_sums(
    scan: Scan,
    taus: Sequence[float],
    clusters: Clusters = MappingProxyType({}),
    progress: Progress = QUIET,
) -> ClassSums:
    """Read a scan once and sum its records."""
    spec, members = scan.layer, Members(scan, clusters)
    numbers = scan.labels_seen() | set(clusters)  # a data set need not name its classes
    n_classes = max(len(scan.class_names), *(number + 1 for number in numbers), 0)
    n_images = torch.zeros(n_classes, dtype=torch.int64)
    pooled = torch.zeros(n_classes, spec.groups, spec.n_taps, dtype=torch.float64)
    matters = torch.zeros(len(taus), n_classes * spec.n_out, dtype=torch.int64)
    with progress.of("Reading the scan", scan.n_by_label.total(), "images") as advance:
        for records in scan.shards():
            n_images.index_add_(0, records.label, torch.ones_like(records.label))
            pooled.index_add_(0, records.label, records.pooled.double())
            place = records.label[records.share_image] * spec.n_out + records.share_channel
            for k, tau in enumerate(taus):
                chosen = place[records.share_value >= tau]
                matters[k].index_add_(0, chosen, torch.ones_like(chosen))
            for number in clusters:
                own = members.of(records, number)
                n_images[number] += int(own.sum())
                pooled[number] += records.pooled[own].double().sum(0)
            advance(len(records))
    return ClassSums(n_images, pooled, matters.unflatten(1, (n_classes, spec.n_out)))


def uses(sums: ClassSums, p: float) -> Tensor:
    """Which class uses which channel, (tau, T, C_out)."""
    fraction = sums.n_matters / sums.n_images.clamp(min=1).double()[:, None]
    return (fraction >= p) & (sums.n_images > 0)[:, None]


def shared_channels(users: Tensor) -> Iterator[tuple[int, list[int]]]:
    """Channels that two or more classes use, with these classes; users is (T, C_out)."""
    for channel in (users.sum(0) >= 2).nonzero()[:, 0].tolist():
        yield channel, users[:, channel].nonzero()[:, 0].tolist()


def concept_mean(sums: ClassSums, concept: Concept) -> Tensor:
    """Mean pooled input over all images of a concept's classes, (G, J)."""
    return sums.pooled[list(concept)].sum(0) / sums.n_images[list(concept)].sum()


def averaged_relevance(scan: Scan, channel: int, means: Tensor) -> Tensor:
    """ARV (..., C_in / G) for a channel, from mean pooled inputs (..., G, J)."""
    return relevance_for_channel(scan, means[..., scan.layer.group_of(channel), :], channel)


def class_cosines(scan: Scan, sums: ClassSums, channel: int, classes: Sequence[int]) -> Tensor:
    """Cosines of the ARVs of some classes at a channel, (classes, classes)."""
    chosen = list(classes)
    means = sums.pooled[chosen] / sums.n_images[chosen, None, None]
    return cosines_of(averaged_relevance(scan, channel, means))


def cosines_of(arvs: Tensor) -> Tensor:
    """Cosines of ARVs (..., n, C), as (..., n, n); 1 where there is no relevance at all."""
    norms = arvs.norm(dim=-1)
    cosines: Tensor = arvs @ arvs.mT / (norms[..., None] * norms[..., None, :])
    return cosines.clamp(-1, 1).nan_to_num(1.0)  # no relevance at all tells nothing apart


def group_classes(classes: Sequence[int], cosines: Tensor, gamma: float) -> tuple[Concept, ...]:
    """Group classes by complete linkage: within a group every two are at least gamma alike."""
    from scipy.cluster.hierarchy import fcluster, linkage  # slow to import, and seldom asked for
    from scipy.spatial.distance import squareform

    if len(classes) == 1:
        return (tuple(classes),)
    apart = 4.0  # beyond any 1 - cosine, so that rounding cannot join what gamma parts
    distances = np.where(cosines.numpy() < gamma, apart, 1 - cosines.numpy())
    numbers = fcluster(linkage(squareform(distances, checks=False), "complete"), 3.0, "distance")
    groups: dict[int, list[int]] = {}
    for label, number in zip(classes, numbers.tolist(), strict=True):
        groups.setdefault(number, []).append(label)
    return tuple(sorted(tuple(group) for group in groups.values()))
