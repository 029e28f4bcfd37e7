"""What identifies images: their ids, and the fingerprint of a whole data set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from unbraid.as_found import callers_device
from unbraid.data import gathered, groups_of, plain, size_of
from unbraid.errors import DataError, OutOfReach, out_of_reach
from unbraid.nested import any_changes_images, drawing_alike, own, spaced


def ids_of(dataset: Dataset[Any]) -> list[str] | None:
    """Return what names each image for good, whatever its place: its path, or its key in a shard.

    Looks for `ids`, texts or numbers, or for `samples` below `root` (the habit of torchvision's
    folders), also in data sets inside others; None where a data set says nothing, or takes an image
    twice. Where parts of a ConcatDataset name images alike, the part's number comes first.

    Raises:
        DataError: the data set's `ids` or `samples` are more or fewer than its images, ids name two
            by the same, or are neither texts nor numbers, or texts that cannot be written.
    """
    kept: Any = own(dataset, "ids")[1]
    kept = kept.tolist() if hasattr(kept, "tolist") else kept
    if isinstance(kept, Sequence) and not isinstance(kept, str):
        return _checked(kept, size_of(dataset))
    samples = _files_of(dataset)
    if samples is None:
        return _ids_inside(dataset)
    _refuse_other_number("samples", len(samples), size_of(dataset))
    root = os.fspath(_root_of(dataset))
    return _distinct([seen_from(root, path) for path in samples])


def _ids_inside(dataset: Dataset[Any]) -> list[str] | None:
    inside = gathered(dataset, ids_of, "ids", "samples")
    if inside is None or not isinstance(dataset, ConcatDataset):
        return inside and _distinct(inside)
    if _distinct(inside):
        return inside
    sizes = [len(part) for part in dataset.datasets]  # type: ignore[arg-type]
    parts = [k for k, size in enumerate(sizes) for _ in range(size)]
    return [f"{part}/{one}" for part, one in zip(parts, inside, strict=True)]


def _checked(ids: Sequence[Any], size: int) -> list[str]:
    _refuse_other_number("ids", len(ids), size)
    wrong = [one for one in ids if not isinstance(one, (str, int))]
    if wrong:
        raise DataError(f"An id is a {type(wrong[0]).__name__}; give texts or numbers as ids.")
    seen: set[str] = set()
    for one in map(str, ids):
        if one in seen:
            raise DataError(f"Two images have the id {one!r}; give each image one of its own.")
        try:
            _encode(one)
        except UnicodeEncodeError:
            raise DataError(f"The id {one!r} cannot be written as UTF-8; give another.") from None
        seen.add(one)
    return [str(one) for one in ids]


def _refuse_other_number(name: str, n: int, size: int) -> None:
    if n != size:
        raise DataError(
            f"The data set's {name} name {n} images of {size}; give one for each image."
        )


def _distinct(ids: list[str]) -> list[str] | None:
    return ids if len(set(ids)) == len(ids) else None


def _files_of(dataset: Dataset[Any]) -> list[str] | None:
    """The image files of a folder, None for data sets of another kind."""
    samples = own(dataset, "samples")[1]
    if samples is None or _root_of(dataset) is None:
        return None
    return [str(sample[0]) for sample in samples]


def _root_of(dataset: Dataset[Any]) -> Any:
    return own(dataset, "root")[1]


def seen_from(root: str, path: str) -> str:
    """Name a file as seen from a folder, with slashes on every system.

    >>> seen_from("/data/train", "/data/train/cat/1.png"), seen_from("/data/train", "/data/2.png")
    ('cat/1.png', '../2.png')
    """
    prefix = os.path.join(root, "")  # most files lie below, where relpath takes much longer
    one = path[len(prefix) :] if path.startswith(prefix) else os.path.relpath(path, root)
    return one.replace(os.sep, "/")


def fingerprint(dataset: Dataset[Any], labels: Sequence[int]) -> str:
    """Hash what identifies a data set: labels, groups, and the images' ids and sizes.

    Sizes, in bytes, are those of a folder's files, or the data set's own `sizes`. Where there are
    no ids or no sizes, or code of anyone's own reads images out of another data set, sixteen evenly
    spaced images are read. They do not count if they differ each time.

    Raises:
        DataError: ids, groups or sizes are more or fewer than the images, or these cannot be
            reached or have no content.
    """
    digest = hashlib.sha256(torch.tensor(labels, dtype=torch.int64).numpy().tobytes())
    groups = groups_of(dataset)
    if groups is not None:
        digest.update(torch.tensor(groups, dtype=torch.int64).numpy().tobytes())
    ids, sizes = ids_of(dataset), _sizes_of(dataset)
    for k, one in enumerate(ids or ()):
        size = "" if sizes is None else sizes[k]
        digest.update(_encode(one) + f"\0{size}\0".encode())
    if ids is None or sizes is None or any_changes_images(dataset):
        with_images, same = digest.copy(), True
        for index in spaced(len(labels)):
            content = _content(dataset, index)
            with_images.update(content)
            same = same and content == _content(dataset, index)
        digest = with_images if same else digest
    return digest.hexdigest()


def _content(dataset: Dataset[Any], index: int) -> bytes:
    """Numbers of an image; none of a broken one, which is the scan's to report, with its rules."""
    try:
        with drawing_alike(), callers_device():
            image = dataset[index][0]
    except OutOfReach:
        raise
    except Exception as error:
        if away := out_of_reach(f"Image {index} of the data set", error):
            raise away from None
        return b""
    if not isinstance(image, Tensor):
        return b""
    return plain(image, index).contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _sizes_of(dataset: Dataset[Any]) -> list[int] | None:
    """How large the images are where they lie, in bytes; -1 for a file that is gone."""
    sizes: Any = own(dataset, "sizes")[1]
    sizes = sizes.tolist() if hasattr(sizes, "tolist") else sizes
    if isinstance(sizes, Sequence):
        _refuse_other_number("sizes", len(sizes), size_of(dataset))
        return list(sizes)
    files = _files_of(dataset)
    if files is None:
        return gathered(dataset, _sizes_of, "sizes", "samples")
    return [_size_of_file(file) for file in files]


