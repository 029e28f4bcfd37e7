"""Members of tar files, found by their headers; nothing is ever extracted."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from unbraid.errors import DataError, OutOfReach, out_of_reach

_BLOCK = 512
_LONGEST = 1 << 20  # bytes of a header that says more than fits into a block
_PADDED = 10_240  # bytes that tar pads a file to a multiple of, unless told otherwise
_MOST_PADDED = 1 << 20  # at most, and then a power of two
_LENGTH = 20  # characters that the length of a record and a space may take
_SPARSE = b"GNU.sparse"  # with holes, so not read in one go
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)

Stamp = tuple[int, int, int]  # which file it is, its bytes, and when it was last written, in ns


@dataclass(frozen=True)
class Member:
    """A member of a tar file, and where its content lies."""

    name: str
    regular: bool
    folder: bool
    offset: int
    size: int


def stamp_of(found: os.stat_result) -> Stamp:
    """What changes when a file is written anew or another one put in its place."""
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_content(path: str, stamp: Stamp, offset: int, size: int) -> bytes:
    """Read what a member holds.

    Args:
        path: the tar file.
        stamp: the file's own, from before its members were listed.
        offset: where the content begins, in bytes.
        size: of the content, in bytes.

    Raises:
        OutOfReach: the file is not the one that was listed; another member may lie there now.
        OSError: it is gone, or cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
        now = stamp_of(os.fstat(file.fileno()))  # last, as it may be written while it is read
    if now != stamp:
        raise OutOfReach(f"{path} was changed since it was listed; start again.")
    if len(content) < size:
        raise OSError("its shard is cut off")
    return content


def members(path: str) -> Iterator[Member]:
    """List a tar file by its headers, and make sure that it is whole.

    Python's own TarFile is not asked: it takes a damaged header for the end, and with negative
    sizes it goes round in circles.

    Raises:
        OutOfReach: the system fails to give it.
        DataError: it is missing, cut off, damaged or compressed.
    """
    try:
        with open(path, "rb") as file:
            yield from _members(file)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise out_of_reach(f"Tar file {path}", error) or DataError(
            f"{path} is no sound, uncompressed tar file ({error}); write or fetch it again."
        ) from None


def _members(file: BinaryIO) -> Iterator[Member]:
    end, offset = file.seek(0, os.SEEK_END), 0
    more: dict[str, str] = {}  # what headers said of the member to come
    while True:
        file.seek(offset)
        block = file.read(_BLOCK)
        if block == bytes(_BLOCK):
            _make_sure_of_end(file, offset, end)
            return
        if len(block) < _BLOCK:
            raise ValueError("it has no end")
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        content = offset + _BLOCK
        size = 0 if header.type in _WITHOUT_CONTENT else int(more.get("size", header.size))
        if not 0 <= size <= end - content:
            raise ValueError("a member reaches beyond its end")
        offset = content - (-size // _BLOCK) * _BLOCK
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if size > _LONGEST:
                raise ValueError("a header is too long")
            text = file.read(size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                more["path"] = text.split(b"\0")[0].decode("utf-8", "surrogateescape")
            else:
                more |= _said(text)
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            yield Member(
                name=(more.get("path") or header.name).removeprefix("./"),
                regular=header.type in _REGULAR and "sparse" not in more,
                folder=header.type == tarfile.DIRTYPE,
                offset=content,
                size=size,
            )
            more = {}


def _make_sure_of_end(file: BinaryIO, offset: int, end: int) -> None:
    """Refuse zeros that are no end, but what is left where something was lost.

    A tar file ends with two blocks of zeros, and more of them up to a multiple of a record. More
    than that, or something behind it, is taken for members that are gone, never for an end.
    """
    n_zeros = end - offset
    file.seek(offset)
    rest = file.read(_MOST_PADDED + 2 * _BLOCK)
    if rest.strip(b"\0"):
        raise ValueError(f"content follows the zeros at byte {offset}, which should be its end")
    if n_zeros < 2 * _BLOCK:
        raise ValueError("it has no end")
    largest = min(end & -end, _MOST_PADDED)  # power of two that divides its length
    if n_zeros >= max(largest, _PADDED) + 2 * _BLOCK:
        raise ValueError(f"its last {n_zeros} bytes are zeros, where members may have been")


def _said(text: bytes) -> dict[str, str]:
    """Read what a pax header says of path, size and holes.

    It is of records `LENGTH KEY=VALUE` and a line's end, LENGTH that of the whole record.
    """
    said: dict[str, str] = {}
    at, stop = 0, len(text.rstrip(b"\0"))
    while at < stop:  # by place: to cut off what was read would copy the rest for every record
        length, space, _ = text[at : at + _LENGTH].partition(b" ")
        begin, end = at + len(length) + 1, at + int(length)
        if not (space and begin < end <= len(text) and text[end - 1 : end] == b"\n"):
            raise ValueError("a header is damaged")
        key, _, value = text[begin : end - 1].partition(b"=")
        if key.startswith(_SPARSE):
            said["sparse"] = ""
        elif key in (b"path", b"size"):
            said[key.decode()] = value.decode("utf-8", "surrogateescape")
        at = end
    return said
