"""Errors that reach users: each message is one sentence on what is wrong and what to do."""

from __future__ import annotations

import difflib
import errno
import os
import re
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from types import FrameType

# What an error of another library was made of, and whether the system is to blame for it.


_MOST = 64  # errors looked at behind one
_GONE = (errno.ENOENT, errno.ENOTDIR)
# The last is what a seek by a number out of a damaged file gives.
_OF_FILE = (*_GONE, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
_WORDS = {os.strerror(number): number for number in errno.errorcode}
# What no picture says of itself, so it may stand anywhere in a text.
_SHORT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO, errno.ESTALE)
_SHORT = tuple(os.strerror(number) for number in _SHORT_OF)
# As torch's allocators, Python's threads and C say it, mostly in a RuntimeError.
_MEMORY_FULL = ("allocate memory", "out of memory", "start new thread")
# Those of names have numbers of their own, which on some systems are those of other errors.
_OF_NAMES = (socket.gaierror, socket.herror)
_OF_SYSTEM = (ConnectionError, TimeoutError, PermissionError, *_OF_NAMES)
# By name, as their libraries need not be there, and to import one takes a file and memory.
_URL_ERROR = "urllib.error.URLError"
_OF_NETWORK = {
    "ssl.SSLError",  # whose numbers are not the system's
    "http.client.HTTPException",
    "urllib3.exceptions.ResponseError",
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "httpx.TransportError",
    "httpx2.TransportError",
}
_NO_URL = "http.client.InvalidURL"
_NOT_FOUND = (404, 410)
_NUMBER = re.compile(r"\[Errno (\d{1,5})\]")


def causes(error: BaseException, end: type[BaseException]) -> Iterator[tuple[BaseException, bool]]:
    """Go through an error and those that it was made of, the nearest first, each once.

    Libraries keep what happened as an error's cause, its context, one of its arguments or its
    `reason`. A context counts only if it was caught where the error passed; another one was being
    handled before, such as when a program scans anew because something else failed.

    Args:
        error: it and at most some dozens behind it are gone through.
        end: kind of error whose own causes are left out.

    Yields:
        Each error, and whether the first one says the same in other words, rather than what came
        of a second attempt after it.
    """
    seen: set[int] = set()
    ahead = deque([(error, True)])
    while ahead and len(seen) < _MOST:
        one, same = ahead.popleft()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one, same
        if not isinstance(one, end):
            ahead += [(other, same and also) for other, also in _behind(one)]


def _behind(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    inside = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for other in (error.__cause__, vars(error).get("reason"), *error.args, *inside):
        if isinstance(other, BaseException):
            yield other, True
    context = error.__context__
    if context is None or context.__traceback__ is None:
        return
    passed, caught = _frames(error), context.__traceback__.tb_frame
    if caught in passed:
        yield context, caught is passed[-1]


def _frames(error: BaseException) -> list[FrameType]:
    """Where an error passed, from where it was caught to where it was raised."""
    frames, at = [], error.__traceback__
    while at is not None:
        frames.append(at.tb_frame)
        at = at.tb_next
    return frames


def failing(error: BaseException) -> str | None:
    """Say how the system failed, None if an error by itself says no such thing.

    Files that are gone are left to `gone_with_folder`.
    """
    if memory_full(error):
        return "memory is full"
    if not _is_of_system(error):
        return None
    told = getattr(error, "strerror", None)
    return " ".join(str(told or error).split()) or type(error).__name__


def memory_full(error: BaseException) -> bool:
    """Whether memory, of the machine or of an accelerator, was too small.

    >>> memory_full(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."))
    True
    """
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in text for words in _MEMORY_FULL)
    )


def _is_of_system(error: BaseException) -> bool:
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    status = _status(error)
    if status is not None:
        return status not in _NOT_FOUND
    if isinstance(error, _OF_SYSTEM) or kinds & _OF_NETWORK:
        return _NO_URL not in kinds
    if _URL_ERROR in kinds:  # which may be of a file, by file://
        return not is_of_file(vars(error).get("reason"))
    number = _number(error)
    number = _number_in(str(error)) if number is None else number
    return number is not None and number not in _OF_FILE


def _number(error: object) -> int | None:
    """The system's number of an error; any two arguments make one, also those that are none."""
    if not isinstance(error, OSError) or isinstance(error, _OF_NAMES):
        return None
    return error.errno if error.errno in errno.errorcode else None


def _status(error: BaseException) -> int | None:
    """The status by which a server refused what was asked of it, by the habits of libraries."""
    own = vars(error)
    answer = own.get("response")
    about = answer.get("ResponseMetadata") if isinstance(answer, dict) else None
    told = (
        getattr(error, "code", None),
        own.get("status"),
        getattr(answer, "status_code", None),
        about.get("HTTPStatusCode") if isinstance(about, dict) else None,
    )
    return next((n for n in told if isinstance(n, int) and 300 <= n < 600), None)


def _number_in(text: str) -> int | None:
    """The system's number in what a library of C or C++ says: `[Errno 5]`, or words at its end."""
    found = _NUMBER.search(text)
    if found and int(found.group(1)) in errno.errorcode:
        return int(found.group(1))
    short = (_WORDS[words] for words in _SHORT if words in text)
    return next(short, _WORDS.get(text.rpartition(": ")[2]))


def gone_with_folder(error: BaseException) -> str | None:
    """Say that a file is missing because all of its folder is, None if that is not so."""
    if _number(error) not in _GONE:
        return None
    file = getattr(error, "filename", None)
    if not isinstance(file, (str, bytes, os.PathLike)):
        return None
    folder = os.path.dirname(os.path.realpath(file))
    return None if _holds_something(folder) else f"folder {os.fsdecode(folder)} is gone or empty"


def _holds_something(folder: str | bytes) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def is_of_file(error: object) -> bool:
    """Whether an error is about a file itself, such as that there is none of that name."""
    return _number(error) in _OF_FILE


# Errors that reach users: each message is one sentence on what is wrong and what to do.


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
