"""How much room words take in a chart, where nothing can be measured before a browser shows it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from markupsafe import Markup

from unbraid.report.text import isolate

# Font sizes in units of a chart, at which a chart is legible in a wide box and in a phone's. The
# style sheet takes a step between the two as well; a test in a browser measures what comes of it.
WIDE, NARROW = 12.5, 16.5

_SLIM = frozenset("iljtfrI.,:;'|!()[]/\\ -\N{FIRST STRONG ISOLATE}\N{POP DIRECTIONAL ISOLATE}")
_BROAD = frozenset("mwMW@%&…\N{EM DASH}")


def ems(words: str) -> float:
    """Estimate how wide words are, in font sizes; of most fonts rather too much.

    >>> round(ems("Ankle boot"), 2), round(ems("WWW"), 2), round(ems("時計"), 2)
    (6.02, 3.06, 2.2)
    """
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


def cut(words: str, room: float) -> str:
    """Shorten words to a room in font sizes.

    >>> cut("Ankle boot", 6.1), cut("Ankle boot", 5)
    ('Ankle boot', 'Ankle…')
    """
    if ems(words) <= room:
        return words
    used = ems("…")
    for n, character in enumerate(words):
        used += _em(character)
        if used > room:
            return words[:n].rstrip() + "…"
    return words


def listed(names: Sequence[str], room: float) -> str:
    """List names in a room in font sizes; each keeps its own writing direction."""
    shown: list[str] = []
    for name in names:
        left = room - ems("".join(f"{one}, " for one in shown))
        if shown and left < 4:
            return ", ".join(map(isolate, shown)) + ", …"
        shown.append(cut(name, left))
    return ", ".join(map(isolate, shown))


def name_in(names: Sequence[str], room: float) -> Markup:
    """Write names for a room in units of a chart, shorter where the page shows larger letters."""
    wide, narrow = listed(names, room / WIDE), listed(names, room / NARROW)
    if wide == narrow:
        return Markup('<tspan class="name">{}</tspan>').format(wide)
    return Markup(
        '<tspan class="name roomy">{}</tspan><tspan class="name tight">{}</tspan>'
    ).format(wide, narrow)
