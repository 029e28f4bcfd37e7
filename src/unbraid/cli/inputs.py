"""Networks and images as the command line names them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from unbraid.cli.output import err_console

if TYPE_CHECKING:
    from unbraid.data import ImageFolder
    from unbraid.models import LoadedModel


def load(model: str, weights: str | None, device: str | None) -> LoadedModel:
    """Load a network."""
    from unbraid.models import load_model

    return load_model(model, weights, device)


def open_images(loaded: LoadedModel, root: Path) -> ImageFolder:
    """Open a folder of class folders with a network's preprocessing and labels."""
    from unbraid.models import open_folder

    folder, warning = open_folder(loaded, root)
    if warning:
        err_console.print(f"Note: {warning}", style="yellow")
    return folder


def open_like(images: ImageFolder, root: Path) -> ImageFolder:
    """Open another folder of the same classes, with the same labels."""
    from unbraid.data import ImageFolder

    return ImageFolder(root, images.transform, images.labels, images.classes)
