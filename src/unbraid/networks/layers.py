"""From a module to the layer that it is: whether it is linear in its weights, and with which.

A layer is what it computes. A subclass that runs torch's own code is taken at its word; any other
is run on a small probe and taken if the weights that reach torch's functions give its output, with
the padding that it declares or TensorFlow's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from unbraid.base.errors import LayerError, UsageError, brief, nearest
from unbraid.base.modes import refuse_missing_weights
from unbraid.networks.attention import Projection, with_projections
from unbraid.networks.copying import copy_network, unwrap, unwrapped_name
from unbraid.networks.relevance import undisturbed
from unbraid.networks.spec import SAME, TRANSPOSED, LayerSpec, as_rows, channels_first, respond

LayerName = str | nn.Module
ALL = "all"  # stands for every layer that can be scanned
# What runs and scans call their own folders and files, also where case does not tell names apart.
_OURS = re.compile(
    r"quick|settings-\d+|scan-(train|val)|positions-.*|features|circuits|places|explained|splits|"
    r".+\.(csv|html|json|safetensors|txt|before|damaged|replaced|tmp)",
    re.IGNORECASE,
)
# Parts of the projections of attention, by their names, in order; those out of it have heads of
# inputs.
_PARTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("in_proj", "qkv"), ("q", "k", "v")),
    **{f"{part}_proj": (part,) for part in "qkv"},
    **dict.fromkeys(("out_proj", "proj"), ("",)),
}

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
PLAIN_LAYERS = (nn.Linear, *_CONVOLUTIONS)  # of torch, which compute nothing but their product
_FUNCTIONS: set[Callable[..., Any]] = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}


def resolve_layer(model: nn.Module, layer: LayerName) -> tuple[str, nn.Module]:
    """Find a layer by its name, with or without those of wrappers, or the name of a module.

    A module with several names goes by the first. LayerError tells the nearest names.
    """
    if not isinstance(layer, (str, nn.Module)):
        raise LayerError(f"{layer!r} is no layer; give a layer's name, or the module itself.")
    names = {module: name for name, module in with_projections(model)}
    if isinstance(layer, str) and layer:
        known = dict(with_projections(model, remove_duplicate=False))
        del known[""]  # the network itself
        alike = {_bare(name): module for name, module in known.items()}
        layer = known.get(layer, alike.get(_bare(layer), _bare(layer)))
    if isinstance(layer, nn.Module):
        module = unwrap(layer)
        if module in names:
            return names[module], module
        raise LayerError("The given module is not part of the network; pass one of its modules.")
    splittable = [name for module, name in names.items() if why_not(module) is None]
    raise LayerError(
        f"The network has no layer {layer!r}.{nearest(layer, splittable)} `unbraid layers` lists "
        "what can be split."
    )


def _bare(name: str) -> str:
    return ".".join(part for part in unwrapped_name(name).split(".") if part != "_orig_mod")


def layer_names(
    model: nn.Module, asked: Sequence[LayerName], usable: Callable[[], list[LayerSpec]]
) -> list[str]:
    """Names of layers and of those that fit patterns, each once, in the order asked for.

    `usable` tells the layers that can be scanned; it is asked only if there is a pattern.
    """
    names: dict[str, None] = {}
    for layer in asked:
        if is_pattern(model, layer):
            known = [spec.name for spec in usable()]
            if not known:
                raise no_layers(model)
            if known == [""]:
                raise LayerError(
                    "The network is a single layer, which has no name to be scanned by; wrap it: "
                    "torch.nn.Sequential(network), whose layer is '0'."
                )
            # A network may have a part of a wrapper's name itself.
            fitting: list[str] = known if layer == ALL else []
            for pattern in (str(layer), unwrapped_name(str(layer))):
                fitting = fitting or [name for name in known if fnmatchcase(name, pattern)]
            if not fitting:
                raise LayerError(
                    f"No layer that can be split fits {layer!r}; `unbraid layers` lists them."
                )
            names |= dict.fromkeys(fitting)
        else:
            names[resolve_layer(model, layer)[0]] = None
    if not names:
        raise UsageError("No layer is named; name one or more.")
    return list(names)


def no_layers(model: nn.Module) -> LayerError:
    """Say why a network has no layer that can be split, and what to do."""
    model = unwrap(model)
    is_graph = isinstance(model, torch.fx.GraphModule)
    if isinstance(model, torch.jit.ScriptModule) or (is_graph and not splittable_layers(model)):
        return LayerError(
            "The network is a program that torch.jit or torch.export made, in which no layer is "
            "left; pass the network that it was made from."
        )
    return LayerError(
        "The network has no layer that can be split: none is a convolution or fully connected "
        "layer of two inputs or more that sees the images and has a gradient of the output, which "
        "quantised parts and code under no_grad do not give; target='none' needs no gradient."
    )


def layer_folder(out: Path, name: str) -> Path:
    """Return the folder of one of several layers, whatever its name.

    Names are written as in URLs. The first letter of one that a run or scan gives to a folder or
    file of its own is written so too, so that neither takes the other's place.

    >>> [layer_folder(Path(), name).name for name in ("layer4.2.conv3", "a/b", "quick")]
    ['layer4.2.conv3', 'a%2Fb', '%71uick']
    """
    own = quote(name, safe="")
    return out / (f"%{ord(own[0]):02X}{own[1:]}" if _OURS.fullmatch(own) else own)


def heads(model: nn.Module, layer: LayerName) -> dict[str, range]:
    """Say which channels of a layer of attention belong to which head.

    Args:
        model: the network.
        layer: a projection into attention, of nn.MultiheadAttention (in_proj, q_proj, k_proj,
            v_proj) or timm's qkv: then these are its own channels, by names such as q.h3. Or the
            projection out of it, out_proj or proj: then its input channels, by names such as h3.

    Returns:
        By head, the range of its channels.

    Raises:
        LayerError: the network has no such layer, or it is none of attention.
    """
    model = unwrap(model)
    name, module = resolve_layer(model, layer)
    path, _, own = name.rpartition(".")
    holder = module.of[0] if isinstance(module, Projection) else model.get_submodule(path)
    n_heads = getattr(holder, "num_heads", None)
    parts = _PARTS.get(own)
    if not isinstance(n_heads, int) or parts is None:
        raise LayerError(
            f"Layer {name!r} has no heads; name a projection of attention, such as "
            f"{', '.join(_PARTS)}, whose attention says its num_heads."
        )
    spec = describe(name, module)
    size, rest = divmod(spec.n_in if parts == ("",) else spec.n_out, n_heads * len(parts))
    if rest:
        raise LayerError(f"Layer {name!r} has heads of different sizes, so it is not plain which.")
    names = [f"{part}.h{h}".lstrip(".") for part in parts for h in range(n_heads)]
    return {name: range(k * size, (k + 1) * size) for k, name in enumerate(names)}


def is_pattern(model: nn.Module, layer: LayerName) -> bool:
    """Whether a name stands for all layers of such names; a name that is there is none."""
    if not isinstance(layer, str) or not (layer == ALL or any(sign in layer for sign in "*?[")):
        return False
    return layer not in dict(model.named_modules(remove_duplicate=False))


def why_not(module: nn.Module) -> str | None:
    """Say why a module cannot be split, or None if it can."""
    found = _examine(module)
    return found if isinstance(found, str) else None


def splittable_layers(model: nn.Module) -> list[LayerSpec]:
    """List the layers of a network that can be split, in its order."""
    found = ((name, _examine(module)) for name, module in with_projections(model))
    return [replace(spec, name=name) for name, spec in found if not isinstance(spec, str)]


def describe(name: str, module: nn.Module) -> LayerSpec:
    """Describe a layer that is linear in its weights; LayerError says why a module is none."""
    found = _examine(module)
    if isinstance(found, str):
        raise LayerError(
            f"Layer {name!r} ({type(module).__name__}) cannot be split: {found}; "
            "`unbraid layers` lists what can."
        )
    return replace(found, name=name)


def weight_rows(module: nn.Module) -> Tensor:
    """Return the weights that a layer applies as one row per output channel, (C_out, J)."""
    weight = _applied(module)[0]
    return (
        as_rows(_declared(module), weight) if isinstance(module, _TRANSPOSED) else weight.flatten(1)
    )


def bias_of(module: nn.Module) -> Tensor:
    """Return the bias, (C_out,); zeros where the layer has none."""
    return _applied(module)[1]


def _examine(module: nn.Module) -> LayerSpec | str:
    """Describe a module, without its name, or say why it cannot be split."""
    if isinstance(module, (nn.Linear, Projection)):
        if module.in_features == 1:
            return "it has a single input, nothing to divide"
    elif isinstance(module, _CONVOLUTIONS):
        if module.in_channels == module.groups:
            return "each of its channels has a single input channel, nothing to divide"
    elif isinstance(module, torch.jit.ScriptModule):
        return "torch.jit made a program of it, so pass the network from before"
    else:
        return "it is not a convolution or fully connected layer, so not linear in its own weights"
    declared = _declared(module)
    return declared if _computes_as_torch(module) else _probed(module, declared)


def _declared(module: nn.Module) -> LayerSpec:
    kind = type(module).__name__
    if isinstance(module, (nn.Linear, Projection)):
        one, none = (1,), ((0, 0),)
        n_out, n_in = module.out_features, module.in_features
        return LayerSpec("", kind, n_out, n_in, one, one, none, one, 1, "zeros", channels_last=True)
    assert isinstance(module, _CONVOLUTIONS)
    totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    pad_mode: str = module.padding_mode
    if isinstance(module, _TRANSPOSED):
        pad_mode = TRANSPOSED
        cut: list[int] = [int(p) for p in module.padding]
        before = [total - p for total, p in zip(totals, cut, strict=True)]
        padding = [(b, b + more) for b, more in zip(before, module.output_padding, strict=True)]
    elif module.padding == "same":  # torch puts the odd one behind
        padding = [(total // 2, total - total // 2) for total in totals]
    elif module.padding == "valid":
        padding = [(0, 0) for _ in module.kernel_size]
    else:
        padding = [(int(p), int(p)) for p in module.padding]
    return LayerSpec(
        name="",
        kind=kind,
        n_out=module.out_channels,
        n_in=module.in_channels,
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=tuple(padding),
        dilation=tuple(module.dilation),
        groups=module.groups,
        pad_mode=pad_mode,
        channels_last=False,
    )


def _computes_as_torch(module: nn.Module) -> bool:
    """Whether the class, also one that only computes its weights, runs torch's own code."""
    if isinstance(module, Projection):
        return True
    base = next(kind for kind in PLAIN_LAYERS if isinstance(module, kind))
    own = ("forward", "_conv_forward", "_output_padding")
    return not any(name in vars(module) for name in own) and all(
        getattr(type(module), name, None) is getattr(base, name, None) for name in own
    )


