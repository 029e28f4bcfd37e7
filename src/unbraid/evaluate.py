"""Measure how well concept channels separate concepts, on images not used to find or fit.

Shapes: N images of a channel's concepts, K concepts; see METHOD.md section 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from scipy.stats import rankdata
from torch import Tensor

from unbraid.ablation import Ablation
from unbraid.clusters import concept_of
from unbraid.doors import in_plain_modes
from unbraid.errors import UsageError
from unbraid.evaluation import ChannelEvaluation, ConceptEvaluation, Evaluation, Ratio, Responses
from unbraid.given import as_kind, real_number
from unbraid.output import OutputComparison
from unbraid.records import Records, Scan
from unbraid.semantics import Semantics
from unbraid.splits import ChannelSplit, Split


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
    scan = replace(scan, clusters=split.clusters)
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
    for records in scan.shards():
        for part in split.channels:
            answer = _respond(scan, records, part)
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


def _respond(scan: Scan, records: Records, part: ChannelSplit) -> Responses | None:
    """Responses to one shard's images of a channel's concepts, None if it has none."""
    concept = concept_of(scan, records, part.concepts)
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
