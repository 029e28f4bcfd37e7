"""Which pixels a channel answers to in one image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.networks.spec import widen

_SMOOTHED = 28  # parts of the shorter side of an image; one of them is a standard deviation


def heatmap(values: Sequence[Tensor], image: Tensor) -> Tensor:
    """Compute how much each pixel adds to a channel where it answers, (H, W), (L,) or (D, H, W).

    Each position counts by its positive pre-activation, so that where a channel answers weakly adds
    little. It is input x gradient of half the summed squares of these, summed over colours and
    smoothed: by a normal curve, a 28th of the shorter side wide.

    Args:
        values: the channel's pre-activation at each call, of any shape, made from the image.
        image: (1, C, H, W), (1, C, L) or (1, C, D, H, W), which asks for a gradient.
    """
    strength = torch.stack([widen(z).clamp(min=0).square().sum() for z in values]).sum() / 2
    (gradient,) = torch.autograd.grad(strength, image, retain_graph=True)
    heat = (image * gradient).detach().sum(1).cpu().float()  # (1, positions ...)
    side = min(heat.shape[1:])
    reach, width = math.ceil(3 * side / _SMOOTHED), side / _SMOOTHED
    smooth = heat if reach >= side else _smoothed(heat, reach, width)
    return smooth[0]


def _smoothed(heat: Tensor, reach: int, width: float) -> Tensor:
    """Smooth (1, positions ...) by a normal curve that is cut off; edges are mirrored."""
    if heat.dim() == 3:
        from torchvision.transforms.functional import gaussian_blur  # slow to import

        blurred: Tensor = gaussian_blur(heat, 2 * reach + 1, width)
        return blurred
    at = torch.arange(-reach, reach + 1, dtype=torch.float32)
    curve = (-0.5 * (at / width) ** 2).exp()
    for dim in range(1, heat.dim()):
        lines = heat.movedim(dim, -1)
        mirrored = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (reach, reach), mode="reflect")
        smooth = F.conv1d(mirrored, (curve / curve.sum())[None, None])
        heat = smooth.reshape(lines.shape).movedim(-1, dim)
    return heat
