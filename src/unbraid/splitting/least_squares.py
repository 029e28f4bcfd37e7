"""Divide a channel's weights among its concepts by box-constrained least squares.

The objective (docs/method.md, "Split") is a quadratic, which second moments of pooled inputs give,
and errors of single images (`Objective`). Shapes: N images, J taps, K concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from unbraid.finding.findings import Concept
from unbraid.finding.membership import Clusters, Members
from unbraid.splitting.moments import (
    Moment,
    RowPrior,
    augment,
    augmented_row,
    join_moments,
    moment,
)
from unbraid.splitting.objective import Beyond, Objective, weighted_moments
from unbraid.splitting.rectified import Rectified, spreads_of
from unbraid.splitting.silence import MARGIN, N_EVEN, N_TOP, Images, Rest, join_images, numbers_of

Need = TypeVar("Need")
Material = TypeVar("Material")
Answer = TypeVar("Answer")

N_IMAGES = 5000  # of a class or cluster, which the fit looks at
_N_SHAPED = 500  # of a concept, for rectified responses
_BYTES_AT_ONCE = 3 << 30  # of inputs
BACKGROUND = 0.2  # of two-sided silence on images of no concept
PRESENCE = 3.0  # of responses to own images that fall short; docs/evidence-splitting.md
LEAST_PENALTY = 5.0  # times alpha: what few images leave open, other rows of the layer must say
_LEAST_GAIN = 1e-5  # part of the objective for which another step is worth it
_POOLED_SHARE = 0.45  # at least, of pooled beside rectified responses; docs/evidence-splitting.md


def by_portion(
    needs: Mapping[int, set[Need]],
    n_bytes: Callable[[Need], int],
    read: Callable[[set[Need], Sequence[int]], Material],
    work: Callable[[Material, int], Answer],
    bytes_each: int = 0,
) -> dict[int, Answer]:
    """Do the work of all channels side by side, as many at a time as memory holds the needs of."""
    portions: list[tuple[list[int], set[Need]]] = []
    for channel, own in needs.items():
        if not portions or (
            sum(map(n_bytes, portions[-1][1] | own)) + bytes_each * len(portions[-1][0])
            > _BYTES_AT_ONCE
        ):
            portions.append(([], set()))
        portions[-1][0].append(channel)
        portions[-1][1].update(own)
    answers: dict[int, Answer] = {}
    n_threads = torch.get_num_threads()
    for channels, wanted in portions:
        material = read(wanted, channels)
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(n_threads, "", torch.set_num_threads, (1,)) as pool:
                done = pool.map(partial(work, material), channels)
                answers.update(zip(channels, done, strict=True))
        finally:
            torch.set_num_threads(n_threads)
    return answers


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
    # Rows (R, J) and diagonal (J,) by which mimicking a concept counts more than silence on it.
    own: Sequence[tuple[Tensor, Tensor]]  # (K,); none where both count the same
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
        rows, diagonal = self.own[k]
        gram = self.gram + rows.T @ rows
        gram.diagonal().add_(diagonal)
        return gram

    def loss(self, masks: Tensor) -> Tensor:
        """Squared mimic and mean silence errors, without penalty, (K,)."""
        loss = (masks * (masks @ self.gram - 2 * self.linear)).sum(1) + self.constant
        for k, (mask, (rows, diagonal)) in enumerate(zip(masks, self.own, strict=False)):
            loss[k] += (rows @ mask).square().sum() + diagonal @ mask.square()
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


def with_background(problem: Problem, images: Images) -> Problem:
    """Ask of every mask for a small response, of either sign, to images of no concept."""
    counts = images.weight * (images.concept < 0)
    power = counts @ (images.inputs @ problem.row).square()
    if not power:
        return problem
    moments = weighted_moments(images, BACKGROUND * counts / power)
    moments = moments * torch.outer(problem.row, problem.row)  # (J + 1, J + 1)
    return replace(
        problem, gram=problem.gram + moments[:-1, :-1], linear=problem.linear - moments[-1, :-1]
    )


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
    scaled = [
        (m.rows[:, taps] * (part * i) ** 0.5 * row[taps], m.diagonal[taps] * (part * i))
        for m, i in zip(moments, inverse, strict=True)
    ]
    rows = torch.cat([rows for rows, _ in scaled])
    gram = rows.T @ rows
    gram.diagonal().add_(sum(diagonal for _, diagonal in scaled) * row[taps].square())
    more = 1 / part - 1  # of mimicking, beyond what counts of silence
    n_images = sum(m.n_images for m in moments)
    return Problem(
        row=row,
        gram=gram,
        own=[(r * more**0.5, d * row[taps].square() * more) for r, d in scaled] if more else (),
        part=part,
        linear=own - part * (pull.sum(0) - pull),
        constant=own.sum(1) + part * (rest.sum() - rest),
        power=power,
        mean=torch.stack([m.mean @ row for m in moments]),
        shrinkage=sum(m.shrinkage * m.n_images for m in moments) / n_images,
    )


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
    problem = with_background(problem, images)
    n_concepts, n_taps = problem.linear.shape
    even = torch.full((n_taps,), 1 / n_concepts, dtype=torch.float64)
    spread, share = shaped_by(problem, spread)
    weights = replace(weights, penalty=max(weights.penalty, LEAST_PENALTY * problem.shrinkage))
    masks, residuals = [], []
    for k in range(n_concepts):
        mask = even if start is None else start[k].double().clamp(0, 1)
        scale = weights.penalty * float(problem.curvature(k).diagonal().mean())
        target = aim(problem, images, weights.silence, k, spread, share)
        objective = target.near(even, scale * prior)
        mask = objective.solve(mask, gain)
        masks.append(mask)
        residuals.append(objective.residual(mask))
    return Fit(torch.stack(masks), weights, max(residuals), problem.shrinkage)


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
    spread: Tensor | None = None,
    share: float = 1.0,
) -> Objective:
    """What the mask of concept k should minimise, without penalty."""
    gram, linear = problem.curvature(k), problem.linear[k]
    beyond = problem.beyond(images, omega, k)
    if spread is None:
        return Objective(gram, linear, [beyond])
    shaped = Rectified.of(problem.row, images, spread, k, omega, 1 - share, problem.part)
    return Objective(share * gram, share * linear, [beyond.times(share), shaped])


@dataclass(frozen=True)
class ChannelImages:
    """What the fit of one channel looks at."""

    moments: list[Moment]  # of its concepts
    images: Images
    part: float  # what silence on each other concept counts


@dataclass(frozen=True)
class _Material:
    """What some channels' fits look at, before it is put together."""

    columns: Mapping[int, Mapping[str, Tensor]]  # of the images of each class or cluster
    rest: dict[int, Images]  # by channel
    known: dict[tuple[int, int], Moment]  # by group and class or cluster


