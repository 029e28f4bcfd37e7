"""Choose how much penalty and silence count, on images held out.

The penalty is the one with the smallest objective there. Silence counts as much as it can while
concept channels stay true to their own images. Shapes: n images, J taps, K concepts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members
from unbraid.splitting.least_squares import (
    ChannelImages,
    Fit,
    Problem,
    Weights,
    on_images,
    pose,
    solve,
)
from unbraid.splitting.moments import RowPrior, augmented_row, moment
from unbraid.splitting.silence import Images, Rest

PENALTIES = (0.1, 0.3, 1.0, 3.0)
SILENCES = (6.25, 3.1, 1.6, 0.8)
RETENTION = 0.78  # at least, the median over concepts; fits on all images keep some .03 more
_DEFAULT_PENALTY = 1.0  # where there are too few images to choose one
_N_CHANNELS = 6
_N_CONCEPTS = 2  # of each of these channels, whose masks are fitted
_N_IMAGES = 200  # of each of their classes or clusters
_N_FOLDS = 4
_GAIN = 1e-3  # part of the objective for which another step is worth it


@dataclass(frozen=True)
class _Fold:
    """The same channel on images that it is fitted on, and on those that judge it."""

    fitted: Problem
    images: Images
    judged: Problem
    unseen: Images

    def loss(self, fit: Fit) -> float:
        """The objective on unseen images, without penalty."""
        n_concepts = len(fit.masks)
        total = float(self.judged.loss(fit.masks).sum())
        for k, mask in enumerate(fit.masks):
            beyond = self.judged.beyond(self.unseen, fit.weights.silence, k)
            total += float(beyond.errors(mask).square().sum())
        return total / n_concepts

    def retention(self, fit: Fit) -> Tensor:
        """What each concept channel keeps of the whole on its own unseen images, (K,)."""
        figures = []
        for k, mask in enumerate(fit.masks):
            own = self.unseen.inputs[self.unseen.concept == k].mean(0) * self.judged.row
            figures.append((own[:-1] @ mask + own[-1]) / own.sum())
        return torch.stack(figures)


def choose_weights(
    members: Members, concepts: Mapping[int, Sequence[Concept]], rest: tuple[Members, Rest]
) -> Weights:
    """Choose lambda and omega for the layer, on sampled channels."""
    every = sorted(concepts)
    sampled = {o: concepts[o] for o in every[:: -(-len(every) // _N_CHANNELS)]}
    prior = RowPrior(members.scan)

    def judge(material: Mapping[int, ChannelImages], channel: int) -> tuple[Tensor, list[Tensor]]:
        row, q = augmented_row(members.scan, channel), prior.matrix(channel)
        return _judge(row, material[channel], q)

    found = on_images(members, sampled, rest, _N_IMAGES, judge).values()
    losses = torch.stack([loss for loss, _ in found]).sum(0)  # (PENALTIES,)
    penalty = PENALTIES[int(losses.argmin())] if losses.any() else _DEFAULT_PENALTY
    kept = [torch.stack(own) for _, own in found if own]  # (SILENCES, K) each
    if not kept:
        return Weights(penalty, SILENCES[0])
    medians = torch.cat(kept, 1).nan_to_num(0).quantile(0.5, 1).tolist()
    enough = [omega for omega, own in zip(SILENCES, medians, strict=True) if own >= RETENTION]
    return Weights(penalty, max(enough, default=SILENCES[-1]))


def _judge(row: Tensor, own: ChannelImages, prior: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Losses by penalty, (PENALTIES,), and retention of concept channels by silence, (K,) each."""
    losses = torch.zeros(len(PENALTIES), dtype=torch.float64)
    kept: list[list[Tensor]] = [[] for _ in SILENCES]
    folds = _folds(row, own.images, own.part)
    fits: dict[int, list[Fit]] = {}
    for fold in folds:
        start = None
        for place in reversed(range(len(PENALTIES))):  # from stiff to loose, each from the last
            weights = Weights(PENALTIES[place], SILENCES[0])
            fit = solve(fold.fitted, fold.images, weights, prior, start, gain=_GAIN)
            start = fit.masks
            losses[place] += fold.loss(fit)
            fits.setdefault(place, []).append(fit)
    if not folds:
        return losses, []
    best = int(losses.argmin())
    for fold, fit in zip(folds, fits[best], strict=True):
        for place, silence in enumerate(SILENCES):
            if place:
                weights = Weights(PENALTIES[best], silence)
                fit = solve(fold.fitted, fold.images, weights, prior, fit.masks, gain=_GAIN)
            kept[place].append(fold.retention(fit))
    return losses, [torch.stack(folds).mean(0) for folds in kept]


def _folds(row: Tensor, images: Images, share: float) -> list[_Fold]:
    """Part the images of a channel several times in those to fit and those to judge."""
    n_concepts = int(images.concept.max()) + 1
    by_concept = [(images.concept == k).nonzero()[:, 0] for k in (*range(n_concepts), -1)]
    ids = [images.group[own] for own in by_concept]
    n_folds = min(_N_FOLDS, *(len(own.unique()) for own in ids[:-1]))
    fold_of = torch.zeros_like(images.concept)
    for own, dealt in zip(by_concept, deal(ids, n_folds), strict=True):
        fold_of[own] = dealt
    folds = []
    for n in range(n_folds):
        parts = [images.of(fold_of != n), images.of(fold_of == n)]
        if all(len(part.concept[part.concept >= 0].unique()) == n_concepts for part in parts):
            # Groups that concepts share can leave a fold without images of one.
            problems = [
                _first(
                    pose(
                        row,
                        [moment(part.inputs[part.concept == k], shrink) for k in range(n_concepts)],
                        share,
                    )
                )
                for part, shrink in zip(parts, (True, False), strict=True)
            ]
            folds.append(_Fold(problems[0], parts[0], problems[1], parts[1]))
    return folds


def _first(problem: Problem) -> Problem:
    """The problems of a channel's first concepts."""
    some = {name: getattr(problem, name)[:_N_CONCEPTS] for name in ("linear", "constant")}
    return replace(problem, **some)


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
