"""A network's weights as a whole: their identity and their health."""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unbraid.base.errors import ModelError, brief
from unbraid.networks.copying import unwrap

# What a torch file holds, read without making any of its objects.


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


# Which of the tensors in a checkpoint are a network's: found by their names, not by its keys.


# By which torch.compile, DataParallel, FSDP and checkpointing name the network inside.
_WRAPPERS: Set[str] = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
# In names of what is kept beside the weights that were trained.
_COPIES = {"ema", "teacher", "swa", "averaged", "average", "avg", "shadow", "momentum", "target"}
_EXTRA_STATE = "_extra_state"  # which modules store as they like
_MOST_TENSORS = 2**17
_MOST_SETS = 100
_MOST_PARTS = 64
_LONGEST = 500  # characters of a key

Name = tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A tensor in a checkpoint."""

    name: Name  # parts between dots, after the keys of the dictionaries around it
    holder: int  # which dictionary it lies in
    value: Any

    @property
    def text(self) -> str:
        """Its name for people."""
        return ".".join(self.name)


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds, as far as it concerns weights."""

    tensors: list[Found]
    objects: bool  # whether it holds some that are not made


@dataclass(frozen=True)
class Candidate:
    """Tensors whose names, less a prefix, are a network's."""

    prefix: Name
    taken: dict[str, Found]  # by the network's names
    extra: dict[str, Found]  # beside them, which it does not have

    @property
    def text(self) -> str:
        """Where they lie, for people."""
        return ".".join(self.prefix) or "no prefix"


def find_tensors(content: Any) -> Content:
    """Find all named tensors in dictionaries and lists inside of one another, outermost first.

    Raises:
        ValueError: there are too many.
    """
    tensors: list[Found] = []
    objects = isinstance(content, Unmade)
    seen = {id(content)}  # as a few bytes may name one dictionary again and again
    queue: deque[tuple[Name, Any]] = deque([((), content)])
    while queue:
        around, holder = queue.popleft()
        for key, value in _key_parts(holder):
            objects = objects or isinstance(value, Unmade)
            name = (*around, *str(key).split("."))
            if len(name) > _MOST_PARTS or len(str(key)) > _LONGEST:
                continue
            if isinstance(value, (View, Tensor)) or name[-1] == _EXTRA_STATE:
                if isinstance(key, str):
                    tensors.append(Found(name, id(holder), value))
            elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
                seen.add(id(value))
                queue.append((name, value))
        if len(tensors) > _MOST_TENSORS:
            raise ValueError("it holds too many tensors")
    return Content(tensors, objects)


