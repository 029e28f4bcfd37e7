"""Put a split into a network: concept channels beside the layer, the output unchanged.

METHOD.md section 4 gives the reasons. Two forms: `SplitLayer` keeps the original layer and is equal
to it bit for bit; `plain_layer` is made of standard modules alone, for exporters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from unbraid.becoming import become, double, rebind
from unbraid.describe import bias_of, describe, resolve_layer, weight_rows
from unbraid.doors import in_plain_modes
from unbraid.errors import ModelError, OutputChangedError, RunError, UsageError
from unbraid.given import as_kind, whole_number
from unbraid.in_force import in_force, refuse_ways_past
from unbraid.layers import LayerSpec
from unbraid.moves import Clamp, Gate
from unbraid.networks import copy_network, unwrap, unwrapped_name
from unbraid.plain import plain_layer
from unbraid.relevance import undisturbed
from unbraid.running import run_network
from unbraid.split_layer import SplitLayer
from unbraid.splits import ChannelSplit, Split
from unbraid.weights import hash_weights

Form = Literal["exact", "plain"]


@in_plain_modes
def apply(
    model: nn.Module,
    split: Split | Sequence[Split] | Mapping[str, Split],
    form: Form = "exact",
) -> nn.Module:
    """Return a copy of a network in which the split channels are made of concept channels.

    In the exact form (the default) outputs are the original's to the last bit, while gradients and
    interventions go through the concept channels. They pass through the module
    `LAYER.concepts`, in the order of `LAYER.names`, where hooks can read or change them; what is
    subtracted passes through `LAYER.residuals`. `model2.gate(layer, channel, concept, value)`
    scales one (0 switches it off) and `model2.clamp(layer, channel, concept, low, high)` bounds
    one, until its `remove()` or the end of its `with` block. Once training has changed the rows,
    the outputs are what the new rows make of them.

    In the plain form the layer is a wider layer, `LAYER.wide`, whose outputs `LAYER.names` names,
    and one with kernel 1 that merges, `LAYER.merge`; outputs agree up to rounding, and there are no
    gates and clamps. docs/tools.md says which form suits which tool.

    Args:
        model: the network that the split was made for; it is not changed.
        split: from `unbraid.split` or `Split.load`; or several, of different layers, all made for
            this network as it is before any is applied.
        form: "exact" or "plain".

    Raises:
        ModelError: the network's weights are not those that the split was made for; or its code
            would run its own layer past the split one.
        LayerError: the network lacks the layer.
        RunError: the split holds other weights of the layer than the network.
        UsageError: there is no such form, or there is no split or two of one layer.
    """
    if form not in ("exact", "plain"):
        raise UsageError(f"There is no form {form!r}; use 'exact' or 'plain'.")
    model = unwrap(model)
    splits = _as_list(split)
    names = [one.layer.name for one in splits]
    if not names or len(set(names)) < len(names):
        raise UsageError("Pass one split or more, each of another layer.")
    weights = hash_weights(model)
    for one in splits:
        _check_fit(model, weights, one)
    changed = _split_copy(model, splits, form)
    if form == "exact":
        for method in (gate, clamp):
            if not hasattr(changed, method.__name__):  # a name that a network may use itself
                setattr(changed, method.__name__, partial(method, changed))
    return changed


def _as_list(split: Split | Sequence[Split] | Mapping[str, Split]) -> list[Split]:
    if isinstance(split, Mapping):
        split = list(split.values())
    if isinstance(split, (Split, str)) or not isinstance(split, Iterable):
        return [as_kind("split", split, Split)]
    return [as_kind("split", one, Split) for one in split]


def _check_fit(model: nn.Module, weights: str, split: Split) -> None:
    """Raise unless a split was made for this network, whose weights have this hash."""
    _, original = resolve_layer(model, split.layer.name)
    if weights != split.weights:
        raise ModelError(
            "The split was made for a network with other weights; load the weights it was made "
            "for, before any split is applied or the number format is changed, or scan and split "
            "this network."
        )
    rows = weight_rows(original)
    for part in split.channels:
        # Not bit by bit, since a layer may compute its weights.
        if not torch.allclose(part.weight.to(rows), rows[part.channel], rtol=1e-2):
            raise RunError(
                f"The split's weights of channel {part.channel} are not the network's although it "
                "was made for it, so its file is damaged; get or make it anew."
            )


def _split_copy(model: nn.Module, splits: Sequence[Split], form: Form) -> nn.Module:
    """Copy a network and split layers of the copy.

    Raises:
        ModelError: the copy would run the network's own layers past the split ones.
    """
    changed = copy_network(model)
    for one in splits:
        _replace(changed, one, form)
    refuse_ways_past(model, changed, [resolve_layer(model, s.layer.name)[0] for s in splits])
    return changed


def _replace(model: nn.Module, split: Split, form: Form) -> None:
    """Make a layer its split form, for everything that leads to it."""
    name, layer = resolve_layer(model, split.layer.name)
    build = SplitLayer if form == "exact" else plain_layer
    inner = double(layer, SplitLayer if form == "exact" else nn.Sequential)
    new = build(layer if inner is None else inner, describe(name, layer), split.channels)
    if isinstance(new, SplitLayer):
        new.clusters = split.clusters
    new.train(layer.training)
    if inner is not None:
        become(layer, new)
        rebind(inner, layer)
        return
    for module in list(model.modules()):  # a module may be known under several names
        for key, child in module._modules.items():
            if child is layer and module is not new:
                module._modules[key] = new


@in_plain_modes
def check_in_force(model: nn.Module, layer: str | nn.Module, images: Tensor) -> None:
    """Try on some images whether a split of a layer would be in force; one will do.

    Costs a pass through the network and one through a copy of it, so that what stands in the way is
    told before anything long is begun.

    Args:
        model: the network; it is left as it is.
        layer: the layer that is to be split.
        images: (N, C, H, W), on the network's device.

    Raises:
        ModelError: a split would not be in force, or the network cannot run.
        LayerError: there is no such layer, or it cannot be split.
        OutputChangedError: the network computes something else with the layer split.
    """
    model = unwrap(model)
    name, module = resolve_layer(model, layer)
    changed = _split_copy(model, [_trial_split(describe(name, module), module)], "exact")
    with undisturbed(model), undisturbed(changed), torch.no_grad():
        before = run_network(model, images)
        with in_force(changed):
            after = run_network(changed, images)
        same = _equal(before, after) or not _equal(before, run_network(model, images))
    if not same:  # though the network gives the same whenever it runs
        raise OutputChangedError(
            f"With layer {name!r} split the network computes something else, so its code depends "
            "on what the layer is; let it only run the layer, or choose another."
        )


def _trial_split(spec: LayerSpec, layer: nn.Module) -> Split:
    """Two concept channels of a layer's first channel, each with every other weight."""
    weight = weight_rows(layer)[0]
    even = (torch.arange(len(weight), dtype=torch.int64, device=weight.device) % 2).to(weight)
    part = ChannelSplit(
        channel=0,
        concepts=((0,), (1,)),
        masks=torch.stack([even, 1 - even]),
        weight=weight,
        bias=float(bias_of(layer)[0]),
        info={},
    )
    return Split(spec, weights="", method="", settings={}, class_names=(), channels=(part,))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether numbers are the same, NaN too."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


