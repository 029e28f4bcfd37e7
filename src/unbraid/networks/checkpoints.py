"""Weights from files that anyone may have written: how they are read, and which are a network's.

Code in a file is never run: torch's restricted reader makes tensors and plain values, and gets a
stand-in that makes nothing for every other class.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unbraid.base.errors import ModelError, brief
from unbraid.base.tables import one_line

_ZIP = b"PK\x03\x04"  # how files of today's format begin
_PICKLE = b"\x80"  # how files of the format before do
_LISTS = ("numpy.", "collections.deque", "functools.partial")
# By which torch.compile, DataParallel, FSDP and checkpointing name the network inside.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# In names of what is kept beside the weights that were trained.
_COPIES = {"ema", "teacher", "swa", "averaged", "average", "avg", "shadow", "momentum", "target"}
_MOST_PARTS = 64  # of a name
_NEVER = "Python code or objects, which are never loaded; save the state dict alone, as safetensors"
_N_NAMED = 3

Name = tuple[str, ...]  # the parts between dots


class _Found(NamedTuple):
    """A tensor in a file."""

    name: Name  # after the keys of the dictionaries around it
    holder: int  # which dictionary it lies in
    tensor: Tensor


_Set = dict[str, _Found]  # by the network's names


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from a safetensors or torch file; code in it is never run.

    It may lie inside of other dictionaries, and its names may have a prefix or names of wrappers.
    """
    content, has_objects = _read(path)
    tensors = list(_walk(content))
    names = [str(key) for key in content] if isinstance(content, Mapping) else []
    keys = f"; its keys are {_listed(names)}" if names else ""
    if not tensors:
        what = _NEVER if has_objects else "no state dict; save `model.state_dict()`"
        raise ModelError(f"{path} holds {what}{keys}.")
    own = model.state_dict(keep_vars=True)
    prefix, taken = _choose(_sets(tensors, own), own, path)
    state = _completed(taken, own)
    used = {found.name for found in taken.values()}
    holders = {found.holder for found in taken.values()}
    beside = []
    for found in tensors:
        if found.name in used or (taken and found.holder not in holders):
            continue
        if found.name[: len(prefix)] == prefix:  # the network refuses it or knows it by this name
            state.setdefault(".".join(found.name[len(prefix) :]), found.tensor)
        else:
            beside.append(".".join(found.name))
    for name, weight in model.named_parameters():
        value = state.get(name, weight)
        if weight.is_floating_point() and not value.is_floating_point():  # torch would cut it
            kind = str(value.dtype).removeprefix("torch.")
            raise ModelError(
                f"{path} holds {one_line(name)} as {kind}, which are no real weights; save them as "
                "floating-point numbers, dequantised if need be."
            )
    before = {
        name: value.detach().clone()
        for name, value in own.items()
        if isinstance(value, Tensor) and not is_lazy(value)
    }
    try:
        model.load_state_dict(state)
    except Exception as error:  # also of a network of anyone's own
        with torch.inference_mode():  # torch keeps those that fit
            for name, value in before.items():
                own[name].copy_(value)
        reasons = _differences(state, own, keys) or brief(error)
        raise ModelError(
            f"Weights {path} do not fit the network: {reasons}; give --model FILE.py:FUNCTION, "
            "where FUNCTION builds the network that they are of."
        ) from None
    if beside:
        warnings.warn(
            f"Of {path} only what lies under {_text(prefix)} is loaded, not {_listed(beside)}.",
            stacklevel=2,
        )


class _Object:
    """Stands for a class: makes an empty Counter, which torch's reader fills and sets up."""

    def __new__(cls, *_arguments: Any) -> Any:
        return Counter()


class _List(list[Any]):
    """Stands for a class that is filled like a list, or has a state that is no dictionary."""

    def __init__(self, *_arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, _state: Any) -> None:
        pass


def _read(path: Path) -> tuple[Any, bool]:
    """Read a file by what it is, whatever its name; also say if it has objects, never made."""
    try:
        if path.is_dir():
            raise ValueError("it is a folder; name the file in it")
        if not path.exists():
            raise ValueError("there is no such file")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(9)
            if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
                return safetensors.torch.load_file(path), False
            named = _check_torch(file)
            stand_ins = [(_List if name.startswith(_LISTS) else _Object, name) for name in named]
            with torch.serialization.safe_globals([Counter, *stand_ins]):
                return _load(file), bool(named)
    except pickle.UnpicklingError:
        raise ModelError(f"{path} holds {_NEVER}.") from None
    except Exception as error:  # a damaged file fails in any way
        raise ModelError(
            f"Weights {path} cannot be read ({brief(error)}); give a sound file."
        ) from None


def load_safely(file: BinaryIO) -> Any:
    """Read a file of torch that holds tensors and plain values alone; raises on any other."""
    _check_torch(file)
    return _load(file)


