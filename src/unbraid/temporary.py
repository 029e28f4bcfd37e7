"""Temporary files, which a living writer keeps locked so that nobody takes them for leftovers."""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

_HOST = re.sub(r"[^\w-]", "-", socket.gethostname())[:32] or "-"
_OURS = re.compile(r".+\.(?P<host>[\w-]+)\.\d+\.[0-9a-f]{8}\.tmp")
_LONG = 3600.0  # seconds; no file of ours takes so long to write


@contextmanager
def temporary_for(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a new file beside another, locked until it is closed and deleted if an error comes up.

    Args:
        path: the file that it is to become.

    Yields:
        Its path and the file, open for writing.

    Raises:
        OSError: it cannot be made.
    """
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
    except Exception:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of writers that live no more, and leave everything else alone.

    A writer holds a lock. Where files cannot be locked, or it ran on another machine, whose locks
    may not be seen here, only files that nobody wrote to for an hour are leftovers.
    """
    for path in folder.glob("*.tmp"):
        ours = _OURS.fullmatch(path.name)
        if ours and path.is_file():
            with suppress(OSError):  # somebody else's, or gone already
                _remove_leftover(path, ours["host"])


def _remove_leftover(path: Path, host: str) -> None:
    with path.open("r+b") as file:
        lock = _lock(file)
        old = time.time() - os.fstat(file.fileno()).st_mtime > _LONG
        dead = lock is not False and (old or (lock is True and host == _HOST))
        if dead:
            with suppress(PermissionError):  # of Windows, which deletes nothing that is open
                path.unlink(missing_ok=True)  # while it is ours, before a writer can lock it
    if dead:
        path.unlink(missing_ok=True)


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
