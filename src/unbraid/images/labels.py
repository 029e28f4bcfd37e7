"""Which output of a network each class of a data set stands for: one rule for all sources."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from unbraid.base.errors import DataError, nearest
from unbraid.base.tables import count, one_line
from unbraid.networks.class_names import (
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
    written_alike,
)

BY_NUMBER = "the classes' names are numbers of outputs"
BY_NAME = "the classes' names are names of outputs"
BY_ID = "the classes' names are WordNet ids of ImageNet"
IN_ORDER = "the classes in order are the first outputs"
GUESSED = "the classes in order are the first outputs, a guess"
AS_GIVEN = "labels as given"

HIGHEST = 1_000_000  # of a class's number; names are kept for all below
_QUOTED = 60  # characters of a name in a message
_SHOWN = 3  # outputs in a message
_MOST_SHOWN = 6  # classes in a message
_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True)
class Outputs:
    """What is known of a network's outputs."""

    names: tuple[str, ...] = ()  # empty where unknown
    n: int | None = None  # None where unknown


@dataclass(frozen=True)
class Reading:
    """What a data set's classes stand for."""

    labels: dict[str, int]  # by class
    how: str  # they were found, in words
    note: str = ""  # what was guessed
    outputs: Outputs = field(default_factory=Outputs)


def read_classes(
    classes: Sequence[str],
    outputs: Outputs,
    where: str,
    *,
    distinct: bool = False,
    used: Iterable[str] | None = None,
) -> Reading:
    """Decide which output of a network each class stands for; `docs/data.md` has the rule.

    Args:
        classes: their names, in their order.
        outputs: what is known of the network's.
        where: the classes are, for messages.
        distinct: whether two names must not stand for one class, as with folders.
        used: the classes that have images; by default all.

    Raises:
        DataError: names contradict each other or the outputs, or there are too many.
    """
    if distinct:
        refuse_twins(classes, where)
    kept = set(classes if used is None else used)
    seen = [name for name in classes if name in kept] or list(classes)
    numbers = {name: number_in(name) for name in classes}
    named = _match(classes, outputs.names)
    if all(numbers[name] is not None for name in seen):
        own = {name: n for name, n in numbers.items() if n is not None}
        return _by_number(own, named, seen, outputs, where)
    if all(map(wordnet_id, seen)):
        reading = _by_id(classes, seen, outputs, where)
        if reading is not None:
            return reading
    if any(named.get(name) for name in seen):
        return _by_name(named, seen, outputs, where, distinct)
    if all(map(is_numeric, seen)):
        odd = next(name for name in seen if numbers[name] is None)
        raise DataError(
            f"{where} has the class {_quote(odd)}, which is no number of an output; give whole "
            "numbers from 0 on, or names."
        )
    return _in_order(classes, seen, outputs, where)


def _by_number(
    own: dict[str, int],
    named: Mapping[str, list[int]],
    seen: Sequence[str],
    outputs: Outputs,
    where: str,
) -> Reading:
    numbers = [own[name] for name in seen]
    highest, n = max(numbers, default=-1), outputs.n
    if n is None or highest < n:
        for name in seen:
            places = named.get(name)
            if places and own[name] not in places:
                raise DataError(
                    f"{where} has the class {_quote(name)}, which is output {own[name]} by number "
                    f"but output {places[0]} by name; rename classes or outputs so that only "
                    "one fits."
                )
        if highest >= HIGHEST:
            raise DataError(f"{where} has a class of number {highest}; number classes from 0 on.")
        most = HIGHEST if n is None else n  # of classes without images too
        known = {name: number for name, number in own.items() if number < most}
        return Reading(known, BY_NUMBER, outputs=outputs)
    if all(named.get(name) for name in seen):
        return _by_name(named, seen, outputs, where, False)
    raise DataError(
        f"{where} has a class of number {highest}, but the network's outputs go from 0 to "
        f"{n - 1}; number classes as outputs, so count from 0."
    )


