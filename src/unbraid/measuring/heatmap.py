"""Which pixels a channel answers to in one image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unbraid.networks.spec import widen

_SMOOTHED = 28  # parts of the shorter side of an image; one of them is a standard deviation


def heatmap(values: Sequence[Tensor], image: Tensor) -> Tensor:
    """Compute how much each pixel adds to a channel where it answers, (H, W).

    Each position counts by its positive pre-activation, so that where a channel answers weakly adds
    little. It is input x gradient of half the summed squares of these, summed over colours and
    smoothed: by a normal curve, a 28th of the shorter side wide.

    Args:
        values: the channel's pre-activation at each call, of any shape, made from the image.
        image: (1, C, H, W), which asks for a gradient.
    """
    from torchvision.transforms.functional import gaussian_blur  # slow to import

    strength = torch.stack([widen(z).clamp(min=0).square().sum() for z in values]).sum() / 2
    (gradient,) = torch.autograd.grad(strength, image, retain_graph=True)
    heat = (image * gradient).detach().sum(1).cpu().float()  # (1, H, W)
    side = min(heat.shape[1:])
    reach = math.ceil(3 * side / _SMOOTHED)
    smooth: Tensor = heat if reach >= side else gaussian_blur(heat, 2 * reach + 1, side / _SMOOTHED)
    return smooth[0]
