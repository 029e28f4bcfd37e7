"""Thresholds of `find`: T classes, c of them sharing a channel, S settings of tau and p."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Context
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from unbraid.base.arguments import as_kind, real_number, real_numbers
from unbraid.base.errors import DataError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.progress import QUIET, Progress
from unbraid.base.tables import Exported, Table, count
from unbraid.finding.arv import ClassSums, class_cosines, class_sums, shared_channels, uses
from unbraid.finding.cosine_intervals import with_chance
from unbraid.finding.findings import Candidate, Findings
from unbraid.finding.membership import mean_responses
from unbraid.finding.pairs import Pair, is_sure, pairs_of
from unbraid.scanning.records import Scan

Tau = float | Literal["auto"]

# The published thresholds, and on either side what other networks have needed.
TAUS = (0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
PS = (0.5, 0.75, 0.9)
GAMMAS = (0.3, 0.4, 0.5, 0.6, 0.7)

# How these were chosen, and what other rules gave: docs/evidence-thresholds.md.
N_MATTER = 10, 40  # channels that matter in a typical image at the highest and lowest tau tried
_PART = 0.25, 0.5  # of a narrow layer, and no more of it: half and all of its positive shares
N_SURE = 8  # channels that tau is lowered for, or the first part of a narrow layer
_SPARE = 4  # times as many channels are tried first
N_NEAREST = 8  # candidates that are told of where nothing is found
_N_SHOWN = 3  # images of each of a candidate's classes
_STEP = 0.9  # from one tau tried to the next
_COUNTS_AT_ONCE = 1 << 26  # of images, per tau, class and channel
_ROUNDING = 1e-9  # far above that of a cosine, far below what tells two cosines apart


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
    if isinstance(tau, str):
        if tau != "auto":
            raise UsageError(f"tau is {tau!r}; give a share such as 0.03, or 'auto'.")
    else:
        tau = real_number("tau", tau)
        if not 0 < tau <= 1:
            raise UsageError(f"tau is {tau:g}; a share must lie above 0 and not above 1.")
        if tau < min_share:
            raise UsageError(
                f"tau is {tau:g}, but the scan keeps no share below {min_share:.15g}; raise tau or "
                "scan again with a smaller min_share."
            )
    p, gamma = real_number("p", p), real_number("gamma", gamma)
    if not 0 < p <= 1:
        raise UsageError(f"p is {p:g}; a fraction of images must lie above 0 and not above 1.")
    if not -1 <= gamma <= 1:
        raise UsageError(f"gamma is {gamma:g}; a cosine must lie between -1 and 1.")
    return tau, p, gamma


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
        f"{numbers[0]} channels of a typical image reach it; scan with a smaller min_share to go "
        "lower."
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
    if not first:
        return (
            f"No two classes use the same channel at any tau down to {_exact(least)}; lower p, or "
            "scan with a smaller min_share."
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


@dataclass(frozen=True)
class Cell:
    """What one choice of thresholds finds."""

    tau: float
    p: float
    gamma: float
    n_channels: int
    n_pairs: int


COLUMNS = tuple(Cell.__dataclass_fields__)


@dataclass(frozen=True)
class Sensitivity(Exported):
    """How many channels and pairs `find` gives for every combination of thresholds.

    Attributes:
        layer: name of the layer.
        weights: hash of the network's weights.
        n_out: channels of the layer.
        taus: smallest shares that matter.
        ps: fractions of a class's images.
        gammas: cosines below which two classes have different reasons.
        cells: the counts, tau by tau, then p, then gamma; `at` gives those of one choice.
    """

    layer: str
    weights: str  # hash of the network's weights
    n_out: int  # channels of the layer
    taus: tuple[float, ...]
    ps: tuple[float, ...]
    gammas: tuple[float, ...]
    cells: tuple[Cell, ...]  # tau by tau, then p, then gamma

    columns = COLUMNS

    def at(self, tau: float, p: float, gamma: float) -> Cell:
        """Return what one choice of the grid's thresholds finds; KeyError where it has none."""
        for cell in self.cells:
            if (cell.tau, cell.p, cell.gamma) == (tau, p, gamma):
                return cell
        raise KeyError(f"tau {tau:g}, p {p:g}, gamma {gamma:g} is not in the grid")

    def __str__(self) -> str:
        """Show all tables."""
        return "\n\n".join(map(str, self.tables()))

    def tables(self) -> list[Table]:
        """A title; per p taus down and gammas across: channels and, in brackets, pairs."""
        n_out = count(self.n_out, "channel")
        head = "Polysemantic channels, and pairs of classes in brackets, of the"
        parts = [Table((), f"{head} {n_out} of layer {self.layer}")]
        for p in self.ps:
            rows = [(f"p {p:g}", *(f"gamma {gamma:g}" for gamma in self.gammas))]
            for tau in self.taus:
                cells = (self.at(tau, p, gamma) for gamma in self.gammas)
                figures = (f"{cell.n_channels:,} ({cell.n_pairs:,})" for cell in cells)
                rows.append((f"tau {tau:g}", *figures))
            parts.append(Table(rows))
        return parts

    def rows(self) -> Iterator[tuple[float | int, ...]]:
        """Give one row per choice, in the order of the CSV columns."""
        for cell in self.cells:
            yield tuple(vars(cell).values())


