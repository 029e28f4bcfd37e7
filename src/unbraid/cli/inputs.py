"""Networks and images as the command line names them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from unbraid.cli.output import err_console

if TYPE_CHECKING:
    from unbraid.folders import Folder
    from unbraid.models import LoadedModel


def load(
    model: str, weights: str | None, device: str | None, output: str | None = None
) -> LoadedModel:
    """Load a network, and pick the logits out of what it puts out."""
    from unbraid.models import load_model
    from unbraid.networks import with_logits

    loaded = load_model(model, weights, device)
    if output is None:
        return loaded
    picked = with_logits(loaded.model, int(output) if output.isdigit() else output)
    return replace(loaded, model=picked, source={**loaded.source, "output": output})


def open_images(loaded: LoadedModel, root: Path) -> Folder:
    """Open a folder of images, with or without class folders, with a network's preprocessing."""
    from unbraid.models import open_folder

    folder, warning = open_folder(loaded, root)
    if warning:
        err_console.print(f"Note: {warning}", style="yellow")
    return folder


def labelled(images: Folder) -> bool:
    """Say whether images come with labels."""
    from unbraid.folders import UnlabelledFolder

    return not isinstance(images, UnlabelledFolder)


def open_like(images: Folder, root: Path) -> Folder:
    """Open another folder of the same kind, with the same labels."""
    from unbraid.folders import ImageFolder, UnlabelledFolder

    if isinstance(images, UnlabelledFolder):
        return UnlabelledFolder(root, images.transform, images.classes)
    return ImageFolder(root, images.transform, images.labels, images.classes)
