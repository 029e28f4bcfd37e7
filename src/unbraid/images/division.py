"""Training and validation images of a source that is not divided: by a stable hash of their ids."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from unbraid.base.errors import DataError
from unbraid.base.tables import count, one_line
from unbraid.images.identity import N_HASHES, hash_of
from unbraid.images.listing import Files, Listing, Reader, shown_in

TRAIN, VAL = "train", "val"
ONE_IN = 5  # images is for validation
# Files and folders that are parts of a data set by their names, such as val2017 and test-000.tar.
_IS_PART = re.compile(r"(train|training|val|valid|validation|dev|test|testing)([-_. ]?\d.*)?")


@dataclass(frozen=True)
class Divided:
    """Reads some images of a source by index."""

    read: Reader
    indices: list[int]

    def __call__(self, index: int) -> Image.Image:
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
    """Take the training or validation images of a source; DataError if one would have none."""
    # As listed with or without classes, so that the same images are for validation.
    folders = [one.partition("/")[0] if "/" in one else "" for one in whole.ids]
    classes: Sequence[Any] = whole.class_of if whole.root is None else folders
    held_out = for_validation(whole.groups or whole.ids, classes)
    n_val = sum(held_out)
    if n_val == 0:
        raise DataError(
            f"{whole.source} has no class of two images that are not one group, so there is none "
            "for validation; add some."
        )
    own = [index for index, is_val in enumerate(held_out) if is_val == (part == VAL)]
    read: Reader = Divided(whole.read, own)
    if isinstance(whole.read, Files):
        read = Files([whole.read.paths[index] for index in own])
    return replace(
        whole,
        ids=[whole.ids[index] for index in own],
        read=read,
        class_of=[whole.class_of[index] for index in own],
        groups=whole.groups and [whole.groups[index] for index in own],
        sizes=whole.sizes and [whole.sizes[index] for index in own],
        divided=(
            f"{whole.source} has no train and val, so {n_val:,} of its "
            f"{count(len(held_out), 'image')} are for validation: about a fifth of each class, by "
            f"a hash of their {'groups' if whole.groups else 'ids'}."
        ),
        seen=whole.known.seen,
    )


def for_validation(names: Sequence[str], classes: Sequence[Any]) -> list[bool]:
    """Say which images are for validation: those whose name has a hash in the lowest fifth.

    Names are ids, or groups, whose images stay together. A class of two names or more gets one of
    each kind: the lowest hash is for validation, the highest for training. One alone is for
    training.
    """
    of_class: dict[Any, set[str]] = defaultdict(set)
    for name, own in zip(names, classes, strict=True):
        of_class[own].add(name)
    hashes = {name: hash_of(name) for name in set(names)}
    held_out = {name for name, number in hashes.items() if number < N_HASHES // ONE_IN}
    ordered = [
        sorted(own, key=lambda name: (hashes[name], name)) for _, own in sorted(of_class.items())
    ]
    for first, *others in ordered:
        if others and held_out.isdisjoint([first, *others]):
            held_out.add(first)
    # Last, as no class may be without training images, also where a group is of several classes.
    for own_names in ordered:
        if held_out.issuperset(own_names):
            held_out.remove(own_names[-1])
    return [name in held_out for name in names]
