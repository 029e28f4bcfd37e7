"""Values from files that anyone may have written, checked before anything is made of them.

JSON is bounded in size, parts and depth, then built into our own types or refused. Everything here
raises ValueError, which the readers turn into one sentence on their file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from unbraid.base.errors import RunError, UnreadableError

T = TypeVar("T")

MAX_BYTES = 64 * 2**20  # of JSON in one file
_MAX_PARTS = 2**20  # objects and lists in it; an empty one takes many times its two characters
_MAX_DEPTH = 32
_MAX_WHOLE = 2**63  # what a tensor of whole numbers holds


class SchemaError(ValueError):
    """A file is of another version's schema."""


def unread(error: Exception, text: str) -> RunError:
    """Say in our own words what came up on reading a file.

    Returns:
        UnreadableError where the file may be sound all the same, RunError where it is not.
    """
    # An OSError without a number is how libraries call content that they cannot make out.
    of_the_system = isinstance(error, OSError) and error.errno is not None
    kind = UnreadableError if of_the_system or isinstance(error, SchemaError) else RunError
    return kind(text)


def read_json(path: Path) -> Any:
    """Read a JSON file that is not too large.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no JSON, or larger or deeper than any of ours.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")  # reading a pipe or a device might never end
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    return parse_json(content.decode("utf-8"))


def parse_json(text: str) -> Any:
    """Parse JSON that is not too large.

    Raises:
        ValueError: it is no JSON, or larger or deeper than any of ours.

    >>> parse_json("[" * 100 + "]" * 100)
    Traceback (most recent call last):
    ...
    ValueError: it is nested too deeply
    """
    if len(text) > MAX_BYTES or text.count("[") + text.count("{") > _MAX_PARTS:
        raise ValueError("it is too large")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for part in level for child in _children(part)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _children(part: Any) -> list[Any]:
    """The objects and lists that stand in an object or list."""
    inside = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [child for child in inside if isinstance(child, (dict, list))]


def check_schema(values: Any, schema: int) -> None:
    """Raise unless values are an object of a schema.

    Raises:
        SchemaError: they are of another one.
        ValueError: they are of none.
    """
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    found = values.get("schema")
    if found != schema:
        kind = SchemaError if type(found) is int else ValueError
        raise kind(f"schema {reprlib.repr(found)}, this version reads {schema}")


def in_range(name: str, value: float, least: float, most: float) -> None:
    """Raise unless a number lies between two others.

    Raises:
        ValueError: it does not.
    """
    if not least <= value <= most:
        raise ValueError(f"{name} is {reprlib.repr(value)}, not {least} to {most}")


def build(kind: type[T], value: Any, *, null_figures: bool = False) -> T:
    """Build a dataclass from what `dataclasses.asdict` gave, after a way through JSON.

    Args:
        kind: a dataclass whose fields are numbers, text, tuples, dicts and dataclasses.
        value: parsed JSON.
        null_figures: whether null stands for a figure that is not known, NaN.

    Raises:
        ValueError: an entry is missing, unknown or of another type than its field, a whole number
            does not fit into 64 bits, or another number is not finite.
    """
    return _Builder(null_figures).of(kind, value, "it")  # type: ignore[no-any-return]


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


@dataclasses.dataclass(frozen=True)
class _Builder:
    null_figures: bool

    def of(self, kind: Any, value: Any, name: str) -> Any:
        """Make a value of a type out of parsed JSON."""
        origin = get_origin(kind)
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            return self._dataclass(kind, value, name)
        if origin in (Union, types.UnionType):
            return self._union(get_args(kind), value, name)
        if origin is Literal and value in get_args(kind) and isinstance(value, str):
            return value
        if origin is tuple and isinstance(value, list):
            return self._tuple(get_args(kind), value, name)
        if origin is dict and isinstance(value, dict):
            _, inner = get_args(kind)
            return {key: self.of(inner, item, name) for key, item in value.items()}
        if kind is float and self.null_figures and value is None:
            return math.nan
        if kind is float and type(value) in (int, float) and abs(value) < float("inf"):
            return _as_float(value, name)
        if kind is int and type(value) is int and abs(value) < _MAX_WHOLE:
            return value
        if kind is bool and type(value) is bool:
            return value
        if kind is str and isinstance(value, str):  # half of a pair could never be written out
            return value.encode("utf-8", "replace").decode("utf-8")
        raise ValueError(f"{name} is {reprlib.repr(value)}, not {_words(kind)}")

    def _dataclass(self, kind: Any, value: Any, name: str) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {reprlib.repr(value)}, not a JSON object")
        hints, known = _hints(kind), {field.name: field for field in dataclasses.fields(kind)}
        unknown = value.keys() - known.keys()
        if unknown:
            raise ValueError(f"{name} has unknown entries {reprlib.repr(sorted(unknown))}")
        for key, field in known.items():
            needed = field.default is field.default_factory is dataclasses.MISSING
            if needed and key not in value:
                raise ValueError(f"{name} lacks {key!r}")
        return kind(**{key: self.of(hints[key], item, key) for key, item in value.items()})

    def _union(self, kinds: tuple[Any, ...], value: Any, name: str) -> Any:
        if value is None and type(None) in kinds:
            return None
        some = [kind for kind in kinds if kind is not type(None)]
        for kind in some[:-1]:
            try:
                return self.of(kind, value, name)
            except ValueError:
                continue
        return self.of(some[-1], value, name)

    def _tuple(self, kinds: tuple[Any, ...], value: list[Any], name: str) -> tuple[Any, ...]:
        if kinds[-1] is Ellipsis:
            return tuple(self.of(kinds[0], item, name) for item in value)
        if len(kinds) != len(value):
            raise ValueError(f"{name} has {len(value)} entries, not {len(kinds)}")
        return tuple(self.of(k, item, name) for k, item in zip(kinds, value, strict=True))


def _as_float(value: float, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {reprlib.repr(value)}, too large a number") from None


def _words(kind: Any) -> str:
    """Say what a type is, for people.

    >>> _words(int), _words(tuple[int, ...]), _words(Literal["auto"])
    ('a whole number', 'a list', "'auto'")
    """
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    simple = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return simple.get(kind) or ("a list" if get_origin(kind) is tuple else "a JSON object")