def _key_parts(holder: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(holder, Mapping):
        return holder.items()
    return enumerate(holder) if isinstance(holder, (list, tuple)) else ()


def candidates(tensors: Sequence[Found], own: Iterable[str]) -> list[Candidate]:
    """Find sets of tensors that may be a network's, the one that has most of its names first.

    Args:
        tensors: of a checkpoint.
        own: names in the network's state dict. Names of wrappers in either do not matter.
    """
    names = [tuple(name.split(".")) for name in own]
    wrappers = _WRAPPERS
    if len({_without(wrappers, name) for name in names}) < len(names):
        wrappers = frozenset()  # as the network itself uses such names to tell tensors apart
    wanted = {_without(wrappers, name): ".".join(name) for name in names}
    taken: dict[Name, dict[str, Found]] = {}
    for found in tensors:
        bare: Name = ()
        for at in range(len(found.name) - 1, -1, -1):
            if found.name[at] in wrappers:
                continue
            bare = (found.name[at], *bare)
            if bare in wanted:
                taken.setdefault(found.name[:at], {}).setdefault(wanted[bare], found)
    if not taken and tensors:  # a network may know older names of its own
        most, _ = Counter(found.holder for found in tensors).most_common(1)[0]
        inside = [found.name for found in tensors if found.holder == most]
        taken[_common(inside)] = {}
    largest = sorted(taken.items(), key=lambda item: -len(item[1]))[:_MOST_SETS]
    made = []
    for prefix, values in largest:
        extra = {
            ".".join(_without(wrappers, found.name[len(prefix) :])): found
            for found in _behind(prefix, tensors, values)
        }
        made.append(Candidate(prefix, values, extra))
    return made


def _without(wrappers: Set[str], name: Name) -> Name:
    return tuple(part for part in name if part not in wrappers)


def _common(names: Sequence[Name]) -> Name:
    """The parts that all names begin with; of one name alone, all but its last."""
    low, high = min(names), max(names)
    n = next((k for k, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: min(n, len(low) - 1)]


def _behind(prefix: Name, tensors: Sequence[Found], taken: Mapping[str, Found]) -> Iterator[Found]:
    """What lies behind the prefix too, in the same dictionaries."""
    holders = {found.holder for found in taken.values()}
    used = {id(found) for found in taken.values()}
    for found in tensors:
        beside = found.holder in holders or not taken
        if beside and found.name[: len(prefix)] == prefix and id(found) not in used:
            yield found


def completed(candidate: Candidate, model: nn.Module) -> dict[str, Any]:
    """Give the values for a network's names, with those that files may lack.

    Those are counts of batches, which older torch did not have, and of tensors that the network
    has under several names all but one.
    """
    own = model.state_dict(keep_vars=True)
    values = {name: found.value for name, found in candidate.taken.items()}
    first = {id(own[name]): name for name in values if isinstance(own[name], Tensor)}
    for name in own.keys() - values.keys():
        if id(own[name]) in first:
            values[name] = values[first[id(own[name])]]
        elif name.endswith("num_batches_tracked"):
            values[name] = own[name]
    return values


def misshapen(values: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Names of tensors that have another shape in the network."""
    return [name for name, value in values.items() if not _fits(value, own[name])]


def _fits(value: Any, own: Any) -> bool:
    if not isinstance(value, (View, Tensor)) or not isinstance(own, Tensor) or is_lazy(own):
        return True
    shape = tuple(value.shape)
    return shape == tuple(own.shape) or (shape == (1,) and own.dim() == 0)  # as once saved


def is_copy(candidate: Candidate) -> bool:
    """Whether it is an average or the like, kept beside the weights that were trained.

    >>> is_copy(Candidate(("state_dict_ema",), {}, {})), is_copy(Candidate(("schema",), {}, {}))
    (True, False)
    """
    return any(
        word in _COPIES for part in candidate.prefix for word in re.split("[^a-z]+", part.lower())
    )


def distinct(found: Sequence[Candidate]) -> list[Candidate]:
    """Leave out candidates of the very same tensors as another one."""
    kept: list[Candidate] = []
    for candidate in found:
        if not any(_same(candidate, other) for other in kept):
            kept.append(candidate)
    return kept


def _same(one: Candidate, other: Candidate) -> bool:
    return one.taken.keys() == other.taken.keys() and all(
        found.value is other.taken[name].value
        or (isinstance(found.value, View) and found.value == other.taken[name].value)
        for name, found in one.taken.items()
    )


def classes_of(
    values: Mapping[str, Any], own: Mapping[str, Any], others: Sequence[str]
) -> tuple[int, int] | None:
    """Numbers of classes in file and network, if they differ in nothing else; None otherwise."""
    pairs = {(tuple(values[name].shape), tuple(own[name].shape)) for name in others}
    counts = {(one[:1], two[:1]) for one, two in pairs if one[1:] == two[1:]}
    if len(counts) != 1 or any(one[1:] != two[1:] for one, two in pairs):
        return None
    ((one, two),) = counts
    return (one[0], two[0]) if one and two else None


# State dicts from files that anyone may have written; code in them is never run.


_NEVER = "Python code or objects, which are never loaded"
_N_NAMED = 3
_N_KEYS = 8
_LENGTH = 80  # characters of a name in a message


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from a safetensors or torch file; code in it is never run.

    It may lie inside of other dictionaries, and its names may have a prefix or names of wrappers.

    Raises:
        ModelError: the file is missing, holds code, or does not fit the network.
    """
    content, found, read = _open(path)
    if not found.tensors:
        keys = f" (its keys are {_keys(content)})" if _keys(content) else ""
        if found.objects:
            raise ModelError(
                f"{path} holds {_NEVER}{keys}; save the state dict alone, best as safetensors."
            )
        raise ModelError(f"{path} holds no state dict{keys}; save `model.state_dict()`.")
    own = model.state_dict(keep_vars=True)
    chosen = _choose(candidates(found.tensors, own), model, path)
    values = {
        **{name: extra.value for name, extra in chosen.extra.items()},
        **completed(chosen, model),
    }
    try:
        state = {name: _made(value, read) for name, value in values.items()}
    except pickle.UnpicklingError:
        raise ModelError(f"{path} holds {_NEVER}, in the weights; save them as tensors.") from None
    except (OSError, ValueError) as error:
        raise _unread(path, error) from None
    _refuse_other_numbers(path, state, model)
    try:
        model.load_state_dict(state)
    except Exception as error:  # also of a network of anyone's own
        others = misshapen(completed(chosen, model), own)
        raise _misfit(path, content, found, chosen, values, own, others, error) from None
    _tell_of_others(path, chosen, found)


def _open(path: Path) -> tuple[Any, Content, Callable[[View], Tensor]]:
    """Read what a file holds, by what it is and not by its name, and find the tensors in it."""
    try:
        if path.is_dir():
            raise ValueError("it is a folder; name the file in it")
        if not path.exists():
            raise ValueError("there is no such file")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            raise ValueError("it is empty")
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
            tensors = safetensors.torch.load_file(path)
            return tensors, find_tensors(tensors), _no_view
        if head.isascii() and head.decode().replace("\n", " ").isprintable() and head[:2] != b"PK":
            raise ValueError("it is a text, such as a list of parts or what Git LFS puts in place")
        torch_file = read_torch_file(path)
        return torch_file.content, find_tensors(torch_file.content), torch_file.tensor
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds {_NEVER}; save the state dict alone, best as safetensors."
        ) from None
    except Exception as error:  # a damaged file fails in any way
        raise _unread(path, error) from None


def _unread(path: Path, error: Exception) -> ModelError:
    return ModelError(f"Weights {path} cannot be read ({brief(error)}); give a sound file.")


def _no_view(_view: View) -> Tensor:
    raise AssertionError


def _choose(found: Sequence[Candidate], model: nn.Module, path: Path) -> Candidate:
    """Take the only set of tensors that fits, or else the trained one beside averages of it.

    Raises:
        ModelError: it is not plain which of several is meant.
    """
    own = model.state_dict(keep_vars=True)
    fitting = []
    for candidate in found:
        values = completed(candidate, model)
        if values.keys() == own.keys() and not misshapen(values, own):
            fitting.append(candidate)
    several = distinct(fitting)
    if len(several) < 2:
        return (several or found)[0]
    trained = [candidate for candidate in several if not is_copy(candidate)]
    if len(trained) != 1:
        raise ModelError(
            f"{path} holds several state dicts that fit the network, under "
            f"{_listed(candidate.text for candidate in several)}; save alone the one that is meant."
        )
    others = _listed(candidate.text for candidate in several if candidate is not trained[0])
    warnings.warn(
        f"{path} holds several state dicts that fit the network; the one under {trained[0].text} "
        f"is taken, not {others}.",
        stacklevel=3,
    )
    return trained[0]


def _made(value: Any, read: Callable[[View], Tensor]) -> Any:
    """Read what is a tensor, also inside of what a module stores as it likes."""
    if isinstance(value, View):
        return read(value)
    if isinstance(value, Unmade):
        raise pickle.UnpicklingError
    if isinstance(value, dict):
        return {key: _made(part, read) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_made(part, read) for part in value)
    return value


def _refuse_other_numbers(path: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse whole or complex numbers for real weights, of which torch would cut parts off."""
    for name, own in model.named_parameters():
        value = state.get(name)
        if (
            isinstance(value, Tensor)
            and own.dtype.is_floating_point
            and not value.dtype.is_floating_point
        ):
            kind = str(value.dtype).removeprefix("torch.")
            raise ModelError(
                f"{path} holds {_cut(name)} as {kind}, which are no real weights; save them as "
                "floating-point numbers, dequantised if need be."
            )


def _tell_of_others(path: Path, chosen: Candidate, found: Content) -> None:
    """Tell what lies beside the weights in their own dictionary, and was passed over."""
    holders = {one.holder for one in chosen.taken.values()}
    depth = len(chosen.prefix)
    beside = [
        one.text
        for one in found.tensors
        if one.holder in holders and one.name[:depth] != chosen.prefix
    ]
    if beside:
        warnings.warn(
            f"Of {path} only what lies under {chosen.text} is loaded, not {_listed(beside)}.",
            stacklevel=3,
        )


def _misfit(
    path: Path,
    content: Any,
    found: Content,
    chosen: Candidate,
    values: Mapping[str, Any],
    own: Mapping[str, Any],
    others: Sequence[str],
    error: Exception,
) -> ModelError:
    """Say in what a file differs from the network."""
    missing = [name for name in own if name not in values]
    extra = [name for name in values if name not in own]
    shapes = [
        f"{_cut(name)} is {tuple(values[name].shape)}, not {tuple(own[name].shape)}"
        for name in others
    ]
    classes = None if missing or extra or not others else classes_of(values, own, others)
    if classes is not None:
        return ModelError(
            f"Weights {path} are of a network with {classes[0]} classes, this one has {classes[1]} "
            f"({_listed(shapes)}); give --model FILE.py:FUNCTION, where FUNCTION builds it with "
            f"{classes[0]}."
        )
    reasons = []
    if missing:
        reasons.append(f"the file lacks {len(missing)} of {len(own)} tensors ({_listed(missing)})")
    if extra:
        reasons.append(f"the network has no place for {len(extra)} ({_listed(extra)})")
    if shapes:
        reasons.append(f"{len(shapes)} have another shape ({_listed(shapes)})")
    if missing and found.objects:
        reasons.append(f"it also holds {_NEVER}")
    if missing and _keys(content):
        reasons.append(f"its keys are {_keys(content)}")
    if missing and not chosen.taken:
        first = (f"{_cut(one.text)} {_shape(one.value)}" for one in found.tensors[:_N_NAMED])
        reasons.append(f"its first tensors are {_listed(first)}")
    return ModelError(
        f"Weights {path} do not fit the network: {'; '.join(reasons) or brief(error)}; give "
        "--model FILE.py:FUNCTION, where FUNCTION builds the network that they are of."
    )


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, (View, Tensor)) else ""


def _keys(content: Any) -> str:
    if not isinstance(content, Mapping):
        return ""
    return _listed([str(key) for key in content], _N_KEYS)


def _listed(names: Iterable[str], most: int = _N_NAMED) -> str:
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*map(_cut, names[:most]), *more])


def _cut(name: str) -> str:
    short = " ".join(name[:_LENGTH].split())
    return short if len(name) <= _LENGTH else f"{short}..."


# A network's weights as a whole: their identity and their health.


_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def hash_weights(model: nn.Module) -> str:
    """Hash names, shapes, kinds and bytes of everything in the state dict, on any device.

    A state dict may hold anything: packed weights of quantised parts, settings, extra state. What
    a scripted part keeps as constants counts too.

    Raises:
        ModelError: the network cannot tell its state.
    """
    model = unwrap(model)
    digest = hashlib.sha256()
    for name, value in sorted(_state(model).items(), key=lambda item: item[0]):
        name = name.replace("_orig_mod.", "")  # a compiled part is the same network
        digest.update(f"{name}\0".encode())
        with _told(name, value):
            for piece in _pieces(value, ()):
                digest.update(piece)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            for piece in _pieces(_constants(module), ()):
                digest.update(name.encode() + b"\0" + piece)
    return digest.hexdigest()


def _state(model: nn.Module) -> Mapping[str, Any]:
    try:
        return model.state_dict()
    except Exception as error:  # of a network of anyone's own
        raise ModelError(
            f"The network cannot tell its state ({brief(error)}); mend its state_dict."
        ) from error


@contextmanager
def _told(name: str, value: Any) -> Iterator[None]:
    """Say which part of the state cannot be read, as there are tensors of anyone's own kind."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"The network's {name!r} is a {type(value).__name__}, whose numbers cannot be read "
            f"({brief(error)}); give it as an ordinary tensor."
        ) from error


def _constants(module: torch.jit.ScriptModule) -> Any:
    """What was made a part of the code, as `torch.jit.freeze` does with weights; mostly nothing."""
    try:
        return module.code_with_constants[1].const_mapping
    except Exception:  # a module without code of its own
        return {}


def _pieces(value: Any, inside: tuple[int, ...]) -> Iterator[bytes]:
    """Write a value as bytes that are the same in any process; `inside` are ids of what holds it.

    Of what torch and Python do not know how to write, its type and attributes count: addresses in
    memory, which differ from one process to the next, do not.
    """
    if isinstance(value, Tensor):
        yield from _pieces_of_tensor(value, inside)
        return
    if isinstance(value, torch.dtype | torch.device | torch.Size | bool | int | float | complex):
        yield f"{type(value).__name__}\0{value!r}\0".encode()
        return
    if value is None or isinstance(value, str | bytes | bytearray):
        content = value if isinstance(value, bytes | bytearray) else str(value).encode()
        yield f"{type(value).__name__}\0{len(content)}\0".encode() + content
        return
    kind = type(value)
    yield f"{kind.__qualname__}\0".encode()
    if id(value) in inside:
        return
    inside = (*inside, id(value))
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        yield f"{value.shape}\0{value.dtype}\0".encode() + value.tobytes()
    elif isinstance(value, io.BytesIO):
        yield value.getvalue()
    elif isinstance(value, set | frozenset):
        yield from sorted(b"".join(_pieces(one, inside)) for one in value)
    else:
        for part in _tensor_parts(value):
            yield from _pieces(part, inside)


def _tensor_parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.items():
            yield from item
        return
    if isinstance(value, list | tuple | np.ndarray):
        yield from value
        return
    if isinstance(value, torch.ScriptObject) and hasattr(value, "__getstate__"):
        yield value.__getstate__()
        return
    if not callable(value):
        yield from getattr(value, "__dict__", {}).items()


def _pieces_of_tensor(tensor: Tensor, inside: tuple[int, ...]) -> Iterator[bytes]:
    if is_lazy(tensor):
        yield f"not there yet\0{tensor.dtype}\0".encode()
        return
    if is_traceable_wrapper_subclass(tensor):
        names, about = tensor.__tensor_flatten__()
        yield f"{type(tensor).__name__}\0{tuple(tensor.shape)}\0".encode()
        for part in (*(getattr(tensor, name) for name in names), about):
            yield from _pieces(part, inside)
        return
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.is_mkldnn:
            tensor = tensor.to_dense()
        yield f"{tuple(tensor.shape)}\0{tensor.dtype}\0".encode()
        for part in _numbers(tensor.detach()):
            plain = part.cpu().resolve_conj().resolve_neg().contiguous().flatten()
            yield plain.view(torch.uint8).numpy().tobytes()


def _numbers(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold what a tensor of any kind holds."""
    if tensor.is_meta:
        return
    if tensor.is_quantized:
        yield tensor.int_repr()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        else:
            yield tensor.q_per_channel_scales()
            yield tensor.q_per_channel_zero_points()
    elif tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        yield tensor.indices()
        yield tensor.values()
    elif tensor.layout in _COMPRESSED:
        for name in _COMPRESSED[tensor.layout]:
            yield getattr(tensor, name)()
    else:
        yield tensor


def refuse_broken_weights(model: nn.Module) -> None:
    """Raise if any weight is NaN or infinite; bounds that it keeps may be infinite.

    Raises:
        ModelError: names the first such tensor, or the network cannot tell its state.
    """
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in _state(model).items():
        if not isinstance(value, Tensor) or is_lazy(value) or is_traceable_wrapper_subclass(value):
            continue
        if value.is_quantized or not (value.is_floating_point() or value.is_complex()):
            continue
        counts = name in weights or name.rsplit(".", 1)[-1].startswith("running_")
        with _told(name, value):
            broken = any(
                bool(numbers.isnan().any() or (counts and numbers.isinf().any()))
                for numbers in _numbers(value.detach())
            )
        if broken:
            raise ModelError(
                f"The network's {name!r} holds NaN or infinite numbers; load sound weights."
            )
