"""torch's attention and transformer layers with a split layer inside, equal bit for bit.

They compute from the weights of their parts, in one fused step where nobody looks. So the original
is computed as ever, and beside it, part by part, what the concept channels change in it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.networks.attention import (
    APART,
    ASIDE,
    OUT,
    TOGETHER,
    Projection,
    attend,
    computes_as,
    encode_whole,
    leaves_out_now,
    left_out,
    opens,
    projections,
    refuse_apart,
    twin,
)
from unbraid.networks.by_weight import hooks_of, run_parts, unseen, users
from unbraid.networks.copying import become, double, rebind
from unbraid.surgery.split_layer import SplitLayer, keep_slow_path


class SplitAttention(nn.Module):
    """nn.MultiheadAttention whose projections are parts, so that they can be split."""

    def __init__(self, original: nn.MultiheadAttention, exact: bool) -> None:  # noqa: D107
        super().__init__()
        self.is_exact: bool = exact
        for part, projection in projections(original).items():
            self.add_module(part, projection)
        self.out_proj = original.out_proj
        self.silent = hooks_of(self.out_proj)  # which torch never calls
        vars(original)["closed"] = True  # to those who would open it, as this one does
        self.original = original  # last, so that the parts go by their own names
        self.register_forward_pre_hook(keep_slow_path)

    def __getattr__(self, name: str) -> Any:
        """Give what the surrounding code may ask of attention, such as `batch_first`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original" or name.startswith("__"):
                raise
            return getattr(self.original, name)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the original's output and weights, by way of the concept channels."""
        given = (query, key, value, *args)
        parts: dict[str, Any] = {n: m for n, m in self._modules.items() if n != "original"}
        if not all(isinstance(parts[name], Projection) for name in APART):
            parts.pop(TOGETHER, None)
        own = {n: _original(m) for n, m in parts.items()}
        with unseen(own[OUT], self.silent):
            changed = attend(self.original, parts, *given, **named)
            if not self.is_exact or (self.training and self.original.dropout):  # it draws anew
                return changed
            plain = attend(self.original, own, *given, **named)
        output, weights = self.original(*given, **named)
        if weights is not None:
            assert plain[1] is not None
            assert changed[1] is not None
            weights = _beside(weights, plain[1], changed[1])
        return _beside(output, plain[0], changed[0]), weights


class _InPlaceOf(nn.Module):
    """Stands for a module that torch runs fused, with the same parts under the same names."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._modules = original._modules  # under the same names
        self.original: tuple[Any] = (original,)  # in a tuple, as it has the same parts

    def __getattr__(self, name: str) -> Any:
        """Give what the surrounding code may ask of the original."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original" or name.startswith("__"):
                raise
            return getattr(self.original[0], name)


class SplitEncoderLayer(_InPlaceOf):
    """nn.TransformerEncoderLayer with split layers inside, which torch would not run fused."""

    def forward(self, src: Tensor, *args: Any, **named: Any) -> Tensor:
        """Compute the original's output, by way of the concept channels."""
        refuse_apart(self, (src,))
        changed: Tensor = self.original[0](src, *args, **named)
        if self.training:  # when torch does not fuse
            return changed
        unsplit = _unsplit(self.original[0])
        output = unsplit(src, *args, **named)
        slow = nn.Identity()
        slow.register_forward_pre_hook(keep_slow_path)
        unsplit._modules["slow"] = slow
        return _beside(output, unsplit(src, *args, **named), changed)


class SplitEncoder(_InPlaceOf):
    """nn.TransformerEncoder with split layers inside, which take no tensors without padding.

    torch leaves padding out where it can, and then gives zeros there; so the original does.
    """

    gradients_aside = False  # unless the network is opened

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Compute the original's output, by way of the concept channels."""
        given = (src, mask, src_key_padding_mask, is_causal)
        unsplit = _unsplit(self.original[0])
        apart = left_out(unsplit, self.gradients_aside, *given)
        changed: Tensor = _whole(self.original[0], apart)(*given)
        if apart is None or not leaves_out_now(unsplit, *given):
            return changed
        return _beside(unsplit(*given), _whole(unsplit, apart)(*given), changed)


