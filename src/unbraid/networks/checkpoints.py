"""Weights from files that anyone may have written: how they are read, and which are a network's.

Code in a file is never run. torch's restricted reader makes tensors and plain values; for every
other class that a file names it gets a stand-in that makes nothing.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unbraid.base.errors import ModelError, brief

_ZIP = b"PK\x03\x04"  # how files of today's format begin
_MAGIC = 0x1950A86A20F9469CFC6C  # the first number in a file of the format before
_LISTS = ("numpy.", "collections.deque", "functools.partial")
# By which torch.compile, DataParallel, FSDP and checkpointing name the network inside.
_WRAPPERS: Set[str] = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
# In names of what is kept beside the weights that were trained.
_COPIES = {"ema", "teacher", "swa", "averaged", "average", "avg", "shadow", "momentum", "target"}
_HOLDERS = (Mapping, list, tuple)
_MOST_TENSORS = 2**17
_MOST_SETS = 100
_MOST_PARTS = 64  # of a name
_LONGEST = 500  # characters of a key
_NEVER = "Python code or objects, which are never loaded"
_N_NAMED = 3
_N_KEYS = 8
_LENGTH = 80  # characters of a name in a message

Name = tuple[str, ...]  # the parts between dots


class _Found(NamedTuple):
    """A tensor in a file."""

    name: Name  # after the keys of the dictionaries around it
    holder: int  # which dictionary it lies in
    value: Any


@dataclass(frozen=True)
class _Candidate:
    """Tensors whose names, less a prefix, are a network's."""

    prefix: Name
    taken: dict[str, Any]  # by the network's names
    extra: dict[str, Any]  # behind the prefix too, but the network does not have them
    beside: list[str]  # in the same dictionaries, but not behind the prefix

    @property
    def text(self) -> str:
        return ".".join(self.prefix) or "no prefix"

    @property
    def is_copy(self) -> bool:
        """Whether it is an average or the like, kept beside the weights that were trained."""
        words = (word for part in self.prefix for word in re.split("[^a-z]+", part.lower()))
        return any(word in _COPIES for word in words)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from a safetensors or torch file; code in it is never run.

    It may lie inside of other dictionaries, and its names may have a prefix or names of wrappers.

    Raises:
        ModelError: the file is missing, holds code, or does not fit the network.
    """
    tensors, keys, has_objects = _read(path)
    if not tensors:
        shown = f" (its keys are {keys})" if keys else ""
        if has_objects:
            raise ModelError(
                f"{path} holds {_NEVER}{shown}; save the state dict alone, best as safetensors."
            )
        raise ModelError(f"{path} holds no state dict{shown}; save `model.state_dict()`.")
    own = model.state_dict(keep_vars=True)
    chosen = _choose(_candidates(tensors, own), own, path)
    state = {**chosen.extra, **_completed(chosen, own)}
    if any(_is_object(one.value) for one in _walk(state)):
        raise ModelError(f"{path} holds {_NEVER}, in the weights; save them as tensors.")
    _refuse_other_numbers(path, state, model)
    try:
        model.load_state_dict(state)
    except Exception as error:  # also of a network of anyone's own
        about = [f"it also holds {_NEVER}"] if has_objects else []
        about += [f"its keys are {keys}"] if keys else []
        if not chosen.taken:
            first = (f"{_cut('.'.join(name))} {_shape(value)}" for name, _, value in tensors)
            about.append(f"its first tensors are {_listed([*first][:_N_NAMED])}")
        raise _misfit(path, state, own, about, error) from None
    if chosen.beside:
        warnings.warn(
            f"Of {path} only what lies under {chosen.text} is loaded, not "
            f"{_listed(chosen.beside)}.",
            stacklevel=2,
        )


# Reading


class _Object:
    """Stands for a class: makes an empty Counter, whatever it is given.

    torch's reader puts entries into plain dictionaries and Counters alone, and of these only a
    Counter takes any attributes.
    """

    def __new__(cls, *_arguments: Any) -> Any:
        return Counter()


class _List(list[Any]):
    """Stands for a class that is filled like a list, or has a state that is no dictionary."""

    def __init__(self, *_arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, _state: Any) -> None:
        pass


def _read(path: Path) -> tuple[list[_Found], str, bool]:
    """Read a file by what it is, whatever its name.

    Returns:
        Its tensors, its own keys in a few words, and whether it holds objects that are not made.
    """
    try:
        content = _load(path)
        tensors, has_objects = [], False
        for found in _walk(content):
            has_objects |= _is_object(found.value)
            is_tensor = isinstance(found.value, Tensor) and found.name
            if is_tensor or found.name[-1:] == ("_extra_state",):
                tensors.append(found)
            if len(tensors) > _MOST_TENSORS:
                raise ValueError("it holds too many tensors")
        keys = map(str, content) if isinstance(content, Mapping) else ()
        return tensors, _listed(keys, _N_KEYS), has_objects
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds {_NEVER}; save the state dict alone, best as safetensors."
        ) from None
    except Exception as error:  # a damaged file fails in any way
        raise ModelError(
            f"Weights {path} cannot be read ({brief(error)}); give a sound file."
        ) from None


def _load(path: Path) -> Any:
    if path.is_dir():
        raise ValueError("it is a folder; name the file in it")
    if not path.exists():
        raise ValueError("there is no such file")
    size = path.stat().st_size
    if size == 0:
        raise ValueError("it is empty")
    with path.open("rb") as file:
        head = file.read(64)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
            return safetensors.torch.load_file(path)
        if head.startswith(_ZIP):
            _check_zip(file, size)
            named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        elif head.isascii() and head.replace(b"\n", b"").decode().isprintable():
            raise ValueError("it is a text, such as a list of parts or what Git LFS left")
        else:
            named = _classes_in_stream(file)
        stand_ins = [(_List if name.startswith(_LISTS) else _Object, name) for name in named]
        file.seek(0)
        with torch.serialization.safe_globals([Counter, *stand_ins]):
            return torch.load(file, map_location="cpu", weights_only=True)


def _check_zip(file: BinaryIO, size: int) -> None:
    """Raise if torch has not written a zip file, it would grow when unpacked, or is damaged."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > size:
            raise ValueError("it claims to hold more than it is large")
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise pickle.UnpicklingError("TorchScript is a program")
        if not any(member.filename.endswith("/data.pkl") for member in members):
            raise ValueError("torch.save has not written it; a program or arrays are no use")
        for member in members:
            if member.CRC:  # which torch may leave out
                archive.read(member)
    file.seek(0)


