"""Sources of images: folders, lists, shards and data sets of other libraries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from unbraid.errors import DataError
from unbraid.folders import ImageFolder, UnlabelledFolder, holds_classes, inside
from unbraid.pictures import EXTENSIONS, UNREAD
from unbraid.sources.hugging import list_saved
from unbraid.sources.listing import ListedImages, Listing, Transform
from unbraid.sources.remote import is_url
from unbraid.sources.shards import SHARD, is_compressed, list_shards
from unbraid.sources.table import CSV, PARQUET, list_table

SAVED = "hf:"
_FILES = (*CSV, *PARQUET, SHARD)

Images = ImageFolder | UnlabelledFolder | ListedImages


def open_images(
    source: str | Path,
    transform: Transform | None = None,
    labels: dict[str, int] | None = None,
    class_names: Sequence[str] = (),
) -> Images:
    """Open images, wherever they are; `docs/data.md` says what they may look like.

    Args:
        source: a folder, of class folders or not; a CSV or Parquet list; tar files (one, a folder
            of them, a pattern or a URL); `hf:FOLDER`, a data set saved by `datasets`.
        transform: from an RGB picture to a tensor; None hands on the picture.
        labels: label of each class; by default its number where all classes of a list or shard
            have numbers for names, else its place among the sorted names; none to leave images
            unlabelled.
        class_names: names by label; by default those of the classes.

    Returns:
        A data set of (image, label) for `unbraid.scan`.

    Raises:
        DataError: there are no images, the source is damaged, or a class has no label.
        UsageError: a library that it needs is not installed.
    """
    return open_listed(list_images(str(source)), transform, labels, class_names)


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
    labels: dict[str, int] | None,
    class_names: Sequence[str],
) -> Images:
    """Open what `list_images` gave; other arguments as in `open_images`."""
    if isinstance(listed, Listing):
        return ListedImages(listed, transform, labels, class_names)
    if labels == {} or (labels is None and not holds_classes(listed)):
        return UnlabelledFolder(listed, transform, class_names)
    return ImageFolder(listed, transform, labels, class_names)


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
    shown = [path for path in inside(folder, "images") if not path.name.startswith(".")]
    images = any(os.path.isdir(p) or p.suffix.lower() in (*EXTENSIONS, *UNREAD) for p in shown)
    return not images and any(p.suffix.lower() == SHARD or is_compressed(p) for p in shown)
