"""Run an image encoder over a data set, and check what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.as_found import callers_device
from unbraid.causes import memory_full
from unbraid.data import GoodItem, picture_of, size_of, sort_out
from unbraid.doors import in_plain_modes
from unbraid.encoders import Encoder, TimmEncoder
from unbraid.errors import ModelError
from unbraid.given import loading
from unbraid.loading import load
from unbraid.models import Transform
from unbraid.nested import all_hold
from unbraid.networks import device_of
from unbraid.progress import image_progress
from unbraid.relevance import undisturbed
from unbraid.running import stack_images

Encode = Callable[[Sequence[GoodItem]], Tensor]  # from N images to embeddings, (N, D)


@in_plain_modes
def embed(
    encoder: Encoder,
    dataset: Dataset[Any],
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> Tensor:
    """Embed every image of a data set.

    A module is used in eval mode, on the device that it is on, and left exactly as it was; so is
    the module that a method such as `clip.encode_image` belongs to.

    Args:
        encoder: from images (N, C, H, W) to embeddings (N, D).
        dataset: map-style, of (image tensor, label).
        batch_size: images per call.
        workers: processes that load images.
        progress: show a progress bar on standard error.

    Returns:
        (N, D), in the order of the data set, in the encoder's own unit and number format.

    Raises:
        ModelError: the encoder fails, or gives something else than finite embeddings.
        DataError: an image cannot be read, or images differ in size.
        UsageError: the data set is empty, or batch_size or workers is out of range.
    """
    batch_size, workers = loading(batch_size, workers)
    n = size_of(dataset)
    batches = in_batches(range(n), batch_size)
    parts = []
    with (
        ready(encoder) as encode,
        image_progress("Embedding images", n, show=progress) as advance,
    ):
        for items in load_batches(encoder, dataset, batches, workers):
            parts.append(encode(items))
            advance(len(items))
    return torch.cat(parts)


def in_batches(indices: Sequence[int], batch_size: int) -> list[list[int]]:
    """Part indices into batches.

    >>> in_batches([3, 1, 4], 2)
    [[3, 1], [4]]
    """
    return [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]


@contextmanager
def ready(encoder: Encoder) -> Iterator[Encode]:
    """Prepare an encoder, put it back afterwards; hands out a function from items to embeddings.

    That function checks what the encoder gives, and brings it to the CPU.
    """
    module = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
    n_dimensions: int | None = None

    def encode(items: Sequence[GoodItem]) -> Tensor:
        nonlocal n_dimensions
        index = torch.tensor([item[0] for item in items], dtype=torch.int64)
        images = stack_images([item[1] for item in items], index)
        embeddings = _call(encoder, images if device is None else images.to(device))
        if embeddings.dim() != 2 or len(embeddings) != len(images) or not embeddings.shape[1]:
            raise ModelError(
                f"The encoder gives {tuple(embeddings.shape)} for {len(images)} images, not one "
                "embedding each, (images, dimensions); wrap it so that it does."
            )
        n_dimensions = n_dimensions or embeddings.shape[1]
        if embeddings.shape[1] != n_dimensions:
            raise ModelError(
                f"The encoder gives embeddings of {embeddings.shape[1]} dimensions from image "
                f"{int(index[0])} on, but of {n_dimensions} before; it must give as many for all."
            )
        wrong = ~embeddings.isfinite().all(1).cpu()
        if wrong.any():
            raise ModelError(
                f"The encoder gives NaN or infinite numbers for image {int(index[wrong][0])}; check"
                " the image, its preprocessing and the encoder's weights."
            )
        return embeddings.detach().cpu()

    with ExitStack() as stack, torch.no_grad():
        device = None
        if isinstance(module, nn.Module):
            stack.enter_context(undisturbed(module))
            if next(module.parameters(), None) is not None:
                device = device_of(module)
        yield encode


def load_batches(
    encoder: Encoder, dataset: Dataset[Any], batches: list[list[int]], workers: int
) -> Iterator[list[GoodItem]]:
    """Read a data set's images batch by batch, in the encoder's own preprocessing if it has one.

    Raises:
        DataError: an image cannot be read.
    """
    if isinstance(encoder, TimmEncoder) and all_hold(dataset, "picture"):
        dataset = _Pictures(dataset, encoder.transform)
    for items in load(dataset, batches, workers=workers):
        yield sort_out(items, skip_broken=False)[0]


class _Pictures(Dataset[tuple[Tensor, int]]):
    """A data set's pictures in another preprocessing; labels are of no concern here."""

    def __init__(self, dataset: Dataset[Any], transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return size_of(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = picture_of(self.dataset, index)
        assert picture is not None
        return self.transform(picture.convert("RGB")), -1


def _call(encoder: Encoder, images: Tensor) -> Tensor:
    """Call an encoder, telling in a sentence what goes wrong inside it."""
    try:
        with callers_device():
            embeddings = encoder(images)
    except ModelError:
        raise
    except Exception as error:  # of an encoder of anyone's own
        if memory_full(error):
            raise ModelError("The device is out of memory; lower batch_size.") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"The encoder cannot run on images of shape {tuple(images.shape[1:])} ({reason}); "
            "check size and channels of the images, and the encoder."
        ) from error
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        raise ModelError(
            f"The encoder gives {type(embeddings).__name__}, not a tensor of floating point "
            "numbers (images, dimensions); wrap it so that it does."
        )
    return embeddings
