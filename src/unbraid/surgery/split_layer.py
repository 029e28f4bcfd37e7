"""A layer with concept channels beside it, equal to the original bit for bit; gates and clamps.

Nothing branches on values, so that it can be traced, compiled and exported. N images, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbraid.base.arguments import real_number, whole_number
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.finding.membership import Clusters
from unbraid.networks.copying import unwrap, unwrapped_name
from unbraid.networks.layers import weight_rows
from unbraid.networks.spec import LayerSpec, respond
from unbraid.splitting.splits import ChannelSplit

_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


class SplitLayer(nn.Module):
    """A layer with concept channels beside it; R rows are all concept channels, then residuals."""

    def __init__(self, original: nn.Module, spec: LayerSpec, parts: Sequence[ChannelSplit]) -> None:
        """Build the new rows in the kind and place of the original's weights."""
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
        self.moves: list[Move] = []  # in force, in the order in which they were made
        self.register_forward_pre_hook(_keep_slow_path)
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

    def forward(self, input: Tensor) -> Tensor:
        """Compute the original output, by way of the concept channels.

        While nothing intervenes, the correction is zero in value and alive in gradient. It is minus
        (detached minus live), since adding minus zero keeps even the sign of a zero.
        """
        z: Tensor = self.original(input)
        dim = -1 if self.spec.channels_last else 1
        n_concepts, n_residuals = len(self.names), len(self.channels)
        if self.spec.channels_last:
            new = F.linear(input, self.rows, self.row_bias)
        else:
            new = respond(self.spec, input, self.rows, self.row_bias, self._row_channels)
        concepts, changed = _pass(self.concepts, new.narrow(dim, 0, n_concepts))
        residuals, changed_too = _pass(self.residuals, new.narrow(dim, n_concepts, n_residuals))
        if self.moves:
            n_behind = 0 if self.spec.channels_last else len(self.spec.kernel)
            concepts = make_moves(concepts, self.moves, n_concepts, n_behind)
        correction = (-z.index_select(dim, self.channels) - residuals).index_add(
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


def _keep_slow_path(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing, as a hook: torch's fused transformer reads a hookless layer's weights past it."""


@in_plain_modes
def gate(
    model: nn.Module, layer: str | nn.Module, channel: int, concept: int, value: float | Tensor
) -> Move:
    """Scale a concept channel of a split network; a split network has this as its method.

    Of several moves of a concept channel, gates or clamps, the latest counts until it is removed.

    Args:
        model: from `apply` in the exact form.
        layer: the split layer, by name or itself.
        channel: a split channel.
        concept: 0 to K - 1.
        value: 0 switches off, 1 leaves as it is; a tensor (N,) has one value per image.

    Returns:
        A handle; `remove()` or the end of its `with` block moves the gate back.

    Raises:
        UsageError: there is no such concept channel, or the value is none.
    """
    row = _find_row(model, layer, channel, concept)
    if not isinstance(value, Tensor):
        value = real_number("The value of a gate", value)
        if math.isnan(value):
            raise UsageError("A gate cannot be NaN; give a number, such as 0 for off.")
    elif value.dim() > 1:
        raise UsageError(
            f"A gate takes a number, or a tensor (N,) of one per image, not one of shape "
            f"{tuple(value.shape)}."
        )
    return Move(*row, value)


@in_plain_modes
def clamp(
    model: nn.Module,
    layer: str | nn.Module,
    channel: int,
    concept: int,
    low: float = -math.inf,
    high: float = math.inf,
) -> Move:
    """Bound a concept channel of a split network; a split network has this as its method.

    Args:
        model: from `apply` in the exact form.
        layer: the split layer, by name or itself.
        channel: a split channel.
        concept: 0 to K - 1.
        low: lower bound at every position, in units of the pre-activation.
        high: upper bound likewise; equal to `low` it fixes the value.

    Returns:
        A handle; `remove()` or the end of its `with` block takes the bounds away.

    Raises:
        UsageError: there is no such concept channel, or low is above high.
    """
    row = _find_row(model, layer, channel, concept)
    low, high = real_number("low", low), real_number("high", high)
    if not low <= high:  # so that NaN does not pass
        raise UsageError(f"A clamp needs low <= high, not low={low:g} and high={high:g}.")
    return Move(*row, low=low, high=high)


def _find_row(
    model: nn.Module, layer: str | nn.Module, channel: int, concept: int
) -> tuple[SplitLayer, int]:
    model = unwrap(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    module: object = layer
    if isinstance(layer, str):
        module = modules.get(layer, modules.get(unwrapped_name(layer)))
    if isinstance(module, nn.Module):
        module = unwrap(module)  # of a layer compiled by itself
    if not isinstance(module, SplitLayer):
        known = ", ".join(name for name, m in modules.items() if isinstance(m, SplitLayer))
        given = repr(layer) if isinstance(layer, str) else f"of type {type(layer).__name__}"
        if known:
            raise UsageError(f"Layer {given} has no concept channels; name one of {known}.")
        raise UsageError(
            "The network has no concept channels; pass one from unbraid.apply in its exact form."
        )
    name = f"{whole_number('channel', channel)}.{whole_number('concept', concept)}"
    if name not in module.names:
        raise UsageError(
            f"Layer {layer!r} has no concept {concept} of channel {channel}; it has "
            f"{', '.join(module.names[:20])}{' ...' if len(module.names) > 20 else ''}."
        )
    return module, module.names.index(name)


class Move:
    """A concept channel that was moved; `remove()` or leaving its `with` block moves it back."""

    def __init__(
        self,
        layer: SplitLayer,
        row: int,
        value: float | Tensor | None = None,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> None:
        """Scale one row by a number, or by one per image, (N,); or bound it at every position."""
        self.row, self.value, self.low, self.high = row, value, low, high
        self._layer = layer  # not its list, in whose place exporters put another
        layer.moves.append(self)

    def remove(self) -> None:
        """Take this move back; moves of the same concept channel still in force stay so."""
        if self in self._layer.moves:
            self._layer.moves.remove(self)

    def __enter__(self) -> Self:
        """Use the move as a context."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Move the concept channel back, also after an exception."""
        self.remove()


def make_moves(concepts: Tensor, moves: Sequence[Move], n_rows: int, n_behind: int) -> Tensor:
    """Do to concept channels (N, R, positions ...) what the moves say; the latest of each counts.

    Nothing is written in place and no size is asked for that can be known otherwise, for tracers.
    """
    n_images = concepts.shape[0]  # not len(), which an exporter would take for a constant
    behind = [1] * n_behind
    latest = {move.row: move for move in moves}.values()
    gates = [(move.row, move.value) for move in latest if move.value is not None]
    clamps = [move for move in latest if move.value is None]
    if gates:
        per_image = any(isinstance(value, Tensor) and value.dim() for _, value in gates)
        n_scales = n_images if per_image else 1
        scale = concepts.new_ones(n_scales, n_rows)
        for row, value in gates:
            values = _gate_values(value, n_images).to(scale).expand(n_scales)
            scale = torch.select_scatter(scale, values, 1, row)
        between = [1] * (concepts.dim() - 2) if per_image and not behind else []
        concepts = concepts * scale.view(-1, *between, n_rows, *behind)
    if clamps:
        low, high = [-torch.inf] * n_rows, [torch.inf] * n_rows
        for clamp in clamps:
            low[clamp.row], high[clamp.row] = clamp.low, clamp.high
        bounds = (_on_processor(bound).to(concepts).view(-1, *behind) for bound in (low, high))
        concepts = concepts.clamp(*bounds)
    return concepts


def _gate_values(value: float | Tensor, n_images: int) -> Tensor:
    values = value if isinstance(value, Tensor) else _on_processor(value)
    if values.shape not in ((), (n_images,)):
        raise UsageError(
            f"A gate holds values for {len(values)} images and the layer runs on {n_images}, "
            "windows of images perhaps; give one value for each, or one number for all."
        )
    return values


def _on_processor(values: float | list[float]) -> Tensor:
    """A tensor that is the same whatever torch's defaults are."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")
