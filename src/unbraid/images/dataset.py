"""Any data set of (image, label): its labels, groups and names, also where it lies in another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from unbraid.base.errors import DataError, UnbraidError, UsageError, brief
from unbraid.base.modes import drawing_alike
from unbraid.images.broken import UNLABELLED, BrokenImage, read_pair, to_label
from unbraid.images.mapped import Chosen, Numbers, Texts
from unbraid.images.which import Around, holder_of, own, step_into

One = TypeVar("One")

N_TRIED = 16  # images, evenly spaced, that stand for all
_OF_LABELS = ("targets", "labels", "_labels")


def size_of(dataset: Dataset[Any]) -> int:
    """Return the number of images."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"The data set ({type(dataset).__name__}) must be map-style: with __len__ and "
            "__getitem__ giving (image, label)."
        )
    size = len(dataset)
    if size == 0:
        raise UsageError("The data set holds no image; pass one that does.")
    return size


def is_known(dataset: Dataset[Any]) -> bool:
    """Whether it is known which image of which other data set a data set hands on."""
    return isinstance(dataset, (Subset, ConcatDataset, Around))


def inner_of(dataset: Dataset[Any]) -> list[Dataset[Any]]:
    """List the data sets that a data set takes its images from, none where it takes them itself."""
    if isinstance(dataset, ConcatDataset):
        return [part for part in dataset.datasets if len(part)]  # type: ignore[arg-type]
    if isinstance(dataset, (Subset, Around)):
        return [dataset.dataset]
    found: list[Dataset[Any]] = []
    for value in getattr(dataset, "__dict__", {}).values():
        several = type(value) in (list, tuple) and len(value) < N_TRIED
        parts = list(value) if several else [value]
        if all(isinstance(one, Dataset) and one is not dataset for one in parts):
            found += parts
    return found


def own_list(dataset: Dataset[Any], name: str) -> Sequence[Any] | None:
    """Return a list with an entry for each image that a data set keeps itself, None without."""
    kept = own(dataset, name)[1]
    if isinstance(kept, (Texts, Numbers, Chosen)):  # which lies in a file
        return kept
    if hasattr(kept, "tolist"):  # going through a tensor would make one of every value
        kept = kept.tolist()
    if not isinstance(kept, Sequence) or isinstance(kept, str):
        return None
    if len(kept) != size_of(dataset):
        raise DataError(
            f"The data set's {name} are {len(kept)} for {size_of(dataset)} images; give one for "
            "each image."
        )
    return list(kept)


def all_hold(dataset: Dataset[Any], name: str) -> bool:
    """Whether `holder_of` finds a holder for any image."""
    if own(dataset, name)[1] is not None:
        return True
    return is_known(dataset) and all(all_hold(part, name) for part in inner_of(dataset))


def gathered(
    dataset: Dataset[Any], listed: Callable[[Dataset[Any]], Sequence[One] | None], *names: str
) -> list[One] | None:
    """Gather what is listed for each image from the data sets inside of one, in its own order."""
    if not is_known(dataset) or any(own(dataset, name)[0] for name in names):
        return None
    by_part: dict[int, Sequence[One]] = {}
    for part in inner_of(dataset):
        found = listed(part)
        if found is None:
            return None
        by_part[id(part)] = found
    steps = (step_into(dataset, index) for index in range(size_of(dataset)))
    return [by_part[id(step[0])][step[1]] for step in steps if step is not None]


def changes_images(dataset: Dataset[Any]) -> bool:
    """Whether code of anyone's own reads images out of a data set inside, and may change them."""
    reads = [kind.__getitem__ for kind in (Subset, ConcatDataset) if isinstance(dataset, kind)]
    as_they_are = isinstance(dataset, Around) or type(dataset).__getitem__ in reads
    if own(dataset, "read_by_code")[1]:
        return True
    inner = inner_of(dataset)
    return bool(inner) and (not as_they_are or any(map(changes_images, inner)))