def _by_id(
    classes: Sequence[str], seen: Sequence[str], outputs: Outputs, where: str
) -> Reading | None:
    """Look up WordNet ids; None where the outputs are not known to be those of ImageNet."""
    if outputs.n != N_IMAGENET or (outputs.names and not are_imagenet_names(outputs.names)):
        return None
    place = {one: k for k, one in enumerate(imagenet_classes())}
    labels = {name: place.get(wordnet_id(name) or "") for name in classes}
    unknown = [name for name in seen if labels[name] is None]
    if unknown and len(seen) >= N_IMAGENET and not outputs.names:
        return None  # a thousand others
    if unknown:
        raise DataError(f"{unknown[0]} is no class of ImageNet-1k; remove or rename it.")
    return Reading({c: k for c, k in labels.items() if k is not None}, BY_ID, outputs=outputs)


def _match(classes: Sequence[str], outputs: Sequence[str]) -> dict[str, list[int]]:
    """Find the outputs that each class may mean, best first: none, one, or several alike."""
    if not outputs:
        return {}
    exact: dict[str, list[int]] = {}
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for place, name in enumerate(outputs):
        if not name:
            continue
        exact.setdefault(unicodedata.normalize("NFC", name), []).append(place)
        whole.setdefault(normal_form(name), []).append(place)
        for part in [*name.split(","), *meanings(name)]:
            parts.setdefault(normal_form(part), []).append(place)

    def places(wording: str) -> list[int]:
        own = normal_form(wording)
        text = unicodedata.normalize("NFC", wording)
        return exact.get(text) or whole.get(own) or list(dict.fromkeys(parts.get(own, [])))

    return {
        name: next(filter(None, map(places, [name, *meanings(name), *_synonyms(name)])), [])
        for name in classes
    }


def _synonyms(name: str) -> list[str]:
    return [one for one in name.split(",") if one.strip()] if "," in name else []


def fit_any(classes: Sequence[str], outputs: Sequence[str]) -> bool:
    """Say whether any class has the name of an output."""
    return any(_match(classes, outputs).values())


def _by_name(
    named: Mapping[str, list[int]],
    seen: Sequence[str],
    outputs: Outputs,
    where: str,
    distinct: bool,
) -> Reading:
    lost = next((name for name in seen if not named[name]), None)
    if lost is not None:
        n_lost = sum(not named[name] for name in seen)
        raise DataError(
            f"{where} has the class {_quote(lost)}, which is no output's name, while "
            f"{len(seen) - n_lost} of its {count(len(seen), 'class', 'classes')} are; rename or "
            f"remove it.{nearest(lost, outputs.names)}"
        )
    labels = {name: places[0] for name, places in named.items() if places}
    if distinct:
        first: dict[int, str] = {}
        for name in seen:
            other = first.setdefault(labels[name], name)
            if other != name:
                raise DataError(
                    f"{where} has the classes {_quote(other)} and {_quote(name)}, which both mean "
                    f"the output {outputs.names[labels[name]]!r}; join or rename them."
                )
    several = [name for name in seen if len(named[name]) > 1]
    note = ""
    if several:
        name, places = several[0], ", ".join(map(str, named[several[0]][:_SHOWN]))
        more = f", and so on for {len(several) - 1} more" if len(several) > 1 else ""
        note = (
            f"The class {_quote(name)} of {where} fits the outputs {places}; the first is taken"
            f"{more}."
        )
    return Reading(labels, BY_NAME, note, outputs)


