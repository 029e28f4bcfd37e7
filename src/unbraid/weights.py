"""A network's weights as a whole: their identity and their health."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unbraid.errors import ModelError, brief
from unbraid.networks import unwrap

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
        for part in _parts(value):
            yield from _pieces(part, inside)


def _parts(value: Any) -> Iterator[Any]:
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
