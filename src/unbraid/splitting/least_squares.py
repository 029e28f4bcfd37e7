"""Divide a channel's weights among its concepts by box-constrained least squares.

The objective ("Split" in docs/method.md) asks of a scan only second moments of pooled inputs.
Whatever else is asked joins it as a `Term`. Shapes: N images, G groups, J taps, K concepts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members
from unbraid.scanning.records import Records, Scan, no_records
from unbraid.splitting.box_solver import MOST_ROWS, Gram, Rows, Whole, add, kkt_residual, solve_box

Need = TypeVar("Need")
Material = TypeVar("Material")
Answer = TypeVar("Answer")
Key = tuple[int, int]  # group of the layer, class or cluster

PENALTIES = tuple(10.0**e for e in (-2, -1.5, -1, -0.5, 0, 0.5, 1))
_DEFAULT_PENALTY = 1.0  # where there are too few images to choose one: close to the prior
_N_CHANNELS = 8  # for choosing the penalty
_N_CONCEPTS = 4  # of each of these channels, whose masks are fitted
_N_IMAGES = 200  # of each of their classes or clusters
_N_FOLDS = 5
BACKGROUND_WEIGHT = 0.1  # beside 1 for each concept; docs/splitting.md tells what others gave
_N_BACKGROUND_IMAGES = 400  # of the whole scan, spread evenly
_BYTES_AT_ONCE = 3 << 30  # of moments; all classes of ImageNet fit in at 512 inputs
_ROWS_AT_ONCE = 64  # images of a class whose outer products are added up together


def by_portion(
    needs: Mapping[int, set[Need]],
    n_bytes: Callable[[Need], int],
    read: Callable[[set[Need]], Material],
    work: Callable[[Material, int], Answer],
    at_once: int = 1 << 30,
) -> dict[int, Answer]:
    """Do the work of all channels side by side, as many at a time as memory holds the needs of."""
    portions: list[tuple[list[int], set[Need]]] = []
    for channel, own in needs.items():
        if not portions or sum(map(n_bytes, portions[-1][1] | own)) > at_once:
            portions.append(([], set()))
        portions[-1][0].append(channel)
        portions[-1][1].update(own)
    answers: dict[int, Answer] = {}
    n_threads = torch.get_num_threads()
    for channels, wanted in portions:
        material = read(wanted)
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(n_threads, "", torch.set_num_threads, (1,)) as pool:
                done = pool.map(partial(work, material), channels)
                answers.update(zip(channels, done, strict=True))
        finally:
            torch.set_num_threads(n_threads)
    return answers


def numbers_of(concepts: Mapping[int, Sequence[Concept]]) -> dict[int, set[int]]:
    """The classes and clusters of each channel's concepts."""
    return {o: {number for concept in own for number in concept} for o, own in concepts.items()}


@dataclass(frozen=True)
class Moment:
    """The mean outer product, (J + 1, J + 1), of augmented pooled inputs over some images."""

    parts: Sequence[Gram]  # sums
    n_images: int

    def times(self, x: Tensor) -> Tensor:
        """Multiply vectors, (..., J + 1), by the mean."""
        return torch.stack([part.times(x) for part in self.parts]).sum(0) / self.n_images


def augment(pooled: Tensor, n_positions: Tensor) -> Tensor:
    """Put the number of positions behind the inputs: (N, ..., J) to (N, ..., J + 1), float64."""
    positions = n_positions.double().reshape(-1, *[1] * (pooled.dim() - 1))
    return torch.cat([pooled.double(), positions.expand(*pooled.shape[:-1], 1)], -1)


def augmented_row(scan: Scan, channel: int) -> Tensor:
    """Put a channel's bias behind its weights: (J + 1,), float64."""
    return torch.cat([scan.weight[channel], scan.bias[channel, None]]).double()


def second_moments(members: Members, keys: Iterable[Key], whole: set[Key]) -> dict[Key, Gram]:
    """Sum outer products of augmented pooled inputs, as matrices for keys in `whole`."""
    size = members.scan.layer.n_taps + 1
    groups_of: dict[int, list[int]] = {}
    for group, number in sorted(keys):
        groups_of.setdefault(number, []).append(group)
    inputs: dict[Key, list[Tensor]] = {key: [] for key in keys}
    sums = {key: torch.zeros(size, size, dtype=torch.float64) for key in keys if key in whole}

    def add_up(key: Key, at_least: int) -> None:
        if sum(map(len, inputs[key])) >= at_least:
            rows = torch.cat(inputs[key])
            sums[key].addmm_(rows.T, rows)
            inputs[key].clear()

    for records in members.scan.shards():
        for number, places in members.places(records, groups_of):
            for key in ((group, number) for group in groups_of[number]):
                pooled = records.pooled[places, key[0]]
                inputs[key].append(augment(pooled, records.n_positions[places]))
                # To add a few rows takes as long as many, since the whole matrix is read for them.
                if key in sums:
                    add_up(key, _ROWS_AT_ONCE)
    for key in sums:
        add_up(key, 1)
    return {key: Whole(sums[key]) if key in sums else Rows(torch.cat(inputs[key])) for key in keys}


