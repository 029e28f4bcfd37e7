"""Values from files that anyone may have written, checked; everything here raises ValueError."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from unbraid.base.errors import RunError, UnreadableError, brief

T = TypeVar("T")

MAX_BYTES = 64 * 2**20  # of JSON in one file
_MAX_PARTS = 2**20  # objects and lists in it; an empty one takes many times its two characters
_MAX_DEPTH = 32


class SchemaError(ValueError):
    """A file is of another version's schema."""


def unread(error: Exception, text: str) -> RunError:
    """Make an UnreadableError where a file may be sound all the same, a RunError where not."""
    # An OSError without a number is how libraries call content that they cannot make out.
    of_the_system = isinstance(error, OSError) and error.errno is not None
    kind = UnreadableError if of_the_system or isinstance(error, SchemaError) else RunError
    return kind(text)


def read_json(path: Path) -> Any:
    """Read a JSON file that is not too large; OSError if it cannot be opened, else ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")  # reading a pipe or a device might never end
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    return parse_json(content.decode("utf-8"))


def parse_json(text: str) -> Any:
    """Parse JSON; raises ValueError where it is none, or larger or deeper than any of ours."""
    if len(text) > MAX_BYTES or text.count("[") + text.count("{") > _MAX_PARTS:
        raise ValueError("it is too large")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level: list[Any] = [[value]]
    for _ in range(_MAX_DEPTH + 1):
        inside = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for items in inside for item in items if isinstance(item, (dict, list))]
    if level:
        raise ValueError("it is nested too deeply")
    return value


def check_schema(values: Any, schema: int) -> None:
    """Raise SchemaError if values are an object of another schema, ValueError if of none."""
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    found = values.get("schema")
    if found != schema:
        kind = SchemaError if type(found) is int else ValueError
        raise kind(f"schema {reprlib.repr(found)}, this version reads {schema}")


def in_range(name: str, value: float, least: float, most: float) -> None:
    """Raise ValueError unless a number lies between two others."""
    if not least <= value <= most:
        raise ValueError(f"{name} is {reprlib.repr(value)}, not {least} to {most}")


def build(kind: type[T], value: Any, *, null_figures: bool = False) -> T:
    """Build a dataclass from parsed JSON of `dataclasses.asdict`; ValueError where it does not fit.

    With `null_figures`, null stands for a figure that is not known, NaN.
    """
    try:
        return msgspec.convert(_checked(kind, value, null_figures), kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise ValueError(brief(error)) from None


def _checked(kind: Any, value: Any, null_figures: bool) -> Any:
    """Parsed JSON with NaN for null figures; refuses unknown entries and numbers too large."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if isinstance(value, str):  # half of a pair of surrogates could never be written out
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{reprlib.repr(value)} does not fit into 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    if value is None and kind is float and null_figures:
        return math.nan
    if origin in (Union, types.UnionType) and value is not None:
        for one in inner:
            value = _checked(one, value, null_figures)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(kind)
        unknown = value.keys() - {field.name for field in dataclasses.fields(kind)}
        if unknown:
            raise ValueError(f"it has unknown entries {reprlib.repr(sorted(unknown))}")
        return {name: _checked(hints[name], item, null_figures) for name, item in value.items()}
    elif origin is dict and isinstance(value, dict):
        return {name: _checked(inner[1], item, null_figures) for name, item in value.items()}
    elif origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return [_checked(k, v, null_figures) for k, v in zip(kinds, value, strict=True)]
    return value


_hints = cache(get_type_hints)
