"""What identifies images: ids, the fingerprint of a data set, and its preprocessing as text."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise, repeat
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from unbraid.base.arguments import a_type
from unbraid.base.errors import DataError, UnfitPicture
from unbraid.base.modes import drawing_alike
from unbraid.base.team import join_team
from unbraid.images.broken import BrokenImage, plain, read_pair
from unbraid.images.dataset import (
    changes_images,
    gathered,
    groups_of,
    inner_of,
    is_known,
    own_list,
    spaced,
)
from unbraid.images.listing import look_at, seen_from
from unbraid.images.mapped import Numbers, Texts, in_bytes
from unbraid.images.which import own

N_HASHES = 2**64


def ids_of(dataset: Dataset[Any]) -> Sequence[str] | None:
    """Return what names each image for good, wherever it lies; None without, or if one is twice.

    That is `ids`, or the paths of `samples` below `root`, also of data sets inside others.
    """
    kept = own_list(dataset, "ids")
    if isinstance(kept, Texts):  # made sure of when they were listed
        return kept
    if kept is not None:
        return _checked(kept)
    files = _files_of(dataset)
    if files is not None:
        root = os.fspath(own(dataset, "root")[1])
        return _distinct([seen_from(root, path) for path in files])
    inside = gathered(dataset, ids_of, "ids", "samples")
    if inside is None or _distinct(inside) or not isinstance(dataset, ConcatDataset):
        return _distinct(inside)
    parts = [k for k, part in enumerate(dataset.datasets) for _ in range(len(part))]  # type: ignore[arg-type]
    return [f"{part}/{one}" for part, one in zip(parts, inside, strict=True)]


def _checked(ids: Sequence[Any]) -> list[str]:
    odd = next((one for one in ids if not isinstance(one, (str, int))), None)
    if odd is not None or None in ids:
        raise DataError(f"An id is {a_type(odd)}; give texts or numbers as ids.")
    texts = [str(one) for one in ids]
    twice = next((one for one, n in Counter(texts).items() if n > 1), None)
    if twice is not None:
        raise DataError(f"Two images have the id {twice!r}; give each image one of its own.")
    try:
        _encode("".join(texts))
    except UnicodeEncodeError as error:
        raise DataError(f"An id cannot be written as UTF-8 ({error}); give another.") from None
    return texts


def _distinct(ids: Sequence[str] | None) -> Sequence[str] | None:
    return ids if ids is not None and len(set(ids)) == len(ids) else None


def _files_of(dataset: Dataset[Any]) -> list[str] | None:
    """The image files of a folder, None for data sets of another kind."""
    if own(dataset, "root")[1] is None:
        return None
    samples = own_list(dataset, "samples")
    return None if samples is None else [str(sample[0]) for sample in samples]


def fingerprint(dataset: Dataset[Any], labels: Sequence[int]) -> str:
    """Hash what identifies a data set: labels, groups, and the images' ids and sizes in bytes.

    Where those are unknown, or code of anyone's own may change images, sixteen evenly spaced ones
    are read; they do not count if they differ each time.
    """
    told = own(dataset, "fingerprints")[1]
    key = key_of(dataset)
    if told is not None and key in told and labels is own(dataset, "targets")[1]:
        return str(told[key])
    digest = hashlib.sha256()
    groups = groups_of(dataset)
    for numbers in (labels, groups):
        for content in () if numbers is None else in_bytes(numbers):
            digest.update(content)
    ids, sizes = ids_of(dataset), sizes_of(dataset)
    for one, size in zip(ids or (), repeat("") if sizes is None else sizes, strict=False):
        digest.update(_encode(one) + f"\0{size}\0".encode())
    if ids is None or sizes is None or changes_images(dataset):
        first, again = ([_content(dataset, k) for k in spaced(len(labels))] for _ in range(2))
        if first == again:
            for content in first:
                digest.update(content)
    return digest.hexdigest()


def key_of(dataset: Dataset[Any]) -> str | None:
    """What tells a data set of a mapped list, with its labels, from any other; None without."""
    labels = own(dataset, "targets")[1]
    if not isinstance(labels, Numbers):
        return None
    return hashlib.sha256(f"{labels.mapped.identity} {labels.table}".encode()).hexdigest()


def agree(dataset: Dataset[Any]) -> None:
    """Let the first process hash a mapped list, and the others take its word if theirs is so too.

    Every process calls this, with the data set of one list.
    """
    key, labels = key_of(dataset), own(dataset, "targets")[1]
    told = join_team().lead(lambda: json.dumps({key: fingerprint(dataset, labels)}))
    dataset.fingerprints = json.loads(told)  # type: ignore[attr-defined]


def _content(dataset: Dataset[Any], index: int) -> bytes:
    """Numbers of an image; none of a broken one, which is the scan's to report, with its rules."""
    try:
        with drawing_alike():
            image = read_pair(dataset, index)[0]
    except (BrokenImage, UnfitPicture):
        return b""
    if not isinstance(image, Tensor):
        return b""
    numbers = plain(image, dataset, index).contiguous().flatten()
    return numbers.view(torch.uint8).numpy().tobytes()


