"""A layer with concept channels beside it, equal to the original bit for bit.

Nothing branches on values, so that it can be traced, compiled and exported. N images, R rows.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbraid.base.errors import UsageError
from unbraid.finding.membership import Clusters
from unbraid.networks.layers import bias_of, weight_rows
from unbraid.networks.spec import SAME, LayerSpec, as_weight, pad_input, respond
from unbraid.splitting.splits import ChannelSplit

_PLAIN_FORM = ("wide", "merge", "names")  # what a layer in the plain form has
_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


class SplitLayer(nn.Module):
    """A layer with concept channels beside it; R rows are all concept channels, then residuals."""

    def __init__(  # noqa: D107
        self, original: nn.Module, spec: LayerSpec, parts: Sequence[ChannelSplit]
    ) -> None:
        super().__init__()
        like = weight_rows(original)
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
        self.class_names: tuple[str, ...] = ()  # of classes and clusters, by number
        self.quantiles = {p.channel: p.quantiles for p in parts if p.quantiles is not None}
        self.moves: list[Move] = []  # in force, in the order in which they were made
        self.register_forward_pre_hook(keep_slow_path)
        owners = [n for n, p in enumerate(parts) for _ in p.concepts]  # of concepts, among parts
        self._row_channels = [parts[n].channel for n in owners] + [p.channel for p in parts]
        for name, values in (("channels", [p.channel for p in parts]), ("owners", owners)):
            self.register_buffer(
                name, torch.tensor(values, dtype=torch.int64, device=like.device), persistent=False
            )
        self.register_buffer("made", self._rows_and_bias(), persistent=False)

    def __getattr__(self, name: str) -> Any:
        """Give what the surrounding code may ask of the layer, such as `weight` or `stride`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original" or name.startswith("__"):
                raise  # how to be copied, say, is not the original's to answer
            return getattr(self.original, name)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Compute the original output, by way of the concept channels.

        While nothing intervenes, the correction is zero in value and alive in gradient. It is minus
        (detached minus live), since adding minus zero keeps even the sign of a zero.
        """
        if _is_single(self.spec, input):
            return self.forward(input[None], output_size)[0]
        # Transposed convolutions alone take a size, that of the layer's own padding.
        z: Tensor = self.original(input, *(() if output_size is None else (output_size,)))
        dim = -1 if self.spec.channels_last else 1
        n_concepts, n_residuals = len(self.names), len(self.channels)
        if self.spec.channels_last:
            new = F.linear(input, self.rows, self.row_bias)
        else:
            new = respond(self.spec, input, self.rows, self.row_bias, self._row_channels)
        concepts, changed = _pass(self.concepts, new.narrow(dim, 0, n_concepts))
        residuals, changed_too = _pass(self.residuals, new.narrow(dim, n_concepts, n_residuals))
        concepts = make_moves(concepts, self.moves, dim, range(n_concepts))
        rests = make_moves(-residuals, self.moves, dim, range(n_concepts, n_concepts + n_residuals))
        correction = (rests - z.index_select(dim, self.channels)).index_add(
            dim, self.owners, concepts
        )
        if not self.moves:
            without_value = -(correction.detach() - correction)
            trained = (self._rows_and_bias() != self.made).any()  # since they were made
            alive = torch.stack([trained, *changed, *changed_too]).any()
            correction = torch.where(alive, correction, without_value)
        # On a copy, which keeps the memory format that the layers behind may round by.
        return z.clone().index_add_(dim, self.channels, correction)

    def _rows_and_bias(self) -> Tensor:
        return torch.cat([self.rows.detach(), self.row_bias.detach()[:, None]], 1)


def _is_single(spec: LayerSpec, x: Tensor) -> bool:
    """Whether this is an image without a first dimension; of torch.fx's stand-ins nobody knows."""
    return isinstance(x, Tensor) and not spec.channels_last and x.dim() == 1 + len(spec.kernel)


def is_split(module: nn.Module) -> bool:
    """Whether a module is a split layer, in the exact or in the plain form."""
    plain = isinstance(module, nn.Sequential) and all(hasattr(module, n) for n in _PLAIN_FORM)
    return plain or isinstance(module, SplitLayer)


def split_layer_of(model2: nn.Module, name: str | None, purpose: str) -> SplitLayer:
    """Find the split layer of a network that has one, or the named one; UsageError if none is."""
    layers = {n: module for n, module in model2.named_modules() if isinstance(module, SplitLayer)}
    if not layers:
        raise UsageError(
            f"The network has no concept channels to {purpose}; pass one from unbraid.apply in its "
            "exact form."
        )
    if name is None and len(layers) == 1:
        (name,) = layers
    if name not in layers:
        problem = "Several layers are split" if name is None else f"Layer {name!r} is not split"
        raise UsageError(f"{problem}; name one of {', '.join(map(repr, layers))} in layer.")
    return layers[name]


