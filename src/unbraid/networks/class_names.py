"""Names of classes: ImageNet's, how they are spelled, and those that a file gives."""

from __future__ import annotations

import ast
import csv
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from unbraid.base.errors import DataError
from unbraid.base.tables import one_line

T = TypeVar("T")

N_IMAGENET = 1000
LONGEST = 255  # characters of a class's name, as of a folder's
_NUMBER = re.compile(r"(\d+)(\.0*)?")  # the latter is what pandas writes of whole numbers
_NUMBERED = re.compile(r"\d+[-_. ]+([^\W\d].*)")  # as 01_cat
_WORDNET = re.compile(r"(n\d{8})(?:[-_ ]+(.*))?", re.IGNORECASE)
_MISSING = {"none", "null", "na", "n/a", "<na>"}
_PASSED_OVER = re.compile(r"[\s_\-'’/]")  # noqa: RUF001
_LARGEST = 1 << 24  # bytes of a file
HIGHEST = 1_000_000  # number of an output or class; names are kept for all below
_NUMBER_BEFORE = re.compile(r"(?P<number>\d{1,6})[\s,;:|]\s*(?P<name>\S.*)", re.ASCII)
_NUMBER_BEHIND = re.compile(r"(?P<name>.*\S)[\s,;:|]\s*(?P<number>\d{1,6})", re.ASCII)
_KEYS = {"id", "wnid", "synset", "folder", "class", "number", "label", "index", "output", "key"}

Pairs = list[tuple[str, str]]  # what is named, and its name


@cache
def imagenet_classes() -> dict[str, str]:
    """Return the names of ImageNet-1k's classes by WordNet id."""
    text = files("unbraid").joinpath("networks", "imagenet.csv").read_text(encoding="utf-8")
    return {row["id"]: row["name"] for row in csv.DictReader(text.splitlines())}


def are_imagenet_names(names: Sequence[str]) -> bool:
    """Say whether outputs are named as ImageNet's classes, in their order, ids or words.

    >>> are_imagenet_names(list(imagenet_classes().values())), are_imagenet_names(["cat"] * 1000)
    (True, False)
    """
    if len(names) != N_IMAGENET:
        return False
    same = sum(
        name[:9] == one or normal_form(name.split(",")[0]) == normal_form(word.split(",")[0])
        for name, (one, word) in zip(names, imagenet_classes().items(), strict=True)
    )
    return same > N_IMAGENET // 2  # lists of them differ in some words


def output_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's outputs where it is one of timm's, which knows them."""
    config = getattr(model, "pretrained_cfg", None)
    n = getattr(model, "num_classes", None)
    if not isinstance(config, Mapping):
        return ()
    names = config.get("label_names")
    if isinstance(names, Sequence) and len(names) == n:
        return tuple(map(str, names))
    if n == N_IMAGENET == config.get("num_classes"):
        return tuple(imagenet_classes().values())
    return ()


def number_in(name: str) -> int | None:
    """Return the number of an output that a name is, None where it is none.

    >>> number_in("010"), number_in("2.0"), number_in("2.5"), number_in("-1"), number_in("cat")
    (10, 2, None, None, None)
    """
    found = _NUMBER.fullmatch(name.strip()) if len(name) <= LONGEST else None
    return int(found[1]) if found else None


def output_number(value: object) -> int | None:
    """Return the number of an output that a value of a table is, such as 3.0, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return int(value) if value >= 0 and value == int(value) else None


def normal_form(name: str) -> str:
    """Return what is equal for names that differ by case, blanks, `_`, `-` or Unicode form only.

    >>> normal_form("Great_White Shark"), normal_form("010"), normal_form("-1"), normal_form("_")
    ('greatwhiteshark', '10', '-1', '_')
    """
    if (number := number_in(name)) is not None:
        return str(number)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).strip()
    return folded if is_numeric(name) else _PASSED_OVER.sub("", folded) or folded


def wordnet_id(name: str) -> str | None:
    """Return the WordNet id that a class's name is or begins with, as in n01440764_tench."""
    found = _WORDNET.fullmatch(name)
    return found[1].lower() if found else None


def english_name(name: str) -> str:
    """Return what to call a class: of a WordNet id, its name, if ImageNet-1k has it.

    >>> english_name("n01440764"), english_name("n00000001-thing"), english_name("cat")
    ('tench', 'thing', 'cat')
    """
    found = _WORDNET.fullmatch(name)
    if found is None:
        return name
    return imagenet_classes().get(found[1].lower()) or found[2] or name


def same_class(name: str) -> str:
    """Return what is equal for all names of one class."""
    return wordnet_id(name) or normal_form(name)


def is_numeric(name: str) -> bool:
    """Say whether a name is any kind of number, of an output or not, or stands for a missing one.

    >>> is_numeric("-1.5"), is_numeric("0x10"), is_numeric("nan"), is_numeric("None")
    (True, True, True, True)
    """
    for read in (float, lambda text: int(text, 0)):
        with suppress(ValueError):
            read(name.strip())
            return True
    return name.strip().casefold() in _MISSING


def counted(name: str) -> list[tuple[int, str]]:
    """Sort numbers in names by what they count: class2 before class10."""
    parts = filter(None, re.split(r"(\d{1,18})", name))
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def look_up(classes: Iterable[str], known: Mapping[str, T]) -> dict[str, T | None]:
    """Find what is known of classes by their names, in whatever form; None for strangers."""
    forms: dict[str, set[T]] = {}
    for name, value in known.items():
        forms.setdefault(same_class(name), set()).add(value)
    found: dict[str, T | None] = {}
    for name in classes:
        alike = forms.get(same_class(name), set())
        found[name] = known.get(name, next(iter(alike)) if len(alike) == 1 else None)
    return found


