"""Whether a tensor is one image of a network or several: signals, pictures, clips and volumes."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from unbraid.base.errors import ModelError, UsageError
from unbraid.networks.copying import device_of
from unbraid.networks.outputs import run_raw
from unbraid.networks.relevance import undisturbed

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def as_batch(images: Tensor, model: nn.Module) -> Tensor:
    """Add the first dimension to a single image.

    Three dimensions are an image of a network of pictures, but signals of one whose convolutions
    are all 1-D; four are images, but a single volume of one whose convolutions are all 3-D. What
    the network does not take is read in the other way. One without convolutions, or with several
    kinds, is tried: on the images as they are, and then as a single one.
    """
    kinds = {m.kernel_size for m in model.modules() if isinstance(m, _CONVOLUTIONS)}
    n_dims = {len(size) for size in kinds}
    if len(n_dims) != 1 and images.numel():
        tried = (way for way in (images, images[None]) if 2 <= way.dim() <= 5)
        found = next((way for way in tried if _runs(model, _others(way))), None)
        if found is not None and found.dim() > 2:  # features alone, (N, F), are no images
            return found
    own = 2 + n_dims.pop() if len(n_dims) == 1 else 4  # dimensions of a batch
    ways = []
    for size in dict.fromkeys((own, 4)):
        way = images if images.dim() >= size else images[None]
        ways += [way] if size <= way.dim() <= 5 and way.numel() else []
    if not ways:
        raise UsageError(
            f"images is a tensor of shape {tuple(images.shape)}; give one of shape (N, C, H, W), "
            "(N, C, L) or (N, C, D, H, W), or one such image."
        )
    if len({way.dim() for way in ways}) > 1 and not _runs(model, ways[0][:1]):
        return ways[1]
    return ways[0]


def _others(images: Tensor) -> Tensor:
    """Another number of images: if it is none, but of channels, the network will not take it."""
    return images[:1] if len(images) > 1 else torch.cat([images, images])


def _runs(model: nn.Module, images: Tensor) -> bool:
    with undisturbed(model), torch.no_grad(), suppress(ModelError):
        run_raw(model, images.to(device_of(model)))
        return True
    return False
