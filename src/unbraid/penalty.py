"""Choose least squares' penalty by cross-validation over images, one for the layer.

A sample of the channels, and of the images of their classes, is enough for one number; every
channel then has the steadiness of all. Shapes: n images, G groups, J taps, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unbraid.findings import Concept
from unbraid.gather import first_images, portions
from unbraid.gram import Rows
from unbraid.least_squares import Problem, augmented_row, pose, solve
from unbraid.moments import ConceptMoment, augmented_inputs
from unbraid.records import Records, Scan
from unbraid.threads import side_by_side

PENALTIES = tuple(10.0**e for e in (-2, -1.5, -1, -0.5, 0, 0.5, 1))
_DEFAULT_PENALTY = 1.0  # where there are too few images to choose one: close to the prior
_N_CHANNELS = 8
_N_CONCEPTS = 4  # of each channel, whose masks are fitted
_N_IMAGES = 200  # of each class or cluster
_N_FOLDS = 5
_BYTES_AT_ONCE = 1 << 30  # of inputs


def choose_penalty(scan: Scan, concepts: Mapping[int, Sequence[Concept]]) -> float:
    """Choose lambda, in units of the mean curvature.

    Images that the data set groups are held out together.
    """
    every = sorted(concepts)
    sampled = every[:: -(-len(every) // _N_CHANNELS)]
    needs = {o: {number for concept in concepts[o] for number in concept} for o in sampled}
    bytes_each = _N_IMAGES * scan.layer.groups * (scan.layer.n_taps + 1) * 8
    total = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for portion in portions(needs, lambda _: bytes_each, _BYTES_AT_ONCE):
        numbers = {number for channel in portion for number in needs[channel]}
        inputs = first_images(scan, numbers, _N_IMAGES, augmented_inputs)
        ids = first_images(scan, numbers, _N_IMAGES, _group_ids)

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
