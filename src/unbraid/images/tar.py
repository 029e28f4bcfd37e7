"""WebDataset shards: images and labels in tar files, found once by their headers, read in place."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from unbraid.base.errors import DataError, OutOfReach, UsageError, brief, out_of_reach
from unbraid.base.tables import one_line
from unbraid.images.listing import Listing, is_hidden, label_text, look_at, make_listing, shown_in
from unbraid.images.pictures import EXTENSIONS, UNREAD, decode_picture

SHARD = ".tar"
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_BLOCK = tarfile.BLOCKSIZE
_LONGEST = 1 << 17  # bytes of a member's headers
_MOST_PADDED = 1 << 20  # bytes that tar pads a file to a multiple of, at most
_LARGEST = 1 << 30  # bytes of an image
_LARGEST_LABEL = 1 << 20  # bytes of a label or what else is told of an image
_MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")

Stamp = tuple[int, int, int]  # which file it is, its bytes, and when it was last written, in ns


@dataclass(frozen=True)
class Members:
    """Reads images out of tar files by index; opens a file for each, as processes share none."""

    shards: list[str]
    stamps: list[Stamp] = field(default_factory=list)  # of each, by which it is known again
    ids: Sequence[str] = field(default_factory=list)
    # Shard, offset and size of each image.
    places: Sequence[int] = field(default_factory=lambda: array("q"))

    def __call__(self, index: int) -> Image.Image:
        """Read one image."""
        name = one_line(self.ids[index])
        shard, offset, size = self.places[3 * index : 3 * index + 3]
        try:
            content = read_content(self.shards[shard], self.stamps[shard], offset, size)
        except OSError as error:
            raise OutOfReach(
                f"Image {name} cannot be read ({error}); bring its shard back and start again."
            ) from None
        return decode_picture(io.BytesIO(content), name)


def list_shards(where: str) -> Listing:
    """List the images of tar files; members of an image share a name up to its first dot."""
    shards = _shard_files(where)
    names = [Path(shard).name for shard in shards]
    double = next((name for name, n in Counter(names).items() if n > 1), None)
    if double is not None:
        raise DataError(f"{where} has two shards called {double}; give each its own name.")
    stamps: list[Stamp] = []
    ids: list[str] = []
    places = array("q")
    labels: list[str | None] = []
    for k, (shard, name) in enumerate(zip(shards, names, strict=True)):
        found = look_at(shard, f"Shard {shard}")
        if found is None:
            raise DataError(f"There is no shard {shard}; name tar files that are there.")
        stamps.append(stamp_of(found))
        for key, files in _samples(shard).items():
            ids.append(f"{name}/{key}")
            places.extend((k, *files["image"]))
            labels.append(_label(shard, stamps[k], key, files))
    reader = Members(shards, stamps, ids, places)
    return make_listing(where, ids, reader, labels, sizes=list(places[2::3]))


Place = tuple[int, int]  # where a member's content lies, and its size, in bytes


def _samples(shard: str) -> dict[str, dict[str, Place]]:
    """The members of every image of a shard by key, and by what they are: image, cls or json."""
    samples: dict[str, dict[str, Place]] = {}
    for member in members(shard):
        folder, slash, name = member.name.rpartition("/")
        base, _, ending = name.partition(".")
        kind = "image" if f".{ending.lower()}" in EXTENSIONS else ending.lower()
        what = f"{one_line(member.name)} in {shard}"
        if f".{kind}" in UNREAD and base:
            raise DataError(
                f"{what} is a picture of a kind that is not read; convert or remove it."
            )
        hidden = any(is_hidden(part) for part in folder.split("/") if part not in (".", ".."))
        if hidden or not base or kind not in ("image", "cls", "json") or member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise DataError(f"{what} is no regular file; write the shard again.")
        largest = _LARGEST if kind == "image" else _LARGEST_LABEL
        if member.size > largest:
            raise DataError(f"{what} has {member.size} bytes, more than {largest}; remove it.")
        files = samples.setdefault(f"{folder}{slash}{base}", {})
        if kind in files:
            raise DataError(f"{what} is a second {kind!r} of one image; keep one of them.")
        files[kind] = (member.offset_data, member.size)
    for key, files in samples.items():
        if "cls" in files and "image" not in files:
            raise DataError(f"{shard} has a label but no image for {one_line(key)}; mend it.")
    return {key: files for key, files in samples.items() if "image" in files}


def _label(shard: str, stamp: Stamp, key: str, files: dict[str, Place]) -> str | None:
    """What an image is labelled with, None where nothing is said."""
    member, where = files.get("cls") or files.get("json"), f"{one_line(key)} in {shard}"
    if member is None:
        return None
    try:
        label: object = read_content(shard, stamp, *member).decode("utf-8")
        if "cls" not in files:
            told = json.loads(str(label))
            label = told.get("label") if isinstance(told, dict) else None
    except (ValueError, OSError, RecursionError) as error:
        what = f"The label of {where}"
        raise out_of_reach(what, error) or DataError(
            f"{what} cannot be read ({error}); write a class's number."
        ) from None
    return None if label is None else label_text(label, where)


# --- members --------------------------------------------------------------------------------------


class _Headers(io.BufferedReader):
    """A tar file of which only headers are read, and of each member no more than a few bytes."""

    n_left = _LONGEST

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self.n_left:
            raise ValueError("a header is too long")
        self.n_left -= size
        return super().read(size)


def members(path: str) -> Iterator[tarfile.TarInfo]:
    """List a tar file by its headers, and make sure that it is whole; nothing is extracted."""
    try:
        with _Headers(io.FileIO(path)) as file:
            tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
            while (member := tar.next()) is not None:
                if member.size < 0:  # which would lead round in circles
                    raise ValueError("a member's size is negative")
                member.name = member.name.removeprefix("./")
                yield member
                tar.members = []  # type: ignore[attr-defined]  # which would keep all
                file.n_left = _LONGEST
            _refuse_no_end(file, tar.offset)  # as tarfile takes a damaged header for the end
    except (OSError, ValueError, RecursionError, tarfile.TarError) as error:
        raise out_of_reach(f"Tar file {path}", error) or DataError(
            f"{path} is no sound, uncompressed tar file ({error}); write or fetch it again."
        ) from None


def _refuse_no_end(file: _Headers, offset: int) -> None:
    """Refuse what is no end: two blocks of zeros, and more only up to a multiple of a record."""
    end = file.seek(0, os.SEEK_END)
    file.seek(offset)
    rest = io.BufferedReader.read(file, _MOST_PADDED + 2 * _BLOCK)
    if rest.strip(b"\0"):
        raise ValueError(f"there is neither a member nor an end at byte {offset}")
    n_zeros = end - offset
    if n_zeros < 2 * _BLOCK:
        raise ValueError("it has no end")
    record = max(min(end & -end, _MOST_PADDED), tarfile.RECORDSIZE)  # a power of two, or usual
    if n_zeros >= record + 2 * _BLOCK:
        raise ValueError(f"its last {n_zeros} bytes are zeros, where members may have been")


def read_content(path: str, stamp: Stamp, offset: int, size: int) -> bytes:
    """Read what a member holds."""
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
        now = stamp_of(os.fstat(file.fileno()))  # last, as it may be written while it is read
    if now != stamp:
        raise OutOfReach(f"{path} was changed since it was listed; start again.")
    if len(content) < size:
        raise OSError("its shard is cut off")
    return content


def stamp_of(found: os.stat_result) -> Stamp:
    """What changes when a file is written again or another one put in its place."""
    return found.st_ino, found.st_size, found.st_mtime_ns


# --- where shards are -----------------------------------------------------------------------------


def _shard_files(where: str) -> list[str]:
    """Find the tar files that a name, folder, pattern or URL stands for, there or not."""
    if is_url(where):
        return [str(fetch(url)) for url in expand(where)]
    if os.path.isdir(where):
        shown = sorted(shown_in(Path(where)))
        for packed in filter(is_compressed, shown):
            raise DataError(
                f"{packed} is compressed; unpack it to a tar file, or move it elsewhere."
            )
        return [str(path) for path in shown if path.suffix.lower() == SHARD]
    if os.path.exists(where):
        return [where]
    names = [sorted(glob.glob(one)) if glob.has_magic(one) else [one] for one in expand(where)]
    found = [name for some in names for name in some]
    if not found:
        raise DataError(f"There is no shard {where}; name tar files that are there.")
    return found


def is_compressed(path: Path) -> bool:
    """Say whether a name is that of a compressed tar file."""
    return _COMPRESSED.search(path.name) is not None


def expand(pattern: str) -> list[str]:
    """Write out ranges in braces, such as train-{08..10}.tar."""
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


def is_url(where: str) -> bool:
    """Say whether something to open is a URL."""
    if where.startswith("pipe:"):
        raise UsageError("Commands (pipe:) are not run; write what it prints to a tar file.")
    return re.match(r"[a-z][a-z0-9+.-]*://", where) is not None


def fetch(url: str) -> Path:
    """Fetch a file that the library `webdataset` can open to `~/.cache`, unless it is there."""
    try:
        from webdataset import gopen
    except ImportError:
        raise UsageError(
            "Shards behind a URL need the library webdataset; pip install webdataset."
        ) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unbraid/shards"
    path = cache / hashlib.sha256(url.encode()).hexdigest()[:16] / Path(urlsplit(url).path).name
    if os.path.exists(path):  # whatever is wrong with the cache is told below
        return path
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file, gopen(url, "rb") as stream:
            shutil.copyfileobj(stream, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:  # each kind of URL fails in its own way
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DataError(
            f"{url} cannot be fetched ({brief(error)}); fetch it yourself and name the file."
        ) from None
    return path
