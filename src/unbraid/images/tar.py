"""WebDataset shards: images and labels in tar files, found once by their headers, read in place."""

from __future__ import annotations

import glob
import io
import json
import math
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from unbraid.base.errors import DataError, OutOfReach, UsageError, out_of_reach
from unbraid.base.tables import one_line
from unbraid.images.dataset import UNLABELLED
from unbraid.images.folders import is_hidden, shown_in
from unbraid.images.listing import Listing, by_class, fetch, is_url, look_at
from unbraid.images.pictures import EXTENSIONS, UNREAD, decode_picture
from unbraid.networks.class_names import number_in, output_number

# Members of tar files, found by their headers; nothing is ever extracted.


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


# WebDataset shards: images and labels in tar files, found once by their headers, read in place.


SHARD = ".tar"
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_LARGEST = 1 << 30  # bytes of an image
_LARGEST_LABEL = 1 << 20  # bytes of a label or what else is told of an image
_MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")


@dataclass(frozen=True)
class Members:
    """Reads images out of tar files by place.

    A file is opened for each image, which costs microseconds, so that worker processes share no
    handle, and thousands of shards are no thousands of handles.
    """

    shards: list[str]
    stamps: list[Stamp]  # of each shard, by which it is known again
    ids: list[str] = field(default_factory=list)
    shard: array[int] = field(default_factory=lambda: array("q"))
    offset: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))

    def __call__(self, index: int) -> Image.Image:
        """Read one image."""
        name, k = one_line(self.ids[index]), self.shard[index]
        try:
            content = read_content(
                self.shards[k], self.stamps[k], self.offset[index], self.size[index]
            )
        except OSError as error:
            raise OutOfReach(
                f"Image {name} cannot be read ({error}); bring its shard back and start again."
            ) from None
        return decode_picture(io.BytesIO(content), name)


def list_shards(where: str) -> Listing:
    """List the images of tar files, in the convention of WebDataset.

    The members of an image share a name up to its first dot, the key; it has one image, and its
    label as a number in `.cls`, or as "label" in `.json`, or none. Its id is SHARD.tar/KEY.

    Args:
        where: a tar file, a folder of such, a pattern with `*` or with a range such as
            `{000..012}`, or a URL.

    Raises:
        OutOfReach: the system fails to give a shard, or one is changed meanwhile.
        DataError: there are no shards, one is damaged, or an image has two files or no label.
        UsageError: it is a URL, and webdataset is not installed.
    """
    shards = shard_files(where)
    names = [Path(shard).name for shard in shards]
    double = [name for name, n in Counter(names).items() if n > 1]
    if double:
        raise DataError(f"{where} has two shards called {double[0]}; give each its own name.")
    reader = Members(shards, [_stamp(shard) for shard in shards])
    labels: list[str | None] = []
    for k, (shard, name) in enumerate(zip(shards, names, strict=True)):
        for key, files in _samples(shard).items():
            image = files["image"]
            reader.ids.append(f"{name}/{key}")
            reader.shard.append(k)
            reader.offset.append(image.offset)
            reader.size.append(image.size)
            labels.append(_label(shard, reader.stamps[k], key, files))
    classes, class_of = _classes(labels, reader.ids, where)
    return Listing(where, reader.ids, reader, classes, class_of, sizes=list(reader.size))


def shard_files(where: str) -> list[str]:
    """Find the tar files that a name, folder, pattern or URL stands for, there or not.

    Raises:
        DataError: there are none, or a folder has compressed ones.
    """
    if is_url(where):
        return [str(fetch(url)) for url in expand(where)]
    if os.path.isdir(where):
        found = _shards_in(Path(where))
    elif os.path.exists(where):
        found = [where]
    else:
        found = [
            path
            for one in expand(where)
            for path in (sorted(glob.glob(one)) if glob.has_magic(one) else [one])
        ]
    if not found:
        raise DataError(f"There is no shard {where}; name tar files that are there.")
    return found


def _stamp(shard: str) -> Stamp:
    found = look_at(shard, f"Shard {shard}")
    if found is None:
        raise DataError(f"There is no shard {shard}; name tar files that are there.")
    return stamp_of(found)


def is_compressed(path: Path) -> bool:
    """Say whether a name is that of a compressed tar file."""
    return _COMPRESSED.search(path.name) is not None


