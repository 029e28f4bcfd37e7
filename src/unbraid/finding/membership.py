"""Which images of a scan belong to which class or cluster, and so to which concept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.base.arguments import as_kind, whole_number
from unbraid.base.errors import UsageError
from unbraid.base.schema import in_range
from unbraid.base.tables import count
from unbraid.networks.relevance import input_relevance
from unbraid.scanning.fields import Records
from unbraid.scanning.manifest import MAX_CLASSES
from unbraid.scanning.records import Scan


@dataclass(frozen=True, eq=False)
class Cluster:
    """Images in which a channel responds for one cause, found so or put together by hand."""

    channel: int
    place: int  # among the clusters of the channel
    centres: Tensor  # (K, C), of all clusters of the channel, in relevance, of length one
    least: float  # smallest response of an image, mean pre-activation
    origin: Tensor | None = None  # (C,), taken from relevance before it is compared with centres
    alike: float = -1.0  # smallest cosine of an image with its centre
    named: tuple[int, ...] = ()  # classes whose images are of other concepts of the channel
    # Of a group by hand, its images (n,), sorted, by index in the data set of this fingerprint.
    images: Tensor | None = None
    data: str = ""
    places: bool = False  # whether it is of places, with the response and relevance at one each


Clusters = Mapping[int, Cluster]  # by number


def same_clusters(some: Clusters, others: Clusters) -> bool:
    """Whether two sets of clusters are of the same numbers, with the same images."""
    return some.keys() == others.keys() and all(
        torch.equal(own, its)
        if isinstance(own, Tensor) and isinstance(its, Tensor)
        else own is its or own == its
        for number, cluster in some.items()
        for own, its in zip(vars(cluster).values(), vars(others[number]).values(), strict=True)
    )


def name_of(names: Sequence[str], number: int) -> str:
    """The name of a class or cluster, or its number where it has none."""
    return (names[number] if number < len(names) else "") or str(number)


@dataclass(frozen=True, eq=False)
class _Near:
    """Images in which a channel responds, and the centre that is nearest to each."""

    records: Records
    cluster: Cluster  # one of the channel's
    responds: Tensor  # (N,)
    nearness: Tensor  # of those that respond, the cosine
    nearest: Tensor  # the centre's place, -1 where nothing feeds the channel

    def serves(self, records: Records, cluster: Cluster) -> bool:
        """Whether the same comes out for a cluster of the same images."""
        own = self.cluster
        return (
            (records is self.records and cluster.channel == own.channel)
            and (cluster.centres is own.centres and cluster.origin is own.origin)
            and cluster.least == own.least
        )


def _compare(scan: Scan, records: Records, cluster: Cluster) -> _Near:
    """Compare what feeds a channel in each image with the centres of its clusters."""
    channel = cluster.channel
    response = mean_responses(scan, records.pooled, records.n_positions, [channel])
    responds = response[:, 0] >= cluster.least
    pooled = records.pooled[responds, scan.layer.group_of(channel)]
    relevance = relevance_for_channel(scan, pooled, channel)
    fed = relevance.norm(dim=1) > 0
    if cluster.origin is not None:
        relevance = relevance - cluster.origin.double()
    nearness, nearest = (F.normalize(relevance, dim=1) @ cluster.centres.double().T).max(1)
    return _Near(records, cluster, responds, nearness, nearest.where(fed, torch.tensor(-1)))


@dataclass(frozen=True, eq=False)
class Members:
    """The images of a scan by class and cluster; numbers that `clusters` lacks are classes."""

    scan: Scan
    clusters: Clusters = field(default_factory=dict)
    _last: list[_Near] = field(default_factory=list, init=False, repr=False)

    def of(self, records: Records, number: int) -> Tensor:
        """Which images belong to a class or cluster, (N,)."""
        cluster = self.clusters.get(number)
        if cluster is None:
            return records.label == number
        if cluster.images is not None and cluster.data == self.scan.manifest.data:
            return torch.isin(records.index, cluster.images)
        if cluster.places != bool(self.scan.manifest.places_of):
            whose, other = ("places", "images") if cluster.places else ("images", "places")
            raise UsageError(
                f"The clusters are of {whose}, but the scan is of {other}; pass a scan of {whose}"
                f"{' (Scan.places)' if cluster.places else ''}."
            )
        # Clusters are asked for channel by channel, and those of one compare the same images.
        if not (self._last and self._last[0].serves(records, cluster)):
            self._last[:] = [_compare(self.scan, records, cluster)]
        near = self._last[0]
        member = near.responds.clone()
        member[near.responds] = (near.nearest == cluster.place) & (near.nearness >= cluster.alike)
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
            for records in self.scan.light_shards()
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
            return {number: self.scan.n_by_label[number] for number in counts}
        for records in self.scan.light_shards():
            for number, places in self.places(records, counts):
                counts[number] += len(places)
        return counts


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of images that were put together by hand, as clusters of a channel."""

    clusters: dict[int, Cluster]  # by number
    names: dict[int, str]
    cosines: Tensor  # (K, K), of the mean relevance of the groups


