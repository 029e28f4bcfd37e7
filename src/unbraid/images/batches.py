"""Batches of images, read by worker processes where there are any."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed import DistError
from torch.utils.data import DataLoader, Dataset, get_worker_info

from unbraid.base.errors import RunError, UsageError, brief
from unbraid.images.dataset import Item, Readable, sort_out
from unbraid.networks.outputs import stack_images

_OF_WORKER = "DataLoader worker"  # as torch tells of one's death, wherever the program is
_AGAIN = "start the same command again and it goes on"

# Of N images: index (N,) in the data set, images (N, C, H, W), labels (N,).
Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]

# Index and label of each good image, and other items; which are good; the images, in one piece if
# they are of one size.
Packed: TypeAlias = tuple[list[Any], list[bool], Tensor | list[Tensor]]


def load(
    dataset: Dataset[Any],
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    pinned: bool = False,
) -> Iterator[list[Item]]:
    """Read batches of images, in order.

    Args:
        dataset: of (image, label).
        batches: places in the data set, batch by batch.
        workers: processes that read; 0 for none.
        pinned: put images where an accelerator fetches them fastest.

    Raises:
        UsageError: the data set cannot be sent to worker processes.
        RunError: these cannot be started, or die.
    """
    loader = DataLoader(
        Readable(dataset),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_pack,
        pin_memory=pinned,
        generator=torch.Generator(),  # so that the caller's random numbers stay where they were
    )
    return _opened(_started(loader))


def read_images(
    dataset: Dataset[Any],
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    skip_broken: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Batch]:
    """Read batches of images, in order; a batch without any good image is left out.

    Args:
        dataset: of (image, label).
        batches: indices, batch by batch.
        workers: processes that read; 0 for none.
        skip_broken: leave out images that cannot be read.
        advance: told how many images were read or left out.

    Raises:
        DataError: an image cannot be read, or images differ in size.
    """
    for items in load(dataset, batches, workers=workers):
        good, _ = sort_out(items, skip_broken)
        if good:
            index = torch.tensor([item[0] for item in good], dtype=torch.int64)
            labels = torch.tensor([item[2] for item in good], dtype=torch.int64)
            yield index, stack_images([item[1] for item in good], index), labels
        advance(len(items))


def in_batches(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Part indices into batches.

    >>> in_batches([3, 1, 4], 2), in_batches(range(3), 2)
    ([[3, 1], [4]], [range(0, 2), range(2, 3)])
    """
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


def _started(loader: DataLoader[Item]) -> Iterator[Packed | _Sealed]:
    try:
        return iter(loader)
    except OSError as error:
        raise RunError(
            f"Worker processes cannot be started ({brief(error)}); use fewer workers, or 0."
        ) from None
    except (pickle.PicklingError, AttributeError, TypeError, AssertionError) as error:
        if loader.num_workers == 0:
            raise
        raise UsageError(
            f"The data set cannot be sent to worker processes ({brief(error)}); define its class "
            "and its functions at the top of a module, or use workers=0."
        ) from None


def _opened(batches: Iterator[Packed | _Sealed]) -> Iterator[list[Item]]:
    try:
        while True:
            with deaths_told():
                packed = next(batches, None)
            if packed is None:
                return
            if isinstance(packed, _Sealed):
                packed = packed.open()
            yield _unpack(*packed)
    finally:  # else torch tells of a death again, wherever the program is by then
        end = getattr(batches, "_shutdown_workers", None)
        if end is not None:
            end()


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
    try:
        yield
    except DistError as error:
        raise RunError(f"The other processes are gone ({brief(error)}); {_AGAIN}.") from None
    except RuntimeError as error:
        if _OF_WORKER not in str(error):
            raise
        raise RunError(_died(error)) from None


class _Sealed:
    """What a worker process read, as bytes.

    They are made where what goes wrong can be told. A queue pickles what it sends in a thread of
    its own, whose errors nobody sees: whoever waits at the other end would wait for ever.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content

    def open(self) -> Packed:
        try:
            packed: Packed = pickle.loads(self.content)
        except Exception as error:
            gone = isinstance(error, (ConnectionError, EOFError)) or _OF_WORKER in str(error)
            raise RunError(_died(error) if gone else _not_handed_over(error)) from None
        return packed

    def pin_memory(self) -> Packed:
        try:
            known, are_good, images = self.open()
        except RunError as error:  # a thread pins, whose errors come with their traceback
            return _failed(str(error))
        if isinstance(images, Tensor):
            return known, are_good, images.pin_memory()
        return known, are_good, [image.pin_memory() for image in images]


def _pack(items: Sequence[Item]) -> Packed | _Sealed:
    """Put images into one piece, which crosses between processes as one file, not as many."""
    images = [item[1] for item in items if len(item) == 3]
    one_size = len({(image.shape, image.dtype) for image in images}) == 1
    known = [(item[0], item[2]) if len(item) == 3 else item for item in items]
    are_good = [len(item) == 3 for item in items]
    # Copies, so that images that are part of one tensor of the data set's do not pass for a batch.
    packed = known, are_good, torch.stack(images) if one_size else [i.clone() for i in images]
    if get_worker_info() is None:
        return packed
    try:
        return _Sealed(bytes(ForkingPickler.dumps(packed)))
    except Exception as error:  # such as no memory that processes may share
        return _failed(_not_handed_over(error))


def _failed(reason: str) -> Packed:
    return [(reason,)], [False], []


def _not_handed_over(error: Exception) -> str:
    return (
        f"A process that loads images cannot hand them over ({brief(error)}); start the same "
        "command again with fewer workers, or 0."
    )


def _died(error: BaseException) -> str:
    return (
        f"A process that loads images died ({brief(error)}), perhaps for want of memory; {_AGAIN}, "
        "if need be with fewer workers."
    )


def _unpack(known: list[Any], are_good: list[bool], images: Tensor | list[Tensor]) -> list[Item]:
    each = iter(images)
    return [
        (item[0], next(each), item[1]) if good else item
        for item, good in zip(known, are_good, strict=True)
    ]
