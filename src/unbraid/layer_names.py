"""Which layers are meant, by name, by pattern or as modules; and their folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

from torch import nn

from unbraid.describe import resolve_layer
from unbraid.errors import LayerError, UsageError
from unbraid.layers import LayerSpec
from unbraid.networks import unwrapped_name

LayerName = str | nn.Module


def layer_names(
    model: nn.Module, asked: Sequence[LayerName], usable: Callable[[], list[LayerSpec]]
) -> list[str]:
    """Names of layers and of those that fit patterns, each once, in the order asked for.

    Args:
        model: whose layers they are.
        asked: names, modules or patterns.
        usable: tells the layers that can be scanned; asked only if there is a pattern.

    Raises:
        LayerError: there is no such layer, or none fits a pattern.
        UsageError: none is asked for.
    """
    names: dict[str, None] = {}
    for layer in asked:
        if is_pattern(model, layer):
            known = [spec.name for spec in usable()]
            # A network may have a part of a wrapper's name itself.
            patterns = (str(layer), unwrapped_name(str(layer)))
            fits = ([name for name in known if fnmatchcase(name, one)] for one in patterns)
            fitting = next(filter(None, fits), [])
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


def is_pattern(model: nn.Module, layer: LayerName) -> bool:
    """Whether a name stands for all layers of such names; a name that is there is none."""
    if not isinstance(layer, str) or not any(sign in layer for sign in "*?["):
        return False
    return layer not in dict(model.named_modules(remove_duplicate=False))
