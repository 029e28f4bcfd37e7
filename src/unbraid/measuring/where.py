"""How a layer's positions lie in the image that it runs on: a signal, a picture, or a volume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

from torch import Tensor, nn

from unbraid.networks.spec import LayerSpec

Grid = tuple[int, ...]  # (l,), (h, w) or (d, h, w)

_MOST_PREFIXES = 16  # tokens before those of the image: a class token, registers
_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def grids_seen(model: nn.Module, layer: nn.Module, n_dims: int) -> Iterator[list[Grid]]:
    """Note the sizes of maps that convolutions before a layer put out: tokens come of such."""
    grids: list[Grid] = []
    reached = False

    def note(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal reached
        reached = reached or module is layer
        if not reached and isinstance(output, Tensor) and output.dim() == n_dims + 2:
            grids.append(tuple(output.shape[2:]))

    with ExitStack() as stack:
        for module in model.modules():
            if module is layer or isinstance(module, _CONVOLUTIONS):
                stack.enter_context(module.register_forward_hook(note))
        yield grids


def grid_of(
    spec: LayerSpec, outputs: Sequence[Tensor], grids: Sequence[Grid], sizes: Sequence[int]
) -> Grid | None:
    """Say how a layer's positions lie in an image of these sizes; None where they do not.

    Tokens in a row lie as the convolution before them put them out, behind a class token and
    registers, which stay out of the map.
    """
    first = outputs[0]
    if len(outputs) > 1 or len(first) != 1:  # several runs, or windows
        return None
    if not spec.channels_last:
        return tuple(first.shape[2:]) if len(spec.kernel) == len(sizes) else None
    if first.dim() == len(sizes) + 2 and len(sizes) > 1:
        lying = tuple(first.shape[1:-1])
        return lying if _fits(lying, sizes) else None
    n_tokens = first.shape[1] if first.dim() == 3 else 0
    close = [g for g in grids if 0 <= n_tokens - prod(g) <= _MOST_PREFIXES and _fits(g, sizes)]
    return max(close, key=prod, default=None)


def _fits(grid: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether a grid is as wide for its height as the image; signals have no such thing."""
    if len(sizes) == 1:
        return True
    (h, w), (height, width) = grid[-2:], sizes[-2:]
    return abs(h * width - w * height) <= max(height, width)
