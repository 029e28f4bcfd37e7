"""How many images to run at a time: as many as a fixed amount of memory is sure to hold.

Nothing is timed and nothing tried out, so that the same scan gets the same batches, and with them
the same bits, every time and in every process. Where it is still too much a batch is halved.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.causes import memory_full
from unbraid.errors import ModelError, OutOfMemory
from unbraid.networks import device_of
from unbraid.relevance import undisturbed
from unbraid.running import run_network

_MEMORY = 2**31  # bytes; of an accelerator a quarter of what it has
_MOST = 64  # more brings a processor nothing
_MOST_ON_ACCELERATOR = 256
_AT_ONCE = 3  # times what goes into and comes out of a module: room for what runs beside it


def batch_size_for(model: nn.Module, layers: Sequence[nn.Module], image: Tensor | None) -> int:
    """Find how many images a scan may run at a time.

    Args:
        model: gives logits.
        layers: of it, that are scanned.
        image: one of the images, (C, H, W), that tells how large they are; None if unknown.

    Returns:
        A power of two, from 1 to 64, or to 256 on an accelerator.

    Raises:
        ModelError: the network cannot run on such images.
    """
    if image is None:
        return _MOST
    device = device_of(model)
    memory, most = _MEMORY, _MOST
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory // 4
    if device.type != "cpu":
        most = _MOST_ON_ACCELERATOR
    try:
        room = memory // _bytes_of_any(model, layers, image.to(device))
    except Exception as error:
        if not (isinstance(error, OutOfMemory) or memory_full(error)):
            raise
        return 1  # which is tried again, and told
    return min(most, 1 << max(room, 1).bit_length() - 1)


def _bytes_of_any(model: nn.Module, layers: Sequence[nn.Module], image: Tensor) -> int:
    """As `bytes_of_one`, also for a network that runs on two images or more but not on one."""
    try:
        return bytes_of_one(model, layers, image)
    except OutOfMemory:
        raise
    except ModelError as error:
        try:
            return bytes_of_one(model, layers, image, n=2) // 2
        except ModelError:
            raise error from None


def bytes_of_one(model: nn.Module, layers: Sequence[nn.Module], image: Tensor, n: int = 1) -> int:
    """How much memory a scan takes for n images: at its widest, and kept for the gradient."""
    widest = kept = 0
    behind = False  # the first of the layers, where gradients begin

    def count(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal widest, kept, behind
        behind = behind or module in layers
        widest = max(widest, _bytes(given) + _bytes(output))
        kept += behind * _bytes(output)

    with ExitStack() as stack:
        for module in model.modules():
            scripted = isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
            if next(module.children(), None) is None and not scripted:
                stack.callback(module.register_forward_hook(count).remove)
        with undisturbed(model), torch.no_grad():
            run_network(model, torch.stack([image] * n))
    return _AT_ONCE * max(widest, n * image.nbytes) + kept


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0