@in_plain_modes
def load_split(model: nn.Module, path: str | Path) -> nn.Module:
    """Put the split of a file into the network that it was made for.

    The same as `unbraid.apply(model, unbraid.Split.load(path))`.

    Args:
        model: the network that the split was made for; it is not changed.
        path: a file from `Split.save`.

    Raises:
        RunError: the file is missing, damaged or not a split.
        ModelError: the network's weights are not those that the split was made for.
        LayerError: the network lacks the layer.
    """
    return apply(model, Split.load(path))


@in_plain_modes
def gate(
    model: nn.Module, layer: str | nn.Module, channel: int, concept: int, value: float | Tensor
) -> Gate:
    """Scale a concept channel of a split network; a split network has this as its method.

    Of several moves of a concept channel, gates or clamps, the latest counts until it is removed.

    Args:
        model: from `apply` in the exact form.
        layer: the split layer, by name or itself.
        channel: a split channel.
        concept: 0 to K - 1.
        value: 0 switches the concept channel off, 1 leaves it as it is; a tensor (N,) has one value
            per image of the batches that follow, and may ask for a gradient.

    Returns:
        A handle; `remove()` or the end of its `with` block moves the gate back.

    Raises:
        UsageError: there is no such concept channel, or the value is none.
    """
    return Gate(*_find_row(model, layer, channel, concept), value)


@in_plain_modes
def clamp(
    model: nn.Module,
    layer: str | nn.Module,
    channel: int,
    concept: int,
    low: float = -math.inf,
    high: float = math.inf,
) -> Clamp:
    """Bound a concept channel of a split network; a split network has this as its method.

    Of several moves of a concept channel, gates or clamps, the latest counts until it is removed.

    Args:
        model: from `apply` in the exact form.
        layer: the split layer, by name or itself.
        channel: a split channel.
        concept: 0 to K - 1.
        low: lower bound at every position, in units of the pre-activation.
        high: upper bound likewise; equal to `low` it fixes the concept channel's value.

    Returns:
        A handle; `remove()` or the end of its `with` block takes the bounds away.

    Raises:
        UsageError: there is no such concept channel, or low is above high.
    """
    return Clamp(*_find_row(model, layer, channel, concept), low, high)


def _find_row(
    model: nn.Module, layer: str | nn.Module, channel: int, concept: int
) -> tuple[SplitLayer, int]:
    """A split layer and the row of one of its concept channels."""
    model = unwrap(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    module: object = layer
    if isinstance(layer, str):
        module = modules.get(layer, modules.get(unwrapped_name(layer)))
    if isinstance(module, nn.Module):
        module = unwrap(module)  # of a layer compiled by itself
    if not isinstance(module, SplitLayer):
        known = [name for name, m in modules.items() if isinstance(m, SplitLayer)]
        if not known:
            raise UsageError(
                "The network has no concept channels; pass one from unbraid.apply in its exact "
                "form."
            )
        given = repr(layer) if isinstance(layer, str) else f"of type {type(layer).__name__}"
        raise UsageError(f"Layer {given} has no concept channels; name one of {', '.join(known)}.")
    name = f"{whole_number('channel', channel)}.{whole_number('concept', concept)}"
    if name not in module.names:
        raise UsageError(
            f"Layer {layer!r} has no concept {concept} of channel {channel}; it has "
            f"{', '.join(module.names[:20])}{' ...' if len(module.names) > 20 else ''}."
        )
    return module, module.names.index(name)