def put_together(scan: Scan, channel: int, groups: Sequence[Sequence[int]], first: int) -> Groups:
    """Describe groups of images, by index, by what feeds the channel in them.

    On the scan's data set the given images are the members; elsewhere, as of clusters, images that
    excite the channel as much as the weakest of all, in the group whose centre is nearest.
    """
    group_of = {index: k for k, group in enumerate(groups) for index in group}
    wanted = torch.tensor(sorted(group_of), dtype=torch.int64)
    place = torch.tensor([group_of[index] for index in wanted.tolist()], dtype=torch.int64)
    label, response, relevance = described(scan, channel, wanted)
    unit = F.normalize(relevance, dim=1)
    numbers = range(first, first + len(groups))
    own = [place == k for k in range(len(groups))]
    centres = F.normalize(torch.stack([unit[chosen].mean(0) for chosen in own]), dim=1)
    arvs = F.normalize(torch.stack([relevance[chosen].mean(0) for chosen in own]), dim=1)
    # A little less, since the same response may be rounded otherwise in another batch.
    rounding = torch.finfo(scan.weight.dtype).eps ** 0.5 * response.abs().max()
    least, data = float(response.min() - rounding), scan.manifest.data
    of_places = bool(scan.manifest.places_of)
    clusters = {
        n: Cluster(channel, k, centres, least, images=wanted[own[k]], data=data, places=of_places)
        for k, n in enumerate(numbers)
    }
    names = {
        n: f"group {k + 1}{_mostly(scan, label[own[k]].tolist())}" for k, n in enumerate(numbers)
    }
    return Groups(clusters, names, (arvs @ arvs.T).clamp(-1, 1))


