"""Data sets inside data sets: what each keeps of its own, and where in another an image lies.

Of Subset, ConcatDataset and unbraid's own it is known which image of which data set they hand on.
Any other may pick, order and label images as it likes; what it does not keep itself is not known.
"""

from __future__ import annotations

import copy
import inspect
import random
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

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
