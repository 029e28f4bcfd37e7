"""Which output of a network each class of a data set stands for: one rule for all sources."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from unbraid.errors import DataError, nearest
from unbraid.imagenet import N_IMAGENET, are_imagenet_names, imagenet_classes
from unbraid.tables import count, one_line

BY_NUMBER = "the classes' names are numbers of outputs"
BY_NAME = "the classes' names are names of outputs"
BY_ID = "the classes' names are WordNet ids of ImageNet"
IN_ORDER = "the classes in sorted order are the first outputs"
GUESSED = "the classes in sorted order are the first outputs, a guess"
AS_GIVEN = "labels as given"

HIGHEST = 1_000_000  # of a class's number; names are kept for all below
_LONGEST = 255  # characters of a class's name, as of a folder's
_SHOWN = 3  # outputs in a message
_NUMBER = re.compile(r"(\d+)(\.0*)?")  # the latter is what pandas writes of whole numbers
_WORDNET = re.compile(r"(n\d{8})(?:[-_ ]+(.*))?", re.IGNORECASE)
_PASSED_OVER = re.compile(r"[\s_\-'’/]")  # noqa: RUF001


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


def number_in(name: str) -> int | None:
    """Return the number of an output that a name is, None where it is none.

    >>> number_in("010"), number_in("2.0"), number_in("2.5"), number_in("-1"), number_in("cat")
    (10, 2, None, None, None)
    """
    found = _NUMBER.fullmatch(name.strip()) if len(name) <= _LONGEST else None
    return int(found[1]) if found else None


def output_number(value: object) -> int | None:
    """Return the number of an output that a value of a table is, None where it is none.

    >>> output_number(3), output_number(3.0), output_number(3.5), output_number(True)
    (3, 3, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    whole = math.isfinite(value) and value >= 0 and value == int(value)
    return int(value) if whole else None


def normal_form(name: str) -> str:
    """Return what is equal for names that differ by case, blanks, `_`, `-` or Unicode form only.

    >>> normal_form("Great_White Shark"), normal_form("010"), normal_form("-1"), normal_form("_")
    ('greatwhiteshark', '10', '-1', '_')
    """
    if (number := number_in(name)) is not None:
        return str(number)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).strip()
    if _is_numeric(name):
        return folded
    return _PASSED_OVER.sub("", folded) or folded


def wordnet_id(name: str) -> str | None:
    """Return the WordNet id that a class's name is or begins with.

    >>> wordnet_id("n01440764"), wordnet_id("n01440764_tench"), wordnet_id("n014407640")
    ('n01440764', 'n01440764', None)
    """
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
    if all(map(_is_numeric, seen)):
        odd = next(name for name in seen if numbers[name] is None)
        raise DataError(
            f"{where} has the class {odd!r}, which is no number of an output; give whole numbers "
            "from 0 on, or names."
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
    highest, n = max(numbers), outputs.n
    if n is None or highest < n:
        for name in seen:
            places = named.get(name)
            if places and own[name] not in places:
                raise DataError(
                    f"{where} has the class {name!r}, which is output {own[name]} by number but "
                    f"output {places[0]} by name; rename the classes or the outputs so that only "
                    "one fits."
                )
        if highest >= HIGHEST:
            raise DataError(f"{where} has a class of number {highest}; number classes from 0 on.")
        return Reading(own, BY_NUMBER, outputs=outputs)
    if all(named.get(name) for name in seen):
        return _by_name(named, seen, outputs, where, False)
    from_one = " Count from 0, not from 1." if min(numbers) == 1 and highest == n else ""
    raise DataError(
        f"{where} has a class of number {highest}, but the network's outputs go from 0 to "
        f"{n - 1}; number classes as outputs.{from_one}"
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
        for part in name.split(","):
            parts.setdefault(normal_form(part), []).append(place)
    found: dict[str, list[int]] = {}
    for name in classes:
        wordings = [name, *_meanings(name)]
        tried = [exact.get(unicodedata.normalize("NFC", one)) for one in wordings]
        tried += [whole.get(normal_form(one)) for one in wordings]
        tried += [parts.get(normal_form(one)) for one in wordings]
        tried += [parts.get(normal_form(one)) for one in name.split(",") if one.strip()]
        found[name] = next(filter(None, tried), [])
    return found


def fit_any(classes: Sequence[str], outputs: Sequence[str]) -> bool:
    """Say whether any class has the name of an output."""
    return any(_match(classes, outputs).values())


def _meanings(name: str) -> list[str]:
    """What else than its name a class may be called among outputs: behind or for a WordNet id."""
    found = _WORDNET.fullmatch(name)
    if found is None:
        return []
    known = imagenet_classes().get(found[1].lower())
    return [one for one in (found[1].lower(), found[2], known) if one]


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
            f"{where} has the class {lost!r}, which is no output's name, as are {n_lost} of its "
            f"{count(len(seen), 'class', 'classes')}; rename or remove it."
            f"{nearest(lost, outputs.names)}"
        )
    labels = {name: places[0] for name, places in named.items() if places}
    if distinct:
        first: dict[int, str] = {}
        for name in seen:
            other = first.setdefault(labels[name], name)
            if other != name:
                raise DataError(
                    f"{where} has the classes {other!r} and {name!r}, which both mean the output "
                    f"{outputs.names[labels[name]]!r}; join or rename them."
                )
    several = [name for name in seen if len(named[name]) > 1]
    note = ""
    if several:
        name, places = several[0], ", ".join(map(str, named[several[0]][:_SHOWN]))
        more = f", and so on for {len(several) - 1} more" if len(several) > 1 else ""
        note = f"The class {name!r} of {where} fits the outputs {places}; the first is taken{more}."
    return Reading(labels, BY_NAME, note, outputs)


def _in_order(classes: Sequence[str], seen: Sequence[str], outputs: Outputs, where: str) -> Reading:
    labels, n = {name: label for label, name in enumerate(classes)}, outputs.n
    most = 1 + max((labels[name] for name in seen), default=-1)
    if n is not None and most > n:
        raise DataError(
            f"{where} has {most} classes but the network has {n} outputs; remove those that it "
            "does not know."
        )
    notes = []
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
    alike = _first_twins(seen, same_class)
    if alike:
        notes.append(f"{where} has the classes {alike[0]!r} and {alike[1]!r}, taken for two.")
    return Reading(labels, GUESSED if notes else IN_ORDER, " ".join(notes), outputs)


def written_alike(name: str) -> str:
    """Return what is equal for names that are one text or number, or begin with one WordNet id."""
    number = number_in(name)
    if number is not None:
        return str(number)
    return wordnet_id(name) or unicodedata.normalize("NFC", name)


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


def look_up(classes: Sequence[str], labels: Mapping[str, int]) -> dict[str, int | None]:
    """Find the labels of classes by their names, in whatever form; None for strangers."""
    forms: dict[str, set[int]] = {}
    for name, label in labels.items():
        forms.setdefault(same_class(name), set()).add(label)
    found: dict[str, int | None] = {}
    for name in classes:
        alike = forms.get(same_class(name), set())
        found[name] = labels[name] if name in labels else min(alike) if len(alike) == 1 else None
    return found


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
            f"{where} has a {kind} {lost[0]!r} that the training images have not; remove it, or "
            "add the class there."
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


def _is_numeric(name: str) -> bool:
    """Whether a name is any kind of number, of an output or not."""
    for read in (float, lambda text: int(text, 0)):
        try:
            read(name.strip())
        except ValueError:
            continue
        return True
    return False


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
