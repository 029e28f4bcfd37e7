"""What fits look at, read from a scan for some channels at a time, so that memory does not grow.

Inputs are kept as the scan has them, each image's once, and are widened channel by channel. Shapes:
n images, N of a channel, J taps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from unbraid.base.errors import DataError
from unbraid.base.progress import Advance, Progress
from unbraid.finding.findings import Concept
from unbraid.finding.membership import Clusters, Members
from unbraid.networks.spec import LayerSpec
from unbraid.scanning.fields import Records
from unbraid.splitting.moments import Moment, augment, join_moments, moment
from unbraid.splitting.silence import N_EVEN, N_SHAPED, N_TOP, Images, Rest, sample_of

Answer = TypeVar("Answer")
Need = tuple[int, int]  # a group of the layer, and a class or cluster whose images are looked at

_BYTES_AT_ONCE = 3 << 30  # of inputs


@dataclass(frozen=True)
class ChannelImages:
    """What the fit of one channel looks at."""

    moments: list[Moment]  # of its concepts
    images: Images
    part: float  # what silence on each other concept counts


def on_images(
    members: Members,
    concepts: Mapping[int, Sequence[Concept]],
    rest: tuple[Members, Rest],
    n_images: int,
    work: Callable[[ChannelImages, int], Answer],
    title: str,
    progress: Progress,
) -> dict[int, Answer]:
    """Do the work of all channels on the first images of each class and the chosen rest."""
    layer = members.scan.layer
    needs = {
        o: {(layer.group_of(o), number) for concept in own for number in concept}
        for o, own in concepts.items()
    }
    reader = Reader(members, rest, needs, n_images)

    def gather(columns: _ChosenRest, channel: int) -> Answer:
        own = concepts[channel]
        chosen = [[reader.known[layer.group_of(channel), n] for n in concept] for concept in own]
        n_shaped = sample_of(N_SHAPED, members.scan)
        part = _part(own, members.clusters)
        try:
            return work(_gather(chosen, n_shaped, columns, channel, part), channel)
        except LinAlgError:
            raise DataError(
                f"What feeds channel {channel} has numbers too far apart in size to compute with; "
                "leave it out, or use method='published'."
            ) from None

    total = sum(len(own) for own in concepts.values())
    with progress.of(title, total, "concepts") as advance:
        return _by_portion(needs, reader, gather, lambda channel: advance(len(concepts[channel])))


def _by_portion(
    needs: Mapping[int, set[Need]],
    reader: Reader,
    work: Callable[[_ChosenRest, int], Answer],
    done: Advance,
) -> dict[int, Answer]:
    """Do the work of all channels side by side, as many at a time as memory holds the needs of."""
    portions: list[tuple[list[int], set[Need]]] = []
    for channel, own in needs.items():
        if not portions or (
            sum(map(reader.n_bytes, portions[-1][1] | own))
            + reader.bytes_each * len(portions[-1][0])
            > _BYTES_AT_ONCE
        ):
            portions.append(([], set()))
        portions[-1][0].append(channel)
        portions[-1][1].update(own)
    answers: dict[int, Answer] = {}
    n_threads = torch.get_num_threads()
    for channels, wanted in portions:
        columns = reader.read(wanted, channels)
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(n_threads, "", torch.set_num_threads, (1,)) as pool:
                made = pool.map(partial(work, columns), channels)
                for channel, answer in zip(channels, made, strict=True):
                    answers[channel] = answer
                    done(channel)
        finally:
            torch.set_num_threads(n_threads)
    return answers


def _part(concepts: Sequence[Concept], clusters: Clusters) -> float:
    """What silence on each other concept counts.

    Clusters can be many; so that they do not silence each other, all others then count as one.
    """
    some = any(number in clusters for concept in concepts for number in concept)
    return 1 / max(1, len(concepts) - 1) if some else 1.0


@dataclass(frozen=True)
class _Columns:
    """Some images of a class or cluster, or of none, as one group of the layer meets them."""

    pooled: Tensor  # (n, J)
    n_positions: Tensor  # (n,)
    group: Tensor  # (n,), images that are not to be parted

    def first(self, n: int) -> _Columns:
        return _Columns(self.pooled[:n], self.n_positions[:n], self.group[:n])


def _join(parts: Sequence[_Columns]) -> _Columns:
    columns = [(part.pooled, part.n_positions, part.group) for part in parts]
    return _Columns(*map(torch.cat, zip(*columns, strict=True)))


@dataclass(frozen=True)
class _Kind:
    """What is kept of the images of a class or cluster, for one group of the layer."""

    moment: Moment
    some: _Columns


class _ChosenRest:
    """Images of no concept of some channels, taken from a scan as it is read."""

    def __init__(self, rest: Rest, layer: LayerSpec, channels: Sequence[int]) -> None:
        """Have taken none; an image that several channels of a group need is kept once."""
        self._n_groups, self._weight = layer.groups, rest.weight
        keys = {o: rest.place[o] * layer.groups + layer.group_of(o) for o in channels}
        self._keys = torch.cat(list(keys.values())).unique()
        self._rows = {o: torch.searchsorted(self._keys, own) for o, own in keys.items()}
        self._start = self._n_taken = 0
        self._every: _Columns | None = None

    def take(self, records: Records) -> None:
        """Take from the next records what is wanted."""
        end = self._start + len(records)
        upto = int(torch.searchsorted(self._keys, end * self._n_groups))
        if self._every is None:
            n = len(self._keys)
            self._every = _Columns(
                records.pooled.new_empty(n, records.pooled.shape[2]),
                *(self._keys.new_empty(n) for _ in range(2)),
            )
        if upto > self._n_taken:
            own = self._keys[self._n_taken : upto]
            place, group = own // self._n_groups - self._start, own % self._n_groups
            here = slice(self._n_taken, upto)
            self._every.pooled[here] = records.pooled[place, group]
            self._every.n_positions[here] = records.n_positions[place]
            self._every.group[here] = records.index[place]
        self._start, self._n_taken = end, upto

    def of(self, channel: int) -> tuple[_Columns, Tensor]:
        """The images of one channel, and how many each stands for."""
        every, rows = self._every, self._rows[channel]
        assert every is not None
        chosen = _Columns(every.pooled[rows], every.n_positions[rows], every.group[rows])
        return chosen, self._weight[channel]


class Reader:
    """Reads what portions of channels need; what the last one needed too is not read again."""

    def __init__(
        self,
        members: Members,
        rest: tuple[Members, Rest],
        needs: Mapping[int, set[Need]],
        n_images: int,
    ) -> None:
        """Look at no more than so many images of a class or cluster."""
        self.members, self.rest = members, rest
        counts = members.count({number for own in needs.values() for _, number in own})
        self.counts = {number: min(n, n_images) for number, n in counts.items()}
        self.known: dict[Need, _Kind] = {}
        self._size = torch.promote_types(members.scan.weight.dtype, torch.float32).itemsize
        self.bytes_each = (
            self._size * members.scan.layer.n_taps * sample_of(N_TOP + N_EVEN, rest[0].scan)
        )

    def n_bytes(self, need: Need) -> int:
        """Bytes of the images of a class or cluster, and of their moment, float64 where few."""
        n, n_taps = self.counts[need[1]], self.members.scan.layer.n_taps
        return n_taps * (self._size * n + min(8 * n, self._size * n_taps))

    def read(self, wanted: set[Need], channels: Sequence[int]) -> _ChosenRest:
        """Read the images of a portion."""
        self.known = {need: self.known[need] for need in wanted & self.known.keys()}
        kinds = _Kinds(self.members, sorted(wanted - self.known.keys()), self.counts)
        others, rest = self.rest
        chosen = _ChosenRest(rest, others.scan.layer, channels)
        together = others.scan is self.members.scan
        for records in others.scan.light_shards():
            chosen.take(records)
            if together:
                kinds.take(records)
        for records in () if together else self.members.scan.light_shards():
            kinds.take(records)
        self.known |= kinds.finish()
        return chosen


class _Kinds:
    """The first images of classes and clusters, taken from a scan as it is read."""

    def __init__(self, members: Members, needs: Sequence[Need], counts: Mapping[int, int]) -> None:
        """Have taken none."""
        self._members = members
        self._groups: dict[int, list[int]] = {}  # that meet the images of each number
        for group, number in needs:
            self._groups.setdefault(number, []).append(group)
        self._missing = {number: counts[number] for number in self._groups}
        self._parts: dict[int, list[_Columns]] = {number: [] for number in self._groups}
        self._done: dict[Need, _Kind] = {}

    def take(self, records: Records) -> None:
        """Take from the next records what is wanted; of what is complete little is kept."""
        # Where the data set knows of no groups, each image is one of its own.
        group = records.index if records.group is None else records.group
        for number, places in self._members.places(records, tuple(self._missing)):
            some = places[: self._missing[number]]
            pooled = records.pooled[some][:, self._groups[number]]
            self._parts[number].append(_Columns(pooled, records.n_positions[some], group[some]))
            self._missing[number] -= len(some)
            if not self._missing[number]:
                del self._missing[number]
                self._reduce(number)

    def finish(self) -> dict[Need, _Kind]:
        """What is kept of all of them."""
        for number in list(self._parts):
            self._reduce(number)
        return self._done

    def _reduce(self, number: int) -> None:
        every = _join(self._parts.pop(number))
        for k, group in enumerate(self._groups[number]):
            own = _Columns(every.pooled[:, k], every.n_positions, every.group)
            inputs = augment(own.pooled, own.n_positions, own.pooled.dtype)
            few = own.first(sample_of(N_SHAPED, self._members.scan))
            kept = _Columns(few.pooled.clone(), few.n_positions.clone(), few.group.clone())
            self._done[group, number] = _Kind(moment(inputs), kept)


def _gather(
    kinds: Sequence[Sequence[_Kind]],
    n_shaped: int,
    rest: _ChosenRest,
    channel: int,
    part: float,
) -> ChannelImages:
    """Put together what one channel's fit looks at, when its turn comes: it is large."""
    others, weight = rest.of(channel)
    columns, weights, concept = [others], [weight], [torch.full_like(others.group, -1)]
    for k, own in enumerate(kinds):
        for kind in own:
            some = kind.some.first(max(1, n_shaped // len(own)))
            columns.append(some)
            n = len(some.group)
            weights.append(weight.new_full((n,), kind.moment.n_images / n))
            concept.append(torch.full_like(some.group, k))
    every = _join(columns)
    images = Images(
        augment(every.pooled, every.n_positions),
        torch.cat(concept),
        torch.cat(weights),
        every.group,
    )
    return ChannelImages(
        [join_moments([kind.moment for kind in own]) for own in kinds], images, part
    )
