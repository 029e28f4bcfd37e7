"""How numbers and names read on the page, and how wide they are."""

from __future__ import annotations

import math
import shlex
import string
import unicodedata
from collections.abc import Sequence

from unbraid.base import tables

LONGEST = 200  # characters of a name or path; longer ones are anything but names
ABSENT = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
# Marks in a name that would end what keeps its writing direction in, or take its end for theirs.
_ISOLATES = dict.fromkeys(range(0x2066, 0x206A), "\N{REPLACEMENT CHARACTER}")
# What a page's words mean, in a sentence, by the word in lower case.
GLOSSARY = {
    "concepts": "Groups of classes or images that drive a channel through the same input channels.",
    "concept channels": "Channels that a split channel is divided into, one for each concept.",
    "lowest cosine": "How alike the causes of two concepts are: 1 the same, 0 nothing in common.",
    "separation error": (
        "How far concept channels are from answering to their own concept as the whole channel "
        "does, and to the others with nothing: 0 is ideal, halving a channel gives 0.5."
    ),
    "mean separation error": "The mean of the separation errors of the split channels; 0 is ideal.",
    "rectified": "The separation error of what is above zero at each position, as a ReLU sees it.",
    "largest logit difference": "How far an output moved when the channels were split; 0: no bit.",
    "largest output difference": "How far an output moved when the channels were split; 0: no bit.",
    "top-1 accuracy": "The part of the validation images whose class has the largest logit.",
    "polysemantic channels": "Channels that several unrelated concepts drive.",
    "r-precision": (
        "Of as many of a channel's strongest images as its concept has, the part that are of it."
    ),
    "retention": "How much of the whole channel's response a concept channel keeps on its concept.",
    "leakage": "What a concept channel still answers to other concepts, as a part of the whole's.",
    "mimic": "How far a concept channel is from the whole channel on its own images; 0 is ideal.",
    "silence": "How far a concept channel is from silent on other concepts' images; 0 is ideal.",
}
_SLIM = frozenset("iljtfrI.,:;'|!()[]/\\ -\N{FIRST STRONG ISOLATE}\N{POP DIRECTIONAL ISOLATE}")
_BROAD = frozenset("mwMW@%&…\N{EM DASH}")


def number(value: float | None, digits: int = 3) -> str:
    """Write a measure near 1 with fixed digits, a large one with fewer, an absent one as a dash.

    >>> number(0.28349), number(12.31), number(152.31), number(None) == ABSENT
    ('0.283', '12.3', '152', True)
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    if abs(value) >= 1e6:
        text = f"{value:.2e}"
    else:
        large = max(0, len(str(int(abs(value)))) - 1)
        text = f"{value:.{max(0, digits - large - (large > 0))}f}"
    return text.replace("-", MINUS)


def significant(value: float, digits: int = 3) -> str:
    """Write a quantity of any size with its leading digits.

    >>> significant(1234.5), significant(0.012345), significant(3), significant(0)
    ('1230', '0.0123', '3', '0')
    """
    if not math.isfinite(value):
        return ABSENT
    size = math.floor(math.log10(abs(value))) if value else 0
    if not -4 <= size < 6:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    text = f"{round(value, digits - 1 - size):.{max(0, digits - 1 - size)}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", MINUS)


def value(figure: float | None) -> str:
    """Write a figure for sorting by; nothing if it is absent.

    >>> value(0.5), value(None), value(math.nan)
    ('0.5', '', '')
    """
    return "" if figure is None or not math.isfinite(figure) else f"{figure:.9g}"


def ordinal(n: int) -> str:
    """Write a rank.

    >>> [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 112, 1143)]
    ['1st', '2nd', '3rd', '4th', '11th', '12th', '13th', '21st', '112th', '1,143rd']
    """
    teen = n % 100 in (11, 12, 13)
    return f"{n:,}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def short(n: int) -> str:
    """Write a number in at most six characters, if it is below a billion.

    >>> short(2841), short(220_153), short(499_500_000)
    ('2,841', '220k', '500M')
    """
    if n < 100_000:
        return f"{n:,}"
    return f"{n / 1e3:.0f}k" if n < 10_000_000 else f"{n / 1e6:.0f}M"


def percent(value: float | None, digits: int = 0) -> str:
    """Write a fraction as everywhere else, an absent one as a dash.

    >>> percent(0.756), percent(0.9999), percent(None) == ABSENT
    ('76%', '99%', True)
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    return tables.percent(value, digits).replace("-", MINUS)


def letter(k: int) -> str:
    """Short name of the k-th concept of a channel: A to Z, AA, AB."""
    rest, last = divmod(k, 26)
    return (letter(rest - 1) if rest else "") + string.ascii_uppercase[last]


def bounded(name: str, limit: int = LONGEST) -> str:
    """Cut a name that nobody would read to the end; it may have any number of characters."""
    text = name if len(name) <= limit else name[: limit - 1] + "…"
    return text.translate(_ISOLATES)


def isolate(name: str) -> str:
    """Keep a name's writing direction from spreading, where no element can: in plain text."""
    inner = name.translate(_ISOLATES)
    return f"\N{FIRST STRONG ISOLATE}{inner}\N{POP DIRECTIONAL ISOLATE}"


def first_few(names: Sequence[str], limit: int = 3) -> tuple[Sequence[str], str]:
    """Divide names into those to show and a word on the rest, which are two at least."""
    if len(names) <= limit + 1:
        return names, ""
    return names[:limit], f" and {len(names) - limit} more"


def ems(words: str) -> float:
    """Estimate how wide words are, in font sizes; of most fonts rather too much."""
    return sum(map(_em, words))


def _em(character: str) -> float:
    if character in _SLIM:
        return 0.42
    if character in _BROAD:
        return 1.02
    if unicodedata.combining(character):
        return 0.0
    if unicodedata.east_asian_width(character) in "WF":
        return 1.1
    return 0.8 if character.isupper() else 0.66


def listed(names: Sequence[str], width: float) -> str:
    """List names in a width in font sizes; each keeps its own writing direction."""
    shown: list[str] = []
    for name in names:
        if shown and width < 4:
            return ", ".join([*shown, "…"])
        text = name
        while ems(text) > width:
            text = text.removesuffix("…")[:-1].rstrip() + "…"
        shown.append(isolate(text))
        width -= ems(f"{text}, ")
    return ", ".join(shown)


def with_options(command: str, options: str) -> str:
    """Give a command other options, in place of those that it has of the same names.

    >>> with_options("unbraid run --tau 0.1 --out 'a b'", "--tau 0.02 --gamma 0.6")
    "unbraid run --out 'a b' --tau 0.02 --gamma 0.6"
    >>> with_options("", "--tau 0.02")
    '--tau 0.02'
    """
    new = shlex.split(options)
    names = tuple(word for word in new if word.startswith("--"))
    try:
        old = iter(shlex.split(command))
    except ValueError:  # nobody's command
        return options
    kept = []
    for word in old:
        if word in names:
            next(old, None)
        elif not word.startswith(tuple(f"{name}=" for name in names)):
            kept.append(word)
    return shlex.join([*kept, *new])
