"""Measure how well concept channels separate concepts, and how sure these measures are.

Shapes: N images of a channel's concepts, K concepts, B resamples. z (N,) is the original channel's
pooled pre-activation, new (N, K) the concept channels', concept (N,) which one an image belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from unbraid.base.arguments import as_kind, flag, real_number
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.progress import Advance, Progress, uncounted
from unbraid.finding.membership import Members
from unbraid.images.batches import in_batches
from unbraid.measuring.compare import OutputComparison
from unbraid.measuring.formulas import (
    auroc,
    counted_auroc,
    coverage,
    explained_share,
    mean,
    mimic_error,
    off_concept,
    others_than,
    r_precision,
    separation_error,
    silence_errors,
    top_coverage,
)
from unbraid.measuring.likeness import Semantics
from unbraid.measuring.results import (
    Ablation,
    ChannelEvaluation,
    ConceptEvaluation,
    Evaluation,
    Ratio,
    Responses,
    join,
)
from unbraid.scanning.fields import Records
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import ChannelSplit, Split

_MAX_BYTES = 2**27  # of responses to all images held at a time


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
    everything: Scan | None = None,
    maps: Scan | None = None,
    progress: bool = False,
) -> Evaluation:
    """Compute the measures of "Evaluate" in docs/method.md for every split channel.

    Args:
        split: whose concept channels to measure.
        scan: of validation images of the same network and layer; its positions are needed for
            the rectified measures, which are None without.
        baseline: another split of the same channels and concepts, such as the published one, whose
            mean errors join the summary.
        tau: smallest share for an image to count in the published table; by default that of the
            findings.
        output: from `unbraid.compare_outputs`, to be kept with the measures.
        ablation: from `unbraid.ablate`, of all or some of the channels, likewise.
        semantics: from `unbraid.measure_semantics`, likewise.
        everything: a scan of all validation images, where `scan` is of some. Measures over all
            images, such as R-precision and coverage, are None without either. They take 8 bytes
            an image for each response, of so many channels at a time as fill 128 MiB (two such
            portions are in memory at once), and read the records once for every portion.
        maps: a scan with positions of some of the images, for the rectified measures, where
            `scan` has none; those of a channel are None if it lacks a concept.
        progress: show on standard error how far it is, if it takes long.

    Returns:
        An Evaluation: errors relative to the whole channel, and fractions between 0 and 1.

    Raises:
        UsageError: tau is out of range; a scan is of another network or layer, or has no image
            of a concept; `everything` is of some images, or of others; or the baseline, ablation
            or semantics are of another split.
    """
    as_kind("split", split, Split)
    as_kind("scan", scan, Scan)
    if baseline is not None:
        as_kind("baseline", baseline, Split)
    _refuse_other_results(split, baseline, ablation, semantics)
    split.require(scan)
    if maps is not None:
        _refuse_maps(split, scan, as_kind("maps", maps, Scan))
    if everything is not None:
        _refuse_part(split, scan, as_kind("everything", everything, Scan))
    elif _is_whole(scan):
        everything = scan
    tau = float(split.settings["tau"]) if tau is None else real_number("tau", tau)
    if not 0 <= tau <= 1:
        raise UsageError(f"tau is {tau:g}; a share must lie between 0 and 1.")
    told = Progress(flag("progress", progress))
    with told.of("Reading responses", scan.n_by_label.total(), "images") as advance:
        responses = gather_responses(split, scan, advance)
    shaped = responses if maps is None else _gather(split, maps)
    with told.of("Measuring", len(split.channels), "channels") as advance:
        channels = []
        whole: Iterable[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(split.channels)
        if everything is not None:
            whole = respond_to_all(split, everything)
        for part, to_all in zip(split.channels, whole, strict=True):
            own = responses[part.channel]
            measured = _evaluate_channel(split, part, own, shaped.get(part.channel), tau)
            channels.append(measured if to_all is None else _over_all(measured, *to_all))
            advance(1)
    return Evaluation(
        split.method,
        split.layer.name,
        tuple(channels),
        tau,
        responses,
        output,
        ablation,
        semantics,
        baseline=None
        if baseline is None
        else evaluate(baseline, scan, tau=tau, everything=everything, maps=maps, progress=progress),
    )


def _is_whole(scan: Scan) -> bool:
    return scan.manifest.classes is None and not scan.manifest.indices


def _refuse_maps(split: Split, scan: Scan, maps: Scan) -> None:
    split.require(maps)
    if not maps.positions or maps.manifest.data != scan.manifest.data:
        raise UsageError(
            "`maps` is no scan with positions of the same images as `scan`; pass one, or none."
        )


def _refuse_part(split: Split, scan: Scan, everything: Scan) -> None:
    split.require(everything)
    if not _is_whole(everything) or everything.manifest.data != scan.manifest.data:
        raise UsageError(
            "`everything` is a scan of some images only, or of others than `scan`; scan all images "
            "of the validation set."
        )


def _refuse_other_results(
    split: Split, baseline: Split | None, ablation: Ablation | None, semantics: Semantics | None
) -> None:
    concepts = {part.channel: part.concepts for part in split.channels}
    if baseline is not None:
        others = {part.channel: part.concepts for part in baseline.channels}
        if concepts != others or split.method == baseline.method:
            raise UsageError(
                "The baseline must divide the same channels among the same concepts by another "
                "method; make both from the same findings."
            )
    ablated = ablation.channels if ablation is not None else ()
    theirs = {channel.channel: tuple(k.classes for k in channel.concepts) for channel in ablated}
    other_layer = ablation is not None and ablation.layer != split.layer.name
    if other_layer or not theirs.items() <= concepts.items():
        raise UsageError(
            "The ablation is of another split (its layer, channels or concepts differ); pass "
            "unbraid.ablate of the network that this split was applied to."
        )
    seen = semantics.channels if semantics is not None else {}
    if any(len(one.concepts) != len(concepts.get(o, ())) for o, one in seen.items()):
        raise UsageError(
            "The semantics are of another split (its channels or concepts differ); pass "
            "unbraid.measure_semantics of this split."
        )


def gather_responses(
    split: Split, scan: Scan, advance: Advance = uncounted
) -> dict[int, Responses]:
    """Read a Scan once and compute all responses to the images of each channel's concepts."""
    gathered = _gather(split, scan, advance)
    for part in split.channels:
        own = gathered.get(part.channel)
        seen = set() if own is None else set(own.concept.tolist())
        for k, concept in enumerate(part.concepts):
            if k not in seen:
                raise UsageError(
                    f"The scan has no image of {split.name(concept)}, concept {k} of channel "
                    f"{part.channel}; scan validation images of all concepts."
                )
    return gathered