def sizes_of(dataset: Dataset[Any]) -> Sequence[int] | None:
    """How large the images are where they lie, in bytes; -1 for a file that is gone."""
    sizes = own_list(dataset, "sizes")
    if sizes is not None:
        return sizes
    files = _files_of(dataset)
    if files is None:
        return gathered(dataset, sizes_of, "sizes", "samples")
    found = [look_at(file, f"Image {file}") for file in files]
    return [-1 if one is None else one.st_size for one in found]


def hash_of(one: str) -> int:
    """Number an id from 0 to 2**64 - 1: the first 8 bytes of the SHA-256 of its UTF-8 in NFC.

    >>> f"{hash_of('ant/1.png'):016x}"  # printf ant/1.png | sha256sum
    'ac634e41778ffd96'
    """
    # Systems write the same name in several forms of Unicode.
    digest = hashlib.sha256(_encode(unicodedata.normalize("NFC", one))).digest()
    return int.from_bytes(digest[:8], "big")


def pack_ids(ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Write ids as tensors: where each begins and the last ends, (n + 1,), and all bytes."""
    encoded = [_encode(one) for one in ids]
    starts = torch.tensor([0, *map(len, encoded)], dtype=torch.int64).cumsum(0)
    return starts, torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())


def unpack_ids(starts: Tensor, content: Tensor) -> list[str]:
    """Read ids from tensors."""
    text = content.numpy().tobytes()
    return [text[i:j].decode("utf-8", "surrogateescape") for i, j in pairwise(starts.tolist())]


def _encode(one: str) -> bytes:
    # A file's name may hold bytes that are no text; Python keeps them as surrogates.
    return one.encode("utf-8", "surrogateescape")


# --- what becomes of pictures before a network sees them, as text ---------------------------------

_CODE = re.compile(r" \[code [0-9a-f]{16}\]")
_FEW = 16  # numbers, which a text shows
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_USUAL = (torch.float32, torch.uint8)
_OF_MODULES = frozenset(vars(nn.Module()))  # what any module keeps
_MOST = 10_000  # objects looked at
# Kinds whose state moves with every use, by name, as their libraries need not be there.
_CHANGING = ("Generator", "RandomState", "Random", "lock", "RLock", "TextIOWrapper", "Logger")


def preprocessing_of(dataset: Dataset[Any]) -> str:
    """Describe all transforms from the innermost data set to a network, with the code they run."""
    inner = inner_of(dataset)
    before = list(dict.fromkeys(map(preprocessing_of, inner)))
    inside = before[0] if len(before) == 1 else " | ".join(f"({text})" for text in before)
    texts = [inside, *map(text_of, _transforms(dataset))]
    loader = getattr(dataset, "loader", None) if not inner else None  # of torchvision's folders
    if callable(loader) and not _of_library(loader):
        texts.append(text_of(loader))
    return " then ".join(filter(None, texts))


def as_recorded(now: str, before: str) -> bool:
    """Whether an earlier version recorded a text of functions, which did not look at their code."""
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


def text_of(transform: Any) -> str:
    """Describe a transform, or another function, with the code it runs and what it holds."""
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
    """What the text of a transform does not tell; parts `is_own` are of code of anyone's own."""
    if isinstance(value, _PLAIN):
        if is_own or (isinstance(value, torch.dtype) and value not in _USUAL):
            yield repr(value)
        return
    if id(value) in seen or len(seen) > _MOST:
        return
    seen[id(value)] = value
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        if is_own or np.prod(np.shape(value)) > _FEW:
            array = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value
            content = hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
            yield f"{np.shape(array)} {content}"
    elif isinstance(value, (list, tuple, dict)):
        for one in [*value.items()] if isinstance(value, dict) else value:
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
    cells: list[Any] = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # of a name that has no value yet
            cells.append(cell.cell_contents)
    cells = [one for one in cells if one is not None]
    yield from _hidden([cells, function.__defaults__, function.__kwdefaults__], True, seen)
    known = function.__globals__
    for used in (known[name] for name in function.__code__.co_names if name in known):
        is_code = isinstance(used, (FunctionType, type)) and not _of_library(used)
        if is_code or isinstance(used, (*_PLAIN, tuple, list, dict, Tensor)):
            yield from _hidden(used, True, seen)


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
        text = repr(value)
        yield f"{kind.__module__}.{kind.__qualname__} {'' if ' at 0x' in text else text}"
    if isinstance(value, nn.Module):
        yield from _hidden([value._parameters, value._buffers], True, seen)
        yield from _hidden(value._modules, is_own, seen)
    slots = [name for one in kind.__mro__ for name in getattr(one, "__slots__", ()) if its_own]
    for name in [*getattr(value, "__dict__", ()), *slots]:
        if name not in _OF_MODULES and (its_own or not name.startswith("_")):
            yield from _hidden(getattr(value, name, None), its_own, seen)


def _of_library(thing: Any) -> bool:
    """Whether something is code of Python's own or of an installed library."""
    kind = thing if isinstance(thing, (type, FunctionType)) else type(thing)
    root = str(kind.__module__).split(".")[0]
    if root in sys.stdlib_module_names or root in ("builtins", "unbraid"):
        return root != "__main__"
    module = sys.modules.get(root)
    where = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(part in str(path) for path in where for part in ("site-packages", "dist-packages"))
