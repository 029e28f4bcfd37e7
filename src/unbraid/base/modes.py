"""Leave things as found: torch's modes, the caller's random numbers, a network's state."""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unbraid.base.errors import ModelError

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = (bool, int, float, complex, str, type(None))
_LISTS = (list, deque)
_CONTAINERS = (*_LISTS, dict, set, OrderedDict)
_MISSING = object()
_OF_ALL = frozenset(vars(nn.Module()))  # attributes
_callers: ContextVar[torch.device | None] = ContextVar("_callers", default=None)


def in_plain_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Run a public function outside of torch's modes; the caller's random numbers go on."""

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> R:
        device, numbers = own_device(), same_random()
        with without_inference(), torch.enable_grad(), without_autocast(), device, numbers:
            return function(*args, **named)

    return run


def without_inference() -> AbstractContextManager[Any]:
    """Leave inference mode, if it is on."""
    on = torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if on else nullcontext()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the numbers' own format, also where a network has switched autocast on."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def own_device() -> Iterator[None]:
    """Make numbers of ours on the processor, whatever default device the caller has set."""
    default = torch.get_default_device()
    if default.type == "cpu":
        yield
        return
    before = _callers.set(default)
    try:
        with torch.device("cpu"):
            yield
    finally:
        _callers.reset(before)


def callers_device() -> AbstractContextManager[Any]:
    """Let a caller's own code, such as a network's, make numbers on the caller's default device."""
    return _callers.get() or nullcontext()


@contextmanager
def same_random() -> Iterator[None]:
    """Put all random numbers back to where they were: torch's, numpy's and Python's own."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (np.random.set_state, np.random.get_state()),
        (random.setstate, random.getstate()),
    ]
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():
            states.append((backend.set_rng_state_all, backend.get_rng_state_all()))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    try:
        yield
    finally:
        for put, state in states:
            put(state)


@contextmanager
def drawing_alike() -> Iterator[None]:
    """Have random numbers be the same each time, and put the caller's back."""
    with same_random():
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        yield


@contextmanager
def restored(model: nn.Module, *, wholly: bool = False) -> Iterator[None]:
    """Put back what a network keeps of itself: flags, buffers, and tensors beside them.

    With `wholly`, plain attributes too, such as counters, and what lists and dictionaries hold.
    Raises ModelError if the network makes weights of its own when it runs, or has none.
    """
    modules = list(model.modules())
    with _ordinary(modules), ExitStack() as stack:
        for module in modules:
            if any(is_lazy(p) for p in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(_refuse_lazy, prepend=True).remove)
            if _lacks_numbers(module):
                stack.callback(module.register_forward_hook(_refuse_meta).remove)
        kept = [_Kept(module, wholly) for module in modules]
        try:
            yield
        finally:
            grown = [one.module for one in kept if one.put_back()]
        for module in grown:
            _refuse_lazy(module)


def refuse_missing_weights(module: nn.Module) -> None:
    """Raise ModelError if a layer's weights are yet to be made, or hold no numbers."""
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        _refuse_lazy(module)
    _refuse_meta(module)


def _refuse_lazy(module: nn.Module, *_: Any) -> None:
    raise ModelError(
        f"The network makes weights (in a {type(module).__name__}) when it first runs; run it once "
        "on an image before."
    )


def _refuse_meta(module: nn.Module, *_: Any) -> None:
    if _lacks_numbers(module):
        raise ModelError(
            f"A {type(module).__name__} of the network is on the meta device, so holds no numbers; "
            "load the weights first."
        )


def _lacks_numbers(module: nn.Module) -> bool:
    """Whether a layer of torch's has weights on the meta device, and no `forward` to fetch them."""
    own = type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module)
    return own and any(p.is_meta for p in module.parameters(recurse=False))


class _Kept:
    """What a module holds, its own children left out."""

    def __init__(self, module: nn.Module, wholly: bool) -> None:
        self.module = module
        self.training = getattr(module, "training", None)
        own = self.own = {} if isinstance(module, torch.jit.ScriptModule) else vars(module)
        wholly = wholly or type(module).get_extra_state is not nn.Module.get_extra_state
        kinds = (*_PLAIN, *_CONTAINERS) if wholly else ()
        self.attributes = {
            name: value
            for name, value in own.items()
            if isinstance(value, Tensor) or (type(value) in kinds and name not in _OF_ALL)
        }
        values = list(self.attributes.values())
        held = [value for value in values if type(value) in _CONTAINERS]
        held += [own[name] for name in ("_parameters", "_modules", "_buffers") if name in own]
        self.contents = [(container, copy.copy(container)) for container in held]
        buffers = [buffer for _, buffer in module.named_buffers("", False, False)]
        self.values = [
            (t, t.detach().clone())
            for t in (*buffers, *values)
            if isinstance(t, Tensor) and t.layout == torch.strided and not (is_lazy(t) or t.is_meta)
        ]
        self.names = self._names()

    def _names(self) -> set[str]:
        return {*self.own.get("_parameters", ()), *self.own.get("_modules", ())}

    def put_back(self) -> bool:
        """Put everything back; say whether the module holds weights that it did not hold before."""
        if self.training is not None and self.module.training != self.training:
            self.module.training = self.training
        for tensor, value in self.values:
            with torch.no_grad():
                if tensor.shape != value.shape or tensor.dtype != value.dtype:
                    tensor.data = value
                elif not torch.equal(tensor, value):
                    tensor.copy_(value)
        grown = bool(self._names() - self.names)
        for name, value in self.attributes.items():
            if self.own.get(name, _MISSING) is not value:
                self.own[name] = value
        for container, content in self.contents:
            same = isinstance(content, dict) and list(container) == list(content)
            if not (same and all(container[name] is content[name] for name in content)):
                container.clear()
                (container.extend if isinstance(content, _LISTS) else container.update)(content)
        return grown


@contextmanager
def _ordinary(modules: list[nn.Module]) -> Iterator[None]:
    """Put copies in place of tensors of inference mode; put the very same tensors back."""
    copies: dict[int, Tensor] = {}
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    owns = [vars(module) for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    try:
        for held in (part for own in owns for part in (own["_parameters"], own["_buffers"], own)):
            for name, value in held.items():
                if isinstance(value, Tensor) and not is_lazy(value) and value.is_inference():
                    swapped.append((held, name, value))
                    held[name] = copies.setdefault(id(value), copy.deepcopy(value))
        yield
    finally:
        for held, name, value in swapped:
            held[name] = value
