"""Layers that are linear in their weights: their rows, their pooled inputs, new rows beside them.

Every such layer is seen here as a convolution: a fully connected layer is one with kernel 1 whose
positions are its tokens. Shapes: N images, C_out and C_in channels, G groups, J = C_in / G * kernel
taps of one channel, P output positions.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbraid.errors import LayerError, nearest

_PAD_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class LayerSpec:
    """All that is needed to run new rows on a layer's input without the layer."""

    name: str
    kind: str  # the class name, for people
    n_out: int
    n_in: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after, per spatial dimension
    dilation: tuple[int, ...]
    groups: int
    pad_mode: str
    channels_last: bool  # True for fully connected layers: (N, tokens, features)

    @property
    def n_in_per_group(self) -> int:
        """Input channels that one output channel sees."""
        return self.n_in // self.groups

    @property
    def taps_per_input(self) -> int:
        """Kernel offsets of one input channel."""
        return math.prod(self.kernel)

    @property
    def n_taps(self) -> int:
        """Weights of one output channel, J."""
        return self.n_in_per_group * self.taps_per_input

    def group_of(self, channel: int) -> int:
        """Return the group that an output channel belongs to."""
        return channel // (self.n_out // self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerSpec:
        """Build a LayerSpec from what `to_dict` gave, also after a way through JSON."""
        fixed = {k: tuple(values[k]) for k in ("kernel", "stride", "dilation")}
        padding = tuple((int(a), int(b)) for a, b in values["padding"])
        return cls(**{**values, **fixed, "padding": padding})


def resolve_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Find a layer by its `named_modules()` name, or the name of a given module.

    Raises:
        LayerError: the network has no such layer; the nearest names are told.
    """
    modules = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if module is layer:
                return name, module
        raise LayerError("The given module is not part of the network; pass one of its modules.")
    if layer not in modules or not layer:
        splittable = [name for name, module in modules.items() if why_not(module) is None]
        hint = nearest(layer, splittable)
        raise LayerError(
            f"The network has no layer {layer!r}.{hint} `unbraid layers` lists what can be split."
        )
    return layer, modules[layer]


def why_not(module: nn.Module) -> str | None:
    """Say why a module cannot be split, or None if it can."""
    if isinstance(module, nn.Linear):
        return None if module.in_features > 1 else "it has a single input, nothing to divide"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.in_channels == module.groups:
            return "each of its channels has a single input channel, nothing to divide"
        return None
    return "it is not a convolution or fully connected layer, so not linear in weights of its own"


def splittable_layers(model: nn.Module) -> list[LayerSpec]:
    """List the layers of a network that can be split, in its order."""
    return [describe(n, m) for n, m in model.named_modules() if why_not(m) is None]


def describe(name: str, module: nn.Module) -> LayerSpec:
    """Describe a layer that is linear in its weights.

    Raises:
        LayerError: the module is of another kind, or has a single input channel.
    """
    reason = why_not(module)
    if reason is not None:
        raise LayerError(
            f"Layer {name!r} ({type(module).__name__}) cannot be split: {reason}; "
            "`unbraid layers` lists what can."
        )
    if isinstance(module, nn.Linear):
        return LayerSpec(
            name=name,
            kind=type(module).__name__,
            n_out=module.out_features,
            n_in=module.in_features,
            kernel=(1,),
            stride=(1,),
            padding=((0, 0),),
            dilation=(1,),
            groups=1,
            pad_mode="zeros",
            channels_last=True,
        )
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return LayerSpec(
        name=name,
        kind=type(module).__name__,
        n_out=module.out_channels,
        n_in=module.in_channels,
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=_padding_pairs(module),
        dilation=tuple(module.dilation),
        groups=module.groups,
        pad_mode=module.padding_mode,
        channels_last=False,
    )


def _padding_pairs(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    if module.padding == "valid":
        return tuple((0, 0) for _ in module.kernel_size)
    if module.padding == "same":  # torch puts the odd one behind
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    assert not isinstance(module.padding, str)
    return tuple((p, p) for p in module.padding)


def weight_rows(module: nn.Module) -> Tensor:
    """Return the weights as one row per output channel, (C_out, J)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1)


def bias_of(module: nn.Module) -> Tensor:
    """Return the bias, (C_out,); zeros where the layer has none."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    return bias.detach() if isinstance(bias, Tensor) else weight.new_zeros(weight.shape[0])


def channels_first(spec: LayerSpec, x: Tensor) -> Tensor:
    """Bring a layer's input or output to (N, channels, positions ...)."""
    if not spec.channels_last:
        return x
    return x.flatten(1, -2).movedim(-1, 1) if x.dim() > 2 else x.unsqueeze(-1)


