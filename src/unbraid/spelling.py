"""How names of classes are written: numbers, WordNet ids, and words in any form."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

from unbraid.imagenet import imagenet_classes

_LONGEST = 255  # characters of a class's name, as of a folder's
_NUMBER = re.compile(r"(\d+)(\.0*)?")  # the latter is what pandas writes of whole numbers
_NUMBERED = re.compile(r"\d+[-_. ]+([^\W\d].*)")  # as 01_cat
_WORDNET = re.compile(r"(n\d{8})(?:[-_ ]+(.*))?", re.IGNORECASE)
_MISSING = {"none", "null", "na", "n/a", "<na>"}
_PASSED_OVER = re.compile(r"[\s_\-'’/]")  # noqa: RUF001


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
    if isinstance(value, bool) or not isinstance(value, (int, float)):
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
    if is_numeric(name):
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


def written_alike(name: str) -> str:
    """Return what is equal for names that are one text or number, or begin with one WordNet id."""
    number = number_in(name)
    if number is not None:
        return str(number)
    return wordnet_id(name) or unicodedata.normalize("NFC", name)


def is_numeric(name: str) -> bool:
    """Say whether a name is any kind of number, of an output or not, or stands for a missing one.

    >>> is_numeric("-1.5"), is_numeric("0x10"), is_numeric("nan"), is_numeric("None")
    (True, True, True, True)
    """
    if name.strip().casefold() in _MISSING:
        return True
    for read in (float, lambda text: int(text, 0)):
        try:
            read(name.strip())
        except ValueError:
            continue
        return True
    return False


def counted(name: str) -> list[tuple[int, str]]:
    """Sort numbers in names by what they count: class2 before class10."""
    return [
        (int(part), "") if part.isdecimal() else (0, part)
        for part in re.split(r"(\d{1,18})", name)
        if part
    ]


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


def meanings(name: str) -> list[str]:
    """What else than its name a class may be called among outputs.

    What stands behind a number or WordNet id, or what the id stands for.

    >>> meanings("001.Black_footed_Albatross"), meanings("n01440764"), meanings("cat")
    (['Black_footed_Albatross'], ['n01440764', 'tench'], [])
    """
    found = _WORDNET.fullmatch(name)
    if found is None:
        behind = _NUMBERED.fullmatch(name)
        return [behind[1]] if behind else []
    known = imagenet_classes().get(found[1].lower())
    return [one for one in (found[1].lower(), known, found[2]) if one]
