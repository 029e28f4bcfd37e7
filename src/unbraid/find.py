"""Find polysemantic channels in a Scan: shares, ARVs, cosines, concepts.

Shapes: C_out channels, T classes, G groups, J taps; see METHOD.md sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from unbraid.errors import UsageError
from unbraid.findings import Concept, Findings, Pair
from unbraid.records import Scan
from unbraid.relevance import input_relevance


@dataclass(frozen=True)
class ClassSums:
    """What one reading of a Scan leaves of every class."""

    n_images: Tensor  # (T,)
    pooled: Tensor  # (T, G, J), summed over the images of the class, float64
    n_matters: Tensor  # (tau, T, C_out), images of the class in which the channel matters


def find(
    scan: Scan,
    *,
    tau: float = 0.03,
    p: float = 0.75,
    gamma: float = 0.5,
    channels: Mapping[int, Sequence[Sequence[int]]] | None = None,
) -> Findings:
    """Find the channels that two or more classes use for different reasons.

    Channel o matters in an image if its share is tau or more; a class uses it if it matters in at
    least a fraction p of the images of the class. Two classes that use it have different reasons
    if the cosine of their averaged relevance vectors is below gamma. The classes that use a
    polysemantic channel are then grouped by complete linkage: within a concept every two classes
    are at least gamma alike.

    Args:
        scan: of the training images.
        tau: smallest share that matters.
        p: fraction of a class's images, in (0, 1].
        gamma: cosine below which two classes have different reasons, in [-1, 1].
        channels: your own concepts in place of a search, as groups of classes per channel, for
            example `{1660: [[530], [938]]}`.

    Returns:
        Findings, perhaps empty; then `Findings.hint` says which thresholds come nearest.

    Raises:
        UsageError: a threshold is out of range, tau lies below the smallest share that the scan
            kept, or `channels` names a channel or class that the scan has not.

    Source:
        Hesse et al. 2025, arXiv:2504.12939; METHOD.md sections 3 and 5.
    """
    check_thresholds(tau, p, gamma, scan.manifest.min_share)
    sums = class_sums(scan, [tau])
    if channels is not None:
        concepts = {o: _own_concepts(scan, sums, o, groups) for o, groups in channels.items()}
        own = [pair for o, groups in concepts.items() for pair in _own_pairs(scan, sums, o, groups)]
        return _findings(scan, (tau, p, gamma), own, concepts, "")
    found: list[Pair] = []
    concepts = {}
    for channel, classes in _shared_channels(uses(sums, p)[0]):
        cosines = class_cosines(scan, sums, channel, classes)
        if (cosines < gamma).any():
            found += _pairs(sums, channel, classes, cosines, cosines < gamma)
            concepts[channel] = group_classes(classes, cosines, gamma)
    hint = "" if found else _hint(scan, tau, p, gamma)
    return _findings(scan, (tau, p, gamma), found, concepts, hint)


def class_sums(scan: Scan, taus: Sequence[float]) -> ClassSums:
    """Read a Scan once and sum its records by class."""
    spec = scan.layer
    n_classes = len(scan.class_names)
    n_images = torch.zeros(n_classes, dtype=torch.int64)
    pooled = torch.zeros(n_classes, spec.groups, spec.n_taps, dtype=torch.float64)
    matters = torch.zeros(len(taus), n_classes * spec.n_out, dtype=torch.int64)
    for records in scan.shards():
        n_new = int(records.label.max()) + 1 if len(records) else 0
        if n_new > n_classes:  # a data set need not name its classes
            more = n_new - n_classes
            n_images = torch.cat([n_images, n_images.new_zeros(more)])
            pooled = torch.cat([pooled, pooled.new_zeros(more, *pooled.shape[1:])])
            matters = torch.cat([matters, matters.new_zeros(len(taus), more * spec.n_out)], 1)
            n_classes = n_new
        n_images.index_add_(0, records.label, torch.ones_like(records.label))
        pooled.index_add_(0, records.label, records.pooled.double())
        place = records.label[records.share_image] * spec.n_out + records.share_channel
        for k, tau in enumerate(taus):
            chosen = place[records.share_value >= tau]
            matters[k].index_add_(0, chosen, torch.ones_like(chosen))
    return ClassSums(n_images, pooled, matters.unflatten(1, (n_classes, spec.n_out)))


def uses(sums: ClassSums, p: float) -> Tensor:
    """Say which class uses which channel, (tau, T, C_out)."""
    fraction = sums.n_matters / sums.n_images.clamp(min=1).double()[:, None]
    return (fraction >= p) & (sums.n_images > 0)[:, None]


def concept_mean(sums: ClassSums, concept: Concept) -> Tensor:
    """Mean pooled input over all images of a concept's classes, (G, J)."""
    chosen = list(concept)
    return sums.pooled[chosen].sum(0) / sums.n_images[chosen].sum()


def averaged_relevance(scan: Scan, channel: int, means: Tensor) -> Tensor:
    """ARV: mean over images of each input channel's relevance for a channel.

    The layer is linear, so it is enough to know the mean pooled input of the images.

    Args:
        scan: whose layer it is.
        channel: an output channel.
        means: (..., G, J), mean pooled inputs, of a class or of a concept.

    Returns:
        (..., C_in / G), float64, in units of the summed pre-activation.

    Source:
        METHOD.md section 2.
    """
    pooled = means[..., scan.layer.group_of(channel), :]
    return input_relevance(scan.weight[channel].double(), pooled, scan.layer.taps_per_input)


