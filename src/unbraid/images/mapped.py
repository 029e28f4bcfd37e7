"""A list of images in a file that processes map into memory: written once, read in place.

`docs/format.md` specifies the file. Nothing of it is copied, and what is asked for is read when it
is asked for: an id is a text only while somebody looks at it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from unbraid.base.errors import OutOfReach, RunError, brief
from unbraid.base.schema import check_schema, parse_json, unread

HEAD = 4096  # bytes, of the header with its length
BLOCK = 2**20  # bytes that have one checksum
SCHEMA = 1
CHECKSUMS = "block_crc32"
KINDS: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
_CHUNK = 2**16  # entries read in one go
_LONGEST = 2**16  # bytes of an id
_PATIENCE = 60.0  # seconds; NFS shows a file again after half of that
_PAUSE = 0.2


T = TypeVar("T")

_NEEDED = {"id_bytes", "id_start", "class", "size", "first", "class_name_start", "about_start"}


class _Column(NamedTuple):
    dtype: np.dtype[Any]
    offset: int  # in the file
    n: int


class Mapped:
    """A list file. Each MiB of it is compared with its checksum before it is first used."""

    def __init__(self, path: Path) -> None:
        """Map a file; RunError if it is none of these or cut off."""
        self.path = path
        try:
            with path.open("rb") as file:
                head = file.read(HEAD)
            self._bytes: NDArray[Any] = np.memmap(path, np.uint8, "r").view(np.ndarray)
            self.columns = _columns(head, len(self._bytes))
            self.identity = hashlib.sha256(head).hexdigest()
            last = self.columns[CHECKSUMS]
            self._checksums = self._bytes[last.offset : last.offset + 8 * last.n].view("<i8")
            if zlib.crc32(self._checksums.tobytes()) != _about(head)["crc32"][CHECKSUMS]:
                raise ValueError("its checksums are not what was written")
            self._sound = np.zeros(last.n, bool)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unread(error, str(_refused(path, brief(error)))) from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the file's name to another process, not what is in it."""
        return open_mapped, (self.path, self.identity)

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Look at some entries of a column, in place; RunError if they are damaged."""
        column = self.columns[name]
        size = column.dtype.itemsize
        first, end = (column.offset + k * size for k in (start, stop))
        if not 0 <= start <= stop <= column.n:
            raise _refused(self.path, f"{name!r} has {column.n} entries, not {stop}")
        blocks = range((first - HEAD) // BLOCK, -(-(end - HEAD) // BLOCK))
        for block in blocks if start < stop else ():
            if not self._sound[block]:
                self._check(block)
        found: NDArray[Any] = self._bytes[first:end].view(column.dtype)
        return found

    def check(self) -> None:
        """Compare all with its checksums; RunError if it is damaged."""
        for block in range(len(self._sound)):
            self._check(block)

    def _check(self, block: int) -> None:
        first = HEAD + block * BLOCK
        end = min(first + BLOCK, self.columns[CHECKSUMS].offset)
        if zlib.crc32(self._bytes[first:end].data) != self._checksums[block]:
            raise _refused(self.path, f"byte {first} to {end} are not what was written")
        self._sound[block] = True

    def texts(self, name: str) -> list[str]:
        """Read a short column of texts."""
        return list(Texts(self, name))


@functools.lru_cache(maxsize=4)
def open_mapped(path: Path, identity: str) -> Mapped:
    """Map a list that another process has named; OutOfReach if another is there after a while."""
    until = time.monotonic() + _PATIENCE
    while True:
        mapped = Mapped(path) if path.exists() else None
        if mapped is not None and mapped.identity == identity:
            return mapped
        if time.monotonic() > until:
            raise OutOfReach(f"{path} was replaced by another list of images; start again.")
        time.sleep(_PAUSE)


def _refused(path: Path, fault: str) -> RunError:
    return RunError(f"{path} is no list of images that can be used ({fault}); delete it.")


def _about(head: bytes) -> dict[str, Any]:
    about = parse_json(parse_json(head[8:].decode())["__metadata__"]["unbraid"])
    check_schema(about, SCHEMA)
    return about  # type: ignore[no-any-return]


def _columns(head: bytes, n_bytes: int) -> dict[str, _Column]:
    """Read where columns are; ValueError unless they fill the file from end to end."""
    if len(head) < HEAD or int.from_bytes(head[:8], "little") != HEAD - 8:
        raise ValueError("its header is none")
    _about(head)
    found: dict[str, _Column] = {}
    end = 0
    for name, told in parse_json(head[8:].decode()).items():
        if name == "__metadata__":
            continue
        dtype, (n,), (start, stop) = KINDS[told["dtype"]], told["shape"], told["data_offsets"]
        whole = all(type(number) is int for number in (n, start, stop))
        if not whole or start != end or stop - start != n * dtype.itemsize or n < 0:
            raise ValueError(f"{name!r} does not lie where it should")
        found[name], end = _Column(dtype, HEAD + start, n), stop
    if HEAD + end != n_bytes:
        raise ValueError(f"it has {n_bytes} bytes of {HEAD + end}")
    if not found.keys() >= _NEEDED:
        raise ValueError("it lacks columns")
    if found[CHECKSUMS].n != -(-(found[CHECKSUMS].offset - HEAD) // BLOCK):
        raise ValueError("its checksums are of another file")
    return found


# --- what looks like a list -----------------------------------------------------------------------


class _View(Sequence[T], Generic[T]):
    """Entries of a mapped list, read as they are asked for; equal to a list of the same."""

    def __init__(self, mapped: Mapped, name: str) -> None:
        self.mapped, self.name = mapped, name

    def _some(self, start: int, stop: int) -> list[T]:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        """Read one entry, or several in a row."""
        n = len(self)
        if isinstance(index, slice):
            start, stop, step = index.indices(n)
            return (
                self._some(start, max(start, stop))
                if step == 1
                else [self[k] for k in range(start, stop, step)]
            )
        place = index + n if index < 0 else index
        if not 0 <= place < n:
            raise IndexError(index)
        return self._some(place, place + 1)[0]

    def __iter__(self) -> Iterator[T]:
        """Read all, some at a time."""
        for start in range(0, len(self), _CHUNK):
            yield from self._some(start, min(start + _CHUNK, len(self)))

    def __eq__(self, other: object) -> bool:
        """Compare with a list."""
        if not isinstance(other, Sequence) or len(other) != len(self):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Texts(_View[str]):
    """Texts, each behind a prefix."""

    def __init__(self, mapped: Mapped, name: str, prefix: str = "") -> None:
        """Look at a column of texts."""
        super().__init__(mapped, name)
        self.prefix = prefix

    def __len__(self) -> int:
        """Number of texts."""
        return max(0, self.mapped.columns[f"{self.name}_start"].n - 1)

    def _some(self, start: int, stop: int) -> list[str]:
        if start >= stop:
            return []
        places = self.mapped.read(f"{self.name}_start", start, stop + 1)
        first, end = int(places[0]), int(places[-1])
        if (np.diff(places) < 0).any() or end - first > _LONGEST * (stop - start):
            raise _refused(self.mapped.path, f"its {self.name}s are out of order")
        content = self.mapped.read(f"{self.name}_bytes", first, end).tobytes()
        ends = (places - first).tolist()
        return [
            self.prefix + content[i:j].decode("utf-8", "surrogateescape") for i, j in pairwise(ends)
        ]


class Numbers(_View[int]):
    """Whole numbers, or what a table has in their places (for -1 the last)."""

    def __init__(self, mapped: Mapped, name: str, table: Sequence[int] | None = None) -> None:
        """Look at a column of numbers."""
        super().__init__(mapped, name)
        self.table = None if table is None else list(table)

    def __len__(self) -> int:
        """Number of numbers."""
        return self.mapped.columns[self.name].n

    def _some(self, start: int, stop: int) -> list[int]:
        return self.array(start, stop).tolist()  # type: ignore[no-any-return]

    def array(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read some in a row."""
        own = self.mapped.read(self.name, start, stop).astype(np.int64)
        if self.table is None:
            return own
        if len(own) and not -1 <= own.min() <= own.max() < len(self.table):
            raise _refused(self.mapped.path, f"{self.name!r} has numbers that cannot be")
        return np.array(self.table, np.int64)[own]

    def arrays(self) -> Iterator[NDArray[np.int64]]:
        """Read all, some at a time."""
        for start in range(0, len(self), BLOCK):
            yield self.array(start, min(start + BLOCK, len(self)))

    def of(self, table: Sequence[int]) -> Numbers:
        """The same with what another table has in their places."""
        return Numbers(self.mapped, self.name, table)

    def first(self) -> dict[int, int]:
        """Where each class, or what stands for it, comes first; from a column of its own."""
        places = self.mapped.read("first", 0, self.mapped.columns["first"].n).tolist()
        table = [*range(len(places) - 1), -1] if self.table is None else self.table
        found: dict[int, int] = {}
        for number, place in sorted(zip(table, places, strict=True), key=lambda own: own[1]):
            if place >= 0:
                found.setdefault(number, place)
        return found


