"""Images for a network, from any source: in its preprocessing, labelled by its outputs."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from unbraid.data import UNLABELLED, first_readable
from unbraid.errors import ModelError
from unbraid.labels import GUESSED, Outputs, fit_any, show_names
from unbraid.models import LoadedModel
from unbraid.sources import (
    Images,
    classes_of,
    has_labels,
    list_images,
    note_of,
    open_listed,
    open_unread,
    read_labels,
)
from unbraid.sources.listing import Listing


def images_for(loaded: LoadedModel, where: str) -> tuple[Images, str]:
    """Open images with a network's preprocessing and labels.

    Args:
        loaded: the network.
        where: a source as `unbraid.open_images` takes it.

    Returns:
        The images, and a warning if they have no labels, if some lie beside class folders, or if
        it had to be guessed which output each class stands for.

    Raises:
        DataError: there are no images, or names contradict each other or the outputs.
        ModelError: the network cannot run, or its outputs have more or fewer names.
        UsageError: a library that the source needs is not installed.
    """
    listed = list_images(where)
    if has_labels(listed):
        return _labelled(loaded, listed)
    given = loaded.names.of_outputs(_n_outputs(loaded, listed)) if loaded.names.by_output else ()
    what = "class folders" if isinstance(listed, Path) else "labels"
    warning = f"{where} holds images without {what}; the network's predictions are taken."
    return open_listed(listed, loaded.transform, {}, given or loaded.class_names), warning


def _labelled(loaded: LoadedModel, listed: Listing | Path) -> tuple[Images, str]:
    n_outputs, own, classes = _n_outputs(loaded, listed), loaded.class_names, classes_of(listed)
    given = loaded.names.of_outputs(n_outputs)
    if own and len(own) != n_outputs:
        if not given:
            raise ModelError(
                f"The network has {n_outputs} outputs but {len(own)} names for them; give a name "
                "for each, for instance with --names."
            )
        own = ()
    # Classes may be called as the network calls its outputs, or as the names that are given.
    fitting = next((names for names in (own, given) if fit_any(classes, names)), own or given)
    reading = read_labels(listed, Outputs(fitting, n_outputs))
    guessed = reading.how == GUESSED
    others = loaded.names.of_classes({c: reading.labels[c] for c in classes}, guessed)
    shown = replace(reading, outputs=Outputs(given or own, n_outputs))
    names = show_names(shown, others, classes)
    note = f"{note_of(listed)} {reading.note}".strip()
    return open_listed(listed, loaded.transform, reading, names), note


def _n_outputs(loaded: LoadedModel, listed: Listing | Path) -> int:
    """Count the network's outputs on the first image, of the size that it is made for."""
    images = open_unread(listed, loaded.transform)
    return loaded.n_outputs(first_readable(images, range(len(images))))


def images_like(images: Images, where: str) -> Images:
    """Open other images with the same preprocessing and labels."""
    listed = list_images(where)
    if images.labels and (note := note_of(listed)):
        warnings.warn(note, stacklevel=2)
    return open_listed(listed, images.transform, images.labels, images.classes)


def labelled(images: Images) -> bool:
    """Say whether images come with labels."""
    return set(images.targets) != {UNLABELLED}
