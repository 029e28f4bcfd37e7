"""Files that appear whole or not at all: temporary name, sync, rename."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unbraid.base.errors import RunError, UnreadableError, UsageError, brief
from unbraid.base.schema import parse_json

if sys.platform != "win32":
    import fcntl

_ABOUT = "unbraid"  # the metadata entry of a safetensors file
_CHECKSUMS = "crc32"
_HOST = re.sub(r"[^\w-]", "-", socket.gethostname())[:32] or "-"
_OURS = re.compile(r".+\.(?P<host>[\w-]+)\.\d+\.[0-9a-f]{8}\.tmp")
_LONG = 3600.0  # seconds; no file of ours takes so long to write
_SETTLED = 2.0  # seconds, after which another write gives a file another time on any file system
_MOST_KNOWN = 2**14  # files, of some KiB each; the oldest is forgotten


@dataclass(frozen=True)
class _Known:
    """What this process has seen in a file, which holds while the system says it is the same."""

    stamp: tuple[int, ...]
    names: frozenset[str]  # of its tensors
    sound: set[str]  # of those that are what their checksums say


_known: dict[Path, _Known] = {}  # steps read a scan several times, and most of that was checksums


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a safetensors file, whole or not at all: tensors, their checksums, and JSON on them.

    Raises RunError if there is more JSON than such a file holds, 100 MB.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {**about, _CHECKSUMS: {name: _checksum(tensor) for name, tensor in whole.items()}}
    # One entry alone, since safetensors writes several in any order.
    try:
        content = safetensors.torch.save(whole, {_ABOUT: json.dumps(about)})
    except SafetensorError as error:
        raise RunError(
            f"{path} cannot be written ({brief(error)}); ask for fewer channels at a time."
        ) from error
    write_whole(path, content)


def read_tensors(
    path: Path, names: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a safetensors file, or some, and its JSON; raises RunError.

    Checksums are compared once, as long as the file stays what it was.
    """
    stamp = _stamp(path)
    with _opened(path) as (file, about):
        if _stamp(path) != stamp:  # another file by now, of which nothing is known
            stamp = ()
        sound = _know(path, stamp, file).sound
        tensors = {n: file.get_tensor(n) for n in (file.keys() if names is None else names)}
        checksums = about.get(_CHECKSUMS)
        for name in tensors:
            if name in sound:
                continue
            # Older files have no checksums.
            if checksums is not None and checksums[name] != _checksum(tensors[name]):
                raise ValueError(f"{name!r} is not what was written")
            sound.add(name)
        return tensors, about


def names_in(path: Path) -> frozenset[str]:
    """Name the tensors of a safetensors file; raises as `read_tensors` does."""
    stamp = _stamp(path)
    if stamp and path in _known and _known[path].stamp == stamp:
        return _known[path].names
    with _opened(path) as (file, _):
        return _know(path, stamp, file).names


def _stamp(path: Path) -> tuple[int, ...]:
    """What another content of a file would change; nothing where that cannot be told."""
    try:
        own = path.stat()
    except OSError:
        return ()
    if time.time() - max(own.st_mtime, own.st_ctime) < _SETTLED:
        return ()
    return own.st_dev, own.st_ino, own.st_size, own.st_mtime_ns, own.st_ctime_ns


def _know(path: Path, stamp: tuple[int, ...], file: Any) -> _Known:
    """What is known of an open file, which is kept where its stamp tells it from others."""
    known = _known.get(path)
    if known is None or not stamp or known.stamp != stamp:
        known = _Known(stamp, frozenset(map(sys.intern, file.keys())), set())
        if stamp:
            if path not in _known and len(_known) == _MOST_KNOWN:
                del _known[next(iter(_known))]
            _known[path] = known
    return known


