"""Networks taken out of wrappers, copied, and changed part by part.

In a copy, whatever leads to a part of the network, functions too, leads to the copy's part.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import logging
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from gc import get_referents, is_tracked
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from unbraid.base.arguments import a_type
from unbraid.base.errors import UsageError

_NOTHING_INSIDE: tuple[type, ...] = (
    *(type, str, bytes, int, float, complex, types.NoneType, Tensor, logging.Logger),
    *(types.ModuleType, types.CodeType, types.FrameType, types.TracebackType),
    *(types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType),
)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_CACHED: type = type(functools.lru_cache(lambda: None))
_MISSING = object()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside of torch.compile, DataParallel and DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"The network is {a_type(model)}; pass a torch.nn.Module.")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while "_orig_mod" in model._modules or isinstance(model, parallel):
        name = "_orig_mod" if "_orig_mod" in model._modules else "module"
        model = model.get_submodule(name)
    return model


def unwrapped_name(name: str) -> str:
    """Return a module's name without the names of the wrappers around the network.

    >>> unwrapped_name("module._orig_mod.layer4.0.conv3")
    'layer4.0.conv3'
    """
    for wrapper in ("_orig_mod.", "module."):
        if name.startswith(wrapper):
            return unwrapped_name(name.removeprefix(wrapper))
    return name


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a network, or a part of one, is on."""
    return next((tensor.device for tensor in _loaded(module)), torch.device("cpu"))


def number_format(model: nn.Module, images: Tensor) -> torch.dtype:
    """That of the first weights, which meet the images; theirs where either is no fraction."""
    formats = (weight.dtype for weight in _loaded(model) if weight.is_floating_point())
    return next(formats, images.dtype) if images.is_floating_point() else images.dtype


def _loaded(module: nn.Module) -> Iterator[Tensor]:
    """Weights that hold numbers, then buffers: none that are yet to be made or on no device."""
    for tensor in chain(module.parameters(), module.buffers()):
        if not is_lazy(tensor) and not tensor.is_meta:
            yield tensor


def copy_network(model: nn.Module) -> nn.Module:
    """Copy a network; everything in the copy, functions too, leads to the copy's own parts."""
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in tensors_in(vars(module))
        if not value.is_leaf
    }
    parts = Reach([*model.modules(), *model.parameters(), *model.buffers()])
    with torch.no_grad():  # as copies of scripted parts would else be computed from the originals
        copied: nn.Module = Copier(parts, computed).copy(model)
    for old, new in zip(model.parameters(), copied.parameters(), strict=True):
        if old.requires_grad != new.requires_grad:
            new.requires_grad_(old.requires_grad)
    return copied


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in containers inside of one another, which may hold themselves."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part, seen)


class Reach:
    """What leads to some objects, by any way that Python code could take at an instance."""

    def __init__(self, targets: Iterable[object]) -> None:  # noqa: D107
        self._targets = {id(target): target for target in targets}
        # Both are kept, so that ids stay: what leads to none, and the next on a way to one.
        self.apart: dict[int, object] = {}
        self._next: dict[int, tuple[object, object]] = {}

    def leads(self, x: object) -> bool:
        """Whether x is one of the targets or leads to one."""
        if id(x) not in self._targets and id(x) not in self.apart and id(x) not in self._next:
            self._explore(x)
        return id(x) not in self.apart

    def path(self, x: object) -> list[object] | None:
        """The objects on a way from x to a target, both included; None if there is no way."""
        if not self.leads(x):
            return None
        way = [x]
        while id(way[-1]) not in self._targets:
            way.append(self._next[id(way[-1])][1])
        return way

    def _explore(self, x: object) -> None:
        """Find out of x and of all behind it; each object is met once, as there may be millions."""
        met = {id(x): x}
        holders: dict[int, list[object]] = {}
        arrived: list[object] = []
        stack = [] if issubclass(type(x), _NOTHING_INSIDE) else [x]
        while stack:
            one = stack.pop()
            for part in self.inside(one):
                key = id(part)
                if key in self.apart or not is_tracked(part):
                    continue
                if key in self._targets or key in self._next:
                    if key not in holders:
                        arrived.append(part)
                elif issubclass(type(part), _NOTHING_INSIDE):
                    continue
                elif key not in met:
                    met[key] = part
                    stack.append(part)
                holders.setdefault(key, []).append(one)
        while arrived:
            part = arrived.pop()
            for holder in holders.get(id(part), ()):
                if id(holder) not in self._next:
                    self._next[id(holder)] = holder, part
                    arrived.append(holder)
        self.apart |= {key: one for key, one in met.items() if key not in self._next}

    def inside(self, x: object) -> Iterable[object]:
        """What an object leads to at once."""
        if isinstance(x, types.FunctionType):  # without its module's variables
            return [*(x.__closure__ or ()), x.__defaults__, x.__kwdefaults__, vars(x)]
        referent = _referent(x)
        if referent is not None:  # held by another; only the network's own parts are copied
            return [referent] if id(referent) in self._targets else []
        return get_referents(x)


