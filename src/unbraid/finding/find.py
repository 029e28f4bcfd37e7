"""Find polysemantic channels in a scan: "Find" in docs/method.md."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import torch

from unbraid.base.arguments import as_kind, whole_number, whole_numbers
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.finding.arv import (
    ClassSums,
    class_cosines,
    class_sums,
    group_classes,
    shared_channels,
    uses,
)
from unbraid.finding.clusters import search_clusters
from unbraid.finding.cosine_intervals import with_chance
from unbraid.finding.findings import Concept, ConceptKind, Findings, Found, pairs_of
from unbraid.finding.thresholds import (
    Tau,
    check_thresholds,
    choose_tau,
    nearest_findings,
    typical_taus,
)
from unbraid.scanning.accuracy import scanned_accuracy
from unbraid.scanning.records import Scan

_EXAMPLE = "such as {1660: [[530], [938]]}"


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
    least a fraction p of the images of the class. Two classes that use it have different reasons if
    the cosine of their averaged relevance vectors is below gamma. Complete linkage groups the
    classes into concepts, within which every two are at least gamma alike.

    Args:
        scan: of the training images.
        tau: smallest share that matters; "auto" chooses one for the layer (docs/thresholds.md).
        p: fraction of a class's images, in (0, 1].
        gamma: cosine below which two classes have different reasons, in [-1, 1].
        channels: your own concepts in place of a search, such as `{1660: [[530], [938]]}`.
        concepts: with "clusters" labels, tau and p play no part: the images that a channel responds
            to most are clustered by what fed it; clusters, numbered behind the last class, take
            the place of classes.

    Returns:
        Findings, perhaps empty; then `Findings.hint` says which thresholds come nearest, and
        `Findings.nearest` ranks the candidates. Pairs of classes come with the interval of their
        cosine (docs/chance.md).

    Raises:
        UsageError: a threshold is out of range, tau lies below the smallest share that the scan
            kept, or `channels` names a channel or class that the scan has not.

    Source:
        Hesse et al. 2025, arXiv:2504.12939; "Find" in docs/method.md.
    """
    as_kind("scan", scan, Scan)
    tau, p, gamma = check_thresholds(tau, p, gamma, scan.manifest.min_share)
    if concepts not in get_args(ConceptKind):
        raise UsageError(f"concepts is {concepts!r}; use 'classes' or 'clusters'.")
    # A network that is mostly wrong uses its channels for nothing that labels tell.
    accuracy = scanned_accuracy(scan) if concepts == "classes" else None
    if accuracy is not None and accuracy.warning:
        warnings.warn(accuracy.warning, stacklevel=3)
    if concepts == "clusters" and channels is not None:
        raise UsageError("Pass your own concepts in channels, or concepts='clusters', not both.")
    auto, note = tau == "auto", ""
    if tau == "auto":
        by_class = concepts == "classes"
        tau, *_, note = choose_tau(scan, p, gamma) if by_class else typical_taus(scan)
    if concepts == "clusters":
        found = search_clusters(scan, gamma)
    else:
        sums = class_sums(scan, [tau])
        found = _search(scan, sums, p, gamma) if channels is None else _own(scan, sums, channels)
        if channels is None and not found.pairs:
            found.hint, found.nearest = nearest_findings(scan, tau, p, gamma)
        found.pairs = with_chance(scan, sums, found.pairs)
    class_names = dict(enumerate(scan.class_names)) | found.names  # behind classes, clusters
    return Findings(
        tau,
        p,
        gamma,
        pairs=tuple(sorted(found.pairs, key=lambda pair: (pair.cosine, pair.channel))),
        concepts=found.concepts,
        class_names=tuple(class_names.get(n, "") for n in range(max(class_names, default=-1) + 1)),
        hint=found.hint,
        layer=scan.layer.name,
        weights=scan.manifest.weights,
        clusters=found.clusters,
        agreement=found.agreement,
        kind=concepts,
        auto=auto,
        note=note,
        nearest=found.nearest,
    )


def _search(scan: Scan, sums: ClassSums, p: float, gamma: float) -> Found:
    found = Found()
    for channel, classes in shared_channels(uses(sums, p)[0]):
        cosines = class_cosines(scan, sums, channel, classes)
        pairs = pairs_of(channel, classes, cosines, cosines < gamma, _use(sums, channel, classes))
        if pairs:
            found.pairs += pairs
            found.concepts[channel] = group_classes(classes, cosines, gamma)
    return found


def _own(scan: Scan, sums: ClassSums, channels: Any) -> Found:
    if not isinstance(channels, Mapping):
        kind = type(channels).__name__
        raise UsageError(f"channels is a {kind}; give groups of classes per channel, {_EXAMPLE}.")
    found = Found()
    for key, groups in channels.items():
        channel = whole_number("a channel in channels", key)
        concepts = found.concepts[channel] = _own_concepts(scan, sums, channel, groups)
        concept_of = {c: k for k, concept in enumerate(concepts) for c in concept}
        classes = sorted(concept_of)
        of = torch.tensor([concept_of[c] for c in classes], dtype=torch.int64)
        cosines = class_cosines(scan, sums, channel, classes)
        use = _use(sums, channel, classes)
        found.pairs += pairs_of(channel, classes, cosines, of[:, None] != of, use)
    return found


def _use(sums: ClassSums, channel: int, classes: Sequence[int]) -> list[float]:
    """In what fraction of the images of each class a channel matters."""
    chosen = list(classes)
    fraction = sums.n_matters[0, chosen, channel] / sums.n_images[chosen].double()
    return cast(list[float], fraction.tolist())


def _own_concepts(
    scan: Scan, sums: ClassSums, channel: int, groups: Sequence[Sequence[int]]
) -> tuple[Concept, ...]:
    layer = scan.layer
    if not 0 <= channel < layer.n_out:
        there = f"layer {layer.name!r} has channels 0 to {layer.n_out - 1}"
        raise UsageError(f"channels names channel {channel}, but {there}.")
    try:
        concepts = tuple(tuple(whole_numbers("a concept", group)) for group in groups)
    except (TypeError, UsageError):
        concepts = ()
    classes = [c for concept in concepts for c in concept]
    if len(concepts) < 2 or not all(concepts) or len(set(classes)) < len(classes):
        raise UsageError(
            f"The concepts of channel {channel} must be two or more groups of classes that share "
            f"no class, {_EXAMPLE}."
        )
    for label in classes:
        if not 0 <= label < len(sums.n_images) or sums.n_images[label] == 0:
            raise UsageError(f"Channel {channel} names class {label}, of which there is no image.")
    return concepts
