"""A network's weights as a whole: the hash that names them, and whether all are finite."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unbraid.base.errors import ModelError, brief
from unbraid.networks.copying import unwrap

_SPARSE = {
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
        digest.update(name.replace("_orig_mod.", "").encode() + b"\0")  # whether compiled or not
        try:
            for piece in _pieces(value, ()):
                digest.update(piece)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise _unreadable(name, value, error) from error
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            for piece in _pieces(_constants(module), ()):
                digest.update(name.encode() + b"\0" + piece)
    return digest.hexdigest()


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
        finite = name in weights or name.rsplit(".", 1)[-1].startswith("running_")
        try:
            broken = any(
                bool(numbers.isnan().any() or (finite and numbers.isinf().any()))
                for numbers in _numbers(value.detach())
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise _unreadable(name, value, error) from error
        if broken:
            raise ModelError(
                f"The network's {name!r} holds NaN or infinite numbers; load sound weights."
            )


def _state(model: nn.Module) -> Mapping[str, Any]:
    try:
        return model.state_dict()
    except Exception as error:  # of a network of anyone's own
        raise ModelError(
            f"The network cannot tell its state ({brief(error)}); mend its state_dict."
        ) from error


def _unreadable(name: str, value: Any, error: Exception) -> ModelError:
    """There are tensors of anyone's own kind."""
    return ModelError(
        f"The network's {name!r} is a {type(value).__name__}, whose numbers cannot be read "
        f"({brief(error)}); give it as an ordinary tensor."
    )


def _constants(module: torch.jit.ScriptModule) -> Any:
    """What was made a part of the code, as `torch.jit.freeze` does with weights; mostly nothing."""
    try:
        return module.code_with_constants[1].const_mapping
    except Exception:  # a module without code of its own
        return {}


def _pieces(value: Any, around: tuple[int, ...]) -> Iterator[bytes]:
    """Write a value as bytes that are the same in any process; `around` are ids of its holders.

    Of what torch and Python do not know how to write, its type and attributes count: addresses in
    memory, which differ from one process to the next, do not.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        yield from _pieces_of_tensor(value, around)
        return
    if isinstance(value, torch.dtype | torch.device | torch.Size | bool | int | float | complex):
        yield f"{kind.__name__}\0{value!r}\0".encode()
        return
    if value is None or isinstance(value, str | bytes | bytearray):
        content = value if isinstance(value, bytes | bytearray) else str(value).encode()
        yield f"{kind.__name__}\0{len(content)}\0".encode() + content
        return
    yield f"{kind.__qualname__}\0".encode()
    if id(value) in around:
        return
    around = (*around, id(value))
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        yield f"{value.shape}\0{value.dtype}\0".encode() + value.tobytes()
    elif isinstance(value, io.BytesIO):
        yield value.getvalue()
    elif isinstance(value, set | frozenset):
        yield from sorted(b"".join(_pieces(part, around)) for part in value)
    else:
        for part in _parts(value):
            yield from _pieces(part, around)


def _parts(value: Any) -> Iterable[Any]:
    """What an object holds, one after the other."""
    if isinstance(value, list | tuple | np.ndarray):
        return value
    if isinstance(value, torch.ScriptObject) and hasattr(value, "__getstate__"):
        return [value.__getstate__()]
    if callable(value) and not isinstance(value, Mapping):
        return []
    pairs = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return [part for pair in pairs.items() for part in pair]


def _pieces_of_tensor(tensor: Tensor, around: tuple[int, ...]) -> Iterator[bytes]:
    if is_lazy(tensor):
        yield f"not there yet\0{tensor.dtype}\0".encode()
        return
    if is_traceable_wrapper_subclass(tensor):
        names, about = tensor.__tensor_flatten__()
        yield f"{type(tensor).__name__}\0{tuple(tensor.shape)}\0".encode()
        for part in (*(getattr(tensor, name) for name in names), about):
            yield from _pieces(part, around)
        return
    with torch._C.DisableTorchFunctionSubclass():
        tensor = tensor.to_dense() if tensor.is_mkldnn else tensor
        yield f"{tuple(tensor.shape)}\0{tensor.dtype}\0".encode()
        for part in _numbers(tensor.detach()):
            plain = part.cpu().resolve_conj().resolve_neg().contiguous().flatten()
            yield plain.view(torch.uint8).numpy().tobytes()


def _numbers(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold what a tensor of any kind holds."""
    if tensor.is_meta:
        return []
    if tensor.is_quantized:
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            scale = [tensor.q_scale(), tensor.q_zero_point()]
            return [tensor.int_repr(), torch.tensor(scale, dtype=torch.float64)]
        scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return [tensor.int_repr(), scales, zeros]
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in _SPARSE:
        return [getattr(tensor, name)() for name in _SPARSE[tensor.layout]]
    return [tensor]