def _size_of_file(file: str) -> int:
    try:
        return os.stat(file).st_size
    except (OSError, ValueError) as error:  # the latter for what can be no file's name
        if away := out_of_reach(f"Image {file}", error):
            raise away from None
        return -1


def pack_ids(ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Write ids as tensors.

    Returns:
        (N + 1,) int64, where each begins and the last ends, and (bytes,) uint8, all in a row.

    >>> pack_ids(["a/1", "b"])
    (tensor([0, 3, 4]), tensor([97, 47, 49, 98], dtype=torch.uint8))
    """
    encoded = [_encode(one) for one in ids]
    starts = torch.tensor([0, *map(len, encoded)], dtype=torch.int64).cumsum(0)
    return starts, torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())


def unpack_ids(starts: Tensor, content: Tensor) -> list[str]:
    """Read ids from tensors.

    >>> unpack_ids(*pack_ids(["a/1.png", "", "é"]))
    ['a/1.png', '', 'é']
    """
    text = content.numpy().tobytes()
    return [text[i:j].decode("utf-8", "surrogateescape") for i, j in pairwise(starts.tolist())]


def fit_ids(n_images: int, starts: Tensor | None, content: Tensor | None) -> bool:
    """Whether tensors read from a file are the ids of so many images, or there are none."""
    if starts is None or content is None:
        return starts is content
    return (
        starts.dtype == torch.int64
        and content.dtype == torch.uint8
        and starts.shape == (n_images + 1,)
        and content.shape == (int(starts[-1]),)
        and int(starts[0]) == 0
        and not bool((starts.diff() < 0).any())
    )


def _encode(one: str) -> bytes:
    # A file's name may hold bytes that are no text; Python keeps them as surrogates.
    return one.encode("utf-8", "surrogateescape")
