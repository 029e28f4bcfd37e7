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
    suffix = file.suffix.lower()
    try:
        if suffix == ".npy":
            return torch.from_numpy(np.load(file, allow_pickle=False))
        if suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise almost anything on damaged files
        why = brief(error)
        # Both readers advise to let the file run code.
        if isinstance(error, pickle.UnpicklingError) or "allow_pickle" in str(error):
            why = "it is damaged or holds more than tensors"
        elif not isinstance(error, OSError):
            why = f"it is damaged or holds no tensor: {why}"
        raise UsageError(
            f"{path} cannot be read ({why}); give a tensor as .npy, .pt or .safetensors."
        ) from None
