"""Put a split into a network: concept channels beside the layer, the output unchanged.

METHOD.md section 4 gives the reasons. Two forms: `SplitLayer` keeps the original layer and is equal
to it bit for bit; `plain_layer` is made of standard modules alone, for exporters.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbraid.clustering import Clusters
from unbraid.errors import ModelError, UsageError
from unbraid.describe import bias_of, describe, resolve_layer, weight_rows
from unbraid.layers import LayerSpec, respond
from unbraid.splits import ChannelSplit, Split
from unbraid.weights import hash_weights

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def apply(model: nn.Module, split: Split, form: Literal["exact", "plain"] = "exact") -> nn.Module:
    """Return a copy of a network in which the split channels are made of concept channels.

    In the exact form (the default) outputs are the original's to the last bit, while gradients and
    interventions go through the concept channels. They pass through the module
    `LAYER.concepts`, in the order of `LAYER.names`, where hooks can read or change them; what is
    subtracted passes through `LAYER.residuals`. `model2.gate(layer, channel, concept, value)`
    scales one (0 switches it off) until its `remove()` or the end of its `with` block.

    In the plain form the layer is a wider layer, `LAYER.wide`, and one with kernel 1 that merges,
    `LAYER.merge`; outputs agree up to rounding, and there are no gates.

    Args:
        model: the network that the split was made for; it is not changed.
        split: from `unbraid.split` or `Split.load`.
        form: "exact" or "plain".

    Raises:
        ModelError: the network's weights are not those that the split was made for.
        LayerError: the network lacks the layer.
        UsageError: there is no such form.
    """
    if form not in ("exact", "plain"):
        raise UsageError(f"There is no form {form!r}; use 'exact' or 'plain'.")
    name, original = resolve_layer(model, split.layer.name)
    if hash_weights(model) != split.weights:
        raise ModelError(
            "The split was made for a network with other weights; load the weights it was made "
            "for, or scan and split this network."
        )
    changed = copy.deepcopy(model)
    original = changed.get_submodule(name)
    build = SplitLayer if form == "exact" else plain_layer
    new = build(original, describe(name, original), split.channels)
    if isinstance(new, SplitLayer):
        new.clusters = split.clusters
    new.train(original.training)
    for module in list(changed.modules()):  # a module may be known under several names
        for key, child in module._modules.items():
            if child is original and module is not new:
                module._modules[key] = new
    if form == "exact" and not hasattr(changed, "gate"):  # a name that a network may use itself
        changed.gate = partial(gate, changed)  # type: ignore[assignment]
    return changed


class SplitLayer(nn.Module):
    """A layer with concept channels beside it; R rows are all concept channels, then residuals."""

    def __init__(self, original: nn.Module, spec: LayerSpec, parts: Sequence[ChannelSplit]) -> None:
        """Build the new rows in the kind and place of the original's weights."""
        super().__init__()
        like = weight_rows(original)
        counts = [len(part.concepts) for part in parts]
        rows = torch.cat([*(p.rows for p in parts), *(p.residual_row[None] for p in parts)])
        bias = [p.bias for p in parts for _ in p.concepts] + [p.residual_bias for p in parts]
        self.original = original
        self.rows = nn.Parameter(rows.to(like))
        self.row_bias = nn.Parameter(torch.tensor(bias, dtype=torch.float64).to(like))
        self.concepts = nn.Identity()
        self.residuals = nn.Identity()
        self.spec = spec
        self.names = [f"{p.channel}.{k}" for p in parts for k in range(len(p.concepts))]
        self.divided = {p.channel: p.concepts for p in parts}
        self.clusters: Clusters = {}  # of images, where they stand for classes in concepts
        self.gates: list[Gate] = []  # those moved away from 1, in the order of moving
        self.register_forward_pre_hook(_keep_slow_path)
        channels = torch.tensor([p.channel for p in parts], device=like.device)
        owners = torch.arange(len(parts)).repeat_interleave(torch.tensor(counts)).to(like.device)
        self.register_buffer("channels", channels, persistent=False)
        self.register_buffer("owners", owners, persistent=False)  # of concepts, among `channels`

    def __getattr__(self, name: str) -> Any:
        """Give what the surrounding code may ask of the layer, such as `weight` or `stride`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            return getattr(self.original, name)

    def forward(self, input: Tensor) -> Tensor:
        """Compute the original output, by way of the concept channels.

        While nothing intervenes, the correction is zero in value and alive in gradient. It is
        minus (detached minus live), since adding minus zero keeps even the sign of a zero.
        """
        z: Tensor = self.original(input)
        dim = -1 if self.spec.channels_last else 1
        new = self._respond(input)
        concepts, moved = _pass(self.concepts, new.narrow(dim, 0, len(self.names)))
        residuals, moved_too = _pass(
            self.residuals, new.narrow(dim, len(self.names), len(self.channels))
        )
        if self.gates:
            scale = torch.ones_like(self.row_bias[: len(self.names)])
            for gate in self.gates:  # of one row, the latest counts
                scale[gate.row] = gate.value
            concepts = concepts * (scale if dim == -1 else scale.view(-1, *[1] * (z.dim() - 2)))
        correction = (-z.index_select(dim, self.channels) - residuals).index_add(
            dim, self.owners, concepts
        )
        if not (moved or moved_too or self.gates):
            correction = -(correction.detach() - correction)
        # On a copy, which keeps the memory format that the layers behind may round by.
        return z.clone().index_add_(dim, self.channels, correction)

    def _respond(self, x: Tensor) -> Tensor:
        if self.spec.channels_last:
            return F.linear(x, self.rows, self.row_bias)
        row_channels = torch.cat([self.channels[self.owners], self.channels])
        return respond(self.spec, x, self.rows, self.row_bias, row_channels)


def _pass(point: nn.Module, values: Tensor) -> tuple[Tensor, bool]:
    """Send values through a hook point; say whether they came out changed."""
    before = values.detach().clone()  # a hook may write into them
    after: Tensor = point(values)
    same = (before == after) | (before.isnan() & after.isnan())
    return after, not bool(same.all())


def _keep_slow_path(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing, as a hook: torch's fused transformer reads a hookless layer's weights past it."""


