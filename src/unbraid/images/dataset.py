"""Images: labels and names of any data set, broken images."""

from __future__ import annotations

import copy
import inspect
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from unbraid.base.errors import DataError, OutOfReach, UnfitPicture, UsageError, brief, out_of_reach
from unbraid.base.modes import callers_device

# Data sets inside data sets: what each keeps of its own, and where in another an image lies.


N_TRIED = 16  # images, evenly spaced, that stand for all
_OF_DATA_SETS = ("targets", "classes", "samples", "transform", "ids")  # one of them is kept


class Around(Dataset[tuple[Any, int]]):
    """A data set around another, `dataset`, that tells where in it an image lies."""

    dataset: Dataset[Any]

    def source(self, index: int) -> int:
        """Return the place in `dataset` of the image at a place in this one."""
        return index


def inner_of(dataset: Dataset[Any]) -> list[Dataset[Any]]:
    """List the data sets that a data set takes its images from, none where it takes them itself."""
    if isinstance(dataset, ConcatDataset):
        return [part for part in dataset.datasets if len(part)]  # type: ignore[arg-type]
    if isinstance(dataset, (Subset, Around)):
        return [dataset.dataset]
    return [one for value in _vars(dataset).values() for one in _data_sets(value, dataset)]


def is_known(dataset: Dataset[Any]) -> bool:
    """Whether it is known which image of which other data set a data set hands on."""
    return isinstance(dataset, (Subset, ConcatDataset, Around))


def own(dataset: Dataset[Any], name: str) -> tuple[bool, Any]:
    """Look up what a data set keeps itself.

    What a wrapper merely passes on from the data set inside of it may be in another order.

    Returns:
        Whether it keeps anything of that name, and what.
    """
    try:
        if inner_of(dataset):
            inspect.getattr_static(dataset, name)
        return True, getattr(dataset, name)
    except AttributeError:
        return False, None


def step_into(dataset: Dataset[Any], index: int) -> tuple[Dataset[Any], int] | None:
    """Go one step towards where an image comes from; None where it is not known."""
    if isinstance(dataset, Subset):
        return dataset.dataset, int(dataset.indices[index])
    if isinstance(dataset, ConcatDataset):
        part = bisect_right(dataset.cumulative_sizes, index)
        before = dataset.cumulative_sizes[part - 1] if part else 0
        return dataset.datasets[part], index - before
    if isinstance(dataset, Around):
        return dataset.dataset, dataset.source(index)
    return None


def holder_of(dataset: Dataset[Any], index: int, *names: str) -> tuple[Any, int] | None:
    """Find the outermost data set that keeps one of some things for an image, and its place there.

    None where none does, as far as is known.
    """
    here: tuple[Dataset[Any], int] | None = (dataset, index)
    while here is not None:
        if any(own(here[0], name)[1] is not None for name in names):
            return here
        here = step_into(*here)
    return None


def all_hold(dataset: Dataset[Any], name: str) -> bool:
    """Whether `holder_of` finds a holder for any image."""
    if own(dataset, name)[1] is not None:
        return True
    return is_known(dataset) and all(all_hold(part, name) for part in inner_of(dataset))


def changes_images(dataset: Dataset[Any]) -> bool:
    """Whether code of anyone's own reads images out of another data set, and may change them."""
    reads = [kind.__getitem__ for kind in (Subset, ConcatDataset) if isinstance(dataset, kind)]
    as_they_are = isinstance(dataset, Around) or type(dataset).__getitem__ in reads
    return bool(inner_of(dataset)) and not as_they_are


def any_changes_images(dataset: Dataset[Any]) -> bool:
    """Whether it does so in a data set or in one inside of it."""
    return changes_images(dataset) or any(map(any_changes_images, inner_of(dataset)))


def hands_labels_on(dataset: Dataset[Any]) -> bool:
    """Whether a data set of anyone's own gives images the labels that they have inside of it.

    Tried with some images: a twin of the data set reads them through a spy. What it keeps from an
    earlier reading is taken for the image at the same place, where the two are as many.
    """
    read: list[Any] = []
    inner = inner_of(dataset)
    same_size = len(inner) == 1 and len(inner[0]) == len(dataset)  # type: ignore[arg-type]
    try:
        twin = copy.copy(dataset)
        for name, value in list(vars(twin).items()):
            if any(True for _ in _data_sets(value, dataset)):
                vars(twin)[name] = _spied(value, read)
    except Exception:  # whatever a copy runs into
        return False
    n_same = 0
    for index in spaced(len(dataset)):  # type: ignore[arg-type]
        read.clear()
        try:
            with drawing_alike():
                label = twin[index][1]
                if not read and same_size:
                    read.append(inner[0][index][1])
            if len(read) != 1 or int(read[0]) != int(label):
                return False
        except Exception:  # broken, or no pair, which is told elsewhere
            continue
        n_same += 1
    return n_same > 0


