"""The one loop over images: batch by batch, read by worker processes where there are any."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import DistError
from torch.utils.data import DataLoader, Dataset, get_worker_info

from unbraid.base.errors import DataError, RunError, UsageError, brief
from unbraid.base.progress import Advance, counted, uncounted
from unbraid.images.broken import NO_IMAGE, Loaded, Readable, failed, sort_out

_OF_WORKER = "DataLoader worker"  # as torch tells of one's death, wherever the program is
_AGAIN = "start the same command again and it goes on"

# Of N images: index (N,) in the data set, images (N, C, H, W), labels (N,).
Batch = tuple[Tensor, Tensor, Tensor]


def load(
    dataset: Dataset[Any], batches: Iterable[Sequence[int]], *, workers: int, pinned: bool = False
) -> Iterator[list[Loaded]]:
    """Read batches of images, in order, in so many processes, 0 for none; pinned for a GPU."""
    loader = DataLoader(
        Readable(dataset),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_pack,
        pin_memory=pinned,
        generator=torch.Generator(),  # so that the caller's is not used
    )
    try:
        started = iter(loader)
    except OSError as error:
        raise RunError(
            f"Worker processes cannot be started ({brief(error)}); use fewer workers, or 0."
        ) from None
    except (pickle.PicklingError, AttributeError, TypeError, AssertionError) as error:
        if workers == 0:
            raise
        raise UsageError(
            f"The data set cannot be sent to worker processes ({brief(error)}); define its class "
            "and its functions at the top of a module, or use workers=0."
        ) from None
    return _unpacked(started)


def read_images(
    dataset: Dataset[Any],
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    skip_broken: bool = False,
    advance: Advance = uncounted,
) -> Iterator[Batch]:
    """Read batches of images, in order, but those without a good one; `advance` counts images.

    Of images of several sizes, each batch holds neighbours of one size.
    """
    for items in load(dataset, batches, workers=workers):
        good, _ = sort_out(items, skip_broken)
        for some in of_one_size(good):
            index = torch.tensor([item.index for item in some], dtype=torch.int64)
            labels = torch.tensor([item.label for item in some], dtype=torch.int64)
            yield index, torch.stack([item.image for item in some]), labels
        advance(len(items))


def in_batches(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Part indices into batches."""
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


def of_one_size(items: Sequence[Loaded]) -> Iterator[list[Loaded]]:
    """Part good images, in order, into neighbours of one size, which fit into one batch."""
    return (list(some) for _, some in groupby(items, key=lambda item: item.image.shape))


def as_batch(images: Sequence[Tensor]) -> Tensor:
    """Make a batch of images of one size that `load` read.

    Those that lie in a row are not copied, so stay pinned.
    """
    first = images[0]
    whole, size = first._base, first.nbytes
    # What lies in a row may be a part of something else, such as a whole data set in one tensor.
    in_a_row = all(
        image._base is whole and image.data_ptr() == first.data_ptr() + k * size
        for k, image in enumerate(images)
    )
    if whole is None or not (in_a_row and whole.is_contiguous() and whole.shape[1:] == first.shape):
        return torch.stack(list(images))
    start = (first.data_ptr() - whole.data_ptr()) // size if size else 0
    return whole[start : start + len(images)]


@contextmanager
def deaths_told() -> Iterator[None]:
    """Tell in a RunError that a process died, of those that load images or of the team."""
    try:
        yield
    except DistError as error:
        raise RunError(f"The other processes are gone ({brief(error)}); {_AGAIN}.") from None
    except RuntimeError as error:
        if _OF_WORKER not in str(error):
            raise
        raise RunError(_died(error)) from None


class _Packed(NamedTuple):
    """A batch on its way: good images in one piece if they are of one size."""

    items: list[Loaded]  # without their images
    images: Tensor | list[Tensor]


@dataclass
class _Sealed:
    """What a worker process read, as bytes; a queue would pickle where nobody sees its errors."""

    content: bytes

    def open(self) -> _Packed:
        try:
            packed: _Packed = pickle.loads(self.content)
        except Exception as error:
            gone = isinstance(error, (ConnectionError, EOFError)) or _OF_WORKER in str(error)
            raise RunError(_died(error) if gone else _not_handed_over(error)) from None
        return packed

    def pin_memory(self) -> _Packed:
        try:
            items, images = self.open()
        except RunError as error:  # a thread pins, whose errors come with their traceback
            return _Packed([failed(-1, DataError(str(error)))], [])
        if isinstance(images, Tensor):
            return _Packed(items, images.pin_memory())
        return _Packed(items, [image.pin_memory() for image in images])


def _pack(items: Sequence[Loaded]) -> _Packed | _Sealed:
    """Put images into one piece, which crosses between processes as one file, not as many."""
    images = [item.image for item in items if item.fault is None]
    # Copies, so that images that are part of one tensor of the data set's do not pass for a batch.
    one_size = len({(image.shape, image.dtype) for image in images}) == 1
    together = torch.stack(images) if one_size else [image.clone() for image in images]
    packed = _Packed([item._replace(image=NO_IMAGE) for item in items], together)
    if get_worker_info() is None:
        return packed
    try:
        return _Sealed(bytes(ForkingPickler.dumps(packed)))
    except Exception as error:  # such as no memory that processes may share
        return _Packed([failed(-1, DataError(_not_handed_over(error)))], [])


def _unpacked(batches: Iterator[_Packed | _Sealed]) -> Iterator[list[Loaded]]:
    try:
        while True:
            with deaths_told():
                packed = next(batches, None)
            if packed is None:
                return
            items, images = packed.open() if isinstance(packed, _Sealed) else packed
            each = iter(images)
            yield [
                item._replace(image=next(each)) if item.fault is None else item for item in items
            ]
    finally:  # else torch tells of a death again, wherever the program is by then
        end = getattr(batches, "_shutdown_workers", None)
        if end is not None:
            end()


def _not_handed_over(error: Exception) -> str:
    return (
        f"A process that loads images cannot hand them over ({brief(error)}); start the same "
        "command again with fewer workers, or 0."
    )


def _died(error: BaseException) -> str:
    return (
        f"A process that loads images died ({brief(error)}), perhaps for lack of memory; {_AGAIN}, "
        "if need be with fewer workers."
    )


@contextmanager
def image_progress(title: str, total: int, done: int = 0, *, show: bool) -> Iterator[Advance]:
    """Count images while a block runs; the function handed out adds to the count.

    On a terminal that is a bar. Elsewhere, as in a log file, it is a line every half minute.
    """
    with counted(title, total, done, show=show) as advance:
        yield advance
