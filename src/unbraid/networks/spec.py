"""A layer that is linear in its weights: its pooled inputs, and new rows beside its own.

Every such layer is seen as a convolution: a fully connected one has kernel 1, and its positions are
its tokens; a transposed one meets its input with zeros between, by kernels that are flipped.
Shapes: N images, C_out and C_in channels, G groups, J = C_in / G * kernel taps of one channel, P
output positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.base.schema import in_range

SAME = "same"  # a padding mode: zeros, as many as the input's size asks for, as in TensorFlow
TRANSPOSED = "transposed"  # one of transposed convolutions: stride - 1 zeros between inputs too

_PAD_MODES = {"zeros": "constant", SAME: "constant", TRANSPOSED: "constant"} | {
    mode: mode for mode in ("reflect", "replicate", "circular")
}
SAMPLED_IMAGES = 50  # of a scan, whose tap inputs are kept at some positions
_SAMPLED_POSITIONS = 64  # of each
_SAMPLED_NUMBERS = 2**24  # of all: 64 MiB in float32
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVOLVE_BACK = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MOST = 2**24  # channels, or any other number of a layer


@dataclass(frozen=True)
class LayerSpec:
    """All that is needed to run new rows on a layer's input without the layer."""

    name: str
    kind: str  # the class name, for people
    n_out: int
    n_in: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]  # if TRANSPOSED, how far inputs lie apart
    padding: tuple[tuple[int, int], ...]  # before and after, per spatial dimension; unless SAME
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

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.pad_mode == TRANSPOSED

    @property
    def reaches(self) -> tuple[int, ...]:
        """How far a kernel's last tap lies from its first, in each dimension."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    def group_of(self, channel: int) -> int:
        """Return the group that an output channel belongs to."""
        return channel // (self.n_out // self.groups)

    def pads(self, dim: int, size: int) -> tuple[int, int]:
        """Return the padding before and after one dimension of an input of a size."""
        if self.pad_mode != SAME:
            return self.padding[dim]
        reach, stride = self.reaches[dim], self.stride[dim]
        total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
        return total // 2, total - total // 2

    def size_behind(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the size of a transposed convolution's output, by that of its input."""
        whole = zip(sizes, self.stride, self.padding, self.reaches, strict=True)
        return tuple((n - 1) * step + 1 + sum(pads) - reach for n, step, pads, reach in whole)

    def check(self) -> None:
        """Raise ValueError unless there can be such a layer."""
        sizes = {"kernel": self.kernel, "stride": self.stride, "dilation": self.dilation}
        counts = {"n_out": (self.n_out,), "n_in": (self.n_in,), "groups": (self.groups,)}
        if len(self.kernel) not in _CONVOLVE or any(
            len(numbers) != len(self.kernel) for numbers in (*sizes.values(), self.padding)
        ):
            raise ValueError("kernel, stride, padding and dilation are not of one to three numbers")
        for name, numbers in (sizes | counts).items():
            for number in numbers:
                in_range(name, number, 1, _MOST)
        for number in (n for pair in self.padding for n in pair):
            in_range("padding", number, -_MOST, _MOST)
        if self.n_in % self.groups or self.n_out % self.groups:
            raise ValueError("the channels cannot be divided among the groups")
        if self.pad_mode not in _PAD_MODES:
            raise ValueError("pad_mode is none that is known")
        if self.channels_last and self.kernel != (1,):
            raise ValueError("a fully connected layer has kernel 1")
        if self.transposed:
            by_dim = zip(self.padding, self.reaches, self.stride, self.dilation, strict=True)
            for (before, after), reach, stride, dilation in by_dim:
                if before > reach or not 0 <= after - before < max(stride, dilation):
                    raise ValueError("no transposed convolution has such a padding")


def widen(x: Tensor) -> Tensor:
    """Bring numbers of half precision to float32, in which they are summed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def channels_first(spec: LayerSpec, x: Tensor) -> Tensor:
    """Bring a layer's input or output to (N, channels, positions ...)."""
    if not spec.channels_last:  # of a single image a convolution may lack the first dimension
        return x if x.dim() > 1 + len(spec.kernel) else x[None]
    if x.dim() == 1:  # of a single image, whose N was left out
        x = x[None]
    return x.flatten(1, -2).movedim(-1, 1) if x.dim() > 2 else x.unsqueeze(-1)


def pooled_input(spec: LayerSpec, x: Tensor) -> Tensor:
    """Sum what each tap meets over all output positions, (N, G, J); docs/method.md, "One layer".

    It equals the gradient of the summed output by the weights. A window sum separates over the
    spatial dimensions, and padding of any mode only says which input a tap meets; so one small
    matrix of counts per dimension does it all. `x` is (N, C_in, positions ...), channels first.
    """
    pooled = widen(x)
    counted = [_tap_counts(spec, dim, size).to(pooled) for dim, size in enumerate(x.shape[2:])]
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):  # without a copy
        rows, columns = counted
        lying = pooled.movedim(1, -1)  # (N, rows, columns, C_in) as it lies in memory
        summed = (rows @ lying.flatten(2)).unflatten(2, lying.shape[2:])
        pooled = (columns @ summed).movedim(-1, 1)
    else:
        for counts in counted:  # (kernel, size)
            # What was just summed goes last, so that after all dimensions taps stand in order.
            pooled = torch.tensordot(pooled, counts, dims=([2], [1]))
    return pooled.reshape(len(x), spec.groups, spec.n_taps)


