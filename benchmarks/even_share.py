"""The first version of least squares, kept to be compared with.

Images of no concept were to be shared evenly among the concept channels, moments were not shrunk,
and masks were then refined on rectified responses. Shapes: N images, J taps, K concepts, P
positions. Everything is float64 but input maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.finding.findings import Findings
from unbraid.networks.spec import tap_inputs
from unbraid.scanning.records import Scan
from unbraid.splitting.box_solver import solve_box

_PENALTIES = tuple(10.0**e for e in (-2, -1.5, -1, -0.5, 0, 0.5, 1))
_BACKGROUND, _POOLED = 0.1, 0.3  # weights of the even share, and of pooled responses in refining
_N_BACKGROUND, _N_REFINED, _N_CHOOSING = 400, 100, 200  # images: in all, of a concept, of a class
_N_CHANNELS, _N_CONCEPTS, _N_FOLDS = 8, 4, 5  # for choosing the penalty
_N_STEPS, _SMALLEST_STEP, _N_HALVINGS = 12, 1e-3, 10


@dataclass(frozen=True)
class _Records:
    """Columns of a scan: images in order."""

    label: Tensor  # (N,)
    pooled: Tensor  # (N, J)
    n_positions: Tensor  # (N,)
    maps: Tensor  # (N, J, P), what taps meet

    def take(self, chosen: Tensor) -> _Records:
        return _Records(*(column[chosen] for column in vars(self).values()))


@dataclass(frozen=True)
class _Problem:
    """K quadratic problems of one curvature: m.gram.m - 2 linear.m, pulled to the prior."""

    gram: Tensor  # (J, J)
    linear: Tensor  # (K, J)
    prior: Tensor  # (K, J)
    constant: Tensor  # (K,)

    def solve(self, penalty: float, start: Tensor | None = None) -> Tensor:
        ridge = penalty * float(self.gram.diagonal().mean())
        begin = self.prior if start is None else start
        wanted = self.linear + ridge * self.prior
        solved = [solve_box(self.gram, ridge, *own) for own in zip(wanted, begin, strict=True)]
        return torch.stack(solved)

    def first(self, n: int) -> _Problem:
        return _Problem(self.gram, self.linear[:n], self.prior[:n], self.constant[:n])

    def loss(self, masks: Tensor) -> Tensor:
        return (masks * (masks @ self.gram - 2 * self.linear)).sum(1) + self.constant


def fit_even_share(
    scan: Scan, found: Findings, penalty: float | None = None
) -> tuple[dict[int, Tensor], float]:
    """Masks (K, J) of every channel, and the penalty, which by default is chosen.

    The scan is one with positions, of a layer without groups.
    """
    assert scan.layer.groups == 1
    records = _read(scan)
    sample = records.take(
        torch.arange(0, len(records.label), max(1, len(records.label) // _N_BACKGROUND))
    )
    if penalty is None:
        penalty = _choose_penalty(scan, found, records)
    masks = {}
    for channel, concepts in found.concepts.items():
        row, bias = scan.weight[channel].double(), float(scan.bias[channel])
        own = [records.take(torch.isin(records.label, torch.tensor(c))) for c in concepts]
        outside = sample.take(~torch.isin(sample.label, torch.tensor(sum(concepts, ()))))
        problem = _pose(row, bias, own)
        gram, linear = _even_share(row, bias, outside, len(concepts))
        start = _Problem(
            problem.gram + gram, problem.linear + linear, problem.prior, problem.constant
        ).solve(penalty)
        few = [_first(part, _N_REFINED // len(c)) for part, c in zip(own, concepts, strict=True)]
        masks[channel] = _refine(row, bias, few, problem.prior, penalty, (gram, linear), start)
    return masks, penalty


def _read(scan: Scan) -> _Records:
    parts = [r for r in scan.shards() if len(r)]
    maps = [tap_inputs(scan.layer, r.input_map, 0) for r in parts if r.input_map is not None]
    return _Records(
        torch.cat([r.label for r in parts]),
        torch.cat([r.pooled[:, 0] for r in parts]).double(),
        torch.cat([r.n_positions for r in parts]).double(),
        torch.cat(maps),
    )


def _first(records: _Records, n_each: int) -> _Records:
    """The first images of each class."""
    chosen = [(records.label == c).nonzero()[: max(1, n_each), 0] for c in records.label.unique()]
    return records.take(torch.cat(chosen))


def _pose(row: Tensor, bias: float, own: Sequence[_Records]) -> _Problem:
    gram = torch.zeros(len(row), len(row), dtype=torch.float64)
    mimic, pulls, strength, rest = [], [], [], []
    for records in own:
        reach, held = records.pooled * row, records.n_positions * bias
        weight = 1 / (reach.sum(1) + held).square().sum().clamp(min=1e-300)
        gram += weight * reach.T @ reach
        mimic.append(weight * reach.sum(1) @ reach)
        pulls.append(weight * held @ reach)
        rest.append(weight * held.square().sum())
        strength.append((records.n_positions @ reach / records.n_positions.square().mean()).abs())
    pull, share = (
        torch.stack(pulls),
        torch.stack(strength) / torch.tensor([[len(r.label)] for r in own]),
    )
    everywhere, constant = pull.sum(0), torch.stack(rest)
    linear = torch.stack(mimic)
    return _Problem(
        gram,
        linear - (everywhere - pull),
        share / share.sum(0).clamp(min=1e-300),
        linear.sum(1) + constant.sum() - constant,
    )


def _even_share(row: Tensor, bias: float, outside: _Records, n: int) -> tuple[Tensor, Tensor]:
    reach, held = outside.pooled * row, outside.n_positions * bias
    responses = reach.sum(1) + held
    weight = _BACKGROUND / responses.square().sum().clamp(min=1e-300)
    return weight * reach.T @ reach, weight * (responses / n - held) @ reach


def _choose_penalty(scan: Scan, found: Findings, records: _Records) -> float:
    """The penalty with the least error on images held out, in folds of each concept."""
    total = torch.zeros(len(_PENALTIES), dtype=torch.float64)
    every = sorted(found.concepts)
    for channel in every[:: -(-len(every) // _N_CHANNELS)]:
        row, bias = scan.weight[channel].double(), float(scan.bias[channel])
        own = []
        for concept in found.concepts[channel]:
            parts = [_first(records.take(records.label == c), _N_CHOOSING) for c in concept]
            columns = zip(*(vars(part).values() for part in parts), strict=True)
            own.append(_Records(*map(torch.cat, columns)))
        n_folds = min(_N_FOLDS, *(len(part.label) for part in own))
        for fold in range(n_folds):
            out = [torch.arange(len(part.label)) % n_folds == fold for part in own]
            fitted = _pose(row, bias, [r.take(~o) for r, o in zip(own, out, strict=True)])
            judged = _pose(row, bias, [r.take(o) for r, o in zip(own, out, strict=True)])
            fitted, judged, start = fitted.first(_N_CONCEPTS), judged.first(_N_CONCEPTS), None
            for n, penalty in reversed(list(enumerate(_PENALTIES))):  # from a stiffer one's answer
                start = fitted.solve(penalty, start)
                total[n] += judged.loss(start).mean()
    return _PENALTIES[int(total.argmin())]


def _refine(
    row: Tensor,
    bias: float,
    own: Sequence[_Records],
    prior: Tensor,
    penalty: float,
    even: tuple[Tensor, Tensor],
    masks: Tensor,
) -> Tensor:
    """Fit rectified responses too, by Gauss-Newton with a line search."""
    taps = torch.cat([records.maps for records in own]) * row.float()[:, None]
    concept = torch.cat([torch.full_like(r.label, k) for k, r in enumerate(own)])
    pooled, n_positions = taps.sum(2, dtype=torch.float64), taps.shape[2]

    def rectified(masks: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.einsum("njp,kj->knp", taps, masks.float()) + bias
        return z.clamp(min=0).sum(2, dtype=torch.float64), z > 0

    def relative(response: Tensor) -> Tensor:
        power = torch.zeros(len(own), dtype=torch.float64).index_add(0, concept, response.square())
        return 1 / power.clamp(min=1e-38)[concept]

    original = rectified(torch.ones(1, len(row), dtype=torch.float64))[0][0]
    whole = pooled.sum(1) + bias * n_positions
    mine = torch.arange(len(own))[:, None] == concept
    weight, pooled_weight = relative(original), _POOLED * relative(whole)
    ridge = penalty * float((weight + pooled_weight) @ pooled.square().mean(1))
    gram = (pooled * pooled_weight[:, None]).T @ pooled + _POOLED * even[0]
    linear = (pooled_weight * (mine * whole - bias * n_positions)) @ pooled + _POOLED * even[1]

    def values(masks: Tensor) -> Tensor:
        errors = (weight * (rectified(masks)[0] - mine * original) ** 2).sum(1)
        penalties = ridge * (masks - prior) ** 2
        return errors + (masks * (masks @ gram - 2 * linear) + penalties).sum(1)

    for _ in range(_N_STEPS):
        before, positive = values(masks), rectified(masks)[1]
        step = torch.zeros_like(masks)
        for k, mask in enumerate(masks):
            active = torch.einsum("njp,np->nj", taps, positive[k].float()).double()
            wanted = mine[k] * original - bias * positive[k].sum(1)
            held = (active * weight[:, None]).T @ active + gram
            pull = (weight * wanted) @ active + linear[k] + ridge * prior[k]
            step[k] = solve_box(held, ridge, pull, mask) - mask
        for _ in range(_N_HALVINGS):
            worse = ~(values(masks + step) < before)
            if not worse.any():
                break
            step = torch.where(worse[:, None], step / 2, step)
        step = step.masked_fill(worse[:, None], 0)
        masks = masks + step
        if float(step.abs().max()) < _SMALLEST_STEP:
            break
    return masks