def _whole(encoder: nn.TransformerEncoder, apart: Tensor | None) -> Any:
    """An encoder, hooks and all, that takes every token and has zeros at those apart."""
    return twin(encoder, forward=partial(encode_whole, encoder, apart))


def _encode_plain(
    encoder: Any,
    use_nested_tensor: bool,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """Run an encoder with wider layers inside, with zeros where it had them before."""
    given = (src, mask, src_key_padding_mask, is_causal)
    apart = None
    if use_nested_tensor and not torch.compiler.is_compiling():  # where torch leaves none out
        apart = left_out(twin(encoder, use_nested_tensor=True), ASIDE in vars(encoder), *given)
    if apart is None:
        return nn.TransformerEncoder.forward(encoder, *given)
    return encode_whole(encoder, apart, *given)


def _beside(original: Tensor, plain: Tensor, changed: Tensor) -> Tensor:
    """The original's value, moved by what was changed; the gradient goes by what was changed.

    Where nothing was changed zero is taken away, which keeps even the sign of a zero. It is a copy
    that keeps the memory format, as modules behind may round by that.
    """
    return original.detach().clone().sub_(plain.detach() - changed)


_AROUND: dict[type, Any] = {
    nn.TransformerEncoderLayer: SplitEncoderLayer,
    nn.TransformerEncoder: SplitEncoder,
}


def _unsplit(module: nn.Module) -> Any:
    """A module as it was before layers in it were split; it shares all else."""
    if isinstance(module, SplitLayer):
        return module.original
    if isinstance(module, SplitAttention):
        return _unsplit(module.original)
    if isinstance(module, (SplitEncoderLayer, SplitEncoder)):
        return twin(_unsplit(module.original[0]), training=module.training)
    if not any(isinstance(part, SplitLayer) for part in module.modules()):
        return module
    unsplit = twin(module)
    unsplit._modules = {
        name: None if child is None else _unsplit(child) for name, child in module._modules.items()
    }
    return unsplit


def open_around(model: nn.Module, layer: nn.Module, exact: bool) -> None:
    """Prepare what runs a layer by its weights alone, so that it runs the layer.

    In a network that nobody else has, the layer's attention becomes a SplitAttention and, in the
    exact form, a transformer layer that holds it a SplitEncoderLayer.
    """
    for module in list(model.modules()):
        if opens(module) and (
            module.out_proj is layer or (isinstance(layer, Projection) and layer.of[0] is module)
        ):
            inner = double(module, SplitAttention)
            assert isinstance(inner, nn.MultiheadAttention)
            become(module, SplitAttention(inner, exact).train(module.training))
            rebind(inner, module)
    for module, parts in list(users(model)):
        if layer in parts:
            run_parts(module, parts)
    for module in [module for module in model.modules() if _holds(module, layer)]:
        around = next((new for kind, new in _AROUND.items() if computes_as(module, kind)), None)
        if around is None:
            continue
        if exact:
            fused = double(module, around)
            assert fused is not None
            become(module, around(fused).train(module.training))
            rebind(fused, module)
        elif around is SplitEncoderLayer:
            module.register_forward_pre_hook(refuse_apart)
        else:
            before = vars(module).get("use_nested_tensor", False)
            vars(module)["use_nested_tensor"] = False
            vars(module)["forward"] = partial(_encode_plain, module, before)


def _original(module: nn.Module) -> nn.Module:
    """The layer in a split one, or the module itself."""
    return module.original if isinstance(module, SplitLayer) else module


def _holds(module: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer is in a module; a projection is where its attention is."""
    known = [*module.modules()]
    return layer in known or (isinstance(layer, Projection) and layer.of[0] in known)