def pooled_input(spec: LayerSpec, x: Tensor) -> Tensor:
    """Sum, for every tap, the inputs that it meets over all output positions.

    A window sum separates over the spatial dimensions, and padding of any mode only says which
    input a tap meets; so one small matrix of counts per dimension does it all.

    Args:
        spec: the layer.
        x: (N, C_in, positions ...), the layer's input, channels first.

    Returns:
        (N, G, J), in units of the layer's input; float32 or wider.

    Source:
        METHOD.md sections 2 and 4; equals the gradient of the summed output by the weights.
    """
    pooled = x.to(torch.promote_types(x.dtype, torch.float32))
    for dim, size in enumerate(x.shape[2:]):
        counts = _tap_counts(spec, dim, size).to(pooled)  # (kernel, size)
        # The dimension just summed goes last, so that after all of them the taps stand in order.
        pooled = torch.tensordot(pooled, counts, dims=([2], [1]))
    return pooled.reshape(len(x), spec.groups, spec.n_taps)


def _tap_counts(spec: LayerSpec, dim: int, size: int) -> Tensor:
    """Count how often each kernel offset meets each input along one dimension, (kernel, size)."""
    line = torch.arange(1.0, size + 1)[None, None]  # 0 is left for padding with zeros
    met = F.pad(line, spec.padding[dim], mode=_PAD_MODES[spec.pad_mode])[0, 0].long()
    reach = spec.dilation[dim] * (spec.kernel[dim] - 1)
    firsts = torch.arange(0, len(met) - reach, spec.stride[dim])
    offsets = spec.dilation[dim] * torch.arange(spec.kernel[dim])
    inputs = met[offsets[:, None] + firsts]  # (kernel, output positions)
    counts = torch.zeros(spec.kernel[dim], size + 1)
    counts.scatter_add_(1, inputs, torch.ones(inputs.shape))
    return counts[:, 1:]


def tap_inputs(spec: LayerSpec, x: Tensor, group: int) -> Tensor:
    """What each tap of a group's channels meets at each output position.

    Args:
        spec: the layer.
        x: (N, C_in, positions ...), the layer's input, channels first.
        group: which group of the layer.

    Returns:
        (N, J, P); its sum over positions is the pooled input.
    """
    first = group * spec.n_in_per_group
    x = _pad(spec, x[:, first : first + spec.n_in_per_group])
    n_dims = len(spec.kernel)
    steps = tuple(slice(None, None, step) for step in spec.dilation)
    for dim in range(n_dims):
        reach = spec.dilation[dim] * (spec.kernel[dim] - 1) + 1
        x = x.unfold(2 + dim, reach, spec.stride[dim])  # windows go last
    x = x[(slice(None),) * (2 + n_dims) + steps]
    windows = range(2 + n_dims, 2 + 2 * n_dims)
    return x.permute(0, 1, *windows, *range(2, 2 + n_dims)).reshape(len(x), spec.n_taps, -1)


def _pad(spec: LayerSpec, x: Tensor) -> Tensor:
    pads = [p for pair in reversed(spec.padding) for p in pair]
    return F.pad(x, pads, mode=_PAD_MODES[spec.pad_mode]) if any(pads) else x


def respond(spec: LayerSpec, x: Tensor, rows: Tensor, bias: Tensor, channels: Tensor) -> Tensor:
    """Run new rows on a layer's input, each in the group of the channel it was made from.

    Args:
        spec: the layer.
        x: (N, C_in, positions ...), the layer's input, channels first.
        rows: (R, J), new rows.
        bias: (R,), their biases.
        channels: (R,), the output channel that each row was made from.

    Returns:
        (N, R, positions ...), channels first.
    """
    x = _pad(spec, x)
    kernels = rows.reshape(len(rows), spec.n_in_per_group, *spec.kernel)
    convolve = _CONVOLVE[len(spec.kernel)]

    def run(part: Tensor, chosen: Tensor | slice) -> Tensor:
        out: Tensor = convolve(
            part, kernels[chosen], bias[chosen], stride=spec.stride, dilation=spec.dilation
        )
        return out

    if spec.groups == 1:
        return run(x, slice(None))
    groups = channels // (spec.n_out // spec.groups)
    order, parts = [], []
    for group in groups.unique().tolist():
        chosen = (groups == group).nonzero()[:, 0]
        first = group * spec.n_in_per_group
        parts.append(run(x[:, first : first + spec.n_in_per_group], chosen))
        order.append(chosen)
    return torch.cat(parts, 1)[:, torch.cat(order).argsort()]
