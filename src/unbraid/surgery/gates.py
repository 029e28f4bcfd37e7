"""Moves of concept channels: gates that scale them, clamps that bound them; each can be taken back.

Shapes: N images, R concept channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from unbraid.base.arguments import real_number
from unbraid.base.errors import UsageError


class Movable(Protocol):
    """A layer whose concept channels can be moved."""

    moves: list[Move]  # in force, in the order in which they were made


class Move:
    """A concept channel that was moved; `remove()` or leaving its `with` block moves it back."""

    def __init__(self, layer: Movable, row: int) -> None:
        """Move one row of a layer."""
        self.row = row
        self._layer = layer  # not its list, in whose place exporters put another
        layer.moves.append(self)

    def remove(self) -> None:
        """Take this move back; moves of the same concept channel still in force stay so."""
        if self in self._layer.moves:
            self._layer.moves.remove(self)

    def __enter__(self) -> Self:
        """Use the move as a context."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Move the concept channel back, also after an exception."""
        self.remove()


class Gate(Move):
    """Scales a concept channel, by one value for all images or by one for each."""

    def __init__(self, layer: Movable, row: int, value: float | Tensor) -> None:
        """Move the gate of one row.

        Raises:
            UsageError: the value is neither a number nor one number per image.
        """
        if isinstance(value, Tensor):
            if value.dim() > 1:
                raise UsageError(
                    f"A gate takes a number, or a tensor (N,) of one per image, not one of shape "
                    f"{tuple(value.shape)}."
                )
        else:
            value = real_number("The value of a gate", value)
            if value != value:
                raise UsageError("A gate cannot be NaN; give a number, such as 0 for off.")
        self.value = value
        super().__init__(layer, row)


class Clamp(Move):
    """Bounds what a concept channel answers, position by position."""

    def __init__(self, layer: Movable, row: int, low: float, high: float) -> None:
        """Bound one row.

        Raises:
            UsageError: low is not below or at high.
        """
        self.low, self.high = real_number("low", low), real_number("high", high)
        if not self.low <= self.high:  # so that NaN does not pass
            raise UsageError(f"A clamp needs low <= high, not low={low:g} and high={high:g}.")
        super().__init__(layer, row)


def make_moves(concepts: Tensor, moves: Sequence[Move], n_rows: int, n_behind: int) -> Tensor:
    """Do to the concept channels what the moves say; of one channel, the latest counts.

    Nothing is written in place and no size is asked for that can be known otherwise, so that
    tracers can follow.

    Args:
        concepts: (N, R, positions ...), or with R last.
        moves: in the order in which they were made.
        n_rows: R.
        n_behind: dimensions behind R.

    Raises:
        UsageError: a gate holds values for another number of images.
    """
    n_images = concepts.shape[0]  # not len(), which an exporter would take for a constant
    behind = [1] * n_behind
    latest = {move.row: move for move in moves}.values()
    gates = [move for move in latest if isinstance(move, Gate)]
    clamps = [move for move in latest if isinstance(move, Clamp)]
    if gates:
        apart = any(isinstance(gate.value, Tensor) and gate.value.dim() for gate in gates)
        n_scales = n_images if apart else 1
        scale = concepts.new_ones(n_scales, n_rows)
        for gate in gates:
            value = _by_image(gate.value, n_images).to(scale).expand(n_scales)
            scale = torch.select_scatter(scale, value, 1, gate.row)
        between = [1] * (concepts.dim() - 2) if apart and not behind else []
        concepts = concepts * scale.view(-1, *between, n_rows, *behind)
    if clamps:
        low, high = [-torch.inf] * n_rows, [torch.inf] * n_rows
        for clamp in clamps:
            low[clamp.row], high[clamp.row] = clamp.low, clamp.high
        bounds = (
            torch.tensor(bound, dtype=torch.float64, device="cpu").to(concepts).view(-1, *behind)
            for bound in (low, high)
        )
        concepts = concepts.clamp(*bounds)
    return concepts


def _by_image(value: float | Tensor, n_images: int) -> Tensor:
    """A gate's value for each of what a layer runs on: images, or parts of them."""
    values = value
    if not isinstance(values, Tensor):
        values = torch.tensor(value, dtype=torch.float64, device="cpu")  # whatever the default is
    if values.shape not in ((), (n_images,)):
        raise UsageError(
            f"A gate holds values for {len(values)} images and the layer runs on {n_images}, "
            "windows of images perhaps; give one value for each, or one number for all."
        )
    return values