def meanings(name: str) -> list[str]:
    """What else than its name a class may be called among outputs.

    >>> meanings("001.Black_footed_Albatross"), meanings("n01440764"), meanings("cat")
    (['Black_footed_Albatross'], ['n01440764', 'tench'], [])
    """
    found = _WORDNET.fullmatch(name)
    if found is None:
        behind = _NUMBERED.fullmatch(name)
        return [behind[1]] if behind else []
    known = imagenet_classes().get(found[1].lower())
    return [one for one in (found[1].lower(), known, found[2]) if one]


@dataclass(frozen=True)
class Names:
    """What to call outputs and classes, read from a file."""

    by_output: dict[int, str] = field(default_factory=dict)
    by_class: dict[str, str] = field(default_factory=dict)
    file: str = ""
    in_lines: bool = False  # a line for each output, without saying which

    def of_outputs(self, n_outputs: int) -> tuple[str, ...]:
        """Return the names of all outputs, none where not all are named; DataError if of others."""
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
        """Return the names of a data set's classes that have one; DataError if of other classes.

        Where the classes' labels are a guess, a class is not called as its output.
        """
        named = look_up(labels, self.by_class)
        found = {c: name for c, name in named.items() if name is not None}
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
    """Read names of classes or outputs from a CSV or TSV file, JSON or lines; else DataError.

    A table has two columns: what is named (a folder, class, WordNet id or output's number) and its
    name. JSON is a list or a dictionary of the same, a text has a line for each output.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        text, kind = content.decode("utf-8-sig"), path.suffix.lower()
        if kind in (".csv", ".tsv"):
            pairs, in_lines = _from_table(text), False
        elif kind == ".json" or text.lstrip().startswith(("{", "[")):
            told = json.loads(text) if kind == ".json" else _python(text)
            pairs, in_lines = _from_object(told), isinstance(told, list)
        else:
            pairs, in_lines = _from_lines(text), True
        by_output, by_class = _by_output_and_class(pairs)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(
            f"Names {path} cannot be read ({one_line(str(error))}); give a CSV file with columns "
            "for what is named and its name, JSON, or a text with a line for each output."
        ) from None
    return Names(by_output, by_class, str(path), in_lines and not by_class)


def _python(text: str) -> Any:
    """Read what Python or JSON writes of a list or dictionary."""
    with suppress(ValueError):
        return json.loads(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in texts
            return ast.literal_eval(text.strip())
    except (SyntaxError, TypeError, MemoryError):
        raise ValueError("it begins as a list or dictionary does, but is none") from None


def _from_object(told: Any) -> Pairs:
    if isinstance(told, dict) and isinstance(told.get("id2label"), dict):
        told = told["id2label"]  # of a model's configuration
    if isinstance(told, list):
        told = dict(enumerate(told))
    elif not isinstance(told, dict):
        raise ValueError("it is neither a list nor a dictionary")
    elif told and all(output_number(number) is not None for number in told.values()):
        return [(str(number), str(name)) for name, number in told.items()]
    pairs = []
    for key, name in told.items():
        if isinstance(name, list) and len(name) == 2 and isinstance(name[0], str):
            # {"0": ["n01440764", "tench"]} names an output, and the class of this id.
            pairs += [(name[0], name[1])] if wordnet_id(name[0]) else []
            name = name[1]
        if not isinstance(name, str):
            raise ValueError(f"{str(name)[:40]!r} is no name")
        pairs.append((str(key), name))
    return pairs


def _from_table(text: str) -> Pairs:
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
    elif number_in("".join(titles[:1])) is None:  # perhaps a header in other words
        numbers = [number_in(row[0]) for row in rows[1:]]
        rows = rows[1:] if numbers and None not in numbers else rows
    short = next((row for row in rows if len(row) <= max(key, name)), None)
    if short is not None or not titles[1:]:
        raise ValueError(f"the row {','.join(short or titles)!r} has not two columns")
    return [(row[key].strip(), row[name].strip()) for row in rows]


def _from_lines(text: str) -> Pairs:
    lines = [line.strip() for line in text.strip().splitlines()]
    words = [line.split(maxsplit=1) for line in lines]
    if all(len(word) == 2 and wordnet_id(word[0].rstrip(",:")) for word in words):
        names = _unnumbered([word[1] for word in words])  # n01440764 449 tench
        return [(word[0].rstrip(",:"), name) for word, name in zip(words, names, strict=True)]
    return [(str(k), line) for k, line in enumerate(_unnumbered(lines))]


def _unnumbered(lines: list[str]) -> list[str]:
    """Take off the numbers of lines, before or behind them, where all are numbered in order."""
    for form in (_NUMBER_BEFORE, _NUMBER_BEHIND):
        found = [one for one in map(form.fullmatch, lines) if one]
        numbers = [int(one["number"]) for one in found]
        if len(lines) > 1 and numbers in ([*range(len(lines))], [*range(1, len(lines) + 1)]):
            return [one["name"] for one in found]
    return lines


def _by_output_and_class(pairs: Pairs) -> tuple[dict[int, str], dict[str, str]]:
    """Sort names out by what they are of; ValueError unless each has one name."""
    by_output: dict[int, str] = {}
    by_class: dict[str, str] = {}
    forms: dict[str, str] = {}
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
            by_class[key] = name.strip()
        elif number < HIGHEST:
            by_output[number] = name.strip()
        else:
            raise ValueError(f"there is no output {number}")
    if not forms:
        raise ValueError("it is empty")
    return by_output, by_class