def _pass(point: nn.Module, values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Send values through a hook point; say, where something may change them, whether it did."""
    hooked = _hooked(point)
    before = values.detach().clone() if hooked else values  # a hook may write into them
    after: Tensor = point(values)
    if not hooked:
        return after, []
    same = (before == after) | (before.isnan() & after.isnan())
    return after, [~same.all()]


def _hooked(point: nn.Module) -> bool:
    """Whether anything but torch's own identity would see the values."""
    everywhere = nn.modules.module
    return (
        type(point) is not nn.Identity
        or "forward" in vars(point)
        or any(getattr(point, f"_{kind}") for kind in _HOOKS)
        or any(getattr(everywhere, f"_global_{kind}") for kind in _HOOKS)
    )


def keep_slow_path(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing, as a hook: torch's fused transformer reads a hookless layer's weights past it."""


class Move:
    """A channel that was moved; `remove()` or leaving its `with` block moves it back."""

    def __init__(
        self,
        layer: SplitLayer,
        row: int,
        value: float | Tensor | None = None,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> None:
        """Scale one row by a number, or by one per image, (N,); or bound it at every position.

        The row of a residual stands for the rest channel, which has the other sign.
        """
        self.row, self.value, self.low, self.high = row, value, low, high
        self._layer = layer  # not its list, in whose place exporters put another
        layer.moves.append(self)

    def remove(self) -> None:
        """Take this move back; moves of the same channel still in force stay so."""
        if self in self._layer.moves:
            self._layer.moves.remove(self)

    def __enter__(self) -> Self:
        """Use the move as a context."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Move the channel back, also after an exception."""
        self.remove()


def make_moves(values: Tensor, moves: Sequence[Move], dim: int, rows: range) -> Tensor:
    """Do to some rows' values (N, R, positions ...) what the moves say; the latest of each counts.

    Nothing is written in place and no size is asked for that can be known otherwise, for tracers.
    """
    for move in {move.row: move for move in moves if move.row in rows}.values():
        place = move.row - rows.start
        z = values.select(dim, place)
        moved = z.clamp(move.low, move.high) if move.value is None else _scale(z, move.value)
        values = torch.select_scatter(values, moved, dim, place)
    return values


def _scale(z: Tensor, value: float | Tensor) -> Tensor:
    """Multiply a channel, (N, positions ...), by a number, or by one per image, (N,)."""
    if not isinstance(value, Tensor):  # a tensor that is the same whatever torch's defaults are
        value = torch.tensor(value, dtype=torch.float64, device="cpu")
    if value.dim() and value.shape != z.shape[:1]:
        raise UsageError(
            f"A gate holds values for {len(value)} images and the layer runs on {z.shape[0]}, "
            "windows of images perhaps; give one value for each, or one number for all."
        )
    factor = value.to(z)
    return z * (factor.view(-1, *[1] * (z.dim() - 1)) if value.dim() else factor)


# The plain form: the same split made of two standard layers, for exporters and other tools.

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class _Row(NamedTuple):
    name: str
    channel: int  # that it is merged into
    weight: Tensor  # (J,)
    bias: float
    sign: float = 1.0  # in the merge


class Pad(nn.Module):
    """The padding of a layer that pads in a way of its own."""

    def __init__(self, spec: LayerSpec) -> None:  # noqa: D107
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
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
        weight = wide.weight.new_zeros(len(rows), spec.n_taps)
        for weights in (wide.bias, merge.weight):
            weights.zero_()
        for n, row in enumerate(rows):
            if row is not None:
                weight[n] = row.weight
                wide.bias[n] = row.bias
                merge.weight[row.channel, n] = row.sign
        wide.weight.copy_(as_weight(spec, weight).reshape(wide.weight.shape))
    modules: list[tuple[str, nn.Module]] = [("pad", Pad(spec))] if pads else []
    layer = nn.Sequential(OrderedDict([*modules, ("wide", wide), ("merge", merge)]))
    layer.names = [row.name if row else "" for row in rows]  # type: ignore[assignment]
    if isinstance(original, nn.Linear):  # for code that asks for them, to apply them by itself
        for name in ("weight", "bias"):
            value: Tensor | None = getattr(original, name)
            own = None if value is None else value.detach()
            layer.register_buffer(name, own, persistent=False)
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
    like: dict[str, Any] = {"dtype": rows.dtype, "device": rows.device}
    if spec.channels_last:
        wide = nn.Linear(spec.n_in, n_rows, **like)
        return [wide, nn.Linear(n_rows, spec.n_out, bias=False, **like)]
    kind = _CONVOLUTIONS[len(spec.kernel)]
    padding, mode = (0, "zeros") if pads else (original.padding, spec.pad_mode)
    merge = kind(n_rows, spec.n_out, 1, bias=False, **like)
    if spec.transposed:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        how = {name: getattr(original, name) for name in names}
        kind = _TRANSPOSED[len(spec.kernel)]
        return [kind(spec.n_in, n_rows, spec.kernel, **how, **like), merge]
    shape = (spec.kernel, spec.stride, padding, spec.dilation, spec.groups)
    return [kind(spec.n_in, n_rows, *shape, padding_mode=mode, **like), merge]
