"""What a torch file holds, read without making any of its objects.

torch's own way of loading weights alone refuses what training scripts store beside them, and a
file of a kilobyte may tell it to take gigabytes. Here its pickles are gone through step by step.
Tensors, dictionaries, lists, numbers and text are made; everything else becomes an `Unmade`, so no
code is run. No storage is larger than the file has bytes for, and only those asked for are read.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_MOST = 2**24  # bytes of pickles; those of a thousand tensors have 2**18
_MOST_DIMS = 16
_ZIP = b"PK\x03\x04"  # by which torch tells its two formats apart
_MAGIC = 0x1950A86A20F9469CFC6C  # with which the older format begins
_HEADER = 30  # bytes before the name of a zip file's member
_COUNT = 8  # bytes of a storage's length, in the older format

_PLAIN = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
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


class Unmade(dict[Any, Any]):
    """Stands for an object that is not made; of a kind of dictionary, with its entries."""


@dataclass(frozen=True)
class _Storage:
    """Room for some numbers."""

    key: str
    numel: int
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A tensor that has not been read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Place:
    """Where bytes lie in a file."""

    begin: int
    size: int
    crc32: int = 0  # zero where none is known


@dataclass(frozen=True)
class TorchFile:
    """What a torch file holds: plain values, `View`s and `Unmade`s in dictionaries and lists."""

    path: Path
    content: Any
    _places: dict[str, _Place]  # of storages
    _read: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, view: View) -> Tensor:
        """Read a tensor; those of one storage share it."""
        storage = view.storage
        if storage.key not in self._read:
            self._read[storage.key] = self._read_storage(storage)
        return self._read[storage.key].as_strided(view.shape, view.strides, view.offset)

    def _read_storage(self, storage: _Storage) -> Tensor:
        if storage.size == 0:
            return torch.empty(0, dtype=storage.dtype)
        with self.path.open("rb") as file:
            content = _content(file, self._places[storage.key], storage.size)
        return torch.frombuffer(content, dtype=storage.dtype)


def read_torch_file(path: Path) -> TorchFile:
    """Look through a torch file, without reading its tensors.

    Raises:
        ValueError: it is damaged, would grow when it is read, or is none that `torch.save` wrote.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
        file.seek(0)
        content, places = (_look_through_zip if is_zip else _look_through_stream)(file, size)
    return TorchFile(path, content, places)


def _look_through_zip(file: BinaryIO, size: int) -> tuple[Any, dict[str, _Place]]:
    with zipfile.ZipFile(file) as archive:
        _refuse_programs(archive.namelist())
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
        order = f"{folder}/byteorder"
        if order in archive.namelist():
            place = _place(file, archive.getinfo(order))
            _refuse_big_endian(_content(file, place, place.size) == b"little")
        reading = _Reading(lambda key: archive.getinfo(f"{folder}/data/{key}").file_size)
        place = _place(file, main)
        content = reading.run(io.BytesIO(_content(file, place, place.size)))
        places = {
            key: _place(file, archive.getinfo(f"{folder}/data/{key}")) for key in reading.storages
        }
    return content, places


def _refuse_programs(names: list[str]) -> None:
    if any(name.endswith("/constants.pkl") for name in names):
        raise pickle.UnpicklingError("TorchScript is a program")
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError("torch.save has not written it; an exported program or arrays are no use")


def _refuse_big_endian(little: bool) -> None:
    if not little:
        raise ValueError("it was written by a machine of another byte order")


def _place(file: BinaryIO, member: zipfile.ZipInfo) -> _Place:
    """Where a member's content lies, behind a header of its own."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is packed")
    file.seek(member.header_offset)
    header = file.read(_HEADER)
    n_name, n_extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    begin = member.header_offset + _HEADER + n_name + n_extra
    return _Place(begin, member.file_size, member.CRC)


def _content(file: BinaryIO, place: _Place, size: int) -> bytearray:
    """Read bytes as they lie; zipfile would refuse those that torch wrote without a checksum.

    Raises:
        ValueError: they are not what was written.
    """
    file.seek(place.begin)
    content = bytearray(file.read(place.size))
    if len(content) < size or (place.crc32 and zlib.crc32(content) != place.crc32):
        raise ValueError("it is cut off or damaged")
    return content[:size] if size < len(content) else content


def _look_through_stream(file: BinaryIO, size: int) -> tuple[Any, dict[str, _Place]]:
    """The format before zip files: pickles in a row, then the storages' bytes."""
    pickles = io.BytesIO(file.read(_MOST))
    if _Reading(lambda _: 0).run(pickles) != _MAGIC:
        raise ValueError("torch.save has not written it")
    _, system = (_Reading(lambda _: 0).run(pickles) for _ in range(2))
    _refuse_big_endian(isinstance(system, dict) and system.get("little_endian") is True)
    weights = _Reading(lambda _: size)
    content = weights.run(pickles)
    if sum(storage.size for storage in weights.storages.values()) > size:
        raise ValueError("it claims to hold more than it is large")
    keys = _Reading(lambda _: 0).run(pickles)
    if not isinstance(keys, list) or {*weights.storages} != {k for k in keys if type(k) is str}:
        raise ValueError("it does not list its storages")
    places, at = {}, pickles.tell()
    for key in keys:
        storage = weights.storages[key]
        file.seek(at)
        if int.from_bytes(file.read(_COUNT), "little") != storage.numel:
            raise ValueError("a storage is of another size")
        places[key] = _Place(at + _COUNT, storage.size)
        at += _COUNT + storage.size
    if at > size:
        raise ValueError("it is cut off")
    return content, places


