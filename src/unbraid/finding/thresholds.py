"""Thresholds of `find`: T classes, c of them sharing a channel, S settings of tau and p."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Context
from itertools import product
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from unbraid.base.arguments import as_kind, real_number, real_numbers
from unbraid.base.errors import DataError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.tables import Exported, align, count
from unbraid.finding.arv import ClassSums, class_cosines, class_sums, shared_channels, uses
from unbraid.scanning.records import Scan

if TYPE_CHECKING:
    from unbraid.finding.findings import Findings

Tau = float | Literal["auto"]

# The published thresholds, and on either side what other networks have needed.
TAUS = (0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
PS = (0.5, 0.75, 0.9)
GAMMAS = (0.3, 0.4, 0.5, 0.6, 0.7)

# How these were chosen, and what other rules gave: docs/thresholds.md.
N_MATTER = 10  # channels that matter in a typical image, if tau is chosen
_ONE_IN = 4  # and no more than this part of a narrow layer: about half of its positive shares
_COUNTS_AT_ONCE = 1 << 26  # of images, per tau, class and channel
_ROUNDING = 1e-9  # far above that of a cosine, far below what tells two cosines apart


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
                "scan anew with a smaller min_share."
            )
    p, gamma = real_number("p", p), real_number("gamma", gamma)
    if not 0 < p <= 1:
        raise UsageError(f"p is {p:g}; a fraction of images must lie above 0 and not above 1.")
    if not -1 <= gamma <= 1:
        raise UsageError(f"gamma is {gamma:g}; a cosine must lie between -1 and 1.")
    return tau, p, gamma


def choose_tau(scan: Scan) -> tuple[float, str]:
    """The largest share that ten channels of a typical image have; a note where it is bounded."""
    n_matter = min(N_MATTER, math.ceil(scan.layer.n_out / _ONE_IN))
    least = scan.manifest.min_share
    parts = [
        (own["label"], _nth_share(own["share_start"], own["share_value"], n_matter))
        for own in scan.tensors("label", "share_start", "share_value")
    ]
    labels, shares = (torch.cat(part) for part in zip(*parts, strict=True))
    if not len(labels):
        raise DataError(f"The scan in {scan.path} holds no image to choose tau by; scan anew.")
    sizes = labels.unique(return_counts=True)[1].tolist()
    by_class = shares[labels.argsort(stable=True)].split(sizes)
    typical = _reached_by_half(torch.stack([_reached_by_half(own) for own in by_class]))
    if typical > 0:
        three_digits = Context(prec=3, rounding=ROUND_FLOOR)
        return max(float(three_digits.create_decimal(repr(float(typical)))), least), ""
    return least, (
        f"The tau chosen is the smallest share that the scan kept, {least:g}: fewer than "
        f"{n_matter} channels of a typical image reach it; scan with a smaller min_share to go "
        "lower."
    )


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


def nearest_finding(scan: Scan, tau: float, p: float, gamma: float) -> str:
    """Say which thresholds come nearest to finding something: lower tau first, then gamma."""
    least = scan.manifest.min_share
    tried = [float(f"{tau * 0.9**k:.3g}") for k in range(1, 60)]
    taus = [tau, *(t for t in tried if least < t < tau), *([least] if least < tau else [])]
    n_classes = max(len(scan.class_names), max(scan.labels_seen(), default=0) + 1)
    at_once = max(1, _COUNTS_AT_ONCE // (n_classes * scan.layer.n_out))
    nearest = (math.inf, 0.0, 0)  # cosine, negative tau, channel
    known: dict[int, list[int]] = {}  # the classes last compared, by channel
    for first in range(0, len(taus), at_once):
        portion = taus[first : first + at_once]
        sums = class_sums(scan, portion)
        for lower, users in zip(portion, uses(sums, p), strict=True):
            for channel, classes in shared_channels(users):
                if known.get(channel) != classes:
                    known[channel] = classes
                    cosine = float(class_cosines(scan, sums, channel, classes).min())
                    nearest = min(nearest, (cosine, -lower, channel))
            if nearest[0] < gamma:
                return f"Nearest: tau {_exact(lower)} finds channel {nearest[2]}."
    cosine, negative_tau, channel = nearest
    if cosine > 1:
        return (
            f"No two classes use the same channel at any tau down to {_exact(least)}; lower p, or "
            "scan with a smaller min_share."
        )
    return (
        f"Nearest: at tau {_exact(-negative_tau)} channel {channel} has a cosine of "
        f"{math.ceil(cosine * 1000) / 1000:.3f}, which gamma would have to exceed."
    )


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
    """How many channels and pairs `find` gives for every combination of thresholds."""

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
        """Show a table per p, taus down and gammas across: channels and, in brackets, pairs."""
        n_out = count(self.n_out, "channel")
        head = "Polysemantic channels, and pairs of classes in brackets, of the"
        parts = [f"{head} {n_out} of layer {self.layer}"]
        for p in self.ps:
            rows = [(f"p {p:g}", *(f"gamma {gamma:g}" for gamma in self.gammas))]
            for tau in self.taus:
                cells = (self.at(tau, p, gamma) for gamma in self.gammas)
                figures = (f"{cell.n_channels:,} ({cell.n_pairs:,})" for cell in cells)
                rows.append((f"tau {tau:g}", *figures))
            parts.append(align(rows))
        return "\n\n".join(parts)

    def rows(self) -> Iterator[tuple[float | int, ...]]:
        """Give one row per choice, in the order of the CSV columns."""
        for cell in self.cells:
            yield tuple(vars(cell).values())


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
            that the scan kept.

    Source:
        "Find" in docs/method.md.
    """
    least = as_kind("scan", scan, Scan).manifest.min_share
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
