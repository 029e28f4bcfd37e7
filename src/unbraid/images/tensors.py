"""Files of tensors: .npy, .pt and .safetensors, and TIFFs of several bands. None runs code."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from unbraid.base.errors import (
    DataError,
    UnfitPicture,
    UsageError,
    brief,
    memory_full,
    out_of_reach,
)
from unbraid.base.tables import one_line
from unbraid.images.pictures import require_file
from unbraid.images.tiff import TIFF, holds_bands, read_bands
from unbraid.networks.checkpoints import load_safely
from unbraid.networks.outputs import numbers_in

TENSORS = (".npy", ".pt", ".pth", ".safetensors")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def is_tensor_name(path: str) -> bool:
    """Whether a file is named as one of tensors; what a TIFF holds, its name does not say."""
    return os.path.splitext(path)[1].lower() in TENSORS


def hold_tensors(paths: Iterable[str]) -> bool:
    """Whether image files hold tensors, not pictures; the first one that can be read tells."""
    for path in paths:
        if os.path.splitext(path)[1].lower() not in TIFF:
            return is_tensor_name(path)
        found = holds_bands(path)
        if found is not None:
            return found
    return False


def refuse_both(source: str, paths: Iterable[str]) -> None:
    """Raise DataError of files that are named as pictures and as tensors."""
    before: str | None = None
    for path in paths:
        if os.path.splitext(path)[1].lower() in TIFF:
            continue
        before = before or path
        if is_tensor_name(path) != is_tensor_name(before):
            tensor, picture = sorted((path, before), key=is_tensor_name, reverse=True)
            raise DataError(
                f"{source} holds both tensors, such as {one_line(tensor)}, and pictures, such as "
                f"{one_line(picture)}; move one or the other elsewhere."
            )


def read_tensor(path: str) -> Tensor:
    """Read an image file that holds one tensor, with its numbers as they lie there.

    Raises:
        OutOfReach: it cannot be read for now.
        UnfitPicture: it is sound, but a picture, or needs a library that is not installed.
        DataError: it is damaged or holds something else.
    """
    shown = f"Image {one_line(path)}"
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (*TENSORS, *TIFF):
        raise UnfitPicture(
            f"{shown} is a picture, and the first of the images is a tensor; move one or the other "
            "elsewhere."
        )
    require_file(path, shown)
    try:
        held = [read_bands(path)] if suffix in TIFF else numbers_in(_read(Path(path)))
        return _only_tensor(held)
    except UnfitPicture:
        raise
    except pickle.UnpicklingError:
        raise DataError(
            f"{shown} cannot be read (it is damaged or holds Python objects, which are never "
            "loaded)."
        ) from None
    except Exception as error:  # readers raise almost anything on damaged files
        of_system = isinstance(error, OSError) or memory_full(error)
        away = out_of_reach(shown, error) if of_system else None
        raise away or DataError(f"{shown} cannot be read ({brief(error)}).") from None


def _only_tensor(held: list[Tensor]) -> Tensor:
    """The one tensor that a file holds, of real numbers; ValueError of anything else."""
    if len(held) != 1:
        raise ValueError(f"it holds {len(held)} tensors, and an image is one")
    tensor = held[0].detach()
    odd = tensor.is_nested or tensor.layout != torch.strided or tensor.device.type == "meta"
    if odd or tensor.is_complex() or tensor.is_quantized:
        kind = str(tensor.layout if tensor.layout != torch.strided else tensor.dtype)
        raise ValueError(f"it holds a tensor of {kind.removeprefix('torch.')}, not real numbers")
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise ValueError(f"it holds a tensor of shape {tuple(tensor.shape)}")
    if tensor.nbytes > tensor.untyped_storage().nbytes():  # a few bytes would take any memory
        raise ValueError(f"it holds fewer numbers than its shape {tuple(tensor.shape)}")
    return tensor


def read_tensor_file(path: str | Path) -> Any:
    """Read what such a file holds, tensors in containers perhaps."""
    file = Path(path)
    try:
        return _read(file)
    except Exception as error:  # readers raise almost anything on damaged files
        why = brief(error)
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to let the file run code
            why = "it is damaged or holds more than tensors"
        elif not isinstance(error, OSError):
            why = f"it is damaged or holds no tensor: {why}"
        raise UsageError(
            f"{path} cannot be read ({why}); give a tensor as .npy, .pt or .safetensors."
        ) from None


def _read(file: Path) -> Any:
    suffix = file.suffix.lower()
    if suffix == ".safetensors":
        try:
            return safetensors.torch.load(file.read_bytes())
        except safetensors.SafetensorError as error:
            raise ValueError(brief(error)) from None
    with file.open("rb") as opened:
        if suffix == ".npy":
            return _read_array(opened)
        return load_safely(opened)


def _read_array(file: BinaryIO) -> Tensor:
    """Read an array of numbers, of exactly as many bytes as the file has."""
    header = _HEADERS.get(np.lib.format.read_magic(file))
    if header is None:
        raise ValueError("it is of a version of .npy that arrays of numbers do not need")
    shape, by_columns, dtype = header(file)
    if dtype.hasobject:
        raise pickle.UnpicklingError("an array of Python objects")
    if dtype.kind not in "biufc":
        raise ValueError(f"it holds {dtype}, not numbers")
    n_bytes, left = dtype.itemsize * math.prod(shape), os.fstat(file.fileno()).st_size - file.tell()
    if n_bytes != left:
        raise ValueError(f"it has {left} bytes of numbers, and its header says {n_bytes}")
    flat = np.fromfile(file, dtype, math.prod(shape)).astype(dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(flat.reshape(shape, order="F" if by_columns else "C")).contiguous()


class AsFloat32:
    """What becomes of tensors where no preprocessing is given for them, and nothing else."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Bring to float32; whole numbers are not scaled."""
        return tensor.to(torch.float32)

    def __repr__(self) -> str:
        """Say so, as a scan's manifest and a page tell it."""
        return "tensors as they lie in their files, as float32"


def first_of(paths: Iterable[str]) -> tuple[str, Tensor] | None:
    """The first of some files that can be read, and its tensor; None if all are broken."""
    for path in paths:
        try:
            return path, read_tensor(path)
        except DataError:
            continue
    return None