def _gather(split: Split, scan: Scan, advance: Advance = uncounted) -> dict[int, Responses]:
    """The same, of the channels of whose concepts the scan has an image."""
    parts: dict[int, list[Responses]] = {part.channel: [] for part in split.channels}
    members = split.members_in(scan)
    for records in scan.shards():
        for part in split.channels:
            responses = _respond(members, records, part)
            if len(responses.concept):
                parts[part.channel].append(responses)
        advance(len(records))
    return {channel: join(responses) for channel, responses in parts.items() if responses}


def _respond(members: Members, records: Records, part: ChannelSplit) -> Responses:
    """Responses to one shard's images of a channel's concepts."""
    concept = members.concept_of(records, part.concepts)
    chosen = concept >= 0
    pooled = records.pooled[chosen, members.scan.layer.group_of(part.channel)]
    z = part.pooled_responses(pooled, records.n_positions[chosen])
    rectified = None
    if records.input_map is not None and chosen.any():
        maps = part.response_maps(members.scan.layer, records.input_map[chosen])
        rectified = maps.clamp(min=0).flatten(2).sum(2)
    return Responses(
        concept[chosen],
        records.label[chosen],
        records.share_of(part.channel)[chosen],
        original=z[:, 0],
        concepts=z[:, 1:-1],
        residual=z[:, -1],
        rectified=rectified,
    )