@dataclass(frozen=True)
class Term:
    """A squared error up to a constant: |rows m|^2 - 2 linear.m, for every mask m of a channel."""

    rows: Tensor  # (N, J)
    linear: Tensor  # (J,)


@dataclass(frozen=True)
class Problem:
    """The quadratic problems of one channel: K objectives that share their curvature."""

    gram: Gram  # (J, J), without penalty
    linear: Tensor  # (K, J), without penalty
    prior: Tensor  # (K, J)
    constant: Tensor  # (K,)

    def plus(self, term: Term) -> Problem:
        """Ask for something more, of every mask alike; losses leave its constant out."""
        gram = add([self.gram, Rows(term.rows)], [1, 1])
        return replace(self, gram=gram, linear=self.linear + term.linear)

    def loss(self, masks: Tensor) -> Tensor:
        """Squared mimic and silence errors, without penalty, (K,)."""
        return (masks * (self.gram.times(masks) - 2 * self.linear)).sum(1) + self.constant


@dataclass(frozen=True)
class Fit:
    """Masks of one channel, and how they were found."""

    masks: Tensor  # (K, J), float64
    prior: Tensor  # (K, J)
    penalty: float  # lambda, in units of the mean curvature
    kkt_residual: float


def pose(row: Tensor, moments: Sequence[Moment]) -> Problem:
    """Write down the problems of one channel, from its weights and bias, (J + 1,)."""
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
    everywhere, rest = pull.sum(0), by_bias[:, bias] * inverse
    one = torch.zeros_like(row)
    one[bias] = 1  # times the number of positions: proportional to the ARVs, and to their squares
    means = torch.stack([m.times(one) for m in moments])
    strength = (means[:, taps] * row[taps] / means[:, bias, None]).abs()
    parts = [part for moment in moments for part in moment.parts]
    shares = [float(i) / m.n_images for m, i in zip(moments, inverse, strict=True) for _ in m.parts]
    return Problem(
        gram=add(parts, shares).weighted(row[taps]),
        linear=own - (everywhere - pull),
        prior=strength / strength.sum(0).clamp(min=tiny),
        constant=own.sum(1) + rest.sum() - rest,
    )


def solve(problem: Problem, penalty: float, start: Tensor | None = None) -> Fit:
    """Solve the problems of one channel, from the prior or a nearby answer."""
    ridge = penalty * float(problem.gram.diagonal.mean())
    ridge = max(ridge, torch.finfo(torch.float64).tiny)  # a channel that never responds
    linear = problem.linear + ridge * problem.prior
    begin = problem.prior if start is None else start.to(problem.prior)
    masks = solve_box(problem.gram, ridge, linear, begin)
    residual = kkt_residual(problem.gram, ridge, linear, masks).max()
    return Fit(masks, problem.prior, penalty, float(residual))


