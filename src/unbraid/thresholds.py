"""Thresholds: which are in range, and which come nearest to finding something."""

from __future__ import annotations

import math

from unbraid.arvs import class_cosines, class_sums, shared_channels, uses
from unbraid.errors import UsageError
from unbraid.records import Scan


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


def nearest_finding(scan: Scan, tau: float, p: float, gamma: float) -> str:
    """Say which thresholds come nearest to finding something: lower tau first, then gamma.

    Every number in the hint is one that was tried, as it is printed, so following it works.
    """
    least = scan.manifest.min_share
    tried = [float(f"{tau * 0.9**k:.3g}") for k in range(1, 60)]
    taus = [tau, *(t for t in tried if least < t < tau), *([least] if least < tau else [])]
    nearest = (float("inf"), 0.0, 0)
    sums = class_sums(scan, taus)
    for lower, users in zip(taus, uses(sums, p), strict=True):
        for channel, classes in shared_channels(users):
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
