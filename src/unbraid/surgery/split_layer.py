"""A layer with concept channels beside it, equal to the original bit for bit.

METHOD.md section 4 gives the reasons. There is no branch on values in here, so that the layer can
be traced, compiled and exported, and an accelerator need not be waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbraid.finding.membership import Clusters
from unbraid.networks.layers import weight_rows
from unbraid.networks.spec import LayerSpec, respond
from unbraid.splitting.splits import ChannelSplit
from unbraid.surgery.gates import Move, make_moves


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

        While nothing intervenes, the correction is zero in value and alive in gradient. It is
        minus (detached minus live), since adding minus zero keeps even the sign of a zero.
        """
        z: Tensor = self.original(input)
        dim = -1 if self.spec.channels_last else 1
        n_concepts, n_residuals = len(self.names), len(self.channels)
        new = self._respond(input)
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
            alive = torch.stack([self._trained(), *changed, *changed_too]).any()
            correction = torch.where(alive, correction, without_value)
        # On a copy, which keeps the memory format that the layers behind may round by.
        return z.clone().index_add_(dim, self.channels, correction)

    def _respond(self, x: Tensor) -> Tensor:
        if self.spec.channels_last:
            return F.linear(x, self.rows, self.row_bias)
        return respond(self.spec, x, self.rows, self.row_bias, self._row_channels)

    def _trained(self) -> Tensor:
        """Whether the rows are no longer those that were made to add up to the original, ()."""
        trained: Tensor = (self._rows_and_bias() != self.made).any()
        return trained

    def _rows_and_bias(self) -> Tensor:
        """Both in one, (R, J + 1)."""
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
    return bool(
        type(point) is not nn.Identity
        or "forward" in vars(point)
        or point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def _keep_slow_path(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing, as a hook: torch's fused transformer reads a hookless layer's weights past it."""
