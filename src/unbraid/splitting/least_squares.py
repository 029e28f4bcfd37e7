"""Choose least squares' penalty by cross-validation over images, one for the layer.

A sample of the channels, and of the images of their classes, is enough for one number; every
channel then has the steadiness of all. Shapes: n images, G groups, J taps, K concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members
from unbraid.scanning.records import Records, Scan, join_records
from unbraid.splitting.box_solver import (
    MOST_ROWS,
    Gram,
    Rows,
    Whole,
    add,
    kkt_residual,
    leading,
    scale,
    side_by_side,
    solve_box,
)

# Second moments of pooled inputs by class or cluster: all that least squares asks of a Scan.


_BYTES_AT_ONCE = 3 << 30  # of moments; all classes of ImageNet fit in at 512 inputs
_ROWS_AT_ONCE = 64  # images of a class whose outer products are added up together

K = TypeVar("K")
Key = tuple[int, int]  # group of the layer, class or cluster


@dataclass(frozen=True)
class Moments:
    """Sums of outer products of augmented pooled inputs, (J + 1, J + 1), float64."""

    n_images: Mapping[int, int]  # by class or cluster
    sums: Mapping[Key, Gram]


@dataclass(frozen=True)
class ConceptMoment:
    """The mean outer product of augmented pooled inputs over a concept's images."""

    parts: Sequence[Gram]  # sums, (J + 1, J + 1), of its classes or clusters
    n_images: int

    def times(self, x: Tensor) -> Tensor:
        """Multiply vectors, (..., J + 1), by the mean."""
        return torch.stack([part.times(x) for part in self.parts]).sum(0) / self.n_images


def concept_moment(moments: Moments, group: int, concept: Concept) -> ConceptMoment:
    """Put together the moment of a concept from those of its classes or clusters."""
    parts = [moments.sums[group, number] for number in concept]
    return ConceptMoment(parts, sum(moments.n_images[number] for number in concept))


def augment(pooled: Tensor, n_positions: Tensor) -> Tensor:
    """Put the number of positions behind the inputs: (..., J) and (N,) to (..., J + 1), float64."""
    positions = n_positions.double().reshape(-1, *[1] * (pooled.dim() - 1))
    return torch.cat([pooled.double(), positions.expand(*pooled.shape[:-1], 1)], -1)


def augmented_inputs(records: Records, places: Tensor) -> Tensor:
    """Augmented pooled inputs of some images, (images, G, J + 1)."""
    return augment(records.pooled[places], records.n_positions[places])


def portions(
    needs: Mapping[int, set[K]], n_bytes: Callable[[K], int], at_once: int
) -> Iterator[list[int]]:
    """Part channels into portions whose needs fit into memory together; each has one at least.

    Args:
        needs: of each channel.
        n_bytes: of one need, which channels share.
        at_once: bytes that may be held.

    >>> list(portions({7: {1, 2}, 8: {2}, 9: {3}}, lambda need: 10, 20))
    [[7, 8], [9]]
    """
    portion: list[int] = []
    held: set[K] = set()
    for channel, own in needs.items():
        if portion and sum(map(n_bytes, held | own)) > at_once:
            yield portion
            portion, held = [], set()
        portion.append(channel)
        held |= own
    if portion:
        yield portion


def read_moments(
    members: Members, concepts: Mapping[int, Sequence[Concept]]
) -> Iterator[tuple[list[int], Moments]]:
    """Give the moments that channels need, as many channels at a time as memory holds.

    A class is kept as its inputs, instead of their moment, if all its channels' concepts have so
    few images that these are quicker.
    """
    scan = members.scan
    counts = members.count({c for groups in concepts.values() for g in groups for c in g})
    n_taps = scan.layer.n_taps
    needs: dict[int, set[Key]] = {}
    whole: set[Key] = set()
    for channel, groups in concepts.items():
        group = scan.layer.group_of(channel)
        needs[channel] = {(group, number) for concept in groups for number in concept}
        if sum(counts[number] for _, number in needs[channel]) * MOST_ROWS > n_taps:
            whole |= needs[channel]

    def n_bytes(key: Key) -> int:
        return (n_taps + 1) * 8 * (n_taps + 1 if key in whole else counts[key[1]])

    for portion in portions(needs, n_bytes, _BYTES_AT_ONCE):
        keys = {key for channel in portion for key in needs[channel]}
        yield portion, Moments(counts, second_moments(members, keys, whole))


