"""A network's weights as a whole: the hash that names them, and whether all are finite."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unbraid.base.arguments import a_type
from unbraid.base.errors import ModelError, brief
from unbraid.networks.copying import unwrap

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def hash_weights(model: nn.Module) -> str:
    """Hash names, shapes, kinds and bytes of everything in the state dict, on any device.

    What a scripted part keeps as constants counts too. ModelError if there is what has no bytes
    that are the same in any process.
    """
    model = unwrap(model)
    digest = hashlib.sha256()
    for name, value in sorted(_state(model).items(), key=lambda item: item[0]):
        digest.update(name.replace("_orig_mod.", "").encode() + b"\0")  # whether compiled or not
        for piece in _pieces(name, value):
            digest.update(piece)
    for name, module in model.named_modules():
        for constant in _constants(module).items():
            for piece in _pieces(name, constant):
                digest.update(name.encode() + b"\0" + piece)
    return digest.hexdigest()


def refuse_broken_weights(model: nn.Module) -> None:
    """Raise ModelError if any weight is NaN or infinite; bounds that it keeps may be infinite."""
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in _state(model).items():
        if not isinstance(value, Tensor) or is_lazy(value) or value.is_meta:
            continue
        numbers = _numbers(name, value)
        finite = name in weights or name.rsplit(".", 1)[-1].startswith("running_")
        if numbers.isnan().any() or (finite and numbers.isinf().any()):
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


def _constants(module: Any) -> Mapping[str, Any]:
    """What was made a part of the code, as `torch.jit.freeze` does with weights; mostly nothing."""
    try:
        return module.code_with_constants[1].const_mapping  # type: ignore[no-any-return]
    except Exception:  # not scripted, or without code of its own
        return {}


def _pieces(name: str, value: Any) -> Iterator[bytes]:
    """Write a part of a state as bytes that are the same in any process."""
    if isinstance(value, Tensor):
        if is_lazy(value):
            yield f"not there yet\0{value.dtype}\0".encode()
            return
        yield f"{tuple(value.shape)}\0{value.dtype}\0".encode()
        if not value.is_meta:
            yield _numbers(name, value).cpu().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, _PLAIN):
        yield f"{type(value).__name__}\0{value!r}\0".encode()
    elif isinstance(value, list | tuple | Mapping):
        yield f"{type(value).__name__} {len(value)}\0".encode()
        for part in value.items() if isinstance(value, Mapping) else value:
            yield from _pieces(name, part)
    else:
        raise ModelError(
            f"The network's {name!r} is {a_type(value)}, which cannot be hashed; keep it "
            "out of the network's state."
        )


def _numbers(name: str, tensor: Tensor) -> Tensor:
    """The numbers of a tensor of any kind as an ordinary one, contiguous."""
    try:
        if is_traceable_wrapper_subclass(tensor):
            raise TypeError("it is made of other tensors")
        with torch._C.DisableTorchFunctionSubclass():
            plain = tensor.detach()
            if plain.is_quantized:
                plain = plain.dequantize()
            elif plain.layout != torch.strided:
                plain = plain.to_dense()
            return plain.resolve_conj().resolve_neg().contiguous()
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"The network's {name!r} is {a_type(tensor)}, whose numbers cannot be read "
            f"({brief(error)}); give it as an ordinary tensor."
        ) from error