def _classes_in_stream(file: BinaryIO) -> list[str]:
    """Names of classes in a file of the older format: four pickles, then the numbers."""
    file.seek(0)
    named = []
    for k in range(4):
        operations = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(file)]
        if k == 0 and _MAGIC not in (argument for _, argument in operations):
            raise ValueError("torch.save has not written it")
        for operation, argument in operations:
            if operation == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                old = IMPORT_MAPPING.get(module, module), name  # as Python 2 called it
                named.append(".".join(NAME_MAPPING.get((module, name), old)))
    return named


# Choosing


def _walk(content: Any) -> Iterator[_Found]:
    """Go through dictionaries and lists inside of one another, the outermost first.

    A tensor that only has a number is left out.
    """
    seen: set[int] = set()  # as a few bytes may name one dictionary again and again
    yield _Found((), 0, content)
    queue: deque[tuple[Name, Any]] = deque([((), content)])
    while queue:
        around, holder = queue.popleft()
        if not isinstance(holder, _HOLDERS) or id(holder) in seen:
            continue
        seen.add(id(holder))
        for key, value in holder.items() if isinstance(holder, Mapping) else enumerate(holder):
            name = (*around, *str(key).split("."))
            named = isinstance(key, str) or not isinstance(value, Tensor)
            if named and len(name) <= _MOST_PARTS and len(str(key)) <= _LONGEST:
                yield _Found(name, id(holder), value)
                if isinstance(value, _HOLDERS):
                    queue.append((name, value))


def _is_object(value: Any) -> bool:
    """Whether a value stands for what was not made."""
    return isinstance(value, (Counter, _List)) or value is _Object


def _candidates(tensors: Sequence[_Found], own: Iterable[str]) -> list[_Candidate]:
    """Find sets of a file's tensors that may be a network's, that with most of its names first.

    `own` are the names in the network's state dict. Names of wrappers in either do not matter.
    """
    names = [tuple(name.split(".")) for name in own]
    wrappers = _WRAPPERS
    if len({_without(wrappers, name) for name in names}) < len(names):
        wrappers = frozenset()  # as the network itself uses such names to tell tensors apart
    wanted = {_without(wrappers, name): ".".join(name) for name in names}
    sets: dict[Name, dict[str, _Found]] = {}
    for found in tensors:
        bare: Name = ()
        for at in range(len(found.name) - 1, -1, -1):
            if found.name[at] not in wrappers:
                bare = (found.name[at], *bare)
                if bare in wanted:
                    sets.setdefault(found.name[:at], {}).setdefault(wanted[bare], found)
    if not sets:  # a network may know older names of its own
        ((most, _),) = Counter(found.holder for found in tensors).most_common(1)
        sets[_common([found.name for found in tensors if found.holder == most])] = {}
    made = []
    for prefix, taken in sorted(sets.items(), key=lambda item: -len(item[1]))[:_MOST_SETS]:
        holders = {found.holder for found in taken.values()}
        used = set(map(id, taken.values()))
        extra, beside = {}, []
        for found in tensors:
            if taken and found.holder not in holders:
                continue
            if found.name[: len(prefix)] != prefix:
                beside += [".".join(found.name)] if taken else []
            elif id(found) not in used:
                extra[".".join(_without(wrappers, found.name[len(prefix) :]))] = found.value
        values = {name: found.value for name, found in taken.items()}
        made.append(_Candidate(prefix, values, extra, beside))
    return made


