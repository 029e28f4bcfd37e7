"""How sure the measures are: bootstrap intervals over the images of each concept.

Shapes: B resamples, N_k images of concept k, K concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unbraid.evaluation import Responses

N_RESAMPLES = 200
LEVEL = 0.95
_MAX_CELLS = 4_000_000  # of counts held at a time

Interval = tuple[float, float]


@dataclass(frozen=True)
class ConceptIntervals:
    """Where the measures of one concept channel lie with 95 % confidence."""

    retention: Interval
    leakage: Interval
    mimic_error: Interval
    silence_error: Interval
    auroc: Interval


@dataclass(frozen=True)
class ChannelIntervals:
    """Intervals of one channel's measures."""

    concepts: tuple[ConceptIntervals, ...]
    separation_error: Interval
    means: tuple[Interval, ...]  # of the original's response to each concept's images

    def is_told(self, measure: str, k: int) -> bool:
        """Whether what a measure of concept k divides by is told from 0."""
        zero = [low <= 0 <= high for low, high in self.means]
        divided_by_mean = {"retention": [zero[k]], "leakage": [*zero[:k], *zero[k + 1 :]]}
        return not any(divided_by_mean.get(measure, []))


def intervals(answers: Responses, seed: int = 0) -> ChannelIntervals | None:
    """Draw the images of each concept again and again, and see how the measures vary.

    Args:
        answers: of one channel and its concept channels.
        seed: of the draws.

    Returns:
        Percentile intervals; None if a concept has a single image, which tells nothing of others.

    Source:
        METHOD.md section 6 for the measures; Efron and Tibshirani 1993, chapter 13.
    """
    concept = answers.concept.numpy()
    z = answers.original.double().numpy()
    new = answers.concepts.double().numpy()
    members = [np.flatnonzero(concept == k) for k in range(new.shape[1])]
    if min(map(len, members)) < 2:
        return None
    rng = np.random.default_rng(seed)
    at_once = max(1, _MAX_CELLS // len(concept))
    drawn: list[np.ndarray] = []
    means: list[np.ndarray] = []
    while (missing := N_RESAMPLES - sum(map(len, drawn))) > 0:
        counts = np.zeros((min(missing, at_once), len(concept)))
        for images in members:
            counts[:, images] = _draw(rng, len(counts), len(images))
        drawn.append(resampled(counts, z, new, members))
        means.append(np.stack([counts[:, own] @ z[own] / len(own) for own in members], axis=1))
    values = np.concatenate(drawn)  # (B, K, 5)
    edges = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)  # (2, K, 5)
    of_means = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    errors = _separation(values, len(members))
    low, high = np.quantile(errors, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return ChannelIntervals(
        tuple(
            ConceptIntervals(*((low, high) for low, high in edges[:, k].T.tolist()))
            for k in range(len(members))
        ),
        (low, high),
        tuple((low, high) for low, high in of_means.T.tolist()),
    )


def _draw(rng: np.random.Generator, n_resamples: int, n: int) -> np.ndarray:
    """How often each of n images is drawn in n draws, (B, n)."""
    draws = rng.integers(n, size=(n_resamples, n)) + n * np.arange(n_resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=n * n_resamples).reshape(n_resamples, n)


def resampled(
    counts: np.ndarray, z: np.ndarray, new: np.ndarray, members: Sequence[np.ndarray]
) -> np.ndarray:
    """Compute the measures with images counted several times or not at all.

    Args:
        counts: (B, N), how often each image counts.
        z: (N,), the original channel's pooled pre-activation.
        new: (N, K), the concept channels'.
        members: which of the N images each concept has.

    Returns:
        (B, K, 5): retention, leakage, mimic error, silence error, AUROC.
    """
    measures = []
    for k, own in enumerate(members):
        z_k = new[:, k]
        others = [images for other, images in enumerate(members) if other != k]
        retention = _ratio(counts, z_k, z, own)
        leakage = np.mean([_ratio(counts, z_k, z, images) for images in others], axis=0)
        mimic = np.sqrt(_ratio(counts, (z_k - z) ** 2, z**2, own))
        silence = np.mean(
            [np.sqrt(_ratio(counts, z_k**2, z**2, images)) for images in others], axis=0
        )
        measures.append(
            np.stack([retention, leakage, mimic, silence, _auroc(counts, z_k, own)], axis=1)
        )
    return np.stack(measures, axis=1)


def _ratio(
    counts: np.ndarray, above: np.ndarray, below: np.ndarray, images: np.ndarray
) -> np.ndarray:
    counted = counts[:, images]
    with np.errstate(all="ignore"):  # a channel that answers nothing has no measures
        return np.asarray((counted @ above[images]) / (counted @ below[images]))


def _auroc(counts: np.ndarray, score: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The chance that an own image scores above another one, ties counted half, (B,)."""
    values, place = np.unique(score, return_inverse=True)
    order = place.argsort(kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(values)))
    positive = np.zeros(len(score))
    positive[own] = 1
    wins, others = (
        np.add.reduceat((counts * part)[:, order], starts, axis=1)
        for part in (positive, 1 - positive)
    )
    below = others.cumsum(1) - others / 2
    return np.asarray((wins * below).sum(1) / (wins.sum(1) * others.sum(1)))


def _separation(values: np.ndarray, n_concepts: int) -> np.ndarray:
    """Mean of all errors, (B,); a concept channel has a silence error for each other concept."""
    mimic, silence = values[:, :, 2], values[:, :, 3]
    return np.asarray((mimic + (n_concepts - 1) * silence).mean(1) / n_concepts)
