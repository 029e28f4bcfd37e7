"""Which layers are meant, by name, by pattern or as modules; and their folders."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

from torch import nn

from unbraid.describe import resolve_layer, splittable_layers
from unbraid.errors import LayerError, UsageError

LayerName = str | nn.Module


def layer_names(model: nn.Module, asked: Sequence[LayerName]) -> list[str]:
    """Names of layers and of those that fit patterns, each once, in the order asked for.

    Raises:
        LayerError: there is no such layer, or none fits a pattern.
        UsageError: none is asked for.
    """
    names: dict[str, None] = {}
    for layer in asked:
        if isinstance(layer, str) and is_pattern(layer):
            fitting = [s.name for s in splittable_layers(model) if fnmatchcase(s.name, layer)]
            if not fitting:
                raise LayerError(
                    f"No layer that can be split fits {layer!r}; `unbraid layers` lists them."
                )
            names |= dict.fromkeys(fitting)
        else:
            names[resolve_layer(model, layer)[0]] = None
    if not names:
        raise UsageError("No layer is named; name one or more.")
    return list(names)


def layer_folder(out: Path, name: str) -> Path:
    """Return the folder of one of several layers, whatever characters its name has."""
    return out / quote(name, safe="")


def is_pattern(name: str) -> bool:
    """Whether a name stands for all layers of such names."""
    return any(sign in name for sign in "*?[")