def sample_images(scan: Scan) -> Records:
    """Take records of some images, spread evenly over the scan, without shares and input maps."""
    sizes = [len(labels) for labels in scan.columns("label")]
    step = max(1, sum(sizes) // _N_BACKGROUND_IMAGES)
    parts, start = [], 0
    for tensors in scan.tensors("index", "label", "prediction", "n_positions", "pooled"):
        parts.append({name: tensor[-start % step :: step] for name, tensor in tensors.items()})
        start += len(tensors["label"])
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    no_share = torch.zeros(len(joined["label"]) + 1, dtype=torch.int64)
    return replace(no_records(scan.layer, False), share_start=no_share, **joined)


def background_term(
    members: Members, sample: Records, channel: int, concepts: Sequence[Concept]
) -> Term | None:
    """Ask that in images of no concept every mask responds with an even share."""
    outside = members.concept_of(sample, concepts) < 0
    pooled = sample.pooled[outside, members.scan.layer.group_of(channel)]
    inputs = augment(pooled, sample.n_positions[outside])  # (N, J + 1)
    row = augmented_row(members.scan, channel)
    responses = inputs @ row
    if not responses.any():
        return None
    weight = BACKGROUND_WEIGHT / responses.square().sum()
    wanted = responses / len(concepts) - inputs[:, -1] * row[-1]  # no mask can change the bias
    reach = inputs[:, :-1] * row[:-1]
    return Term(weight.sqrt() * reach, weight * (wanted @ reach))


def fit_least_squares(
    members: Members,
    concepts: Mapping[int, Sequence[Concept]],
    penalty: float,
    sample: Records,
    start: Mapping[int, Tensor] | None = None,
) -> dict[int, Fit]:
    """Fit the masks of all channels, for lambda in units of a problem's mean curvature."""
    scan, layer = members.scan, members.scan.layer
    numbers = numbers_of(concepts)
    counts = members.count({number for own in numbers.values() for number in own})
    needs = {o: {(layer.group_of(o), number) for number in own} for o, own in numbers.items()}
    whole: set[Key] = set()  # moments; of a class in small concepts alone inputs are quicker
    for channel, own in numbers.items():
        if sum(counts[number] for number in own) * MOST_ROWS > layer.n_taps:
            whole |= needs[channel]

    def n_bytes(key: Key) -> int:
        n_columns = layer.n_taps + 1
        return 8 * n_columns * (n_columns if key in whole else counts[key[1]])

    def fit(sums: dict[Key, Gram], channel: int) -> Fit:
        group = layer.group_of(channel)
        moments = [
            Moment([sums[group, n] for n in concept], sum(counts[n] for n in concept))
            for concept in concepts[channel]
        ]
        problem = pose(augmented_row(scan, channel), moments)
        term = background_term(members, sample, channel, concepts[channel])
        problem = problem.plus(term) if term else problem
        return solve(problem, penalty, (start or {}).get(channel))

    read = partial(second_moments, members, whole=whole)
    return by_portion(needs, n_bytes, read, fit, _BYTES_AT_ONCE)


def choose_penalty(members: Members, concepts: Mapping[int, Sequence[Concept]]) -> float:
    """Choose lambda for the layer, in units of the mean curvature, on sampled channels."""
    scan, every = members.scan, sorted(concepts)
    sampled = every[:: -(-len(every) // _N_CHANNELS)]
    needs = numbers_of({o: concepts[o] for o in sampled})
    bytes_each = _N_IMAGES * scan.layer.groups * (scan.layer.n_taps + 1) * 8

    def read(numbers: set[int]) -> dict[int, dict[str, Tensor]]:
        return members.first(numbers, _N_IMAGES, ("index", "group", "pooled", "n_positions"))

    def losses(columns: dict[int, dict[str, Tensor]], channel: int) -> Tensor:
        inputs, ids = [], []
        for concept in concepts[channel]:
            own = [columns[number] for number in concept]
            pooled = torch.cat([part["pooled"][:, scan.layer.group_of(channel)] for part in own])
            inputs.append(augment(pooled, torch.cat([part["n_positions"] for part in own])))
            # Where the data set knows of no groups, each image is one of its own.
            ids.append(torch.cat([part.get("group", part["index"]) for part in own]))
        return _held_out_losses(augmented_row(scan, channel), inputs, ids)

    by_channel = by_portion(needs, lambda _: bytes_each, read, losses)
    total = torch.stack(list(by_channel.values())).sum(0)
    return PENALTIES[int(total.argmin())] if total.any() else _DEFAULT_PENALTY


def _held_out_losses(row: Tensor, inputs: Sequence[Tensor], ids: Sequence[Tensor]) -> Tensor:
    """Losses of one channel on images held out, (PENALTIES,), from inputs (n, J + 1)."""
    losses = torch.zeros(len(PENALTIES), dtype=torch.float64)
    n_folds = min(_N_FOLDS, *(len(own.unique()) for own in ids))
    folds = deal(ids, n_folds)
    for fold in range(n_folds):
        out = [own == fold for own in folds]
        if not all(part.any() and not part.all() for part in out):
            continue  # groups that concepts share can leave a fold without images of one
        fitted = _pose_first(row, [x[~part] for x, part in zip(inputs, out, strict=True)])
        judged = _pose_first(row, [x[part] for x, part in zip(inputs, out, strict=True)])
        start = None
        for place in reversed(range(len(PENALTIES))):  # from stiff to loose, each from the last
            start = solve(fitted, PENALTIES[place], start).masks
            losses[place] += judged.loss(start).mean()
    return losses


def _pose_first(row: Tensor, inputs: Sequence[Tensor]) -> Problem:
    """The problems of a channel's first concepts, from the inputs of all of them, (n, J + 1)."""
    whole = pose(row, [Moment([Rows(x)], len(x)) for x in inputs])
    some = {name: getattr(whole, name)[:_N_CONCEPTS] for name in ("linear", "prior", "constant")}
    return replace(whole, **some)


def deal(ids: Sequence[Tensor], n_folds: int) -> list[Tensor]:
    """Deal images to folds, concept by concept, no group (n,) to two: the fold of each, (n,).

    >>> deal([torch.tensor([5, 5, 6, 7]), torch.tensor([6, 8])], 2)
    [tensor([0, 0, 1, 1]), tensor([1, 0])]
    """
    fold_of: dict[int, int] = {}
    dealt = []
    for own in ids:
        sizes = Counter(own.tolist())
        filled = [0] * n_folds
        for group in sizes.keys() & fold_of.keys():
            filled[fold_of[group]] += sizes[group]
        for group in sizes:
            if group not in fold_of:
                fold_of[group] = filled.index(min(filled))
                filled[fold_of[group]] += sizes[group]
        dealt.append(torch.tensor([fold_of[group] for group in own.tolist()], dtype=torch.int64))
    return dealt
