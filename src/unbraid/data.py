"""Images: labels and names of any data set, broken images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from unbraid.errors import DataError, OutOfReach, UnfitPicture, UsageError, brief, out_of_reach

UNLABELLED = -1  # in place of a label, where a data set has none

_N_TRIED = 20  # images, in search of one that can be read


def labels_of(dataset: Dataset[Any], needed: bool = True) -> list[int]:
    """Return all labels of a data set, without reading images where it keeps a list of them.

    Looks for `targets` or `labels` (the habit of torchvision's data sets) through Subsets. Without
    a list every image is read, and those that are broken count as unlabelled; unless labels are
    not needed, when all count as such.

    Raises:
        DataError: a label is no number, there are more or fewer than images, or no image can be
            read.
    """
    listed = listed_labels(dataset)
    if listed is not None:
        return listed
    if not needed:
        return [UNLABELLED] * size_of(dataset)
    labels: list[int] = []
    broken: list[str] = []
    for index in range(size_of(dataset)):
        try:
            labels.append(_number(_read(dataset, index)[1], index))
        except _Broken as error:
            broken.append(str(error))
            labels.append(UNLABELLED)
    if len(broken) == len(labels):
        raise DataError(f"No image can be read: {broken[0]}")
    return labels


def listed_labels(dataset: Dataset[Any]) -> list[int] | None:
    """Return the labels that a data set keeps a list of, None where it keeps none.

    Raises:
        DataError: a label is no number, or there are more or fewer than images.
    """
    if isinstance(dataset, Subset):
        inner = listed_labels(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    for name in ("targets", "labels", "_labels"):
        kept: Any = getattr(dataset, name, None)
        if hasattr(kept, "tolist"):  # going through a tensor would make one of every label
            kept = kept.tolist()
        if isinstance(kept, Sequence):
            if len(kept) != size_of(dataset):
                raise DataError(
                    f"The data set's {name} are {len(kept)} for {size_of(dataset)} images; give "
                    "one label for each image."
                )
            return [_number(label, i) for i, label in enumerate(kept)]
    return None


def groups_of(dataset: Dataset[Any]) -> list[int] | None:
    """Return which images belong together, such as crops of one photograph, as numbers.

    Looks for `groups`, one id of any kind for each image, through Subsets; None where a data set
    says nothing.

    Raises:
        DataError: there are more or fewer ids than images, or one cannot be told from others.
    """
    if isinstance(dataset, Subset):
        inner = groups_of(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    kept = getattr(dataset, "groups", None)
    if kept is None:
        return None
    ids = kept.tolist() if hasattr(kept, "tolist") else list(kept)
    if len(ids) != size_of(dataset):
        raise DataError(
            f"The data set's groups name {len(ids)} images of {size_of(dataset)}; give one id for "
            "each image."
        )
    numbers: dict[Any, int] = {}
    try:
        return [numbers.setdefault(own, len(numbers)) for own in ids]
    except TypeError as error:
        raise DataError(
            f"The data set's groups cannot be compared ({brief(error)}); give texts or numbers."
        ) from None


def _number(label: Any, index: int) -> int:
    try:
        number = int(label)
        if abs(number) < 2**63 and (isinstance(label, str) or number == label):
            return number
        raise ValueError("a fraction, or too large")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise DataError(
            f"The label of image {index} is a {type(label).__name__}, not a class's number; give "
            f"{UNLABELLED} for images without a label, and scan with labels='predicted'."
        ) from None


def size_of(dataset: Dataset[Any]) -> int:
    """Return the number of images.

    Raises:
        UsageError: the data set has no length or no image.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"The data set ({type(dataset).__name__}) must be map-style: with __len__ and "
            "__getitem__ giving (image, label)."
        )
    size = len(dataset)
    if size == 0:
        raise UsageError("The data set holds no image; pass one that does.")
    return size


def class_names_of(dataset: Dataset[Any]) -> tuple[str, ...]:
    """Return the names of a data set's classes by label, empty where it has none."""
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    return tuple(str(name) for name in getattr(inner, "classes", ()))


