"""State dicts from files that anyone may have written; code in them is never run."""

from __future__ import annotations

import pickle
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from unbraid.errors import ModelError, brief
from unbraid.pickles import refuse_harm


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from a safetensors or torch file; code in it is never run.

    Raises:
        ModelError: the file is missing, holds code, or does not fit the network.
    """
    state: object
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            refuse_harm(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds Python code or objects, which are never loaded; save the state dict "
            "alone, best as safetensors."
        ) from None
    except Exception as error:  # a damaged file fails in any way
        raise ModelError(
            f"Weights {path} cannot be read ({brief(error)}); give a sound file."
        ) from None
    for wrapper in ("state_dict", "model"):  # the habit of training scripts
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ModelError(f"{path} holds no state dict; save `model.state_dict()`.")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ModelError(f"Weights {path} do not fit the network: {reasons[:300]}") from None