@dataclass
class _Reading:
    """A pickle being gone through, with stand-ins for all that is not plain."""

    room: Callable[[str], int]  # bytes that a storage of a name may take
    storages: dict[str, _Storage] = field(default_factory=dict)
    _stack: list[Any] = field(default_factory=list)
    _below: list[list[Any]] = field(default_factory=list)
    _memo: dict[int, Any] = field(default_factory=dict)

    def run(self, file: BinaryIO) -> Any:
        """Go through a pickle to its end, and say what it makes.

        Raises:
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
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("EMPTY_SET", "BYTEARRAY8"):
            stack.append(Unmade())
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name == "POP":
            stack.pop()
        elif name in ("POP_MARK", "ADDITEMS"):
            self._marked()
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
        elif name == "STACK_GLOBAL":
            own = stack.pop()
            stack.append(_named(f"{stack.pop()} {own}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == "NEWOBJ_EX":
            stack[-3:] = [Unmade()]
        elif name in ("OBJ", "INST", "FROZENSET"):
            self._marked()
            self._stack.append(Unmade())
        elif name == "BUILD":  # attributes, with which nothing is done
            stack.pop()
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise pickle.UnpicklingError(f"{name} is not needed for weights")

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _storage(self, named: Any) -> _Storage | Unmade:
        word, dtype, key, _, numel, *view = named
        if word != "storage" or any(v is not None for v in view):
            raise pickle.UnpicklingError("only storages are needed for weights")
        if not isinstance(key, str) or not _is_count(numel):
            raise ValueError("a storage has no name or no size")
        if not isinstance(dtype, torch.dtype):
            return Unmade()
        storage = self.storages.setdefault(key, _Storage(key, numel, dtype))
        if storage != _Storage(key, numel, dtype):
            raise ValueError("a storage stands there twice")
        if storage.size > self.room(key):
            raise ValueError("it claims to hold more than it is large")
        return storage


def _named(name: str) -> Any:
    module, _, own = name.partition(" ")
    if module == "torch" and own in _STORAGES:
        return _STORAGES[own]
    if module == "torch" and isinstance(getattr(torch, own, None), torch.dtype):
        return None  # nothing is done with it
    return _CALLS.get(name, Unmade())


def _call(function: Any, arguments: Any) -> Any:
    if any(function is known for known in _CALLS.values()):
        return function(*arguments)
    return Unmade()


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise pickle.UnpicklingError("only dictionaries have entries")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # To compare other keys may take for ever.
        plain = isinstance(key, (str, int, float, bytes)) or key is None
        target[key if plain else f"<{type(key).__name__}>"] = value if plain else Unmade()


def _append(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target += items
    elif not isinstance(target, Unmade):
        raise pickle.UnpicklingError("only lists are added to")


def _dictionary(*contents: Any) -> dict[Any, Any]:
    """An OrderedDict, or a defaultdict; a few bytes could ask for copies of others, so not made."""
    return Unmade() if any(isinstance(content, (dict, list)) for content in contents) else {}


def _tensor(
    storage: Any,
    offset: Any,
    sizes: Any,
    strides: Any,
    _grad: Any = False,
    _hooks: Any = None,
    metadata: Any = None,
) -> View | Unmade:
    """Raise unless a tensor lies within its storage."""
    if not isinstance(storage, _Storage) or metadata:  # such as that it is to be conjugated
        return Unmade()
    if type(sizes) is not tuple or type(strides) is not tuple:
        raise ValueError("a tensor's sizes are no counts")
    if len(sizes) != len(strides) or len(sizes) > _MOST_DIMS:
        raise ValueError("a tensor has too many dimensions")
    if not all(map(_is_count, (offset, *sizes, *strides))):
        raise ValueError("a tensor's sizes are no counts")
    reach = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
    if offset + (reach if all(sizes) else 0) > storage.numel:
        raise ValueError("a tensor is larger than its storage")
    return View(storage, offset, sizes, strides)


def _parameter(tensor: Any, *_others: Any) -> Any:
    return tensor


_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _dictionary,
    "collections defaultdict": _dictionary,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
}


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