def _tap_counts(spec: LayerSpec, dim: int, size: int) -> Tensor:
    """Count how often each kernel offset meets each input along one dimension, (kernel, size)."""
    line = torch.arange(1, size + 1, dtype=torch.float64)  # 0 stands for padding with zeros
    step = spec.stride[dim]
    if spec.transposed:
        line, step = _apart(line, 0, step), 1
    met = F.pad(line[None, None], spec.pads(dim, size), mode=_PAD_MODES[spec.pad_mode])[0, 0].long()
    firsts = torch.arange(0, len(met) - spec.reaches[dim], step, dtype=torch.int64)
    offsets = spec.dilation[dim] * torch.arange(spec.kernel[dim], dtype=torch.int64)
    offsets = offsets.flip(0) if spec.transposed else offsets
    inputs = met[offsets[:, None] + firsts]  # (kernel, output positions)
    counts = torch.zeros(spec.kernel[dim], size + 1, dtype=torch.float32)
    counts.scatter_add_(1, inputs, torch.ones_like(inputs, dtype=torch.float32))
    return counts[:, 1:]


def most_spread(spec: LayerSpec) -> int:
    """How many tap inputs at some positions a scan keeps at most."""
    n_numbers = SAMPLED_IMAGES * spec.groups * spec.n_taps
    return min(_SAMPLED_POSITIONS * n_numbers, max(_SAMPLED_NUMBERS, n_numbers))


def tap_inputs(spec: LayerSpec, x: Tensor, group: int) -> Tensor:
    """What each tap of a group's channels meets at each position, (N, J, P); the sum is pooled."""
    x = _flipped(spec, _windows(spec, _inputs_of(spec, x, group)))
    n_dims = len(spec.kernel)
    windows = range(2 + n_dims, 2 + 2 * n_dims)
    return x.permute(0, 1, *windows, *range(2, 2 + n_dims)).reshape(len(x), spec.n_taps, -1)


