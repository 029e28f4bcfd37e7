"""Find polysemantic channels in a Scan: shares, ARVs, cosines, concepts.

Shapes: C_out channels, T classes, G groups, J taps; see METHOD.md sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unbraid.arvs import (
    ClassSums,
    class_cosines,
    class_sums,
    group_classes,
    shared_channels,
    uses,
)
from unbraid.errors import UsageError
from unbraid.findings import Concept, Findings, Pair
from unbraid.records import Scan
from unbraid.thresholds import check_thresholds, nearest_finding


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
    for channel, classes in shared_channels(uses(sums, p)[0]):
        cosines = class_cosines(scan, sums, channel, classes)
        if (cosines < gamma).any():
            found += _pairs(sums, channel, classes, cosines, cosines < gamma)
            concepts[channel] = group_classes(classes, cosines, gamma)
    hint = "" if found else nearest_finding(scan, tau, p, gamma)
    return _findings(scan, (tau, p, gamma), found, concepts, hint)


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