def _probed(module: nn.Module, declared: LayerSpec) -> LayerSpec | str:
    """Find the padding with which the weights that are applied give what the module gives."""
    try:
        probes = [_probe(module, declared, more) for more in (0, 1)]
        weight, bias = _applied(module)
    except Exception as error:  # of a module of anyone's own
        return f"it cannot be run by itself ({brief(error)})"
    rows = as_rows(declared, weight)
    if rows.shape == (declared.n_out, declared.n_taps):
        none = tuple((0, 0) for _ in declared.kernel)
        others: list[LayerSpec] = []
        if not declared.transposed:
            others.append(replace(declared, padding=none, pad_mode=SAME))
        for spec in (declared, *others):
            if all(_meets(spec, x, z, rows, bias) for x, z in probes):
                return spec
    return (
        "it does not compute what weights of its own say, perhaps because it pads or scales in a "
        "way of its own"
    )


def _probe(module: nn.Module, spec: LayerSpec, more: int) -> tuple[Tensor, Tensor]:
    """Run a copy of a module, without hooks, on a small random input; return input and output."""
    alone = copy_network(module).eval()  # since running may leave traces, as observers do
    like = next(alone.parameters())
    # A little larger than the kernel reaches, on both sides.
    sizes = [] if spec.channels_last else [2 * reach + 5 + more for reach in spec.reaches]
    generator = torch.Generator().manual_seed(more)
    x = torch.randn(2, spec.n_in, *sizes, generator=generator, dtype=torch.float32).to(like)
    with torch.no_grad():
        return channels_first(spec, x), channels_first(spec, alone.forward(x))


