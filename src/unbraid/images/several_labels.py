"""Images of several labels each: as a data set with one label for an image, which scans take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from unbraid.base.errors import DataError, UsageError
from unbraid.base.tables import one_line
from unbraid.images.dataset import groups_of, inner_of, is_known, size_of
from unbraid.images.identity import ids_of
from unbraid.images.listing import ListedImages
from unbraid.images.which import Around, own, step_into, which_image


class OnePerLabel(Around):
    """A data set with an item for each label of each image; those of an image are one group."""

    def __init__(self, dataset: Dataset[Any], several: Sequence[Sequence[int]]) -> None:
        """Wrap a data set of (image, labels); `several` holds the numbers of each image's."""
        self.dataset = dataset
        self.places = [k for k, labels in enumerate(several) for _ in labels]
        self.targets = [label for labels in several for label in labels]
        groups, ids = groups_of(dataset), ids_of(dataset)
        self.groups = [k if groups is None else groups[k] for k in self.places]
        self.ids = None
        if ids is not None:
            pairs = zip(self.places, self.targets, strict=True)
            self.ids = [f"{ids[k]} as {label}" for k, label in pairs]

    def __len__(self) -> int:
        """Number of labels of all images."""
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return an image and one of its labels."""
        return self.dataset[self.places[index]][0], self.targets[index]

    def source(self, index: int) -> int:
        """Return the index in `dataset` of an item's image."""
        return self.places[index]


def one_per_label(dataset: Dataset[Any]) -> OnePerLabel:
    """Make a data set for `unbraid.scan` of one whose images have several labels each.

    An image counts once for each of its labels, in as many classes and concepts; an image without a
    label is left out. Its items are one group, so none is judged by another. All later steps take
    the same data set.

    Args:
        dataset: map-style, of (image, labels), or with a list of these in `targets`: a tensor (T,)
            of zeros and ones, or a list of numbers of classes.

    Returns:
        A data set of (image, label), longer than the given one where images have several labels.

    Raises:
        DataError: labels are of another kind, or no image has one.
    """
    listed = own(dataset, "targets")[1]
    if listed is not None and len(listed) != size_of(dataset):
        raise DataError(
            f"The data set's targets are {len(listed)} for {size_of(dataset)} images; give labels "
            "for each image."
        )
    told = listed if listed is not None else (dataset[k][1] for k in range(size_of(dataset)))
    several = [_numbers(labels, dataset, k) for k, labels in enumerate(told)]
    if not any(several):
        raise DataError("No image of the data set has a label; give some.")
    return OnePerLabel(dataset, several)


def repeats(dataset: Dataset[Any], indices: Iterable[int]) -> frozenset[int]:
    """Which of some items, by index, show an image that one before them shows with another label.

    Those of `one_per_label` and of lists, in parts or joined; other data sets are taken to hold
    each image once.
    """
    if not _holds_several(dataset):
        return frozenset()
    seen: set[tuple[int, int | str]] = set()
    again = []
    for index in indices:
        image = _image_of(dataset, index)
        if image in seen:
            again.append(index)
        elif image is not None:
            seen.add(image)
    return frozenset(again)


def refuse_several(dataset: Dataset[Any], given: bool, of_label: bool) -> None:
    """Refuse a list whose images have several labels where an item is no label of its own.

    Args:
        dataset: of a list, in parts or joined; who calls `one_per_label` knows what it does.
        given: whether labels are those of the list.
        of_label: whether one label is to be the network's answer.

    Raises:
        UsageError: images have several, and no other would be asked for.
        DataError: two labels of an image are one class.
    """
    if not _holds_several(dataset):
        return
    files: dict[tuple[int, Any], int] = {}
    labelled: dict[tuple[int, Any, Any], int] = {}
    for place in range(size_of(dataset)):
        held = _listed_at(dataset, place)
        if held is None:
            continue
        listed, index = held
        file = (id(listed), listed.shown(index))
        # An item that a data set hands on twice is still one label.
        if files.setdefault(file, index) != index and (of_label or not given):
            use = "" if given else ", and labels='given'"
            raise UsageError(
                f"{one_line(listed.ids[index])}: images have several labels; use "
                f"target='multilabel' for a network with a logit for each label{use}, or name each "
                "image once."
            )
        if labelled.setdefault((*file, listed.targets[index]), index) != index:
            raise DataError(
                f"{one_line(listed.ids[index])}: two labels of the image are one class; name each "
                "class of an image once."
            )


def _holds_several(dataset: Dataset[Any]) -> bool:
    if isinstance(dataset, ListedImages):
        inside = dataset.shown(0)
        if isinstance(inside, tuple):
            return _holds_several(inside[0])
        return inside is not None and dataset.groups is not None
    inner = inner_of(dataset) if is_known(dataset) else []
    return isinstance(dataset, OnePerLabel) or any(map(_holds_several, inner))


def _listed_at(dataset: Dataset[Any], index: int) -> tuple[ListedImages, int] | None:
    """The list, in parts or joined, that names an item's file, and the index there; None without.

    None of `one_per_label` either.
    """
    here: tuple[Dataset[Any], int] | None = (dataset, index)
    while here is not None and not isinstance(here[0], OnePerLabel):
        if isinstance(here[0], ListedImages):
            return (here[0], here[1]) if isinstance(here[0].shown(here[1]), str) else None
        here = step_into(*here)
    return None


def _image_of(dataset: Dataset[Any], index: int) -> tuple[int, int | str] | None:
    """The data set that a OnePerLabel wraps, and the index there, or a list's file; None without.

    The first number is the data set's, as no two have one while both are there.
    """
    here: tuple[Dataset[Any], int] | None = (dataset, index)
    while here is not None:
        if isinstance(here[0], ListedImages):
            inside = here[0].shown(here[1])
            if not isinstance(inside, tuple):
                return None if inside is None else (id(here[0]), inside)
            here = inside
        step = step_into(*here)
        if step is not None and isinstance(here[0], OnePerLabel):
            return id(step[0]), step[1]
        here = step
    return None


def _numbers(labels: Any, dataset: Dataset[Any], index: int) -> list[int]:
    """Numbers of an image's labels, in order."""
    hint = "give zeros and ones, a tensor of one for each class, or a list of numbers of classes"
    try:
        if isinstance(labels, Tensor) or hasattr(labels, "dtype"):
            row = torch.as_tensor(labels)
            if row.dim() != 1 or not bool(((row == 0) | (row == 1)).all()):
                raise TypeError
            return [int(number) for number in row.nonzero()[:, 0]]
        numbers = sorted({int(label) for label in labels})
        if any(number < 0 for number in numbers) or any(int(one) != one for one in labels):
            raise TypeError
    except (TypeError, ValueError):
        name = which_image(dataset, index)
        raise DataError(f"The labels of {name} are no several labels; {hint}.") from None
    return numbers
