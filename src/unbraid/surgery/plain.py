"""A split made of two standard layers, for exporters and tools that know only such."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbraid.networks.layers import bias_of, padding_pairs, weight_rows
from unbraid.networks.spec import SAME, LayerSpec, pad_input
from unbraid.splitting.splits import ChannelSplit

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _Row(NamedTuple):
    name: str
    channel: int  # that it is merged into
    weight: Tensor  # (J,)
    bias: float
    sign: float  # in the merge


def plain_layer(
    original: nn.Module, spec: LayerSpec, parts: Sequence[ChannelSplit]
) -> nn.Sequential:
    """Build the split from two standard layers: one with more rows, one that merges them.

    Every group of a grouped convolution must have as many rows as the others, so groups with
    fewer get rows of zeros. The attribute `names` says what each row is: "7" for channel 7 as it
    was, "1660.0" for a concept channel, "1660.residual", and "" for zeros.
    """
    plain, plain_bias = weight_rows(original), bias_of(original)
    split = {part.channel: part for part in parts}
    rows: list[list[_Row]] = [[] for _ in range(spec.groups)]
    for channel in range(spec.n_out):
        mine = rows[spec.group_of(channel)]
        part = split.get(channel)
        if part is None:
            bias = float(plain_bias[channel])
            mine.append(_Row(str(channel), channel, plain[channel], bias, 1.0))
            continue
        for k, weight in enumerate(part.rows):
            mine.append(_Row(f"{channel}.{k}", channel, weight, part.bias, 1.0))
        residual = part.residual_row, part.residual_bias
        mine.append(_Row(f"{channel}.residual", channel, *residual, -1.0))
    height = max(map(len, rows))
    wide_weight = plain.new_zeros(spec.groups * height, plain.shape[1])
    wide_bias = plain.new_zeros(spec.groups * height)
    merge_weight = plain.new_zeros(spec.n_out, spec.groups * height)
    names = [""] * (spec.groups * height)
    for group, mine in enumerate(rows):
        for place, row in enumerate(mine, group * height):
            names[place] = row.name
            wide_weight[place], wide_bias[place] = row.weight, row.bias
            merge_weight[row.channel, place] = row.sign
    wide, merge = _standard_pair(original, spec, len(wide_weight))
    with torch.no_grad():
        wide.weight.copy_(wide_weight.reshape(wide.weight.shape))
        wide.bias.copy_(wide_bias)
        merge.weight.copy_(merge_weight.reshape(merge.weight.shape))
    parts_in_order: OrderedDict[str, nn.Module] = OrderedDict(wide=wide, merge=merge)
    if _pads_by_itself(original, spec):
        parts_in_order = OrderedDict(pad=Pad(spec), wide=wide, merge=merge)
    layer = nn.Sequential(parts_in_order)
    layer.names = names  # type: ignore[assignment]
    return layer


class Pad(nn.Module):
    """The padding of a layer that pads in a way of its own."""

    def __init__(self, spec: LayerSpec) -> None:
        """Take the padding from a layer."""
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        """Pad (N, C_in, positions ...)."""
        return pad_input(self.spec, x)


def _pads_by_itself(original: nn.Module, spec: LayerSpec) -> bool:
    return not spec.channels_last and (
        spec.pad_mode == SAME or spec.padding != padding_pairs(original)
    )


def _standard_pair(original: nn.Module, spec: LayerSpec, n_rows: int) -> tuple[Any, Any]:
    """Make empty layers of the right sizes, in the kind and place of the original."""
    rows = weight_rows(original)
    kind: dict[str, Any] = {"dtype": rows.dtype, "device": rows.device}
    if spec.channels_last:
        return (
            nn.Linear(spec.n_in, n_rows, **kind),
            nn.Linear(n_rows, spec.n_out, bias=False, **kind),
        )
    convolution = _CONV[len(spec.kernel)]
    wide = convolution(
        spec.n_in,
        n_rows,
        spec.kernel,
        stride=spec.stride,
        padding=0 if _pads_by_itself(original, spec) else original.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        padding_mode="zeros" if _pads_by_itself(original, spec) else spec.pad_mode,
        **kind,
    )
    return wide, convolution(n_rows, spec.n_out, 1, bias=False, **kind)
