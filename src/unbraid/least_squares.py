"""Divide a channel's weights among its concepts by box-constrained least squares.

Each concept k gets a mask m_k in [0, 1] over the taps; its channel z_k should answer to the images
of k as the original z does, and to those of the other concepts not at all. With errors relative to
Z_l, the original's rms on the images of concept l, that is (METHOD.md section 5)

    sum over n in k of (z_k[n] - z[n])^2 / (N_k Z_k^2)
    + sum over l != k, n in l of z_k[n]^2 / (N_l Z_l^2) + lambda |m_k - prior_k|^2

to be minimised: convex, with one answer, and a function of the concepts' second moments alone.
The bias is treated as one more tap, fed by the number of positions, whose mask is held at one.
Shapes: N images, J taps, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.box import kkt_residual, solve_box
from unbraid.clusters import belongs
from unbraid.findings import Concept
from unbraid.records import Scan

PENALTIES = tuple(10.0**e for e in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))
_DEFAULT_PENALTY = 1.0  # where there are too few images to choose one: close to the prior
_N_SAMPLED_CHANNELS = 24
_N_SAMPLED_IMAGES = 400  # of each class
_N_FOLDS = 5


@dataclass(frozen=True)
class Fit:
    """Masks of one channel, and how they were found."""

    masks: Tensor  # (K, J), float64
    prior: Tensor  # (K, J)
    penalty: float  # lambda, in units of the mean curvature
    kkt_residual: float


@dataclass(frozen=True)
class Problem:
    """The quadratic problems of one channel: K objectives that share their curvature."""

    hessian: Tensor  # (J, J), without penalty
    linear: Tensor  # (K, J), without penalty
    prior: Tensor  # (K, J)
    constant: Tensor  # (K,)

    def loss(self, masks: Tensor) -> Tensor:
        """Objectives without penalty, (K,): squared mimic error plus squared silence errors."""
        quadratic = torch.einsum("kj,ji,ki->k", masks, self.hessian, masks)
        return quadratic - 2 * (self.linear * masks).sum(1) + self.constant


def fit_least_squares(
    scan: Scan, concepts: Mapping[int, Sequence[Concept]], penalty: float | None = None
) -> dict[int, Fit]:
    """Fit the masks of all channels.

    Args:
        scan: of the training images.
        concepts: per channel.
        penalty: lambda, in units of the mean curvature of the problem; by default chosen for the
            whole layer by cross-validation over images.

    Returns:
        One Fit per channel.
    """
    if penalty is None:
        penalty = choose_penalty(scan, concepts)
    classes = sorted({c for groups in concepts.values() for group in groups for c in group})
    groups_used = sorted({scan.layer.group_of(o) for o in concepts})
    moments = second_moments(scan, classes, groups_used)
    fits = {}
    for channel, groups in concepts.items():
        group = scan.layer.group_of(channel)
        by_concept = [moments.of(group, concept) for concept in groups]
        problem = pose(augmented_row(scan, channel), by_concept)
        fits[channel] = solve(problem, penalty)
    return fits


@dataclass(frozen=True)
class Moments:
    """Second moments of pooled inputs by class, the number of positions as last input."""

    n_images: dict[int, int]
    second: dict[tuple[int, int], Tensor]  # (group, class): (J + 1, J + 1), sums, float64

    def of(self, group: int, concept: Concept) -> Tensor:
        """Mean over all images of a concept's classes, (J + 1, J + 1)."""
        total = torch.stack([self.second[group, label] for label in concept]).sum(0)
        return total / sum(self.n_images[label] for label in concept)


def second_moments(scan: Scan, classes: Sequence[int], groups: Sequence[int]) -> Moments:
    """Read a Scan once and sum the outer products of augmented pooled inputs by class."""
    size = scan.layer.n_taps + 1
    n_images = dict.fromkeys(classes, 0)
    second = {(g, c): torch.zeros(size, size, dtype=torch.float64) for g in groups for c in classes}
    for records in scan.shards():
        for label in classes:
            chosen = belongs(scan, records, label)
            n_images[label] += int(chosen.sum())
            for group in groups if chosen.any() else ():
                inputs = augment(records.pooled[chosen, group], records.n_positions[chosen])
                second[group, label] += inputs.T @ inputs
    return Moments(n_images, second)


def augment(pooled: Tensor, n_positions: Tensor) -> Tensor:
    """Put the number of positions, which the bias multiplies, behind the inputs: (N, J + 1)."""
    return torch.cat([pooled.double(), n_positions.double()[:, None]], 1)


