"""Keeping a list of images in a file: one process writes it, and all map it into memory."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from unbraid.base.errors import DataError
from unbraid.base.files import remove_leftovers, write_through
from unbraid.base.team import is_first, join_team
from unbraid.images.division import TRAIN, VAL, divide
from unbraid.images.listing import Files, Listing, files_at, look_at, seen_from, walk_folder
from unbraid.images.mapped import (
    BLOCK,
    CHECKSUMS,
    HEAD,
    KINDS,
    Chosen,
    Mapped,
    Numbers,
    Texts,
    head_of,
    open_mapped,
)
from unbraid.images.tar import Members

LISTED = "images.safetensors"  # the file's name in a scan's folder
LISTED_PARTS = {TRAIN: "images-train.safetensors", VAL: "images-val.safetensors"}  # in a run's


class Part(NamedTuple):
    """Some images of a source, in order."""

    ids: Sequence[str]
    class_of: Sequence[int]  # -1 without labels
    sizes: Sequence[int]  # bytes, -1 for a file that is gone


def keep(files: Sequence[Path], write: Callable[[], None]) -> list[Listing]:
    """Let the first of all processes write lists, into one folder, and map them in all."""

    def prepare() -> str:
        remove_leftovers(files[0].parent)
        write()
        return json.dumps([Mapped(file).identity for file in files])

    open_mapped.cache_clear()  # the same list may lie in another file now
    told = json.loads(join_team().lead(prepare))
    return [read_list(open_mapped(*own)) for own in zip(files, told, strict=True)]


@contextmanager
def tentative(folder: Path, *names: str) -> Iterator[list[Path]]:
    """Give the files for lists; take these back if the work ends before a scan begins there.

    However it ends, by an error, ctrl-C or a kill (the next start then does it), lists that were
    there before, such as that of a finished scan, are put back, and folders made for new ones are
    removed. No files where the folder cannot be written, as a finished scan's need not be.
    """
    files = [folder / name for name in names]
    if folder.exists() and not os.access(folder, os.W_OK):
        yield []
        return
    if not is_first():
        yield files
        return
    for file in files:
        _put_back_after_a_kill(file)
    missing = [file for file in files if not file.exists()]
    missing += [one for one in (folder, *folder.parents) if not one.exists()]
    before = _manifests(folder)
    try:
        for file in files:
            _hold(file)
        yield files
    except BaseException:
        if _manifests(folder) == before:
            with suppress(OSError):
                _take_back(files, missing)
        raise
    finally:
        for file in files:
            with suppress(OSError):  # there is none
                _held(file).unlink()


def _manifests(folder: Path) -> dict[Path, int]:
    """When the scans in a folder were begun."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("**/manifest.json")}


def _held(file: Path) -> Path:
    """The name of a list that is being replaced."""
    return file.with_name(f"{file.name}.before")


def _hold(file: Path) -> None:
    """Give a list, if there is one, another name, so that it outlives being replaced."""
    if not file.is_file():
        return
    try:
        os.link(file, _held(file))
    except OSError:  # a file system without hard links
        with file.open("rb") as content:
            write_through(_held(file), partial(shutil.copyfileobj, content))


def _put_back_after_a_kill(file: Path) -> None:
    """Put back what a killed process held, unless it had begun its scan."""
    held = _held(file)
    with suppress(OSError):  # there is none
        replaced = held.stat().st_ctime_ns  # when it lost its other name, at the latest
        if all(begun < replaced for begun in _manifests(file.parent).values()):
            held.replace(file)
        held.unlink()  # also where both are names of one file, which stay


def _take_back(files: Sequence[Path], missing: Sequence[Path]) -> None:
    """Put the lists of before back, and remove lists and folders that were missing before."""
    for file in files:
        if _held(file).exists():
            _held(file).replace(file)
        elif file in missing:
            file.unlink(missing_ok=True)
    for folder in missing:
        if folder not in files:
            folder.rmdir()


# --- writing --------------------------------------------------------------------------------------


def write_folder(file: Path, root: Path, with_classes: bool) -> None:
    """List a folder into a file, class by class, so that no more is in memory than one's paths."""
    classes, found = walk_folder(root, with_classes)

    def parts() -> Iterator[Part]:
        for number, paths in found:
            looks = [look_at(path, f"Image {path}") for path in paths]
            sizes = [-1 if look is None else look.st_size for look in looks]
            yield Part([seen_from(str(root), p) for p in paths], [number] * len(paths), sizes)

    write_list(file, {"source": str(root), "root": str(root)}, classes, parts(), {}, {})


def write_parts_of_folder(files: Mapping[str, Path], root: Path, with_classes: bool) -> None:
    """List a folder once, and write those of its images that are of each part to a file.

    Memory holds some 70 bytes of each image, such as its class and hash, beside one class's paths.
    """
    whole = next(iter(files.values())).with_name(f"{LISTED}.whole")
    try:
        write_folder(whole, root, with_classes)
        listing = read_list(Mapped(whole))
        for part, file in files.items():
            write_listing(file, divide(listing, part))
    finally:
        whole.unlink(missing_ok=True)