def forget() -> None:
    """Compare the checksums of all files again, whatever the system says of them."""
    _known.clear()


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")  # opening a pipe might never end
        # safetensors calls a file missing whatever the system said.
        with path.open("rb"), safe_open(path, framework="pt") as file:
            about = parse_json((file.metadata() or {}).get(_ABOUT, "{}"))
            if not isinstance(about, dict):
                raise ValueError("its description is none")
            yield file, about
    except (SafetensorError, FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read ({brief(error)}); delete it if it is there, and start the "
            "command that makes it again."
        ) from None
    except (OSError, RuntimeError, MemoryError) as error:  # torch makes the first into the second
        raise UnreadableError(
            f"{path} cannot be read ({brief(error)}), sound or not; mend that and start again."
        ) from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it; raises RunError, UsageError."""
    write_through(path, lambda file: file.write(content))


def write_through(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file as `write_whole` does, which `fill` fills, so that memory need not hold it."""
    _write(path, fill, lambda temporary: temporary.replace(path))


def write_new(path: Path, content: bytes) -> bool:
    """Write a file as `write_whole` does, unless it is there; whether it was written."""
    taken = os.path.lexists(path)

    def name_first(temporary: Path) -> None:
        nonlocal taken
        try:
            os.link(temporary, path)
        except FileExistsError:
            taken = True
        except OSError:  # a file system without hard links
            temporary.replace(path)
        temporary.unlink(missing_ok=True)

    if not taken:
        _write(path, lambda file: file.write(content), name_first)
    return not taken


def refuse_file(folder: Path) -> None:
    """UsageError if a file stands where a folder, or one that it lies in, is wanted."""
    for path in (folder, *folder.parents):
        if path.is_file():
            raise UsageError(f"{path} is a file, not a folder; name another folder.")


def _write(path: Path, fill: Callable[[BinaryIO], object], name: Callable[[Path], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_for(path) as (temporary, file):
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            if os.name != "posix":
                file.close()  # Windows renames nothing that is open
            name(temporary)
        _sync_names(path.parent)
    except (FileExistsError, NotADirectoryError):
        refuse_file(path.parent)
        raise UsageError(f"{path.parent} is no folder; name another folder.") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"The disk is full, {path.name} was not written; what is finished is kept: make "
                "room and start the same command again."
            ) from None
        raise RunError(
            f"{path} cannot be written ({error.strerror}); mend that, or name another place."
        ) from None


def _sync_names(folder: Path) -> None:
    """Make sure that a rename outlives a loss of power, where the system can be asked to."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems, of networks and in user space, cannot
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def set_aside(path: Path, mark: str) -> Path:
    """Rename a file or folder by an ending, with a number before it where that is taken."""
    aside, number = path.with_name(path.name + mark), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{number}{mark}")
    return path.replace(aside)


@contextmanager
def temporary_for(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a new file beside another, locked meanwhile; an error or ctrl-C removes it."""
    while True:
        own = f"{_HOST}.{os.getpid()}.{secrets.token_hex(4)}"
        temporary = path.with_name(f"{path.name}.{own}.tmp")
        file = temporary.open("xb")
        # Before it was locked, it looked like a leftover to anybody who cleaned up.
        if _lock(file) is not False and temporary.exists():
            break
        file.close()
    try:
        with file:
            yield temporary, file
    except (Exception, KeyboardInterrupt):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of writers that live no more, and leave everything else alone."""
    for path in folder.glob("*.tmp"):
        ours = _OURS.fullmatch(path.name)
        if not ours or not path.is_file():
            continue
        with suppress(OSError), path.open("r+b") as file:  # somebody else's, or gone already
            lock = _lock(file)
            old = time.time() - os.fstat(file.fileno()).st_mtime > _LONG
            if lock is not False and (old or (lock is True and ours["host"] == _HOST)):
                if os.name != "posix":
                    file.close()  # Windows deletes nothing that is open
                path.unlink(missing_ok=True)  # while it is ours, before a writer can lock it


def _lock(file: BinaryIO) -> bool | None:
    """Lock an open file: whether it could be, None where files cannot be locked at all."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
