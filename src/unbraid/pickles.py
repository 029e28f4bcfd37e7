"""What a torch file would make, worked out before torch makes it.

torch's own way of loading weights alone runs no code, yet a file of a kilobyte may tell it to take
gigabytes. Here its pickles are gone through step by step, with nothing made of them: only what
state dicts need is let through, and no storage that is larger than the file has bytes for.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

_MOST = 2**24  # bytes of pickles; those of a thousand tensors have 2**18
_MOST_DIMS = 16
_ZIP = b"PK\x03\x04"  # by which torch tells its two formats apart
_BEFORE = 3  # pickles before that of the weights, in the older format: magic number and so on

_PLAIN = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINSTRING", "SHORT_BINSTRING"),
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


@dataclass(frozen=True)
class _Kind:
    """A type of storage, by the bytes of a number in it."""

    size: int


@dataclass(frozen=True)
class _Storage:
    """Room for some numbers."""

    numel: int
    kind: _Kind


class _Ordered(dict[Any, Any]):
    """What stands for an OrderedDict."""


def refuse_harm(path: Path) -> None:
    """Look through a torch file, and raise if it is more than weights.

    Raises:
        UnpicklingError: it holds code or objects.
        ValueError: it is damaged, or would grow when it is read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
        file.seek(0)
        if is_zip:
            _look_through_zip(file, size)
        else:
            _look_through_stream(file, size)


def _look_through_zip(file: BinaryIO, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > size:
            raise ValueError("it claims to hold more than it is large")
        names = {member.filename.casefold() for member in members}
        folders = {member.filename.partition("/")[0] for member in members}
        if len(names) < len(members) or len(folders) != 1:
            raise ValueError("it holds two files of one name, or of two archives")
        (folder,) = folders
        main = archive.getinfo(f"{folder}/data.pkl")
        if main.file_size > _MOST:
            raise ValueError("its description is too large")

        def room(key: str) -> int:
            return archive.getinfo(f"{folder}/data/{key}").file_size

        _Reading(room).run(io.BytesIO(archive.read(main)))


def _look_through_stream(file: BinaryIO, size: int) -> None:
    """The format before zip files: pickles in a row, then the storages' bytes."""
    pickles = io.BytesIO(file.read(_MOST))
    for _ in range(_BEFORE):
        _Reading(lambda _: 0).run(pickles)
    weights = _Reading(lambda _: size)
    weights.run(pickles)
    if sum(storage.numel * storage.kind.size for storage in weights.storages.values()) > size:
        raise ValueError("it claims to hold more than it is large")
    keys = _Reading(lambda _: 0).run(pickles)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it does not list its storages")


@dataclass
class _Reading:
    """A pickle being gone through, as torch does, with stand-ins for all that is made."""

    room: Callable[[str], int]  # bytes that a storage of a name may take
    storages: dict[str, _Storage] = field(default_factory=dict)
    _stack: list[Any] = field(default_factory=list)
    _below: list[list[Any]] = field(default_factory=list)
    _memo: dict[int, Any] = field(default_factory=dict)

    def run(self, file: BinaryIO) -> Any:
        """Go through a pickle to its end, and say what it makes.

        Raises:
            UnpicklingError: it makes something that weights do not need.
            ValueError: it is damaged, or a storage is larger than its room.
        """
        for opcode, argument, _ in pickletools.genops(file):
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PLAIN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name == "TUPLE":
            whole = tuple(self._marked())
            self._stack.append(whole)
        elif name in _TUPLES:
            n = _TUPLES[name]
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("SETITEM", "SETITEMS"):
            items = self._marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _set(self._stack[-1], items)
        elif name in ("APPEND", "APPENDS"):
            items = self._marked() if name == "APPENDS" else [stack.pop()]
            _append(self._stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_named(argument))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == "BUILD":
            _build(stack[-2], stack.pop())
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "STOP"):
            raise pickle.UnpicklingError(f"{name} is not needed for weights")

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _storage(self, named: Any) -> _Storage:
        word, kind, key, _, numel, *view = named
        if word != "storage" or not isinstance(kind, _Kind) or any(v is not None for v in view):
            raise pickle.UnpicklingError("only storages are needed for weights")
        if not isinstance(key, str) or not _is_count(numel):
            raise ValueError("a storage has no name or no size")
        storage = self.storages.setdefault(key, _Storage(numel, kind))
        if storage != _Storage(numel, kind):
            raise ValueError("a storage stands there twice")
        if numel * kind.size > self.room(key):
            raise ValueError("it claims to hold more than it is large")
        return storage


def _named(name: str) -> Any:
    module, _, own = name.partition(" ")
    if module == "torch" and own in _STORAGES:
        return _Kind(_STORAGES[own].itemsize)
    if module == "torch" and isinstance(getattr(torch, own, None), torch.dtype):
        return None  # nothing is done with it
    if name in _CALLS:
        return _CALLS[name]
    raise pickle.UnpicklingError(f"{name} is not needed for weights")


def _call(function: Any, arguments: Any) -> Any:
    if not any(function is known for known in _CALLS.values()):
        raise pickle.UnpicklingError("only tensors and dictionaries are made")
    return function(*arguments)


def _build(made: Any, state: Any) -> None:
    """Attributes of a state dict: versions of modules, no more, as any number might be copied."""
    if not isinstance(made, _Ordered) or type(state) is not dict or set(state) - {"_metadata"}:
        raise pickle.UnpicklingError("attributes are not needed for weights")


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise pickle.UnpicklingError("only dictionaries have entries")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int, float)):
            raise pickle.UnpicklingError("entries have names or numbers")
        target[key] = value


def _append(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise pickle.UnpicklingError("only lists are added to")
    target += items


def _ordered(*contents: Any) -> _Ordered:
    if contents:  # a few bytes could ask for copies of anything, again and again
        raise pickle.UnpicklingError("dictionaries of weights are made empty")
    return _Ordered()


def _tensor(
    storage: Any, offset: Any, sizes: Any, strides: Any, _grad: Any = False, _hooks: Any = None
) -> None:
    """Raise unless a tensor lies within its storage, which torch would enlarge for it."""
    if not isinstance(storage, _Storage) or type(sizes) is not tuple or type(strides) is not tuple:
        raise pickle.UnpicklingError("a tensor is made of something else than a storage")
    if len(sizes) != len(strides) or len(sizes) > _MOST_DIMS:
        raise ValueError("a tensor has too many dimensions")
    if not all(map(_is_count, (offset, *sizes, *strides))):
        raise ValueError("a tensor's sizes are no counts")
    reach = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
    if offset + (reach if all(sizes) else 0) > storage.numel:
        raise ValueError("a tensor is larger than its storage")


def _parameter(tensor: Any, _grad: Any, _hooks: Any) -> Any:
    return tensor


_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
