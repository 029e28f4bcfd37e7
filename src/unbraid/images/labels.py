"""Which output of a network each class of a data set stands for: one rule for all sources."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from unbraid.base.errors import DataError, nearest
from unbraid.base.tables import count, one_line
from unbraid.networks.class_names import (
    HIGHEST,
    N_IMAGENET,
    are_imagenet_names,
    counted,
    english_name,
    imagenet_classes,
    is_numeric,
    look_up,
    meanings,
    normal_form,
    number_in,
    same_class,
    wordnet_id,
)

BY_NUMBER = "the classes' names are numbers of outputs"
BY_NAME = "the classes' names are names of outputs"
BY_ID = "the classes' names are WordNet ids of ImageNet"
IN_ORDER = "the classes in order are the first outputs"
GUESSED = "the classes in order are the first outputs, a guess"
AS_GIVEN = "labels as given"
NO_LABELS = "there are no labels"

_QUOTED = 60  # characters of a name in a message
_SHOWN = 3  # outputs in a message
_MOST_SHOWN = 6  # classes in a message
_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}

Matches = Mapping[str, list[int]]  # outputs that each class may mean, best first


@dataclass(frozen=True)
class Outputs:
    """What is known of a network's outputs."""

    names: tuple[str, ...] = ()  # empty where unknown
    n: int | None = None  # None where unknown


@dataclass(frozen=True)
class Classes:
    """The classes of a data set."""

    names: Sequence[str]  # in their order
    source: str  # where they are, for messages
    seen: Sequence[str]  # those that have images
    of_folders: bool = False  # where two are never meant to be one


@dataclass(frozen=True)
class Reading:
    """What a data set's classes stand for."""

    labels: dict[str, int]  # by class
    how: str  # they were found, in words
    note: str = ""  # what was guessed
    outputs: Outputs = Outputs()


def reading_of(labels: Mapping[str, int] | Reading | None, classes: Classes) -> Reading:
    """Settle labels that are given, read already, or to be read without a network."""
    if isinstance(labels, Reading):
        return labels
    if labels is None:
        return read_classes(classes, Outputs())
    found = look_up(classes.names, labels)
    lost = [name for name in classes.seen if found[name] is None]
    if lost:
        raise DataError(
            f"{classes.source} has a class {_quote(lost[0])} that the training images have not; "
            "remove it, or add the class there."
        )
    known = {name: label for name, label in found.items() if label is not None}
    return Reading({**labels, **known}, AS_GIVEN)


def read_classes(classes: Classes, outputs: Outputs) -> Reading:
    """Decide which output of a network each class stands for; `docs/data.md` has the rule."""
    classes = replace(classes, seen=list(classes.seen or classes.names))
    reading = replace(_read(classes, outputs), outputs=outputs)
    first: dict[int, str] = {}
    for name in classes.seen if classes.of_folders else ():
        label = reading.labels[name]
        if first.setdefault(label, name) != name:
            raise DataError(
                f"{classes.source} has the classes {_quote(first[label])} and {_quote(name)}, "
                f"which both stand for output {label}; join or rename them."
            )
    return reading


def _read(classes: Classes, outputs: Outputs) -> Reading:
    numbers = {name: number_in(name) for name in classes.names}
    matches = _match(classes.names, outputs.names)
    if all(numbers[name] is not None for name in classes.seen):
        own = {name: n for name, n in numbers.items() if n is not None}
        return _by_number(own, matches, classes, outputs)
    if all(map(wordnet_id, classes.seen)):
        reading = _by_id(classes, outputs)
        if reading is not None:
            return reading
    if any(matches.get(name) for name in classes.seen):
        return _by_name(matches, classes, outputs)
    if all(map(is_numeric, classes.seen)):
        odd = next(name for name in classes.seen if numbers[name] is None)
        raise DataError(
            f"{classes.source} has the class {_quote(odd)}, which is no number of an output; give "
            "whole numbers from 0 on, or names."
        )
    return _in_order(classes, outputs)


