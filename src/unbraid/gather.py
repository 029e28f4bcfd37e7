"""Gather what is needed of the images of some classes or clusters, as much as memory holds.

Numbers are those of classes or clusters (`clusters.belongs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from unbraid.clusters import belongs
from unbraid.records import Records, Scan

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
