"""The list of pairs, and how sure each cosine is."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass

from unbraid.findings import Findings, Pair
from unbraid.report.text import bounded

MAX_LISTED = 1000  # lines of each list; a real layer can have a hundred thousand pairs


@dataclass(frozen=True)
class Chance:
    """How far chance could have moved a cosine."""

    low: float | None  # 95 % interval, None where nothing can be said
    high: float | None
    uncertain: bool  # whether it could have moved it across gamma


@dataclass(frozen=True)
class PairRow:
    """One line of the list of pairs."""

    channel: int
    names: tuple[str, str]
    cosine: float
    chance: Chance | None
    uses: tuple[float, float]
    halves: tuple[float, float]  # nan for a single image
    shown: bool  # whether the channel has a section


def chance(found: Findings, pair: Pair | None) -> Chance | None:
    """Say how sure a pair's cosine is; None if there is no pair, or it is one of clusters."""
    if pair is None or pair.class1 in found.clusters:
        return None
    if math.isnan(pair.low):
        return Chance(None, None, found.uncertain(pair))
    return Chance(pair.low, pair.high, found.uncertain(pair))


def pair_rows(found: Findings, shown: Set[int]) -> tuple[PairRow, ...]:
    """List the pairs with the lowest cosines, `MAX_LISTED` at most, lowest first.

    Args:
        found: what they were found by.
        shown: channels that have a section.
    """
    return tuple(
        PairRow(
            channel=pair.channel,
            names=(bounded(found.name(pair.class1)), bounded(found.name(pair.class2))),
            cosine=pair.cosine,
            chance=chance(found, pair),
            uses=(pair.use1, pair.use2),
            halves=(pair.half1, pair.half2),
            shown=pair.channel in shown,
        )
        for pair in sorted(found.pairs, key=_last_if_unknown)[:MAX_LISTED]
    )


def _last_if_unknown(pair: Pair) -> float:
    return math.inf if math.isnan(pair.cosine) else pair.cosine