def _without(wrappers: Set[str], name: Name) -> Name:
    return tuple(part for part in name if part not in wrappers)


def _common(names: Sequence[Name]) -> Name:
    """The parts that all names begin with; of one name alone, all but its last."""
    low, high = min(names), max(names)
    n = next((k for k, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: min(n, len(low) - 1)]


def _choose(found: Sequence[_Candidate], own: Mapping[str, Any], path: Path) -> _Candidate:
    """Take the only set of tensors that fits, or else the trained one beside averages of it."""
    fitting: list[_Candidate] = []
    for candidate in found:
        values = _completed(candidate, own)
        fits = values.keys() == own.keys() and not _misshapen(values, own)
        if fits and not any(_same(candidate.taken, other.taken) for other in fitting):
            fitting.append(candidate)
    if len(fitting) < 2:
        return (fitting or found)[0]
    trained = [candidate for candidate in fitting if not candidate.is_copy]
    if len(trained) != 1:
        raise ModelError(
            f"{path} holds several state dicts that fit the network, under "
            f"{_listed(one.text for one in fitting)}; save alone the one that is meant."
        )
    others = _listed(one.text for one in fitting if one is not trained[0])
    warnings.warn(
        f"{path} holds several state dicts that fit the network; the one under {trained[0].text} "
        f"is taken, not {others}.",
        stacklevel=3,
    )
    return trained[0]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets are of the very same numbers in memory."""

    def place(value: Any) -> Any:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            return value.data_ptr(), value.dtype, value.shape, value.stride()
        return id(value)

    return one.keys() == other.keys() and all(place(one[k]) == place(other[k]) for k in one)


def _completed(candidate: _Candidate, own: Mapping[str, Any]) -> dict[str, Any]:
    """Give the values for a network's names, with those that files may lack.

    These are counts of batches, as from older torch, and all but one name of tied tensors.
    """
    values = dict(candidate.taken)
    first = {id(own[name]): name for name in values if isinstance(own[name], Tensor)}
    for name in own.keys() - values.keys():
        if id(own[name]) in first:
            values[name] = values[first[id(own[name])]]
        elif name.endswith("num_batches_tracked"):
            values[name] = own[name]
    return values


def _misshapen(values: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Names of tensors that have another shape in the network."""

    def fits(value: Any, mine: Any) -> bool:
        if not isinstance(value, Tensor) or not isinstance(mine, Tensor) or is_lazy(mine):
            return True
        return value.shape == mine.shape or (value.shape == (1,) and mine.dim() == 0)  # as once

    return [name for name in values if name in own and not fits(values[name], own[name])]


# Refusing


def _refuse_other_numbers(path: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse whole or complex numbers for real weights, of which torch would cut parts off."""
    for name, own in model.named_parameters():
        value = state.get(name, own)
        if own.is_floating_point() and isinstance(value, Tensor) and not value.is_floating_point():
            raise ModelError(
                f"{path} holds {_cut(name)} as {str(value.dtype).removeprefix('torch.')}, which "
                "are no real weights; save them as floating-point numbers, dequantised if need be."
            )


def _misfit(
    path: Path,
    values: Mapping[str, Any],
    own: Mapping[str, Any],
    about: Sequence[str],
    error: Exception,
) -> ModelError:
    """Say in what a file differs from the network; `about` counts where tensors are missing."""
    missing = [name for name in own if name not in values]
    extra = [name for name in values if name not in own]
    others = _misshapen(values, own)
    shapes = _listed(
        f"{_cut(name)} is {_shape(values[name])}, not {_shape(own[name])}" for name in others
    )
    pairs = {(values[name].shape[:1], own[name].shape[:1]) for name in others}
    if (
        not (missing or extra)
        and len(pairs) == 1
        and all(values[name].shape[1:] == own[name].shape[1:] for name in others)
        and all(values[name].dim() and own[name].dim() for name in others)
    ):
        (((n,), (n_own,)),) = pairs
        return ModelError(
            f"Weights {path} are of a network with {n} classes, this one has {n_own} ({shapes}); "
            f"give --model FILE.py:FUNCTION, where FUNCTION builds it with {n}."
        )
    reasons = []
    if missing:
        reasons.append(f"the file lacks {len(missing)} of {len(own)} tensors ({_listed(missing)})")
    if extra:
        reasons.append(f"the network has no place for {len(extra)} ({_listed(extra)})")
    if others:
        reasons.append(f"{len(others)} have another shape ({shapes})")
    if missing:
        reasons += about
    return ModelError(
        f"Weights {path} do not fit the network: {'; '.join(reasons) or brief(error)}; give "
        "--model FILE.py:FUNCTION, where FUNCTION builds the network that they are of."
    )


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else ""


def _listed(names: Iterable[str], most: int = _N_NAMED) -> str:
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*map(_cut, names[:most]), *more])


def _cut(name: str) -> str:
    short = " ".join(name[:_LENGTH].split())
    return short if len(name) <= _LENGTH else f"{short}..."
