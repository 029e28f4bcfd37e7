"""Second moments of pooled inputs by class or cluster: all that least squares asks of a Scan.

The number of positions, which the bias multiplies, is treated as one more input, the last. Shapes:
N images, G groups, J taps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.findings import Concept
from unbraid.gather import count_images, members, portions
from unbraid.gram import MOST_ROWS, Gram, Rows, Whole
from unbraid.records import Records, Scan

_BYTES_AT_ONCE = 3 << 30  # of moments; all classes of ImageNet fit in at 512 inputs
_ROWS_AT_ONCE = 64  # images of a class whose outer products are added up together

Key = tuple[int, int]  # group of the layer, class or cluster


@dataclass(frozen=True)
class Moments:
    """Sums of outer products of augmented pooled inputs, (J + 1, J + 1), float64."""

    n_images: Mapping[int, int]  # by class or cluster
    sums: Mapping[Key, Gram]


@dataclass(frozen=True)
class ConceptMoment:
    """The mean outer product of augmented pooled inputs over a concept's images."""

    parts: Sequence[Gram]  # sums, (J + 1, J + 1), of its classes or clusters
    n_images: int

    def times(self, x: Tensor) -> Tensor:
        """Multiply vectors, (..., J + 1), by the mean."""
        return torch.stack([part.times(x) for part in self.parts]).sum(0) / self.n_images


def concept_moment(moments: Moments, group: int, concept: Concept) -> ConceptMoment:
    """Put together the moment of a concept from those of its classes or clusters."""
    parts = [moments.sums[group, number] for number in concept]
    return ConceptMoment(parts, sum(moments.n_images[number] for number in concept))


def augment(pooled: Tensor, n_positions: Tensor) -> Tensor:
    """Put the number of positions behind the inputs: (..., J) and (N,) to (..., J + 1), float64."""
    positions = n_positions.double().reshape(-1, *[1] * (pooled.dim() - 1))
    return torch.cat([pooled.double(), positions.expand(*pooled.shape[:-1], 1)], -1)


def augmented_inputs(records: Records, places: Tensor) -> Tensor:
    """Augmented pooled inputs of some images, (images, G, J + 1)."""
    return augment(records.pooled[places], records.n_positions[places])


def read_moments(
    scan: Scan, concepts: Mapping[int, Sequence[Concept]]
) -> Iterator[tuple[list[int], Moments]]:
    """Give the moments that channels need, as many channels at a time as memory holds.

    A class is kept as its inputs, instead of their moment, if all its channels' concepts have so
    few images that these are quicker.
    """
    counts = count_images(scan, {c for groups in concepts.values() for g in groups for c in g})
    n_taps = scan.layer.n_taps
    needs: dict[int, set[Key]] = {}
    whole: set[Key] = set()
    for channel, groups in concepts.items():
        group = scan.layer.group_of(channel)
        needs[channel] = {(group, number) for concept in groups for number in concept}
        if sum(counts[number] for _, number in needs[channel]) * MOST_ROWS > n_taps:
            whole |= needs[channel]

    def n_bytes(key: Key) -> int:
        return (n_taps + 1) * 8 * (n_taps + 1 if key in whole else counts[key[1]])

    for portion in portions(needs, n_bytes, _BYTES_AT_ONCE):
        keys = {key for channel in portion for key in needs[channel]}
        yield portion, Moments(counts, second_moments(scan, keys, whole))


def second_moments(scan: Scan, keys: Iterable[Key], whole: set[Key]) -> dict[Key, Gram]:
    """Read a Scan once and sum the outer products of augmented pooled inputs.

    Args:
        scan: of images of all classes and clusters in `keys`.
        keys: which groups and classes or clusters.
        whole: those to be kept as matrices; of the others the inputs are kept.
    """
    size = scan.layer.n_taps + 1
    groups_of: dict[int, list[int]] = {}
    for group, number in sorted(keys):
        groups_of.setdefault(number, []).append(group)
    inputs: dict[Key, list[Tensor]] = {key: [] for key in keys}
    sums = {key: torch.zeros(size, size, dtype=torch.float64) for key in keys if key in whole}

    def add_up(key: Key, least: int) -> None:
        """Few images at a time, a matrix is hardly read for so little to add."""
        if sum(map(len, inputs[key])) >= least:
            rows = torch.cat(inputs[key])
            sums[key].addmm_(rows.T, rows)
            inputs[key].clear()

    for records in scan.shards():
        for number, places in members(scan, records, groups_of):
            for group in groups_of[number]:
                pooled = records.pooled[places, group]
                inputs[group, number].append(augment(pooled, records.n_positions[places]))
                if (group, number) in whole:
                    add_up((group, number), _ROWS_AT_ONCE)
    for key in sums:
        add_up(key, 1)
    return {key: Whole(sums[key]) if key in sums else Rows(torch.cat(inputs[key])) for key in keys}