def _referent(x: object) -> object | None:
    """What a weak reference refers to; None of anything else."""
    if issubclass(type(x), weakref.ref):
        return x()  # type: ignore[operator, no-any-return]
    with contextlib.suppress(ReferenceError, AttributeError):
        return x.__init__.__self__ if type(x) in _PROXIES else None  # type: ignore[misc]
    return None


class Copier:
    """Copies what leads to some objects part by part, and everything else as `copy.deepcopy`."""

    def __init__(self, reach: Reach, memo: dict[int, Any]) -> None:
        """`memo` has copies that are made already, by the ids of their originals."""
        self._memo = memo
        self._alive: list[object] = []  # so that an id in the memo stays one object's
        self._reach = reach

    def copy(self, x: Any) -> Any:
        """Copy anything, each object once."""
        made = self._memo.get(id(x), _MISSING)
        if made is _MISSING:
            self._alive.append(x)
            made = self._copied(x) if self._reach.leads(x) else self.apart(x)
            self._memo[id(x)] = made
        return made

    def _inner(self, x: Any) -> Any:
        """Copy what a function holds if it leads to the network; else it goes on using it."""
        return self.copy(x) if self._reach.leads(x) else x

    def apart(self, x: Any) -> Any:
        """Copy what does not lead to the network; what cannot be copied is shared."""
        made = self._tried(lambda: copy.deepcopy(x, self._memo))
        if made is not _MISSING:
            return made
        if type(x) in (dict, list):
            return self._rebuilt(x)
        return self.group(x) if type(x) in _GROUPS else x

    def _tried(self, make: Callable[[], Any]) -> Any:
        before = len(self._memo)
        try:
            return make()
        except Exception:  # of objects of anyone's own
            while len(self._memo) > before:  # copies that were not finished
                self._memo.popitem()
            return _MISSING

    def _copied(self, x: Any) -> Any:
        kind = type(x)
        if isinstance(x, Tensor):
            return copy.deepcopy(x, self._memo)
        if kind in _BUILDERS:
            return _BUILDERS[kind](self, x)
        # That of a parametrized module does what is done here, but by copy.deepcopy.
        if hasattr(kind, "__deepcopy__") and not (isinstance(x, nn.Module) and is_parametrized(x)):
            if isinstance(x, nn.Module):
                self._copy_ahead(x)
            made = self._tried(lambda: kind.__deepcopy__(x, self._memo))
            if made is not _MISSING and made is not x:  # which would lead to the original
                return made
        return self._rebuilt(x)

    def _copy_ahead(self, x: nn.Module) -> None:
        """Copy what a module holds before it does so itself, by copy.deepcopy with this memo."""
        back = Reach([x])
        for value in vars(x).values():
            if not back.leads(value):
                self.copy(value)

    def _rebuilt(self, x: Any) -> Any:
        """Copy an object by what it says of itself for pickling, else attribute by attribute."""
        for describe in (_reduced, _attributes):
            made = self._tried(functools.partial(self._made, x, describe))
            if made is not _MISSING:
                return made
        return x

    def _made(self, x: Any, describe: Callable[[Any], Any]) -> Any:
        how = describe(x)
        if isinstance(how, str):  # the name of a variable, which is shared
            return x
        self._alive.append(how)
        return copy._reconstruct(x, self._memo, *how, deepcopy=lambda part, _: self.copy(part))  # type: ignore[attr-defined]

    def function(self, x: types.FunctionType) -> Any:
        """Copy a function; variables around it that do not lead to the network stay shared."""
        closure = tuple(map(self._inner, x.__closure__ or ()))
        if id(x) in self._memo:  # made meanwhile, as one of its variables holds it
            return self._memo[id(x)]
        y = types.FunctionType(x.__code__, x.__globals__, x.__name__, None, closure or None)
        self._memo[id(x)] = y
        if x.__defaults__ is not None:
            y.__defaults__ = tuple(map(self._inner, x.__defaults__))
        if x.__kwdefaults__ is not None:
            y.__kwdefaults__ = {key: self._inner(v) for key, v in x.__kwdefaults__.items()}
        y.__qualname__, y.__module__, y.__doc__ = x.__qualname__, x.__module__, x.__doc__
        vars(y).update({key: self._inner(value) for key, value in vars(x).items()})
        return y

    def cell(self, x: types.CellType) -> Any:
        """Copy a variable, which functions may share."""
        y = self._memo[id(x)] = types.CellType()
        y.cell_contents = self.copy(x.cell_contents)
        return y

    def group(self, x: Any) -> Any:
        """Copy a tuple or a set, which may hold what holds it."""
        parts = [self.copy(part) for part in x]
        return self._memo[id(x)] if id(x) in self._memo else type(x)(parts)

    def weak(self, x: Any) -> Any:
        """Refer to the copy of what is referred to."""
        referent = self.copy(_referent(x))
        return weakref.ref(referent) if type(x) is weakref.ref else weakref.proxy(referent)


