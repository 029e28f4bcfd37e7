"""A first look at what a network computes: what would spoil everything that is made of it.

A network must give the same logits whenever it sees an image: not others each time, not others
after other images, and not others beside other images. This is seen on a few images before work
of hours begins. Shapes: N images, T outputs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unbraid.base.errors import LayerError, ModelError, OutOfMemory, brief
from unbraid.base.modes import restored, same_random
from unbraid.networks.outputs import alike_wide, run_network
from unbraid.networks.spec import LayerSpec

_MOST = 4  # images to look at
_REPEATS = 24  # of a network that draws random numbers, which it may use now and then


def look_first(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[tuple[LayerSpec, nn.Module]] = (),
    n_fewest: int = 1,
) -> Tensor:
    """Raise if an undisturbed network cannot be scanned, though it runs; return some logits.

    `images` (N, C, H, W) are a batch on the network's device, `layers` those that are scanned, and
    `n_fewest` is how many images the smallest batch to come holds.
    """
    with same_random():
        images = images.detach()
        few = images[:_MOST]
        if len(images) > _MOST and isinstance(_tried(model, few), ModelError):
            few = images  # as it cannot run on fewer
        logits = refuse_unsteady(model, few)
        # Both ways, as what is taken of a batch, such as its largest value, may be of either half.
        for half in range(min(2, len(few))):
            beside = few.clone()
            beside[1 - half :: 2] = few[half]
            if _differ(logits[half::2], _run(model, beside)[half::2], _rounding(model, logits)):
                raise ModelError(
                    "The network's outputs for an image depend on the other images of its batch "
                    "(normalised by the batch's own statistics perhaps); let it treat each image "
                    "by itself in eval mode, or use batch_size=1."
                )
        if n_fewest < len(images):
            _look_at_fewer(model, images[:n_fewest], layers)
    return logits


def _run(model: nn.Module, images: Tensor) -> Tensor:
    """Compute logits, and leave no trace of it."""
    with restored(model, wholly=True):
        return run_network(model, images).detach()


def _tried(model: nn.Module, images: Tensor) -> Tensor | ModelError:
    """Compute logits, or say why there are none."""
    try:
        return _run(model, images)
    except OutOfMemory:
        raise
    except ModelError as error:
        return error


def _look_at_fewer(
    model: nn.Module, images: Tensor, layers: Sequence[tuple[LayerSpec, nn.Module]]
) -> None:
    """Raise if the network does not run on as few images, or its layers meet no batch of one."""
    with ExitStack() as stack:
        for spec, module in layers if len(images) == 1 else ():
            hook = partial(_refuse_lone, spec)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        found = _tried(model, images)
    if isinstance(found, ModelError):
        n = len(images)
        raise ModelError(
            f"{_not_on(n, found)}, and the last batch holds {n}; choose a batch_size that leaves "
            "no such rest, or wrap the network so that it runs on any number."
        )


def needs_company(found: ModelError) -> ModelError:
    """Say that a network does not run on an image that is alone in its batch."""
    return ModelError(
        f"{_not_on(1, found)}, and one image is alone in its batch, as images of other sizes and "
        "broken ones are not in it; wrap the network so that it runs on any number."
    )


def _not_on(n: int, found: ModelError) -> str:
    what = "one image" if n == 1 else f"{n} images"
    why = brief(found.__cause__ or found)
    return f"The network runs on more images at once but not on {what} ({why})"


def _refuse_lone(
    spec: LayerSpec, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    x = args[0] if args else next(iter(named.values()))
    if not spec.channels_last and x.dim() == len(spec.kernel) + 1:
        raise LayerError(
            f"Layer {spec.name!r} meets a single image as {tuple(x.shape)}, without its batch "
            "dimension; let the network keep it, by flatten(1) in place of squeeze() for example."
        )


def refuse_unsteady(model: nn.Module, images: Tensor) -> Tensor:
    """Raise ModelError if an undisturbed network gives other logits of the same images later.

    `images` (N, C, H, W) are on its device. Returns the logits, (N, T).
    """
    with same_random():
        before = _next_random(images.device)
        first = _run(model, images)
        draws = _next_random(images.device) != before
        # Rows of whole numbers and fractions are wider than what computed them.
        wide = first.dtype == torch.float64
        allowed = 16 * (_coarsest(model, first) if wide else torch.finfo(first.dtype).eps)
        with restored(model, wholly=True):
            # Of which it may keep something.
            run_network(model, (images.flip(-1) / 2).to(images.dtype))
            steady = not _differ(first, run_network(model, images).detach(), allowed)
        for _ in range(_REPEATS if draws else int(not steady)):
            if _differ(first, _run(model, images), allowed):
                raise ModelError(
                    "The network gives other outputs each time it runs on the same images, also in "
                    "eval mode; switch off what is random in it, such as a functional dropout "
                    "without training=self.training."
                )
        if not steady:
            raise ModelError(
                "The network's outputs depend on the images that it ran on before; let it keep "
                "nothing of them, in buffers or elsewhere, in eval mode."
            )
    return first


def _next_random(device: torch.device) -> tuple[float, ...]:
    """The random numbers that would come next, of all kinds that a network may draw."""
    with same_random():
        drawn = [torch.rand((), dtype=torch.float32, device=d).item() for d in ("cpu", device)]
        return *drawn, random.random(), np.random.rand()


def _rounding(model: nn.Module, logits: Tensor) -> float:
    """How far logits may differ by rounding, in units of the largest: generously."""
    return math.sqrt(_coarsest(model, logits))


def _coarsest(model: nn.Module, logits: Tensor) -> float:
    """The relative step of the coarsest number format that logits may have been computed in."""
    weights = (p for p in model.parameters() if not is_lazy(p) and p.is_floating_point())
    formats = {logits.dtype, *(weight.dtype for weight in weights)}
    return max(torch.finfo(one).eps for one in formats)


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether logits differ by more than a part of the largest; NaN do not count."""
    if len(one) != len(other):
        return True
    one, other = alike_wide(one, other)
    finite = one.isfinite().all(1) & other.isfinite().all(1)
    scale = one[one.isfinite()].abs()
    largest = float(scale.max()) if len(scale) else 0.0
    gap = (one - other)[finite].abs()
    return bool(gap.numel()) and float(gap.max()) > tolerance * largest + 1e-12
