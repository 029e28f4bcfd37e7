"""Layers that a network's code applies by their weights, without running them.

torchvision's Swin hands `self.qkv.weight` to `F.linear`, so the layer's hooks see nothing. Where
someone looks at such a layer, or it is split, it runs in that product's place.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABOUT = ("dtype", "device", "shape")  # what may be asked of a weight that is not applied
Hooks = Mapping[str, frozenset[int]]  # the keys of a module's hooks, by kind
NO_HOOKS: Hooks = dict.fromkeys(_HOOKS, frozenset())


def users(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules whose code uses the weight of a fully connected part, and all such parts of each.

    Not those that `run_parts` has prepared.
    """
    for module in model.modules():
        if "forward" in vars(module) or isinstance(module, RunsParts):  # the first may be anything
            continue
        named = _asked_for_weight(type(module))
        parts: list[nn.Module] = [
            part
            for name, part in module._modules.items()
            if name in named and isinstance(part, nn.Linear)
        ]
        if parts:
            yield module, parts


_asked: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def _asked_for_weight(kind: type) -> frozenset[str]:
    """Names that a class's forward, and methods that it may call, ask for a weight."""
    if kind in _asked:
        return _asked[kind]
    found: set[str] = set()
    names, done = ["forward"], {"forward", "__init__"}
    for name in names:  # which grow
        for code in _codes(kind, name):
            found |= {own for own, of in _chains(code) if of == "weight"}
            names += [other for other in code.co_names if other not in done]
            done.update(code.co_names)
    return _asked.setdefault(kind, frozenset(found))


def _codes(kind: type, name: str) -> Iterator[types.CodeType]:
    """What a class's own methods of a name do; not torch's, which see to hooks."""
    for base in kind.__mro__:
        if base.__module__.startswith("torch."):
            return
        method = vars(base).get(name)
        method = method.fget if isinstance(method, property) else method
        while method is not None:  # within what decorates it
            method = getattr(method, "__func__", method)
            if isinstance(method, types.FunctionType):
                yield from _with_inner(method.__code__)
            method = getattr(method, "__wrapped__", None)


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


def _chains(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """Pairs of names of which the second is asked of the first, as in `.qkv.weight`."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    names = [step.argval if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else "" for step in steps]
    for one, other, behind in zip(names, names[1:], [*names[2:], ""], strict=False):
        if one and other and behind not in _ABOUT:
            yield one, other


def hooks_of(module: nn.Module) -> Hooks:
    """The hooks that a module has now."""
    return {kind: frozenset(getattr(module, kind)) for kind in _HOOKS}


def has_other_hooks(module: nn.Module, earlier: Hooks) -> bool:
    """Whether anyone but earlier hooks would see the module run."""
    return any(getattr(module, kind).keys() - earlier[kind] for kind in _HOOKS[:2])


_one_by_one = RLock()


@contextmanager
def unseen(module: nn.Module, earlier: Hooks) -> Iterator[None]:
    """Keep earlier hooks of a module silent, as the network itself would not have run it.

    One thread after another, as the module is there for all.
    """
    if not any(getattr(module, kind).keys() & earlier[kind] for kind in _HOOKS):
        yield
        return
    with _one_by_one:
        yield from _unseen(module, earlier)


def _unseen(module: nn.Module, earlier: Hooks) -> Iterator[None]:
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
    """Runs layers in place of products with their weights, unless they run themselves.

    It counts in one thread alone, but other threads may run the same layers meanwhile.
    """

    def __init__(self, layers: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> None:
        super().__init__()
        self.layers = layers
        self.thread = get_ident()
        self.running: list[nn.Module] = []

    def enter(self, layer: nn.Module, _args: Any) -> None:
        if get_ident() == self.thread:
            self.running.append(layer)

    def leave(self, layer: nn.Module, _args: Any, _output: Any) -> None:
        if get_ident() == self.thread and layer in self.running:
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


class RunsParts(nn.Module):
    """What a module becomes one of whose parts was split: its code, which runs its split parts.

    Parts that were not split run too where someone put a hook on them since.
    """

    hooks_before_split: Mapping[str, Hooks]  # of parts, by name

    def forward(self, *args: Any, **named: Any) -> Any:
        """Do what the module's own code does; tracers of torch.fx meet one step."""
        for value in (*args, *named.values()):
            if isinstance(value, Proxy):
                tracer: Any = value.tracer
                path = tracer.path_of_module(self)
                return tracer.create_proxy("call_module", path, args, named)
        layers = [(part, partial(_run_part, part, hooks)) for part, hooks in self._parts_that_run()]
        with applied_by(layers):
            return super().forward(*args, **named)

    def _parts_that_run(self) -> Iterator[tuple[nn.Module, Hooks]]:
        for name, hooks in self.hooks_before_split.items():
            part = self._modules.get(name)
            if part is not None and not (
                isinstance(part, nn.Linear) and not has_other_hooks(part, hooks)
            ):
                yield part, hooks

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Say how to make it, as its class is made while the program runs."""
        made: Any = super().__reduce_ex__(protocol)
        _, (_, *rest), *state = made
        return _new, (own_class(type(self)), *rest), *state


def run_parts(module: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Let a module run parts that are split later, in place of products with their weights."""
    before = {name: hooks_of(part) for name, part in module.named_children() if part in parts}
    kind: Any = type(module)
    object.__setattr__(module, "__class__", _running_parts(kind))
    vars(module)["hooks_before_split"] = before


def own_class(kind: type) -> type:
    """The class whose code a module runs."""
    return kind.__mro__[2] if issubclass(kind, RunsParts) and kind is not RunsParts else kind


@cache
def _running_parts(kind: type) -> type:
    return types.new_class(
        kind.__name__, (RunsParts, kind), {}, lambda body: body.update(__module__=kind.__module__)
    )


def _new(kind: Any) -> Any:
    return object.__new__(_running_parts(kind))


def _run_part(part: nn.Module, hooks: Hooks, x: Tensor) -> Tensor:
    """Run a part; a split one has the hooks on the layer within."""
    within: Any = getattr(part, "original", part)
    with unseen(within, hooks):
        z: Tensor = part(x)
    return z
