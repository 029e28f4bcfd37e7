"""A network run on images: where its logits are, and whether they can be used."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbraid.base.errors import (
    CannotRun,
    DataError,
    ModelError,
    OutOfMemory,
    UnbraidError,
    brief,
    memory_full,
)
from unbraid.base.modes import callers_device, in_plain_modes
from unbraid.base.tables import count
from unbraid.networks.copying import device_of, number_format, unwrap
from unbraid.networks.relevance import undisturbed

_DEEPEST = 8  # containers inside of one another

Pick = str | int | Callable[[Any], Tensor]


@in_plain_modes
def with_logits(model: nn.Module, pick: Pick) -> nn.Module:
    """Return a network that puts out the logits alone, with the same layers and weights.

    Args:
        model: a network whose output holds logits, (N, T), among other things.
        pick: key or attribute name, index (from the end if negative), several of these with dots
            between, or a function from the output to the logits.

    Returns:
        The network; its output is a tensor of logits, (N, T).

    Raises:
        ModelError: on a forward pass, where the output holds no such logits.

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


def picks_of(model: nn.Module) -> list[Pick]:
    """List what `with_logits` picks of the output, none where it was not used."""
    return [hook.pick for hook in model._forward_hooks.values() if isinstance(hook, _Picking)]


class _Picking:
    """A hook that lets a part of a network's output through."""

    def __init__(self, pick: Pick) -> None:
        self.pick = pick

    def __call__(self, _model: nn.Module, _args: Any, output: Any) -> Tensor:
        if callable(self.pick):
            return self.pick(output)
        try:
            part: Tensor = _part_of(output, self.pick)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ModelError(
                f"The network's output has no {self.pick!r} to take logits from; it is "
                f"{describe_output(output)}; {_advice(output)}."
            ) from None
        if not _is_logits(_called_logits(part)):
            raise ModelError(
                f"Part {self.pick!r} of the network's output is {describe_output(part)}, not "
                f"logits of shape (images, classes); {_advice(output)}."
            )
        return part


def _part_of(output: Any, pick: str | int) -> Any:
    """Take a part by its key, index or attribute, or by several with dots between; else raise."""
    if isinstance(output, Tensor):  # what it can do, or one image's row, is not a part of it
        raise KeyError(pick)
    number = int(pick) if re.fullmatch(r"[+-]?\d+", str(pick), re.ASCII) else None
    for key in (pick, str(pick), number) if isinstance(output, Mapping) else ():
        if key is not None and key in output:
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
    """Bring a network's output to logits (N, T); ModelError if it is not plain which they are.

    A single logit z, (N,) or (N, 1), becomes the two logits -z and z. Of one image alone a network
    may leave N out: (T,), or () for a single logit.
    """
    logits = _called_logits(output)
    if isinstance(logits, Tensor) and n_images == 1 and logits.dim() < 2:
        logits = logits.reshape(1, -1)
    if not _is_logits(logits):
        raise ModelError(
            f"The network's output is {describe_output(output)}, not logits of shape (images, "
            f"classes); {_advice(output)}."
        )
    logits = _plain(logits)
    if logits.dim() == 1 or logits.shape[1] == 1:
        logits = logits.reshape(-1, 1)
        return torch.cat([-logits, logits], 1)
    return logits