def augmented_row(scan: Scan, channel: int) -> Tensor:
    """Put a channel's bias behind its weights: (J + 1,), float64."""
    return torch.cat([scan.weight[channel], scan.bias[channel, None]]).double()


def pose(row: Tensor, moments: Sequence[Tensor]) -> Problem:
    """Write down the problems of one channel.

    Args:
        row: (J + 1,), the channel's weights and bias.
        moments: of each concept, (J + 1, J + 1).
    """
    contributions = torch.stack([m * row * row[:, None] for m in moments])  # (K, J + 1, J + 1)
    power = contributions.sum((1, 2)).clamp(min=torch.finfo(row.dtype).tiny)  # Z_k squared
    relative = contributions / power[:, None, None]
    taps, bias = slice(None, -1), -1
    own = relative[:, taps, taps].sum(2)  # (K, J)
    pull = relative[:, taps, bias]  # of the bias, which no mask can silence
    everywhere, rest = pull.sum(0), relative[:, bias, bias]
    mean = torch.stack([m[taps, bias] for m in moments]) * row[taps]  # proportional to the ARVs
    strength = (mean / torch.stack([m[bias, bias] for m in moments])[:, None]).abs()
    return Problem(
        hessian=relative[:, taps, taps].sum(0),
        linear=own - (everywhere - pull),
        prior=strength / strength.sum(0).clamp(min=torch.finfo(row.dtype).tiny),
        constant=own.sum(1) + rest.sum() - rest,
    )


def solve(problem: Problem, penalty: float, start: Tensor | None = None) -> Fit:
    """Solve the problems of one channel, from the prior or a nearby answer."""
    n_concepts, n_taps = problem.prior.shape
    weight = penalty * float(problem.hessian.diagonal().mean())
    weight = max(weight, torch.finfo(torch.float64).tiny)  # a channel that never answers
    hessian = problem.hessian + weight * torch.eye(n_taps, dtype=torch.float64)
    hessians = hessian.expand(n_concepts, -1, -1)
    linear = problem.linear + weight * problem.prior
    masks = solve_box(hessians, linear, problem.prior if start is None else start)
    return Fit(masks, problem.prior, penalty, float(kkt_residual(hessians, linear, masks).max()))


def choose_penalty(scan: Scan, concepts: Mapping[int, Sequence[Concept]]) -> float:
    """Choose lambda by cross-validation over images, one for the layer.

    A sample of the channels, and of the images of their classes, is enough for one number; every
    channel then has the steadiness of all. Images are dealt to folds in turn, class by class.
    """
    every = sorted(concepts)
    sampled = every[:: max(1, len(every) // _N_SAMPLED_CHANNELS)][:_N_SAMPLED_CHANNELS]
    inputs = _sample_inputs(scan, {c for o in sampled for group in concepts[o] for c in group})
    total = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for channel in sampled:
        row, group = augmented_row(scan, channel), scan.layer.group_of(channel)
        images = [
            torch.cat([inputs[c] for c in concept])[:, group] for concept in concepts[channel]
        ]
        n_folds = min(_N_FOLDS, *map(len, images))
        for fold in range(n_folds if n_folds > 1 else 0):
            held_out = [torch.arange(len(x)) % n_folds == fold for x in images]
            fitted = pose(row, [_moment(x[~out]) for x, out in zip(images, held_out, strict=True)])
            judged = pose(row, [_moment(x[out]) for x, out in zip(images, held_out, strict=True)])
            start = None
            for place in reversed(range(len(PENALTIES))):  # from stiff to loose, each from the last
                fit = solve(fitted, PENALTIES[place], start)
                start = fit.masks
                total[place] += judged.loss(fit.masks).mean()
    return PENALTIES[int(total.argmin())] if total.any() else _DEFAULT_PENALTY


def _sample_inputs(scan: Scan, classes: set[int]) -> dict[int, Tensor]:
    """The first augmented pooled inputs of each class, (n, G, J + 1)."""
    kept: dict[int, list[Tensor]] = {label: [] for label in sorted(classes)}
    counts = dict.fromkeys(classes, 0)
    for records in scan.shards():
        for label, parts in kept.items():
            chosen = belongs(scan, records, label).nonzero()[: _N_SAMPLED_IMAGES - counts[label], 0]
            positions = records.n_positions[chosen, None, None].double()
            pooled = records.pooled[chosen].double()
            parts.append(torch.cat([pooled, positions.expand(-1, pooled.shape[1], 1)], 2))
            counts[label] += len(chosen)
    return {label: torch.cat(parts) for label, parts in kept.items()}


def _moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)
