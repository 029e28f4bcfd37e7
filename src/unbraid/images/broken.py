"""When an image counts as broken, so that a scan may leave it out, and when a fault stops a scan.

Broken is what decoding rejects, and a missing file whose folder is there. All else is no fault of
one image: memory that is full, a server that is away, a data set that gives something else.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from unbraid.base.arguments import a_type
from unbraid.base.errors import DataError, OutOfReach, UnfitPicture, brief, out_of_reach
from unbraid.base.modes import callers_device
from unbraid.images.which import holder_of, which_image

UNLABELLED = -1  # in place of a label, where a data set has none
_N_TRIED = 20  # images, in search of one that can be read
_N_COMPARED = 8  # images at most, in search of a large one
_N_KEYS = 12  # of a dictionary, that a message names
NO_IMAGE = torch.empty(0, dtype=torch.float32)


class BrokenImage(DataError):
    """An image cannot be read, and will not be another time."""


class Loaded(NamedTuple):
    """What came of reading one image."""

    index: int  # type: ignore[assignment]  # which a tuple has a method of
    image: Tensor  # (C, H, W); empty where there is a fault
    label: int
    fault: DataError | None = None  # a BrokenImage may be left out, another one stops the work


def failed(index: int, fault: DataError) -> Loaded:
    """Say why an image did not come."""
    return Loaded(index, NO_IMAGE, UNLABELLED, fault)


def sort_out(items: Sequence[Loaded], skip_broken: bool) -> tuple[list[Loaded], list[int]]:
    """Part what was read into good images and the indices of broken ones; raise other faults."""
    broken = [item for item in items if isinstance(item.fault, BrokenImage)]
    for item in items:
        if item.fault is not None and not isinstance(item.fault, BrokenImage):
            # A copy, as one that holds itself by its traceback would hold worker processes too.
            raise type(item.fault)(str(item.fault))
    if broken and not skip_broken:
        remedy = "Mend or remove it, or leave it out with skip_broken=True."
        raise DataError(f"{broken[0].fault} {remedy}")
    return [item for item in items if item.fault is None], [item.index for item in broken]


class Readable(Dataset[Loaded]):
    """A data set of (image, label) whose faults are items, so that none kills a worker process."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        """Wrap a data set."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Loaded:
        """Read one image."""
        try:
            image, label = read_pair(self.dataset, index)
            image = plain(image, self.dataset, index)
            return Loaded(index, image, to_label(label, self.dataset, index))
        except DataError as fault:
            return failed(index, fault.with_traceback(None))
        except Exception as error:  # which does not let itself be looked at
            told = f"{_begin(self.dataset, index)} cannot be read ({type(error).__name__})."
            return failed(index, BrokenImage(told))


def first_readable(dataset: Dataset[Any], indices: Sequence[int]) -> Tensor | None:
    """Return the first image of these that can be read, None if the first twenty are broken."""
    readable = Readable(dataset)
    for index in indices[:_N_TRIED]:
        good, _ = sort_out([readable[index]], skip_broken=True)
        if good:
            return good[0].image
    return None


def largest_readable(dataset: Dataset[Any], indices: Sequence[int]) -> Tensor | None:
    """Return the largest of some images, evenly spaced, and of the first that can be read, if any.

    So memory that holds as many of it holds most batches, where images are of several sizes.
    """
    spaced = indices[:: math.ceil(len(indices) / _N_COMPARED) or 1]
    tried = [first_readable(dataset, indices), *(first_readable(dataset, [k]) for k in spaced[1:])]
    return max((image for image in tried if image is not None), key=Tensor.numel, default=None)