def second_moments(members: Members, keys: Iterable[Key], whole: set[Key]) -> dict[Key, Gram]:
    """Read a Scan once and sum the outer products of augmented pooled inputs.

    Args:
        members: of a scan of images of all classes and clusters in `keys`.
        keys: which groups and classes or clusters.
        whole: those to be kept as matrices; of the others the inputs are kept.
    """
    size = members.scan.layer.n_taps + 1
    groups_of: dict[int, list[int]] = {}
    for group, number in sorted(keys):
        groups_of.setdefault(number, []).append(group)
    inputs: dict[Key, list[Tensor]] = {key: [] for key in keys}
    sums = {key: torch.zeros(size, size, dtype=torch.float64) for key in keys if key in whole}

    def add_up(key: Key, least: int) -> None:
        """Few images at a time, a matrix is hardly read for so little to add."""
        if sum(map(len, inputs[key])) >= least:
            rows = torch.cat(inputs[key])
            sums[key].addmm_(rows.T, rows)
            inputs[key].clear()

    for records in members.scan.shards():
        for number, places in members.places(records, groups_of):
            for group in groups_of[number]:
                pooled = records.pooled[places, group]
                inputs[group, number].append(augment(pooled, records.n_positions[places]))
                if (group, number) in whole:
                    add_up((group, number), _ROWS_AT_ONCE)
    for key in sums:
        add_up(key, 1)
    return {key: Whole(sums[key]) if key in sums else Rows(torch.cat(inputs[key])) for key in keys}


# What concept channels should do in images of no concept: share the original's answer evenly.


WEIGHT = 0.1  # beside 1 for each concept; docs/splitting.md tells what other weights gave
_N_BACKGROUND_IMAGES = 400  # of the whole scan, spread evenly


@dataclass(frozen=True)
class Term:
    """A squared error: |rows m|^2 - 2 linear.m + constant, for every mask m of a channel."""

    rows: Tensor  # (N, J)
    linear: Tensor  # (J,)
    constant: float


