"""How sure a cosine is: what other images of the same classes would have made of it.

An ARV is linear in the mean pooled input of its class. So weighted means of pooled inputs, taken in
one more reading of the Scan, give every replicate of every ARV at every channel. An image's weights
depend on its place in the data set and on nothing else. Shapes: N images, T classes in any pair,
c classes in the pairs of a channel, R replicates, H halvings, G groups, J taps, I input channels
of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from unbraid.finding.arv import ClassSums, cosines_of
from unbraid.finding.findings import Pair
from unbraid.networks.relevance import input_relevance
from unbraid.scanning.records import Scan, sound_tensors

N_REPLICATES = 200  # drawn anew, they would move an end by about a tenth of half the interval
N_HALVINGS = 10
_TAILS = (0.025, 0.975)
_BYTES_AT_ONCE = 1 << 30  # of replicates in memory
_PER_IMAGE = 1 << 20  # random numbers of an image: replicates first, halvings from the middle


@dataclass(frozen=True)
class _Case:
    """The pairs of one channel."""

    channel: int
    pairs: list[Pair]
    classes: Tensor  # (c,), that occur in them, as places among the classes in any pair
    sides: Tensor  # (2, pairs), the classes of each pair, as places among the c


def with_chance(scan: Scan, sums: ClassSums, pairs: Sequence[Pair]) -> list[Pair]:
    """Give pairs of classes the interval of their cosine and the yardsticks of both classes.

    The interval is where, with 95 % confidence, the cosine lies that unlimited images would give.
    Replicates of the ARVs come from the Bayesian bootstrap: every image gets an exponential weight,
    so that no class is ever empty, and a replicate's distance from the ARV is stretched by
    sqrt((n + 1) / (n - 1)), n images, to have the variance of a mean. Noise makes ARVs longer and
    so pulls their cosine towards zero, in the replicates once more than in the ARVs; by how much
    follows from the replicates' variance. The interval lies between quantiles of the replicates'
    cosines with this pull undone, so a cosine that noise has made low can lie below its own
    interval. Where noise alone makes an ARV as long as it is, the interval is -1 to 1.

    The yardstick of a class is the cosine between the ARVs of two random halves of its images,
    mean over 10 halvings: what one and the same cause looks like in half as many images.

    Args:
        scan: of the training images.
        sums: of all its classes.
        pairs: of classes that have images.

    Returns:
        The pairs, those of a channel together; nan for classes of a single image.

    Source:
        Rubin 1981, Annals of Statistics 9, for the weights; Spearman 1904, American Journal of
        Psychology 15, for the pull of noise; docs/chance.md for why no plainer interval.
    """
    if not pairs:
        return []
    classes = torch.tensor(
        [[p.class1 for p in pairs], [p.class2 for p in pairs]], dtype=torch.int64
    ).unique()
    cases = _cases(pairs, classes)
    n_images = sums.n_images[classes]
    means = (sums.pooled[classes] / n_images[:, None, None]).to(_dtype(scan))
    intervals = _intervals(scan, cases, classes, n_images, means)
    yardsticks = _yardsticks(scan, cases, classes, n_images)
    judged = []
    for case, ends, halves in zip(cases, intervals, yardsticks, strict=True):
        figures = torch.cat([ends, halves[case.sides]]).T.tolist()  # (pairs, 4)
        for pair, row in zip(case.pairs, figures, strict=True):
            low, high, half1, half2 = (math.nan if math.isnan(value) else value for value in row)
            judged.append(replace(pair, low=low, high=high, half1=half1, half2=half2))
    return judged


def uniforms(index: Tensor, first: int, n: int) -> Tensor:
    """Random numbers of images, the same whenever and wherever they are asked for.

    Args:
        index: (N,), places in the data set.
        first: of an image's numbers, which to start at.
        n: how many.

    Returns:
        (N, n), float64, in (0, 1].

    Source:
        SplitMix64 at a counter: Steele, Lea and Flood 2014, OOPSLA; Stafford's mix 13.

    >>> uniforms(torch.tensor([7]), 0, 2).equal(uniforms(torch.tensor([3, 7]), 1, 1)[1:])
    False
    >>> uniforms(torch.tensor([7]), 0, 2)[:, 1:].equal(uniforms(torch.tensor([3, 7]), 1, 1)[1:])
    True
    """
    counter = index[:, None] * _PER_IMAGE + torch.arange(first, first + n, dtype=torch.int64)
    z = counter.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return torch.from_numpy(((z >> np.uint64(11)) + 0.5) / 2.0**53)


def _cases(pairs: Sequence[Pair], classes: Tensor) -> list[_Case]:
    by_channel: dict[int, list[Pair]] = {}
    for pair in pairs:
        by_channel.setdefault(pair.channel, []).append(pair)
    cases = []
    for channel, own in by_channel.items():
        labels = torch.tensor(
            [[pair.class1 for pair in own], [pair.class2 for pair in own]], dtype=torch.int64
        )
        chosen, sides = labels.unique(return_inverse=True)
        cases.append(_Case(channel, own, torch.searchsorted(classes, chosen), sides))
    return cases


def _intervals(
    scan: Scan, cases: Sequence[_Case], classes: Tensor, n_images: Tensor, means: Tensor
) -> Iterator[Tensor]:
    """Ends of the intervals of each case, (2, pairs)."""
    cosines = [means.new_empty(len(case.pairs), N_REPLICATES) for case in cases]
    squares = [torch.zeros(len(case.classes), dtype=torch.float64) for case in cases]
    centre = torch.zeros_like(means)
    tails = torch.tensor(_TAILS, dtype=torch.float64)
    at_once = _replicates_at_once(cases, means)
    for first in range(0, N_REPLICATES, at_once):
        n = min(at_once, N_REPLICATES - first)
        replicates = _weighted_means(scan, classes, n, partial(_exponentials, first, n))
        _stretch(replicates, means, n_images)
        centre += replicates.sum(1) / N_REPLICATES
        for case, kept, square in zip(cases, cosines, squares, strict=True):
            arvs = _arvs(scan, case, replicates)
            kept[:, first : first + n] = cosines_of(arvs)[:, case.sides[0], case.sides[1]].T
            square += arvs.square().sum((0, 2)) / (N_REPLICATES - 1)
    for case, kept, square in zip(cases, cosines, squares, strict=True):
        both = _arvs(scan, case, torch.stack([means, centre], dim=1)).double()
        length, of_centre = both.square().sum(2)
        pull = _pull(length, square - of_centre * N_REPLICATES / (N_REPLICATES - 1))
        pull[n_images[case.classes] < 2] = math.nan
        yield _undo(kept.double().quantile(tails, dim=1), pull[case.sides])


def _exponentials(first: int, n: int, _: Tensor, index: Tensor) -> Tensor:
    """Weights of images of any class, (N, n), in the replicates from `first` on."""
    return -uniforms(index, first, n).log()


def _stretch(replicates: Tensor, means: Tensor, n_images: Tensor) -> None:
    """Give replicates (T, R, G, J), in place, the variance that means (T, G, J) of images have.

    With n exponential weights it is (n - 1) / (n + 1) of that.
    """
    n = n_images.to(means.dtype)
    factor = ((n + 1) / (n - 1).clamp(min=1)).sqrt()
    centre = means[:, None].expand_as(replicates)
    torch.lerp(centre, replicates, factor[:, None, None, None], out=replicates)


def _pull(length: Tensor, noise: Tensor) -> Tensor:
    """By how much noise pulls cosines of replicates below those of vectors without noise.

    Args:
        length: (c,), squared length of the ARVs, which contains the noise once.
        noise: (c,), variance of their replicates around their mean, which contain it twice.

    Returns:
        (c,), the square of the factor; infinite where there is nothing but noise.

    >>> _pull(torch.tensor([8.0, 8.0, 0.0]), torch.tensor([2.0, 8.0, 0.0]))
    tensor([1.6667,    inf, 1.0000])
    """
    factor = torch.where(noise < length, (length + noise) / (length - noise), torch.inf)
    return torch.where(noise > 0, factor, 1.0)


def _undo(quantiles: Tensor, pull: Tensor) -> Tensor:
    """Ends of intervals (2, pairs), from quantiles (2, pairs) and both classes' pull (2, pairs)."""
    factor = pull.prod(0).sqrt()
    whole = torch.tensor([[-1.0], [1.0]], dtype=quantiles.dtype)
    return torch.where(factor.isinf(), whole, (quantiles * factor).clamp(-1, 1))