def _load(file: BinaryIO) -> Any:
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_torch(file: BinaryIO) -> list[str]:
    """Names of the classes in a file of today's format; ValueError unless it is one of torch."""
    file.seek(0)
    head = file.read(len(_ZIP))
    if head == _ZIP:
        _check_zip(file, os.fstat(file.fileno()).st_size)
        return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if not head.startswith(_PICKLE):
        raise ValueError("it is no file of torch or safetensors, perhaps what Git LFS left")
    return []


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


def _walk(content: Any) -> Iterator[_Found]:
    """Tensors with names in dictionaries and lists inside of one another, the outermost first."""
    seen: set[int] = set()  # as a few bytes may name one dictionary again and again
    queue: deque[tuple[Name, Any]] = deque([((), content)])
    while queue:
        around, holder = queue.popleft()
        if not isinstance(holder, (Mapping, list, tuple)) or id(holder) in seen:
            continue
        seen.add(id(holder))
        for key, value in holder.items() if isinstance(holder, Mapping) else enumerate(holder):
            name = (*around, *str(key).split("."))
            if len(name) > _MOST_PARTS:
                continue
            if isinstance(value, Tensor) and isinstance(key, str):
                yield _Found(name, id(holder), value)
            else:
                queue.append((name, value))


def _sets(tensors: Sequence[_Found], own: Iterable[str]) -> dict[Name, _Set]:
    """A file's tensors that have a network's names, wrappers' left out, by what stands before."""
    wanted = {tuple(p for p in name.split(".") if p not in _WRAPPERS): name for name in own}
    sets: dict[Name, _Set] = {}
    for found in tensors:
        bare: Name = ()
        for at in range(len(found.name) - 1, -1, -1):
            if found.name[at] not in _WRAPPERS:
                bare = (found.name[at], *bare)
            if bare in wanted:
                sets.setdefault(found.name[:at], {}).setdefault(wanted[bare], found)
    return sets


def _choose(sets: dict[Name, _Set], own: Mapping[str, Any], path: Path) -> tuple[Name, _Set]:
    """Take the only set of tensors that fits, or else the trained one beside averages of it."""
    found: dict[frozenset[Name], Name] = {}  # what a wrapper's name hides is the same set twice
    for prefix, taken in sets.items():
        values = _completed(taken, own)
        if values.keys() == own.keys() and not _misshapen(values, own):
            found.setdefault(frozenset(one.name for one in taken.values()), prefix)
    fitting = list(found.values())
    if not fitting:  # a network may know older names of its own
        return max(sets.items(), key=lambda item: len(item[1]), default=((), {}))
    if len(fitting) == 1:
        return fitting[0], sets[fitting[0]]
    words = {prefix: re.split("[^a-z]+", ".".join(prefix).lower()) for prefix in fitting}
    trained = [prefix for prefix in fitting if _COPIES.isdisjoint(words[prefix])]
    several = f"{path} holds several state dicts that fit the network"
    if len(trained) != 1:
        raise ModelError(
            f"{several}, under {_listed(map(_text, fitting))}; save alone the one that is meant."
        )
    others = _listed(_text(prefix) for prefix in fitting if prefix != trained[0])
    warnings.warn(
        f"{several}; the one under {_text(trained[0])} is taken, not {others}.", stacklevel=3
    )
    return trained[0], sets[trained[0]]


def _completed(taken: _Set, own: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by a network's names, with what files may lack: tied names, counts of batches."""
    values: dict[str, Any] = {name: found.tensor for name, found in taken.items()}
    first = {id(own[name]): name for name in taken}
    for name in own.keys() - taken.keys():
        if id(own[name]) in first:
            values[name] = values[first[id(own[name])]]
        elif name.endswith("num_batches_tracked"):
            values[name] = own[name]
    return values


def _misshapen(values: Mapping[str, Tensor], own: Mapping[str, Any]) -> list[str]:
    """Names of tensors that have another shape in the network."""
    return [
        name
        for name in values
        if isinstance(mine := own.get(name), Tensor)
        and not is_lazy(mine)
        and values[name].shape not in (mine.shape, mine.shape or (1,))
    ]


def _differences(values: Mapping[str, Tensor], own: Mapping[str, Any], keys: str) -> str:
    """Say in what a file differs from the network."""
    missing = [name for name in own if name not in values]
    extra = [name for name in values if name not in own]
    others = [
        f"{one_line(name)} is {tuple(values[name].shape)}, not {tuple(own[name].shape)}"
        for name in _misshapen(values, own)
    ]
    reasons = []
    if missing:
        reasons.append(f"the file lacks {len(missing)} of {len(own)} tensors ({_listed(missing)})")
    if extra:
        reasons.append(f"the network has no place for {len(extra)} ({_listed(extra)})")
    if others:
        reasons.append(f"{len(others)} have another shape ({_listed(others)})")
    return "; ".join(reasons) + (keys if missing else "")


def _text(prefix: Name) -> str:
    return ".".join(prefix) or "no prefix"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = [f"and {len(names) - _N_NAMED} more"] if len(names) > _N_NAMED else []
    return ", ".join([*map(one_line, names[:_N_NAMED]), *more])
