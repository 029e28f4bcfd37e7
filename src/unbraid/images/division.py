"""Training and validation images of a source that is not divided: by a stable hash of their ids."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from unbraid.base.errors import DataError
from unbraid.base.tables import count, one_line
from unbraid.images.identity import N_HASHES, hash_of
from unbraid.images.listing import Files, Listing, Reader, shown_in
from unbraid.images.mapped import Chosen, Texts, as_array
from unbraid.images.tar import Members

T = TypeVar("T")

TRAIN, VAL = "train", "val"
ONE_IN = 5  # images is for validation
# Files and folders that are parts of a data set by their names, such as val2017 and test-000.tar.
_IS_PART = re.compile(r"(train|training|val|valid|validation|dev|test|testing)([-_. ]?\d.*)?")


@dataclass(frozen=True)
class Divided:
    """Reads some images of a source by index."""

    read: Reader
    indices: list[int]

    def __call__(self, index: int) -> Any:
        """Read one image."""
        return self.read(self.indices[index])


def undivided(where: str) -> tuple[str, str] | None:
    """Part SOURCE/train and SOURCE/val, which are not there, into a source and a part.

    Raises:
        DataError: the source has other parts, so what is missing should be there too.
    """
    source, _, part = where.rpartition("/")
    if part not in (TRAIN, VAL) or not source:
        return None
    path = source.removeprefix("hf:")
    if os.path.lexists(f"{path}/{part}"):
        return None
    if os.path.isdir(path):
        named = sorted(p.name for p in shown_in(Path(path)) if _IS_PART.fullmatch(p.stem.lower()))
        if named:
            raise DataError(
                f"{source} holds {one_line(named[0])} but no {part}; add that, or name a folder to "
                "be divided into train and val, such as one of its own."
            )
        return source, part
    return (source, part) if os.path.isfile(path) or path.lower().endswith(".tar") else None


def divide(whole: Listing, part: str) -> Listing:
    """Take the training or validation images of a source; DataError if one would have none.

    Of a mapped list nothing is copied but its images' numbers; what it gives can be written, and
    not be read from.
    """
    # As listed with or without classes, so that the same images are for validation.
    class_of = as_array(whole.class_of) if whole.root is None else _folders(whole.ids)
    held_out = for_validation(whole.groups or whole.ids, class_of)
    n_val = int(held_out.sum())
    if n_val == 0:
        raise DataError(
            f"No image of {whole.source} can be kept for validation: a class needs two images, and "
            "images of one group, such as views of one thing, count as one; add images."
        )
    own = (held_out == (part == VAL)).nonzero()[0]
    ids = _take(whole.ids, own)
    read: Reader
    if isinstance(whole.read, Files):
        read = replace(whole.read, paths=_take(whole.read.paths, own), sizes=None)
    elif isinstance(whole.read, Members):
        places = array("q", as_array(whole.read.places).reshape(-1, 3)[own].tobytes())
        read = Members(whole.read.shards, whole.read.stamps, ids, places)
    else:
        read = Divided(whole.read, own.tolist())
    return replace(
        whole,
        ids=ids,
        read=read,
        class_of=_take(whole.class_of, own),
        groups=whole.groups and _take(whole.groups, own),
        sizes=whole.sizes and _take(whole.sizes, own),
        divided=(
            f"{whole.source} has no train and val, so {n_val:,} of its "
            f"{count(len(held_out), 'image')} are for validation: about a fifth of each class, by "
            f"a hash of their {'groups' if whole.groups else 'ids'}."
        ),
        seen=whole.known.seen,
    )


class _Some(Sequence[T]):
    """Some entries of a long sequence, read as they are asked for."""

    def __init__(self, whole: Sequence[T], rows: NDArray[np.int64]) -> None:
        self.whole, self.rows = whole, rows

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Read one entry, or several in a row at once."""
        if not isinstance(index, slice):
            return self.whole[int(self.rows[index])]
        rows = self.rows[index]
        if not len(rows):
            return []
        first = int(rows[0])
        read = self.whole[first : int(rows[-1]) + 1]
        return [read[k] for k in (rows - first).tolist()]


def _take(entries: Sequence[T], rows: NDArray[np.int64]) -> Sequence[T]:
    """Take some entries of a list, or, without reading them, of a mapped one."""
    return (
        [entries[k] for k in rows.tolist()] if isinstance(entries, list) else _Some(entries, rows)
    )


def _folders(ids: Sequence[str]) -> NDArray[np.int64]:
    """Number the folders that ids begin with, (N,), in the order of their names."""
    known: dict[str, int] = {}
    folders = (one.partition("/")[0] if "/" in one else "" for one in ids)
    numbers = (known.setdefault(folder, len(known)) for folder in folders)
    own = np.fromiter(numbers, np.int64, len(ids))
    order = np.argsort([*map(known.__getitem__, sorted(known))])
    return order[own]


def _hashed(names: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hash of each name, and which name each image has, (N,)."""
    if isinstance(names, Chosen):
        table: Sequence[str] = Texts(names.mapped, f"{names.name}_name")
        number_of = as_array(names.numbers)
    elif isinstance(names, Texts):  # ids, of which none is twice
        table, number_of = names, np.arange(len(names))
    else:
        known: dict[str, int] = {}
        numbers = (known.setdefault(name, len(known)) for name in names)
        number_of = np.fromiter(numbers, np.int64, len(names))
        table = list(known)
    return np.fromiter(map(hash_of, table), np.uint64, len(table)), number_of


def for_validation(names: Sequence[str], class_of: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say which images (N,) are for validation: those whose name has a hash in the lowest fifth.

    Names are ids, or groups, whose images stay together. A class of two names or more gets one of
    each kind: the lowest hash is for validation, the highest for training. One alone is for
    training.
    """
    hashes, name_of = _hashed(names)
    held_out = hashes < N_HASHES // ONE_IN
    order = np.lexsort((hashes[name_of], class_of))  # class by class, lowest hash first
    ends = np.flatnonzero(np.diff(class_of[order])) + 1
    ordered = np.split(name_of[order], ends)  # which may name one of several images again
    for own in ordered:
        if own[0] != own[-1] and not held_out[own].any():
            held_out[own[0]] = True
    # Last, as no class may be without training images, also where a group is of several classes.
    for own in ordered:
        if held_out[own].all():
            held_out[own[-1]] = False
    return held_out[name_of]
