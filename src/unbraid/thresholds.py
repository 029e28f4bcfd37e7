"""Thresholds: which are in range, a tau that fits the layer, what comes nearest to a finding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import ROUND_FLOOR, Decimal
from typing import Literal

import torch
from torch import Tensor

from unbraid.arvs import ClassSums, class_cosines, class_sums, shared_channels, uses
from unbraid.errors import DataError, UsageError
from unbraid.given import real_number
from unbraid.records import Scan

Tau = float | Literal["auto"]

# How these were chosen, and what other rules gave: docs/thresholds.md.
N_MATTER = 10  # channels that matter in a typical image, if tau is chosen
_COUNTS_AT_ONCE = 1 << 26  # of images, per tau, class and channel
_ONE_IN = 4  # and no more than this part of a narrow layer: about half of its positive shares


def check_thresholds(
    tau: Tau, p: float, gamma: float, min_share: float
) -> tuple[Tau, float, float]:
    """Make sure that thresholds are numbers, in range and not below the smallest share kept.

    Returns:
        tau, p and gamma, in plain types.

    Raises:
        UsageError: says which is not.
    """
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
    """Choose the share at which ten channels matter in a typical image.

    That is the largest share which, in at least half of the classes, at least half of the images
    have ten channels of: half of the classes, so that neither their number nor their sizes weigh.
    In a layer of fewer than forty channels it is a quarter of them, rounded up, in place of ten.
    Rounded down to three digits, so that the number as it is printed finds the same.

    Args:
        scan: of the training images; only labels and shares are read.

    Returns:
        tau, and a sentence for the user where the scan kept too few shares to follow the rule:
        tau is then the smallest share kept.

    Raises:
        DataError: none of the images could be read.

    Source:
        docs/thresholds.md.
    """
    n_matter = min(N_MATTER, math.ceil(scan.layer.n_out / _ONE_IN))
    least = scan.manifest.min_share
    parts = [
        (own["label"], _nth_share(own["share_start"], own["share_value"], n_matter))
        for own in scan.tensors("label", "share_start", "share_value")
    ]
    labels, shares = (torch.cat(part) for part in zip(*parts, strict=True))
    if not len(labels):
        raise DataError(f"The scan in {scan.path} holds no image to choose tau by; scan anew.")
    by_class = shares[labels.argsort(stable=True)].split(
        labels.unique(return_counts=True)[1].tolist()
    )
    typical = _reached_by_half(torch.stack([_reached_by_half(own) for own in by_class]))
    if typical > 0:
        return max(_round_down(float(typical)), least), ""
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
    """Find the largest number that at least half of the values reach.

    >>> _reached_by_half(torch.tensor([0.1, 0.4, 0.3])), _reached_by_half(torch.tensor([0.1, 0.4]))
    (tensor(0.3000), tensor(0.4000))
    """
    return values.sort(descending=True).values[(len(values) - 1) // 2]


def _round_down(value: float, digits: int = 3) -> float:
    """Cut a number behind its leading digits.

    >>> _round_down(0.012399), _round_down(0.03), _round_down(1.0)
    (0.0123, 0.03, 1.0)
    """
    exact = Decimal(repr(value))
    last = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return float(exact.quantize(last, ROUND_FLOOR))


def nearest_finding(scan: Scan, tau: float, p: float, gamma: float) -> str:
    """Say which thresholds come nearest to finding something: lower tau first, then gamma.

    Every number in the hint is one that was tried, as it is printed, so following it works.
    """
    least = scan.manifest.min_share
    tried = [float(f"{tau * 0.9**k:.3g}") for k in range(1, 60)]
    taus = [tau, *(t for t in tried if least < t < tau), *([least] if least < tau else [])]
    nearest = (float("inf"), 0.0, 0)
    lowest: dict[int, tuple[list[int], float]] = {}  # cosine of some classes, by channel
    for sums, lower, users in _users(scan, taus, p):
        for channel, classes in shared_channels(users):
            if channel not in lowest or lowest[channel][0] != classes:
                cosines = class_cosines(scan, sums, channel, classes)
                lowest[channel] = classes, float(cosines.min())
                nearest = min(nearest, (lowest[channel][1], -lower, channel))
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


def _users(
    scan: Scan, taus: Sequence[float], p: float
) -> Iterator[tuple[ClassSums, float, Tensor]]:
    """Give for each tau which class uses which channel, (T, C_out), with the sums it is of.

    The Scan is read once for as many taus as memory holds counts of.
    """
    n_classes = max(len(scan.class_names), max(scan.labels_seen(), default=0) + 1)
    at_once = max(1, _COUNTS_AT_ONCE // (n_classes * scan.layer.n_out))
    for first in range(0, len(taus), at_once):
        portion = taus[first : first + at_once]
        sums = class_sums(scan, portion)
        for tau, users in zip(portion, uses(sums, p), strict=True):
            yield sums, tau, users
