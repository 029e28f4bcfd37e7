"""Copies of networks: whatever in a copy leads to a part of the network leads to the copy's part.

`copy.deepcopy` takes functions for constants. A closure, a hook or a lambda in a copy would still
run the original's layers. Here functions are copied too, where they lead to the network. And what
cannot be copied at all, such as a lock or an open file, is shared instead of stopping everything.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import logging
import types
import weakref
from collections.abc import Callable, Iterable
from gc import get_referents, is_tracked
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

_NOTHING_INSIDE: tuple[type, ...] = (
    *(type, str, bytes, int, float, complex, types.NoneType, Tensor, logging.Logger),
    *(types.ModuleType, types.CodeType, types.FrameType, types.TracebackType),
    *(types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType),
)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_CACHED: type = type(functools.lru_cache(lambda: None))
_MISSING = object()


class Reach:
    """What leads to some objects, by any way that Python code could take at an instance."""

    def __init__(self, targets: Iterable[object]) -> None:
        """Look for these."""
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
        """The objects on a way from x to a target, both with it; None if there is no way."""
        if not self.leads(x):
            return None
        way = [x]
        while id(way[-1]) not in self._targets:
            way.append(self._next[id(way[-1])][1])
        return way

    def _explore(self, x: object) -> None:
        """Find out of x, and of all that it leads to, whether it leads to a target.

        Each object is met once, whoever asks, as there may be millions of them.
        """
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
    """What a weak reference refers to."""
    found: object | None = None
    if type(x) in _PROXIES:
        with contextlib.suppress(ReferenceError, AttributeError):
            found = x.__init__.__self__  # type: ignore[misc]
    elif issubclass(type(x), weakref.ref):
        found = x()  # type: ignore[operator]
    return found


def copy_with_functions(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a network, its functions too where they lead to parts of it.

    Args:
        model: the network.
        memo: copies of objects that are not to be made here, by their id.
    """
    parts = Reach([*model.modules(), *model.parameters(), *model.buffers()])
    copied: nn.Module = Copier(parts, memo).copy(model)
    return copied


class Copier:
    """Copies what leads to some objects part by part, and everything else as `copy.deepcopy`."""

    def __init__(self, reach: Reach, memo: dict[int, Any]) -> None:
        """Begin with copies that are made already, by the id of what they are copies of."""
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
        return _BUILDERS[type(x)](self, x) if type(x) in _CONTAINERS else x

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
        made = self._tried(lambda: self._constructed(x))
        if made is _MISSING:
            made = self._tried(lambda: (copyreg.__newobj__(type(x)), vars(x), (), ()))  # type: ignore[attr-defined]
        if made is _MISSING or made[0] is x:
            return x
        y, state, items, pairs = made
        self._memo[id(x)] = y
        if state is not None:
            self._alive.append(state)
            _set_state(y, self.copy(state))
        for item in items:
            y.append(self.copy(item))
        for key, value in pairs:
            y[self.copy(key)] = self.copy(value)
        return y

    def _constructed(self, x: Any) -> tuple[Any, Any, Iterable[Any], Iterable[tuple[Any, Any]]]:
        """An object of x's kind, still empty, and what is to be put into it."""
        reduce = copyreg.dispatch_table.get(type(x))
        how = reduce(x) if reduce else x.__reduce_ex__(4)
        if isinstance(how, str):
            return x, None, (), ()
        make, arguments, state, items, pairs = (*how, None, None, None)[:5]
        self._alive.append(how)
        y = make(*(self.copy(argument) for argument in arguments))
        return y, state, items or (), pairs or ()

    def function(self, x: types.FunctionType) -> Any:
        """Copy a function; variables around it that do not lead to the network stay shared."""
        cells = {id(cell): cell for cell in x.__closure__ or () if self._reach.leads(cell)}
        new = [key for key in cells if key not in self._memo]
        for key in new:
            self._memo[key] = types.CellType()
        closure = tuple(
            self._memo[id(c)] if id(c) in cells else c  # two functions may share a variable
            for c in x.__closure__ or ()
        )
        y = types.FunctionType(x.__code__, x.__globals__, x.__name__, None, closure or None)
        self._memo[id(x)] = y  # before what it holds, which may lead back to it
        for key in new:
            self._memo[key].cell_contents = self.copy(cells[key].cell_contents)
        if x.__defaults__ is not None:
            y.__defaults__ = tuple(map(self._inner, x.__defaults__))
        if x.__kwdefaults__ is not None:
            y.__kwdefaults__ = {key: self._inner(v) for key, v in x.__kwdefaults__.items()}
        y.__qualname__, y.__module__, y.__doc__ = x.__qualname__, x.__module__, x.__doc__
        vars(y).update({key: self._inner(value) for key, value in vars(x).items()})
        return y

    def cell(self, x: types.CellType) -> Any:
        """Copy a variable that functions share."""
        y = self._memo[id(x)] = types.CellType()
        y.cell_contents = self.copy(x.cell_contents)
        return y

    def mapping(self, x: dict[Any, Any]) -> Any:
        """Copy a dictionary."""
        y: dict[Any, Any] = {}
        self._memo[id(x)] = y
        y.update((self.copy(key), self.copy(value)) for key, value in x.items())
        return y

    def sequence(self, x: list[Any]) -> Any:
        """Copy a list."""
        y: list[Any] = []
        self._memo[id(x)] = y
        y.extend(self.copy(part) for part in x)
        return y

    def group(self, x: Any) -> Any:
        """Copy a tuple or a set, which may hold what holds it."""
        parts = [self.copy(part) for part in x]
        return self._memo[id(x)] if id(x) in self._memo else type(x)(parts)

    def weak(self, x: Any) -> Any:
        """Refer to the copy of what is referred to."""
        referent = self.copy(_referent(x))
        return weakref.ref(referent) if type(x) is weakref.ref else weakref.proxy(referent)


def _set_state(y: Any, state: Any) -> None:
    """Do what `copy` does with an object's state."""
    if hasattr(type(y), "__setstate__"):
        y.__setstate__(state)
        return
    own, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if own is not None:
        y.__dict__.update(own)
    for name, value in (slots or {}).items():
        setattr(y, name, value)


_CONTAINERS = (dict, list, tuple, set, frozenset)
_BUILDERS: dict[type, Callable[[Copier, Any], Any]] = {
    types.FunctionType: Copier.function,
    types.CellType: Copier.cell,
    types.MethodType: lambda self, x: types.MethodType(
        self.copy(x.__func__), self.copy(x.__self__)
    ),
    types.BuiltinMethodType: lambda self, x: getattr(self.copy(x.__self__), x.__name__),
    _CACHED: lambda self, x: functools.lru_cache(**x.cache_parameters())(self.copy(x.__wrapped__)),
    staticmethod: lambda self, x: staticmethod(self.copy(x.__func__)),
    classmethod: lambda self, x: classmethod(self.copy(x.__func__)),
    types.MappingProxyType: lambda self, x: types.MappingProxyType(self.mapping(dict(x))),
    dict: Copier.mapping,
    list: Copier.sequence,
    **dict.fromkeys((tuple, set, frozenset), Copier.group),
    **dict.fromkeys((weakref.ref, *_PROXIES), Copier.weak),
    weakref.WeakSet: lambda self, x: weakref.WeakSet([self.copy(part) for part in x]),
    **dict.fromkeys(
        (weakref.WeakKeyDictionary, weakref.WeakValueDictionary),
        lambda self, x: type(x)([(self.copy(key), self.copy(value)) for key, value in x.items()]),
    ),
}
