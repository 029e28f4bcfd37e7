"""Networks and images as the command line names them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from unbraid.cli.output import err_console

if TYPE_CHECKING:
    from unbraid.models import LoadedModel
    from unbraid.sources import Images


def load(
    model: str,
    weights: str | None,
    device: str | None,
    output: str | None = None,
    names: Path | None = None,
) -> LoadedModel:
    """Load a network, and pick the logits out of what it puts out; read names of classes."""
    from unbraid.models import load_model
    from unbraid.names import Names, read_names
    from unbraid.networks import with_logits

    given = Names() if names is None else read_names(names)
    loaded = replace(load_model(model, weights, device), names=given)
    if loaded.note:
        err_console.print(f"Note: {loaded.note}", style="yellow")
    if output is None:
        return loaded
    is_number = re.fullmatch(r"[+-]?\d+", output, re.ASCII)
    picked = with_logits(loaded.model, int(output) if is_number else output)
    return replace(loaded, model=picked, source={**loaded.source, "output": output})


def open_images(loaded: LoadedModel, source: str) -> Images:
    """Open images from any source, with a network's preprocessing and labels."""
    from unbraid.images import images_for

    images, note = images_for(loaded, source)
    if note:
        err_console.print(f"Note: {note}", style="yellow")
    return images