class Gate:
    """A gate that was moved; `remove()` or leaving its `with` block moves it back."""

    def __init__(self, layer: SplitLayer, row: int, value: float) -> None:
        """Move the gate of one row."""
        self.row, self.value = row, value
        self._layer = layer
        layer.gates.append(self)

    def remove(self) -> None:
        """Take this move back; moves of the same gate that are still in force stay so."""
        if self in self._layer.gates:
            self._layer.gates.remove(self)

    def __enter__(self) -> Gate:
        """Use the gate as a context."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Move the gate back, also after an exception."""
        self.remove()


def gate(
    model: nn.Module, layer: str | nn.Module, channel: int, concept: int, value: float
) -> Gate:
    """Scale a concept channel of a split network; a split network has this as its method.

    Args:
        model: from `apply` in the exact form.
        layer: the split layer, by name or itself.
        channel: a split channel.
        concept: 0 to K - 1.
        value: 0 switches the concept channel off, 1 leaves it as it is.

    Raises:
        UsageError: there is no such concept channel.
    """
    module = dict(model.named_modules()).get(layer) if isinstance(layer, str) else layer
    if not isinstance(module, SplitLayer):
        known = [name for name, m in model.named_modules() if isinstance(m, SplitLayer)]
        raise UsageError(f"Layer {layer!r} has no concept channels; {', '.join(known)} has.")
    name = f"{channel}.{concept}"
    if name not in module.names:
        raise UsageError(
            f"Layer {layer!r} has no concept {concept} of channel {channel}; it has "
            f"{', '.join(module.names[:20])}{' ...' if len(module.names) > 20 else ''}."
        )
    return Gate(module, module.names.index(name), float(value))


def plain_layer(
    original: nn.Module, spec: LayerSpec, parts: Sequence[ChannelSplit]
) -> nn.Sequential:
    """Build the split from two standard layers: one with more rows, one that merges them.

    Every group of a grouped convolution must have as many rows as the others, so groups with
    fewer get rows of zeros.
    """
    plain, plain_bias = weight_rows(original), bias_of(original)
    split = {part.channel: part for part in parts}
    rows: list[list[tuple[Tensor, float, int, float]]] = [[] for _ in range(spec.groups)]
    for channel in range(spec.n_out):
        mine = rows[spec.group_of(channel)]
        part = split.get(channel)
        if part is None:
            mine.append((plain[channel], float(plain_bias[channel]), channel, 1.0))
            continue
        mine += [(row.to(plain), part.bias, channel, 1.0) for row in part.rows]
        mine.append((part.residual_row.to(plain), part.residual_bias, channel, -1.0))
    height = max(map(len, rows))
    wide_weight = plain.new_zeros(spec.groups * height, plain.shape[1])
    wide_bias = plain.new_zeros(spec.groups * height)
    merge_weight = plain.new_zeros(spec.n_out, spec.groups * height)
    for group, mine in enumerate(rows):
        for place, (row, row_bias, channel, sign) in enumerate(mine, group * height):
            wide_weight[place], wide_bias[place] = row, row_bias
            merge_weight[channel, place] = sign
    wide, merge = _standard_pair(original, spec, len(wide_weight))
    with torch.no_grad():
        wide.weight.copy_(wide_weight.reshape(wide.weight.shape))
        wide.bias.copy_(wide_bias)
        merge.weight.copy_(merge_weight.reshape(merge.weight.shape))
    return nn.Sequential(OrderedDict(wide=wide, merge=merge))


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
        padding=original.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        padding_mode=spec.pad_mode,
        **kind,
    )
    return wide, convolution(n_rows, spec.n_out, 1, bias=False, **kind)
