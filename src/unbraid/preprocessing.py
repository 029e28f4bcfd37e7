"""What becomes of pictures before a network sees them, as text: two texts differ if that does.

A transform tells of itself what its `repr` says. Code of anyone's own, large tensors and unusual
number formats are not in there, so a hash of them follows in brackets.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.nested import inner_of, is_known, own

_CODE = re.compile(r" \[code [0-9a-f]{16}\]")
_FEW = 16  # numbers, which a text shows
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_USUAL = (torch.float32, torch.uint8)
_OF_MODULES = frozenset(vars(nn.Module()))  # what any module keeps
_MOST = 10_000  # objects looked at
# Kinds whose state moves with every use, by name, as their libraries need not be there.
_CHANGING = ("Generator", "RandomState", "Random", "lock", "RLock", "TextIOWrapper", "Logger")


def preprocessing_of(dataset: Dataset[Any]) -> str:
    """Describe all transforms on the way from the innermost data set to a network."""
    inner = inner_of(dataset)
    before = list(dict.fromkeys(map(preprocessing_of, inner)))
    inside = before[0] if len(before) == 1 else " | ".join(f"({text})" for text in before)
    texts = [inside, *map(_text_of, _transforms(dataset))]
    loader = getattr(dataset, "loader", None) if not inner else None  # of torchvision's folders
    if callable(loader) and not _of_library(loader):
        texts.append(_text_of(loader))
    return " then ".join(filter(None, texts))


def as_recorded(now: str, before: str) -> bool:
    """Whether an earlier version recorded a preprocessing, which did not look at anyone's code.

    >>> as_recorded("custom [code 0123456789abcdef]", "custom")
    True
    >>> as_recorded("custom [code 0123456789abcdef]", "custom [code ffffffffffffffff]")
    False
    """
    return now != before and _CODE.sub("", now) == before


def _transforms(dataset: Dataset[Any]) -> list[Any]:
    """What a data set does to images itself, in the order in which it keeps them."""
    found = own(dataset, "transform")[1]
    if found is None:
        joint = own(dataset, "transforms")[1]
        found = None if type(joint).__name__ == "StandardTransform" else joint
    others: list[Any] = []
    kept = vars(dataset) if hasattr(dataset, "__dict__") else {}
    lists_files = any(kept.get(name) is not None for name in ("samples", "ids"))
    if (inner_of(dataset) and not is_known(dataset)) or (lists_files and not _of_library(dataset)):
        names = ("transform", "transforms", "target_transform", "loader")
        others = [
            value
            for name, value in kept.items()
            if name not in names and callable(value) and not isinstance(value, Dataset)
        ]
    return [one for one in (found, *others) if one is not None]


def _text_of(transform: Any) -> str:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)  # which the texts of tensors leave out
        text = repr(transform)
    except Exception:  # of anyone's own
        text = " at 0x"
    finally:
        torch.set_default_dtype(before)
    # A default repr holds a memory address, which differs from run to run.
    text = text if " at 0x" not in text else getattr(transform, "__qualname__", "custom")
    parts: list[str] = []
    with suppress(Exception):  # of objects that do not let themselves be looked at
        parts.extend(_hidden(transform, False, {}))
    if not parts:
        return text
    kind = "code" if any(part.startswith("code ") for part in parts) else "values"
    return f"{text} [{kind} {hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}]"


def _hidden(value: Any, is_own: bool, seen: dict[int, Any]) -> Iterator[str]:
    """What the text of a transform does not tell, part by part.

    Args:
        value: the transform, or what it is made of.
        is_own: whether it is part of anyone's own code, whose text may tell nothing.
        seen: what was looked at, by its id.
    """
    if isinstance(value, _PLAIN):
        if is_own or (isinstance(value, torch.dtype) and value not in _USUAL):
            yield repr(value)
        return
    if id(value) in seen or len(seen) > _MOST:
        return
    seen[id(value)] = value
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        if is_own or np.prod(np.shape(value)) > _FEW:
            yield _content(value)
    elif isinstance(value, dict):
        yield from _hidden([*value.items()], is_own, seen)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _hidden(one, is_own, seen)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(part for one in value for part in _hidden(one, is_own, seen))
    elif isinstance(value, functools.partial):
        yield from _hidden([value.func, value.args, value.keywords], True, seen)
    elif isinstance(value, MethodType):
        yield from _hidden([value.__func__, value.__self__], is_own, seen)
    elif isinstance(value, FunctionType):
        yield from _of_function(value, seen)
    elif isinstance(value, type):
        yield from _of_class(value, seen)
    elif not isinstance(value, (ModuleType, Dataset)):
        yield from _of_object(value, is_own, seen)


def _of_function(function: FunctionType, seen: dict[int, Any]) -> Iterator[str]:
    if _of_library(function):
        yield f"{function.__module__}.{function.__qualname__}"
        return
    yield from _of_code(function.__code__)
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    yield from _hidden([cells, function.__defaults__, function.__kwdefaults__], True, seen)
    known = function.__globals__
    for used in (known[name] for name in function.__code__.co_names if name in known):
        is_code = isinstance(used, (FunctionType, type)) and not _of_library(used)
        if is_code or isinstance(used, (*_PLAIN, tuple, list, dict, Tensor)):
            yield from _hidden(used, True, seen)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that has no value yet
        return False


def _of_code(code: CodeType) -> Iterator[str]:
    yield f"code {code.co_code.hex()} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        elif isinstance(constant, frozenset):  # which has another order in every process
            yield str(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _of_class(kind: type, seen: dict[int, Any]) -> Iterator[str]:
    for one in kind.__mro__:
        if _of_library(one):
            continue
        yield f"code {one.__qualname__}"
        for name, value in sorted(vars(one).items()):
            inside = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(inside, FunctionType) and not _of_library(inside):
                yield from _of_function(inside, seen)
            elif not name.startswith("__"):
                yield from _hidden(inside, True, seen)


def _of_object(value: Any, is_own: bool, seen: dict[int, Any]) -> Iterator[str]:
    kind = type(value)
    if kind.__name__ in _CHANGING:
        return
    its_own = not _of_library(kind)
    if its_own:
        yield from _hidden(kind, True, seen)
    elif is_own:
        yield f"{kind.__module__}.{kind.__qualname__} {_plainly(value)}"
    if isinstance(value, nn.Module):
        yield from _hidden([value._parameters, value._buffers], True, seen)
        yield from _hidden(value._modules, is_own, seen)
    slots = [name for one in kind.__mro__ for name in getattr(one, "__slots__", ()) if its_own]
    for name in [*getattr(value, "__dict__", ()), *slots]:
        if name not in _OF_MODULES and (its_own or not name.startswith("_")):
            yield from _hidden(getattr(value, name, None), its_own, seen)


def _plainly(value: Any) -> str:
    text = repr(value)
    return "" if " at 0x" in text else text


def _content(value: Any) -> str:
    array = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value
    return f"{np.shape(array)} {hashlib.sha256(np.asarray(array).tobytes()).hexdigest()}"


def _of_library(thing: Any) -> bool:
    """Whether something is code of Python's own or of an installed library."""
    kind = thing if isinstance(thing, (type, FunctionType)) else type(thing)
    root = str(kind.__module__).split(".")[0]
    if root in sys.stdlib_module_names or root in ("builtins", "unbraid"):
        return root != "__main__"
    module = sys.modules.get(root)
    where = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(part in str(path) for path in where for part in ("site-packages", "dist-packages"))
