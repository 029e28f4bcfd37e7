"""Names of files made of any names: as they are, but for what a file system cannot take."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import count
from pathlib import PurePosixPath

# Control characters, halves of characters, ends of lines, what turns the writing direction, and
# what Windows forbids.
_REFUSED = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069" + r'<>:"/\\|?*]+'
)
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows
# File systems take 255; the rest is for an ending, a number, and the name before it is whole.
_MOST_BYTES = 180


def file_names(names: Sequence[str]) -> list[str]:
    """Make a file's name, without ending, of each name or path; the same ones get numbers.

    >>> file_names(["two/ä.JPEG", "two/ü.JPEG", "one/Ä.png", 'what?"'])
    ['ä', 'ü', 'Ä~2', 'what']
    """
    taken: set[str] = set()
    found = []
    for name in names:
        own = _file_name(name)
        every = (own if n == 1 else f"{own}~{n}" for n in count(1))
        found.append(next(one for one in every if _as_seen(one) not in taken))
        taken.add(_as_seen(found[-1]))
    return found


def _file_name(name: str) -> str:
    stem = PurePosixPath(name.replace("\\", "/")).stem
    marked = _REFUSED.sub("/", unicodedata.normalize("NFC", stem))
    # A dot in front hides a file, a dash looks like an option; Windows drops dots at the end.
    whole = marked.lstrip("/.- ").encode()[:_MOST_BYTES].decode(errors="ignore").rstrip("/. ")
    safe = whole.replace("/", "_") or "image"
    return f"_{safe}" if _DEVICES.fullmatch(safe) else safe


def _as_seen(name: str) -> str:
    """The same for names that some system takes for one: in capitals, or composed otherwise."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
