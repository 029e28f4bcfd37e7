"""A network's weights as a whole: their identity and their health."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from unbraid.errors import ModelError
from unbraid.networks import unwrap


def hash_weights(model: nn.Module) -> str:
    """Hash names, shapes, kinds and bytes of everything in the state dict, on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unwrap(model).state_dict().items()):
        name = name.replace("_orig_mod.", "")  # a compiled part is the same network
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_broken_weights(model: nn.Module) -> None:
    """Raise if any weight is NaN or infinite; bounds that it keeps may be infinite.

    Raises:
        ModelError: names the first such tensor.
    """
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        counts = name in weights or name.rsplit(".", 1)[-1].startswith("running_")
        if tensor.isnan().any() or (counts and tensor.isinf().any()):
            raise ModelError(
                f"The network's {name!r} holds NaN or infinite numbers; load sound weights."
            )
