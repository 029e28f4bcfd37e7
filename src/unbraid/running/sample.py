"""Which images a run looks at again after its scans: a bounded sample, the same whoever draws it.

Half of it are images of the concepts, the same number of each concept as far as there are so many;
the other half is drawn from all others. docs/scale.md says what is done on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbraid.finding.findings import Concept, Findings
from unbraid.measuring.reference_images import ALIKE, reference_images
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import Split

LEAST, MOST, PART = 1000, 5000, 10  # images of a set: one in so many, at least and at most
MAX_BYTES = 2**31  # of positions on disk, of a set


def size_of_sample(n_images: int) -> int:
    """How many images of a set are looked at again.

    >>> [size_of_sample(n) for n in (400, 3_000, 20_000, 1_281_167)]
    [400, 1000, 2000, 5000]
    """
    return min(n_images, max(LEAST, min(MOST, n_images // PART)))


def bytes_of_positions(scan: Scan) -> int:
    """About how many bytes the layer's input takes of one image."""
    n_positions = next((int(n[0]) for n in scan.columns("n_positions") if len(n)), 1)
    size = torch.empty(0, dtype=getattr(torch, scan.manifest.dtype)).element_size()
    apart = math.prod(scan.layer.stride)
    n_inputs = -(-n_positions // apart) if scan.layer.transposed else n_positions * apart
    return size * scan.layer.n_in * n_inputs


def n_with_positions(scan: Scan) -> int:
    """How many images' positions are kept: a sample's, if its bytes are within bounds."""
    return min(
        size_of_sample(scan.manifest.n_images), max(1, MAX_BYTES // bytes_of_positions(scan))
    )


def by_cosine(found: Findings) -> list[int]:
    """The channels, lowest cosine first, as time or room may not be enough for all."""
    first = dict.fromkeys(pair.channel for pair in found.pairs)
    return list(first | dict.fromkeys(found.channels))


def draw_sample(scan: Scan, found: Findings, places: Scan | None = None) -> list[int] | None:
    """Indices of a sample of a scan's images, half of them of concepts; None for all images.

    Concepts may be of places of these images, whose scan then is `places`.
    """
    n = size_of_sample(scan.manifest.n_images)
    if n == scan.manifest.n_images:
        return None
    chosen = in_balance(places or scan, found, n // 2)
    if places is not None and places.manifest.places_of:
        image = torch.cat(list(places.columns("image")))
        chosen = image[chosen].unique().tolist()
    index = torch.cat(list(scan.columns("index")))
    others = index[~torch.isin(index, torch.tensor(chosen, dtype=torch.int64))]
    return sorted([*chosen, *_first(others, n - len(chosen)).tolist()])


def concerned_in(scan: Scan, found: Findings) -> dict[str, Any]:
    """Say which images are of concepts, as `unbraid.scan` takes it."""
    if scan.manifest.labels == "predicted" or found.clusters:
        return {"indices": found.members_in(scan).indices(found.classes)}
    seen = scan.labels_seen()
    return {"classes": [label for label in found.classes if label in seen]}


def choose_for_positions(scan: Scan, found: Findings, split: Split | None = None) -> dict[str, Any]:
    """Say which images a scan with positions is made of, as `unbraid.scan` takes it.

    Those of concepts; where they are more than is within bounds, in balance, and first those that
    excite the channels of a split most, which the page shows.
    """
    most, which = n_with_positions(scan), concerned_in(scan, found)
    if "classes" in which:
        n_images = sum(found.members_in(scan).count(which["classes"]).values())
    else:
        n_images = len(which["indices"])
    if n_images <= most:
        return which
    shown: list[int] = []
    if split is not None:
        top = reference_images(scan, split, alike=ALIKE)
        for channel in by_cosine(found):
            for own in (top[channel].original, *top[channel].concepts):
                shown += own.index.tolist()
    shown = list(dict.fromkeys(shown))[: most // 2]
    chosen = set(shown).union(in_balance(scan, found, most - len(shown)))
    return {"indices": sorted(chosen)}


def in_balance(scan: Scan, found: Findings, n: int) -> list[int]:
    """Indices of at most n images of concepts: one of each concept in turn."""
    of_number = _by_number(scan, found, n)
    order = by_cosine(found)
    rows = [_turns([of_number[number] for number in own]) for own in _concepts(found, order)]
    return _turns(rows)[:n]


def _concepts(found: Findings, channels: Sequence[int]) -> list[Concept]:
    return [concept for channel in channels for concept in found.concepts[channel]]


def _turns(lists: Sequence[Sequence[int]]) -> list[int]:
    """Take the first of each list, then the second, and so on; each number once.

    >>> _turns([[1, 2, 3], [4], [2, 5]])
    [1, 4, 2, 5, 3]
    """
    longest = max(map(len, lists), default=0)
    in_turn = (own[place] for place in range(longest) for own in lists if place < len(own))
    return list(dict.fromkeys(in_turn))


def _by_number(scan: Scan, found: Findings, n: int) -> dict[int, list[int]]:
    """Indices of at most n images of each class and cluster of the concepts."""
    kept: dict[int, Tensor] = {
        number: torch.empty(0, dtype=torch.int64) for number in found.classes
    }
    for number, index in _indices(scan, found):
        kept[number] = _first(torch.cat([kept[number], index]), n)
    return {number: index.tolist() for number, index in kept.items()}


def _indices(scan: Scan, found: Findings) -> Iterator[tuple[int, Tensor]]:
    """Indices of the images of each class and cluster, shard by shard."""
    if found.clusters:
        members = found.members_in(scan)
        for records in scan.light_shards():
            for number, places in members.places(records, found.classes):
                yield number, records.index[places]
        return
    for own in scan.tensors("index", "label"):  # which is all that classes ask for
        for number in own["label"].unique().tolist():
            if number in found.classes:
                yield number, own["index"][own["label"] == number]


def _first(index: Tensor, n: int) -> Tensor:
    """The first n indices in an order that has nothing to do with theirs, but depends on no seed.

    Source:
        Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number Generators (SplitMix64).
    """
    key = index.numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = np.argsort(key ^ (key >> np.uint64(31)), kind="stable")[:n]
    return index[torch.from_numpy(order)]
