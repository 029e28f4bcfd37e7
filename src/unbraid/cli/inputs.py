"""Networks and images as the command line names them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
    picked = with_logits(loaded.model, int(output) if output.isdigit() else output)
    return replace(loaded, model=picked, source={**loaded.source, "output": output})


def open_images(loaded: LoadedModel, source: str) -> Images:
    """Open images from any source, with a network's preprocessing and labels."""
    from unbraid.images import images_for

    with _noted():
        images, warning = images_for(loaded, source)
        if warning:
            warnings.warn(warning, stacklevel=1)
    return images


def open_like(images: Images, source: str) -> Images:
    """Open other images with the same preprocessing and labels."""
    from unbraid.images import images_like

    with _noted():
        return images_like(images, source)


@contextmanager
def _noted() -> Iterator[None]:
    """Print warnings of images that are opened as notes."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        yield
    for one in told:
        err_console.print(f"Note: {one.message}", style="yellow")