def write_listing(file: Path, listing: Listing) -> None:
    """Write the images of a table or of tar files, or a part of any list, to a file."""
    texts: dict[str, Sequence[str]] = {}
    numbers: dict[str, Sequence[int]] = {}
    if isinstance(listing.read, Members):
        texts["shard"] = listing.read.shards
        numbers["stamp"] = [number for stamp in listing.read.stamps for number in stamp]
        numbers["place"] = listing.read.places
    elif isinstance(listing.read, Files) and listing.root is None:
        texts["path"] = listing.read.paths
    if listing.groups is not None:
        known: dict[str, int] = {}
        numbers["group"] = [known.setdefault(group, len(known)) for group in listing.groups]
        texts["group_name"] = list(known)
    n = len(listing.ids)
    sizes = [-1] * n if listing.sizes is None else listing.sizes
    parts = (
        Part(listing.ids[k : k + BLOCK], listing.class_of[k : k + BLOCK], sizes[k : k + BLOCK])
        for k in range(0, n, BLOCK)
    )
    about: dict[str, Any] = {"source": listing.source, "root": listing.root}
    if listing.divided:
        about |= {"divided": listing.divided, "seen": list(listing.seen)}
    write_list(file, about, listing.classes, parts, texts, numbers)


def write_list(
    file: Path,
    about: dict[str, Any],
    classes: Sequence[str],
    parts: Iterable[Part],
    texts: dict[str, Sequence[str]],
    numbers: dict[str, Sequence[int]],
) -> None:
    """Write a list, whole or not at all, without holding its ids in memory.

    Args:
        file: to write or replace.
        about: `source`, for messages, and `root`, the folder that ids are paths below, or None;
            of a part of a source `divided` and `seen` of its `Listing`.
        classes: their names, in order.
        parts: the images.
        texts: other columns of texts by name, such as tar files' names.
        numbers: other columns of whole numbers by name.
    """

    def fill(opened: BinaryIO) -> None:
        out = _Columns(opened)
        lengths, sizes, class_of = array("i"), array("q"), array("i")
        first = np.full(len(classes) + 1, -1, np.int64)  # the last is of UNLABELLED, -1

        def ids() -> Iterator[bytes]:
            for part in parts:
                for number in set(part.class_of):
                    if first[number] < 0:
                        first[number] = len(class_of) + part.class_of.index(number)
                encoded = [_encode(one) for one in part.ids]
                lengths.extend(map(len, encoded))
                sizes.extend(part.sizes)
                class_of.extend(part.class_of)
                yield b"".join(encoded)

        out.put("id_bytes", "U8", ids())
        if not len(sizes):
            raise DataError(f"{about['source']} holds no image; name a source that does.")
        out.put("id_start", "I64", _starts(lengths))
        out.put("size", "I64", [sizes])
        for name, own in numbers.items():
            out.put(name, "I64", [np.asarray(own, np.int64)])
        out.put("first", "I64", [first])
        out.put("class", "I32", [class_of])
        for name, column in {"class_name": classes, "about": [json.dumps(about)], **texts}.items():
            encoded = [_encode(one) for one in column]
            out.put(f"{name}_start", "I64", _starts(array("i", map(len, encoded))))
            out.put(f"{name}_bytes", "U8", [b"".join(encoded)])
        out.finish(len(sizes))

    write_through(file, fill)


def _starts(lengths: array[int]) -> Iterator[np.ndarray[Any, Any]]:
    """Where each text begins and the last one ends, some at a time."""
    yield np.zeros(1, np.int64)
    end = 0
    for k in range(0, len(lengths), BLOCK):
        ends = np.array(lengths[k : k + BLOCK], np.int64).cumsum() + end
        end = int(ends[-1])
        yield ends


def _encode(one: str) -> bytes:
    return one.encode("utf-8", "surrogateescape")


class _Columns:
    """Writes columns one behind the other, with their checksums, and the header at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.columns: dict[str, tuple[str, int]] = {}
        self.crc32: dict[str, int] = {}
        self._blocks = array("q")
        self._block, self._filled = 0, 0  # checksum so far of the block at hand, and its bytes
        file.write(bytes(HEAD))

    def put(self, name: str, kind: str, chunks: Iterable[Any]) -> None:
        n = crc = 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B") if len(chunk) else memoryview(b"")
            self.file.write(view)
            n, crc = n + len(view), zlib.crc32(view, crc)
            self._count(view)
        self.columns[name], self.crc32[name] = (kind, n // KINDS[kind].itemsize), crc

    def _count(self, view: memoryview) -> None:
        while len(view):
            now, view = view[: BLOCK - self._filled], view[BLOCK - self._filled :]
            self._block = zlib.crc32(now, self._block)
            self._filled += len(now)
            if self._filled == BLOCK:
                self._close()

    def _close(self) -> None:
        self._blocks.append(self._block)
        self._block = self._filled = 0

    def finish(self, n_images: int) -> None:
        if self._filled:
            self._close()
        self.put(CHECKSUMS, "I64", [array("q", self._blocks)])
        self.file.seek(0)
        self.file.write(head_of(self.columns, self.crc32, n_images))


# --- reading --------------------------------------------------------------------------------------


def read_list(mapped: Mapped) -> Listing:
    """List the images of a file, without reading more than names of classes."""
    about = json.loads(Texts(mapped, "about")[0])
    root, ids, sizes = about["root"], Texts(mapped, "id"), Numbers(mapped, "size")
    read: Files | Members
    if "place" in mapped.columns:
        stamp = list(Numbers(mapped, "stamp"))
        stamps = [(stamp[k], stamp[k + 1], stamp[k + 2]) for k in range(0, len(stamp), 3)]
        read = Members(mapped.texts("shard"), stamps, ids, Numbers(mapped, "place"))
    elif "path_start" in mapped.columns:
        read = files_at(Texts(mapped, "path"), sizes)
    else:
        read = files_at(Texts(mapped, "id", os.path.join(root, "")), sizes)
    return Listing(
        source=about["source"],
        ids=ids,
        read=read,
        classes=mapped.texts("class_name"),
        class_of=Numbers(mapped, "class"),
        groups=Chosen(mapped, "group") if "group" in mapped.columns else None,
        sizes=sizes,
        root=root,
        divided=about.get("divided", ""),
        seen=about.get("seen", ()),
    )
