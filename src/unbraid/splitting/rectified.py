"""Refine masks on rectified responses with positions, which pooled inputs hide.

With the positions held where z_k is positive, the problem is again box-constrained least squares,
solved and repeated (Gauss-Newton) while it gets better. The pooled objective stays in with a
smaller weight. Shapes: N images, J taps, K concepts, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members
from unbraid.networks.spec import tap_inputs, widen
from unbraid.scanning.records import Records, Scan
from unbraid.splitting.box_solver import Gram, Rows, add, solve_box
from unbraid.splitting.least_squares import Fit, Term, background_term, by_portion, numbers_of

POOLED_WEIGHT = 0.3  # docs/splitting.md tells what other weights gave
N_IMAGES = 100  # of each concept, spread over its classes
_MAX_STEPS = 12
_SMALLEST_STEP = 1e-3  # of a mask
_HALVINGS = 10


@dataclass(frozen=True)
class Images:
    """What a channel's taps contribute in images of its concepts."""

    taps: Tensor  # (N, J, P), input times weight
    bias: float
    concept: Tensor  # (N,)

    def rectified(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Responses of masked channels, (K, N), and where they are positive, (K, N, P)."""
        z = torch.einsum("njp,kj->knp", self.taps, masks.to(self.taps)) + self.bias
        return z.clamp(min=0).sum(2, dtype=torch.float64), z > 0


@dataclass(frozen=True)
class Objective:
    """What the masks of a channel should minimise; weights make errors relative to the original."""

    images: Images
    target: Tensor  # (K, N), the responses wanted: the original's on own images, else none
    weight: Tensor  # (N,)
    pooled: Gram  # (J, J), weighted second moments of the taps summed over positions
    pooled_linear: Tensor  # (K, J)
    prior: Tensor  # (K, J)
    ridge: float

    def values(self, masks: Tensor) -> Tensor:
        """Squared errors, rectified and pooled, and the penalty; (K,), up to a constant."""
        rectified, _ = self.images.rectified(masks)
        errors = (self.weight * (rectified - self.target) ** 2).sum(1)
        pooled = masks * (self.pooled.times(masks) - 2 * self.pooled_linear)
        return errors + (pooled + self.ridge * (masks - self.prior) ** 2).sum(1)

    def improve(self, masks: Tensor) -> Tensor:
        """Solve the problems with the positive positions held, and go there as far as it pays."""
        _, positive = self.images.rectified(masks)
        active = torch.einsum("njp,knp->knj", self.images.taps, positive.to(self.images.taps))
        # Of a type, since a number times whole numbers is of torch's default one.
        n_positive = positive.sum(2, dtype=torch.float32)
        wanted = self.target - self.images.bias * n_positive  # (K, N)
        held = []
        for k, mask in enumerate(masks):
            rows = active[k].double()
            gram = add([Rows(rows * self.weight.sqrt()[:, None]), self.pooled], [1, 1])
            linear = (self.weight * wanted[k]) @ rows + self.pooled_linear[k]
            linear = linear + self.ridge * self.prior[k]
            held.append(solve_box(gram, self.ridge, linear[None], mask[None])[0])
        before, step = self.values(masks), torch.stack(held) - masks
        for _ in range(_HALVINGS):  # of each mask's step, until it is better
            worse = ~(self.values(masks + step) < before)
            if not worse.any():
                return masks + step
            step = torch.where(worse[:, None], step / 2, step)
        return masks + step.masked_fill(worse[:, None], 0)


def pose_rectified(
    images: Images, prior: Tensor, penalty: float, term: Term | None = None
) -> Objective:
    """Write down what the masks of a channel should minimise, pulled to the prior, (K, J)."""
    n_concepts, n_taps = prior.shape
    own = torch.arange(n_concepts, dtype=torch.int64)[:, None] == images.concept  # (K, N)
    original = images.rectified(torch.ones(1, n_taps, dtype=torch.float32))[0][0]
    pooled = images.taps.sum(2, dtype=torch.float64)
    constant = images.bias * images.taps.shape[2]
    pooled_original = pooled.sum(1) + constant
    weight = _relative_weights(original, images.concept)
    pooled_weight = POOLED_WEIGHT * _relative_weights(pooled_original, images.concept)
    ridge = penalty * float((weight + pooled_weight) @ pooled.square().mean(1))
    rows = [pooled * pooled_weight.sqrt()[:, None]]
    pooled_linear = (pooled_weight * (own * pooled_original - constant)) @ pooled
    if term:
        rows.append(POOLED_WEIGHT**0.5 * term.rows)
        pooled_linear = pooled_linear + POOLED_WEIGHT * term.linear
    return Objective(
        images=images,
        target=own * original,
        weight=weight,
        pooled=Rows(torch.cat(rows)),
        pooled_linear=pooled_linear,
        prior=prior,
        ridge=max(ridge, torch.finfo(torch.float64).tiny),  # a channel that never responds
    )


def _relative_weights(response: Tensor, concept: Tensor) -> Tensor:
    """1 / (N_k Z_k^2) for each image of concept k, so that errors are relative; (N,)."""
    power = torch.zeros(int(concept.max()) + 1, dtype=torch.float64)
    power.index_add_(0, concept, response.square())  # N_k Z_k^2
    return 1 / power.clamp(min=torch.finfo(torch.float32).tiny)[concept]


def refine(objective: Objective, masks: Tensor) -> Tensor:
    """Refine masks (K, J) for as long as it pays; no objective becomes larger."""
    for _ in range(_MAX_STEPS):
        before, masks = masks, objective.improve(masks)
        if float((masks - before).abs().max()) < _SMALLEST_STEP:
            break
    return masks


def refine_fits(
    members: Members,
    concepts: Mapping[int, Sequence[Concept]],
    fits: Mapping[int, Fit],
    sample: Records,
) -> dict[int, Fit]:
    """Refine the masks of all channels, from `fit_least_squares`, on a scan with positions."""
    maps = next(records.input_map for records in members.scan.shards() if len(records))
    assert maps is not None
    bytes_each = maps[0].nbytes * N_IMAGES

    def improve(maps: dict[int, dict[str, Tensor]], channel: int) -> Fit:
        fit, own = fits[channel], concepts[channel]
        images = images_of(members.scan, channel, own, maps)
        term = background_term(members, sample, channel, own)
        objective = pose_rectified(images, fit.prior, fit.penalty, term)
        return replace(fit, masks=refine(objective, fit.masks))

    def read(numbers: set[int]) -> dict[int, dict[str, Tensor]]:
        return members.first(numbers, N_IMAGES, ("input_map",))

    return by_portion(numbers_of(concepts), lambda _: bytes_each, read, improve)


def images_of(
    scan: Scan,
    channel: int,
    concepts: Sequence[Concept],
    maps: Mapping[int, Mapping[str, Tensor]],
) -> Images:
    """What a channel's taps see of its concepts, in about as many images of each class."""
    inputs = [
        torch.cat([maps[n]["input_map"][: max(1, N_IMAGES // len(concept))] for n in concept])
        for concept in concepts
    ]
    taps = tap_inputs(scan.layer, widen(torch.cat(inputs)), scan.layer.group_of(channel))
    n_images = torch.tensor([len(x) for x in inputs], dtype=torch.int64)
    concept = torch.arange(len(inputs), dtype=torch.int64).repeat_interleave(n_images)
    return Images(taps * scan.weight[channel][:, None], float(scan.bias[channel]), concept)