def _in_order(classes: Sequence[str], seen: Sequence[str], outputs: Outputs, where: str) -> Reading:
    labels, n = {name: label for label, name in enumerate(classes)}, outputs.n
    most = 1 + max((labels[name] for name in seen), default=-1)
    alike = _first_twins(seen, same_class)
    if n is not None and most > n:
        some = ", ".join(map(_quote, seen[:_MOST_SHOWN])) + (", ..." if seen[_MOST_SHOWN:] else "")
        advice = f"remove those that it does not know (of {some})"
        if alike:
            advice = f"join those of one name, such as {_quote(alike[0])} and {_quote(alike[1])}"
        raise DataError(
            f"{where} has {most} classes but the network has {count(n, 'output')}; {advice}."
        )
    notes = []
    if len(seen) > 1 and {name.casefold() for name in seen} <= _PARTS:
        notes.append(
            f"{where} has the classes {_quote(seen[0])} and {_quote(seen[1])}, which look like "
            "parts of a data set; name one of these folders to take the classes in it."
        )
    ids = {wordnet_id(name) for name in seen}
    if n is not None and (outputs.names or most < n):
        unknown = ", none by an output's name" if outputs.names else ""
        notes.append(
            f"{where} has {count(len(seen), 'class', 'classes')} for {n} outputs{unknown}; taken "
            "in order as the first outputs. Name the classes by output number or name if that is "
            "wrong."
        )
    elif n is None and len(ids) < N_IMAGENET and ids <= imagenet_classes().keys():
        notes.append(
            f"{where} has {count(len(ids), 'WordNet id')} of ImageNet, taken in order as outputs 0 "
            f"to {most - 1}; for a network with ImageNet's outputs give outputs={N_IMAGENET} or "
            "the network."
        )
    elif any(number_in(name) is not None for name in seen):
        notes.append(
            f"{where} has classes with numbers for names and others; taken in order as outputs 0 "
            f"to {most - 1}. Name all by number, or none, if that is wrong."
        )
    elif list(seen) == sorted(seen) != sorted(seen, key=counted):
        later = next(a for a, b in zip(seen, sorted(seen, key=counted), strict=True) if a != b)
        notes.append(
            f"{where} has classes with numbers in their names, taken in order as texts, such as "
            f"{_quote(later)} as output {labels[later]}; name the classes by output number if that "
            "is wrong."
        )
    if alike:
        notes.append(
            f"{where} has the classes {_quote(alike[0])} and {_quote(alike[1])}, taken for two."
        )
    labels = {name: label for name, label in labels.items() if n is None or label < n}
    return Reading(labels, GUESSED if notes else IN_ORDER, " ".join(notes), outputs)


def refuse_twins(folders: Iterable[str], where: str) -> None:
    """Refuse two folders that are called the same but for Unicode form or writing of a number.

    Raises:
        DataError: there are such.
    """
    twins = _first_twins(folders, written_alike)
    if twins:
        raise DataError(
            f"{where} has two folders for one class, {twins[0]!a} and {twins[1]!a}; join "
            "or rename them."
        )


def _first_twins(names: Iterable[str], form: Callable[[str], str]) -> tuple[str, str] | None:
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(form(name), name)
        if other != name:
            return other, name
    return None


def as_given(
    classes: Sequence[str],
    labels: Mapping[str, int],
    where: str,
    *,
    distinct: bool = False,
    used: Iterable[str] | None = None,
) -> Reading:
    """Label classes as given, for instance as the training images are.

    Raises:
        DataError: a class has no label.
    """
    if distinct:
        refuse_twins(classes, where)
    found = look_up(classes, labels)
    lost = [name for name in (classes if used is None else used) if found[name] is None]
    if lost:
        kind = "class folder" if distinct else "class"
        raise DataError(
            f"{where} has a {kind} {_quote(lost[0])} that the training images have not; remove it, "
            "or add the class there."
        )
    known = {name: label for name, label in found.items() if label is not None}
    return Reading({**labels, **known}, AS_GIVEN)


def reading_of(
    labels: dict[str, int] | Reading | None,
    classes: Sequence[str],
    where: str,
    *,
    distinct: bool = False,
    used: Iterable[str] | None = None,
) -> Reading:
    """Settle labels that are given, read already, or to be read without a network.

    Raises:
        DataError: a class has no label, or names contradict each other.
    """
    if isinstance(labels, Reading):
        return labels
    if labels is not None:
        return as_given(classes, labels, where, distinct=distinct, used=used)
    return read_classes(classes, Outputs(), where, distinct=distinct, used=used)


def _quote(name: str) -> str:
    return repr(name if len(name) <= _QUOTED else f"{name[: _QUOTED - 1]}…")


def show_names(reading: Reading, given: Mapping[str, str], seen: Iterable[str]) -> list[str]:
    """List names of classes by label, for people to read.

    Args:
        reading: of the classes.
        given: other names, by class.
        seen: classes with images; where two would have one name, they get their own in brackets.

    >>> show_names(Reading({"dog": 2, "n01440764": 0}, AS_GIVEN), {}, ["dog", "n01440764"])
    ['tench', '', 'dog']
    """
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
    shown: dict[str, list[int]] = {}
    for label in one_of:
        shown.setdefault(names[label], []).append(label)
    for name, labels in shown.items():
        for label in labels if len(labels) > 1 else ():
            own = wordnet_id(one_of[label]) or one_of[label]
            names[label] = f"{name} ({one_line(own) if own != name else label})"
    return names
