"""How sure the measures are: bootstrap intervals over the images of each concept.

Shapes: B resamples, N_k images of concept k, K concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from unbraid.base.arguments import as_kind, real_number
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.finding.membership import Members
from unbraid.measuring.compare import OutputComparison
from unbraid.measuring.results import (
    Ablation,
    ChannelEvaluation,
    ConceptEvaluation,
    Evaluation,
    Ratio,
    Responses,
    Semantics,
)
from unbraid.scanning.records import Records, Scan
from unbraid.splitting.splits import ChannelSplit, Split

# Measure how well concept channels separate concepts, on images not used to find or fit.


@in_plain_modes
def evaluate(
    split: Split,
    scan: Scan,
    *,
    baseline: Split | None = None,
    tau: float | None = None,
    output: OutputComparison | None = None,
    ablation: Ablation | None = None,
    semantics: Semantics | None = None,
) -> Evaluation:
    """Compute the measures of METHOD.md section 6 for every split channel.

    Args:
        split: whose concept channels to measure.
        scan: of validation images of the same network and layer. With `positions=True` the
            rectified measures are computed too; without it they are None.
        baseline: another split of the same channels and concepts, such as the published one, whose
            mean errors join the summary.
        tau: smallest share for an image to count in the published table; by default the one that
            the channels were found with.
        output: from `unbraid.compare_outputs`, to be kept with the measures.
        ablation: from `unbraid.ablate`, of all or some of the channels, likewise.
        semantics: from `unbraid.measure_semantics`, likewise.

    Raises:
        UsageError: tau is out of range; or the scan is of another network or layer, or has no image
            of a concept; or the baseline splits other channels or concepts, or has the same method;
            or the ablation or the semantics are of another split.
    """
    as_kind("split", split, Split)
    as_kind("scan", scan, Scan)
    if baseline is not None:
        _check_baseline(split, as_kind("baseline", baseline, Split))
    if ablation is not None:
        _check_ablation(split, ablation)
    if semantics is not None:
        _check_semantics(split, semantics)
    if scan.manifest.weights != split.weights or scan.layer != split.layer:
        raise UsageError(
            "The scan is of another network or layer than the split; scan validation images with "
            "the network and layer that were split."
        )
    tau = float(split.settings["tau"]) if tau is None else real_number("tau", tau)
    if not 0 <= tau <= 1:
        raise UsageError(f"tau is {tau:g}; a share must lie between 0 and 1.")
    gathered = gather_responses(split, scan)
    channels = tuple(
        _evaluate_channel(split, part, gathered[part.channel], tau) for part in split.channels
    )
    return Evaluation(
        method=split.method,
        layer=split.layer.name,
        channels=channels,
        tau=tau,
        responses=gathered,
        output=output,
        ablation=ablation,
        semantics=semantics,
        baseline=None if baseline is None else evaluate(baseline, scan, tau=tau),
    )


def _check_baseline(split: Split, baseline: Split) -> None:
    divided, other = ({c.channel: c.concepts for c in s.channels} for s in (split, baseline))
    if divided != other or split.method == baseline.method:
        raise UsageError(
            "The baseline must divide the same channels among the same concepts by another method; "
            "make both from the same findings."
        )


def _check_ablation(split: Split, ablation: Ablation) -> None:
    divided = {part.channel: part.concepts for part in split.channels}
    measured = {c.channel: tuple(k.classes for k in c.concepts) for c in ablation.channels}
    if ablation.layer != split.layer.name or not measured.items() <= divided.items():
        raise UsageError(
            "The ablation is of another split (its layer, channels or concepts differ); pass "
            "unbraid.ablate of the network that this split was applied to."
        )


def _check_semantics(split: Split, semantics: Semantics) -> None:
    divided = {part.channel: len(part.concepts) for part in split.channels}
    measured = {channel: len(one.concepts) for channel, one in semantics.channels.items()}
    if not measured.items() <= divided.items():
        raise UsageError(
            "The semantics are of another split (its channels or concepts differ); pass "
            "unbraid.measure_semantics of this split."
        )


def gather_responses(split: Split, scan: Scan) -> dict[int, Responses]:
    """Read a Scan once and compute all responses to the images of each channel's concepts."""
    parts: dict[int, list[Responses]] = {part.channel: [] for part in split.channels}
    members = split.members_in(scan)
    for records in scan.shards():
        for part in split.channels:
            answer = _respond(members, records, part)
            if answer is not None:
                parts[part.channel].append(answer)
    for part in split.channels:
        there = {int(k) for answer in parts[part.channel] for k in answer.concept.unique()}
        for k, concept in enumerate(part.concepts):
            if k not in there:
                raise UsageError(
                    f"The scan has no image of {split.name(concept)}, concept {k} of channel "
                    f"{part.channel}; scan validation images of all concepts."
                )
    return {o: _join(answers) for o, answers in parts.items()}