class Pairs(Sequence[tuple[str, int]]):
    """Paths and labels, side by side."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int]) -> None:
        """Put two lists side by side."""
        self.paths, self.labels = paths, labels

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        """Read one pair."""
        return self.paths[index], self.labels[index]


class Chosen(_View[str]):
    """Texts by number, such as the group of each image."""

    def __len__(self) -> int:
        """Number of texts."""
        return self.mapped.columns[self.name].n

    @property
    def numbers(self) -> Numbers:
        """Their numbers, in the order in which they first appear."""
        return Numbers(self.mapped, self.name)

    def _some(self, start: int, stop: int) -> list[str]:
        texts = Texts(self.mapped, f"{self.name}_name")
        return [texts[number] for number in self.numbers[start:stop]]


def distinct(numbers: Sequence[int]) -> set[int]:
    """The different numbers of a list, without going through a mapped one."""
    return set(numbers.first()) if isinstance(numbers, Numbers) else set(numbers)


def as_array(numbers: Sequence[int]) -> NDArray[np.int64]:
    """All numbers (N,), a mapped list's without going through them one by one."""
    if isinstance(numbers, Numbers):
        return np.concatenate([np.empty(0, np.int64), *numbers.arrays()])
    return np.asarray(numbers, np.int64)


def in_bytes(numbers: Sequence[int]) -> Iterator[bytes]:
    """Numbers as int64, as many at a time as memory easily holds."""
    if isinstance(numbers, Numbers):
        yield from (own.tobytes() for own in numbers.arrays())
    else:
        yield np.array(numbers, np.int64).tobytes()


def head_of(columns: Mapping[str, tuple[str, int]], crc32: Mapping[str, int], n: int) -> bytes:
    """Write a header: of each column, in order, its kind and number of entries."""
    whole: dict[str, Any] = {
        "__metadata__": {
            "unbraid": json.dumps({"schema": SCHEMA, "n_images": n, "crc32": dict(crc32)})
        }
    }
    end = 0
    for name, (kind, n_entries) in columns.items():
        start, end = end, end + n_entries * KINDS[kind].itemsize
        whole[name] = {"dtype": kind, "shape": [n_entries], "data_offsets": [start, end]}
    text = json.dumps(whole, separators=(",", ":")).encode()
    return (HEAD - 8).to_bytes(8, "little") + text.ljust(HEAD - 8)
