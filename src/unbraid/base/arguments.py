"""What callers give, checked once at the door; numbers of numpy and torch count as numbers."""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from unbraid.base.errors import UsageError

T = TypeVar("T")

_MOST = 2**63 - 1  # what a tensor of whole numbers holds
MAX_WORKERS = 4096  # what no machine has, so a slip of the pen


def whole_number(name: str, value: Any, least: int = -_MOST, most: int = _MOST) -> int:
    """Return a whole number."""
    bounds = "" if least == -_MOST else f", {least} or more"
    bounds = bounds if most == _MOST else f" from {least} to {most}"
    return _whole(f"{name} is", value, f"a whole number{bounds}", least, most)


def whole_numbers(name: str, values: Any) -> list[int]:
    """Return whole numbers, as a list."""
    instead = "a list of whole numbers"
    return [_whole(f"{name} holds", value, instead) for value in _members(name, values, instead)]


def real_number(name: str, value: Any) -> float:
    """Return a number, which may be NaN or infinite: what is in range, the caller knows."""
    return _real(f"{name} is", value, "a number")


def real_numbers(name: str, values: Any) -> list[float]:
    """Return numbers, as a list."""
    instead = "a list of numbers"
    return [_real(f"{name} holds", value, instead) for value in _members(name, values, instead)]


def flag(name: str, value: Any) -> bool:
    """Return True or False; a text such as "no" would count as True."""
    if not _is_bool(value):
        _refuse(f"{name} is", value, "True or False")
    return bool(value)


def as_path(name: str, value: Any) -> Path:
    """Return a path."""
    try:
        path = os.fsdecode(value)
    except TypeError:
        path = ""
    if not path or "\0" in path:
        _refuse(f"{name} is", value, "a path")
    return Path(path)


def as_kind(name: str, value: Any, kind: type[T]) -> T:
    """Return an object of a type of unbraid's own, rather than its file or several of them."""
    if not isinstance(value, kind):
        _refuse(f"{name} is", value, f"one object of type {kind.__name__}")
    return value


def loading(batch_size: Any, workers: Any) -> tuple[int, int]:
    """Return how many images to run at a time, and how many processes are to load them."""
    n_workers = whole_number("workers", workers, 0, MAX_WORKERS)
    return whole_number("batch_size", batch_size, 1), n_workers


def chosen_indices(indices: Any, n_images: int) -> Sequence[int]:
    """Return the indices of the images asked for, in order and once each; None asks for all."""
    if indices is None:
        return range(n_images)
    chosen = sorted(set(whole_numbers("indices", indices)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= n_images:
        raise UsageError(
            f"indices must name places in the data set, 0 to {n_images - 1}, one or more."
        )
    return chosen


def a_type(value: Any) -> str:
    """Name the type of an object, with its article."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _refuse(what: str, value: Any, instead: str) -> NoReturn:
    shown = " ".join(reprlib.repr(value).split())
    raise UsageError(f"{what} {shown}; give {instead}.")


def _members(name: str, values: Any, instead: str) -> list[Any]:
    """The members of a list, tuple, set, range, array or tensor."""
    if hasattr(values, "tolist"):
        values = values.tolist()  # going through a tensor would make a tensor of every number
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        _refuse(f"{name} is", values, instead)
    return list(values)


def _whole(what: str, value: Any, instead: str, least: int = -_MOST, most: int = _MOST) -> int:
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        _refuse(what, value, instead)
    if _is_bool(value) or not least <= number <= most:
        _refuse(what, value, instead)
    return number


def _real(what: str, value: Any, instead: str) -> float:
    if isinstance(value, (str, bytes)) or _is_bool(value) or getattr(value, "ndim", 0) != 0:
        _refuse(what, value, instead)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        _refuse(what, value, instead)


def _is_bool(value: Any) -> bool:
    """Whether a value is True or False, perhaps numpy's or torch's."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
