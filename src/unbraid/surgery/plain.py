"""A split made of two standard layers, for exporters and tools that know only such."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbraid.networks.layers import bias_of, weight_rows
from unbraid.networks.spec import SAME, LayerSpec, pad_input
from unbraid.splitting.splits import ChannelSplit

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _Row(NamedTuple):
    name: str
    channel: int  # that it is merged into
    weight: Tensor  # (J,)
    bias: float
    sign: float = 1.0  # in the merge


class Pad(nn.Module):
    """The padding of a layer that pads in a way of its own."""

    def __init__(self, spec: LayerSpec) -> None:
        """Take the padding from a layer."""
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        """Pad (N, C_in, positions ...)."""
        return pad_input(self.spec, x)


def plain_layer(
    original: nn.Module, spec: LayerSpec, parts: Sequence[ChannelSplit]
) -> nn.Sequential:
    """Build the split from two standard layers: one with more rows, one that merges them.

    Groups with fewer rows get rows of zeros, named "" in the attribute `names`.
    """
    pads = spec.pad_mode == SAME
    rows = _rows(original, spec, parts)
    wide, merge = _standard_pair(original, spec, len(rows), pads)
    with torch.no_grad():
        for weights in (wide.weight, wide.bias, merge.weight):
            weights.zero_()
        for n, row in enumerate(rows):
            if row is not None:
                wide.weight[n] = row.weight.reshape(wide.weight[n].shape)
                wide.bias[n] = row.bias
                merge.weight[row.channel, n] = row.sign
    modules: list[tuple[str, nn.Module]] = [("pad", Pad(spec))] if pads else []
    layer = nn.Sequential(OrderedDict([*modules, ("wide", wide), ("merge", merge)]))
    layer.names = [row.name if row else "" for row in rows]  # type: ignore[assignment]
    return layer


def _rows(original: nn.Module, spec: LayerSpec, parts: Sequence[ChannelSplit]) -> list[_Row | None]:
    """The rows of the wide layer, group by group, None for one of zeros."""
    weight, bias = weight_rows(original), bias_of(original)
    split = {part.channel: part for part in parts}
    groups: list[list[_Row | None]] = [[] for _ in range(spec.groups)]
    for channel in range(spec.n_out):
        group, part = groups[spec.group_of(channel)], split.get(channel)
        if part is None:
            group.append(_Row(str(channel), channel, weight[channel], float(bias[channel])))
            continue
        group += [_Row(f"{channel}.{k}", channel, w, part.bias) for k, w in enumerate(part.rows)]
        residual = part.residual_row, part.residual_bias
        group.append(_Row(f"{channel}.residual", channel, *residual, sign=-1.0))
    height = max(map(len, groups))
    return [row for group in groups for row in (*group, *[None] * (height - len(group)))]


def _standard_pair(original: nn.Module, spec: LayerSpec, n_rows: int, pads: bool) -> list[Any]:
    rows = weight_rows(original)
    kind: dict[str, Any] = {"dtype": rows.dtype, "device": rows.device}
    if spec.channels_last:
        wide = nn.Linear(spec.n_in, n_rows, **kind)
        return [wide, nn.Linear(n_rows, spec.n_out, bias=False, **kind)]
    convolution = _CONV[len(spec.kernel)]
    wide = convolution(
        spec.n_in,
        n_rows,
        spec.kernel,
        stride=spec.stride,
        padding=0 if pads else original.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        padding_mode="zeros" if pads else spec.pad_mode,
        **kind,
    )
    return [wide, convolution(n_rows, spec.n_out, 1, bias=False, **kind)]
