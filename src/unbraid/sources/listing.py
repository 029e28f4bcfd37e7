"""Images of any source: what it lists, and a data set of it."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from unbraid.causes import is_of_file
from unbraid.data import UNLABELLED
from unbraid.errors import DataError, out_of_reach
from unbraid.folders import NO_LABELS
from unbraid.labels import (
    HIGHEST,
    Outputs,
    Reading,
    read_classes,
    reading_of,
    show_names,
)
from unbraid.spelling import number_in

Transform = Callable[[Image.Image], Any]

_LONGEST = 255  # characters of a class's name, as of a folder's


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

    @property
    def used(self) -> list[str]:
        """The classes that have images."""
        return [self.classes[k] for k in sorted(set(self.class_of)) if k != UNLABELLED]


class ListedImages(Dataset[tuple[Any, int]]):
    """Images of a listing.

    Args:
        listing: of a source.
        transform: from an RGB picture to a tensor; None hands on the picture.
        labels: label of each class, or a reading of them; by default `read_classes` decides. With
            none at all, images count as unlabelled.
        class_names: names by label; by default those of the classes.

    Raises:
        DataError: there is no image, or a class has no label.
    """

    def __init__(
        self,
        listing: Listing,
        transform: Transform | None = None,
        labels: dict[str, int] | Reading | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        """Label the images; none is read yet."""
        if not listing.ids:
            raise DataError(f"{listing.source} holds no image; name a source that does.")
        reading = _read(listing, labels)
        self.labels, self.reading = reading.labels, reading.how
        self.targets = _targets(listing, self.labels)
        self.classes = list(class_names) or show_names(reading, {}, listing.used)
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


def read_listing(listing: Listing, outputs: Outputs) -> Reading:
    """Decide which output each class stands for.

    Raises:
        DataError: names contradict each other or the outputs, or there are too many.
    """
    if not listing.classes:
        return Reading({}, NO_LABELS)
    return read_classes(listing.classes, outputs, listing.source, used=listing.used)


def _read(listing: Listing, labels: dict[str, int] | Reading | None) -> Reading:
    if labels == {} or not listing.classes:
        return Reading({}, NO_LABELS)
    return reading_of(labels, listing.classes, listing.source, used=listing.used)


def _targets(listing: Listing, labels: dict[str, int]) -> list[int]:
    if not labels:
        return [UNLABELLED] * len(listing.ids)
    known = [labels.get(name, UNLABELLED) for name in listing.classes]
    return [known[k] for k in listing.class_of]


def by_class(labels: Sequence[str], source: str) -> tuple[list[str], list[int]]:
    """Sort images into classes by what they are labelled with.

    Numbers are one class however they are written, and so are names in any Unicode form.

    Returns:
        The classes, sorted, numbers as such; and the place among them of each label.

    Raises:
        DataError: a label is empty, very long or a very large number.

    >>> by_class(["10", "9", "10"], "it")
    (['9', '10'], [1, 0, 1])
    >>> by_class(["2.0", "1.0", "2"], "it")
    (['1', '2'], [1, 0, 1])
    """
    distinct = set(labels)
    for label in distinct:
        if not label or len(label) > _LONGEST:
            raise DataError(
                f"{source} has a label of {len(label)} characters; name classes with 1 to "
                f"{_LONGEST}."
            )
    numbers = {label: number_in(label) for label in distinct}
    if None in numbers.values():
        own = {label: unicodedata.normalize("NFC", label) for label in distinct}
        classes = sorted(set(own.values()))
    else:
        highest = max((n for n in numbers.values() if n is not None), default=0)
        if highest >= HIGHEST:
            raise DataError(f"{source} has a class of number {highest}; number classes from 0 on.")
        own = {label: str(n) for label, n in numbers.items()}
        classes = sorted(set(own.values()), key=int)
    place = {name: k for k, name in enumerate(classes)}
    return classes, [place[own[label]] for label in labels]