def class_cosines(scan: Scan, sums: ClassSums, channel: int, classes: Sequence[int]) -> Tensor:
    """Cosines of the ARVs of some classes at a channel, (classes, classes)."""
    chosen = list(classes)
    means = sums.pooled[chosen] / sums.n_images[chosen, None, None]
    arvs = averaged_relevance(scan, channel, means)
    norms = arvs.norm(dim=1)
    cosines: Tensor = (arvs @ arvs.T / (norms[:, None] * norms)).clamp(-1, 1)
    return cosines.nan_to_num(1.0)  # no relevance at all tells nothing apart


def group_classes(classes: Sequence[int], cosines: Tensor, gamma: float) -> tuple[Concept, ...]:
    """Group classes by complete linkage: within a group every two are at least gamma alike.

    >>> cosines = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    >>> group_classes([4, 5, 8], cosines, gamma=0.5)
    ((4, 5), (8,))
    """
    apart = 4.0  # beyond any 1 - cosine, so that rounding cannot join what gamma parts
    distances = np.where(cosines.numpy() < gamma, apart, 1 - cosines.numpy())
    numbers = fcluster(linkage(squareform(distances, checks=False), "complete"), 3.0, "distance")
    groups: dict[int, list[int]] = {}
    for label, number in zip(classes, numbers.tolist(), strict=True):
        groups.setdefault(number, []).append(label)
    return tuple(sorted(tuple(group) for group in groups.values()))


def _shared_channels(users: Tensor) -> Iterator[tuple[int, list[int]]]:
    """Channels that two or more classes use, with these classes; users is (T, C_out)."""
    for channel in (users.sum(0) >= 2).nonzero()[:, 0].tolist():
        yield channel, users[:, channel].nonzero()[:, 0].tolist()


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
    of = torch.tensor([k for _, k in numbered])
    cosines = class_cosines(scan, sums, channel, classes)
    return _pairs(sums, channel, classes, cosines, of[:, None] != of)


def _findings(
    scan: Scan,
    thresholds: tuple[float, float, float],
    pairs: Sequence[Pair],
    concepts: dict[int, tuple[Concept, ...]],
    hint: str,
) -> Findings:
    in_order = tuple(sorted(pairs, key=lambda pair: (pair.cosine, pair.channel)))
    return Findings(
        *thresholds,
        pairs=in_order,
        concepts=concepts,
        class_names=scan.class_names,
        hint=hint,
        layer=scan.layer.name,
        weights=scan.manifest.weights,
    )


def check_thresholds(tau: float, p: float, gamma: float, min_share: float) -> None:
    """Raise unless thresholds are in range and not below the smallest share kept.

    Raises:
        UsageError: says which is not.
    """
    if not 0 < tau <= 1:
        raise UsageError(f"tau is {tau:g}; a share must lie above 0 and not above 1.")
    if tau < min_share:
        raise UsageError(
            f"tau is {tau:g}, but the scan keeps no share below {min_share:.15g}; raise tau or "
            "scan anew with a smaller min_share."
        )
    if not 0 < p <= 1:
        raise UsageError(f"p is {p:g}; a fraction of images must lie above 0 and not above 1.")
    if not -1 <= gamma <= 1:
        raise UsageError(f"gamma is {gamma:g}; a cosine must lie between -1 and 1.")


def _own_concepts(
    scan: Scan, sums: ClassSums, channel: int, groups: Sequence[Sequence[int]]
) -> tuple[Concept, ...]:
    """Check concepts that the user names."""
    if not isinstance(channel, int) or not 0 <= channel < scan.layer.n_out:
        raise UsageError(
            f"channels names channel {channel!r}, but layer {scan.layer.name!r} has channels 0 to "
            f"{scan.layer.n_out - 1}."
        )
    try:
        concepts = tuple(tuple(int(c) for c in group) for group in groups)
    except (TypeError, ValueError):
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


def _hint(scan: Scan, tau: float, p: float, gamma: float) -> str:
    """Say which thresholds come nearest to finding something: lower tau first, then gamma.

    Every number in the hint is one that was tried, as it is printed, so following it works.
    """
    least = scan.manifest.min_share
    tried = [float(f"{tau * 0.9**k:.3g}") for k in range(1, 60)]
    taus = [tau, *(t for t in tried if least < t < tau), *([least] if least < tau else [])]
    nearest = (float("inf"), 0.0, 0)
    sums = class_sums(scan, taus)
    for lower, users in zip(taus, uses(sums, p), strict=True):
        for channel, classes in _shared_channels(users):
            cosine = float(class_cosines(scan, sums, channel, classes).min())
            nearest = min(nearest, (cosine, -lower, channel))
        if nearest[0] < gamma:
            return f"Nearest: tau {lower:.15g} finds channel {nearest[2]}."
    if nearest[0] > 1:
        return (
            f"No two classes use the same channel at any tau down to {least:.15g}; lower p, or "
            "scan with a smaller min_share."
        )
    cosine, negative_tau, channel = nearest
    return (
        f"Nearest: at tau {-negative_tau:.15g} channel {channel} has a cosine of "
        f"{math.ceil(cosine * 1000) / 1000:.3f}, which gamma would have to exceed."
    )