def spaced(size: int) -> range:
    """Places of some images, evenly spaced."""
    return range(0, size, max(1, size // N_TRIED))


@contextmanager
def drawing_alike() -> Iterator[None]:
    """Have random numbers be the same each time; the caller's are as if none had been drawn."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


class _Spy(Dataset[Any]):
    """A data set that notes the labels of what is read."""

    def __init__(self, dataset: Any, read: list[Any]) -> None:
        self._inside, self._read = dataset, read

    def __len__(self) -> int:
        return len(self._inside)

    def __getitem__(self, index: Any) -> Any:
        item = self._inside[index]
        self._read.append(item[1])
        return item

    def __getattr__(self, name: str) -> Any:
        if name == "_inside":
            raise AttributeError(name)
        return getattr(self._inside, name)


def _spied(value: Any, read: list[Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_spied(one, read) for one in value])
    return _Spy(value, read)


def _data_sets(value: Any, around: Any) -> Iterator[Dataset[Any]]:
    """A value, or those in a list, if they are data sets."""
    if type(value) in (list, tuple) and value and len(value) < N_TRIED:
        if all(_is_data_set(one) and one is not around for one in value):
            yield from value
    elif _is_data_set(value) and value is not around:
        yield value


def _is_data_set(value: Any) -> bool:
    if isinstance(value, Dataset):
        return True
    kind = type(value)
    return (
        not isinstance(value, (Tensor, np.ndarray, str, bytes, list, tuple, dict, type))
        and hasattr(kind, "__len__")
        and hasattr(kind, "__getitem__")
        and any(name in _vars(value) for name in _OF_DATA_SETS)
    )


def _vars(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {})


# Images: labels and names of any data set, broken images.


One = TypeVar("One")

UNLABELLED = -1  # in place of a label, where a data set has none

_OF_LABELS = ("targets", "labels", "_labels")
_N_TRIED = 20  # images, in search of one that can be read
_N_KEYS = 12  # of a dictionary, that a message names


def labels_of(dataset: Dataset[Any], needed: bool = True) -> list[int]:
    """Return all labels of a data set, without reading images where it keeps a list of them.

    Looks for `targets` or `labels` (the habit of torchvision's data sets), also in data sets
    inside others. Without a list every image is read, and those that are broken count as
    unlabelled; unless labels are not needed, when all count as such.

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

    Texts, or a row for each class, are what it makes labels of.

    Raises:
        DataError: a label is no number, or there are more or fewer than images.
    """
    for name in _OF_LABELS:
        kept = own(dataset, name)[1]
        if hasattr(kept, "tolist"):  # going through a tensor would make one of every label
            kept = kept.tolist()
        if isinstance(kept, Sequence):
            if len(kept) != size_of(dataset):
                raise DataError(
                    f"The data set's {name} are {len(kept)} for {size_of(dataset)} images; give "
                    "one label for each image."
                )
            change = _target_transform(dataset)
            if kept and change is None and _is_raw(kept[0]):
                return None
            return [_number(change(one) if change else one, i) for i, one in enumerate(kept)]
    return gathered(dataset, listed_labels, *_OF_LABELS)


def _target_transform(dataset: Dataset[Any]) -> Callable[[Any], Any] | None:
    """What one of torchvision's data sets makes of the labels that it keeps."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(dataset).__mro__}
    if "torchvision.datasets.vision.VisionDataset" not in kinds:
        return None
    change: Callable[[Any], Any] | None = getattr(dataset, "target_transform", None)
    return change


def _is_raw(label: Any) -> bool:
    """Whether a data set makes a label of this: a text that is no number, or a row of numbers."""
    if isinstance(label, str):
        return not label.strip().lstrip("+-").isdecimal()
    return isinstance(label, (list, tuple))


def gathered(
    dataset: Dataset[Any], listed: Callable[[Dataset[Any]], list[One] | None], *names: str
) -> list[One] | None:
    """Gather what is listed for each image from the data sets inside of one, in its own order.

    Args:
        dataset: of which it is known what it hands on; None for any other.
        listed: what a data set lists, None where it lists nothing.
        names: what the list is kept as; a data set that keeps one, even None, says all itself.
    """
    if not is_known(dataset) or any(own(dataset, name)[0] for name in names):
        return None
    inner = inner_of(dataset)
    lists = [listed(part) for part in inner]
    if any(one is None for one in lists):
        return None
    by_part = {id(part): one or [] for part, one in zip(inner, lists, strict=True)}
    found = []
    for index in range(size_of(dataset)):
        step = step_into(dataset, index)
        assert step is not None
        found.append(by_part[id(step[0])][step[1]])
    return found


def groups_of(dataset: Dataset[Any]) -> list[int] | None:
    """Return which images belong together, such as crops of one photograph, as numbers.

    Looks for `groups`, one id of any kind for each image, through data sets around others; None
    where a data set says nothing. In parts of a ConcatDataset equal texts are one group; numbers
    are each part's own.

    Raises:
        DataError: there are more or fewer ids than images, or one cannot be told from others.
    """
    has_own, _ = own(dataset, "groups")
    if isinstance(dataset, ConcatDataset) and not has_own:
        return _numbered(_group_keys(dataset))
    if is_known(dataset) and not has_own:
        return gathered(dataset, groups_of, "groups")
    return _numbered(_group_keys(dataset))


def _group_keys(dataset: Dataset[Any]) -> list[Any] | None:
    """Group of each image as the data set names it."""
    has_own, kept = own(dataset, "groups")
    if not has_own and isinstance(dataset, ConcatDataset):
        inner = inner_of(dataset)
        parts = list(map(_group_keys, inner))
        if all(part is None for part in parts):
            return None
        sizes = map(size_of, inner)
        return [
            key if isinstance(key, str) else (k, key)
            for k, (part, size) in enumerate(zip(parts, sizes, strict=True))
            for key in (part if part is not None else [("alone", i) for i in range(size)])
        ]
    if not has_own:
        return gathered(dataset, _group_keys, "groups")
    if kept is None:
        return None
    ids = kept.tolist() if hasattr(kept, "tolist") else list(kept)
    if len(ids) != size_of(dataset):
        raise DataError(
            f"The data set's groups name {len(ids)} images of {size_of(dataset)}; give one id for "
            "each image."
        )
    return ids


def _numbered(ids: list[Any] | None) -> list[int] | None:
    if ids is None:
        return None
    numbers: dict[Any, int] = {}
    try:
        return [numbers.setdefault(own, len(numbers)) for own in ids]
    except TypeError as error:
        raise DataError(
            f"The data set's groups cannot be compared ({brief(error)}); give texts or numbers."
        ) from None


def _number(label: Any, index: int) -> int:
    try:
        label = label.detach() if isinstance(label, Tensor) else label
        number = int(label)
        if abs(number) < 2**63 and (isinstance(label, str) or number == label):
            return number
        raise ValueError("a fraction, or too large")
    except Exception:  # of types of anyone's own
        shape = tuple(getattr(label, "shape", ()))
        kind = type(label).__name__
        if shape:
            raise DataError(
                f"The label of image {index} is a {kind}, not a class's number; it is of shape "
                f"{shape}, so let the data set give one image at a time, and one number for it."
            ) from None
        raise DataError(
            f"The label of image {index} is a {kind}, not a class's number; give "
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
    """Return the names of a data set's classes by label, empty where it has none.

    Those of a data set inside another count if its labels are handed on.

    Raises:
        DataError: parts of a ConcatDataset name a label differently.
    """
    kept = own(dataset, "classes")[1]
    if kept is not None:
        return _by_label([str(name) for name in kept], _target_transform(dataset))
    inner = inner_of(dataset)
    if not inner or not (is_known(dataset) or hands_labels_on(dataset)):
        return ()
    names: list[str] = []
    for part in map(class_names_of, inner):
        for label, name in enumerate(part):
            before = names[label] if label < len(names) else ""
            if before and name and before != name:
                raise DataError(
                    f"Parts of the data set name label {label} {before!r} and {name!r}; give "
                    "classes of one name one label in all of them, and others another."
                )
            names[label : label + 1] = [before or name]
    return tuple(names)


def _by_label(names: Sequence[str], change: Callable[[Any], Any] | None) -> tuple[str, ...]:
    """Names by label, where labels are changed on the way; empty for one of several classes."""
    if change is None:
        return tuple(names)
    shown: dict[int, str] = {}
    for place, name in enumerate(names):
        try:
            label = _number(change(place), place)
        except Exception:  # of anyone's own, made for labels that have images
            continue
        shown[label] = "" if label in shown else name
    return tuple(shown.get(label, "") for label in range(max(shown, default=-1) + 1))


def name_of(dataset: Dataset[Any], index: int) -> str:
    """Name an image for people: its file or id, or its place in a data set that has neither."""
    held = holder_of(dataset, index, "samples", "ids")
    if held is None:
        return f"image {index}"
    samples, ids = own(held[0], "samples")[1], own(held[0], "ids")[1]
    return str(ids[held[1]] if samples is None else samples[held[1]][0])


def picture_of(dataset: Dataset[Any], index: int) -> Image.Image | None:
    """Return an image as it was before any transform, None where the data set has no `picture`."""
    held = holder_of(dataset, index, "picture")
    if held is None:
        return None
    picture = held[0].picture(held[1])
    assert isinstance(picture, Image.Image)
    return picture


class Relabelled(Around):
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
        DataError: the data set gives something else.
    """
    name = f"Image {index} of the data set"
    try:
        with callers_device():
            item = dataset[index]
    except (OutOfReach, UnfitPicture):
        raise
    except DataError as error:
        raise _Broken(str(error)) from None
    except Exception as error:
        if "re-initialize CUDA in forked subprocess" in brief(error):
            raise DataError(
                f"{name} needs the accelerator, which worker processes cannot use; give images on "
                "the processor, or scan with workers=0."
            ) from None
        away = out_of_reach(name, error)
        raise (away or _Broken(f"{name} cannot be read ({brief(error)}).")) from None
    if item is None:
        raise _Broken(f"{name} is None, not an image and its label.")
    image, label = _pair(item, index)
    if image is None:
        raise _Broken(f"{name} is None, with a label.")
    return image, label


def _pair(item: Any, index: int) -> tuple[Any, Any]:
    """Take an image and its label out of an item.

    Raises:
        DataError: it is something else, so the data set is at fault.
    """
    is_row = hasattr(item, "__len__") and hasattr(item, "__getitem__")
    is_row = is_row and not isinstance(item, (Mapping, str, bytes, Tensor, np.ndarray))
    if is_row and len(item) == 2:
        return item[0], item[1]
    remedy = "let its __getitem__ return (image, label)"
    what = f"a {type(item).__name__} of {len(item)}" if is_row else f"a {type(item).__name__}"
    if isinstance(item, Mapping):
        keys = ", ".join(repr(key) for key in list(item)[:_N_KEYS])
        what = f"a dictionary with the keys {keys}" if keys else "an empty dictionary"
        remedy += ", or pass rows of Hugging Face's through unbraid.from_hugging_face"
    raise DataError(
        f"The data set gives {what} for image {index}, not an image and its label; {remedy}."
    )


def plain(image: Tensor, index: int) -> Tensor:
    """Bring an image to the processor, as numbers alone: no gradient, no type of its own.

    Anything else may not cross between processes, or not be kept.

    Raises:
        DataError: it has no content, or is no plain array of real numbers.
    """
    what, found = _not_plain(image), image
    if not what:
        try:
            with torch.no_grad():
                found = image.as_subclass(Tensor).detach().cpu().resolve_conj().resolve_neg()
                found = found.clone() if found.is_inference() else found
        except Exception as error:  # of a type of anyone's own
            what = f"is a {type(image).__name__} that stays one ({brief(error)})"
        if type(found) is not Tensor:
            what = what or f"is a {type(image).__name__} that stays one"
    if what:
        raise DataError(
            f"Image {index} {what}; let the data set give plain tensors of real numbers."
        )
    return found


def _not_plain(image: Tensor) -> str:
    if image.device.type == "meta":
        return "has no content (device meta)"
    if image.is_nested or image.layout != torch.strided:
        return "is a sparse or nested tensor"
    if image.is_complex() or image.is_quantized:
        return f"holds numbers of type {str(image.dtype).removeprefix('torch.')}"
    return ""


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
        raise DataError(
            f"{broken[0][1]} Mend or remove it, or leave it out with skip_broken (--skip-broken)."
        )
    return good, [item[0] for item in broken]


class Readable(Dataset[Item]):
    """A data set whose items carry their index, and whose failures are items, not exceptions.

    So a broken image in a worker process neither kills it nor loses its place. What is not the
    image's own fault is an item of another kind, so that a good image is not dropped for good.
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
                return index, plain(image, index), _number(label, index)
        except _Broken as error:
            return index, str(error)
        except DataError as error:
            return (str(error),)
        except Exception as error:  # of an error that does not let itself be looked at
            return index, f"Image {index} cannot be read ({type(error).__name__})."
        kind, remedy = type(image).__name__, "give the data set a transform"
        if not isinstance(image, (Image.Image, np.ndarray)):
            remedy = "let the data set give (image, label)"
        return (f"Image {index} is a {kind}, not a tensor; {remedy}.",)


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
