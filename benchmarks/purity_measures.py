"""Figures of a way to get concept channels, on held-out images, and how sure they are.

Formulas are those of `unbraid.evaluate` ("Evaluate" in docs/method.md). N images; concept (N,) says
which concept an image belongs to, -1 for none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import interpretability
from interpretability import Embedded
from rivals import Fitted, Images
from unbraid.finding.findings import Findings
from unbraid.measuring.formulas import (
    auroc,
    coverage,
    explained_share,
    mimic_error,
    off_concept,
    r_precision,
    separation_error,
    top_coverage,
)
from unbraid.measuring.semantics import MonosemanticitySums

N_RESAMPLES = 2000  # of channels, for intervals
_SURE = 0.95
PER_CONCEPT = ("R-precision", "AUROC", "retention", "mimic", "off", "MS", "C2", "MIS", "MIS solved")
PER_CHANNEL = ("coverage", "coverage of top 1 %", "explained", "separation", "rectified")

Figures = dict[str, dict[int, list[float]]]  # by measure and channel


@dataclass
class Held:
    """Held-out images, and what an encoder makes of them."""

    images: Images
    embedded: Embedded


def measure(fitted: Fitted, found: Findings, held: Held) -> Figures:
    """All measures of all channels on held-out images."""
    figures: Figures = {name: {} for name in (*PER_CONCEPT, *PER_CHANNEL)}
    for channel, concepts in found.concepts.items():
        own = measure_channel(fitted, channel, held, held.images.concept(concepts))
        for name, values in own.items():
            figures[name][channel] = values
    return figures


def measure_channel(
    fitted: Fitted, channel: int, held: Held, concept: Tensor
) -> dict[str, list[float]]:
    """All measures of one channel; NaN for what a way has not."""
    images, embedded = held.images, held.embedded
    z, new = images.response(channel), fitted.pooled(channel, images)
    maps = fitted.maps(channel, images)  # (N, K, P)
    positive = maps.clamp(min=0).sum(2, dtype=torch.float64)
    sums = MonosemanticitySums()
    sums.add(positive, embedded.whole)
    figures: dict[str, list[float]] = {name: [] for name in PER_CONCEPT}
    figures["MS"] = sums.scores().tolist()
    for k, score in enumerate(new.T):
        own = concept == k
        figures["R-precision"].append(r_precision(score, own))
        figures["AUROC"].append(auroc(score, own))
        figures["off"].append(off_concept(score, own))
        figures["retention"].append(float(score[own].mean() / z[own].mean()))
        figures["mimic"].append(mimic_error(z, score, own))
        patches = interpretability.onto_grid(maps[:, k], images.grid, embedded.grid)
        figures["C2"].append(interpretability.c2_score(positive[:, k], patches, embedded))
        probability, solved = interpretability.mis(score, embedded.whole)
        figures["MIS"].append(probability)
        figures["MIS solved"].append(solved)
    whole = torch.einsum("njp,j->np", images.taps, images.scan.weight[channel].float())
    rectified = (whole + float(images.scan.bias[channel])).clamp(min=0).sum(1, dtype=torch.float64)
    some = concept >= 0
    figures["explained"] = [explained_share(z, new)]
    figures["separation"] = [separation_error(z[some], new[some], concept[some])]
    figures["rectified"] = [separation_error(rectified[some], positive[some], concept[some])]
    if not fitted.in_units:
        for name in ("retention", "mimic", "explained", "separation", "rectified"):
            figures[name] = [float("nan")] * len(figures[name])
    figures["coverage"] = [coverage(z, some)]
    figures["coverage of top 1 %"] = [top_coverage(z, some)]
    return figures


def precision(fitted: Fitted, found: Findings, images: Images) -> dict[int, list[float]]:
    """R-precision alone."""
    return {
        o: [
            r_precision(score, images.concept(concepts) == k)
            for k, score in enumerate(fitted.pooled(o, images).T)
        ]
        for o, concepts in found.concepts.items()
    }


def averaged(draws: list[dict[int, list[float]]]) -> dict[int, list[float]]:
    """Mean over draws, of each concept."""
    return {o: torch.tensor([d[o] for d in draws]).mean(0).tolist() for o in draws[0]}


def less(
    one: Mapping[int, list[float]], other: Mapping[int, list[float]]
) -> dict[int, list[float]]:
    """Differences, of each concept."""
    return {o: [a - b for a, b in zip(own, other[o], strict=True)] for o, own in one.items()}


ByChannel = Mapping[int, Sequence[float]]  # by channel, of its concepts or of the whole


def average(figures: ByChannel, middle: str = "mean") -> float:
    """Mean (or median) over concepts of all channels, or over channels; NaN of none."""
    values = np.concatenate([np.asarray(own, float) for own in figures.values()])
    if np.isnan(values).all():
        return math.nan
    return float(np.nanmedian(values) if middle == "median" else np.nanmean(values))


def bootstrap(
    figures: ByChannel, base: ByChannel | None = None, middle: str = "mean"
) -> tuple[float, float, float]:
    """A mean (or median) over concepts, or its difference to a base, and the interval of it.

    Channels are drawn again with all their concepts, the same ones on both sides.
    """
    return interval(drawn_again(figures, base, middle))


def bootstrap_mean(pairs: Sequence[tuple[ByChannel, ByChannel]]) -> tuple[float, float, float]:
    """The mean over networks of their differences, and the interval of it.

    Channels are drawn again within each network, on its own.
    """
    draws = [drawn_again(one, base, seed=seed) for seed, (one, base) in enumerate(pairs)]
    return interval(np.mean(draws, 0))


def drawn_again(
    figures: ByChannel, base: ByChannel | None = None, middle: str = "mean", seed: int = 0
) -> np.ndarray:
    """A mean (or median) over concepts, or its difference to a base; then those of all draws."""
    channels = sorted(figures)
    if any(np.isnan(average(side)) for side in (figures, base) if side):
        return np.full(1 + N_RESAMPLES, math.nan)
    draws = np.random.default_rng(seed).integers(len(channels), size=(N_RESAMPLES, len(channels)))
    draws = np.concatenate([np.arange(len(channels))[None], draws])  # first, those that there are
    values = _over(figures, channels, draws, middle)
    return values - _over(base, channels, draws, middle) if base else values


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The first value, and the interval that holds 95 % of the others."""
    if np.isnan(values).all():
        return math.nan, math.nan, math.nan
    low, high = np.nanquantile(values[1:], [(1 - _SURE) / 2, (1 + _SURE) / 2])
    return float(values[0]), float(low), float(high)


def _over(figures: ByChannel, channels: list[int], draws: np.ndarray, middle: str) -> np.ndarray:
    """The mean or median over the concepts of each draw of channels."""
    own = [np.asarray(figures[o], float) for o in channels]
    if middle == "median":
        return np.array([np.nanmedian(np.concatenate([own[n] for n in draw])) for draw in draws])
    sums, counts = np.array([[np.nansum(v), (~np.isnan(v)).sum()] for v in own]).T
    return sums[draws].sum(1) / counts[draws].sum(1)
