"""Which images of a scan belong to which class or cluster, and so to which concept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.networks.relevance import input_relevance
from unbraid.scanning.records import Records, Scan


@dataclass(frozen=True, eq=False)
class Cluster:
    """Images in which a channel responds for one cause."""

    channel: int
    place: int  # among the clusters of the channel
    centres: Tensor  # (K, C), of all clusters of the channel, in relevance, of length one
    least: float  # smallest response of an image, mean pre-activation
    origin: Tensor | None = None  # (C,), taken from relevance before it is compared with centres
    alike: float = -1.0  # smallest cosine of an image with its centre
    named: tuple[int, ...] = ()  # classes whose images are of other concepts of the channel


Clusters = Mapping[int, Cluster]  # by number


def name_of(names: Sequence[str], number: int) -> str:
    """The name of a class or cluster, or its number where it has none."""
    return (names[number] if number < len(names) else "") or str(number)


@dataclass(frozen=True, eq=False)
class Members:
    """The images of a scan by class and cluster; numbers that `clusters` lacks are classes."""

    scan: Scan
    clusters: Clusters = field(default_factory=dict)

    def of(self, records: Records, number: int) -> Tensor:
        """Which images belong to a class or cluster, (N,)."""
        cluster = self.clusters.get(number)
        if cluster is None:
            return records.label == number
        channel = cluster.channel
        response = mean_responses(self.scan, records.pooled, records.n_positions, [channel])
        member = response[:, 0] >= cluster.least
        pooled = records.pooled[member, self.scan.layer.group_of(channel)]
        relevance = relevance_for_channel(self.scan, pooled, channel)
        fed = relevance.norm(dim=1) > 0
        if cluster.origin is not None:
            relevance = relevance - cluster.origin.double()
        centres = cluster.centres.double()
        nearness, nearest = (F.normalize(relevance, dim=1) @ centres.T).max(1)
        own = (nearest == cluster.place) & (nearness >= cluster.alike) & fed
        member[member.clone()] = own
        return member & ~torch.isin(records.label, torch.tensor(cluster.named, dtype=torch.int64))

    def concept_of(self, records: Records, concepts: Sequence[Sequence[int]]) -> Tensor:
        """Which concept each image belongs to, (N,), -1 for none."""
        concept = torch.full_like(records.label, -1)
        for k, numbers in enumerate(concepts):
            for number in numbers:
                concept[self.of(records, number)] = k
        return concept

    def indices(self, numbers: Iterable[int]) -> list[int]:
        """Indices in the data set of all images of some classes and clusters."""
        wanted = [tuple(numbers)]
        return [
            index
            for records in self.scan.shards()
            for index in records.index[self.concept_of(records, wanted) == 0].tolist()
        ]

    def places(self, records: Records, numbers: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """The images of each number that has some, as places in the records."""
        labels = set(records.label.tolist())
        for number in numbers:
            if number in labels or number in self.clusters:
                places = self.of(records, number).nonzero()[:, 0]
                if len(places):
                    yield number, places

    def count(self, numbers: Iterable[int]) -> dict[int, int]:
        """Count the images of each number; where all are classes, only labels are read."""
        counts = dict.fromkeys(numbers, 0)
        if not counts.keys() & self.clusters.keys():
            labels = (label for column in self.scan.columns("label") for label in column.tolist())
            sizes = Counter(labels)
            return {number: sizes[number] for number in counts}
        for records in self.scan.shards():
            for number, places in self.places(records, counts):
                counts[number] += len(places)
        return counts

    def first(
        self, numbers: Iterable[int], n: int, names: Sequence[str]
    ) -> dict[int, dict[str, Tensor]]:
        """Take columns of the records, as far as they have them, of the first n images of each."""
        parts: dict[int, list[dict[str, Tensor]]] = {number: [] for number in sorted(set(numbers))}
        missing = dict.fromkeys(parts, n)
        for records in self.scan.shards():
            columns = {k: v for k, v in vars(records).items() if k in names and v is not None}
            for number, places in self.places(records, missing):
                some = places[: missing[number]]
                parts[number].append({name: column[some] for name, column in columns.items()})
                missing[number] -= len(some)
            missing = {number: left for number, left in missing.items() if left}
            if not missing:
                break
        return {
            number: {name: torch.cat([part[name] for part in own]) for name in own[0]}
            for number, own in parts.items()
        }


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
    """Relevance of the input channels, (..., C), from pooled inputs of their group, (..., J)."""
    weight = scan.weight[channel].double()
    return input_relevance(weight, pooled.double(), scan.layer.taps_per_input)
