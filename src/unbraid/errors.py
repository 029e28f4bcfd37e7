"""Errors that reach users: each message is one sentence on what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from unbraid.causes import causes, failing, gone_with_folder

_LONGEST = 300  # characters of what another library says


class UnbraidError(Exception):
    """Base of all errors that unbraid raises on purpose; `exit_code` is the command line's."""

    exit_code = 1


class UsageError(UnbraidError, ValueError):
    """An argument is out of range or does not fit the others."""

    exit_code = 2


class LayerError(UnbraidError, TypeError):
    """The layer does not exist or cannot be split."""

    exit_code = 2


class ModelError(UnbraidError):
    """The network cannot be built, loaded or run."""


class OutOfMemory(ModelError):
    """The device's memory holds no batch of this size."""


class DataError(UnbraidError):
    """The images cannot be found, read or understood."""


class OutOfReach(DataError):
    """Images cannot be read for now, for a reason of the system's; they may well be sound."""


class UnfitPicture(DataError):
    """A picture is sound, but of numbers that are not read; others of its kind are not either."""


class RunError(UnbraidError):
    """A folder or file of unbraid's own is incomplete, damaged or belongs to something else."""


class UnreadableError(RunError):
    """A file cannot be read now, or not by this version; that says nothing of what it holds."""


class OutputChangedError(UnbraidError):
    """A split network computes something else than the original."""


def brief(error: BaseException) -> str:
    r"""Say what an error of another library says, in one line that has an end.

    >>> brief(ValueError("a\nb" + "x" * 1_000_000))[:5], brief(ValueError())
    ('a bxx', 'ValueError')
    """
    try:
        text = str(error)
    except Exception:  # of a type of anyone's own
        text = ""
    return " ".join(text[:_LONGEST].split()) or type(error).__name__


def out_of_reach(what: str, error: BaseException) -> OutOfReach | None:
    """Tell an error of the system from one of the image being read; None for the latter.

    Of the system are no memory, and any errno that says nothing of the file itself: too many open
    files, a disk that fails, a server that is away, no permission. So is what a server refuses,
    unless it says that there is no such thing. A missing file counts as broken as long as its
    folder (that of what it links to) is there and holds others; else what is gone is probably the
    disk. All this also where other libraries wrap it in errors of their own.

    >>> str(out_of_reach("Image a", OSError(24, "Too many open files")))[:46]
    'Image a cannot be reached (Too many open files'
    >>> out_of_reach("Image a", OSError("truncated")) is None
    True
    """
    for one, same in causes(error, end=UnbraidError):
        if isinstance(one, OutOfReach):
            return one
        reason = failing(one) or (gone_with_folder(one) if same else None)
        if reason is not None:
            reason = reason[:_LONGEST].rstrip(".")
            return OutOfReach(f"{what} cannot be reached ({reason}); mend that and start again.")
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known names come nearest to a mistyped one.

    >>> nearest("resnet5", ["resnet50", "vgg16"])
    ' Did you mean resnet50?'
    >>> nearest("q", ["resnet50", "vgg16"])
    ''
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""