def sample_images(scan: Scan) -> Records:
    """Take records of some images, spread evenly over the scan."""
    sizes = [len(labels) for labels in scan.columns("label")]
    step = max(1, sum(sizes) // _N_BACKGROUND_IMAGES)
    parts, start = [], 0
    for records in scan.shards():
        first = min(-start % step, len(records))  # a shard may hold none
        places = torch.arange(first, len(records), step, dtype=torch.int64)
        parts.append(_choose(records, places))
        start += len(records)
    return join_records(parts)


def background_of(
    members: Members, sample: Records, channel: int, concepts: Sequence[Concept]
) -> Tensor:
    """Augmented pooled inputs of the sampled images that belong to no concept, (N, J + 1)."""
    outside = members.concept_of(sample, concepts) < 0
    pooled = sample.pooled[outside, members.scan.layer.group_of(channel)]
    return augment(pooled, sample.n_positions[outside])


def background_term(background: Tensor, row: Tensor, n_concepts: int) -> Term | None:
    """Mean squared distance from an even share, relative to the original's, times its weight.

    Args:
        background: (N, J + 1), of images of no concept.
        row: (J + 1,), the channel's weights and bias.
        n_concepts: that share the answer.

    Returns:
        None without such an image, or if the channel answers to none.
    """
    answers = background @ row
    if not answers.any():
        return None
    weight = WEIGHT / answers.square().sum()
    wanted = answers / n_concepts - background[:, -1] * row[-1]  # no mask can change the bias
    reach = background[:, :-1] * row[:-1]
    return Term(
        rows=weight.sqrt() * reach,
        linear=weight * (wanted @ reach),
        constant=float(weight * wanted.square().sum()),
    )


def _choose(records: Records, places: Tensor) -> Records:
    """Records of some places, without shares and input maps."""
    empty = records.share_start.new_zeros(len(places) + 1)
    return Records(
        index=records.index[places],
        label=records.label[places],
        prediction=records.prediction[places],
        n_positions=records.n_positions[places],
        pooled=records.pooled[places],
        share_start=empty,
        share_channel=records.share_channel[:0],
        share_value=records.share_value[:0],
        broken=records.broken[:0],
        group=None if records.group is None else records.group[places],
    )


# Divide a channel's weights among its concepts by box-constrained least squares.


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

    gram: Gram  # (J, J), without penalty
    linear: Tensor  # (K, J), without penalty
    prior: Tensor  # (K, J)
    constant: Tensor  # (K,)

    def plus(self, term: Term) -> Problem:
        """Ask for something more, of every mask alike."""
        return Problem(
            gram=add([self.gram, Rows(term.rows)], [1, 1]),
            linear=self.linear + term.linear,
            prior=self.prior,
            constant=self.constant + term.constant,
        )

    def loss(self, masks: Tensor) -> Tensor:
        """Objectives without penalty, (K,): squared mimic and silence errors, and so on."""
        return (masks * (self.gram.times(masks) - 2 * self.linear)).sum(1) + self.constant


def fit_least_squares(
    members: Members,
    concepts: Mapping[int, Sequence[Concept]],
    penalty: float,
    sample: Records,
    start: Mapping[int, Tensor] | None = None,
) -> dict[int, Fit]:
    """Fit the masks of all channels.

    Args:
        members: of a scan of the training images.
        concepts: per channel.
        penalty: lambda, in units of the mean curvature of the problem.
        sample: of all training images, from `sample_images`.
        start: per channel, masks (K, J) to begin with; the answer does not depend on them.

    Returns:
        One Fit per channel.
    """
    scan = members.scan
    fits: dict[int, Fit] = {}
    for channels, moments in read_moments(members, concepts):

        def fit(channel: int, moments: Moments = moments) -> Fit:
            own, row = concepts[channel], augmented_row(scan, channel)
            background = background_of(members, sample, channel, own)
            term = background_term(background, row, len(own))
            group = scan.layer.group_of(channel)
            problem = pose(row, [concept_moment(moments, group, c) for c in own], term)
            return solve(problem, penalty, (start or {}).get(channel))

        fits.update(zip(channels, side_by_side(fit, channels), strict=True))
    return fits


def augmented_row(scan: Scan, channel: int) -> Tensor:
    """Put a channel's bias behind its weights: (J + 1,), float64."""
    return torch.cat([scan.weight[channel], scan.bias[channel, None]]).double()


def pose(row: Tensor, moments: Sequence[ConceptMoment], background: Term | None = None) -> Problem:
    """Write down the problems of one channel.

    Args:
        row: (J + 1,), the channel's weights and bias.
        moments: of each concept.
        background: what is asked of images of no concept.
    """
    tiny = torch.finfo(row.dtype).tiny
    taps, bias = slice(None, -1), -1
    silenced, held = row.clone(), torch.zeros_like(row)  # what masks can reach, and the bias
    silenced[bias], held[bias] = 0, row[bias]
    by_taps = torch.stack([m.times(silenced) for m in moments]) * row  # (K, J + 1)
    by_bias = torch.stack([m.times(held) for m in moments]) * row
    power = (by_taps + by_bias).sum(1)  # Z_k squared
    inverse = torch.where(power > tiny, 1 / power, 0)  # a concept that never moves it says nothing
    own = by_taps[:, taps] * inverse[:, None]
    pull = by_bias[:, taps] * inverse[:, None]  # of the bias, which no mask can silence
    everywhere, rest = pull.sum(0), by_bias[:, bias] * inverse
    one = torch.zeros_like(row)
    one[bias] = 1  # times the number of positions: proportional to the ARVs, and to their squares
    weighted = torch.stack([m.times(one) for m in moments])
    strength = (weighted[:, taps] * row[taps] / weighted[:, bias, None]).abs()
    parts = [part for moment in moments for part in moment.parts]
    weights = [
        float(i) / m.n_images for m, i in zip(moments, inverse, strict=True) for _ in m.parts
    ]
    problem = Problem(
        gram=scale(leading(add(parts, weights), len(row) - 1), row[taps]),
        linear=own - (everywhere - pull),
        prior=strength / strength.sum(0).clamp(min=tiny),
        constant=own.sum(1) + rest.sum() - rest,
    )
    return problem if background is None else problem.plus(background)


def solve(problem: Problem, penalty: float, start: Tensor | None = None) -> Fit:
    """Solve the problems of one channel, from the prior or a nearby answer."""
    ridge = penalty * float(problem.gram.diagonal().mean())
    ridge = max(ridge, torch.finfo(torch.float64).tiny)  # a channel that never answers
    linear = problem.linear + ridge * problem.prior
    begin = problem.prior if start is None else start.to(problem.prior)
    masks = solve_box(problem.gram, ridge, linear, begin)
    residual = kkt_residual(problem.gram, ridge, linear, masks).max()
    return Fit(masks, problem.prior, penalty, float(residual))


# Choose least squares' penalty by cross-validation over images, one for the layer.


PENALTIES = tuple(10.0**e for e in (-2, -1.5, -1, -0.5, 0, 0.5, 1))
_DEFAULT_PENALTY = 1.0  # where there are too few images to choose one: close to the prior
_N_CHANNELS = 8
_N_CONCEPTS = 4  # of each channel, whose masks are fitted
_N_PENALTY_IMAGES = 200  # of each class or cluster
_N_FOLDS = 5
_PENALTY_BYTES_AT_ONCE = 1 << 30  # of inputs


def choose_penalty(members: Members, concepts: Mapping[int, Sequence[Concept]]) -> float:
    """Choose lambda, in units of the mean curvature.

    Images that the data set groups are held out together.
    """
    scan, every = members.scan, sorted(concepts)
    sampled = every[:: -(-len(every) // _N_CHANNELS)]
    needs = {o: {number for concept in concepts[o] for number in concept} for o in sampled}
    bytes_each = _N_PENALTY_IMAGES * scan.layer.groups * (scan.layer.n_taps + 1) * 8
    total = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for portion in portions(needs, lambda _: bytes_each, _PENALTY_BYTES_AT_ONCE):
        numbers = {number for channel in portion for number in needs[channel]}
        inputs = members.first(numbers, _N_PENALTY_IMAGES, augmented_inputs)
        ids = members.first(numbers, _N_PENALTY_IMAGES, _group_ids)

        def losses(
            channel: int, inputs: dict[int, Tensor] = inputs, ids: dict[int, Tensor] = ids
        ) -> Tensor:
            own, group = concepts[channel], scan.layer.group_of(channel)
            return _held_out_losses(
                augmented_row(scan, channel),
                [torch.cat([inputs[number][:, group] for number in concept]) for concept in own],
                [torch.cat([ids[number] for number in concept]) for concept in own],
            )

        total += torch.stack(side_by_side(losses, portion)).sum(0)
    return PENALTIES[int(total.argmin())] if total.any() else _DEFAULT_PENALTY


def deal(ids: Sequence[Tensor], n_folds: int) -> list[Tensor]:
    """Deal images to folds, concept by concept, no group to two of them.

    A group that is new goes to the fold with the fewest images of the concept.

    Args:
        ids: of each concept, (n,), the group that each image belongs to.
        n_folds: how many folds there are.

    Returns:
        Of each concept, (n,), the fold of each image.

    >>> deal([torch.tensor([5, 5, 6, 7]), torch.tensor([6, 8])], 2)
    [tensor([0, 0, 1, 1]), tensor([1, 0])]
    """
    fold_of: dict[int, int] = {}
    dealt = []
    for own in ids:
        sizes: dict[int, int] = {}
        for group in own.tolist():
            sizes[group] = sizes.get(group, 0) + 1
        filled = [0] * n_folds
        for group in sizes.keys() & fold_of.keys():
            filled[fold_of[group]] += sizes[group]
        for group in sizes:
            if group not in fold_of:
                fold_of[group] = filled.index(min(filled))
                filled[fold_of[group]] += sizes[group]
        dealt.append(torch.tensor([fold_of[group] for group in own.tolist()], dtype=torch.int64))
    return dealt


def _group_ids(records: Records, places: Tensor) -> Tensor:
    """The group of some images; where the data set knows of none, each is one of its own."""
    return (records.index if records.group is None else records.group)[places]


def _held_out_losses(row: Tensor, inputs: Sequence[Tensor], ids: Sequence[Tensor]) -> Tensor:
    """Losses of one channel on images held out, summed over folds, (PENALTIES,).

    Args:
        row: (J + 1,), weights and bias.
        inputs: of each concept, (n, J + 1).
        ids: of each concept, (n,), groups of images.
    """
    losses = torch.zeros(len(PENALTIES), dtype=torch.float64)
    n_folds = min(_N_FOLDS, *(len(own.unique()) for own in ids))
    folds = deal(ids, n_folds)
    for fold in range(n_folds):
        out = [own == fold for own in folds]
        if not all(part.any() and not part.all() for part in out):
            continue  # groups that concepts share can leave a fold without images of one
        fitted = _pose(row, [x[~part] for x, part in zip(inputs, out, strict=True)])
        judged = _pose(row, [x[part] for x, part in zip(inputs, out, strict=True)])
        start = None
        for place in reversed(range(len(PENALTIES))):  # from stiff to loose, each from the last
            start = solve(fitted, PENALTIES[place], start).masks
            losses[place] += judged.loss(start).mean()
    return losses


def _pose(row: Tensor, inputs: Sequence[Tensor]) -> Problem:
    """The problems of a channel's first concepts, from the inputs of all of them, (n, J + 1)."""
    whole = pose(row, [ConceptMoment([Rows(x)], len(x)) for x in inputs])
    some = slice(_N_CONCEPTS)
    return Problem(whole.gram, whole.linear[some], whole.prior[some], whole.constant[some])
