"""Batches of images, read by worker processes where there are any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed import DistError
from torch.utils.data import DataLoader, Dataset, Sampler

from unbraid.data import Item, Readable
from unbraid.errors import RunError, brief
from unbraid.running import stack_images

# Index and label of each good image, and other items; which are good; the images, in one piece if
# they are of one size.
Packed: TypeAlias = tuple[list[Any], list[bool], Tensor | list[Tensor]]


def load(
    dataset: Dataset[Any], batches: Sampler[list[int]], *, workers: int, pinned: bool
) -> Iterator[list[Item]]:
    """Read batches of images, in order.

    Args:
        dataset: of (image, label).
        batches: places in the data set, batch by batch.
        workers: processes that read; 0 for none.
        pinned: put images where an accelerator fetches them fastest.
    """
    loader = DataLoader(
        Readable(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_pack,
        pin_memory=pinned,
        generator=torch.Generator(),  # so that the caller's random numbers stay where they were
    )
    return (_unpack(*packed) for packed in loader)


def as_batch(images: Sequence[Tensor], index: Tensor) -> Tensor:
    """Make a batch of images that `load` read, without copying them where they lie in a row.

    So they stay where an accelerator fetches them fastest.

    Args:
        images: of one batch, or some of it.
        index: where they are in the data set.

    Raises:
        DataError: they differ in size.
    """
    first = images[0]
    whole, size = first._base, first.nbytes
    # What lies in a row may be a part of something else, such as a whole data set in one tensor.
    if (
        whole is None
        or whole.shape[1:] != first.shape
        or not whole.is_contiguous()
        or any(
            image._base is not whole or image.data_ptr() != first.data_ptr() + k * size
            for k, image in enumerate(images)
        )
    ):
        return stack_images(images, index)
    start = (first.data_ptr() - whole.data_ptr()) // size if size else 0
    return whole[start : start + len(images)]


@contextmanager
def deaths_told() -> Iterator[None]:
    """Say in one sentence that a process died on which the work depends.

    Raises:
        RunError: one died, of those that load images or of the team.
    """
    again = "start the same command again and it goes on"
    try:
        yield
    except DistError as error:
        raise RunError(f"The other processes are gone ({brief(error)}); {again}.") from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"A process that loads images died ({brief(error)}), perhaps for want of memory; "
            f"{again}, if need be with fewer workers."
        ) from None


def _pack(items: Sequence[Item]) -> Packed:
    """Put images into one piece, which crosses between processes as one file, not as many."""
    images = [item[1] for item in items if len(item) == 3]
    one_size = len({(image.shape, image.dtype) for image in images}) == 1
    known = [(item[0], item[2]) if len(item) == 3 else item for item in items]
    are_good = [len(item) == 3 for item in items]
    # Copies, lest images that are part of one tensor of the data set's be taken for a batch.
    return known, are_good, torch.stack(images) if one_size else [i.clone() for i in images]


def _unpack(known: list[Any], are_good: list[bool], images: Tensor | list[Tensor]) -> list[Item]:
    each = iter(images)
    return [
        (item[0], next(each), item[1]) if good else item
        for item, good in zip(known, are_good, strict=True)
    ]
