"""Two classes that use a channel for different reasons, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """Two classes that use one channel for different reasons; or two clusters of images."""

    channel: int
    class1: int
    class2: int
    cosine: float  # of their averaged relevance vectors
    # Fraction of the images of class1 in which the channel matters; of a cluster, its part of the
    # channel's top images.
    use1: float
    use2: float
    # How sure the cosine is; nan for a class of a single image, and for clusters of images.
    low: float = math.nan  # 95 % interval of the cosine that unlimited images would give
    high: float = math.nan
    half1: float = math.nan  # cosine between two random halves of the images of class1
    half2: float = math.nan


def interval_in_words(pair: Pair) -> str:
    """Write the interval of a pair's cosine, "-" where it is not known."""
    return "-" if math.isnan(pair.low) else f"{pair.low:.3f} to {pair.high:.3f}"


def is_sure(pair: Pair, gamma: float) -> bool:
    """Whether a pair's cosine and its whole interval lie on one side of gamma."""
    return pair.high < gamma if pair.cosine < gamma else pair.low >= gamma


def pairs_of(
    channel: int, numbers: Sequence[int], cosines: Tensor, wanted: Tensor, use: Sequence[float]
) -> list[Pair]:
    """The wanted pairs of some classes or clusters; cosines and wanted are square."""
    return [
        Pair(channel, numbers[i], numbers[j], float(cosines[i, j]), use[i], use[j])
        for i, j in wanted.triu(1).nonzero().tolist()
    ]
