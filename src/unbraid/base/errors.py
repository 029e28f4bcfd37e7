"""Errors that reach users: each message is one sentence on what is wrong and what to do."""

from __future__ import annotations

import difflib
import errno
import os
from collections import deque
from collections.abc import Iterable, Iterator
from json import JSONDecodeError
from typing import Self

_LONGEST = 300  # characters of what another library says
_MOST = 64  # errors looked at behind one
# As torch's allocators, Python's threads and C say it, mostly in a RuntimeError.
_MEMORY_FULL = ("allocate memory", "out of memory", "start new thread")
# What libraries raise on content that they cannot decode, beside OSError without a number.
_OF_CONTENT: tuple[type[Exception], ...] = (ValueError, TypeError, LookupError, ArithmeticError)
_OF_CONTENT += (RuntimeError, EOFError, SyntaxError)
_DECODERS = {"PIL", "cv2", "struct", "zlib", "gzip", "tarfile", "zipfile"}
_DECODERS |= {"_csv", "_lzma", "_pickle"}  # those written in C
_OF_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# The last is what a seek by a number out of a damaged file gives.
_OF_FILE_BY_NUMBER = (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
_WORDS = [os.strerror(number) for number in errno.errorcode]


class UnbraidError(Exception):
    """Base of all errors that unbraid raises on purpose; `exit_code` is the command line's."""

    exit_code = 1
    image: int | None = None  # the index that the message calls an image by, for want of a name
    _around = ("", "")

    @classmethod
    def of_image(cls, before: str, index: int, after: str) -> Self:
        """Make an error about an image of which its index is known, told between two texts."""
        error = cls(_with_image(before, f"image {index}", after))
        error.image, error._around = index, (before, after)
        return error

    def naming(self, image: str) -> Self:
        """Make the same error with a name for the image."""
        before, after = self._around
        return type(self)(_with_image(before, image, after))


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


class CannotRun(ModelError):
    """The network's code fails on these images."""


class DataError(UnbraidError):
    """The images cannot be found, read or understood."""


class OutOfReach(DataError):
    """Images cannot be read for now, for a reason of the system's; they may well be sound."""


class UnfitPicture(DataError):
    """A picture is sound, but of numbers that are not read; others of its kind are not either."""


class SizesDiffer(DataError):
    """Images are of different sizes where what is kept of them asks for one."""


class RunError(UnbraidError):
    """A folder or file of unbraid's own is incomplete, damaged or belongs to something else."""


class UnreadableError(RunError):
    """A file cannot be read now, or not by this version; that says nothing of what it holds."""


class OutputChangedError(UnbraidError):
    """A split network computes something else than the original."""


def _with_image(before: str, image: str, after: str) -> str:
    space = "" if after[:1] == ";" else " "
    begun = f"{before} {image}" if before else f"{image[0].upper()}{image[1:]}"
    return f"{begun}{space}{after}"


def brief(error: BaseException) -> str:
    """Say what an error of another library says, in one line that has an end."""
    try:
        text = str(error)
    except Exception:  # of a type of anyone's own
        text = ""
    return " ".join(text[:_LONGEST].split()) or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known names come nearest to a mistyped one, " Did you mean ...?"."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def out_of_reach(
    what: str, error: BaseException, before: BaseException | None = None
) -> OutOfReach | None:
    """Tell an image that cannot be read for now from a broken one; None for the latter.

    An image is broken if decoding rejects it, or if its file is missing while the folder is there
    and holds others. All else (memory, a server, no permission) may leave a good image unread.
    What was being handled `before` is no cause.
    """
    reason = None
    for one in _causes(error, before):
        if isinstance(one, OutOfReach):
            return one
        reason = _failing(one) or _gone_with_folder(one) or reason
    # The last is nearest to what went wrong first.
    text = f"{what} cannot be reached ({reason}); mend that and start again."
    return OutOfReach(text) if reason else None


def _causes(error: BaseException, before: BaseException | None) -> Iterator[BaseException]:
    """Go through an error and what it was made of: cause, context, arguments, members of groups."""
    seen = {id(before)}
    ahead: deque[object] = deque([error])
    while ahead and len(seen) < _MOST:
        one = ahead.popleft()
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, BaseExceptionGroup):
            ahead += one.exceptions
        else:
            yield one
        # Ours were judged where they were raised; what lies behind one of json's is its own.
        if not isinstance(one, (UnbraidError, JSONDecodeError)):
            ahead += (one.__cause__, one.__context__, vars(one).get("reason"), *one.args)


def _failing(error: BaseException) -> str | None:
    """Say what failed if it may not have been the image; None if it was, or its file is missing."""
    if memory_full(error):
        return "memory is full"
    if is_of_file(error) or isinstance(error, UnbraidError):
        return None
    module = type(error).__module__.partition(".")[0]
    if type(error) is OSError:
        of_content = error.errno not in errno.errorcode
    else:
        known = isinstance(error, _OF_CONTENT) or module in _DECODERS
        of_content = known and not any(words in str(error) for words in _WORDS)
    told = getattr(error, "strerror", None) or brief(error)
    return None if of_content else " ".join(str(told).split())[:_LONGEST].rstrip(".")


def is_of_file(error: object) -> bool:
    """Whether an error is about a file itself, such as that there is none of that name."""
    by_number = type(error) is OSError and error.errno in _OF_FILE_BY_NUMBER
    return type(error) in _OF_FILE or by_number


def memory_full(error: BaseException) -> bool:
    """Whether memory, of the machine or of an accelerator, was too small."""
    text = str(error)
    return isinstance(error, (MemoryError, OutOfMemory)) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in text for words in _MEMORY_FULL)
    )


def _gone_with_folder(error: BaseException) -> str | None:
    """Say that a file is missing because all of its folder is, None if that is not so."""
    file = getattr(error, "filename", None)
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    if not missing or not file or not isinstance(file, (str, bytes, os.PathLike)):
        return None
    folder = os.path.dirname(os.path.realpath(file))
    try:
        with os.scandir(folder) as entries:
            gone = next(entries, None) is None
    except OSError:
        gone = True
    return f"folder {os.fsdecode(folder)} is gone or empty" if gone else None
