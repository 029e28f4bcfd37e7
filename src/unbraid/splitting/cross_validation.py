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

from unbraid.base.progress import QUIET, Progress
from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members
from unbraid.splitting.least_squares import (
    Fit,
    Problem,
    Weights,
    aim,
    pose,
    shaped_by,
    solve,
)
from unbraid.splitting.material import ChannelImages, on_images
from unbraid.splitting.moments import RowPrior, augmented_row, moment
from unbraid.splitting.rectified import Shape, spreads_of
from unbraid.splitting.silence import Images, Rest

PENALTIES = (0.1, 0.3, 1.0, 3.0)
SILENCES = (20.0, 10.0, 5.0, 2.5, 1.2, 0.6)
RETENTION = 0.78  # at least, the median over concepts; fits on all images keep some .03 more
_DEFAULT_PENALTY = 1.0  # where there are too few images to choose one
_N_CHANNELS = 6
_N_CONCEPTS = 2  # of each of these channels, whose masks are fitted
_N_IMAGES = 200  # of each of their classes or clusters
_N_FOLDS = 4
_GAIN = 3e-5  # part of the objective for which another step is worth it


@dataclass(frozen=True)
class _Fold:
    """The same channel on images that it is fitted on, and on those that judge it."""

    fitted: Problem
    images: Images
    judged: Problem
    unseen: Images
    spread: Tensor | None  # for rectified responses
    share: float  # of pooled ones beside them

    def loss(self, fit: Fit) -> float:
        """The objective of the fit on unseen images, without penalty, up to a constant."""
        omega, spread = fit.weights.silence, self.spread
        shape = None if spread is None else Shape.of(self.judged.row, self.unseen, spread)
        return sum(
            aim(self.judged, self.unseen, omega, k, shape, self.share).value(mask)
            for k, mask in enumerate(fit.masks)
        ) / len(fit.masks)

    def retention(self, fit: Fit) -> Tensor:
        """What each concept channel keeps of the whole on its own unseen images, (K,)."""
        figures = []
        for k, mask in enumerate(fit.masks):
            own = self.unseen.inputs[self.unseen.concept == k].mean(0) * self.judged.row
            figures.append((own[:-1] @ mask + own[-1]) / own.sum())
        return torch.stack(figures)


@dataclass(frozen=True)
class _Trial:
    """Fits of one channel, of every fold by every penalty, all at the largest silence."""

    folds: list[_Fold]
    prior: Tensor
    fits: list[list[Fit]]  # by fold and penalty
    losses: Tensor  # (folds, PENALTIES)

    def again(self, weights: Weights, place: int) -> list[Fit]:
        """The fits of all folds with other weights, from those of a penalty."""
        return [
            solve(
                fold.fitted,
                fold.images,
                weights,
                self.prior,
                fits[place].masks,
                fold.spread,
                _GAIN,
            )
            for fold, fits in zip(self.folds, self.fits, strict=True)
        ]

    def retention(self, fits: Sequence[Fit]) -> Tensor:
        """What concept channels keep on unseen images, the mean over folds, (K,)."""
        kept = [fold.retention(fit) for fold, fit in zip(self.folds, fits, strict=True)]
        return torch.stack(kept).mean(0)


def choose_weights(
    members: Members,
    concepts: Mapping[int, Sequence[Concept]],
    rest: tuple[Members, Rest],
    progress: Progress = QUIET,
) -> Weights:
    """Choose lambda and omega for the layer, on sampled channels."""
    every = sorted(concepts)
    sampled = {o: concepts[o] for o in every[:: -(-len(every) // _N_CHANNELS)]}
    prior = RowPrior(members.scan)
    spreads = spreads_of(rest[0].scan)

    def attempt(own: ChannelImages, channel: int) -> _Trial:
        row, q = augmented_row(members.scan, channel), prior.matrix(channel)
        spread = spreads[members.scan.layer.group_of(channel)]
        return _try(row, own, q, spread)

    title = "Choosing the penalty"
    done = on_images(members, sampled, rest, _N_IMAGES, attempt, title, progress).values()
    trials = [trial for trial in done if trial.folds]
    if not trials:
        return Weights(_DEFAULT_PENALTY, SILENCES[0])
    place = stiffest(torch.cat([trial.losses for trial in trials]))
    with progress.of("Choosing silence", len(SILENCES) * len(trials), "fits") as advance:
        for silence in SILENCES:
            weights = Weights(PENALTIES[place], silence)
            kept = []
            for trial in trials:
                fits = [own[place] for own in trial.fits]
                kept.append(
                    trial.retention(fits if silence == SILENCES[0] else trial.again(weights, place))
                )
                advance(1)
            if float(torch.cat(kept).nan_to_num(0).quantile(0.5)) >= RETENTION:
                break
    return weights


def stiffest(losses: Tensor) -> int:
    """The last column of losses (N, C) that is the best but for one standard error.

    Source:
        The one-standard-error rule of Breiman, Friedman, Olshen and Stone 1984, on paired losses.

    >>> stiffest(torch.tensor([[1.0, 0.9, 1.1, 2.0], [1.0, 0.9, 0.8, 2.1]]))
    2
    """
    worse = losses - losses[:, losses.mean(0).argmin(), None]
    error = worse.std(0, correction=0) / max(1, len(losses) - 1) ** 0.5
    return int((worse.mean(0) <= error).nonzero().max())


def _try(row: Tensor, own: ChannelImages, prior: Tensor, spread: Tensor | None) -> _Trial:
    """Fit a channel on parts of its images, and judge by the others."""
    folds = _folds(row, own.images, own.part, spread)
    fits = []
    for fold in folds:
        start = None
        found: list[Fit] = []
        for penalty in reversed(PENALTIES):  # from stiff to loose, each from the last
            weights = Weights(penalty, SILENCES[0])
            fit = solve(fold.fitted, fold.images, weights, prior, start, spread, _GAIN)
            start = fit.masks
            found.insert(0, fit)
        fits.append(found)
    losses = [[fold.loss(fit) for fit in own] for fold, own in zip(folds, fits, strict=True)]
    return _Trial(folds, prior, fits, torch.tensor(losses, dtype=torch.float64))


def _folds(row: Tensor, images: Images, part_of: float, spread: Tensor | None) -> list[_Fold]:
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
                        part_of,
                    )
                )
                for part, shrink in zip(parts, (True, False), strict=True)
            ]
            fitted, judged = problems
            judged = replace(judged, shrinkage=fitted.shrinkage)
            shaped = shaped_by(fitted, spread)
            folds.append(_Fold(fitted, parts[0], judged, parts[1], *shaped))
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
