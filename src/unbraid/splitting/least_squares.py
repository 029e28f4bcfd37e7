"""Divide a channel's weights among its concepts by box-constrained least squares.

The objective (docs/method.md, "Split") is a quadratic, which second moments of pooled inputs give,
and errors of single images (`Objective`). Shapes: N images, J taps, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbraid.base.progress import QUIET, Progress
from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members
from unbraid.splitting.material import ChannelImages, on_images
from unbraid.splitting.moments import Moment, RowPrior, augmented_row
from unbraid.splitting.objective import Background, Beyond, Objective, Term, descend
from unbraid.splitting.rectified import Rectified, Shape, spreads_of
from unbraid.splitting.silence import MARGIN, Images, Rest

N_IMAGES = 5000  # of a class or cluster, which the fit looks at
BACKGROUND = 0.2  # of two-sided silence on images of no concept
PRESENCE = 3.0  # of responses to own images that fall short; docs/evidence-splitting.md
LEAST_PENALTY = 5.0  # times alpha: what few images leave open, other rows of the layer must say
_LEAST_GAIN = 1e-6  # part of the objective for which another step is worth it
_POOLED_SHARE = 0.45  # at least, of pooled beside rectified responses; docs/evidence-splitting.md


@dataclass(frozen=True)
class Weights:
    """What the parts of the objective count beside mimicking and silence, which count 1."""

    penalty: float  # lambda, in units of the mean curvature; at least `LEAST_PENALTY` alpha
    silence: float  # omega, of all images that are not of the concept


@dataclass(frozen=True)
class Problem:
    """The quadratic part of the problems of one channel: K objectives.

    Mimicking counts 1, and silence on the images of each other concept a part of that.
    """

    row: Tensor  # (J + 1,), weights and bias
    gram: Tensor  # (J, J), without penalty, of silence on all concepts' images
    # Moments by which mimicking a concept counts more than silence on it, and how much.
    own: Sequence[tuple[Moment, float]]  # (K,); none where both count the same
    part: float  # what silence counts
    linear: Tensor  # (K, J), without penalty
    constant: Tensor  # (K,)
    power: Tensor  # (K,), mean square of the whole channel on each concept's images
    mean: Tensor  # (K,), its mean there
    shrinkage: float

    def curvature(self, k: int) -> Tensor:
        """The quadratic of one concept, (J, J), without penalty."""
        if not self.own:
            return self.gram
        return self.gram + _gram(self.row, [self.own[k]])

    def loss(self, masks: Tensor) -> Tensor:
        """Squared mimic and mean silence errors, without penalty, (K,)."""
        loss = (masks * (masks @ self.gram - 2 * self.linear)).sum(1) + self.constant
        for k, (mask, (own, weight)) in enumerate(zip(masks, self.own, strict=False)):
            x = self.row * torch.cat([mask, mask.new_zeros(1)])
            loss[k] += weight * (x @ own.times(x))
        return loss

    def beyond(self, images: Images, omega: float, k: int) -> Beyond:
        """Ask for silence on images that are not of concept k, and for an answer to its own.

        A response falls short below half the whole channel's rms on the concept's images: where
        positive and negative parts cancel there, to mimic it would be to answer nothing. It also
        does below a part of the mean, a larger one where few images, with the penalty they need,
        weaken all responses. A channel that is negative there on average is only mimicked.
        """
        own = images.concept == k
        power, mean = float(self.power[k]), float(self.mean[k])
        least = max(0.5 * power**0.5, min(1.2, 0.6 + self.shrinkage) * mean)
        root = _relative(images, ~own, omega, power)
        if mean > 0:
            root = root - _relative(images, own, PRESENCE, power)
        margin = torch.full_like(root, MARGIN * max(mean, 0.0))
        bound = torch.where(own, least, margin)
        return Beyond(images, self.row, root, bound)


def _relative(images: Images, chosen: Tensor, weight: float, power: float) -> Tensor:
    """Roots of what images count, (N,), for mean squares over the chosen in units of a power."""
    counts = images.weight * chosen
    total = float(counts.sum()) * power
    return (weight / total * counts).sqrt() if total else torch.zeros_like(counts)


def background(problem: Problem, images: Images) -> Background:
    """Ask of every mask for a small response, of either sign, to images of no concept."""
    counts = images.weight * (images.concept < 0)
    power = float(counts @ (images.inputs @ problem.row).square())
    root = (BACKGROUND / power * counts).sqrt() if power else torch.zeros_like(counts)
    return Background(images, problem.row, root)


def pose(row: Tensor, moments: Sequence[Moment], part: float = 1.0) -> Problem:
    """Write down the quadratic of one channel, from its weights and bias, (J + 1,)."""
    tiny = torch.finfo(row.dtype).tiny
    taps, bias = slice(None, -1), -1
    weights, held = row.clone(), torch.zeros_like(row)  # what masks can reach, and the bias
    weights[bias], held[bias] = 0, row[bias]
    by_taps = torch.stack([m.times(weights) for m in moments]) * row  # (K, J + 1)
    by_bias = torch.stack([m.times(held) for m in moments]) * row
    power = (by_taps + by_bias).sum(1)  # Z_k squared
    inverse = torch.where(power > tiny, 1 / power, 0)  # a concept that never moves it says nothing
    own = by_taps[:, taps] * inverse[:, None]
    pull = by_bias[:, taps] * inverse[:, None]  # of the bias, which no mask can silence
    rest = by_bias[:, bias] * inverse
    weighted = [(m, part * i) for m, i in zip(moments, inverse.tolist(), strict=True)]
    more = 1 / part - 1  # of mimicking, beyond what counts of silence
    n_images = sum(m.n_images for m in moments)
    return Problem(
        row=row,
        gram=_gram(row, weighted),
        own=[(m, weight * more) for m, weight in weighted] if more else (),
        part=part,
        linear=own - part * (pull.sum(0) - pull),
        constant=own.sum(1) + part * (rest.sum() - rest),
        power=power,
        mean=torch.stack([m.mean @ row for m in moments]),
        shrinkage=sum(m.shrinkage * m.n_images for m in moments) / n_images,
    )


def _gram(row: Tensor, weighted: Sequence[tuple[Moment, float]]) -> Tensor:
    """Sum weighted moments of taps that a row multiplies, (J, J)."""
    taps = slice(None, -1)
    row = row[taps]
    rows = torch.cat([m.rows[:, taps] * weight**0.5 * row for m, weight in weighted])
    gram = rows.T @ rows
    squares = [(m.square, weight) for m, weight in weighted if m.square is not None]
    if squares:
        total = torch.zeros_like(gram)
        for square, weight in squares:
            total.add_(square[taps, taps], alpha=weight)
        gram += total.mul_(row[:, None]).mul_(row)
    gram.diagonal().add_(sum(m.diagonal[taps] * weight for m, weight in weighted) * row.square())
    return gram


@dataclass(frozen=True)
class Fit:
    """Masks of one channel, and how they were found."""

    masks: Tensor  # (K, J), float64
    weights: Weights
    kkt_residual: float
    shrinkage: float


def solve(
    problem: Problem,
    images: Images,
    weights: Weights,
    prior: Tensor,
    start: Tensor | None = None,
    spread: Tensor | None = None,
    gain: float = _LEAST_GAIN,
) -> Fit:
    """Solve the problems of one channel, on pooled and, with a spread, on rectified responses."""
    n_concepts, n_taps = problem.linear.shape
    even = torch.full((n_taps,), 1 / n_concepts, dtype=torch.float64)
    spread, share = shaped_by(problem, spread)
    shape = None if spread is None else Shape.of(problem.row, images, spread)
    weights = replace(weights, penalty=max(weights.penalty, LEAST_PENALTY * problem.shrinkage))
    quiet = background(problem, images)
    objectives = []
    for k in range(n_concepts):
        if not k or problem.own:  # else concepts have one quadratic and one penalty
            curvature = problem.curvature(k)
            scale = float((curvature.diagonal() + quiet.diagonal()).mean())
            penalty = weights.penalty * scale * prior
            gram, linear = share * curvature + penalty, penalty @ even
        terms = terms_of(problem, images, weights.silence, k, quiet, shape, share)
        objectives.append(Objective(gram, share * problem.linear[k] + linear, terms))
    masks = [even if start is None else start[k].double().clamp(0, 1) for k in range(n_concepts)]
    found = descend(objectives, masks, gain)
    residual = max(residual for _, residual in found)
    return Fit(torch.stack([mask for mask, _ in found]), weights, residual, problem.shrinkage)


def shaped_by(problem: Problem, spread: Tensor | None) -> tuple[Tensor | None, float]:
    """The spread where rectified responses count, and the share of pooled ones beside them."""
    if spread is None or not (problem.mean > 0).all():
        return None, 1.0  # zero is not where this channel begins to count, as before a batch norm
    # Pooled responses say more than rectified ones where images are few.
    return spread, _POOLED_SHARE + (1 - _POOLED_SHARE) * problem.shrinkage


def aim(
    problem: Problem,
    images: Images,
    omega: float,
    k: int,
    shape: Shape | None = None,
    share: float = 1.0,
) -> Objective:
    """What the mask of concept k should minimise, without penalty."""
    terms = terms_of(problem, images, omega, k, background(problem, images), shape, share)
    return Objective(share * problem.curvature(k), share * problem.linear[k], terms)


def terms_of(
    problem: Problem,
    images: Images,
    omega: float,
    k: int,
    quiet: Background,
    shape: Shape | None,
    share: float,
) -> list[Term]:
    """The errors of single images that the mask of concept k should make small."""
    terms: list[Term] = [problem.beyond(images, omega, k).times(share), quiet.times(share)]
    if shape is not None:
        terms.append(Rectified.of(shape, k, omega, 1 - share, problem.part))
    return terms


def fit_least_squares(
    members: Members,
    concepts: Mapping[int, Sequence[Concept]],
    weights: Weights,
    rest: tuple[Members, Rest],
    start: Mapping[int, Tensor] | None = None,
    progress: Progress = QUIET,
) -> dict[int, Fit]:
    """Fit the masks of all channels."""
    scan = members.scan
    prior = RowPrior(scan)
    spreads = spreads_of(rest[0].scan)

    def fit(own: ChannelImages, channel: int) -> Fit:
        problem = pose(augmented_row(scan, channel), own.moments, own.part)
        spread = spreads[scan.layer.group_of(channel)]
        begin = (start or {}).get(channel)
        return solve(problem, own.images, weights, prior.matrix(channel), begin, spread)

    return on_images(members, concepts, rest, N_IMAGES, fit, "Splitting", progress)
