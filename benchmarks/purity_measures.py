"""Measures of one channel's concept channels over all images ("Measure" in docs/method.md).

N images; z (N,) the whole channel, new (N, K) its concept channels, concept (N,) which concept an
image belongs to, -1 for none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

TOP = 0.01  # of the images, for the coverage of those that excite a channel most
N_DRAWS = 2000  # of channels, for intervals
_SURE = 0.95


def r_precision(score: Tensor, own: Tensor) -> float:
    """Of the n highest scores, n the number of own images, the part that is own's.

    Equal scores at the edge count by the part of them that is own's, so that the order of images
    plays no part.
    """
    n_own = int(own.sum())
    edge = score.topk(n_own).values[-1]
    above, equal = score > edge, score == edge
    left = n_own - int(above.sum())
    by_chance = float(own[equal].double().mean()) * left
    return (int(own[above].sum()) + by_chance) / n_own


def auroc(score: Tensor, own: Tensor) -> float:
    """How often an own image scores higher than another; equal scores count half."""
    others, _ = score[~own].double().sort()
    scores = score[own].double()
    below = torch.searchsorted(others, scores)
    not_above = torch.searchsorted(others, scores, right=True)
    return float((below + not_above).double().mean() / 2 / len(others))


def off_concept(z_k: Tensor, own: Tensor) -> float:
    """The part of a concept channel's positive activity that is on other images; NaN of none."""
    positive = z_k.clamp(min=0)
    return float(positive[~own].sum() / positive.sum())


def coverage(z: Tensor, concept: Tensor) -> tuple[float, float]:
    """The part of a channel's positive activity on images of any concept; of its top images."""
    positive, some = z.clamp(min=0), concept >= 0
    top = z.topk(max(1, round(TOP * len(z)))).indices
    return float(positive[some].sum() / positive.sum()), float(some[top].double().mean())


def explained_share(z: Tensor, new: Tensor) -> float:
    """The part of a channel's positive activity that its concept channels add up to."""
    positive = z.clamp(min=0)
    return float(torch.minimum(new.sum(1).clamp(min=0), positive).sum() / positive.sum())


def retention(z: Tensor, z_k: Tensor, own: Tensor) -> float:
    """Mean response of a concept channel on its images, relative to the channel's."""
    return float(z_k[own].mean() / z[own].mean())


Figures = Mapping[int, Sequence[float]]  # by channel, of its concepts or of the whole


def bootstrap(
    figures: Figures, base: Figures | None = None, middle: str = "mean"
) -> tuple[float, float, float]:
    """A mean (or median) over concepts, or its difference to a base, and the interval of it.

    Channels are drawn again with all their concepts, the same ones on both sides.
    """
    channels = sorted(figures)
    own = np.concatenate([np.asarray(figures[o], float) for o in channels])
    other = None if base is None else np.concatenate([np.asarray(base[o], float) for o in channels])
    first = np.cumsum([0, *(len(figures[o]) for o in channels)])
    average = np.nanmedian if middle == "median" else np.nanmean

    def statistic(chosen: np.ndarray) -> float:
        value = average(own[chosen])
        return float(value if other is None else value - average(other[chosen]))

    if np.isnan(own).all() or (other is not None and np.isnan(other).all()):
        return float("nan"), float("nan"), float("nan")
    draws = np.random.default_rng(0).integers(len(channels), size=(N_DRAWS, len(channels)))
    parts = [np.arange(first[n], first[n + 1]) for n in range(len(channels))]
    values = [statistic(np.concatenate([parts[n] for n in draw])) for draw in draws]
    low, high = np.nanquantile(values, [(1 - _SURE) / 2, (1 + _SURE) / 2])
    return statistic(np.arange(len(own))), float(low), float(high)
