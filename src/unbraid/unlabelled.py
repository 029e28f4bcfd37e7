"""Search for polysemantic channels without labels: clusters of images in place of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unbraid.arvs import cosines_of, group_classes
from unbraid.clusters import DescribedImages, cluster_images, top_images
from unbraid.findings import Concept, Found, Pair
from unbraid.records import Scan

_ENOUGH = 8  # top images of a class, for it to be compared with clusters
_NAMED = 0.2  # part of a cluster's images, for a class to be named


def search_clusters(scan: Scan, gamma: float) -> Found:
    """Cluster the top images of every channel by what fed it, and compare the clusters.

    Args:
        scan: of the training images.
        gamma: cosine of ARVs below which two clusters have different causes.
    """
    found = Found()
    first = _first_number(scan)
    nearest = (1.0, -1)  # lowest cosine, and channel
    for channel, top in top_images(scan):
        clusters, number = cluster_images(top, channel, first)
        if len(clusters) < 2:
            continue
        numbers = sorted(clusters)
        arvs = torch.stack([top.relevance[number == n].mean(0) for n in numbers])
        cosines = cosines_of(arvs)
        nearest = min(nearest, (float(cosines.min()), channel))
        if not (cosines < gamma).any():
            continue
        part = {n: float((number == n).double().mean()) for n in numbers}
        for i, j in (cosines < gamma).triu(1).nonzero().tolist():
            s, t = numbers[i], numbers[j]
            found.pairs.append(Pair(channel, s, t, float(cosines[i, j]), part[s], part[t]))
        concepts = group_classes(numbers, cosines, gamma)
        found.concepts[channel] = concepts
        found.clusters |= clusters
        for k, n in enumerate(numbers):
            found.names[n] = f"cluster {k + 1}{_classes(scan, top.label[number == n])}"
        found.agreement[channel] = _agreement(top, number, concepts, gamma)
        first += len(numbers)
    found.hint = "" if found.pairs else _hint(*nearest)
    return found


def adjusted_rand_index(one: Sequence[int], other: Sequence[int]) -> float:
    """Agreement of two partitions of the same things: 1 for equal ones, 0 on average by chance.

    Source:
        Hubert and Arabie 1985, Journal of Classification 2.

    >>> adjusted_rand_index([0, 0, 1, 1], [5, 5, 3, 3])
    1.0
    """
    places = [
        torch.tensor(labels, dtype=torch.int64).unique(return_inverse=True)[1]
        for labels in (one, other)
    ]
    n_rows, n_columns = (int(place.max()) + 1 for place in places)
    table = (places[0] * n_columns + places[1]).bincount(minlength=n_rows * n_columns).double()
    table = table.view(n_rows, n_columns)
    together = _pairs_within(table)
    one_pairs, other_pairs = _pairs_within(table.sum(1)), _pairs_within(table.sum(0))
    expected = one_pairs * other_pairs / max(_pairs_within(table.sum()), 1.0)
    most = (one_pairs + other_pairs) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)


def _pairs_within(sizes: Tensor) -> float:
    return float((sizes * (sizes - 1) / 2).sum())


def _agreement(
    top: DescribedImages, number: Tensor, concepts: Sequence[Concept], gamma: float
) -> float:
    """Compare concepts of clusters with those that classes make of the same images."""
    labels = [int(c) for c in top.label.unique() if (top.label == c).sum() >= _ENOUGH]
    if not labels:
        return float("nan")
    arvs = torch.stack([top.relevance[top.label == c].mean(0) for c in labels])
    groups = group_classes(labels, cosines_of(arvs), gamma) if len(labels) > 1 else ((labels[0],),)
    of_label = {c: k for k, group in enumerate(groups) for c in group}
    of_number = {n: k for k, concept in enumerate(concepts) for n in concept}
    both = [
        (of_label[c], of_number[n])
        for c, n in zip(top.label.tolist(), number.tolist(), strict=True)
        if c in of_label
    ]
    return adjusted_rand_index(*zip(*both, strict=True))


def _hint(cosine: float, channel: int) -> str:
    least = math.ceil(cosine * 1000) / 1000  # above the cosine as printed, it is found
    if least >= 1:
        return "No channel's top images form clusters that differ."
    return (
        f"Nearest: channel {channel} has clusters with a cosine of {least:.3f}, which gamma would "
        "have to exceed."
    )


def _first_number(scan: Scan) -> int:
    """The first number that is no class."""
    seen = scan.labels_seen() | {int(c) for column in scan.columns("prediction") for c in column}
    return max(len(scan.class_names), max(seen, default=-1) + 1)


def _classes(scan: Scan, labels: Tensor) -> str:
    """Name the classes that a cluster mostly holds, in brackets."""
    counts = labels.bincount()
    known = scan.class_names
    names = [
        known[c] if c < len(known) and known[c] else str(c)
        for c in counts.argsort(descending=True).tolist()[:3]
        if counts[c] >= _NAMED * len(labels)
    ]
    return f" ({', '.join(names)})" if names else ""
