"""Refine masks on rectified responses with positions, which pooled inputs hide.

Behind a ReLU only the positive part of a channel counts: d_k[n] = sum over positions of
max(z_k[n, p], 0). Where z_k is positive, d_k is linear in the mask; so with these positions held
the problem is again box-constrained least squares, solved and repeated (Gauss-Newton) while it gets
better. The pooled objective stays in with a smaller weight, so that neither error is bought with
the other. Shapes: N images, J taps, K concepts, P positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbraid.box import solve_box
from unbraid.clusters import belongs
from unbraid.findings import Concept
from unbraid.layers import tap_inputs
from unbraid.least_squares import Fit
from unbraid.records import Scan

POOLED_WEIGHT = 0.3  # docs/splitting.md tells what other weights gave
_N_IMAGES = 300  # of each concept, spread over its classes
_MAX_STEPS = 12
_SMALLEST_STEP = 1e-3  # of a mask
_HALVINGS = 10
_BYTES_AT_ONCE = 1 << 30  # of input maps held in memory


@dataclass(frozen=True)
class Images:
    """What a channel's taps contribute in images of its concepts."""

    taps: Tensor  # (N, J, P), input times weight
    bias: float
    concept: Tensor  # (N,)

    def rectified(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Response of a masked channel, (N,) float64, and where it is positive, (N, P)."""
        z = torch.einsum("njp,j->np", self.taps, mask.to(self.taps)) + self.bias
        return z.clamp(min=0).sum(1, dtype=torch.float64), z > 0


@dataclass(frozen=True)
class Objective:
    """What one concept's mask should minimise; weights make errors relative to the original."""

    images: Images
    target: Tensor  # (N,), the response wanted: the original's on own images, else none
    weight: Tensor  # (N,)
    pooled: Tensor  # (N, J), taps summed over positions
    pooled_target: Tensor  # (N,), of pooled @ mask
    pooled_weight: Tensor  # (N,)
    prior: Tensor  # (J,)
    ridge: float

    def value(self, mask: Tensor) -> float:
        """Squared errors, rectified and pooled, and the penalty."""
        rectified, _ = self.images.rectified(mask)
        errors = self.weight * (rectified - self.target) ** 2
        pooled_errors = self.pooled_weight * (self.pooled @ mask - self.pooled_target) ** 2
        penalty = self.ridge * (mask - self.prior).square().sum()
        return float(errors.sum() + pooled_errors.sum() + penalty)

    def improve(self, mask: Tensor) -> Tensor:
        """Solve the problem with the positive positions held, and go there as far as it pays."""
        _, positive = self.images.rectified(mask)
        active = torch.einsum("njp,np->nj", self.images.taps, positive.to(self.images.taps))
        wanted = self.target - self.images.bias * positive.sum(1)
        hessian, linear = torch.diag(torch.full_like(mask, self.ridge)), self.ridge * self.prior
        for inputs, weight, target in (
            (active.double(), self.weight, wanted),
            (self.pooled, self.pooled_weight, self.pooled_target),
        ):
            hessian = hessian + (inputs * weight[:, None]).T @ inputs
            linear = linear + inputs.T @ (weight * target)
        step = solve_box(hessian[None], linear[None], mask[None])[0] - mask
        before = self.value(mask)
        for _ in range(_HALVINGS):
            if self.value(mask + step) < before:
                return mask + step
            step = step / 2
        return mask


def refine(images: Images, start: Tensor, prior: Tensor, penalty: float) -> Tensor:
    """Refine the masks of one channel.

    Args:
        images: of all concepts.
        start: (K, J), masks to begin with, float64.
        prior: (K, J), what the penalty pulls to.
        penalty: in units of the mean curvature.

    Returns:
        (K, J), whose objectives are at most those of `start`.
    """
    original, _ = images.rectified(torch.ones(start.shape[1]))
    pooled = images.taps.sum(2, dtype=torch.float64)
    constant = images.bias * images.taps.shape[2]
    pooled_original = pooled.sum(1) + constant
    weight = _relative_weights(original, images.concept)
    pooled_weight = POOLED_WEIGHT * _relative_weights(pooled_original, images.concept)
    curvature = (weight + pooled_weight) @ pooled.square().mean(1)
    refined = []
    for k in range(len(start)):
        own = (images.concept == k).double()
        objective = Objective(
            images=images,
            target=own * original,
            weight=weight,
            pooled=pooled,
            pooled_target=own * pooled_original - constant,
            pooled_weight=pooled_weight,
            prior=prior[k],
            ridge=penalty * float(curvature),
        )
        mask = start[k]
        for _ in range(_MAX_STEPS):
            better = objective.improve(mask)
            moved = float((better - mask).abs().max())
            mask = better
            if moved < _SMALLEST_STEP:
                break
        refined.append(mask)
    return torch.stack(refined)


def refine_fits(
    scan: Scan, concepts: Mapping[int, Sequence[Concept]], fits: Mapping[int, Fit]
) -> dict[int, Fit]:
    """Refine the masks of all channels, as many at a time as memory holds input maps for.

    Args:
        scan: of the training images, with positions.
        concepts: per channel.
        fits: per channel, from `fit_least_squares`.
    """
    refined = {}
    for part in _portions(scan, concepts):
        maps = _sample_maps(scan, {c for o in part for group in concepts[o] for c in group})
        for channel in part:
            images = _images(scan, channel, concepts[channel], maps)
            fit = fits[channel]
            masks = refine(images, fit.masks, fit.prior, fit.penalty)
            refined[channel] = replace(fit, masks=masks)
    return refined


def _portions(scan: Scan, concepts: Mapping[int, Sequence[Concept]]) -> Iterator[list[int]]:
    """Channels whose classes' sampled input maps fit into memory together."""
    first = next(records.input_map for records in scan.shards() if len(records))
    assert first is not None
    at_once = max(1, _BYTES_AT_ONCE // (first[0].nbytes * _N_IMAGES))  # classes
    portion: list[int] = []
    classes: set[int] = set()
    for channel, groups in concepts.items():
        own = {c for group in groups for c in group}
        if portion and len(classes | own) > at_once:
            yield portion
            portion, classes = [], set()
        portion.append(channel)
        classes |= own
    yield portion


def _sample_maps(scan: Scan, classes: set[int]) -> dict[int, Tensor]:
    """The first input maps of each class, (n, C_in, positions ...)."""
    kept: dict[int, list[Tensor]] = {label: [] for label in sorted(classes)}
    counts = dict.fromkeys(classes, 0)
    for records in scan.shards():
        assert records.input_map is not None
        for label, parts in kept.items():
            chosen = belongs(scan, records, label).nonzero()[: _N_IMAGES - counts[label], 0]
            parts.append(records.input_map[chosen])
            counts[label] += len(chosen)
    return {label: torch.cat(parts) for label, parts in kept.items()}


def _images(
    scan: Scan, channel: int, groups: Sequence[Concept], maps: Mapping[int, Tensor]
) -> Images:
    """Put together what a channel's taps see of its concepts, as many images of each class."""
    inputs = [
        torch.cat([maps[c][: max(1, _N_IMAGES // len(concept))] for c in concept])
        for concept in groups
    ]
    taps = tap_inputs(scan.layer, torch.cat(inputs), scan.layer.group_of(channel))
    concept = torch.arange(len(inputs)).repeat_interleave(torch.tensor([len(x) for x in inputs]))
    return Images(taps * scan.weight[channel][:, None], float(scan.bias[channel]), concept)


def _relative_weights(response: Tensor, concept: Tensor) -> Tensor:
    """1 / (N_k Z_k^2) for each image of concept k, so that errors are relative; (N,)."""
    power = torch.zeros(int(concept.max()) + 1, dtype=torch.float64)
    power.index_add_(0, concept, response.square())  # N_k Z_k^2
    return 1 / power.clamp(min=torch.finfo(torch.float32).tiny)[concept]
