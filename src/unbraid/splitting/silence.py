"""Ask a concept channel to be silent on images that are not of its concept.

A response counts as far as it goes beyond a part of what the concept's own images give on average:
below that it does not rank among them, and nothing is gained by pressing it further down. Shapes:
N images, J taps, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members
from unbraid.splitting.moments import augment, augmented_row

MARGIN = 0.5  # of the concept's mean response; docs/splitting.md tells what others gave
N_TOP = 1000  # images of no concept that excite a channel most, all of which are looked at
N_EVEN = 1000  # images spread evenly over the scan, which stand for all others


@dataclass(frozen=True)
class Images:
    """Images that a channel's concepts are fitted on, those of no concept for many alike."""

    inputs: Tensor  # (N, J + 1), augmented
    concept: Tensor  # (N,), -1 for none
    weight: Tensor  # (N,), how many images each stands for
    group: Tensor  # (N,): images of one group are not to be parted; of no concept, their index

    def of(self, chosen: Tensor) -> Images:
        """Some of the images."""
        return Images(*(column[chosen] for column in vars(self).values()))


def join_images(parts: Sequence[Images]) -> Images:
    """Put images together."""
    names = ("inputs", "concept", "weight", "group")
    return Images(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Rest:
    """Images of no concept of each channel: which ones, and how many they stand for."""

    place: Mapping[int, Tensor]  # by channel, among all images of the scan, ascending
    weight: Mapping[int, Tensor]

    def read(self, members: Members, channels: Sequence[int]) -> dict[int, Images]:
        """Read the images of some channels from the scan."""
        parts: dict[int, list[Images]] = {o: [] for o in channels}
        start = 0
        for records in members.scan.light_shards():
            for o in channels:
                inside = (self.place[o] >= start) & (self.place[o] < start + len(records))
                own = self.place[o][inside] - start
                pooled = records.pooled[own, members.scan.layer.group_of(o)]
                parts[o].append(
                    Images(
                        augment(pooled, records.n_positions[own]),
                        torch.full_like(own, -1),
                        self.weight[o][inside],
                        records.index[own],
                    )
                )
            start += len(records)
        return {o: join_images(own) for o, own in parts.items()}


def choose_rest(members: Members, concepts: Mapping[int, Sequence[Concept]]) -> Rest:
    """Choose images of no concept: half that excite a channel most, half spread evenly."""
    n_images = sum(len(label) for label in members.scan.columns("label"))
    step = max(1, n_images // N_EVEN)
    rows = torch.stack([augmented_row(members.scan, o) for o in concepts])
    top = {o: (rows.new_empty(0), torch.empty(0, dtype=torch.int64)) for o in concepts}
    even: dict[int, list[Tensor]] = {o: [] for o in concepts}
    count = dict.fromkeys(concepts, 0)
    start = 0
    for records in members.scan.light_shards():
        place = torch.arange(start, start + len(records), dtype=torch.int64)
        for row, (o, own) in zip(rows, concepts.items(), strict=True):
            rest = members.concept_of(records, own) < 0
            pooled = records.pooled[rest, members.scan.layer.group_of(o)]
            z = augment(pooled, records.n_positions[rest]) @ row
            both = torch.cat([top[o][0], z]), torch.cat([top[o][1], place[rest]])
            order = both[0].argsort(descending=True, stable=True)[:N_TOP]
            top[o] = both[0][order], both[1][order]
            even[o].append(place[rest & (place % step == 0)])
            count[o] += int(rest.sum())
        start += len(records)
    places, weights = {}, {}
    for o in concepts:
        spread = torch.cat(even[o])
        spread = spread[~torch.isin(spread, top[o][1])]
        each = (count[o] - len(top[o][1])) / max(1, len(spread))
        place = torch.cat([top[o][1], spread])
        weight = torch.cat([rows.new_ones(len(top[o][1])), rows.new_full((len(spread),), each)])
        order = place.argsort()
        places[o], weights[o] = place[order], weight[order]
    return Rest(places, weights)
