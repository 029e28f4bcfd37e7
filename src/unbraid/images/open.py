"""Images for a network, from any source: in its preprocessing, labelled by its outputs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from unbraid.base.errors import DataError, ModelError, UsageError
from unbraid.base.tables import one_line
from unbraid.images.csv_lists import CSV, PARQUET, list_table
from unbraid.images.dataset import UNLABELLED, first_readable
from unbraid.images.folders import (
    ImageFolder,
    UnlabelledFolder,
    class_folders,
    holds_classes,
    inside,
    shown_in,
    stray_note,
)
from unbraid.images.hugging_face import list_saved
from unbraid.images.labels import GUESSED, Outputs, Reading, fit_any, read_classes, show_names
from unbraid.images.listing import (
    GivenOutputs,
    ListedImages,
    Listing,
    Transform,
    is_url,
    outputs_of,
    read_listing,
)
from unbraid.images.pictures import EXTENSIONS, UNREAD
from unbraid.images.tar import SHARD, is_compressed, list_shards
from unbraid.networks.models import LoadedModel

# Sources of images: folders, lists, shards and data sets of other libraries.


SAVED = "hf:"
_FILES = (*CSV, *PARQUET, SHARD)

Images = ImageFolder | UnlabelledFolder | ListedImages


def open_images(
    source: str | Path,
    transform: Transform | None = None,
    labels: dict[str, int] | None = None,
    class_names: Sequence[str] = (),
    outputs: GivenOutputs | None = None,
) -> Images:
    """Open images, wherever they are; `docs/data.md` says what they may look like.

    Args:
        source: a folder, of class folders or not; a CSV or Parquet list; tar files (one, a folder
            of them, a pattern or a URL); `hf:FOLDER`, a data set saved by `datasets`.
        transform: from an RGB picture to a tensor; None hands on the picture.
        labels: label of each class; by default, what `outputs` says; with none at all, images
            count as unlabelled.
        class_names: names by label; by default those of the outputs or classes.
        outputs: the names of a network's outputs, their number, or the network, which is then run
            on one image; classes are matched with them. By default a class is its number where all
            have numbers for names, else its place among the sorted names.

    Returns:
        A data set of (image, label) for `unbraid.scan`. Its `reading` says how labels were found;
        a warning tells what was guessed.

    Raises:
        DataError: there are no images, the source is damaged, a class has no label, or names
            contradict each other.
        ModelError: the network cannot be run.
        UsageError: a library that it needs is not installed, or `outputs` is something else.
    """
    if labels is not None and outputs is not None:
        raise UsageError("labels and outputs both say what classes stand for; give one of them.")
    listed = list_images(str(source))
    images = partial(open_unread, listed, transform)
    if labels == {} or (labels is None and not has_labels(listed)):
        named = class_names or outputs_of(outputs, images).names
        return open_listed(listed, transform, {}, named)
    note = note_of(listed)
    if labels is not None:
        opened = open_listed(listed, transform, labels, class_names)
    else:
        known = outputs_of(outputs, images)
        reading = read_labels(listed, known)
        note = f"{note} {reading.note}".strip()
        opened = open_listed(listed, transform, reading, class_names)
    if note:
        warnings.warn(note, stacklevel=2)
    return opened


def has_labels(listed: Listing | Path) -> bool:
    """Say whether what `list_images` gave has classes.

    Raises:
        DataError: a folder is missing, or it is not plain whether its folders are classes.
    """
    return holds_classes(listed) if isinstance(listed, Path) else bool(listed.classes)


def note_of(listed: Listing | Path) -> str:
    """Tell what is left out of a source, empty if nothing is."""
    return stray_note(listed) if isinstance(listed, Path) else ""


def classes_of(listed: Listing | Path) -> list[str]:
    """List the classes that have images."""
    return class_folders(listed) if isinstance(listed, Path) else listed.used


def read_labels(listed: Listing | Path, outputs: Outputs) -> Reading:
    """Decide which output each class of a source stands for.

    Raises:
        DataError: names contradict each other or the outputs, or there are too many.
    """
    if isinstance(listed, Path):
        return read_classes(class_folders(listed), outputs, str(listed), distinct=True)
    return read_listing(listed, outputs)


def list_images(where: str) -> Listing | Path:
    """List a source's images; a folder of images is returned as such.

    Raises:
        DataError: there is no such source, or it is damaged.
        UsageError: a library that it needs is not installed.
    """
    path = Path(where)
    if where.startswith(SAVED):
        return list_saved(where.removeprefix(SAVED))
    is_folder = os.path.isdir(where)  # which fails in no way; who opens it tells what is wrong
    if path.suffix.lower() in (*CSV, *PARQUET) and not is_folder and not is_url(where):
        return list_table(path)
    if is_folder and not _holds_only_shards(path):
        return path
    if is_folder or path.suffix.lower() == SHARD or is_url(where):
        return list_shards(where)
    if os.path.exists(where):
        raise DataError(f"{where} is no source of images; name a folder or {', '.join(_FILES)}.")
    return path


def open_listed(
    listed: Listing | Path,
    transform: Transform | None,
    labels: dict[str, int] | Reading,
    class_names: Sequence[str],
) -> Images:
    """Open what `list_images` gave; other arguments as in `open_images`."""
    if isinstance(listed, Listing):
        return ListedImages(listed, transform, labels, class_names)
    if labels == {}:
        return UnlabelledFolder(listed, transform, class_names)
    return ImageFolder(listed, transform, labels, class_names)


def open_unread(listed: Listing | Path, transform: Transform | None) -> Images:
    """Open images whose classes are not read yet, as a network's outputs are to be counted."""
    if isinstance(listed, Path) and has_labels(listed):  # links that stand for classes are followed
        return ImageFolder(listed, transform, dict.fromkeys(class_folders(listed), 0))
    return open_listed(listed, transform, {}, ())


