"""What callers give: whole numbers, numbers, lists of them, yes or no, paths, in plain types.

Numbers of numpy and torch are taken for what they are. What is close to a number, such as a text
with digits, or True, is most likely a mistake, and is told as one. Everything here raises
UsageError, whose sentence names the argument.
"""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from unbraid.base.errors import UsageError

T = TypeVar("T")

_MOST = 2**63 - 1  # what a tensor of whole numbers holds
MAX_WORKERS = 4096  # what no machine has, so a slip of the pen


def whole_number(name: str, value: Any, least: int | None = None, most: int = _MOST) -> int:
    """Return a whole number.

    >>> whole_number("n", 3, 1)
    3
    >>> whole_number("n", 2.5, 1)
    Traceback (most recent call last):
    ...
    unbraid.base.errors.UsageError: n is 2.5; give a whole number, 1 or more.
    """
    number = _as_whole(value)
    if number is None or not (-_MOST if least is None else least) <= number <= most:
        if most < _MOST:
            bounds = f" from {least} to {most}"
        else:
            bounds = "" if least is None else f", {least} or more"
        raise UsageError(f"{name} is {_shown(value)}; give a whole number{bounds}.")
    return number


def whole_numbers(name: str, values: Any) -> list[int]:
    """Return whole numbers, as a list.

    >>> whole_numbers("classes", {3}), whole_numbers("classes", range(2))
    ([3], [0, 1])
    >>> whole_numbers("classes", [0.0])
    Traceback (most recent call last):
    ...
    unbraid.base.errors.UsageError: classes holds 0.0; give a list of whole numbers.
    """
    numbers = []
    for value in _listed(name, values, "whole numbers"):
        number = _as_whole(value)
        if number is None or not -_MOST <= number <= _MOST:
            raise UsageError(f"{name} holds {_shown(value)}; give a list of whole numbers.")
        numbers.append(number)
    return numbers


def real_number(name: str, value: Any) -> float:
    """Return a number, which may be NaN or infinite: what is in range, the caller knows.

    >>> real_number("p", 1)
    1.0
    >>> real_number("p", "0.75")
    Traceback (most recent call last):
    ...
    unbraid.base.errors.UsageError: p is '0.75'; give a number.
    """
    number = _as_real(value)
    if number is None:
        raise UsageError(f"{name} is {_shown(value)}; give a number.")
    return number


def real_numbers(name: str, values: Any) -> list[float]:
    """Return numbers, as a list.

    >>> real_numbers("taus", (0.03, 1))
    [0.03, 1.0]
    """
    numbers = []
    for value in _listed(name, values, "numbers"):
        number = _as_real(value)
        if number is None:
            raise UsageError(f"{name} holds {_shown(value)}; give a list of numbers.")
        numbers.append(number)
    return numbers


def flag(name: str, value: Any) -> bool:
    """Return True or False; a text such as "no" would count as True.

    >>> flag("positions", "no")
    Traceback (most recent call last):
    ...
    unbraid.base.errors.UsageError: positions is 'no'; give True or False.
    """
    if not _is_bool(value):
        raise UsageError(f"{name} is {_shown(value)}; give True or False.")
    return bool(value)


def as_path(name: str, value: Any) -> Path:
    """Return a path.

    >>> as_path("out", None)
    Traceback (most recent call last):
    ...
    unbraid.base.errors.UsageError: out is None; give a path.
    """
    try:
        path = os.fsdecode(value)
    except TypeError:
        path = ""
    if not path or "\0" in path:
        raise UsageError(f"{name} is {_shown(value)}; give a path.")
    return Path(path)


def as_kind(name: str, value: Any, kind: type[T]) -> T:
    """Return an object of a type of unbraid's own, rather than its file or several of them.

    >>> as_kind("scan", "runs/train", Path)
    Traceback (most recent call last):
    ...
    unbraid.base.errors.UsageError: scan is 'runs/train'; give one object of type Path.
    """
    if not isinstance(value, kind):
        raise UsageError(f"{name} is {_shown(value)}; give one object of type {kind.__name__}.")
    return value


def loading(batch_size: Any, workers: Any) -> tuple[int, int]:
    """Return how many images to run at a time, and how many processes are to load them."""
    return whole_number("batch_size", batch_size, 1), whole_number(
        "workers", workers, 0, MAX_WORKERS
    )


def _listed(name: str, values: Any, what: str) -> list[Any]:
    """The members of a list, tuple, set, range, array or tensor."""
    if hasattr(values, "tolist"):
        values = values.tolist()  # going through a tensor would make a tensor of every number
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise UsageError(f"{name} is {_shown(values)}; give a list of {what}.")
    return list(values)


def _as_whole(value: Any) -> int | None:
    """The number that a value is, None if it is no whole one."""
    try:
        return None if _is_bool(value) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _as_real(value: Any) -> float | None:
    """The number that a value is, None if it is none."""
    if isinstance(value, (str, bytes)) or _is_bool(value) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _is_bool(value: Any) -> bool:
    """Whether a value is True or False, perhaps numpy's or torch's."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _shown(value: Any) -> str:
    """What was given, in one line that has an end."""
    return " ".join(reprlib.repr(value).split())