def _yardsticks(
    scan: Scan, cases: Sequence[_Case], classes: Tensor, n_images: Tensor
) -> Iterator[Tensor]:
    """Mean cosine between the ARVs of two halves of each class of each case, (c,)."""
    middles = _middles(scan, classes)

    def weigh(place: Tensor, index: Tensor) -> Tensor:
        first = _ranks(index) <= middles[place]
        return torch.cat([first, ~first], dim=1)

    means = _weighted_means(scan, classes, 2 * N_HALVINGS, weigh)
    for case in cases:
        halves = _arvs(scan, case, means).unflatten(0, (2, N_HALVINGS)).permute(1, 2, 0, 3)
        yardstick = cosines_of(halves)[..., 0, 1].double().mean(0)
        yardstick[n_images[case.classes] < 2] = math.nan
        yield yardstick


def _ranks(index: Tensor) -> Tensor:
    """Where images come in each halving, (N, H)."""
    return uniforms(index, _PER_IMAGE // 2, N_HALVINGS)


def _middles(scan: Scan, classes: Tensor) -> Tensor:
    """The last rank of the first half of each class in each halving, (T, H)."""
    label, index = (torch.cat(list(scan.columns(name))) for name in ("label", "index"))
    ranks = (_ranks(index[label == c]) for c in classes)
    return torch.stack([r.kthvalue(max(1, len(r) // 2), dim=0).values for r in ranks])


def _weighted_means(
    scan: Scan, classes: Tensor, n: int, weigh: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Read a Scan and average pooled inputs by class under n weights at once, (T, n, G, J).

    Args:
        scan: of the images.
        classes: (T,), those wanted, in order.
        n: weights per image.
        weigh: from images' classes, as places among those wanted, and places in the data set, both
            (N,), to their weights (N, n).
    """
    spec, dtype = scan.layer, _dtype(scan)
    sums = torch.zeros(len(classes), n, spec.groups * spec.n_taps, dtype=dtype)
    totals = torch.zeros(len(classes), n, dtype=dtype)
    for place, index, pooled in _images(scan, classes):
        weights = weigh(place, index).to(dtype)
        totals.index_add_(0, place, weights)
        present, counts = place.unique_consecutive(return_counts=True)
        parts = (values.split(counts.tolist()) for values in (weights, pooled))
        for k, w, s in zip(present.tolist(), *parts, strict=True):
            sums[k].addmm_(w.T, s)
    sums /= totals[..., None]
    return sums.view(*totals.shape, spec.groups, spec.n_taps)


def _images(scan: Scan, classes: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Go through the shards' images of some classes, class by class.

    Yields:
        Their classes as places among those wanted, their places in the data set, both (N,), and
        their pooled inputs (N, G * J).
    """
    for shard in range(scan.manifest.n_shards):
        own = partial(sound_tensors, scan.path, scan.manifest, shard)
        label = own(["label"])["label"]
        order = label.argsort(stable=True)
        chosen = order[torch.isin(label[order], classes)]
        if len(chosen):  # else the pooled inputs need not be read
            more = own(["index", "pooled"])
            index, pooled = more["index"][chosen], more["pooled"][chosen].flatten(1)
            yield torch.searchsorted(classes, label[chosen]), index, pooled


def _arvs(scan: Scan, case: _Case, means: Tensor) -> Tensor:
    """ARVs of a case's classes, (R, c, I), from mean pooled inputs (T, R, G, J)."""
    own = means[case.classes, :, scan.layer.group_of(case.channel)]  # (c, R, J)
    weight = scan.weight[case.channel].to(means.dtype)
    return input_relevance(weight, own, scan.layer.taps_per_input).transpose(0, 1)


def _replicates_at_once(cases: Sequence[_Case], means: Tensor) -> int:
    """How many replicates of means (T, G, J), and of one case's ARVs and cosines, fit in memory."""
    most = max(len(case.classes) for case in cases)
    each = means.numel() + most * (3 * means.shape[2] + 2 * most)
    return max(1, _BYTES_AT_ONCE // (each * means.element_size()))


def _dtype(scan: Scan) -> torch.dtype:
    """What replicates are computed in: what pooled inputs are kept in."""
    return torch.float64 if scan.weight.dtype == torch.float64 else torch.float32