def fit_least_squares(
    members: Members,
    concepts: Mapping[int, Sequence[Concept]],
    weights: Weights,
    rest: tuple[Members, Rest],
    start: Mapping[int, Tensor] | None = None,
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

    return on_images(members, concepts, rest, N_IMAGES, fit)


def on_images(
    members: Members,
    concepts: Mapping[int, Sequence[Concept]],
    rest: tuple[Members, Rest],
    n_images: int,
    work: Callable[[ChannelImages, int], Answer],
) -> dict[int, Answer]:
    """Do the work of all channels on the first images of each class and the chosen rest."""
    scan, numbers = members.scan, numbers_of(concepts)
    counts = members.count({number for own in numbers.values() for number in own})
    n_bytes_each = 8 * (scan.layer.n_taps + 1) * scan.layer.groups

    def read(wanted: set[int], channels: Sequence[int]) -> _Material:
        names = ("index", "group", "pooled", "n_positions")
        others, chosen = rest
        return _Material(members.first(wanted, n_images, names), chosen.read(others, channels), {})

    def gather(material: _Material, channel: int) -> Answer:
        own, group = concepts[channel], scan.layer.group_of(channel)
        return work(_gather(group, own, channel, material, members.clusters), channel)

    def n_bytes(number: int) -> int:
        return n_bytes_each * min(counts[number], n_images)

    return by_portion(numbers, n_bytes, read, gather, n_bytes_each * (N_TOP + N_EVEN))


def _part(concepts: Sequence[Concept], clusters: Clusters) -> float:
    """What silence on each other concept counts.

    Clusters can be many; so that they do not silence each other, all others then count as one.
    """
    some = any(number in clusters for concept in concepts for number in concept)
    return 1 / max(1, len(concepts) - 1) if some else 1.0


def _gather(
    group: int, concepts: Sequence[Concept], channel: int, material: _Material, clusters: Clusters
) -> ChannelImages:
    """Put together what one channel's fit looks at, when its turn comes: it is large."""
    columns, known = material.columns, material.known
    parts, moments = [material.rest.pop(channel)], []
    for k, concept in enumerate(concepts):
        own = []
        for number in concept:
            column = columns[number]
            inputs = augment(column["pooled"][:, group], column["n_positions"])
            if (group, number) not in known:
                known[group, number] = moment(inputs)
            own.append(known[group, number])
            n_shaped = max(1, _N_SHAPED // len(concept))
            inputs = inputs[:n_shaped]
            parts.append(
                Images(
                    inputs,
                    torch.full((len(inputs),), k, dtype=torch.int64),
                    inputs.new_full((len(inputs),), own[-1].n_images / len(inputs)),
                    # Where the data set knows of no groups, each image is one of its own.
                    column.get("group", column["index"])[: len(inputs)],
                )
            )
        moments.append(join_moments(own))
    return ChannelImages(moments, join_images(parts), _part(concepts, clusters))
