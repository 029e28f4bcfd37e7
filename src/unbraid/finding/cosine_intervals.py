"""How sure a cosine is: what other images of the same classes would have made of it.

An ARV is linear in the mean pooled input, so weighted means give every replicate of every ARV.
Shapes: N images, T classes in any pair, c in those of a channel, R replicates, H halvings, G
groups, J taps, I input channels of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from unbraid.base.progress import QUIET, Advance, Progress
from unbraid.finding.arv import ClassSums, cosines_of
from unbraid.finding.pairs import Pair
from unbraid.networks.relevance import input_relevance
from unbraid.scanning.records import Scan

N_REPLICATES = 200  # drawn again, they would move an end by about a tenth of half the interval
N_HALVINGS = 10
MOST_JUDGED = 2**18  # pairs, which take a minute or so and 0.2 GiB
_TAILS = (0.025, 0.975)
_BYTES_AT_ONCE = 1 << 30  # of replicates in memory
_PER_IMAGE = 1 << 20  # random numbers of an image: replicates first, halvings from the middle


@dataclass(frozen=True)
class _Case:
    channel: int
    pairs: list[Pair]
    classes: Tensor  # (c,), that occur in them, as places among the T classes
    sides: Tensor  # (2, pairs), the classes of each pair, as places among the c


def with_chance(
    scan: Scan, sums: ClassSums, pairs: Sequence[Pair], progress: Progress = QUIET
) -> list[Pair]:
    """Give pairs of classes the interval of their cosine and the yardsticks of both classes.

    Intervals are of Bayesian bootstrap replicates (Rubin 1981), with undone what noise pulls them
    towards zero (Spearman 1904); yardsticks are cosines between halves: docs/chance.md. Of very
    many pairs those with the lowest cosines are judged; the others are given back as they are.
    """
    if not pairs:
        return []
    left: list[Pair] = []
    if len(pairs) > MOST_JUDGED:
        order = sorted(pairs, key=lambda pair: (pair.cosine, pair.channel))
        pairs, left = order[:MOST_JUDGED], order[MOST_JUDGED:]
    by_channel: dict[int, list[Pair]] = {}
    for pair in pairs:
        by_channel.setdefault(pair.channel, []).append(pair)
    classes = torch.tensor(
        sorted({c for p in pairs for c in (p.class1, p.class2)}), dtype=torch.int64
    )
    cases = []
    for channel, own in by_channel.items():
        both = torch.tensor([[p.class1 for p in own], [p.class2 for p in own]], dtype=torch.int64)
        chosen, sides = both.unique(return_inverse=True)
        cases.append(_Case(channel, own, torch.searchsorted(classes, chosen), sides))
    figures_of = _intervals(scan, sums, cases, classes, progress)
    judged = []
    for case, (ends, halves) in zip(cases, figures_of, strict=True):
        single = sums.n_images[classes[case.classes]] < 2
        halves[single] = math.nan
        ends[:, single[case.sides].any(0)] = math.nan
        figures = torch.cat([ends, halves[case.sides]]).T.tolist()  # (pairs, 4)
        for pair, row in zip(case.pairs, figures, strict=True):
            # The one nan of Python, so that pairs can be compared.
            low, high, half1, half2 = (math.nan if math.isnan(value) else value for value in row)
            judged.append(replace(pair, low=low, high=high, half1=half1, half2=half2))
    return judged + left


def uniforms(index: Tensor, first: int, n: int) -> Tensor:
    """Draw n numbers in (0, 1] per image index, (N, n), from the `first` on: SplitMix64."""
    counter = index[:, None] * _PER_IMAGE + torch.arange(first, first + n, dtype=torch.int64)
    z = counter.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return torch.from_numpy(((z >> np.uint64(11)) + 0.5) / 2.0**53)


def _intervals(
    scan: Scan,
    sums: ClassSums,
    cases: Sequence[_Case],
    classes: Tensor,
    progress: Progress,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ends of the intervals of each case, (2, pairs), and its yardsticks, (c,)."""
    n_images = sums.n_images[classes]
    means = (sums.pooled[classes] / n_images[:, None, None]).to(_dtype(scan))  # (T, G, J)
    n = n_images.to(means.dtype)
    # n exponential weights give (n - 1) / (n + 1) of the variance that a mean has.
    stretch = ((n + 1) / (n - 1).clamp(min=1)).sqrt()[:, None, None, None]
    cosines = [means.new_empty(len(case.pairs), N_REPLICATES) for case in cases]
    squares = [torch.zeros(len(case.classes), dtype=torch.float64) for case in cases]
    centre = torch.zeros_like(means)
    # Replicates of the means, and of one case's ARVs and cosines, have to fit into memory.
    most = max(len(case.classes) for case in cases)
    each = (means.numel() + most * (3 * means.shape[2] + 2 * most)) * means.element_size()
    every = torch.arange(N_REPLICATES, dtype=torch.int64)
    portions = every.split(max(1, _BYTES_AT_ONCE // each))
    halve = _halves(scan, classes)  # in the same pass as the first replicates

    def weigh(part: Tensor, place: Tensor, index: Tensor) -> Tensor:
        drawn = -uniforms(index, int(part[0]), len(part)).log()
        return drawn if part[0] else torch.cat([drawn, halve(place, index)], 1)

    halves = means  # until the first portion has them
    total = len(portions) * scan.n_by_label.total()
    with progress.of("Judging chance", total, "images") as advance:
        for part in portions:
            n_all = len(part) + (0 if part[0] else 2 * N_HALVINGS)
            drawn = _weighted_means(scan, classes, n_all, partial(weigh, part), advance)
            replicates = drawn[:, : len(part)]
            if not part[0]:
                halves = drawn[:, len(part) :].clone()
            unstretched = means[:, None].expand_as(replicates)
            torch.lerp(unstretched, replicates, stretch, out=replicates)
            centre += replicates.sum(1) / N_REPLICATES
            for case, kept, square in zip(cases, cosines, squares, strict=True):
                arvs = _arvs(scan, case, replicates)
                kept[:, part] = cosines_of(arvs)[:, case.sides[0], case.sides[1]].T
                square += arvs.square().sum((0, 2)) / (N_REPLICATES - 1)
    tails = torch.tensor(_TAILS, dtype=torch.float64)
    whole = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    for case, kept, square in zip(cases, cosines, squares, strict=True):
        both = _arvs(scan, case, torch.stack([means, centre], dim=1)).double()
        length, of_centre = both.square().sum(2)
        pull = _pull(length, square - of_centre * N_REPLICATES / (N_REPLICATES - 1))
        factor = pull[case.sides].prod(0).sqrt()
        ends = (kept.double().quantile(tails, dim=1) * factor).clamp(-1, 1)
        yield torch.where(factor.isinf(), whole, ends), _yardsticks(scan, case, halves)


def _pull(length: Tensor, noise: Tensor) -> Tensor:
    """By what factor, squared, noise pulls replicates' cosines below those without noise, (c,)."""
    factor = torch.where(noise < length, (length + noise) / (length - noise), torch.inf)
    return torch.where(noise > 0, factor, 1.0)


def _yardsticks(scan: Scan, case: _Case, means: Tensor) -> Tensor:
    """Mean cosine between the ARVs of two halves of each class of a case, (c,)."""
    halves = _arvs(scan, case, means).unflatten(0, (2, N_HALVINGS)).permute(1, 2, 0, 3)
    return cosines_of(halves)[..., 0, 1].double().mean(0)


def _halves(scan: Scan, classes: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What says of places among the classes and indices which halves they are in, (N, 2H)."""
    parts = list(scan.tensors("label", "index"))
    label, index = (torch.cat([part[name] for part in parts]) for name in ("label", "index"))
    order = label.argsort(stable=True)
    ends = torch.searchsorted(label[order], classes, right=True).tolist()
    starts = torch.searchsorted(label[order], classes).tolist()
    ranks = (_ranks(index[order[k:n]]) for k, n in zip(starts, ends, strict=True))
    # The last rank of the first half of each class in each halving, (T, H).
    middles = torch.stack([r.kthvalue(max(1, len(r) // 2), dim=0).values for r in ranks])

    def halve(place: Tensor, index: Tensor) -> Tensor:
        first = _ranks(index) <= middles[place]
        return torch.cat([first, ~first], 1)

    return halve


def _ranks(index: Tensor) -> Tensor:
    return uniforms(index, _PER_IMAGE // 2, N_HALVINGS)


def _weighted_means(
    scan: Scan,
    classes: Tensor,
    n: int,
    weigh: Callable[[Tensor, Tensor], Tensor],
    advance: Advance,
) -> Tensor:
    """Average pooled inputs by class, (T, n, G, J), under weights (N, n)."""
    spec, dtype = scan.layer, _dtype(scan)
    sums = torch.zeros(len(classes), n, spec.groups * spec.n_taps, dtype=dtype)
    totals = torch.zeros(len(classes), n, dtype=dtype)
    for shard, label in enumerate(scan.columns("label")):
        advance(len(label))
        order = label.argsort(stable=True)
        chosen = order[torch.isin(label[order], classes)]
        if not len(chosen):  # then the pooled inputs need not be read
            continue
        own = scan.some(shard, ["index", "pooled"])
        pooled = own["pooled"][chosen].flatten(1)
        place = torch.searchsorted(classes, label[chosen])
        weights = weigh(place, own["index"][chosen]).to(dtype)
        totals.index_add_(0, place, weights)
        present, counts = place.unique_consecutive(return_counts=True)
        parts = (values.split(counts.tolist()) for values in (weights, pooled))
        for k, w, s in zip(present.tolist(), *parts, strict=True):
            sums[k].addmm_(w.T, s)
    sums /= totals[..., None]
    return sums.view(*totals.shape, spec.groups, spec.n_taps)


def _arvs(scan: Scan, case: _Case, means: Tensor) -> Tensor:
    """ARVs of a case's classes, (R, c, I), from mean pooled inputs (T, R, G, J)."""
    own = means[case.classes, :, scan.layer.group_of(case.channel)]  # (c, R, J)
    weight = scan.weight[case.channel].to(means.dtype)
    return input_relevance(weight, own, scan.layer.taps_per_input).transpose(0, 1)


def _dtype(scan: Scan) -> torch.dtype:
    return torch.promote_types(scan.weight.dtype, torch.float32)
