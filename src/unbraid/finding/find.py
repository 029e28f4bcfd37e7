"""Find polysemantic channels in a scan: "Find" in docs/method.md."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import torch

from unbraid.base.arguments import a_type, as_kind, whole_number, whole_numbers
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.progress import Progress
from unbraid.finding.arv import (
    ClassSums,
    class_cosines,
    class_sums,
    group_classes,
    shared_channels,
    uses,
)
from unbraid.finding.clusters import search_clusters
from unbraid.finding.cosine_intervals import MOST_JUDGED, with_chance
from unbraid.finding.find_options import Tau
from unbraid.finding.findings import (
    Concept,
    ConceptKind,
    Findings,
    Found,
    found_by_hand,
    with_names,
)
from unbraid.finding.membership import find_images, first_free
from unbraid.finding.pairs import pairs_of
from unbraid.finding.thresholds import (
    check_thresholds,
    choose_tau,
    nearest_findings,
    refuse_no_classes,
    refuse_places,
    typical_taus,
)
from unbraid.finding.whole import add_clusters
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
    images: Mapping[int, Sequence[Sequence[int | str]]] | None = None,
    progress: bool = False,
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
        concepts: with "clusters" labels, targets, tau and p play no part: the images that a channel
            responds to most are clustered by what fed it; clusters, numbered behind the last class,
            take the place of classes. With "whole" they stand beside the classes that use a
            channel: clusters of what else excites it.
        images: your own concepts as groups of images, by index in the data set or by id, such as
            `{1660: [[3, 17], [8, 21, 40]]}`; labels and thresholds play no part.
        progress: show, on standard error, how far steps are that take longer than a moment.

    Returns:
        Findings, perhaps empty; then `Findings.hint` says which thresholds come nearest, and
        `Findings.nearest` ranks the candidates. Pairs of classes come with the interval of their
        cosine (docs/chance.md).

    Raises:
        UsageError: a threshold is out of range, tau lies below the smallest share that the scan
            kept, or `channels` names a channel or class that the scan has not; or a scan without a
            target or labels is asked for classes.

    Source:
        Hesse et al. 2025, arXiv:2504.12939; "Find" in docs/method.md.
    """
    as_kind("scan", scan, Scan)
    tau, p, gamma = check_thresholds(tau, p, gamma, scan.manifest.min_share)
    if concepts not in get_args(ConceptKind):
        raise UsageError(f"concepts is {concepts!r}; use 'classes', 'clusters' or 'whole'.")
    # A network that is mostly wrong uses its channels for nothing that labels tell.
    if images is not None and (channels is not None or concepts != "classes"):
        raise UsageError("Pass images alone, without channels and without concepts.")
    of_classes = concepts != "clusters" and images is None
    if of_classes:
        refuse_no_classes(scan)
    accuracy = scanned_accuracy(scan) if of_classes else None
    if accuracy is not None and accuracy.warning:
        warnings.warn(accuracy.warning, stacklevel=3)
    if concepts == "clusters" and channels is not None:
        raise UsageError("Pass your own concepts in channels, or concepts='clusters', not both.")
    if of_classes:
        refuse_places(scan)
    auto, note, told = tau == "auto", "", Progress(progress)
    if tau == "auto" and not (scan.manifest.has_shares and not scan.manifest.places_of):
        tau, auto = scan.manifest.min_share, False
    elif tau == "auto":
        tau, *_, note = choose_tau(scan, p, gamma, told) if of_classes else typical_taus(scan)
        note = "" if concepts == "clusters" else note  # which are found without it
    if concepts == "clusters":
        found = search_clusters(scan, gamma, told)
    elif images is not None:
        found = _by_hand(scan, images)
    else:
        sums = class_sums(scan, [tau], progress=told)
        found = _search(scan, sums, p, gamma) if channels is None else _own(scan, sums, channels)
        if channels is None and not found.pairs:
            found.hint, found.nearest = nearest_findings(scan, tau, p, gamma, told)
        if len(found.pairs) > MOST_JUDGED:
            note = f"{note} {_tell_judged(len(found.pairs))}".strip()
        found.pairs = with_chance(scan, sums, found.pairs, told)
        if concepts == "whole":
            add_clusters(scan, sums, found, told)
    return Findings(
        tau,
        p,
        gamma,
        pairs=tuple(sorted(found.pairs, key=lambda pair: (pair.cosine, pair.channel))),
        concepts=found.concepts,
        class_names=with_names(scan, found.names),
        hint=found.hint,
        layer=scan.layer.name,
        weights=scan.manifest.weights,
        clusters=found.clusters,
        agreement=found.agreement,
        kind=concepts if images is None else "groups",
        auto=auto,
        note=note,
        nearest=found.nearest,
        scan=scan.manifest.scan_id,
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


def _tell_judged(n_pairs: int) -> str:
    return (
        f"Of {n_pairs:,} pairs only the {MOST_JUDGED:,} with the lowest cosines have an interval; "
        "lower gamma, or name some channels and their concepts in channels=, to have it of others."
    )


def _own(scan: Scan, sums: ClassSums, channels: Any) -> Found:
    if not isinstance(channels, Mapping):
        raise UsageError(
            f"channels is {a_type(channels)}; give groups of classes per channel, {_EXAMPLE}."
        )
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


def _by_hand(scan: Scan, images: Any) -> Found:
    example = "such as {1660: [[3, 17], [8]]}"
    if not isinstance(images, Mapping) or not images:
        raise UsageError(f"images are no groups of images per channel; give some, {example}.")
    found, first = Found(), first_free(scan)
    for key, groups in images.items():
        channel = whole_number("a channel in images", key)
        _check_channel(scan, channel, "images")
        new = found_by_hand(scan, channel, find_images(scan, channel, groups), first)
        first += len(new.clusters)
        found.pairs += new.pairs
        found.concepts |= new.concepts
        found.clusters |= new.clusters
        found.names |= new.names
    return found


def _check_channel(scan: Scan, channel: int, argument: str) -> None:
    layer = scan.layer
    if not 0 <= channel < layer.n_out:
        there = f"layer {layer.name!r} has channels 0 to {layer.n_out - 1}"
        raise UsageError(f"{argument} names channel {channel}, but {there}.")


def _use(sums: ClassSums, channel: int, classes: Sequence[int]) -> list[float]:
    """In what fraction of the images of each class a channel matters."""
    chosen = list(classes)
    fraction = sums.n_matters[0, chosen, channel] / sums.n_images[chosen].double()
    return cast(list[float], fraction.tolist())


def _own_concepts(
    scan: Scan, sums: ClassSums, channel: int, groups: Sequence[Sequence[int]]
) -> tuple[Concept, ...]:
    _check_channel(scan, channel, "channels")
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
