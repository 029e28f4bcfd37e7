"""Memory that the C library keeps for what comes next, in place of giving it back at once."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # as glibc's malloc.h numbers them
_LARGEST = 2**30  # bytes of a block that is kept
_MOST_FREE = 2**31 - 1  # bytes kept free at the end of the heap; mallopt takes no larger number
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
_TUNABLES = tuple(
    f"glibc.malloc.{name}=" for name in ("trim_threshold", "mmap_threshold", "mmap_max")
)


def keep_memory() -> bool:
    """Let freed memory stay with this process, so that a network need not ask for it again.

    The C library of most Linux systems (glibc) hands every block of some MiB, such as a layer's
    output, back to the system once it is free, and the system clears its pages again for the next
    layer. That is a third to two thirds of the time of a network on a processor. Call this once,
    before the network runs; the commands do. It holds for all of the process until its end: blocks
    of up to 1 GiB, and at most 2 GiB free at the end of the heap. Results stay the same.

    Nothing is done where the C library is another one (macOS, Windows, musl), or where
    MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_ or the same of GLIBC_TUNABLES
    say what is to be.

    Returns:
        Whether memory is kept from now on.

    Source:
        "Memory that is kept" in docs/scale.md; glibc's manual, "Malloc Tunable Parameters".
    """
    if not _is_glibc() or _told_by_user():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Earlier versions take no threshold above 32 MiB; asked so, they never map a block apart.
    large = mallopt(_MMAP_THRESHOLD, _LARGEST) or mallopt(_MMAP_MAX, 0)
    return bool(large and mallopt(_TRIM_THRESHOLD, _MOST_FREE))


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows, macOS, musl
        return False


def _told_by_user() -> bool:
    told = os.environ.get("GLIBC_TUNABLES", "")
    return any(map(os.environ.get, _VARIABLES)) or any(name in told for name in _TUNABLES)
