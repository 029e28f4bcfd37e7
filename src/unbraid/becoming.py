"""One module made into another, so that whatever leads to it leads to what it has become."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from unbraid.copying import Copier, Reach


def double(module: nn.Module, kind: type[nn.Module]) -> nn.Module | None:
    """Another module with the very same attributes; None if the first could not become of a kind.

    A class that lays out its instances in a way of its own, by `__slots__`, cannot.
    """
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
    """Make functions that a module holds run itself where they run the one it was made from.

    Such as a `forward` of its own, which else would run the module around it, and so itself, again.
    """
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
