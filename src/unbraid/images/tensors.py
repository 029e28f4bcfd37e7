"""Files of tensors: .npy, .pt and .safetensors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from unbraid.base.errors import UsageError, brief

TENSORS = (".npy", ".pt", ".pth", ".safetensors")


def read_tensor_file(path: str | Path) -> Any:
    """Read what such a file holds, tensors in containers perhaps; no code in it is run."""
    file = Path(path)
    try:
        if file.suffix == ".npy":
            return torch.from_numpy(np.load(file, allow_pickle=False))
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, pickle.UnpicklingError, EOFError,
            safetensors.SafetensorError) as error:  # fmt: skip
        raise UsageError(
            f"{path} cannot be read ({brief(error)}); give a tensor as .npy, .pt or .safetensors."
        ) from None
