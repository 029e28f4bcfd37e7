"""Clusters of images that play the part of classes where concepts are sought without labels.

A channel's top images are described by what fed it in them, and clustered. A cluster has a number
behind the last class, so that concepts, whether of classes or of clusters, are groups of numbers.
Which images of any scan belong to a cluster follows from their records: those that the channel
answers to, with this centre as the nearest. Shapes: N images, C_out channels, C input channels of a
group, K clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.clustering import Cluster, find_clusters
from unbraid.records import Records, Scan
from unbraid.relevance import input_relevance

_N_TOP = 1000  # images of a channel
_N_STRONGEST = 10  # that tell how strong an answer can be
_LEAST_PART = 0.25  # of the way from the mean answer to the strongest
_BYTES_AT_ONCE = 1 << 30  # of pooled inputs held in memory


@dataclass(frozen=True, eq=False)
class DescribedImages:
    """The images that a channel answers to most, and what fed it there."""

    label: Tensor  # (N,)
    relevance: Tensor  # (N, C), of the input channels for the channel; never all zero
    least: float  # the smallest answer among them


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
    relevance = _relevance(scan, pooled, cluster.channel)
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


def top_images(scan: Scan) -> Iterator[tuple[int, DescribedImages]]:
    """Gather the top images of every channel, as many channels at a time as memory holds.

    At most 1000 images, and only those in which the channel answers with at least a quarter of
    the way from its mean answer to its ten strongest.
    """
    channels = list(range(scan.layer.n_out))
    values, places = _strongest(scan, channels)
    if not len(values):  # no image could be read
        return
    bytes_each = scan.layer.n_taps * scan.weight.element_size() * len(values)
    at_once = max(1, _BYTES_AT_ONCE // bytes_each)
    for first in range(0, len(channels), at_once):
        part = channels[first : first + at_once]
        strong = {o: values[:, o].isfinite() for o in part}
        chosen = {o: places[strong[o], o].sort().values for o in part}
        labels, pooled = _gather(scan, chosen)
        for o in part:
            relevance = _relevance(scan, pooled[o], o)
            some = relevance.norm(dim=1) > 0
            answers = values[strong[o], o]
            # A little less, since the same answer may be rounded otherwise in another batch.
            rounding = torch.finfo(scan.weight.dtype).eps ** 0.5 * answers.abs().max()
            least = float(answers.min() - rounding)
            yield o, DescribedImages(labels[o][some], relevance[some], least)


def cluster_images(
    top: DescribedImages, channel: int, first: int
) -> tuple[dict[int, Cluster], Tensor]:
    """Cluster a channel's top images.

    Args:
        top: the images.
        channel: whose they are.
        first: number of the first cluster.

    Returns:
        The clusters by number, and the number of each image's cluster, (N,).
    """
    nearest, centres = find_clusters(F.normalize(top.relevance, dim=1))
    clusters = {first + k: Cluster(channel, k, centres, top.least) for k in range(len(centres))}
    return clusters, nearest + first


def _strongest(scan: Scan, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Strongest mean responses and their places in the scan, (n, C_out); -inf where too weak.

    Without any image, n is 0.
    """
    values = torch.zeros(0, len(channels), dtype=torch.float64)
    places = torch.zeros(0, len(channels), dtype=torch.int64)
    total, n_images = torch.zeros(len(channels), dtype=torch.float64), 0
    for records in scan.shards():
        new = mean_responses(scan, records.pooled, records.n_positions, channels)
        place = torch.arange(n_images, n_images + len(new), dtype=torch.int64)[:, None].expand_as(
            new
        )
        total += new.sum(0)
        n_images += len(new)
        values, places = torch.cat([values, new]), torch.cat([places, place])
        values, order = values.topk(min(_N_TOP, len(values)), dim=0)
        places = places.gather(0, order)
    if n_images == 0:
        return values, places
    mean, strongest = total / n_images, values[:_N_STRONGEST].mean(0)
    least = mean + _LEAST_PART * (strongest - mean)
    # Rounding must not put the mean of equal answers above them all.
    weak = values < least.minimum(values[0])
    return values.masked_fill(weak, -torch.inf), places


def _gather(
    scan: Scan, chosen: Mapping[int, Tensor]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Labels (n,) and pooled inputs (n, J) of each channel's chosen places, which are sorted."""
    labels: dict[int, list[Tensor]] = {o: [] for o in chosen}
    pooled: dict[int, list[Tensor]] = {o: [] for o in chosen}
    start = 0
    for records in scan.shards():
        bounds = torch.tensor([start, start + len(records)], dtype=torch.int64)
        for o, places in chosen.items():
            low, high = torch.searchsorted(places, bounds).tolist()
            here = places[low:high] - start
            labels[o].append(records.label[here])
            pooled[o].append(records.pooled[here, scan.layer.group_of(o)])
        start += len(records)
    return (
        {o: torch.cat(parts) for o, parts in labels.items()},
        {o: torch.cat(parts) for o, parts in pooled.items()},
    )


def _relevance(scan: Scan, pooled: Tensor, channel: int) -> Tensor:
    """Relevance of the input channels, (N, C), from pooled inputs of their group, (N, J)."""
    return input_relevance(
        scan.weight[channel].double(), pooled.double(), scan.layer.taps_per_input
    )
