"""Gather what is needed of the images of some classes or clusters, as much as memory holds.

Numbers are those of classes or clusters (`clusters.belongs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from unbraid.networks.relevance import input_relevance
from unbraid.scanning.records import Records, Scan

# Clusters of images that play the part of classes where concepts are sought without labels.


def belongs(scan: Scan, records: Records, number: int) -> Tensor:
    """Say which images belong to a class or a cluster, (N,).

    Args:
        scan: that the records are of; numbers that its `clusters` do not name are classes.
        records: of N images.
        number: of a class, or of a cluster.
    """
    cluster = scan.clusters.get(number)
    if cluster is None:
        return records.label == number
    answers = mean_responses(scan, records.pooled, records.n_positions, [cluster.channel])[:, 0]
    member = answers >= cluster.least
    pooled = records.pooled[member, scan.layer.group_of(cluster.channel)]
    relevance = relevance_for_channel(scan, pooled, cluster.channel)
    nearest = (relevance @ cluster.centres.double().T).argmax(1)
    member[member.clone()] = (nearest == cluster.place) & (relevance.norm(dim=1) > 0)
    return member


def concept_of(scan: Scan, records: Records, concepts: Sequence[Sequence[int]]) -> Tensor:
    """Say which concept each image belongs to, (N,), -1 for none."""
    concept = torch.full_like(records.label, -1)
    for k, numbers in enumerate(concepts):
        for number in numbers:
            concept[belongs(scan, records, number)] = k
    return concept


def concerned(scan: Scan, numbers: Iterable[int]) -> list[int]:
    """Places in the data set of the images of some classes and clusters."""
    wanted = [tuple(numbers)]
    return [
        index
        for records in scan.shards()
        for index in records.index[concept_of(scan, records, wanted) == 0].tolist()
    ]


def numbers_seen(scan: Scan, numbers: Iterable[int]) -> set[int]:
    """Say which classes and clusters have an image in a Scan."""
    seen = scan.labels_seen()
    known = {number for number in numbers if number in scan.clusters}
    if not known:
        return seen
    for records in scan.shards():
        seen |= {number for number in known - seen if belongs(scan, records, number).any()}
    return seen


def mean_responses(
    scan: Scan, pooled: Tensor, n_positions: Tensor, channels: Sequence[int]
) -> Tensor:
    """Mean pre-activations of some channels, (N, channels), from pooled inputs (N, G, J)."""
    group = torch.tensor([scan.layer.group_of(o) for o in channels], dtype=torch.int64)
    rows, bias = scan.weight[list(channels)].double(), scan.bias[list(channels)].double()
    summed = torch.empty(len(pooled), len(rows), dtype=torch.float64)
    for g in group.unique().tolist():
        summed[:, group == g] = pooled[:, g].double() @ rows[group == g].T
    return summed / n_positions[:, None] + bias


def relevance_for_channel(scan: Scan, pooled: Tensor, channel: int) -> Tensor:
    """Relevance of the input channels, (N, C), from pooled inputs of their group, (N, J)."""
    return input_relevance(
        scan.weight[channel].double(), pooled.double(), scan.layer.taps_per_input
    )


# Gather what is needed of the images of some classes or clusters, as much as memory holds.


K = TypeVar("K")


def members(scan: Scan, records: Records, numbers: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """Give the images of each number that has some, as places in the records, in order."""
    here = set(records.label.tolist())
    for number in numbers:
        if number in here or number in scan.clusters:
            places = belongs(scan, records, number).nonzero()[:, 0]
            if len(places):
                yield number, places


def count_images(scan: Scan, numbers: Iterable[int]) -> dict[int, int]:
    """Count the images of each number; where all are classes, only labels are read."""
    counts = dict.fromkeys(numbers, 0)
    if counts.keys() & scan.clusters.keys():
        for records in scan.shards():
            for number, places in members(scan, records, counts):
                counts[number] += len(places)
    else:
        for labels in scan.columns("label"):
            for label, n in zip(*labels.unique(return_counts=True), strict=True):
                if int(label) in counts:
                    counts[int(label)] += int(n)
    return counts


def first_images(
    scan: Scan, numbers: Iterable[int], n: int, take: Callable[[Records, Tensor], Tensor]
) -> dict[int, Tensor]:
    """Take something of the first n images of each number.

    Args:
        scan: of images of all these numbers.
        numbers: of classes or clusters.
        n: images of each, at most.
        take: from records and places in them, (images, ...).

    Returns:
        By number, (images, ...).
    """
    parts: dict[int, list[Tensor]] = {number: [] for number in sorted(set(numbers))}
    missing = dict.fromkeys(parts, n)
    for records in scan.shards():
        for number, places in members(scan, records, missing):
            parts[number].append(take(records, places[: missing[number]]))
            missing[number] -= len(parts[number][-1])
        missing = {number: left for number, left in missing.items() if left}
        if not missing:
            break
    return {number: torch.cat(kept) for number, kept in parts.items()}


def portions(
    needs: Mapping[int, set[K]], n_bytes: Callable[[K], int], at_once: int
) -> Iterator[list[int]]:
    """Part channels into portions whose needs fit into memory together; each has one at least.

    Args:
        needs: of each channel.
        n_bytes: of one need, which channels share.
        at_once: bytes that may be held.

    >>> list(portions({7: {1, 2}, 8: {2}, 9: {3}}, lambda need: 10, 20))
    [[7, 8], [9]]
    """
    portion: list[int] = []
    held: set[K] = set()
    for channel, own in needs.items():
        if portion and sum(map(n_bytes, held | own)) > at_once:
            yield portion
            portion, held = [], set()
        portion.append(channel)
        held |= own
    if portion:
        yield portion