def _by_number(
    own: dict[str, int], matches: Matches, classes: Classes, outputs: Outputs
) -> Reading:
    source, n = classes.source, outputs.n
    highest = max((own[name] for name in classes.seen), default=-1)
    if n is not None and highest >= n:
        if all(matches.get(name) for name in classes.seen):
            return _by_name(matches, classes, outputs)
        raise DataError(
            f"{source} has a class of number {highest}, but the network's outputs go from 0 to "
            f"{n - 1}; number classes as outputs, so count from 0."
        )
    for name in classes.seen:
        fitting = matches.get(name)
        if fitting and own[name] not in fitting:
            raise DataError(
                f"{source} has the class {_quote(name)}, which is output {own[name]} by number "
                f"but output {fitting[0]} by name; rename classes or outputs so that only one fits."
            )
    if highest >= HIGHEST:
        raise DataError(f"{source} has a class of number {highest}; number classes from 0 on.")
    most = HIGHEST if n is None else n  # of classes without images too
    return Reading({name: number for name, number in own.items() if number < most}, BY_NUMBER)


def _by_id(classes: Classes, outputs: Outputs) -> Reading | None:
    """Look up WordNet ids; None where the outputs are not known to be those of ImageNet."""
    if outputs.n != N_IMAGENET or (outputs.names and not are_imagenet_names(outputs.names)):
        return None
    numbers = {one: k for k, one in enumerate(imagenet_classes())}
    labels = {name: numbers.get(wordnet_id(name) or "") for name in classes.names}
    unknown = [name for name in classes.seen if labels[name] is None]
    if unknown and len(classes.seen) >= N_IMAGENET and not outputs.names:
        return None  # a thousand others
    if unknown:
        raise DataError(f"{unknown[0]} is no class of ImageNet-1k; remove or rename it.")
    return Reading({c: k for c, k in labels.items() if k is not None}, BY_ID)


def _match(classes: Sequence[str], outputs: Sequence[str]) -> Matches:
    """Find the outputs that each class may mean: none, one, or several alike."""
    if not outputs:
        return {}
    # Forms of a name, the most exact ones first.
    exact: dict[str, list[int]] = {}
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for number, name in enumerate(outputs):
        if name:
            exact.setdefault(unicodedata.normalize("NFC", name), []).append(number)
            whole.setdefault(normal_form(name), []).append(number)
            for part in [*name.split(","), *meanings(name)]:
                parts.setdefault(normal_form(part), []).append(number)

    def fitting(wording: str) -> list[int]:
        form, text = normal_form(wording), unicodedata.normalize("NFC", wording)
        return exact.get(text) or whole.get(form) or list(dict.fromkeys(parts.get(form, [])))

    found: dict[str, list[int]] = {}
    for name in classes:
        synonyms = [one for one in name.split(",") if one.strip()] if "," in name else []
        wordings = [name, *meanings(name), *synonyms]
        found[name] = next(filter(None, map(fitting, wordings)), [])
    return found


def fit_any(classes: Sequence[str], outputs: Sequence[str]) -> bool:
    """Say whether any class has the name of an output."""
    return any(_match(classes, outputs).values())


def _by_name(matches: Matches, classes: Classes, outputs: Outputs) -> Reading:
    source, seen = classes.source, classes.seen
    lost = [name for name in seen if not matches[name]]
    if lost:
        raise DataError(
            f"{source} has the class {_quote(lost[0])}, which is no output's name, while "
            f"{len(seen) - len(lost)} of its {count(len(seen), 'class', 'classes')} are; rename or "
            f"remove it.{nearest(lost[0], outputs.names)}"
        )
    labels = {name: fitting[0] for name, fitting in matches.items() if fitting}
    several = [name for name in seen if len(matches[name]) > 1]
    if not several:
        return Reading(labels, BY_NAME)
    shown = ", ".join(map(str, matches[several[0]][:_SHOWN]))
    return Reading(
        labels,
        BY_NAME,
        f"{source} has {count(len(several), 'class', 'classes')} that several outputs fit, such as "
        f"{_quote(several[0])}, which fits the outputs {shown}; the first is taken.",
    )