def spaced(size: int) -> range:
    """Indices of some images."""
    return range(0, size, max(1, size // N_TRIED))


# --- labels ---------------------------------------------------------------------------------------


def labels_of(dataset: Dataset[Any], needed: bool = True) -> Sequence[int]:
    """Return all labels: those that a data set lists, else what its images come with.

    Broken images count as unlabelled, and so do all where no list is kept and none is needed.
    """
    listed = listed_labels(dataset)
    if listed is not None:
        return listed
    labels = [UNLABELLED] * size_of(dataset)
    if not needed:
        return labels
    broken: list[str] = []
    for index in range(len(labels)):
        try:
            labels[index] = to_label(read_pair(dataset, index)[1], dataset, index)
        except BrokenImage as error:
            broken.append(str(error))
    if len(broken) == len(labels):
        raise DataError(f"No image can be read: {broken[0]}")
    return labels


def listed_labels(dataset: Dataset[Any]) -> Sequence[int] | None:
    """Return the labels that a data set keeps a list of, None where it keeps none."""
    for name in _OF_LABELS:
        kept = own_list(dataset, name)
        if isinstance(kept, Numbers):
            return kept
        if kept is not None:
            change = _target_transform(dataset)
            if kept and change is None and _is_raw(kept[0]):
                return None
            made = map(change, kept) if change else kept
            return [to_label(one, dataset, i) for i, one in enumerate(made)]
    return gathered(dataset, listed_labels, *_OF_LABELS)


def _target_transform(dataset: Dataset[Any]) -> Callable[[Any], Any] | None:
    """What one of torchvision's data sets makes of the labels that it keeps."""
    vision = sys.modules.get("torchvision.datasets.vision")
    is_one = vision is not None and isinstance(dataset, vision.VisionDataset)
    return getattr(dataset, "target_transform", None) if is_one else None


def _is_raw(label: Any) -> bool:
    """Whether a data set makes a label of this: a text that is no number, or a row of numbers."""
    if isinstance(label, str):
        return not label.strip().lstrip("+-").isdecimal()
    return isinstance(label, (list, tuple))


class Relabelled(Around):
    """A data set with other labels; all else is the data set's own."""

    def __init__(self, dataset: Dataset[Any], labels: Mapping[int, int]) -> None:
        """Wrap a data set of (image, label); images without another label keep theirs."""
        self.dataset = dataset
        self.targets = [labels.get(i, label) for i, label in enumerate(labels_of(dataset))]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return one image and its other label."""
        return self.dataset[index][0], self.targets[index]


# --- groups ---------------------------------------------------------------------------------------


def groups_of(dataset: Dataset[Any]) -> Sequence[int] | None:
    """Return which images belong together, as numbers, None where a data set does not say.

    In parts of a ConcatDataset equal texts are one group; numbers are each part's own.
    """
    if not isinstance(dataset, ConcatDataset) and not own(dataset, "groups")[0]:
        return gathered(dataset, groups_of, "groups")
    keys = _group_keys(dataset)
    if keys is None:
        return None
    if isinstance(keys, Chosen):
        return keys.numbers
    numbers: dict[Any, int] = {}
    try:
        return [numbers.setdefault(key, len(numbers)) for key in keys]
    except TypeError as error:
        raise DataError(
            f"The data set's groups cannot be compared ({brief(error)}); give texts or numbers."
        ) from None


def group_names_of(dataset: Dataset[Any]) -> list[str] | None:
    """Return the name of each image's group as text, None where a data set does not say."""
    numbers, keys = groups_of(dataset), _group_keys(dataset)
    if numbers is None or keys is None:
        return None
    names: dict[int, str] = {}
    return [names.setdefault(n, str(key)) for n, key in zip(numbers, keys, strict=True)]


def _group_keys(dataset: Dataset[Any]) -> Sequence[Any] | None:
    """The group of each image as the data set names it."""
    is_own, kept = own(dataset, "groups")
    if is_own:
        keys = own_list(dataset, "groups")
        if keys is None and kept is not None:
            raise DataError(f"The data set's groups are a {type(kept).__name__}; give a list.")
        return keys
    if not isinstance(dataset, ConcatDataset):
        return gathered(dataset, _group_keys, "groups")
    parts = [(part, _group_keys(part)) for part in inner_of(dataset)]
    if all(keys is None for _, keys in parts):
        return None
    found: list[Any] = []
    for k, (part, keys) in enumerate(parts):
        told = keys if keys is not None else [("alone", i) for i in range(size_of(part))]
        found += [key if isinstance(key, str) else (k, key) for key in told]
    return found


# --- names and pictures ---------------------------------------------------------------------------


def picture_of(dataset: Dataset[Any], index: int) -> Image.Image | None:
    """Return an image as it was before any transform, None where the data set has no `picture`."""
    held = holder_of(dataset, index, "picture")
    if held is None:
        return None
    picture = held[0].picture(held[1])
    assert isinstance(picture, Image.Image)
    return picture


def class_names_of(dataset: Dataset[Any]) -> tuple[str, ...]:
    """Return the names of a data set's classes by label, empty where it has none."""
    kept = own(dataset, "classes")[1]
    if kept is not None:  # by label, unless labels are changed on the way
        return () if _target_transform(dataset) else tuple(map(str, kept))
    inner = inner_of(dataset)
    if not inner or not (is_known(dataset) or _hands_labels_on(dataset, inner)):
        return ()
    return join_names(
        map(class_names_of, inner),
        lambda _, label, before, name: DataError(
            f"Parts of the data set name label {label} {before!r} and {name!r}; give classes of "
            "one name one label in all of them, and others another."
        ),
    )


def join_names(
    parts: Iterable[Sequence[str]], differing: Callable[[int, int, str, str], UnbraidError]
) -> tuple[str, ...]:
    """Join names of classes by label, "" where a part has none.

    Args:
        parts: names by label.
        differing: what to raise where a part names a label otherwise than one before, told the
            part's number, the label, the name before and the part's.
    """
    names: list[str] = []
    for number, part in enumerate(parts):
        for label, name in enumerate(part):
            before = names[label] if label < len(names) else ""
            if before and name and before != name:
                raise differing(number, label, before, name)
            names[label : label + 1] = [before or name]
    return tuple(names)


def lie_at(ids: Mapping[int, str], known: Sequence[str]) -> bool:
    """Whether a data set has the images of some ids at the places where they were scanned."""
    first, last = min(ids, default=0), max(ids, default=-1)
    if last >= len(known):
        return False
    if last - first < 2 * len(ids):  # read in one go what lies in a row
        row = known[first : last + 1]
        return all(row[index - first] == one for index, one in ids.items())
    return all(known[index] == one for index, one in ids.items())


def _hands_labels_on(dataset: Dataset[Any], inner: Sequence[Any]) -> bool:
    """Whether a data set of anyone's own gives images the labels of the same indices inside."""
    size = size_of(dataset)
    if len(inner) != 1 or len(inner[0]) != size:
        return False
    same: list[bool] = []
    for index in spaced(size):
        with drawing_alike(), suppress(Exception):  # broken, or no pair, which is told elsewhere
            same.append(int(dataset[index][1]) == int(inner[0][index][1]))
    return bool(same) and all(same)