def _meets(spec: LayerSpec, x: Tensor, z: Tensor, rows: Tensor, bias: Tensor) -> bool:
    try:
        with torch.no_grad():
            expected = respond(spec, x, rows, bias, range(spec.n_out))
    except RuntimeError:  # a padding that does not fit
        return False
    # Rounding is far below, errors above.
    tolerance = torch.finfo(z.dtype).eps ** 0.5 * float(z.abs().max()) + 1e-12
    return expected.shape == z.shape and float((expected - z).abs().max()) <= tolerance


class _Watch(TorchFunctionMode):
    """Keeps weight and bias that are handed to convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            call = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            self.seen.append((call["weight"], call.get("bias")))
        return func(*args, **kwargs)


def _applied(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias that a layer applies."""
    with undisturbed(module), torch.no_grad():  # as some compute their weights by the mode
        for hook in module._forward_pre_hooks.values():  # torch's older way to compute weights
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                hook(module, ())
        if _computes_as_torch(module):
            refuse_missing_weights(module)
            found: tuple[Any, Any] = module.weight, module.bias
        else:
            with _Watch() as watch:
                _probe(module, _declared(module), 0)
            if len(watch.seen) != 1:
                raise LayerError(f"it runs {len(watch.seen)} convolutions or matrix products")
            found = watch.seen[0]
    weight, bias = found[0].detach(), found[1]
    n_out = module.out_channels if isinstance(module, _TRANSPOSED) else len(weight)
    return weight, weight.new_zeros(n_out) if bias is None else bias.detach()
