"""A network run on images: where its logits are, and whether they can be used."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from unbraid.base.errors import DataError, ModelError, OutOfMemory, UnbraidError, brief, memory_full
from unbraid.base.modes import callers_device, in_plain_modes
from unbraid.base.tables import count
from unbraid.networks.copying import device_of, number_format, unwrap
from unbraid.networks.relevance import undisturbed

Pick = str | int | Callable[[Any], Tensor]


@in_plain_modes
def with_logits(model: nn.Module, pick: Pick) -> nn.Module:
    """Return a network that puts out the logits alone, with the same layers and weights.

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
                f"{_describe(output)}; {_advice(output)}."
            ) from None
        if not _is_logits(_called_logits(part)):
            raise ModelError(
                f"Part {self.pick!r} of the network's output is {_describe(part)}, not logits of "
                f"shape (images, classes); {_advice(output)}."
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
            f"The network's output is {_describe(output)}, not logits of shape (images, classes); "
            f"{_advice(output)}."
        )
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
    return isinstance(output, Tensor) and output.dim() in (1, 2)


def _advice(output: Any) -> str:
    """Say how to take logits out of an output: only what can be done."""
    parts = [(pick, part) for pick, part in _parts(output) if _is_logits(part)]
    if _is_logits(output):
        return "it is logits itself, so leave --output out"
    if not parts:
        return (
            "no part of it is, so compute them in FILE.py:FUNCTION or by a function that "
            "unbraid.with_logits takes"
        )
    choices = " or ".join(f"--output {pick} {tuple(part.shape)}" for pick, part in parts[:5])
    return f"say where they are: {choices}, or in Python by unbraid.with_logits"


def _parts(output: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """All that `_part_of` can take out of an output, by key, number or attribute."""
    if isinstance(output, (tuple, list)):
        output = dict(enumerate(output))
    elif not isinstance(output, (Mapping, Tensor)):
        output = getattr(output, "__dict__", {})
    for name, value in output.items() if depth and isinstance(output, Mapping) else ():
        yield str(name), value
        for inner, part in _parts(value, depth - 1):
            yield f"{name}.{inner}", part


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    return f"a {type(output).__name__}"


def stack_images(images: Sequence[Tensor], index: Tensor) -> Tensor:
    """Make a batch of images of one size; `index` says where they are in the data set."""
    for image, own in zip(images, index.tolist(), strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"Image {own} is {tuple(image.shape)} where image {int(index[0])} is "
                f"{tuple(images[0].shape)}; bring all to one size in the data set's transform."
            )
    return torch.stack(list(images))


def run_network(model: nn.Module, images: Tensor) -> Tensor:
    """Compute logits, (N, T), from a copy of images in the weights' number format."""
    try:
        with callers_device():
            output = model(images.to(number_format(model, images), copy=True))
    except UnbraidError:
        raise
    except Exception as error:  # of a network of anyone's own
        if memory_full(error):
            raise OutOfMemory("The device is out of memory; lower batch_size.") from None
        raise ModelError(
            f"The network cannot run on images of shape {tuple(images.shape[1:])} and "
            f"{images.dtype} ({brief(error)}); check size, channels and type of the images."
        ) from error
    logits = as_logits(output, len(images))
    if logits.is_meta:
        raise ModelError("The network's weights are on the meta device; load weights first.")
    if len(logits) != len(images):
        raise ModelError(
            f"The network gives {count(len(logits), 'row')} of logits for "
            f"{count(len(images), 'image')}; wrap it so that it gives one for each."
        )
    return logits


def count_outputs(model: nn.Module, image: Tensor) -> int:
    """Run a network on one image, (C, H, W), and count its logits, T."""
    with undisturbed(model), torch.no_grad():
        return run_network(model, image[None].to(device_of(model))).shape[1]


def check_labels(label: Tensor, index: Tensor, logits: Tensor) -> None:
    """Raise DataError if a label names no output of the network; `index` says whose it is."""
    wrong = (label < 0) | (label >= logits.shape[1])
    if wrong.any():
        raise DataError(
            f"Image {int(index[wrong][0])} has label {int(label[wrong][0])}, but the network has "
            f"{logits.shape[1]} outputs; labels must name outputs."
        )


def refuse_broken_values(values: Tensor, index: Tensor) -> None:
    """Raise ModelError if what was computed of an image is not finite, N first in `values`."""
    wrong = ~values.flatten(1).isfinite().all(1).cpu()
    if wrong.any():
        raise ModelError(
            f"Image {int(index[wrong][0])} drives the network to NaN or infinite values or "
            "gradients; check the image, its preprocessing and the weights."
        )
