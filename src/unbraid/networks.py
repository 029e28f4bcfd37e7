"""Networks as they come: inside wrappers, and with logits somewhere in what they put out."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unbraid.copying import copy_with_functions
from unbraid.doors import in_plain_modes
from unbraid.errors import ModelError, UsageError

Pick = str | int | Callable[[Any], Tensor]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside of torch.compile, DataParallel and DistributedDataParallel.

    Raises:
        UsageError: it is no network.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"The network is a {type(model).__name__}; pass a torch.nn.Module.")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, parallel):
            model = model.module
        else:
            return model


def unwrapped_name(name: str) -> str:
    """Return a module's name without the names of the wrappers around the network.

    >>> unwrapped_name("module._orig_mod.layer4.0.conv3")
    'layer4.0.conv3'
    """
    for wrapper in ("_orig_mod.", "module."):
        if name.startswith(wrapper):
            return unwrapped_name(name.removeprefix(wrapper))
    return name


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a network, or a part of one, is on."""
    return next((tensor.device for tensor in _loaded(module)), torch.device("cpu"))


def number_format(model: nn.Module, images: Tensor) -> torch.dtype:
    """That of the first weights, which meet the images; theirs where either is no fraction."""
    formats = (weight.dtype for weight in _loaded(model) if weight.is_floating_point())
    return next(formats, images.dtype) if images.is_floating_point() else images.dtype


def _loaded(module: nn.Module) -> Iterator[Tensor]:
    """Weights that hold numbers, then buffers: none that are yet to be made or on no device."""
    for tensor in chain(module.parameters(), module.buffers()):
        if not is_lazy(tensor) and not tensor.is_meta:
            yield tensor


def copy_network(model: nn.Module) -> nn.Module:
    """Copy a network, also one that keeps what it computed from its weights.

    Everything in the copy, functions too, leads to the copy's own parts.
    """
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in tensors_in(vars(module))
        if not value.is_leaf
    }
    with torch.no_grad():  # as copies of scripted parts would else be computed from the originals
        copied = copy_with_functions(model, computed)
    for old, new in zip(model.parameters(), copied.parameters(), strict=True):
        if old.requires_grad != new.requires_grad:
            new.requires_grad_(old.requires_grad)
    return copied


def is_quantised(module: nn.Module) -> bool:
    """Whether a part computes with a few whole numbers, which has no gradient."""
    return ".quantized" in type(module).__module__


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in containers inside of one another, which may hold themselves."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part, seen)


@in_plain_modes
def with_logits(model: nn.Module, pick: Pick) -> nn.Module:
    """Return a network that puts out a part of what the given one does: the logits.

    It shares layers, names of layers and weights with the given one, which is not changed.

    Args:
        model: a network whose output holds logits, (N, T), among other things.
        pick: key or attribute name, index (from the end if negative), several of these with dots
            between, or a function from the output to the logits.

    >>> class Two(nn.Linear):
    ...     def forward(self, x):
    ...         return {"features": x, "scores": super().forward(x)}
    >>> with_logits(Two(3, 5), "scores")(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """
    picked = copy.copy(unwrap(model))
    # Of its own, where a shallow copy would share: hooks must not come to be the other's.
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(picked, name, copy.copy(getattr(picked, name)))
    picked.register_forward_hook(_Picking(pick))
    return picked


def picked_by(model: nn.Module) -> str:
    """Say which part of the output `with_logits` picks, empty where it was not used."""
    return " ".join(str(h) for h in model._forward_hooks.values() if isinstance(h, _Picking))


class _Picking:
    """A hook that lets a part of a network's output through."""

    def __init__(self, pick: Pick) -> None:
        self.pick = pick

    def __str__(self) -> str:
        return str(getattr(self.pick, "__qualname__", self.pick))

    def __call__(self, _model: nn.Module, _args: Any, output: Any) -> Tensor:
        lacking: tuple[type[Exception], ...] = (KeyError, IndexError)
        if not callable(self.pick):  # whose other errors are its own
            lacking += (TypeError, AttributeError)
        try:
            part: Tensor = self.pick(output) if callable(self.pick) else _part_of(output, self.pick)
        except lacking:
            raise ModelError(
                f"The network's output has no {self.pick!r} to take logits from; it is "
                f"{_describe(output)}; {_advice(output)}."
            ) from None
        if not callable(self.pick) and not _is_logits(_called_logits(part)):
            raise ModelError(
                f"Part {self.pick!r} of the network's output is {_describe(part)}, not logits of "
                f"shape (images, classes); {_advice(output)}."
            )
        return part


