"""Layers that a network's code applies by their weights, without running them.

torchvision's Swin hands `self.qkv.weight` to `F.linear`, so the layer's hooks see nothing. Where
someone looks at such a layer, or it is split, it runs in that product's place.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Hooks = Mapping[str, frozenset[int]]  # the keys of a module's hooks, by kind
NO_HOOKS: Hooks = dict.fromkeys(_HOOKS, frozenset())


def users(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules whose code names the weight of a fully connected part, and all such parts of each."""
    for module in model.modules():
        if "forward" in vars(module):  # which may be anything
            continue
        named = _named_beside_weight(type(module))
        parts: list[nn.Module] = [
            part
            for name, part in module._modules.items()
            if name in named and isinstance(part, nn.Linear)
        ]
        if parts:
            yield module, parts


_named: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def _named_beside_weight(kind: type) -> frozenset[str]:
    """Names in a class's methods that ask for a weight; none of torch's own, which see to hooks."""
    if kind in _named:
        return _named[kind]
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("torch."):
            break
        for method in vars(base).values():
            names = method.__code__.co_names if isinstance(method, types.FunctionType) else ()
            if "weight" in names:
                found.update(names)
    return _named.setdefault(kind, frozenset(found))


def hooks_of(module: nn.Module) -> Hooks:
    """The hooks that a module has now."""
    return {kind: frozenset(getattr(module, kind)) for kind in _HOOKS}


def has_other_hooks(module: nn.Module, earlier: Hooks) -> bool:
    """Whether anyone but earlier hooks would see the module run."""
    return any(getattr(module, kind).keys() - earlier[kind] for kind in _HOOKS[:2])


@contextmanager
def unseen(module: nn.Module, earlier: Hooks) -> Iterator[None]:
    """Keep earlier hooks of a module silent, as the network itself would not have run it."""
    before = {kind: vars(module)[kind] for kind in _HOOKS}
    try:
        for kind, hooks in before.items():
            own = type(hooks)((k, hook) for k, hook in hooks.items() if k not in earlier[kind])
            vars(module)[kind] = own
        yield
    finally:
        vars(module).update(before)


def run_unseen(module: nn.Module, earlier: Hooks, x: Tensor) -> Tensor:
    """Run a module past its earlier hooks."""
    with unseen(module, earlier):
        z: Tensor = module(x)
    return z


@contextmanager
def run_where_applied(model: nn.Module) -> Iterator[None]:
    """Let hooks that are put on such layers meanwhile see what their weights are applied to."""
    with ExitStack() as stack:
        for module, parts in list(users(model)):
            seen = [(part, hooks_of(part)) for part in parts]
            vars(module)["forward"] = partial(_run_if_watched, module, seen)
            stack.callback(vars(module).pop, "forward", None)
        yield


def _run_if_watched(
    module: nn.Module, parts: Sequence[tuple[nn.Module, Hooks]], *args: Any, **named: Any
) -> Any:
    watched = [(p, partial(run_unseen, p, h)) for p, h in parts if has_other_hooks(p, h)]
    with applied_by(watched):
        return type(module).forward(module, *args, **named)


@contextmanager
def applied_by(layers: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Meanwhile run layers, each in the way that is given, where `F.linear` meets their weights."""
    if not layers:
        yield
        return
    mode = _Instead(layers)
    with ExitStack() as stack:
        for layer, _ in layers:
            stack.enter_context(layer.register_forward_pre_hook(mode.enter, prepend=True))
            stack.enter_context(layer.register_forward_hook(mode.leave, always_call=True))
        stack.enter_context(mode)
        yield


class _Instead(TorchFunctionMode):
    """Runs layers in place of products with their weights, unless they run themselves."""

    def __init__(self, layers: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> None:
        super().__init__()
        self.layers = layers
        self.running: list[nn.Module] = []

    def enter(self, layer: nn.Module, _args: Any) -> None:
        self.running.append(layer)

    def leave(self, layer: nn.Module, _args: Any, _output: Any) -> None:
        self.running.remove(layer)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            call = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            for layer, run in self.layers:
                if call["weight"] is layer.weight and layer not in self.running:
                    return _beside_bias(layer, run(call["input"]), **{"bias": None, **call})
        return func(*args, **kwargs)


def _beside_bias(
    layer: nn.Module, z: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """A layer's output as the network has it, which may add another bias than the layer's.

    Zero is taken away where the layer was not changed, so that every bit stays.
    """
    own: Any = layer.bias
    if bias is own:
        return z
    return F.linear(input, weight, bias) - (F.linear(input, weight, own) - z)