def name_of(dataset: Dataset[Any], index: int) -> str:
    """Name an image for people: its file or id, or its place in a data set that has neither."""
    if isinstance(dataset, Subset):
        return name_of(dataset.dataset, int(dataset.indices[index]))
    samples, ids = getattr(dataset, "samples", None), getattr(dataset, "ids", None)
    if samples is not None:
        return str(samples[index][0])
    return str(ids[index]) if ids is not None else f"image {index}"


def preprocessing_of(dataset: Dataset[Any]) -> str:
    """Describe a data set's transform, as far as it tells."""
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    transform = getattr(inner, "transform", None)
    text = repr(transform) if transform is not None else ""
    # A default repr holds a memory address, which differs from run to run.
    return text if " at 0x" not in text else getattr(transform, "__qualname__", "custom")


class Relabelled(Dataset[tuple[Any, int]]):
    """A data set with other labels; all else is the data set's own."""

    def __init__(self, dataset: Dataset[Any], labels: Mapping[int, int]) -> None:
        """Wrap a data set of (image, label); images without another label keep theirs."""
        self.dataset = dataset
        self.targets = [labels.get(i, label) for i, label in enumerate(labels_of(dataset))]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return one image and its other label."""
        return self.dataset[index][0], self.targets[index]

    def __getattr__(self, name: str) -> Any:
        """Give what else the data set has, such as `classes` or `picture`."""
        if name == "dataset":  # not yet there, as in a copy being made
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _Broken(DataError):
    """An image cannot be read, and will not be another time."""


def _read(dataset: Dataset[Any], index: int) -> tuple[Any, Any]:
    """Read an image and its label.

    Raises:
        OutOfReach, UnfitPicture: not this one image is at fault.
        _Broken: the image is.
    """
    name = f"Image {index} of the data set"
    try:
        item = dataset[index]
    except (OutOfReach, UnfitPicture):
        raise
    except DataError as error:
        raise _Broken(str(error)) from None
    except Exception as error:
        away = out_of_reach(name, error)
        raise (away or _Broken(f"{name} cannot be read ({brief(error)}).")) from None
    try:
        image, label = item
    except (TypeError, ValueError):
        raise _Broken(f"{name} is a {type(item).__name__}, not an image and its label.") from None
    return image, label


GoodItem = tuple[int, Tensor, int]  # index, image, label
BrokenItem = tuple[int, str]  # index, what went wrong
FailedItem = tuple[str]  # what went wrong, not with the image
Item = GoodItem | BrokenItem | FailedItem


def sort_out(items: Sequence[Item], skip_broken: bool) -> tuple[list[GoodItem], list[int]]:
    """Part the items of a Readable into images and the indices of broken ones.

    Raises:
        DataError: an image is broken, and broken ones are not to be skipped; or images cannot be
            reached, or a label is no number.
    """
    good = [item for item in items if len(item) == 3]
    broken = [item for item in items if len(item) == 2]
    failed = [item for item in items if len(item) == 1]
    if failed:
        raise DataError(failed[0][0])
    if broken and not skip_broken:
        raise DataError(f"{broken[0][1]} Mend or remove it, or leave it out with skip_broken.")
    return good, [item[0] for item in broken]


class Readable(Dataset[Item]):
    """A data set whose items carry their index, and whose failures are items, not exceptions.

    So a broken image in a worker process neither kills it nor loses its place. What is not the
    image's own fault is an item of another kind, lest sound images be left out for good.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        """Wrap a data set of (image, label)."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of images."""
        return size_of(self.dataset)

    def __getitem__(self, index: int) -> Item:
        """Return (index, image, label), or (index, what went wrong), or (what went wrong,)."""
        try:
            image, label = _read(self.dataset, index)
            if isinstance(image, Tensor):
                return index, image, _number(label, index)
        except _Broken as error:
            return index, str(error)
        except DataError as error:
            return (str(error),)
        kind = type(image).__name__
        return index, f"Image {index} is a {kind}, not a tensor; give the data set a transform."


def first_readable(dataset: Dataset[Any], places: Sequence[int]) -> Tensor | None:
    """Return the first image of these that can be read, None if the first ones cannot.

    Raises:
        DataError: images cannot be reached, or a label is no number.
    """
    readable = Readable(dataset)
    for place in places[:_N_TRIED]:
        good, _ = sort_out([readable[place]], skip_broken=True)
        if good:
            return good[0][1]
    return None