def _part_of(output: Any, pick: str | int) -> Any:
    """Take a part by its key, index or attribute, or by several with dots between.

    Raises:
        KeyError, IndexError, TypeError, AttributeError: there is none.
    """
    if isinstance(output, Tensor):  # what it can do, or one image's row, is not a part of it
        raise KeyError(pick)
    keys = _keys(output)
    number = int(pick) if re.fullmatch(r"[+-]?\d+", str(pick), re.ASCII) else None
    for key in (pick, str(pick), number):
        if key is not None and key in keys:
            return output[key]
    if number is not None:
        return output[number]
    first, dot, rest = str(pick).partition(".")
    if dot:
        return _part_of(_part_of(output, first), rest)
    part = getattr(output, first)
    if callable(part):  # a method, such as a dictionary's
        raise AttributeError(first)
    return part


def as_logits(output: Any, n_images: int | None = None) -> Tensor:
    """Bring a network's output to logits (N, T).

    What is called "logits" in it is taken, and the one tensor of a list. A single logit z, (N,) or
    (N, 1), tells two classes apart; it becomes the two logits -z and z. Of one image alone a
    network may leave N out: (T,), or () for a single logit.

    Args:
        output: what the network puts out.
        n_images: N, where it is known.

    Raises:
        ModelError: there are no logits, or it is not plain which they are.
    """
    logits = _called_logits(output)
    if isinstance(logits, Tensor) and n_images == 1 and logits.dim() < 2:
        logits = logits.reshape(1, -1)
    if not _is_logits(logits):
        raise ModelError(
            f"The network's output is {_describe(output)}, not logits of shape (images, classes); "
            f"{_advice(output)}."
        )
    if logits.dim() == 1 or logits.shape[1] == 1:
        logits = logits.reshape(-1, 1)
        return torch.cat([-logits, logits], 1)
    return logits


def _called_logits(output: Any) -> Any:
    """What is called "logits" in an output, or the one tensor of a list, else all of it."""
    if "logits" in _keys(output):
        return output["logits"]
    if not isinstance(output, Tensor) and isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (list, tuple)) and len(output) == 1:
        return output[0]
    return output


def _is_logits(output: Any) -> TypeGuard[Tensor]:
    return isinstance(output, Tensor) and output.dim() in (1, 2)


def _advice(output: Any) -> str:
    """Say how to take logits out of an output: only what can be done."""
    places = [(place, part) for place, part in _parts(output) if _is_logits(part)]
    if _is_logits(output):
        return "it is logits itself, so leave --output out"
    if not places:
        return (
            "no part of it is, so compute them in FILE.py:FUNCTION or by a function that "
            "unbraid.with_logits takes"
        )
    choices = " or ".join(f"--output {place} {tuple(part.shape)}" for place, part in places[:5])
    return f"say where they are: {choices}, or in Python by unbraid.with_logits"


def _parts(output: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """All that `_part_of` can take out of an output, by name."""
    if isinstance(output, Tensor) or depth == 0:
        return
    if isinstance(output, Mapping):
        pairs = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        pairs = [(str(place), value) for place, value in enumerate(output)]
    else:
        pairs = list(getattr(output, "__dict__", {}).items())
    for name, value in pairs:
        yield name, value
        for inner, part in _parts(value, depth - 1):
            yield f"{name}.{inner}", part


def _keys(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, Mapping) else ()


def _describe(output: Any) -> str:
    """Tell what a network puts out, in a few words."""
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    kind = type(output).__name__
    if isinstance(output, Mapping):
        parts = [f"{key!r}: {_describe(value)}" for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        parts = [_describe(value) for value in output]
    else:
        parts = []
    return f"a {kind} ({', '.join(parts[:5])})" if parts else f"a {kind}"
