"""State dicts from files that anyone may have written; code in them is never run."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from unbraid.checkpoints import (
    Candidate,
    Content,
    candidates,
    classes_of,
    completed,
    distinct,
    find_tensors,
    is_copy,
    misshapen,
)
from unbraid.errors import ModelError, brief
from unbraid.pickles import Unmade, View, read_torch_file

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