def _called_logits(output: Any) -> Any:
    """What is called "logits" in an output, or the one tensor of a list, else all of it."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if not isinstance(output, Tensor) and isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (list, tuple)) and len(output) == 1:
        return output[0]
    return output


def _is_logits(output: Any) -> TypeGuard[Tensor]:
    """Whether it can be logits; whole numbers, such as winning classes, are none."""
    if not isinstance(output, Tensor) or output.dim() not in (1, 2) or output.is_nested:
        return False
    return output.is_floating_point() or output.is_quantized


def _plain(tensor: Tensor, n_images: int | None = None) -> Tensor:
    """Numbers as torch computes with them: not quantised, sparse or complex.

    Of a single number, with `n_images`, that many.
    """
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if n_images is not None and tensor.dim() == 0:
        tensor = tensor.expand(n_images)  # before a complex number becomes two of the same image
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def attributes_of(output: Any) -> dict[str, Any]:
    """What an object holds by name, also a dataclass with slots."""
    held: dict[str, Any] | None = getattr(output, "__dict__", None)
    if held is None and is_dataclass(output):
        return {own.name: getattr(output, own.name, None) for own in fields(output)}
    return held or {}


def _advice(output: Any) -> str:
    """Say how to take logits out of an output: only what can be done."""
    parts = [(pick, part) for pick, part in _parts(output) if _is_logits(part)]
    if _is_logits(output):
        return "it is logits itself, so leave --output out"
    if not parts:
        return (
            "no part of it is, so compute them in FILE.py:FUNCTION or by a function that "
            "unbraid.with_logits takes, or scan with another target (docs/networks.md)"
        )
    choices = " or ".join(f"--output {pick} {tuple(part.shape)}" for pick, part in parts[:5])
    return f"say where they are: {choices}, or in Python by unbraid.with_logits"


def _parts(output: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """All that `_part_of` can take out of an output, by key, number or attribute."""
    if isinstance(output, (tuple, list)):
        output = dict(enumerate(output))
    elif not isinstance(output, (Mapping, Tensor)):
        output = attributes_of(output)
    for name, value in output.items() if depth and isinstance(output, Mapping) else ():
        yield str(name), value
        for inner, part in _parts(value, depth - 1):
            yield f"{name}.{inner}", part


def describe_output(output: Any) -> str:
    """Say what a network's output is, in a few words."""
    if isinstance(output, Tensor) and output.is_nested:  # whose shape torch may not tell
        return "a nested tensor"
    if isinstance(output, Tensor):
        of = "" if output.is_floating_point() else f" of {str(output.dtype).removeprefix('torch.')}"
        return f"a tensor {tuple(output.shape)}{of}"
    return f"a {type(output).__name__}"


def run_network(model: nn.Module, images: Tensor) -> Tensor:
    """Compute all that a network puts out, a row an image (N, D), from a copy of images.

    Of an output that is, or holds, logits (N, T) these alone; see `as_logits`.
    """
    return as_rows(run_raw(model, images), len(images))


def run_raw(model: nn.Module, images: Tensor) -> Any:
    """Compute a network's output, of any kind, from a copy of images in the weights' format."""
    try:
        with callers_device():
            return model(images.to(number_format(model, images), copy=True))
    except UnbraidError:
        raise
    except Exception as error:  # of a network of anyone's own
        if memory_full(error):
            raise OutOfMemory("The device is out of memory; lower batch_size.") from None
        advice = "check size, channels and type of the images"
        if isinstance(error, TypeError) and not _takes_one(model):
            advice = "wrap it so that its forward takes a batch of images and nothing else"
        raise CannotRun(
            f"The network cannot run on images of shape {tuple(images.shape[1:])} and "
            f"{images.dtype} ({brief(error)}); {advice}."
        ) from error


def _takes_one(model: nn.Module) -> bool:
    """Whether the network can be called with one thing."""
    try:
        inspect.signature(model.forward).bind(None)
    except TypeError:
        return False
    return True


def as_rows(output: Any, n_images: int) -> Tensor:
    """Bring an output to logits, (N, T), or, where it is none, all its numbers to rows, (N, D).

    Of a list of dictionaries, one an image, as detection gives, rows begin with the sizes of what
    the image has, and end in zeros where others have more. ModelError if rows are not to be told.
    """
    if not holds_logits(output, n_images):
        rows = _rows_of(output, n_images)
        if rows is not None:
            return rows
    return logits_of(output, n_images)


def holds_logits(output: Any, n_images: int) -> bool:
    """Whether an output is, or holds, logits."""
    try:
        as_logits(output, n_images)
    except ModelError:
        return False
    return True