def _reduced(x: Any) -> Any:
    reduce = copyreg.dispatch_table.get(type(x))
    return reduce(x) if reduce else x.__reduce_ex__(4)


def _attributes(x: Any) -> Any:
    return copyreg.__newobj__, (type(x),), vars(x)  # type: ignore[attr-defined]


_GROUPS = (tuple, set, frozenset)
_BUILDERS: dict[type, Callable[[Copier, Any], Any]] = {
    types.FunctionType: Copier.function,
    types.CellType: Copier.cell,
    types.MethodType: lambda self, x: types.MethodType(
        self.copy(x.__func__), self.copy(x.__self__)
    ),
    types.BuiltinMethodType: lambda self, x: getattr(self.copy(x.__self__), x.__name__),
    _CACHED: lambda self, x: functools.lru_cache(**x.cache_parameters())(self.copy(x.__wrapped__)),
    staticmethod: lambda self, x: staticmethod(self.copy(x.__func__)),
    **dict.fromkeys(_GROUPS, Copier.group),
    **dict.fromkeys((weakref.ref, *_PROXIES), Copier.weak),
    weakref.WeakValueDictionary: lambda self, x: weakref.WeakValueDictionary(
        {key: self.copy(value) for key, value in x.items()}
    ),
}


def double(module: nn.Module, kind: type[nn.Module]) -> nn.Module | None:
    """Another module with the very same attributes; None if `__slots__` bar it from a kind."""
    try:
        twin: nn.Module = object.__new__(type(module))
        object.__setattr__(twin, "__class__", kind)
        object.__setattr__(twin, "__class__", type(module))
    except TypeError:
        return None
    object.__setattr__(twin, "__dict__", vars(module))
    return twin


def become(module: nn.Module, new: nn.Module) -> None:
    """Make a module what another one is, which is not to be used afterwards."""
    object.__setattr__(module, "__class__", type(new))
    object.__setattr__(module, "__dict__", vars(new))


def rebind(inner: nn.Module, outer: nn.Module) -> None:
    """Make functions that a module holds, as its own `forward`, run it, not the one around it."""
    copier = _Rebinding(inner, outer)
    for name, value in vars(inner).items():
        if callable(value) and not isinstance(value, (type, nn.Module)):
            vars(inner)[name] = copier.copy(value)


class _Rebinding(Copier):
    """Copies what leads to one module so that it leads to another; all else is shared."""

    def __init__(self, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__(_WithinOne([outer]), {id(outer): inner})

    def apart(self, x: Any) -> Any:
        return x


class _WithinOne(Reach):
    """What leads to a module without leading through another one."""

    def inside(self, x: object) -> Iterable[object]:
        return [] if isinstance(x, nn.Module) else super().inside(x)
