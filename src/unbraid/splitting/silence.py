"""Ask a concept channel to be silent on images that are not of its concept.

A response counts as far as it goes beyond a part of what the concept's own images give on average:
below that it does not rank among them, and nothing is gained by pressing it further down. Shapes:
N images, J taps, K concepts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from unbraid.base.progress import QUIET, Progress
from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members
from unbraid.scanning.fields import Records
from unbraid.scanning.records import Scan
from unbraid.splitting.moments import augment, augmented_row

MARGIN = 0.5  # of the concept's mean response; docs/evidence-splitting.md tells what others gave
N_TOP = 1000  # images of no concept that excite a channel most, all of which are looked at
N_EVEN = 1000  # images spread evenly over the scan, which stand for all others
N_SHAPED = 500  # images of a concept, whose responses are looked at one by one
_LARGE = 100_000  # images of a scan of which half as many are looked at
MOST = 1e15  # of inputs whose squares float32 adds up
_MANY = 48  # part of responses that are asked for exactly, above which all of them are quicker
_AT_ONCE = 256  # of these, so that caches hold what they are made of


@dataclass(frozen=True)
class Images:
    """Images that a channel's concepts are fitted on, those of no concept for many alike."""

    inputs: Tensor  # (N, J + 1), augmented
    concept: Tensor  # (N,), -1 for none
    weight: Tensor  # (N,), how many images each stands for
    group: Tensor  # (N,): images of one group are not to be parted; of no concept, their index

    @cached_property
    def n_positions(self) -> Tensor:
        """The inputs' last column, together in memory, (N,)."""
        return self.inputs[:, -1].contiguous()

    @cached_property
    def unit(self) -> float:
        """What inputs are divided by before float32 takes their squares; 1 but for huge ones."""
        most = float(self.inputs.abs().amax()) if len(self.inputs) else 0.0
        return 2.0 ** math.frexp(most)[1] if most > MOST else 1.0

    @cached_property
    def rough(self) -> Tensor:
        """The inputs in float32, in units."""
        return (self.inputs if self.unit == 1 else self.inputs / self.unit).float()

    @cached_property
    def squares(self) -> Tensor:
        """Squares of the inputs in float32, in units."""
        return self.rough.square()

    def respond(self, row: Tensor, mask: Tensor) -> Tensor:
        """Pooled responses, (N,), of a masked channel of weights and bias (J + 1,)."""
        return self.inputs @ (row * torch.cat([mask, mask.new_ones(1)]))

    def of(self, chosen: Tensor) -> Images:
        """Some of the images."""
        return Images(*(getattr(self, column.name)[chosen] for column in fields(self)))


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


def sample_of(n: int, scan: Scan) -> int:
    """How many images are looked at, of so many, where a scan is large."""
    return n // 2 if scan.manifest.n_images > _LARGE else n


