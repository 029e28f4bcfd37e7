"""What `find` is asked for; no torch in here, so that help and refusals come at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cyclopts import Parameter

from unbraid.base.arguments import real_number
from unbraid.base.errors import UsageError

Tau = float | Literal["auto"]  # the smallest share that matters, or one is chosen


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Finding:
    """The arguments of `unbraid.find` but tau.

    Args:
        p: Fraction of a class's images in which a channel matters.
        gamma: Cosine below which two classes have different reasons.
        concepts: What concepts are made of: classes; clusters of images, which need no labels; or
            whole, classes and clusters of what else excites a channel. By default classes, and
            clusters where `unbraid run` has no labels.
    """

    p: float = 0.75
    gamma: float = 0.5
    concepts: Literal["classes", "clusters", "whole"] | None = None

    def asked(self, *, labelled: bool = True) -> dict[str, Any]:
        """The arguments by name, those of `find`."""
        usual: Literal["classes", "clusters"] = "classes" if labelled else "clusters"
        return vars(self) | {"concepts": self.concepts or usual}


def plain_thresholds(
    tau: Tau, p: float, gamma: float, least: float = 0.0, remedy: str = ""
) -> tuple[Tau, float, float]:
    """Return tau, p and gamma in plain types.

    Raises:
        UsageError: one is out of range, or tau lies below the `least` share that is kept; `remedy`
            is what else helps then, beside a larger tau.
    """
    if isinstance(tau, str):
        if tau != "auto":
            raise UsageError(f"tau is {tau!r}; give a share such as 0.03, or 'auto'.")
    else:
        tau = real_number("tau", tau)
        if not 0 < tau <= 1:
            raise UsageError(f"tau is {tau:g}; a share must lie above 0 and not above 1.")
        if tau < least:
            raise UsageError(
                f"tau is {tau:g}, but the scan keeps no share below {least:.15g}; raise tau"
                f"{remedy}."
            )
    p, gamma = real_number("p", p), real_number("gamma", gamma)
    if not 0 < p <= 1:
        raise UsageError(f"p is {p:g}; a fraction of images must lie above 0 and not above 1.")
    if not -1 <= gamma <= 1:
        raise UsageError(f"gamma is {gamma:g}; a cosine must lie between -1 and 1.")
    return tau, p, gamma


def check_rho(rho: float | None) -> float | None:
    """Return rho in a plain type, None if it is to be chosen; raises UsageError."""
    number = None if rho is None else real_number("rho", rho)
    if number is not None and not 0 < number <= 1:
        raise UsageError(f"rho is {number:g}; it must lie above 0 and not above 1.")
    return number
