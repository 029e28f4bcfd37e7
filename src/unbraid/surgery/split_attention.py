"""torch's attention and transformer layers with a split layer inside, equal bit for bit.

They compute from the weights of their parts, in one fused step where nobody looks. So the original
is computed as ever, and beside it, part by part, what the concept channels change in it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from unbraid.networks.attention import (
    APART,
    OUT,
    TOGETHER,
    Projection,
    attend,
    opens,
    projections,
    whole_tensors,
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


class SplitEncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer with split layers inside, which torch would not run fused."""

    def __init__(self, original: nn.TransformerEncoderLayer) -> None:  # noqa: D107
        super().__init__()
        self._modules = original._modules  # under the same names
        self.original = (original,)  # in a tuple, as it has the same parts

    def __getattr__(self, name: str) -> Any:
        """Give what the surrounding code may ask of the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original" or name.startswith("__"):
                raise
            return getattr(self.original[0], name)

    def forward(self, src: Tensor, *args: Any, **named: Any) -> Tensor:
        """Compute the original's output, by way of the concept channels."""
        changed: Tensor = self.original[0](src, *args, **named)
        if self.training:  # when torch does not fuse
            return changed
        unsplit = _unsplit(self.original[0])
        output = unsplit(src, *args, **named)
        slow = nn.Identity()
        slow.register_forward_pre_hook(keep_slow_path)
        unsplit._modules["slow"] = slow
        return _beside(output, unsplit(src, *args, **named), changed)


class SplitEncoder(nn.Module):
    """nn.TransformerEncoder with split layers inside, which take no tensors without padding.

    torch leaves padding out where it can, and then gives zeros there; so the original does.
    """

    def __init__(self, original: nn.TransformerEncoder) -> None:  # noqa: D107
        super().__init__()
        self._modules = original._modules  # under the same names
        self.original = (original,)  # in a tuple, as it has the same parts

    def __getattr__(self, name: str) -> Any:
        """Give what the surrounding code may ask of the encoder."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original" or name.startswith("__"):
                raise
            return getattr(self.original[0], name)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        """Compute the original's output, by way of the concept channels."""
        given = (src, mask, src_key_padding_mask)
        with whole_tensors(self.original[0]):
            changed: Tensor = self.original[0](*given, **named)
        if self.training or src_key_padding_mask is None:
            return changed
        unsplit = _unsplit(self.original[0])
        output = unsplit(*given, **named)
        with whole_tensors(unsplit):
            plain = unsplit(*given, **named)
        return _beside(output, plain, changed)


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
        return _unsplit(module.original[0])
    if not any(isinstance(part, SplitLayer) for part in module.modules()):
        return module
    twin = object.__new__(type(module))
    object.__setattr__(twin, "__dict__", dict(vars(module)))
    vars(twin)["_modules"] = {
        name: None if child is None else _unsplit(child) for name, child in module._modules.items()
    }
    return twin


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
        around = _AROUND.get(type(module))
        if around is None:
            continue
        if not exact:
            module.register_forward_pre_hook(keep_slow_path)
            vars(module)["use_nested_tensor"] = False  # which only an encoder asks for
            continue
        fused = double(module, around)
        assert fused is not None
        become(module, around(fused).train(module.training))
        rebind(fused, module)


def _original(module: nn.Module) -> nn.Module:
    """The layer in a split one, or the module itself."""
    return module.original if isinstance(module, SplitLayer) else module


def _holds(module: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer is in a module; a projection is where its attention is."""
    known = [*module.modules()]
    return layer in known or (isinstance(layer, Projection) and layer.of[0] in known)