def _shards_in(folder: Path) -> list[str]:
    shown = sorted(shown_in(folder, "tar files"))
    packed = next(filter(is_compressed, shown), None)
    if packed is not None:
        raise DataError(f"{packed} is compressed; unpack it to a tar file, or move it elsewhere.")
    return [str(path) for path in shown if path.suffix.lower() == SHARD]


def expand(pattern: str) -> list[str]:
    """Write out ranges in braces.

    Raises:
        UsageError: they stand for too many names.

    >>> expand("train-{08..10}.tar")
    ['train-08.tar', 'train-09.tar', 'train-10.tar']
    """
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    lengths = [max(0, int(last) - int(first) + 1) for first, last in _RANGE.findall(pattern)]
    if math.prod(lengths) > _MOST_SHARDS:
        raise UsageError(f"{pattern} stands for more than {_MOST_SHARDS} shards; name fewer.")
    first, last = found.groups()
    before, behind = pattern[: found.start()], expand(pattern[found.end() :])
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [f"{before}{number}{rest}" for number in numbers for rest in behind]


def _samples(shard: str) -> dict[str, dict[str, Member]]:
    """The members of every image of a shard by key, and by what they are: image, cls or json."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members(shard):
        folder, slash, name = member.name.rpartition("/")
        base, dot, ending = name.partition(".")
        ending = ending.lower()
        kind = "image" if f".{ending}" in EXTENSIONS else ending
        if f".{ending}" in UNREAD and base:
            raise DataError(
                f"{one_line(member.name)} in {shard} is a picture of a kind that is not read; "
                "convert or remove it."
            )
        if any(is_hidden(part) for part in folder.split("/") if part not in (".", "..")):
            continue
        if not base or not dot or kind not in ("image", "cls", "json") or member.folder:
            continue
        key = f"{folder}{slash}{base}"
        _refuse_odd(shard, member, _LARGEST if kind == "image" else _LARGEST_LABEL)
        if samples.setdefault(key, {}).setdefault(kind, member) is not member:
            raise DataError(
                f"{shard} has two files {kind!r} for {one_line(key)}; keep one of them."
            )
    lonely = [key for key, files in samples.items() if "cls" in files and "image" not in files]
    if lonely:
        raise DataError(
            f"{shard} has a label but no image for {one_line(lonely[0])} "
            f"({', '.join(EXTENSIONS)}); mend it."
        )
    return {key: files for key, files in samples.items() if "image" in files}


def _refuse_odd(shard: str, member: Member, largest: int) -> None:
    if not member.regular:
        raise DataError(
            f"{one_line(member.name)} in {shard} is no regular file; write the shard anew."
        )
    if member.size > largest:
        raise DataError(
            f"{one_line(member.name)} in {shard} has {member.size} bytes, more than {largest}; "
            "remove it."
        )


def _label(shard: str, stamp: Stamp, key: str, files: dict[str, Member]) -> str | None:
    """What an image is labelled with, None where nothing is said."""
    member = files.get("cls") or files.get("json")
    if member is None:
        return None
    try:
        content = read_content(shard, stamp, member.offset, member.size)
        text = content.decode("utf-8").strip()
        if "cls" in files:
            return str(_number(text))
        told = json.loads(text)
        label = told.get("label") if isinstance(told, dict) else None
        return label if isinstance(label, str) or label is None else str(_number(label))
    except (ValueError, OSError, RecursionError) as error:
        what = f"The label of {one_line(key)} in {shard}"
        raise out_of_reach(what, error) or DataError(
            f"{what} cannot be read ({error}); write a class's number."
        ) from None


def _number(label: object) -> int:
    if isinstance(label, str) and label.isdecimal():
        number = number_in(label)
    else:
        number = output_number(label)
    if number is not None:
        return number
    raise ValueError(f"it is {str(label)[:40]!r}")


def _classes(labels: list[str | None], ids: list[str], where: str) -> tuple[list[str], list[int]]:
    given = [label for label in labels if label is not None]
    if not given:
        return [], [UNLABELLED] * len(labels)
    if len(given) < len(labels):
        raise DataError(
            f"{one_line(ids[labels.index(None)])} has no label, but others have; label all images "
            "or none."
        )
    return by_class(given, where)
