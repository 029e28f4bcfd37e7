"""Ask a concept channel to be silent on images that are not of its concept.

A response counts as far as it goes beyond a part of what the concept's own images give on average:
below that it does not rank among them, and nothing is gained by pressing it further down. Shapes:
N images, J taps, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

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

    @cached_property
    def rough(self) -> Tensor:
        """The inputs in float32."""
        return self.inputs.float()

    def respond(self, row: Tensor, mask: Tensor) -> Tensor:
        """Pooled responses, (N,), of a masked channel of weights and bias (J + 1,)."""
        return self.inputs @ (row * torch.cat([mask, mask.new_ones(1)]))

    def of(self, chosen: Tensor) -> Images:
        """Some of the images."""
        return Images(*(getattr(self, column.name)[chosen] for column in fields(self)))


def join_images(parts: Sequence[Images]) -> Images:
    """Put images together."""
    names = [column.name for column in fields(Images)]
    return Images(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Near:
    """Errors of images near a mask, and how they change with it.

    The slope of an error is `along` times the image's inputs and the channel's weights, and
    `across` times `turn`.
    """

    errors: Tensor  # (N,)
    along: Tensor  # (N,)
    across: Tensor  # (N,)
    turn: Tensor  # (J,)


@dataclass(frozen=True)
class Rest:
    """Images of no concept of each channel: which ones, and how many they stand for."""

    place: Mapping[int, Tensor]  # by channel, among all images of the scan, ascending
    weight: Mapping[int, Tensor]

    def read(self, members: Members, channels: Sequence[int]) -> dict[int, Images]:
        """Read the images of some channels from the scan."""
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {o: [] for o in channels}
        start, done = 0, dict.fromkeys(channels, 0)
        for records in members.scan.light_shards():
            end = start + len(records)
            for o in channels:
                upto = int(torch.searchsorted(self.place[o], end))
                if upto > done[o] or not parts[o]:
                    own = self.place[o][done[o] : upto] - start
                    pooled = records.pooled[own, members.scan.layer.group_of(o)]
                    parts[o].append((pooled, records.n_positions[own], records.index[own]))
                    done[o] = upto
            start = end
        found = {}
        for o in channels:
            pooled, n_positions, index = map(torch.cat, zip(*parts.pop(o), strict=True))
            none = torch.full_like(index, -1)
            found[o] = Images(augment(pooled, n_positions), none, self.weight[o], index)
        return found


def numbers_of(concepts: Mapping[int, Sequence[Concept]]) -> dict[int, set[int]]:
    """The classes and clusters of each channel's concepts."""
    return {o: {number for concept in own for number in concept} for o, own in concepts.items()}


def choose_rest(members: Members, concepts: Mapping[int, Sequence[Concept]]) -> Rest:
    """Choose images of no concept: half that excite a channel most, half spread evenly."""
    scan, channels = members.scan, list(concepts)
    step = max(1, sum(len(label) for label in scan.columns("label")) // N_EVEN)
    rows = torch.stack([augmented_row(scan, o) for o in channels])
    groups = torch.tensor([scan.layer.group_of(o) for o in channels], dtype=torch.int64)
    named: dict[int, list[int]] = {}  # which channels have a concept of a class or cluster
    for c, numbers in enumerate(numbers_of(concepts).values()):
        for number in numbers:
            named.setdefault(number, []).append(c)
    top, count, start = _Top(len(channels)), torch.zeros(len(channels), dtype=torch.int64), 0
    even: list[tuple[Tensor, Tensor]] = []  # places, and of which channels they are no concept's
    for records in scan.light_shards():
        place = torch.arange(start, start + len(records), dtype=torch.int64)
        rest = torch.ones(len(records), len(channels), dtype=torch.bool)
        for number, own in members.places(records, named):
            rest[own[:, None], torch.tensor(named[number])] = False
        z = rows.new_empty(rest.shape)
        for g in groups.unique().tolist():
            z[:, groups == g] = augment(records.pooled[:, g], records.n_positions) @ (
                rows[groups == g].T
            )
        top.add(z, rest, place)
        chosen = place % step == 0 if records.drawn is None else records.drawn > 0
        even.append((place[chosen], rest[chosen]))
        count += rest.sum(0)
        start += len(records)
    spread, is_rest = map(torch.cat, zip(*even, strict=True))
    places: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    for c, (o, best) in enumerate(zip(channels, top.places(), strict=True)):
        others = spread[is_rest[:, c]]
        others = others[~torch.isin(others, best)]
        each = (int(count[c]) - len(best)) / max(1, len(others))
        place = torch.cat([best, others])
        weight = torch.cat([rows.new_ones(len(best)), rows.new_full((len(others),), each)])
        order = place.argsort()
        places[o], weights[o] = place[order], weight[order]
    return Rest(places, weights)


class _Top:
    """The images that excite each of C channels most, of those seen so far."""

    def __init__(self, n_channels: int) -> None:
        """Have seen none."""
        self.n_channels = n_channels
        self.least = torch.full((n_channels,), -torch.inf, dtype=torch.float64)
        none = torch.empty(0, dtype=torch.int64)
        self.found = [(self.least.new_empty(0), none, none)]  # responses, channels, places

    def add(self, z: Tensor, rest: Tensor, place: Tensor) -> None:
        """See the chosen ones (N, C) of some images' responses (N, C)."""
        chosen = rest & (z > self.least)
        image, channel = chosen.nonzero().T
        self.found.append((z[image, channel], channel, place[image]))
        if sum(len(own) for own, _, _ in self.found) > 3 * N_TOP * self.n_channels:
            self._sift()

    def places(self) -> list[Tensor]:
        """Where the images of each channel lie, of equal ones the first."""
        self._sift()
        ((_, channel, place),) = self.found
        return list(place.split(channel.bincount(minlength=self.n_channels).tolist()))

    def _sift(self) -> None:
        z, channel, place = map(torch.cat, zip(*self.found, strict=True))
        order = z.argsort(descending=True, stable=True)
        order = order[channel[order].argsort(stable=True)]
        z, channel, place = z[order], channel[order], place[order]
        n_each = channel.bincount(minlength=self.n_channels)
        rank = torch.arange(len(z), dtype=torch.int64) - (n_each.cumsum(0) - n_each)[channel]
        last = rank == N_TOP - 1
        self.least[channel[last]] = z[last]
        kept = rank < N_TOP
        self.found = [(z[kept], channel[kept], place[kept])]