def part_of(where: str, part: str) -> str:
    """Find the training or validation images of a run's data.

    Args:
        where: a folder that holds train and val, each as one file, called train.csv,
            train.parquet, train.tar and so on, or else as a folder; or `hf:FOLDER`, likewise.
        part: "train" or "val".

    Raises:
        DataError: there are several files for one part, or the folder cannot be read.
    """
    saved = where.startswith(SAVED)
    root = Path(where.removeprefix(SAVED))
    if saved:  # whose habit it is to say validation
        names = [part, "validation"] if part == "val" else [part]
        return SAVED + str(next((root / n for n in names if os.path.isdir(root / n)), root / part))
    found = sorted(inside(root, "images")) if os.path.isdir(root) else []
    named = [p for p in found if p.stem == part and p.suffix.lower() in _FILES]
    files = [path for path in named if os.path.isfile(path)]
    if len(files) > 1:
        raise DataError(f"{root} holds both {files[0].name} and {files[1].name}; keep one there.")
    return str(files[0] if files else root / part)  # a list of a folder's images stands beside it


def absolute(where: str) -> str:
    """Name a source so that it is found again from any folder."""
    if where.startswith(SAVED):
        return SAVED + str(Path(where.removeprefix(SAVED)).resolve())
    return where if is_url(where) else str(Path(where).resolve())


def _holds_only_shards(folder: Path) -> bool:
    """Whether a folder holds tar files, and neither folders nor images."""
    shown = shown_in(folder, "images")
    shards = [p for p in shown if p.suffix.lower() == SHARD or is_compressed(p)]
    if not shards or any(os.path.isdir(path) for path in shown):
        return False
    image = next((p for p in shown if p.suffix.lower() in (*EXTENSIONS, *UNREAD)), None)
    if image is not None:
        raise DataError(
            f"{folder} holds both tar files, such as {one_line(shards[0].name)}, and images, such "
            f"as {one_line(image.name)}; move one or the other elsewhere."
        )
    return True


# Images for a network, from any source: in its preprocessing, labelled by its outputs.


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