def read_pair(dataset: Dataset[Any], index: int) -> tuple[Any, Any]:
    """Read an image and its label, of any type; raises a BrokenImage or another DataError."""
    before = sys.exception()  # what is being handled by now is no cause of what comes
    try:
        with callers_device():
            item = dataset[index]
    except (OutOfReach, UnfitPicture):
        raise
    except DataError as error:
        raise BrokenImage(str(error)) from None
    except Exception as error:
        name = _begin(dataset, index)
        if "re-initialize CUDA in forked subprocess" in brief(error):
            raise DataError(
                f"{name} needs the accelerator, which worker processes cannot use; give images on "
                "the processor, or scan with workers=0."
            ) from None
        broken = BrokenImage(f"{name} cannot be read ({brief(error)}).")
        raise (out_of_reach(name, error, before) or broken) from None
    is_pair = isinstance(item, Sequence) and not isinstance(item, (str, bytes)) and len(item) == 2
    if item is None or (is_pair and item[0] is None and not _prepared(dataset, index)):
        raise BrokenImage(f"{_begin(dataset, index)} is None.")
    if is_pair:
        return item[0], item[1]
    what = f"a {type(item).__name__}"
    if isinstance(item, Mapping):
        what = f"a dictionary (keys: {', '.join(map(repr, list(item)[:_N_KEYS]))})"
    elif isinstance(item, (list, tuple)):
        what += f" of {len(item)}"
    raise DataError(
        f"The data set gives {what} for {which_image(dataset, index)}, not an image and its label; "
        "let its __getitem__ return (image, label), or use unbraid.from_hugging_face."
    )


def _prepared(dataset: Dataset[Any], index: int) -> bool:
    """Whether an image is what a preprocessing made of a file, so that the file is not to blame."""
    held = holder_of(dataset, index, "listed_in")
    return held is not None and getattr(held[0], "transform", None) is not None


def _begin(dataset: Dataset[Any], index: int) -> str:
    """Name an image as the first words of a sentence."""
    name = which_image(dataset, index)
    return f"I{name[1:]}"


def to_label(label: Any, dataset: Dataset[Any], index: int) -> int:
    """Make a number of a label of any type."""
    try:
        label = label.detach() if isinstance(label, Tensor) else label
        number = int(label)
        if abs(number) < 2**63 and (isinstance(label, str) or number == label):
            return number
    except Exception:  # of types of anyone's own
        pass
    shape = tuple(getattr(label, "shape", ()))
    of_shape = f"it is of shape {shape}; " if shape else ""
    raise DataError(
        f"The label of {which_image(dataset, index)} is {a_type(label)}, not a class's number; "
        f"{of_shape}"
        f"give one image and one number at a time, {UNLABELLED} where none is known (and scan with "
        "labels='predicted'), and unbraid.one_per_label(dataset) where an image has several."
    )


def plain(image: Any, dataset: Dataset[Any], index: int) -> Tensor:
    """Bring an image to the processor, as numbers alone: no gradient, no type of its own."""
    kind = type(image).__name__
    if not isinstance(image, Tensor) and _prepared(dataset, index):
        raise DataError(
            f"The preprocessing returned {a_type(image)} where a tensor is wanted, for "
            f"{which_image(dataset, index)}; let it return a tensor."
        )
    if not isinstance(image, Tensor):
        is_picture = isinstance(image, (Image.Image, np.ndarray))
        remedy = "give the data set a transform" if is_picture else "let it give (image, label)"
        name = _begin(dataset, index)
        raise DataError(f"{name} is {a_type(image)}, not a tensor; {remedy}.")
    is_odd = image.is_nested or image.layout != torch.strided or image.device.type == "meta"
    if not (is_odd or image.is_complex() or image.is_quantized):
        with suppress(Exception), torch.no_grad():  # of a type of anyone's own
            found = image.as_subclass(Tensor).detach().cpu().resolve_conj().resolve_neg()
            found = found.clone() if found.is_inference() else found
            if type(found) is Tensor:
                return found
    layout = "nested" if image.is_nested else str(image.layout).removeprefix("torch.")
    numbers = str(image.dtype).removeprefix("torch.")
    raise DataError(
        f"{_begin(dataset, index)} is a {layout} {kind} of {numbers} on device "
        f"{image.device.type}; let the data set give plain tensors of real numbers."
    )
