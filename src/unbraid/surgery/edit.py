"""Bake gates into a layer's own weights: a network of the same modules, at no cost when it runs.

A gate scales a concept channel, which is linear in the layer's input, so gates at fixed values are
another row of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from unbraid.base.arguments import as_kind, real_number
from unbraid.base.errors import ModelError, OutputChangedError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.networks.attention import Projection
from unbraid.networks.copying import copy_network, unwrap
from unbraid.networks.layers import PLAIN_LAYERS, bias_of, describe, resolve_layer, weight_rows
from unbraid.networks.outputs import run_network
from unbraid.networks.relevance import undisturbed
from unbraid.networks.spec import LayerSpec, as_weight
from unbraid.splitting.splits import ChannelSplit, Split
from unbraid.surgery.apply import apply, check_fit, refuse_ways_past
from unbraid.surgery.gates import gate

Concept = int | Literal["rest"]
_REST = "rest"
_ROUNDING = 10.0  # with it 6e-5 of the largest logit in single precision


@in_plain_modes
def edit(model: nn.Module, split: Split, scales: Mapping[str, float]) -> nn.Module:
    """Return a copy of a network in which concept channels are off or scaled for good.

    The copy has the network's own modules; only rows of the split layer differ. Its outputs are,
    up to rounding, those of the split network with gates at these values. A layer that computes its
    weights from others (weight norm, spectral norm) holds them as they are from then on.

    Args:
        model: the network that the split was made for; it is not changed.
        split: of one layer.
        scales: by concept channel, "900.1" or "900.rest" (what no concept names): 0 for off, 1 as
            it is.

    Returns:
        A copy of the network in which the rows of the layer are others.

    Raises:
        UsageError: there is no such concept channel, or a scale is no finite number.
        ModelError: the network's weights are not those that the split was made for, or the layer's
            weights cannot be set.
        LayerError: the network lacks the layer.
        RunError: the split holds other weights of the layer than the network.
    """
    model = unwrap(model)
    as_kind("split", split, Split)
    wanted = _read(split, scales)
    check_fit(model, split)
    edited = copy_network(model)
    name, layer = resolve_layer(edited, split.layer.name)
    refuse_ways_past(model, edited, [name])
    rows, bias = weight_rows(layer).clone(), bias_of(layer).clone()
    for channel, own in wanted.items():
        row, shift = scaled_row(split[channel], own)
        rows[channel] = row.to(rows)
        bias[channel] = shift
    _set_weights(name, layer, rows, bias)
    return edited


def scaled_row(part: ChannelSplit, scales: Mapping[Concept, float]) -> tuple[Tensor, float]:
    """The row, (J,) in double precision, and the bias of a channel whose concepts are scaled."""
    row, bias = part.weight.double().clone(), part.bias
    for concept, scale in scales.items():
        rest = concept == _REST
        own = part.rest_row if rest else part.rows[int(concept)]
        row += (scale - 1) * own.double()
        bias += (scale - 1) * (part.rest_bias if rest else part.bias)
    return row, bias


@in_plain_modes
def check_edit(
    model: nn.Module, split: Split, scales: Mapping[str, float], edited: nn.Module, images: Tensor
) -> float:
    """Compare an edited network with the split one under gates on images, (N, C, H, W).

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        OutputChangedError: the two differ by more than rounding.
    """
    gated = apply(model, split)
    for channel, own in _read(split, scales).items():
        for concept, scale in own.items():
            gate(gated, split.layer.name, channel, concept, scale)
    with undisturbed(gated), undisturbed(edited), torch.no_grad():
        expected, found = run_network(gated, images), run_network(edited, images)
    largest = float(expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny))
    difference = float((expected - found).abs().max()) / largest
    if not difference <= _ROUNDING * torch.finfo(expected.dtype).eps ** 0.75:
        raise OutputChangedError(
            f"The edited network's logits differ from those under gates by {difference:.2g} of the "
            "largest, more than rounding; use gates, which a split network has, in its place."
        )
    return difference


def _read(split: Split, scales: Mapping[str, float]) -> dict[int, dict[Concept, float]]:
    """Scales by channel and concept, of channels that are split."""
    if not isinstance(scales, Mapping) or not scales:
        raise UsageError('Say what to switch off or scale, as in {"900.1": 0.0}.')
    known = {
        f"{part.channel}.{concept}": (part.channel, concept)
        for part in split.channels
        for concept in (*range(len(part.concepts)), _REST)
    }
    wanted: dict[int, dict[Any, float]] = {}
    for name, value in scales.items():
        if name not in known:
            alike = [other for other in known if other.split(".")[0] == str(name).split(".")[0]]
            has = ", ".join(alike or list(known)[:20])
            more = " and more" if not alike and len(known) > 20 else ""
            raise UsageError(f"There is no concept channel {name!r}; there are {has}{more}.")
        channel, concept = known[name]
        scale = real_number(f"The scale of {name}", value)
        if not math.isfinite(scale):
            raise UsageError(f"The scale of {name} is {scale}; give a finite number, 0 for off.")
        wanted.setdefault(channel, {})[concept] = scale
    return wanted


def _set_weights(name: str, layer: Any, rows: Tensor, bias: Tensor) -> None:
    """Make a layer, of a copy that nobody else has, apply these rows (C_out, J) and biases."""
    if is_parametrized(layer):
        # torch's own way to take them off would do so in the class, which the original has too.
        held = {of: getattr(layer, of).detach().clone() for of in layer.parametrizations}
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        for of, value in held.items():
            layer.register_parameter(of, nn.Parameter(value))
    for hook in list(layer._forward_pre_hooks.values()):  # torch's older way to compute weights
        if isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
    if isinstance(layer, Projection):
        layer.put(rows, bias)
        return
    spec = describe(name, layer)
    if not _take(layer, spec, rows, bias):
        # One that computes its weights from others; as torch's own layer it is the same but that.
        layer.__class__ = next(kind for kind in PLAIN_LAYERS if isinstance(layer, kind))
        own = replace(describe(name, layer), kind=spec.kind)
        if own != spec or not _take(layer, spec, rows, bias):
            raise ModelError(
                f"The weights of layer {name!r} cannot be set, as it computes them in a way of its "
                "own; use gates, which a split network has."
            )


def _take(layer: Any, spec: LayerSpec, rows: Tensor, bias: Tensor) -> bool:
    """Put rows and biases into parameters of a layer's own; whether it applies them then."""
    weight, own_bias = layer.weight, layer.bias
    # New ones, as other layers may share the old.
    own = as_weight(spec, rows).reshape(weight.shape).to(weight)
    layer.weight = nn.Parameter(own, weight.requires_grad)
    if own_bias is not None:
        layer.bias = nn.Parameter(bias.to(own_bias), own_bias.requires_grad)
    return torch.equal(weight_rows(layer), rows) and torch.equal(bias_of(layer), bias)
