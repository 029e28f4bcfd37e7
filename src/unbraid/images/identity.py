"""What identifies images: their ids, and the fingerprint of a whole data set."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from unbraid.base.errors import DataError, OutOfReach, out_of_reach
from unbraid.base.modes import callers_device
from unbraid.images.dataset import (
    any_changes_images,
    drawing_alike,
    gathered,
    groups_of,
    inner_of,
    is_known,
    own,
    plain,
    size_of,
    spaced,
)

# What becomes of pictures before a network sees them, as text: two texts differ if that does.


_CODE = re.compile(r" \[code [0-9a-f]{16}\]")
_FEW = 16  # numbers, which a text shows
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_USUAL = (torch.float32, torch.uint8)
_OF_MODULES = frozenset(vars(nn.Module()))  # what any module keeps
_MOST = 10_000  # objects looked at
# Kinds whose state moves with every use, by name, as their libraries need not be there.
_CHANGING = ("Generator", "RandomState", "Random", "lock", "RLock", "TextIOWrapper", "Logger")


def preprocessing_of(dataset: Dataset[Any]) -> str:
    """Describe all transforms on the way from the innermost data set to a network."""
    inner = inner_of(dataset)
    before = list(dict.fromkeys(map(preprocessing_of, inner)))
    inside = before[0] if len(before) == 1 else " | ".join(f"({text})" for text in before)
    texts = [inside, *map(_text_of, _transforms(dataset))]
    loader = getattr(dataset, "loader", None) if not inner else None  # of torchvision's folders
    if callable(loader) and not _of_library(loader):
        texts.append(_text_of(loader))
    return " then ".join(filter(None, texts))


def as_recorded(now: str, before: str) -> bool:
    """Whether an earlier version recorded a preprocessing, which did not look at anyone's code.

    >>> as_recorded("custom [code 0123456789abcdef]", "custom")
    True
    >>> as_recorded("custom [code 0123456789abcdef]", "custom [code ffffffffffffffff]")
    False
    """
    return now != before and _CODE.sub("", now) == before


def _transforms(dataset: Dataset[Any]) -> list[Any]:
    """What a data set does to images itself, in the order in which it keeps them."""
    found = own(dataset, "transform")[1]
    if found is None:
        joint = own(dataset, "transforms")[1]
        found = None if type(joint).__name__ == "StandardTransform" else joint
    others: list[Any] = []
    kept = vars(dataset) if hasattr(dataset, "__dict__") else {}
    lists_files = any(kept.get(name) is not None for name in ("samples", "ids"))
    if (inner_of(dataset) and not is_known(dataset)) or (lists_files and not _of_library(dataset)):
        names = ("transform", "transforms", "target_transform", "loader")
        others = [
            value
            for name, value in kept.items()
            if name not in names and callable(value) and not isinstance(value, Dataset)
        ]
    return [one for one in (found, *others) if one is not None]


def _text_of(transform: Any) -> str:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)  # which the texts of tensors leave out
        text = repr(transform)
    except Exception:  # of anyone's own
        text = " at 0x"
    finally:
        torch.set_default_dtype(before)
    # A default repr holds a memory address, which differs from run to run.
    text = text if " at 0x" not in text else getattr(transform, "__qualname__", "custom")
    parts: list[str] = []
    with suppress(Exception):  # of objects that do not let themselves be looked at
        parts.extend(_hidden(transform, False, {}))
    if not parts:
        return text
    kind = "code" if any(part.startswith("code ") for part in parts) else "values"
    return f"{text} [{kind} {hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}]"


def _hidden(value: Any, is_own: bool, seen: dict[int, Any]) -> Iterator[str]:
    """What the text of a transform does not tell, part by part.

    Args:
        value: the transform, or what it is made of.
        is_own: whether it is part of anyone's own code, whose text may tell nothing.
        seen: what was looked at, by its id.
    """
    if isinstance(value, _PLAIN):
        if is_own or (isinstance(value, torch.dtype) and value not in _USUAL):
            yield repr(value)
        return
    if id(value) in seen or len(seen) > _MOST:
        return
    seen[id(value)] = value
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        if is_own or np.prod(np.shape(value)) > _FEW:
            yield _filled_content(value)
    elif isinstance(value, dict):
        yield from _hidden([*value.items()], is_own, seen)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _hidden(one, is_own, seen)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(part for one in value for part in _hidden(one, is_own, seen))
    elif isinstance(value, functools.partial):
        yield from _hidden([value.func, value.args, value.keywords], True, seen)
    elif isinstance(value, MethodType):
        yield from _hidden([value.__func__, value.__self__], is_own, seen)
    elif isinstance(value, FunctionType):
        yield from _of_function(value, seen)
    elif isinstance(value, type):
        yield from _of_class(value, seen)
    elif not isinstance(value, (ModuleType, Dataset)):
        yield from _of_object(value, is_own, seen)


def _of_function(function: FunctionType, seen: dict[int, Any]) -> Iterator[str]:
    if _of_library(function):
        yield f"{function.__module__}.{function.__qualname__}"
        return
    yield from _of_code(function.__code__)
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    yield from _hidden([cells, function.__defaults__, function.__kwdefaults__], True, seen)
    known = function.__globals__
    for used in (known[name] for name in function.__code__.co_names if name in known):
        is_code = isinstance(used, (FunctionType, type)) and not _of_library(used)
        if is_code or isinstance(used, (*_PLAIN, tuple, list, dict, Tensor)):
            yield from _hidden(used, True, seen)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that has no value yet
        return False


def _of_code(code: CodeType) -> Iterator[str]:
    yield f"code {code.co_code.hex()} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        elif isinstance(constant, frozenset):  # which has another order in every process
            yield str(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _of_class(kind: type, seen: dict[int, Any]) -> Iterator[str]:
    for one in kind.__mro__:
        if _of_library(one):
            continue
        yield f"code {one.__qualname__}"
        for name, value in sorted(vars(one).items()):
            inside = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(inside, FunctionType) and not _of_library(inside):
                yield from _of_function(inside, seen)
            elif not name.startswith("__"):
                yield from _hidden(inside, True, seen)


def _of_object(value: Any, is_own: bool, seen: dict[int, Any]) -> Iterator[str]:
    kind = type(value)
    if kind.__name__ in _CHANGING:
        return
    its_own = not _of_library(kind)
    if its_own:
        yield from _hidden(kind, True, seen)
    elif is_own:
        yield f"{kind.__module__}.{kind.__qualname__} {_plainly(value)}"
    if isinstance(value, nn.Module):
        yield from _hidden([value._parameters, value._buffers], True, seen)
        yield from _hidden(value._modules, is_own, seen)
    slots = [name for one in kind.__mro__ for name in getattr(one, "__slots__", ()) if its_own]
    for name in [*getattr(value, "__dict__", ()), *slots]:
        if name not in _OF_MODULES and (its_own or not name.startswith("_")):
            yield from _hidden(getattr(value, name, None), its_own, seen)


def _plainly(value: Any) -> str:
    text = repr(value)
    return "" if " at 0x" in text else text


def _filled_content(value: Any) -> str:
    array = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value
    return f"{np.shape(array)} {hashlib.sha256(np.asarray(array).tobytes()).hexdigest()}"


def _of_library(thing: Any) -> bool:
    """Whether something is code of Python's own or of an installed library."""
    kind = thing if isinstance(thing, (type, FunctionType)) else type(thing)
    root = str(kind.__module__).split(".")[0]
    if root in sys.stdlib_module_names or root in ("builtins", "unbraid"):
        return root != "__main__"
    module = sys.modules.get(root)
    where = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(part in str(path) for path in where for part in ("site-packages", "dist-packages"))


# What identifies images: their ids, and the fingerprint of a whole data set.


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
