"""Names for classes from a file: CSV, JSON, or a line for each output."""

from __future__ import annotations

import ast
import csv
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unbraid.errors import DataError, UnbraidError
from unbraid.spelling import look_up, number_in, same_class, wordnet_id
from unbraid.tables import one_line

_LARGEST = 1 << 24  # bytes of a file
_HIGHEST = 1_000_000  # of an output's number
_NUMBER_BEFORE = re.compile(r"(?P<number>\d{1,6})[\s,;:|]\s*(?P<name>\S.*)", re.ASCII)
_NUMBER_BEHIND = re.compile(r"(?P<name>.*\S)[\s,;:|]\s*(?P<number>\d{1,6})", re.ASCII)
_KEYS = {"id", "wnid", "synset", "folder", "class", "number", "label", "index", "output", "key"}


@dataclass(frozen=True)
class Names:
    """What to call outputs and classes."""

    by_output: dict[int, str] = field(default_factory=dict)
    by_class: dict[str, str] = field(default_factory=dict)
    file: str = ""  # they were read from
    in_lines: bool = False  # a line for each output, without saying which

    def of_outputs(self, n_outputs: int) -> tuple[str, ...]:
        """Return the names of all outputs; empty where not all are named.

        Raises:
            DataError: they are names of more outputs, or fewer lines.
        """
        n_named = max(self.by_output, default=-1) + 1
        if n_named == n_outputs + 1 and 0 not in self.by_output:
            raise DataError(f"{self.file} counts outputs from 1; count from 0.")
        if n_named > n_outputs or (self.in_lines and n_named < n_outputs):
            raise DataError(
                f"{self.file} names outputs 0 to {n_named - 1}, but the network's go from 0 to "
                f"{n_outputs - 1}; give names for this network."
            )
        if len(self.by_output) < n_outputs:
            return ()
        return tuple(self.by_output[k] for k in range(n_outputs))

    def of_classes(self, labels: Mapping[str, int], guessed: bool) -> dict[str, str]:
        """Return the names of a data set's classes, as far as there are any.

        Args:
            labels: of the classes.
            guessed: whether that is a guess; then a class is not called as its output.

        Raises:
            DataError: there are names, but none is of one of these classes.
        """
        places = look_up(list(labels), {key: k for k, key in enumerate(self.by_class)})
        own = list(self.by_class.values())
        found = {c: own[k] for c, k in places.items() if k is not None}
        if not guessed:
            of_output = {c: self.by_output[k] for c, k in labels.items() if k in self.by_output}
            found = of_output | found
        if not found and self.by_class:
            raise DataError(
                f"{self.file} has no name for any class, such as {next(iter(labels))!r}; give "
                "names for these."
            )
        return found