def spread_inputs(spec: LayerSpec, calls: Sequence[Tensor], pooled: Tensor) -> Tensor:
    """Tap inputs less their image's mean, at positions spread evenly over the image's.

    `calls` are inputs of the layer, (N * parts, C_in, positions ...), `pooled` (N, G, J) the sums
    over all of their positions, in the order of calls, parts and positions. The result is
    (N, M, G, J): 64 positions or what there are, fewer of a layer of very many taps, and none if
    there is but one.
    """
    if not len(pooled):
        return pooled[:, None]
    n_dims = len(spec.kernel)
    # (N, parts, output positions ..., channels, kernel offsets ...)
    met = [
        _windows(spec, widen(x)).unflatten(0, (len(pooled), -1)).movedim(2, 2 + n_dims)
        for x in calls
    ]
    sizes = [math.prod(x.shape[1 : 2 + n_dims]) for x in met]
    n_positions, n_numbers = sum(sizes), SAMPLED_IMAGES * spec.groups * spec.n_taps
    most = max(1, min(_SAMPLED_POSITIONS, n_positions, _SAMPLED_NUMBERS // n_numbers))
    n = most if n_positions > 1 else 0
    chosen = torch.arange(n, dtype=torch.int64, device=pooled.device) * n_positions // max(n, 1)
    taken = []
    for x, size, end in zip(met, sizes, accumulate(sizes), strict=True):
        own = chosen[(end - size <= chosen) & (chosen < end)] - (end - size)
        at = torch.unravel_index(own, x.shape[1 : 2 + n_dims])
        inputs = _flipped(spec, x[(slice(None), *at)])
        taken.append(inputs.reshape(len(pooled), len(own), *pooled.shape[1:]))
    # On the processor, as not every device knows float64.
    mean = pooled.cpu().double() / n_positions
    spread: Tensor = (torch.cat(taken, 1).cpu().double() - mean[:, None]).to(pooled.dtype)
    return spread


def inputs_at(
    spec: LayerSpec, calls: Sequence[Tensor], n_images: int, image: Tensor, position: Tensor
) -> Tensor:
    """What taps meet at some positions of some images, (M,) each, as (M, G, J) on the processor.

    `calls` are as in `spread_inputs`, and positions counted in that order.
    """
    n_dims, end = len(spec.kernel), 0
    met = torch.empty(len(image), spec.groups, spec.n_taps, dtype=widen(calls[0][:0]).dtype)
    for call in calls:
        # (N, parts, output positions ..., channels, kernel offsets ...)
        x = _windows(spec, widen(call)).unflatten(0, (n_images, -1)).movedim(2, 2 + n_dims)
        sizes = x.shape[1 : 2 + n_dims]
        start, end = end, end + math.prod(sizes)
        own = (position >= start) & (position < end)
        at = torch.unravel_index((position[own] - start).to(x.device), sizes)
        taken = _flipped(spec, x[(image[own].to(x.device), *at)])
        met[own] = taken.reshape(len(taken), spec.groups, spec.n_taps).cpu()
    return met


def _windows(spec: LayerSpec, x: Tensor) -> Tensor:
    """A view of what kernels meet, (N, channels, output positions ..., kernel offsets ...).

    Of a transposed layer it is yet to be flipped, which copies, so that it goes by what is taken.
    """
    n_dims = len(spec.kernel)
    for dim in range(n_dims) if spec.transposed else ():
        x = _apart(x, 2 + dim, spec.stride[dim])
    x = pad_input(spec, x)
    for dim in range(n_dims):  # windows go last
        x = x.unfold(2 + dim, spec.reaches[dim] + 1, 1 if spec.transposed else spec.stride[dim])
    steps = tuple(slice(None, None, step) for step in spec.dilation)
    return x[(slice(None),) * (2 + n_dims) + steps]


def _flipped(spec: LayerSpec, taken: Tensor) -> Tensor:
    """Put kernel offsets, the last dimensions, in the order of the layer's weights."""
    return taken.flip(*range(-len(spec.kernel), 0)) if spec.transposed else taken


def _apart(x: Tensor, dim: int, step: int) -> Tensor:
    """Put step - 1 zeros between what stands along a dimension."""
    size = list(x.shape)
    size[dim] = (size[dim] - 1) * step + 1
    apart = x.new_zeros(size)
    apart[(slice(None),) * dim + (slice(None, None, step),)] = x
    return apart


def pad_input(spec: LayerSpec, x: Tensor) -> Tensor:
    """Pad an input, (N, channels, positions ...), as the layer does."""
    pairs = list(spec.padding)
    if spec.pad_mode == SAME:  # else no size is asked for, which a tracer does not know
        pairs = [spec.pads(dim, size) for dim, size in enumerate(x.shape[2:])]
    pads = [p for pair in reversed(pairs) for p in pair]
    return F.pad(x, pads, mode=_PAD_MODES[spec.pad_mode]) if any(pads) else x


def respond(
    spec: LayerSpec, x: Tensor, rows: Tensor, bias: Tensor, channels: Sequence[int]
) -> Tensor:
    """Run rows (R, J) on a layer's input, each in the group of the channel it was made from.

    Input and output are (N, C_in or R, positions ...), channels first.
    """
    convolve = partial(_CONVOLVE[len(spec.kernel)], stride=spec.stride, dilation=spec.dilation)
    if spec.transposed:
        beside = [
            reach - before for reach, (before, _) in zip(spec.reaches, spec.padding, strict=True)
        ]
        more = [after - before for before, after in spec.padding]
        convolve = partial(
            _CONVOLVE_BACK[len(spec.kernel)],
            stride=spec.stride,
            dilation=spec.dilation,
            padding=beside,
            output_padding=more,
        )
    else:
        x = pad_input(spec, x)
    if spec.groups == 1:
        return convolve(x, as_weight(spec, rows), bias)
    members: dict[int, list[int]] = {}
    for row, channel in enumerate(channels):
        members.setdefault(spec.group_of(channel), []).append(row)
    parts = [
        convolve(_inputs_of(spec, x, group), as_weight(spec, rows[chosen], 1), bias[chosen])
        for group, chosen in members.items()
    ]
    order = [row for chosen in members.values() for row in chosen]
    return torch.cat(parts, 1)[:, sorted(range(len(order)), key=order.__getitem__)]


def as_weight(spec: LayerSpec, rows: Tensor, groups: int | None = None) -> Tensor:
    """Rows (R, J), in order of so many groups, the layer's by default, as torch takes weights.

    They are (R, C_in / G, kernel ...), of a transposed convolution (C_in, R / G, kernel ...).
    """
    kernels = rows.reshape(-1, spec.n_in_per_group, *spec.kernel)
    if not spec.transposed:
        return kernels
    by_group: Tensor = kernels.unflatten(0, (spec.groups if groups is None else groups, -1))
    return by_group.transpose(1, 2).flatten(0, 1)


def as_rows(spec: LayerSpec, weight: Tensor) -> Tensor:
    """Weights of a layer as torch holds them, as one row per output channel, (C_out, J)."""
    if spec.transposed:
        weight = weight.unflatten(0, (spec.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _inputs_of(spec: LayerSpec, x: Tensor, group: int) -> Tensor:
    first = group * spec.n_in_per_group
    return x[:, first : first + spec.n_in_per_group]
