"""Thresholds of `find`: T classes, c of them sharing a channel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import ROUND_FLOOR, Context

import torch
from torch import Tensor

from unbraid.base.errors import DataError, UsageError
from unbraid.base.progress import QUIET, Progress
from unbraid.finding.arv import ClassSums, class_cosines, class_sums, shared_channels, uses
from unbraid.finding.cosine_intervals import with_chance
from unbraid.finding.find_options import Tau, plain_thresholds
from unbraid.finding.findings import Candidate
from unbraid.finding.membership import mean_responses
from unbraid.finding.pairs import Pair, is_sure, pairs_of
from unbraid.scanning.records import Scan

ONE_CLASS = (
    "All images are of one class, and a search among classes needs two; take concepts='clusters'."
)

# How these were chosen, and what other rules gave: docs/evidence-thresholds.md.
N_MATTER = 10, 40  # channels that matter in a typical image at the highest and lowest tau tried
_PART = 0.25, 0.5  # of a narrow layer, and no more of it: half and all of its positive shares
N_SURE = 8  # channels that tau is lowered for, or the first part of a narrow layer
_SPARE = 4  # times as many channels are tried first
N_NEAREST = 8  # candidates that are told of where nothing is found
_N_SHOWN = 3  # images of each of a candidate's classes
_STEP = 0.9  # from one tau tried to the next
_COUNTS_AT_ONCE = 1 << 26  # of images, per tau, class and channel


def refuse_places(scan: Scan) -> None:
    """Raise a UsageError for a scan of places, which have no shares of a logit."""
    if scan.manifest.places_of:
        raise UsageError(
            "A scan of places does not say which classes use a channel; pass concepts='clusters', "
            "or groups of places in images."
        )


def refuse_no_classes(scan: Scan) -> None:
    """Raise UsageError if a scan does not tell which channels matter for which classes."""
    if not scan.manifest.has_shares:
        raise UsageError(
            "The scan was made without a target, so it does not tell which channels matter; ask "
            "for concepts='clusters', pass groups of images, or scan with a target."
        )
    if scan.manifest.labels == "none":
        raise UsageError(
            "The scan was made without labels, so there are no classes to find concepts of; ask "
            "for concepts='clusters', pass groups of images, or scan with labels."
        )


def check_thresholds(
    tau: Tau, p: float, gamma: float, min_share: float
) -> tuple[Tau, float, float]:
    """Return tau, p and gamma in plain types; raises UsageError."""
    return plain_thresholds(tau, p, gamma, min_share, " or scan again with a smaller min_share")


def choose_tau(scan: Scan, p: float, gamma: float, progress: Progress = QUIET) -> tuple[float, str]:
    """Lower tau until eight channels are found surely; a note where the scan bounds it.

    From the share that ten channels of a typical image have to that of forty, and no further than
    sure findings grow in number: docs/thresholds.md.
    """
    highest, lowest, note = typical_taus(scan)
    goal = min(N_SURE, math.ceil(scan.layer.n_out * _PART[0]))
    most, best = 0, highest
    judged: set[tuple[int, int, int]] = set()  # pairs, by channel and classes
    sure: set[int] = set()  # channels
    known: dict[int, list[int]] = {}  # the classes last compared, by channel
    for tau, sums, users in _lower(scan, [highest, *_below(highest, lowest)], p, progress):
        new = []
        for channel, classes in shared_channels(users):
            if known.get(channel) != classes:
                known[channel] = classes
                cosines = class_cosines(scan, sums, channel, classes)
                new += pairs_of(channel, classes, cosines, cosines < gamma, [0.0] * len(classes))
        # Where very many are found, the lowest cosines of a few channels suffice.
        new = sorted((pair for pair in new if _key(pair) not in judged), key=_by_cosine)
        judged |= {_key(pair) for pair in new}
        of_channel = {pair.channel: pair for pair in reversed(new)}
        first = sorted(of_channel.values(), key=_by_cosine)[: _SPARE * goal]
        tried = {_key(pair) for pair in first}
        for some in (first, [pair for pair in new if _key(pair) not in tried]):
            intervals = with_chance(scan, sums, some, progress)
            sure |= {pair.channel for pair in intervals if is_sure(pair, gamma)}
            if len(sure) >= goal:
                return tau, note
        if len(sure) > most:
            most, best = len(sure), tau
    return best, note


def _by_cosine(pair: Pair) -> float:
    return pair.cosine


def _key(pair: Pair) -> tuple[int, int, int]:
    return pair.channel, pair.class1, pair.class2


def typical_taus(scan: Scan) -> tuple[float, float, str]:
    """The largest shares that ten, and forty, channels of a typical image have; a note."""
    numbers = [
        min(n, math.ceil(scan.layer.n_out * part)) for n, part in zip(N_MATTER, _PART, strict=True)
    ]
    least = scan.manifest.min_share
    parts = [
        (own["label"], *(_nth_share(own["share_start"], own["share_value"], n) for n in numbers))
        for own in scan.tensors("label", "share_start", "share_value")
    ]
    labels, *shares = (torch.cat(part) for part in zip(*parts, strict=True))
    if not len(labels):
        raise DataError(f"The scan in {scan.path} holds no image to choose tau by; scan again.")
    highest, lowest = (_typical(labels, own) for own in shares)
    if highest > 0:
        return max(highest, least), max(lowest, least), ""
    note = (
        f"The tau chosen is the smallest share that the scan kept, {least:g}: fewer than "
        f"{numbers[0]} channels of a typical image reach it."
    )
    return least, least, note


def _typical(labels: Tensor, shares: Tensor) -> float:
    """The share that half of the images of half of the classes reach, in three digits."""
    sizes = labels.unique(return_counts=True)[1].tolist()
    by_class = shares[labels.argsort(stable=True)].split(sizes)
    typical = _reached_by_half(torch.stack([_reached_by_half(own) for own in by_class]))
    three_digits = Context(prec=3, rounding=ROUND_FLOOR)
    return float(three_digits.create_decimal(repr(float(typical))))


def _below(tau: float, least: float) -> list[float]:
    """Lower taus to try, down to the least."""
    tried = [float(f"{tau * _STEP**k:.3g}") for k in range(1, 60)]
    return [*(t for t in tried if least < t < tau), *([least] if least < tau else [])]


def _lower(
    scan: Scan, taus: Sequence[float], p: float, progress: Progress
) -> Iterator[tuple[float, ClassSums, Tensor]]:
    """For tau after tau the sums at this tau alone and who uses which channel, (T, C_out)."""
    n_classes = max(len(scan.class_names), max(scan.labels_seen(), default=0) + 1)
    at_once = max(1, _COUNTS_AT_ONCE // (n_classes * scan.layer.n_out))
    for first in range(0, len(taus), at_once):
        portion = taus[first : first + at_once]
        sums = class_sums(scan, portion, progress=progress)
        for k, (tau, users) in enumerate(zip(portion, uses(sums, p), strict=True)):
            yield tau, replace(sums, n_matters=sums.n_matters[k : k + 1]), users


def _nth_share(start: Tensor, value: Tensor, n: int) -> Tensor:
    """(N,), the n-th largest share of each image, zero where fewer were kept; see `Records`."""
    image = torch.repeat_interleave(torch.arange(len(start) - 1, dtype=torch.int64), start.diff())
    order = value.argsort(descending=True)
    order = order[image[order].argsort(stable=True)]  # by image, largest share first
    place = start[:-1] + n - 1
    enough = place < start[1:]
    shares = value.new_zeros(len(place))
    shares[enough] = value[order[place[enough]]]
    return shares


def _reached_by_half(values: Tensor) -> Tensor:
    """The largest number that at least half of the values reach."""
    return values.sort(descending=True).values[(len(values) - 1) // 2]


def nearest_findings(
    scan: Scan, tau: float, p: float, gamma: float, progress: Progress = QUIET
) -> tuple[str, tuple[Candidate, ...]]:
    """Rank what comes nearest to being found, one pair a channel: higher tau, then lower cosine.

    Those below gamma come first; a sentence tells of the very first.
    """
    passing: dict[int, Candidate] = {}
    others: dict[int, Candidate] = {}
    known: dict[int, list[int]] = {}  # the classes last compared, by channel
    least = scan.manifest.min_share
    for lower, sums, users in _lower(scan, [tau, *_below(tau, least)], p, progress):
        for channel, classes in shared_channels(users):
            if channel in passing or known.get(channel) == classes:
                continue
            known[channel] = classes
            cosines = class_cosines(scan, sums, channel, classes)
            candidate = _lowest(sums, channel, classes, cosines, lower, gamma)
            if candidate.pair.cosine < gamma:
                passing[channel] = candidate
            elif channel not in others or candidate.pair.cosine < others[channel].pair.cosine:
                others[channel] = candidate
        if len(passing) >= N_NEAREST:
            break
    left = [candidate for channel, candidate in others.items() if channel not in passing]
    first = sorted(passing.values(), key=lambda c: (-c.tau, c.pair.cosine, c.pair.channel))
    first += sorted(left, key=lambda c: (c.pair.cosine, -c.tau, c.pair.channel))
    if not first and len(scan.labels_seen()) < 2:
        return ONE_CLASS, ()
    if not first:
        return (
            f"No two classes use the same channel at any tau down to {_exact(least)}, the smallest "
            "share that the scan kept; lower p."
        ), ()
    there = [c for c in first if c.pair.cosine < gamma or c.gamma < 1]  # others have one cause
    return _hint(first[0], gamma), _judged(scan, sums, there[:N_NEAREST])


def _lowest(
    sums: ClassSums,
    channel: int,
    classes: Sequence[int],
    cosines: Tensor,
    tau: float,
    gamma: float,
) -> Candidate:
    """The pair with the lowest cosine, and thresholds that find it."""
    apart = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    i, j = divmod(int(cosines.masked_fill(~apart, math.inf).argmin()), len(classes))
    use = sums.n_matters[0, list(classes), channel] / sums.n_images[list(classes)].double()
    cosine = float(cosines[i, j])
    pair = Pair(channel, classes[i], classes[j], cosine, float(use[i]), float(use[j]))
    above = (math.floor(cosine * 1000) + 1) / 1000  # gamma has to exceed the cosine
    return Candidate(pair, tau, gamma if cosine < gamma else above)


def _hint(nearest: Candidate, gamma: float) -> str:
    channel, cosine = nearest.pair.channel, nearest.pair.cosine
    if cosine < gamma:
        return f"Nearest: tau {_exact(nearest.tau)} finds channel {channel}."
    return (
        f"Nearest: at tau {_exact(nearest.tau)} channel {channel} has a cosine of {cosine:.3f}; "
        f"gamma {nearest.gamma:.3f} finds it."
    )


def _judged(scan: Scan, sums: ClassSums, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Add how sure the cosines are, and which images of the classes excite the channel most."""
    pairs = {_key(pair): pair for pair in with_chance(scan, sums, [c.pair for c in candidates])}
    judged = [replace(c, pair=pairs[_key(c.pair)]) for c in candidates]
    shown = top_images(scan, judged)
    return tuple(replace(c, images=images) for c, images in zip(judged, shown, strict=True))


def top_images(
    scan: Scan, candidates: Sequence[Candidate]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of both classes of each candidate, the images that excite the channel most, by index."""
    channels = [c.pair.channel for c in candidates]
    responses, labels, indices = [], [], []
    for own in scan.tensors("pooled", "n_positions", "label", "index"):
        responses.append(mean_responses(scan, own["pooled"], own["n_positions"], channels))
        labels.append(own["label"])
        indices.append(own["index"])
    response, label, index = torch.cat(responses), torch.cat(labels), torch.cat(indices)

    def strongest(place: int, number: int) -> tuple[int, ...]:
        own = (label == number).nonzero()[:, 0]
        order = response[own, place].argsort(descending=True, stable=True)[:_N_SHOWN]
        return tuple(index[own[order]].tolist())

    return [
        (strongest(k, c.pair.class1), strongest(k, c.pair.class2)) for k, c in enumerate(candidates)
    ]


def _exact(tau: float) -> str:
    """Print a tau so that it can be read back."""
    return repr(tau).removesuffix(".0")
