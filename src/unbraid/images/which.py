"""Which image of which data set an index means, also where it lies in another, and its name."""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, Subset

from unbraid.base.errors import UnbraidError
from unbraid.base.tables import one_line

_READERS = ("picture", "file_tensor")  # by index


class Around(Dataset[tuple[Any, int]]):
    """A data set around another, `dataset`, which gives what this one does not have itself."""

    dataset: Any

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        """Give what else the data set has."""
        if name == "dataset":  # not yet there, as in a copy being made
            raise AttributeError(name)
        kept = getattr(self.dataset, name)
        return (lambda index: kept(self.source(index))) if name in _READERS else kept

    def source(self, index: int) -> int:
        """Return the index in `dataset` of an image of this one."""
        return index


def own(dataset: Dataset[Any], name: str) -> tuple[bool, Any]:
    """Look up what a data set keeps itself, not what it passes on: whether it does, and what."""
    try:
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
    """Find the outermost data set that keeps one of these for an image, and its index there."""
    here: tuple[Dataset[Any], int] | None = (dataset, index)
    while here is not None:
        if any(own(here[0], name)[1] is not None for name in names):
            return here
        here = step_into(*here)
    return None


def name_of(dataset: Dataset[Any], index: int) -> str:
    """Name an image for people: its file or id, or its index in a data set that has neither."""
    held = holder_of(dataset, index, "samples", "ids")
    if held is None:
        return f"image {index}"
    samples, ids = own(held[0], "samples")[1], own(held[0], "ids")[1]
    return str(ids[held[1]] if samples is None else samples[held[1]][0])


def which_image(dataset: Dataset[Any], index: int) -> str:
    """Say in a message which image it is: its file, or its id and of what, or else its index."""
    with suppress(Exception):  # of a data set of anyone's own
        held = holder_of(dataset, index, "samples", "ids")
        name = name_of(dataset, index)
        if held is None:
            return name
        # A file says where it lies, an id or a number does not.
        source = own(held[0], "listed_in")[1] if own(held[0], "samples")[1] is None else None
        return f"image {one_line(name)}" + (f" of {one_line(source)}" if source else "")
    return f"image {index}"


@contextmanager
def images_named(dataset: Dataset[Any]) -> Iterator[None]:
    """Let errors that know of an image its index alone say which image of a data set it is."""
    try:
        yield
    except UnbraidError as error:
        if error.image is None:
            raise
        raise error.naming(which_image(dataset, error.image)) from error.__cause__


@contextmanager
def image_named(name: str) -> Iterator[None]:
    """Let errors about the one image that is at hand tell its name, as `name_of` gives it."""
    try:
        yield
    except UnbraidError as error:
        if error.image is None:
            raise
        known = name if name.startswith("image ") else f"image {one_line(name)}"
        raise error.naming(known) from error.__cause__