def respond_to_all(split: Split, scan: Scan) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield of each channel, in order, the concept of every image (N,), -1 for none, z and new."""
    widest = max((2 + len(part.concepts) for part in split.channels), default=1)
    n_at_a_time = max(1, _MAX_BYTES // (8 * scan.manifest.n_images * widest))
    for start in range(0, len(split.channels), n_at_a_time):
        parts = split.channels[start : start + n_at_a_time]
        concept, responses = _respond_to_all(split.members_in(scan), parts)
        sizes = [1 + len(part.concepts) for part in parts]
        for own, z in zip(concept, responses.split(sizes), strict=True):
            yield own, z[0], z[1:].T


def _respond_to_all(members: Members, parts: Sequence[ChannelSplit]) -> tuple[Tensor, Tensor]:
    """Concepts (channels, N), and responses (originals and concept channels in order, N)."""
    scan, n_images = members.scan, members.scan.manifest.n_images
    rows = torch.cat([torch.cat([part.weight[None], part.rows]) for part in parts]).double()
    origin = [part for part in parts for _ in range(1 + len(part.concepts))]
    bias = torch.tensor([part.bias for part in origin], dtype=torch.float64)
    group = torch.tensor([scan.layer.group_of(p.channel) for p in origin], dtype=torch.int64)
    responses = torch.empty(len(rows), n_images, dtype=torch.float64)
    concept, n = torch.empty(len(parts), n_images, dtype=torch.int64), 0
    for records in scan.light_shards():
        here = slice(n, n + len(records))
        for g in group.unique().tolist():
            z = rows[group == g] @ records.pooled[:, g].double().T
            responses[group == g, here] = z + bias[group == g, None] * records.n_positions
        for row, part in enumerate(parts):
            concept[row, here] = members.concept_of(records, part.concepts)
        n = here.stop
    return concept[:, :n], responses[:, :n]  # without images that were broken


def _over_all(
    channel: ChannelEvaluation, concept: Tensor, z: Tensor, new: Tensor
) -> ChannelEvaluation:
    """Add what is measured over all images."""
    named, concepts = concept >= 0, []
    for k, measured in enumerate(channel.concepts):
        own, z_k = concept == k, new[:, k]
        concepts.append(
            replace(
                measured,
                auroc_all=auroc(z_k, own),
                r_precision=r_precision(z_k, own),
                off=off_concept(z_k, own),
                whole_auroc_all=auroc(z, own),
                whole_r_precision=r_precision(z, own),
            )
        )
    return replace(
        channel,
        concepts=tuple(concepts),
        coverage=coverage(z, named),
        top_coverage=top_coverage(z, named),
        explained_share=explained_share(z, new),
    )


def _evaluate_channel(
    split: Split, part: ChannelSplit, responses: Responses, shaped: Responses | None, tau: float
) -> ChannelEvaluation:
    z, new, concept = responses.original, responses.concepts, responses.concept
    columns = (*new.T, responses.residual)

    def ratio(z_k: Tensor, images: Tensor) -> float:
        return float(z_k[images].mean() / z[images].mean())

    concepts = []
    for k, classes in enumerate(part.concepts):
        own, z_k = concept == k, new[:, k]
        counted = (responses.share >= tau) & own
        ratios = [column[counted] / z[counted] for column in columns if counted.any()]
        concepts.append(
            ConceptEvaluation(
                classes=classes,
                name=split.name(classes),
                n_images=int(own.sum()),
                retention=ratio(z_k, own),
                leakage=mean([ratio(z_k, other) for other in others_than(concept, new, k)]),
                mimic_error=mimic_error(z, z_k, own),
                silence_error=mean(silence_errors(z, new, concept, k)),
                auroc=auroc(z_k, own),
                ratios=tuple(Ratio(float(r.mean()), float(r.quantile(0.5))) for r in ratios),
            )
        )
    rectified, error = None, separation_error(z, new, concept)
    if shaped is not None and shaped.rectified is not None:
        both, own_concept = shaped.rectified, shaped.concept
        if len(own_concept.unique()) == len(part.concepts):
            rectified = separation_error(both[:, 0], both[:, 1:], own_concept)
    return ChannelEvaluation(split.layer.name, part.channel, tuple(concepts), error, rectified)


# Bootstrap intervals: the same measures, with images counted several times or not at all.

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


def intervals(responses: Responses, seed: int = 0) -> ChannelIntervals | None:
    """Percentile intervals of the measures, with the images of each concept drawn again and again.

    None if a concept has a single image. Efron and Tibshirani 1993, chapter 13.
    """
    concept = responses.concept.numpy()
    z = responses.original.double().numpy()
    new = responses.concepts.double().numpy()
    members = [np.flatnonzero(concept == k) for k in range(new.shape[1])]
    if min(map(len, members)) < 2:
        return None
    rng = np.random.default_rng(seed)
    measures, means = [], []
    for drawn in in_batches(range(N_RESAMPLES), max(1, _MAX_CELLS // len(concept))):
        counts = np.zeros((len(drawn), len(concept)))
        for images in members:
            counts[:, images] = _draw(rng, len(drawn), len(images))
        measures.append(resampled(counts, z, new, members))
        means.append(np.stack([counts[:, own] @ z[own] / len(own) for own in members], axis=1))
    values = np.concatenate(measures)  # (B, K, 5)
    mimic, silence = values[:, :, 2], values[:, :, 3]
    # A concept channel has a silence error for each other concept.
    errors = (mimic + (len(members) - 1) * silence).mean(1) / len(members)
    return ChannelIntervals(
        tuple(ConceptIntervals(*map(_interval, values[:, k].T)) for k in range(len(members))),
        _interval(errors),
        tuple(map(_interval, np.concatenate(means).T)),
    )


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def _draw(rng: np.random.Generator, n_resamples: int, n: int) -> np.ndarray:
    draws = rng.integers(n, size=(n_resamples, n)) + n * np.arange(n_resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=n * n_resamples).reshape(n_resamples, n)


def resampled(
    counts: np.ndarray, z: np.ndarray, new: np.ndarray, members: Sequence[np.ndarray]
) -> np.ndarray:
    """The five measures, (B, K, 5), with images counted several times or not at all, counts (B, N).

    z and new are the responses, members the images of each concept.
    """

    def ratio(above: np.ndarray, below: np.ndarray, images: np.ndarray) -> np.ndarray:
        counted = counts[:, images]
        with np.errstate(all="ignore"):  # a channel that never responds has no measures
            return np.asarray((counted @ above[images]) / (counted @ below[images]))

    measures = []
    for k, own in enumerate(members):
        z_k = new[:, k]
        others = [images for other, images in enumerate(members) if other != k]
        retention = ratio(z_k, z, own)
        leakage = np.mean([ratio(z_k, z, images) for images in others], axis=0)
        mimic = np.sqrt(ratio((z_k - z) ** 2, z**2, own))
        silence = np.mean([np.sqrt(ratio(z_k**2, z**2, images)) for images in others], axis=0)
        positive = np.isin(np.arange(len(z)), own)
        aurocs = counted_auroc(counts, z_k, positive)
        measures.append(np.stack([retention, leakage, mimic, silence, aurocs], axis=1))
    return np.stack(measures, axis=1)