def read_names(path: Path) -> Names:
    """Read names of classes or outputs.

    Args:
        path: a CSV or TSV file of two columns, what is named (a folder, class, WordNet id or
            output's number) and the name; JSON, a list or a dictionary of the same; or a text
            with a line for each output.

    Raises:
        DataError: it is none of these, or names one thing twice.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        text = content.decode("utf-8-sig")
        read = _READ.get(path.suffix.lower(), _from_lines)
        names = _sorted_out(read(text))
        in_lines = not names.by_class and (read is _from_lines or text.lstrip().startswith("["))
        return replace(names, file=str(path), in_lines=in_lines)
    except UnbraidError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(
            f"Names {path} cannot be read ({one_line(str(error))}); give a CSV file with columns "
            "for what is named and its name, JSON, or a text with a line for each output."
        ) from None


def _from_json(text: str) -> list[tuple[str, str]]:
    return _from_objects(json.loads(text))


def _from_objects(told: Any) -> list[tuple[str, str]]:
    if isinstance(told, dict) and isinstance(told.get("id2label"), dict):
        told = told["id2label"]  # of a model's configuration
    if isinstance(told, list):
        return [(str(k), _name(value)) for k, value in enumerate(told)]
    if not isinstance(told, dict):
        raise ValueError("it is neither a list nor a dictionary")
    if told and all(isinstance(v, int) and not isinstance(v, bool) for v in told.values()):
        return [
            (str(number), str(name)) for name, number in told.items()
        ]  # names and their outputs
    pairs = [(str(key), _name(value)) for key, value in told.items()]
    # {"0": ["n01440764", "tench"]} names an output, and the class of this id.
    ids = [(v[0], v[1]) for v in told.values() if _is_pair(v) and wordnet_id(v[0])]
    return pairs + ids


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _name(value: Any) -> str:
    if _is_pair(value):
        return str(value[1])
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is no name")
    return value


def _from_table(text: str) -> list[tuple[str, str]]:
    lines = text.splitlines()
    header = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if "\t" in header else max(",;|", key=header.count)
    rows = [row for row in csv.reader(lines, delimiter=delimiter, strict=True) if any(row)]
    titles = [title.strip().lower() for title in rows[0]] if rows else []
    key, name = 0, 1
    if "name" in titles or _KEYS & set(titles):
        key = next((k for k, title in enumerate(titles) if title in _KEYS), 0)
        name = titles.index("name") if "name" in titles else 1 - min(key, 1)
        if key == name:  # a class's name may be what is named
            key = next((k for k in range(len(titles)) if k != name), 0)
        rows = rows[1:]
    elif number_in("".join(titles[:1])) is None and _numbered(rows[1:]):
        rows = rows[1:]  # a header in other words
    short = next((row for row in rows if len(row) <= max(key, name)), None)
    if short is not None or not titles[1:]:
        raise ValueError(f"the row {','.join(short or titles)!r} has not two columns")
    return [(row[key].strip(), row[name].strip()) for row in rows]


def _numbered(rows: list[list[str]]) -> bool:
    return bool(rows) and all(number_in(row[0]) is not None for row in rows)


def _from_lines(text: str) -> list[tuple[str, str]]:
    if text.lstrip().startswith(("{", "[")):
        return _from_objects(_python(text))
    lines = [line.strip() for line in text.strip().splitlines()]
    words = [line.split(maxsplit=1) for line in lines]
    if all(len(word) == 2 and wordnet_id(word[0].rstrip(",:")) for word in words):
        ids = [word[0].rstrip(",:") for word in words]
        names = _unnumbered([word[1] for word in words])  # n01440764 449 tench
        return list(zip(ids, names, strict=True))  # n01440764 tench, Tinca tinca
    return [(str(k), line) for k, line in enumerate(_unnumbered(lines))]


def _python(text: str) -> Any:
    """Read what Python or JSON writes of a list or dictionary."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in texts
            return ast.literal_eval(text.strip())
    except (SyntaxError, TypeError, MemoryError):
        raise ValueError("it begins as a list or dictionary does, but is none") from None


def _unnumbered(lines: list[str]) -> list[str]:
    """Take off the numbers of lines, before or behind them, where all are numbered in order."""
    for form in (_NUMBER_BEFORE, _NUMBER_BEHIND):
        found = [form.fullmatch(line) for line in lines]
        numbers = [int(one["number"]) for one in found if one]
        first = numbers[0] if numbers else -1
        if len(lines) > 1 and first in (0, 1) and numbers == [*range(first, first + len(lines))]:
            return [one["name"] for one in found if one]
    return lines


def _sorted_out(pairs: Iterable[tuple[str, str]]) -> Names:
    names = Names()
    forms: dict[str, str] = {}
    pairs = list(pairs)
    if all(number_in(key) is None and number_in(name) is not None for key, name in pairs):
        pairs = [(name, key) for key, name in pairs]  # names and their outputs
    for key, name in pairs:
        (key + name).encode()  # which fails for what is no text, as JSON can hold
        if not key or not name.strip():
            raise ValueError(f"{key!r} is named {name!r}")
        if forms.setdefault(same_class(key), name) != name:
            raise ValueError(f"{key!r} has two names")
        number = number_in(key)
        if number is None:
            names.by_class[key] = name.strip()
        elif number < _HIGHEST:
            names.by_output[number] = name.strip()
        else:
            raise ValueError(f"there is no output {number}")
    if not forms:
        raise ValueError("it is empty")
    return names


_READ = {".json": _from_json, ".csv": _from_table, ".tsv": _from_table}