def logits_of(output: Any, n_images: int) -> Tensor:
    """Bring an output to logits as `as_logits` does; ModelError unless each image has a row."""
    logits = as_logits(output, n_images)
    if logits.is_meta:
        raise ModelError("The network's weights are on the meta device; load weights first.")
    if len(logits) != n_images:
        raise ModelError(
            f"The network gives {count(len(logits), 'row')} of logits for "
            f"{count(n_images, 'image')}; wrap it so that it gives one for each."
        )
    return logits


def _rows_of(output: Any, n_images: int) -> Tensor | None:
    """All numbers of an output that is no logits, (N, D); None if some are of no image."""
    found = numbers_in(output)
    if any(tensor.is_nested for tensor in found):
        raise ModelError(
            "The network's output holds a nested tensor; let it put out a padded one, as "
            "torch.nested.to_padded_tensor makes it."
        )
    if not found or any(tensor.is_meta for tensor in found):
        return None
    # A single number is every image's, such as the scale that CLIP puts out.
    tensors = [_plain(tensor, n_images) for tensor in found]
    # Whole numbers beside fractions keep all their digits.
    fractions = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    exact = len(fractions) == len(tensors)
    dtype = reduce(torch.promote_types, fractions) if exact else torch.float64
    each = isinstance(output, (list, tuple)) and len(output) == n_images
    if each and all(isinstance(one, Mapping) for one in output):
        rows = []
        for one in output:
            own = [_plain(tensor) for tensor in numbers_in(one)]
            sizes = torch.tensor([part.numel() for part in own], dtype=dtype)
            parts = [part.reshape(-1).to(dtype) for part in own]
            rows.append(torch.cat([sizes.to(tensors[0].device), *parts]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if n_images == 1:
        return torch.cat([tensor.reshape(1, -1).to(dtype) for tensor in tensors], 1)
    # Single numbers alone may be a mean or sum over the batch, in which images cannot be told.
    if not any(tensor.dim() > 0 for tensor in found):
        return None
    if any(len(tensor) != n_images for tensor in tensors):
        return None
    return torch.cat([tensor.reshape(n_images, -1).to(dtype) for tensor in tensors], 1)


def numbers_in(output: Any, seen: tuple[int, ...] = ()) -> list[Tensor]:
    """All tensors in a network's output, of any structure, in order."""
    if isinstance(output, Tensor):
        return [output]
    if id(output) in seen or len(seen) > _DEEPEST:
        return []
    if isinstance(output, Mapping):
        parts: Sequence[Any] = list(output.values())
    elif isinstance(output, (list, tuple)):
        parts = output
    else:
        parts = list(attributes_of(output).values())
    return [tensor for part in parts for tensor in numbers_in(part, (*seen, id(output)))]


def alike_wide(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Bring rows, (N, D) each, to the width of the longer ones, by zeros at the end."""
    width = max(one.shape[1], other.shape[1])
    return tuple(F.pad(rows, (0, width - rows.shape[1])) for rows in (one, other))  # type: ignore[return-value]


def count_outputs(model: nn.Module, image: Tensor) -> int:
    """Run a network on one image, (C, H, W), and count its logits, T."""
    with undisturbed(model), torch.no_grad():
        return logits_of(run_raw(model, image[None].to(device_of(model))), 1).shape[1]


def check_labels(label: Tensor, index: Tensor, logits: Tensor) -> None:
    """Raise DataError if a label names no output of the network; `index` says whose it is."""
    wrong = (label < 0) | (label >= logits.shape[1])
    if wrong.any():
        told = f"has label {int(label[wrong][0])}, but the network has {logits.shape[1]} outputs"
        raise DataError.of_image("", int(index[wrong][0]), f"{told}; labels must name outputs.")


def refuse_broken_values(values: Tensor, index: Tensor) -> None:
    """Raise ModelError if what was computed of an image is not finite, N first in `values`."""
    wrong = ~values.flatten(1).isfinite().all(1).cpu()
    if wrong.any():
        raise ModelError.of_image(
            "",
            int(index[wrong][0]),
            "drives the network to NaN or infinite values or gradients; check the image, its "
            "preprocessing and the weights.",
        )
