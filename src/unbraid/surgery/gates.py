"""Gates and clamps, which switch concept channels off, scale and bound them; each can be undone.

The rest of a channel, what no concept names, is moved like a concept channel.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from unbraid.base.arguments import real_number, whole_number
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.networks.copying import unwrap, unwrapped_name
from unbraid.surgery.split_layer import Move, SplitLayer

_REST = "rest"


@in_plain_modes
def gate(
    model: nn.Module,
    layer: str | nn.Module,
    channel: int,
    concept: int | Literal["rest"],
    value: float | Tensor,
) -> Move:
    """Scale a concept channel of a split network; a split network has this as its method.

    Of several moves of a concept channel, gates or clamps, the latest counts until it is removed.
    With the rest off, a channel is the sum of its concept channels.

    Args:
        model: from `apply` in the exact form.
        layer: the split layer, by name or itself.
        channel: a split channel.
        concept: 0 to K - 1, or "rest" for what no concept names.
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
    concept: int | Literal["rest"],
    low: float = -math.inf,
    high: float = math.inf,
) -> Move:
    """Bound a concept channel of a split network; a split network has this as its method.

    Args:
        model: from `apply` in the exact form.
        layer: the split layer, by name or itself.
        channel: a split channel.
        concept: 0 to K - 1, or "rest" for what no concept names.
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
    model: nn.Module, layer: str | nn.Module, channel: int, concept: int | Literal["rest"]
) -> tuple[SplitLayer, int]:
    modules = dict(unwrap(model).named_modules(remove_duplicate=False))
    known = [name for name, module in modules.items() if isinstance(module, SplitLayer)]
    if not known:
        raise UsageError(
            "The network has no concept channels; pass one from unbraid.apply in its exact form."
        )
    module: object = layer
    if isinstance(layer, str):
        module = modules.get(layer, modules.get(unwrapped_name(layer)))
    if isinstance(module, nn.Module):
        module = unwrap(module)  # of a layer compiled by itself
    if not isinstance(module, SplitLayer):
        given = repr(layer) if isinstance(layer, str) else f"of type {type(layer).__name__}"
        raise UsageError(f"Layer {given} has no concept channels; name one of {', '.join(known)}.")
    if isinstance(concept, str) and concept != _REST:
        raise UsageError(f"concept is {concept!r}; give a number from 0, or {_REST!r}.")
    own = concept if isinstance(concept, str) else whole_number("concept", concept)
    name = f"{whole_number('channel', channel)}.{own}"
    names = [*module.names, *(f"{o}.{_REST}" for o in module.divided)]  # in the order of the rows
    if name not in names:
        raise UsageError(
            f"Layer {layer!r} has no concept {concept} of channel {channel}; it has "
            f"{', '.join(module.names[:20])}{' ...' if len(module.names) > 20 else ''}, and "
            f"{_REST!r} of each channel."
        )
    return module, names.index(name)
