"""Whether a split is in force: whether the network runs the split layer, not the original past it.

A network may reach a layer by more than its modules. What leads there by attributes, containers and
functions is followed when a network is copied. Global variables are not the network's own, and what
runs in the end shows only when it runs.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from unbraid.copying import Reach
from unbraid.errors import ModelError, OutOfMemory
from unbraid.split_layer import SplitLayer

NOT_IN_FORCE = (
    "its split is not in force; let the network's code run the layer as a module that self leads "
    "to, not by a global variable, its forward or its weights"
)

_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_COMPARES = ("IS_OP", "COMPARE_OP", "CONTAINS_OP", "TO_BOOL", "POP_JUMP")  # and begin so
_HARMLESS = ("STORE_ATTR", "DELETE_ATTR", *_COMPARES)


def split_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that are split, in either form."""
    return {name: module for name, module in model.named_modules() if _is_split(module)}


def _is_split(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Sequential) and "names" in vars(module)
    return isinstance(module, SplitLayer) or (plain and {"wide", "merge"} <= set(module._modules))


@contextmanager
def in_force(model2: nn.Module) -> Iterator[None]:
    """Raise at the end if the network ran, or began to, and one of its split layers never did.

    Raises:
        ModelError: that is so.
    """
    layers = split_layers(model2)
    ran: Counter[str] = Counter()

    def refuse() -> None:
        never = [name for name in layers if not ran[name]]
        if ran[""] and never:
            raise ModelError(
                f"The network never runs layer {never[0]!r} on these images, so {NOT_IN_FORCE}."
            ) from None

    with ExitStack() as stack:
        for name, module in {**layers, "": model2}.items() if layers else ():
            hook = module.register_forward_pre_hook(partial(_count, ran, name))
            stack.callback(hook.remove)
        try:
            yield
        except OutOfMemory:
            raise
        except ModelError:  # as where a layer's weights are asked of two layers
            refuse()
            raise
    refuse()


def _count(ran: Counter[str], name: str, _module: nn.Module, _args: tuple[Any, ...]) -> None:
    ran[name] += 1


def refuse_ways_past(model: nn.Module, copied: nn.Module, layers: Sequence[str]) -> None:
    """Raise if a copy of a network is seen to run layers of the network itself.

    Args:
        model: the network.
        copied: its copy.
        layers: the names of those that are split in the copy.

    Raises:
        ModelError: it is.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in layers:
        names = [other for other, module in modules.items() if module is modules[name]]
        holders = {prefix for other in names for prefix in _prefixes(other)}
        reach = Reach(modules[holder] for holder in holders)
        way = reach.path(copied)
        reached = list(reach.apart.values())
        for method in _methods(reached) if way is None else ():
            way = way or reach.path(method)
        if way is not None:
            raise ModelError(_refusal(name, f"{_holder(way)} still leads to the original network"))
        for function in _functions(reached):
            variable = _global_way(function, reach)
            if variable is not None:
                why = f"{function.__qualname__!r} uses the global variable {variable!r}"
                raise ModelError(_refusal(name, f"{why}, which stays the original's"))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def _refusal(name: str, why: str) -> str:
    return (
        f"The split of layer {name!r} would not be in force: {why}; let the network's code reach "
        "the layer by self or by an argument."
    )


def _holder(way: Sequence[object]) -> str:
    """The last on the way that has a name, or the kind of what holds the original."""
    for one in way[-2::-1]:
        if isinstance(one, types.FunctionType):
            return f"{one.__qualname__!r}"
        if not isinstance(one, (dict, list, tuple, types.CellType)):
            return f"an object of type {type(one).__name__}"
    return "the network"


def _kinds(reached: Sequence[object]) -> list[type]:
    return list(dict.fromkeys(type(one) for one in reached if issubclass(type(one), nn.Module)))


def _methods(reached: Sequence[object]) -> list[object]:
    """Methods of modules' classes that hold variables, which are not copied with the network."""
    bases = dict.fromkeys(base for kind in _kinds(reached) for base in kind.__mro__)
    methods = [method for base in bases for method in vars(base).values()]
    return [one for one in methods if isinstance(one, types.FunctionType) and one.__closure__]


def _functions(reached: Sequence[object]) -> list[types.FunctionType]:
    """Functions that a network holds, and the forward functions of its modules."""
    found = [one for one in reached if type(one) is types.FunctionType]
    found += [inspect.getattr_static(kind, "forward") for kind in _kinds(reached)]
    return [one for one in dict.fromkeys(found) if type(one) is types.FunctionType]


def _global_way(function: types.FunctionType, reach: Reach) -> str | None:
    """The global variable by which a function, or one that it names, uses the original."""
    seen, open_ = {function}, [function]
    while open_:
        one = open_.pop()
        for name, attributes, use in _globals_used(one.__code__):
            value = one.__globals__.get(name)
            if type(value) is types.FunctionType and value.__globals__ is one.__globals__:
                if value not in seen:
                    seen.add(value)
                    open_.append(value)
            elif _uses(value, attributes, use, reach):
                return name
    return None


def _globals_used(code: types.CodeType) -> Iterator[tuple[str, list[str], str]]:
    """Each global variable, the attributes taken of it in turn, and what is then done with it."""
    instructions = list(dis.get_instructions(code))
    for n, one in enumerate(instructions):
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            rest = iter(i for i in instructions[n + 1 :] if i.opname not in ("PRECALL", "CACHE"))
            attributes, use = [], next(rest, None)
            while use is not None and use.opname in _ATTRIBUTE:
                attributes.append(str(use.argval))
                use = next(rest, None)
            yield str(one.argval), attributes, use.opname if use else ""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_used(constant)


def _uses(value: object, attributes: Sequence[str], use: str, reach: Reach) -> bool:
    """Whether what is done with a variable's value may run the original's layer.

    Only what is plain is said to, as a hook may well keep something in the network by its name.
    """
    for name in attributes:
        if not isinstance(value, nn.Module):
            break
        if hasattr(nn.Module, name) and name not in ("forward", "__call__"):
            return False  # asks for its mode or parameters
        value = getattr(value, name, None)
    runs = (nn.Module, dict, list, tuple, types.FunctionType, types.MethodType, partial)
    if not isinstance(value, runs) or use.startswith(_HARMLESS):
        return False
    if isinstance(value, types.MethodType) and not isinstance(value.__self__, nn.Module):
        return False
    return reach.leads(value)