def _in_order(classes: Classes, outputs: Outputs) -> Reading:
    """Take classes for the first outputs, and note why that may be wrong."""
    source, seen, n = classes.source, list(classes.seen), outputs.n
    labels = {name: label for label, name in enumerate(classes.names)}
    n_taken = 1 + max((labels[name] for name in seen), default=-1)
    first: dict[str, str] = {}
    alike = [(first[same_class(a)], a) for a in seen if first.setdefault(same_class(a), a) != a]
    if n is not None and n_taken > n:
        some = alike[0] if alike else seen[:_MOST_SHOWN]
        raise DataError(
            f"{source} has {n_taken} classes but the network has {count(n, 'output')}; join or "
            f"remove some, such as {', '.join(map(_quote, some))}."
        )
    notes = []
    if len(seen) > 1 and {name.casefold() for name in seen} <= _PARTS:
        notes.append(
            f"{source} has the classes {_quote(seen[0])} and {_quote(seen[1])}, which look like "
            "parts of a data set; name one of these folders to take the classes in it."
        )
    ids = {wordnet_id(name) for name in seen}
    odd = [name for name in seen if number_in(name) is not None]
    if seen == sorted(seen):
        by_count = sorted(seen, key=counted)
        odd = [a for a, b in zip(seen, by_count, strict=True) if a != b] or odd
    if n is not None and (outputs.names or n_taken < n):
        unknown = ", none by an output's name" if outputs.names else ""
        notes.append(
            f"{source} has {count(len(seen), 'class', 'classes')} for {n} outputs{unknown}; taken "
            "in order as the first outputs. Name the classes by output number or name if that is "
            "wrong."
        )
    elif n is None and len(ids) < N_IMAGENET and ids <= imagenet_classes().keys():
        notes.append(
            f"{source} has {count(len(ids), 'WordNet id')} of ImageNet, taken in order as outputs "
            f"0 to {n_taken - 1}; for a network with ImageNet's outputs give outputs={N_IMAGENET} "
            "or the network."
        )
    elif odd:
        notes.append(
            f"{source} has classes with numbers in their names, taken in order as texts, such as "
            f"{_quote(odd[0])} as output {labels[odd[0]]}; name the classes by output number if "
            "that is wrong."
        )
    if alike:
        notes.append(
            f"{source} has the classes {' and '.join(map(_quote, alike[0]))}, taken for two."
        )
    known = {name: label for name, label in labels.items() if n is None or label < n}
    return Reading(known, GUESSED if notes else IN_ORDER, " ".join(notes))


def _quote(name: str) -> str:
    return repr(name if len(name) <= _QUOTED else f"{name[: _QUOTED - 1]}…")


def show_names(reading: Reading, given: Mapping[str, str], seen: Iterable[str]) -> list[str]:
    """List names of classes by label, for people to read."""
    names = [english_name(name) for name in reading.outputs.names]
    if not names and reading.how == BY_ID:
        names = list(imagenet_classes().values())
    names += [""] * (1 + max(reading.labels.values(), default=-1) - len(names))
    others = {same_class(name): other for name, other in given.items()}
    for name, label in reading.labels.items():
        if label < 0:
            continue
        if same_class(name) in others:
            names[label] = others[same_class(name)]
        elif not names[label] or reading.how in (IN_ORDER, GUESSED):
            names[label] = english_name(name)
    one_of = {reading.labels[name]: name for name in reversed(list(seen)) if name in reading.labels}
    shared = Counter(names[label] for label in one_of)
    for label, one in one_of.items():
        name, own = names[label], wordnet_id(one) or one
        if shared[name] > 1:
            names[label] = f"{name} ({one_line(own) if own != name else label})"
    return names