def _respond(members: Members, records: Records, part: ChannelSplit) -> Responses | None:
    """Responses to one shard's images of a channel's concepts, None if it has none."""
    scan, concept = members.scan, members.concept_of(records, part.concepts)
    chosen = concept >= 0
    if not chosen.any():
        return None
    pooled = records.pooled[chosen, scan.layer.group_of(part.channel)]
    z = part.pooled_responses(pooled, records.n_positions[chosen])
    rectified = None
    if records.input_map is not None:
        maps = part.response_maps(scan.layer, records.input_map[chosen])
        rectified = maps.clamp(min=0).flatten(2).sum(2)
    return Responses(
        concept=concept[chosen],
        label=records.label[chosen],
        share=records.share_of(part.channel)[chosen],
        original=z[:, 0],
        concepts=z[:, 1:-1],
        residual=z[:, -1],
        rectified=rectified,
    )


def _join(answers: Sequence[Responses]) -> Responses:
    def cat(name: str) -> Tensor:
        return torch.cat([getattr(answer, name) for answer in answers])

    with_positions = answers[0].rectified is not None
    return Responses(
        concept=cat("concept"),
        label=cat("label"),
        share=cat("share"),
        original=cat("original"),
        concepts=cat("concepts"),
        residual=cat("residual"),
        rectified=cat("rectified") if with_positions else None,
    )


def _evaluate_channel(
    split: Split, part: ChannelSplit, answers: Responses, tau: float
) -> ChannelEvaluation:
    z, new, concept = answers.original, answers.concepts, answers.concept
    rectified = answers.rectified
    counted = answers.share >= tau
    return ChannelEvaluation(
        layer=split.layer.name,
        channel=part.channel,
        concepts=tuple(
            ConceptEvaluation(
                classes=classes,
                name=split.name(classes),
                n_images=int((concept == k).sum()),
                retention=_mean_ratio(new[:, k], z, concept == k),
                leakage=_leakage(z, new, concept, k),
                mimic_error=mimic_error(z, new[:, k], concept == k),
                silence_error=_mean(silence_errors(z, new, concept, k)),
                auroc=auroc(new[:, k], concept == k),
                ratios=_ratios(answers, counted & (concept == k)),
            )
            for k, classes in enumerate(part.concepts)
        ),
        separation_error=separation_error(z, new, concept),
        separation_error_rectified=None
        if rectified is None
        else separation_error(rectified[:, 0], rectified[:, 1:], concept),
    )


def mimic_error(z: Tensor, z_k: Tensor, own: Tensor) -> float:
    """Relative error of a concept channel as a copy of the original on its own images.

    Args:
        z: (N,), the original channel's pooled pre-activation.
        z_k: (N,), the concept channel's.
        own: (N,), true for the images of the concept.

    >>> z = torch.tensor([1.0, 3.0])
    >>> mimic_error(z, z / 2, torch.tensor([True, True]))
    0.5
    """
    return float(_rms(z_k[own] - z[own]) / _rms(z[own]))


def silence_errors(z: Tensor, new: Tensor, concept: Tensor, k: int) -> list[float]:
    """Relative size of concept channel k's response to each other concept's images.

    Args:
        z: (N,), the original channel.
        new: (N, K), the concept channels.
        concept: (N,), which concept each image belongs to.
        k: the concept channel.
    """
    others = [concept == other for other in range(new.shape[1]) if other != k]
    return [float(_rms(new[other, k]) / _rms(z[other])) for other in others]


def separation_error(z: Tensor, new: Tensor, concept: Tensor) -> float:
    """Mean of all mimic and silence errors of a channel: 0 is ideal, halving it gives 0.5.

    >>> z = torch.tensor([1.0, 2.0])
    >>> separation_error(z, torch.stack([z / 2, z / 2], 1), torch.tensor([0, 1]))
    0.5
    """
    errors: list[float] = []
    for k in range(new.shape[1]):
        errors += [mimic_error(z, new[:, k], concept == k), *silence_errors(z, new, concept, k)]
    return _mean(errors)


def auroc(score: Tensor, positive: Tensor) -> float:
    """Chance that a positive image scores above another one, ties counted half.

    >>> auroc(torch.tensor([3.0, 2.0, 1.0, 2.0]), torch.tensor([True, True, False, False]))
    0.875
    """
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    ranks = torch.from_numpy(rankdata(score.numpy()))
    wins = float(ranks[positive].sum()) - n_positive * (n_positive + 1) / 2
    return wins / (n_positive * n_negative)


def _leakage(z: Tensor, new: Tensor, concept: Tensor, k: int) -> float:
    others = [concept == other for other in range(new.shape[1]) if other != k]
    return _mean([_mean_ratio(new[:, k], z, other) for other in others])


def _ratios(answers: Responses, counted: Tensor) -> tuple[Ratio, ...]:
    """One row of the published table: each new channel's part of the original, image by image."""
    original = answers.original[counted]
    columns = [*answers.concepts[counted].T, answers.residual[counted]]
    ratios = [column / original for column in columns]
    return tuple(Ratio(float(r.mean()), float(r.quantile(0.5))) for r in ratios if len(r))


def _mean_ratio(z_k: Tensor, z: Tensor, images: Tensor) -> float:
    return float(z_k[images].mean() / z[images].mean())


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# How sure the measures are: bootstrap intervals over the images of each concept.


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
