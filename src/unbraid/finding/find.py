"""Find polysemantic channels in a Scan: shares, ARVs, cosines, concepts.

Shapes: C_out channels, T classes, G groups, J taps; see METHOD.md sections 2 and 3.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from unbraid.base.arguments import as_kind, whole_number, whole_numbers
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.finding.arv import (
    ClassSums,
    class_cosines,
    class_sums,
    cosines_of,
    group_classes,
    shared_channels,
    uses,
)
from unbraid.finding.clusters import DescribedImages, cluster_images, top_images
from unbraid.finding.cosine_intervals import with_chance
from unbraid.finding.findings import Concept, ConceptKind, Findings, Found, Pair
from unbraid.finding.thresholds import Tau, check_thresholds, choose_tau, nearest_finding
from unbraid.scanning.accuracy import scanned_accuracy
from unbraid.scanning.records import Scan

# Search for polysemantic channels without labels: clusters of images in place of classes.


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


# Find polysemantic channels in a Scan: shares, ARVs, cosines, concepts.


@in_plain_modes
def find(
    scan: Scan,
    *,
    tau: Tau = 0.03,
    p: float = 0.75,
    gamma: float = 0.5,
    channels: Mapping[int, Sequence[Sequence[int]]] | None = None,
    concepts: ConceptKind = "classes",
) -> Findings:
    """Find the channels that two or more classes use for different reasons.

    Channel o matters in an image if its share is tau or more; a class uses it if it matters in at
    least a fraction p of the images of the class. Two classes that use it have different reasons
    if the cosine of their averaged relevance vectors is below gamma. The classes that use a
    polysemantic channel are then grouped by complete linkage: within a concept every two classes
    are at least gamma alike.

    Args:
        scan: of the training images.
        tau: smallest share that matters; "auto" chooses one that fits the layer: ten channels
            matter in a typical image, or a quarter of a narrow layer's (docs/thresholds.md).
        p: fraction of a class's images, in (0, 1].
        gamma: cosine below which two classes have different reasons, in [-1, 1].
        channels: your own concepts in place of a search, as groups of classes per channel, for
            example `{1660: [[530], [938]]}`.
        concepts: what concepts are made of. With "clusters" labels play no part, nor do tau and p:
            the images that a channel answers to most are clustered by what fed it in them, and
            clusters take the place of classes, with numbers behind the last class.

    Returns:
        Findings, perhaps empty; then `Findings.hint` says which thresholds come nearest. Pairs of
        classes come with the interval of their cosine (docs/chance.md).

    Raises:
        UsageError: a threshold is out of range, tau lies below the smallest share that the scan
            kept, or `channels` names a channel or class that the scan has not.

    Source:
        Hesse et al. 2025, arXiv:2504.12939; METHOD.md sections 3 and 5.
    """
    as_kind("scan", scan, Scan)
    tau, p, gamma = check_thresholds(tau, p, gamma, scan.manifest.min_share)
    if concepts not in get_args(ConceptKind):
        raise UsageError(f"concepts is {concepts!r}; use 'classes' or 'clusters'.")
    # A network that is mostly wrong uses its channels for nothing that labels tell.
    accuracy = scanned_accuracy(scan) if concepts == "classes" else None
    if accuracy is not None and accuracy.warning:
        warnings.warn(accuracy.warning, stacklevel=3)
    note = ""
    auto = tau == "auto"
    if tau == "auto":
        tau, note = choose_tau(scan)
    if channels is not None:
        if concepts == "clusters":
            raise UsageError(
                "Pass your own concepts in channels, or concepts='clusters', not both."
            )
        found = _own(scan, class_sums(scan, [tau]), channels)
    elif concepts == "clusters":
        found = search_clusters(scan, gamma)
    else:
        found = _search_classes(scan, class_sums(scan, [tau]), p, gamma)
        if not found.pairs:
            found.hint = nearest_finding(scan, tau, p, gamma)
    return Findings(
        tau,
        p,
        gamma,
        pairs=tuple(sorted(found.pairs, key=lambda pair: (pair.cosine, pair.channel))),
        concepts=found.concepts,
        class_names=_names(scan, found),
        hint=found.hint,
        layer=scan.layer.name,
        weights=scan.manifest.weights,
        clusters=found.clusters,
        agreement=found.agreement,
        kind=concepts,
        auto=auto,
        note=note,
    )


def _search_classes(scan: Scan, sums: ClassSums, p: float, gamma: float) -> Found:
    found = Found()
    for channel, classes in shared_channels(uses(sums, p)[0]):
        cosines = class_cosines(scan, sums, channel, classes)
        different = (cosines < gamma).triu(1)  # rounding can make a class unlike itself
        if different.any():
            found.pairs += _pairs(sums, channel, classes, cosines, different)
            found.concepts[channel] = group_classes(classes, cosines, gamma)
    found.pairs = with_chance(scan, sums, found.pairs)
    return found


def _own(scan: Scan, sums: ClassSums, channels: Mapping[int, Sequence[Sequence[int]]]) -> Found:
    if not isinstance(channels, Mapping):
        raise UsageError(
            f"channels is a {type(channels).__name__}; give groups of classes per channel, for "
            "example {1660: [[530], [938]]}."
        )
    found = Found()
    for given, groups in channels.items():
        channel = whole_number("a channel in channels", given)
        found.concepts[channel] = _own_concepts(scan, sums, channel, groups)
        found.pairs += _own_pairs(scan, sums, channel, found.concepts[channel])
    found.pairs = with_chance(scan, sums, found.pairs)
    return found


def _names(scan: Scan, found: Found) -> tuple[str, ...]:
    """Names by number, of classes and behind them of clusters."""
    names = [*scan.class_names, *[""] * (max(found.names, default=-1) + 1 - len(scan.class_names))]
    for number, name in found.names.items():
        names[number] = name
    return tuple(names)


def _pairs(
    sums: ClassSums, channel: int, classes: Sequence[int], cosines: Tensor, wanted: Tensor
) -> list[Pair]:
    """The wanted pairs of classes at a channel; cosines and wanted are (classes, classes)."""
    use = (sums.n_matters[0, :, channel] / sums.n_images.clamp(min=1).double()).tolist()
    places = wanted.triu(1).nonzero().tolist()
    return [
        Pair(channel, s, t, float(cosines[i, j]), use[s], use[t])
        for i, j in places
        for s, t in [(classes[i], classes[j])]
    ]


def _own_pairs(
    scan: Scan, sums: ClassSums, channel: int, concepts: Sequence[Concept]
) -> list[Pair]:
    """All pairs of classes from different concepts."""
    numbered = sorted((label, k) for k, concept in enumerate(concepts) for label in concept)
    classes = [label for label, _ in numbered]
    of = torch.tensor([k for _, k in numbered], dtype=torch.int64)
    cosines = class_cosines(scan, sums, channel, classes)
    return _pairs(sums, channel, classes, cosines, of[:, None] != of)


def _own_concepts(
    scan: Scan, sums: ClassSums, channel: int, groups: Sequence[Sequence[int]]
) -> tuple[Concept, ...]:
    """Check concepts that the user names."""
    if not 0 <= channel < scan.layer.n_out:
        raise UsageError(
            f"channels names channel {channel}, but layer {scan.layer.name!r} has channels 0 to "
            f"{scan.layer.n_out - 1}."
        )
    try:
        concepts = tuple(tuple(whole_numbers("a concept", group)) for group in groups)
    except (TypeError, UsageError):
        concepts = ()
    classes = [c for concept in concepts for c in concept]
    if len(concepts) < 2 or not all(concepts) or len(set(classes)) < len(classes):
        raise UsageError(
            f"The concepts of channel {channel} must be two or more groups of classes that share "
            "no class, such as [[530], [938]]."
        )
    for label in classes:
        if not 0 <= label < len(sums.n_images) or sums.n_images[label] == 0:
            raise UsageError(
                f"Channel {channel} names class {label}, of which the scan has no image."
            )
    return concepts