def refuse_places(scan: Scan) -> None:
    """Raise a UsageError for a scan of places, which have no shares of a logit."""
    if scan.manifest.places_of:
        raise UsageError(
            "A scan of places does not say which classes use a channel; pass concepts='clusters', "
            "or groups of places in images."
        )


@in_plain_modes
def sensitivity(
    scan: Scan,
    taus: Sequence[float] | None = None,
    ps: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    *,
    found: Findings | None = None,
) -> Sensitivity:
    """Count what `find` would find for every combination of thresholds, in one reading of the Scan.

    The default grid holds tau 0.005 to 0.1 (no less than the scan kept), p 0.5, 0.75 and 0.9, gamma
    0.3 to 0.7. Memory grows by 16 MB per tau for 1000 classes and 2048 channels.

    Args:
        scan: of the training images.
        taus: smallest shares that matter.
        ps: fractions of a class's images.
        gammas: cosines below which two classes have different reasons.
        found: findings whose thresholds a default grid is to contain too.

    Returns:
        The counts; those of a choice are exactly the numbers of channels and pairs of `find`.

    Raises:
        UsageError: a grid is empty, or a threshold is out of range or below the smallest share
            that the scan kept; or the scan is of places.

    Source:
        "Find" in docs/method.md.
    """
    least = as_kind("scan", scan, Scan).manifest.min_share
    refuse_places(scan)
    refuse_no_classes(scan)
    own = (None, None, None) if found is None else (found.tau, found.p, found.gamma)
    taus = _grid("taus", taus, [max(tau, least) for tau in TAUS], own[0])
    ps = _grid("ps", ps, PS, own[1])
    gammas = _grid("gammas", gammas, GAMMAS, own[2])
    choices = list(product(taus, ps, gammas))
    for choice in choices:
        check_thresholds(*choice, least)
    sums = class_sums(scan, taus)
    counts = torch.zeros(len(taus) * len(ps), len(gammas), 2, dtype=torch.int64)
    # Who uses a channel at higher thresholds uses it at the lowest too.
    (most,) = uses(replace(sums, n_matters=sums.n_matters[:1]), ps[0])
    for channel, classes in shared_channels(most):
        use = sums.n_matters[:, classes, channel] / sums.n_images[classes].double()  # (taus, c)
        users = (use[:, None] >= torch.tensor(ps, dtype=torch.float64)[:, None]).flatten(0, 1)
        n_pairs = _pairs_below(scan, sums, channel, classes, users, gammas)
        counts += torch.stack([n_pairs > 0, n_pairs], 2)
    numbers = counts.view(-1, 2).tolist()
    cells = tuple(Cell(*choice, *own) for choice, own in zip(choices, numbers, strict=True))
    layer, weights = scan.layer, scan.manifest.weights
    return Sensitivity(layer.name, weights, layer.n_out, taus, ps, gammas, cells)


def _grid(
    name: str, values: Sequence[float] | None, default: Iterable[float], own: float | None
) -> tuple[float, ...]:
    if values is None:
        values = [*default, *([] if own is None else [own])]
    if grid := sorted(set(real_numbers(name, values))):
        return tuple(grid)
    raise UsageError(f"{name} is empty; give a value or more, or None for the default grid.")


def _pairs_below(
    scan: Scan,
    sums: ClassSums,
    channel: int,
    classes: Sequence[int],
    users: Tensor,
    gammas: Sequence[float],
) -> Tensor:
    """Count the pairs of users (S, c) that have different reasons, (S, gammas)."""
    cosines = class_cosines(scan, sums, channel, classes)
    columns = []
    for gamma in gammas:
        if ((cosines - gamma).abs() < _ROUNDING).triu(1).any():
            # A product of other matrices may round otherwise, so ask exactly as `find` does.
            chosen = [torch.tensor(classes, dtype=torch.int64)[own].tolist() for own in users]
            blocks = [class_cosines(scan, sums, channel, own) for own in chosen]
            columns.append(torch.stack([(block < gamma).triu(1).sum() for block in blocks]))
        else:
            below, by = (cosines < gamma).triu(1).double(), users.double()
            columns.append(((by @ below) * by).sum(1).long())
    return torch.stack(columns, 1)
