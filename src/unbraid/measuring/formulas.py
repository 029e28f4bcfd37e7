"""The measures of docs/method.md, "Evaluate": from responses to figures, and nothing else.

N images; z (N,) the whole channel, new (N, K) its concept channels, concept (N,) an image's own;
own and named (N,) say which images are of one concept, or of any. A figure that cannot be computed,
as nothing answers or no image is of a concept, is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_TOP = 100  # one in so many images is of the top 1 %


def mimic_error(z: Tensor, z_k: Tensor, own: Tensor) -> float:
    """Relative error of a concept channel z_k (N,) as a copy of z (N,) on its own images (N,)."""
    return float(rms(z_k[own] - z[own]) / rms(z[own]))


def silence_errors(z: Tensor, new: Tensor, concept: Tensor, k: int) -> list[float]:
    """Relative size of concept channel k's response to each other concept's images."""
    others = others_than(concept, new, k)
    return [float(rms(new[other, k]) / rms(z[other])) for other in others]


def separation_error(z: Tensor, new: Tensor, concept: Tensor) -> float:
    """Mean of all mimic and silence errors of a channel: 0 is ideal, halving it gives 0.5."""
    errors: list[float] = []
    for k in range(new.shape[1]):
        errors += [mimic_error(z, new[:, k], concept == k), *silence_errors(z, new, concept, k)]
    return mean(errors)


def auroc(score: Tensor, own: Tensor) -> float:
    """Chance that an own image scores above another one, ties counted half; nan if one is nan.

    >>> auroc(torch.tensor([3.0, 2.0, 1.0, 2.0]), torch.tensor([True, True, False, False]))
    0.875
    """
    if score.isnan().any():
        return math.nan
    mine, others = score[own].sort().values, score[~own]
    # Own images below each other one, and those that equal it as well; whole numbers, so exact.
    beneath = sum(
        int(torch.searchsorted(mine, others, right=right).sum()) for right in (False, True)
    )
    n_pairs = len(mine) * len(others)
    return 1 - beneath / (2 * n_pairs) if n_pairs else math.nan


def counted_auroc(counts: np.ndarray, score: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The same with images counted several times or not at all, counts (B, N); gives (B,)."""
    values, rank = np.unique(score, return_inverse=True)
    order = rank.argsort(kind="stable")
    starts = np.searchsorted(rank[order], np.arange(len(values)))
    wins, others = (
        np.add.reduceat((counts * part)[:, order], starts, axis=1) for part in (own, ~own)
    )
    below = others.cumsum(1) - others / 2
    return np.asarray((wins * below).sum(1) / (wins.sum(1) * others.sum(1)))


def r_precision(score: Tensor, own: Tensor) -> float:
    """Of as many highest scores as there are own images, the part that is of own images.

    >>> r_precision(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, True, False, False]))
    0.5
    """
    return top_part(score, own, int(own.sum()))


def top_part(score: Tensor, some: Tensor, n: int) -> float:
    """Part of the n highest scores that is of some images; of those equal to the last, its share.

    Equal scores count as on average over all orders, so a silent channel does no better than chance
    however images lie. Scores that are no numbers have no order, and the part is none.
    """
    if not n or score.isnan().any():
        return math.nan
    last = score.topk(n).values[-1]
    above, tied = score > last, score == last
    part = (n - int(above.sum())) / int(tied.sum())
    return (int((some & above).sum()) + part * int((some & tied).sum())) / n


def coverage(z: Tensor, named: Tensor) -> float:
    """Part of a channel's positive activity, sum of max(z, 0), that lies on some images.

    >>> coverage(torch.tensor([3.0, 1.0, -2.0]), torch.tensor([True, False, True]))
    0.75
    """
    positive = z.clamp(min=0)
    return float(positive[named].sum() / positive.sum())


def top_coverage(z: Tensor, named: Tensor) -> float:
    """Part of the top 1 % of images by z, at least one, that are some images."""
    return top_part(z, named, max(1, len(z) // _TOP))


def off_concept(z_k: Tensor, own: Tensor) -> float:
    """Part of a concept channel's positive activity that lies on images not of its concept."""
    return coverage(z_k, ~own)


def explained_share(z: Tensor, new: Tensor) -> float:
    """Part of a channel's positive activity that its concept channels together reach."""
    positive = z.clamp(min=0)
    return float(torch.minimum(new.sum(1).clamp(min=0), positive).sum() / positive.sum())


def others_than(concept: Tensor, new: Tensor, k: int) -> list[Tensor]:
    """Which images belong to each concept but k, (N,) each."""
    return [concept == other for other in range(new.shape[1]) if other != k]


def rms(values: Tensor) -> Tensor:
    """Root of the mean square."""
    return values.square().mean().sqrt()


def mean(values: Sequence[float]) -> float:
    """Mean of some figures."""
    return sum(values) / len(values)
