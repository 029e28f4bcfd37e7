"""Images of any source: what it lists, and a data set of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from unbraid.causes import is_of_file
from unbraid.data import UNLABELLED
from unbraid.errors import DataError, out_of_reach
from unbraid.folders import label_folders

Transform = Callable[[Image.Image], Any]

_LONGEST = 255  # characters of a class's name, as of a folder's
_HIGHEST = 1_000_000  # of a class's number; names are kept for all below


@dataclass(frozen=True)
class Listing:
    """What a source holds, before it is known which output each class stands for. N images."""

    source: str  # for messages
    ids: list[str]  # (N,), what names each image for good
    read: Callable[[int], Image.Image]  # by place; goes to worker processes
    classes: list[str]  # names, in their order; none without labels
    class_of: list[int]  # (N,), place among the classes, UNLABELLED without labels
    groups: list[str] | None = None  # (N,), which images belong together
    sizes: list[int] | None = None  # (N,), bytes


class ListedImages(Dataset[tuple[Any, int]]):
    """Images of a listing.

    Args:
        listing: of a source.
        transform: from an RGB picture to a tensor; None hands on the picture.
        labels: label of each class; by default its own number where all classes are numbers, else
            its place. With none at all, images count as unlabelled.
        class_names: names by label; by default those of the classes.

    Raises:
        DataError: there is no image, or a class has no label.
    """

    def __init__(
        self,
        listing: Listing,
        transform: Transform | None = None,
        labels: dict[str, int] | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        """Label the images; none is read yet."""
        if not listing.ids:
            raise DataError(f"{listing.source} holds no image; name a source that does.")
        self.labels = _own_labels(listing.classes) if labels is None else labels
        self.targets = _targets(listing, self.labels)
        self.classes = list(class_names) or names_by_label(self.labels)
        self.ids, self.sizes, self.groups = listing.ids, listing.sizes, listing.groups
        self.transform = transform
        self._read = listing.read

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Read one image."""
        picture = self.picture(index)
        return (picture if self.transform is None else self.transform(picture)), self.targets[index]

    def picture(self, index: int) -> Image.Image:
        """Read one image as an RGB picture, before the transform."""
        return self._read(index)


def look_at(file: str, what: str) -> os.stat_result | None:
    """Look for a file that something names; None where there is none, or no regular one.

    Raises:
        OutOfReach: the system fails to say; the message calls the file `what`.
    """
    try:
        found = os.stat(file)
    except (OSError, ValueError) as error:  # the latter for what can be no file's name
        away = None if is_of_file(error) else out_of_reach(what, error)
        if away is not None:
            raise away from None
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _own_labels(classes: Sequence[str]) -> dict[str, int]:
    if all(name.isdecimal() for name in classes):
        return {name: int(name) for name in classes}
    return {name: label for label, name in enumerate(classes)}


def _targets(listing: Listing, labels: dict[str, int]) -> list[int]:
    if not labels or not listing.classes:
        return [UNLABELLED] * len(listing.ids)
    known = [labels.get(name, UNLABELLED) for name in listing.classes]
    targets = [known[k] for k in listing.class_of]
    if UNLABELLED in targets:
        name = listing.classes[listing.class_of[targets.index(UNLABELLED)]]
        raise DataError(
            f"{listing.source} has a class {name!r} that the training images have not; remove it, "
            "or add the class there."
        )
    return targets


def names_by_label(labels: dict[str, int]) -> list[str]:
    """List names of classes by label, empty where a label is that of no class.

    >>> names_by_label({"dog": 2, "cat": 0})
    ['cat', '', 'dog']
    """
    names = [""] * (max(labels.values(), default=-1) + 1)
    for name, label in labels.items():
        names[label] = name
    return names


def by_class(labels: Sequence[str], source: str) -> tuple[list[str], list[int]]:
    """Sort images into classes by what they are labelled with.

    Returns:
        The classes, sorted, numbers as such; and the place among them of each label.

    Raises:
        DataError: a label is empty, very long or a very large number.

    >>> by_class(["10", "9", "10"], "it")
    (['9', '10'], [1, 0, 1])
    """
    distinct = set(labels)
    for label in distinct:
        if not label or len(label) > _LONGEST:
            raise DataError(
                f"{source} has a label of {len(label)} characters; name classes with 1 to "
                f"{_LONGEST}."
            )
    numbered = all(label.isdecimal() for label in distinct)
    if numbered and max(map(int, distinct), default=0) >= _HIGHEST:
        raise DataError(
            f"{source} has a class of number {max(map(int, distinct))}; number classes from 0 on."
        )
    classes = sorted(distinct, key=lambda label: (int(label), label) if numbered else (0, label))
    place = {label: k for k, label in enumerate(classes)}
    return classes, [place[label] for label in labels]


def label_classes(
    listing: Listing, outputs: Sequence[str], n_outputs: int
) -> tuple[dict[str, int], bool]:
    """Decide which output of a network each class stands for, by the rules of class folders.

    Args:
        listing: of images with labels.
        outputs: names of the network's outputs, empty where unknown.
        n_outputs: how many outputs there are.

    Returns:
        The output of each class, and whether it had to be guessed.

    Raises:
        DataError: a class's number is none of an output, or `label_folders` finds no answer.
    """
    if all(name.isdecimal() for name in listing.classes):
        highest = max(map(int, listing.classes), default=0)
        if highest >= n_outputs:
            raise DataError(
                f"{listing.source} has a class of number {highest}, but the network's outputs go "
                f"from 0 to {n_outputs - 1}; number classes as outputs."
            )
    return label_folders(listing.classes, outputs, n_outputs)
