"""Errors that reach users: each message is one sentence on what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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


class RunError(UnbraidError):
    """A folder or file of unbraid's own is incomplete, damaged or belongs to something else."""


class OutputChangedError(UnbraidError):
    """A split network computes something else than the original."""


def brief(error: BaseException) -> str:
    r"""Say what an error of another library says, in one line that has an end.

    >>> brief(ValueError("a\nb" + "x" * 1_000_000))[:5], brief(ValueError())
    ('a bxx', 'ValueError')
    """
    return " ".join(str(error)[:_LONGEST].split()) or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known names come nearest to a mistyped one.

    >>> nearest("resnet5", ["resnet50", "vgg16"])
    ' Did you mean resnet50?'
    >>> nearest("q", ["resnet50", "vgg16"])
    ''
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""