def choose_rest(
    members: Members, concepts: Mapping[int, Sequence[Concept]], progress: Progress = QUIET
) -> Rest:
    """Choose images of no concept: half that excite a channel most, half spread evenly."""
    scan, channels = members.scan, list(concepts)
    n_images = scan.n_by_label.total()
    step = max(1, n_images // sample_of(N_EVEN, scan))
    named: dict[int, list[int]] = {}  # which channels have a concept of a class or cluster
    for c, own in enumerate(concepts.values()):
        for number in {number for concept in own for number in concept}:
            named.setdefault(number, []).append(c)
    top, count = _Top(scan, channels), torch.zeros(len(channels), dtype=torch.float64)
    even: list[tuple[Tensor, Tensor]] = []  # places, and of which channels they are no concept's
    starts = list(accumulate((len(column) for column in scan.columns("label")), initial=0))
    with progress.of("Looking for what else excites channels", n_images, "images") as advance:
        for shard in _scattered(scan.n_shards):
            records = scan.light_shard(shard)
            place = starts[shard] + torch.arange(len(records), dtype=torch.int64)
            rest = torch.ones(len(records), len(channels), dtype=torch.bool)
            for number, places in members.places(records, named):
                rest[places[:, None], torch.tensor(named[number])] = False
            top.add(records, rest, place)
            chosen = place % step == 0 if records.drawn is None else records.drawn > 0
            even.append((place[chosen], rest[chosen]))
            count += rest.float().sum(0)  # many times as quick as to add up truth values
            advance(len(records))
    spread, is_rest = map(torch.cat, zip(*even, strict=True))
    places_of: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    for c, (o, best) in enumerate(zip(channels, top.places(), strict=True)):
        others = spread[is_rest[:, c]]
        others = others[~torch.isin(others, best)]
        each = (int(count[c]) - len(best)) / max(1, len(others))
        place = torch.cat([best, others])
        counts = torch.full(place.shape, each, dtype=torch.float64)
        counts[: len(best)] = 1
        order = place.argsort()
        places_of[o], weights[o] = place[order], counts[order]
    return Rest(places_of, weights)


def _scattered(n: int) -> list[int]:
    """Numbers up to n in wide strides.

    Images often lie class by class. So read, what excites a channel most is known before long, and
    few others need be looked at closely.
    """
    stride = math.isqrt(n) + 1
    return [number for first in range(stride) for number in range(first, n, stride)]


class _Top:
    """The images that excite each of C channels most, of those seen so far."""

    def __init__(self, scan: Scan, channels: Sequence[int]) -> None:
        """Have seen none."""
        self._n_top = sample_of(N_TOP, scan)
        self._rows = torch.stack([augmented_row(scan, o) for o in channels])
        self._rough = self._rows.to(
            torch.promote_types(scan.weight.dtype, torch.float32)
        )  # as exact as the records
        groups = torch.tensor([scan.layer.group_of(o) for o in channels], dtype=torch.int64)
        self._of_group = {g: (groups == g).nonzero()[:, 0] for g in groups.unique().tolist()}
        self._slack = torch.finfo(self._rough.dtype).eps * self._rows.shape[1]
        self._least = torch.full((len(channels),), -torch.inf, dtype=torch.float64)
        none = torch.empty(0, dtype=torch.int64)
        self._found = [(self._least.new_empty(0), none, none)]  # responses, channels, places

    def add(self, records: Records, rest: Tensor, place: Tensor) -> None:
        """See some images: the chosen ones (N, C), and where they lie, (N,)."""
        for g, own in self._of_group.items():
            pooled = records.pooled[:, g].to(self._rough.dtype)
            n_positions = records.n_positions.to(pooled)
            rows, row = self._rough[own], self._rows[own]
            squares = pooled.square().sum(1) + n_positions.square()
            length = float(squares.amax().sqrt()) if len(pooled) else 0.0
            # What rounding may have taken from a response.
            slack = self._slack * length * row.norm(dim=1)
            least = (self._least[own] - slack).to(pooled)
            z = torch.addmm(torch.outer(n_positions, rows[:, -1]), pooled, rows[:, :-1].T)
            passed = np.flatnonzero(~(z < least))  # several times as quick as torch's
            image, k = (torch.from_numpy(some) for some in divmod(passed, len(own)))
            asked = rest[image, own[k]]
            image, k = image[asked], k[asked]
            if len(image) > z.numel() // _MANY:
                z = (augment(pooled, n_positions) @ row.T)[image, k]
            else:
                parts = zip(image.split(_AT_ONCE), k.split(_AT_ONCE), strict=True)
                z = torch.cat([_exactly(pooled, n_positions, row, *some) for some in parts])
            kept = z >= self._least[own[k]]  # of equal ones the first may come later
            self._found.append((z[kept], own[k[kept]], place[image[kept]]))
        if sum(len(z) for z, _, _ in self._found) > 3 * self._n_top * len(self._least):
            self._sift()

    def places(self) -> list[Tensor]:
        """Where the images of each channel lie, of equal ones the first."""
        return [self._first(z, place)[1] for z, place in self._by_channel()]

    def _first(self, z: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """The strongest responses and their places, of equal ones the first in the scan."""
        order = place.argsort()
        order = order[z[order].argsort(descending=True, stable=True)][: self._n_top]
        return z[order], place[order]

    def _by_channel(self) -> list[tuple[Tensor, Tensor]]:
        """Responses and places found, channel by channel."""
        z, channel, place = map(torch.cat, zip(*self._found, strict=True))
        order = channel.argsort(stable=True)
        sizes = channel.bincount(minlength=len(self._least)).tolist()
        return list(zip(z[order].split(sizes), place[order].split(sizes), strict=True))

    def _sift(self) -> None:
        """Keep the best of each channel."""
        kept = []
        for c, (z, place) in enumerate(self._by_channel()):
            if len(z) > self._n_top:
                z, place = self._first(z, place)
                self._least[c] = z[-1] if self._n_top else torch.inf
            kept.append((z, torch.full_like(place, c), place))
        self._found = kept


def _exactly(pooled: Tensor, n_positions: Tensor, rows: Tensor, image: Tensor, k: Tensor) -> Tensor:
    """Responses in float64, (n,), of some images to the channels of some rows, (n,) each."""
    inputs = augment(pooled.index_select(0, image), n_positions[image])
    return inputs.mul_(rows.index_select(0, k)).sum(1)
