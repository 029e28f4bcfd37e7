"""Images for a network, from any source: in its preprocessing, labelled by its outputs."""

from __future__ import annotations

from pathlib import Path

from unbraid.data import UNLABELLED
from unbraid.folders import class_folders, holds_classes, label_folders
from unbraid.models import LoadedModel
from unbraid.sources import Images, list_images, open_images, open_listed
from unbraid.sources.listing import label_classes


def images_for(loaded: LoadedModel, where: str) -> tuple[Images, str]:
    """Open images with a network's preprocessing and labels.

    Args:
        loaded: the network.
        where: a source as `unbraid.open_images` takes it.

    Returns:
        The images, and a warning if they have no labels, or if it had to be guessed which output
        each class stands for.

    Raises:
        DataError: there are no images, or more classes than outputs.
        UsageError: a library that the source needs is not installed.
    """
    listed = list_images(where)
    outputs, transform = loaded.class_names, loaded.transform
    if holds_classes(listed) if isinstance(listed, Path) else listed.classes:
        n_outputs = loaded.n_outputs()
        if isinstance(listed, Path):
            labels, guessed = label_folders(class_folders(listed), outputs, n_outputs)
        else:
            labels, guessed = label_classes(listed, outputs, n_outputs)
        warning = (
            f"{where} has {len(labels)} classes for {n_outputs} outputs; taken in order as the "
            "first outputs. Name the classes by output number or name if that is wrong."
        )
        return open_listed(listed, transform, labels, outputs), warning if guessed else ""
    what = "class folders" if isinstance(listed, Path) else "labels"
    warning = f"{where} holds images without {what}; the network's predictions are taken."
    return open_listed(listed, transform, {}, outputs), warning


def images_like(images: Images, where: str) -> Images:
    """Open other images with the same preprocessing and labels."""
    labels = getattr(images, "labels", {})
    return open_images(where, images.transform, labels, images.classes)


def labelled(images: Images) -> bool:
    """Say whether images come with labels."""
    return set(images.targets) != {UNLABELLED}