def described(scan: Scan, channel: int, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (n,), mean responses (n,) and relevance (n, C) of some images, by sorted index."""
    parts = []
    for own in scan.tensors("index", "label", "n_positions", "pooled"):
        chosen = torch.isin(own["index"], wanted)
        pooled = own["pooled"][chosen]
        responses = mean_responses(scan, pooled, own["n_positions"][chosen], [channel])[:, 0]
        relevance = relevance_for_channel(scan, pooled[:, scan.layer.group_of(channel)], channel)
        parts.append((own["index"][chosen], own["label"][chosen], responses, relevance))
    index, *columns = (torch.cat(part) for part in zip(*parts, strict=True))
    label, response, relevance = (column[index.argsort()] for column in columns)
    return label, response, relevance


def _mostly(scan: Scan, labels: Sequence[int]) -> str:
    """Name up to three classes that a fifth of some images have, in brackets, if there are."""
    if scan.manifest.labels == "none":
        return ""
    often = [c for c, n in Counter(labels).most_common(3) if 5 * n >= len(labels)]
    return f" ({', '.join(name_of(scan.class_names, c) for c in often)})" if often else ""


def pack(clusters: Clusters) -> tuple[dict[str, Tensor], dict[int, dict[str, Any]]]:
    """Tensors and descriptions of clusters, by number, for a file."""
    tensors: dict[str, Tensor] = {}
    entries: dict[int, dict[str, Any]] = {}
    for number, c in clusters.items():  # of one channel they share their centres
        tensors[f"centres.{c.channel}"] = c.centres
        if c.origin is not None:
            tensors[f"origin.{c.channel}"] = c.origin
        own = ("channel", "place", "least", "alike", "named")
        entries[number] = {name: getattr(c, name) for name in own}
        if c.places:
            entries[number]["places"] = True
        if c.images is not None:
            tensors[f"images.{number}"] = c.images
            entries[number]["data"] = c.data
    return tensors, entries


@dataclass(frozen=True)
class ClusterEntry:
    """How a file describes a cluster."""

    channel: int
    place: int
    least: float
    alike: float = -1.0
    named: tuple[int, ...] = ()
    data: str = ""
    places: bool = False


def unpack(
    entries: Mapping[int, ClusterEntry], tensors: Mapping[str, Tensor], n_in: int | None = None
) -> dict[int, Cluster]:
    """Clusters of what a file holds, their relevance of n_in channels; ValueError if unsound."""
    clusters = {}
    for number, own in entries.items():
        centres, images = tensors[f"centres.{own.channel}"], tensors.get(f"images.{number}")
        if centres.dim() != 2 or (n_in is not None and centres.shape[1] != n_in):
            raise ValueError(f"the centres of channel {own.channel} do not fit its layer")
        in_range("a cluster's place", own.place, 0, len(centres) - 1)
        origin = tensors.get(f"origin.{own.channel}")
        if origin is not None and origin.shape != centres.shape[1:]:
            raise ValueError(f"the origin of channel {own.channel} does not fit its layer")
        in_range("the least cosine of a cluster's images", own.alike, -1, 1)
        for label in own.named:
            in_range("a class", label, 0, MAX_CLASSES - 1)
        if images is not None and (
            images.dtype != torch.int64
            or images.dim() != 1
            or not len(images)
            or images[0] < 0
            or (images.diff() <= 0).any()
        ):
            raise ValueError(f"the images of group {number} are no list of images in order")
        at = (own.channel, own.place, centres, own.least)
        clusters[number] = Cluster(*at, origin, own.alike, own.named, images, own.data, own.places)
    return clusters


def first_free(scan: Scan, clusters: Iterable[int] = ()) -> int:
    """The first number that is no class's, and no cluster's of some."""
    columns = (column for name in ("label", "prediction") for column in scan.columns(name))
    seen = [int(column.max()) for column in columns if len(column)]
    return max(len(scan.class_names), *(n + 1 for n in (*seen, *clusters)), 0)


def require_scan(scan: Scan, weights: str, layer: str, scan_id: str) -> None:
    """UsageError unless a scan is the one that findings are of, where they say which that is."""
    as_kind("scan", scan, Scan)
    if (weights, layer) != (scan.manifest.weights, scan.layer.name):
        raise UsageError("The scan is not of the network and layer that the findings are of.")
    if scan_id and scan_id != scan.manifest.scan_id:
        raise UsageError(
            "The findings are of another scan, such as a first look, whose images have other "
            "places; pass that scan, or find in this one."
        )


def find_images(scan: Scan, channel: int, groups: Any) -> list[list[int]]:
    """Check groups of images, and turn ids into indices; UsageError if they are no such groups."""
    example = "such as {1660: [[3, 'clocks/7.jpg'], [12]]}"
    try:
        lists = [list(group) for group in groups if not isinstance(group, str)]
        if len(lists) < len(groups):
            raise TypeError
    except TypeError:
        raise UsageError(
            f"The groups of channel {channel} are no lists of images; give some, {example}."
        ) from None
    if len(lists) < 2:
        raise UsageError(
            f"Channel {channel} has {count(len(lists), 'group')} of images; give two or more, "
            f"{example}."
        )
    index_of = _indices_of(scan, channel, chain.from_iterable(lists))
    found = [[index_of[image] for image in group] for group in lists]
    if not all(found):
        raise UsageError(f"A group of channel {channel} is empty; give each an image or more.")
    ((most, n_times),) = Counter(index for group in found for index in group).most_common(1)
    if n_times > 1:
        name = scan.ids([most]).get(most)
        raise UsageError(
            f"Channel {channel} names image {most if name is None else repr(name)} twice; leave it "
            "in one group."
        )
    return found


def sort_anew(
    scan: Scan,
    channel: int,
    groups: Sequence[Sequence[int]],
    join: Sequence[Sequence[int]],
    move: Mapping[int | str, int | None],
    part: Mapping[int, Sequence[Sequence[int | str]]],
) -> list[list[int]]:
    """Correct groups of images, by index; see `Findings.correct`."""
    try:
        joined = [list(own) for own in join]
        named = [*(k for own in joined for k in own), *dict(move).values(), *dict(part)]
    except (TypeError, ValueError):
        raise UsageError(
            "join, move or part is not of the form of join=[[0, 2]], move={7: 1} and "
            "part={0: [[3, 5], [8]]}; give them so."
        ) from None
    for number in named:
        if number is not None and (
            not isinstance(number, int) or type(number) is bool or number not in range(len(groups))
        ):
            raise UsageError(
                f"Channel {channel} has no concept {number!r}; give one of 0 to {len(groups) - 1}."
            )
    index_of, goes_to = _indices_of(scan, channel, move), list(range(len(groups)))
    for own in joined:
        same = {goes_to[k] for k in own}
        goes_to = [min(same) if k in same else k for k in goes_to]
    again: dict[int, list[int]] = {k: [] for k in goes_to}
    for k, group in zip(goes_to, groups, strict=True):
        again[k] += group
    for image, wanted in move.items():
        index = index_of[image]
        again = {k: [i for i in group if i != index] for k, group in again.items()}
        if wanted is not None:
            again[goes_to[wanted]].append(index)
    examples = {goes_to[k]: own for k, own in part.items()}
    if len(examples) < len(part):
        raise UsageError(
            f"Two concepts of channel {channel} are joined and both to be parted; give the parts "
            "of one."
        )
    parted: list[list[int]] = []
    for k, group in again.items():
        if k in examples:
            own_parts = find_images(scan, channel, examples[k])
            parted += _follow(scan, channel, group, own_parts)
        else:
            parted.append(group)
    return find_images(scan, channel, parted)


def _follow(
    scan: Scan, channel: int, group: Sequence[int], parts: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Let the images of a concept follow the nearest of the examples of its parts."""
    strange = sorted({i for own in parts for i in own} - set(group))
    if strange:
        raise UsageError(
            f"Image {strange[0]} is not of the concept of channel {channel} that is to be parted; "
            "move it there first."
        )
    named = {i for own in parts for i in own}
    rest = torch.tensor(sorted(set(group) - named), dtype=torch.int64)
    if not len(rest):
        return [list(own) for own in parts]
    centres = next(iter(put_together(scan, channel, parts, 0).clusters.values())).centres
    nearest = (described(scan, channel, rest)[2] @ centres.T).argmax(1)
    return [[*own, *rest[nearest == k].tolist()] for k, own in enumerate(parts)]


def _indices_of(scan: Scan, channel: int, images: Iterable[Any]) -> dict[Any, int]:
    """The index of each of some images, named by index or id; UsageError if there is none."""
    named = [
        image if isinstance(image, str) else whole_number(f"an image of channel {channel}", image)
        for image in images
    ]
    ids = {image for image in named if isinstance(image, str)}
    numbers = {one for one in named if not isinstance(one, str) and 0 <= one < 2**63}
    by_index = torch.tensor(sorted(numbers), dtype=torch.int64)
    found: dict[Any, int] = {}
    for column in scan.columns("index"):
        found |= {index: index for index in column[torch.isin(column, by_index)].tolist()}
    has_ids = False
    for own in scan.ids_by_shard() if ids else ():
        has_ids = has_ids or bool(own)
        found |= {one: index for index, one in own.items() if one in ids}
    if ids and not has_ids:
        raise UsageError("The scan knows no ids of its images; name them by index, as integers.")
    missing = next((image for image in named if image not in found), None)
    if missing is not None:
        raise UsageError(
            f"Channel {channel} names image {missing!r}, which the scan has not; name images by "
            "their place in the data set, or by id."
        )
    return found


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
