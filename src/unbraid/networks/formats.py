"""Number and memory formats in which a network runs faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def faster_channels_last(model: nn.Module) -> bool:
    """Whether a network is known to run faster channels last: by its kind, not by a stopwatch.

    True for float32 2-D convolutions other than the patches of a transformer, on processors, by
    oneDNN. Elsewhere it was not measured, or brings nothing ("Formats of kinds of networks"
    in docs/benchmarks-scan.md).
    """
    return torch.backends.mkldnn.is_available() and any(
        isinstance(module, nn.Conv2d)
        and not is_lazy(module.weight)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and not (module.kernel_size == module.stride != (1, 1))
        for module in model.modules()
    )


def faster_in_bfloat16(model: nn.Module) -> bool:
    """Whether a float32 network lies on a processor that multiplies bfloat16 on its own."""
    return torch.cpu._is_avx512_bf16_supported() and any(
        weight.dtype == torch.float32 and weight.device.type == "cpu"
        for weight in model.parameters()
    )


@contextmanager
def kept_channels_last(model: nn.Module) -> Iterator[None]:
    """Keep the weights of 2-D convolutions channels last; put the very same memory back."""
    dense = [p for p in model.parameters() if not is_lazy(p) and p.layout == torch.strided]
    maps = [parameter for parameter in dense if parameter.dim() == 4]
    before = [parameter.data for parameter in maps]
    try:
        for parameter in maps:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for parameter, data in zip(maps, before, strict=True):
            parameter.data = data
