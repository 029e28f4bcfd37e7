"""Where a source and its parts lie, before anything is listed: what can be refused at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from unbraid.base.errors import DataError, UsageError
from unbraid.images.division import TRAIN, VAL, undivided
from unbraid.images.listing import is_hidden, shown_in
from unbraid.images.lists import CSV, PARQUET
from unbraid.images.own import is_own
from unbraid.images.tar import SHARD, is_url

SAVED = "hf:"
FILES = (*CSV, *PARQUET, SHARD)
_OF_PATTERNS = "*?[{"


def part_of(where: str, part: str) -> str:
    """Find the part "train" or "val" of a run's data: one file, such as train.csv, or a folder.

    Where there is none, it is what `list_images` divides the data into.
    """
    root = Path(where.removeprefix(SAVED))
    if where.startswith(SAVED):  # whose habit it is to say validation
        names = [part, "validation"] if part == "val" else [part]
        return SAVED + str(next((root / n for n in names if os.path.isdir(root / n)), root / part))
    if not os.path.isdir(root):  # a list, or tar files, perhaps behind a URL
        return f"{where.rstrip('/')}/{part}"
    found = sorted(shown_in(root))
    named = [p for p in found if p.stem == part and p.suffix.lower() in FILES]
    files = [path for path in named if os.path.isfile(path)]
    if len(files) > 1:
        raise DataError(f"{root} holds both {files[0].name} and {files[1].name}; keep one there.")
    if files:  # a list of a folder's images stands beside it
        return str(files[0])
    return os.path.join(root, part)


def refuse_absent(where: str) -> None:
    """Raise DataError if there is nothing at a source's path; URLs and patterns are not looked up.

    Of FILE.py:FUNCTION the file is looked for.
    """
    path = where.rpartition(":")[0] if is_own(where) else where.removeprefix(SAVED)
    if os.path.lexists(path) or is_url(where) or any(mark in path for mark in _OF_PATTERNS):
        return
    if undivided(where) is not None:  # a part of what is there
        return
    named = (
        "a file of code" if is_own(where) else "a folder of images, or a list or tar file of them"
    )
    raise DataError(f"There is nothing at {path}; name {named}.")


def refuse_source(where: str, out: Path, *, in_parts: bool) -> None:
    """Refuse a source, before anything is loaded, that is absent or would list results in OUT.

    Args:
        where: a source, or a part of one.
        out: where results are to lie.
        in_parts: whether its parts train and val are what is listed, as in a run.

    Raises:
        DataError: there is nothing at a path, or a source lacks one of its parts.
        UsageError: OUT lies among the images, where the next listing would take it for some.
    """
    if in_parts:
        refuse_absent(where)
    for place in [part_of(where, part) for part in (TRAIN, VAL)] if in_parts else [where]:
        whole = undivided(place)
        refuse_absent(place)
        source = place if whole is None else whole[0]
        if os.path.isdir(source) and _lists(source, out):
            raise UsageError(
                f"{out} lies among the images of {source}, so what is written there would be taken "
                "for images or classes; name another folder for --out."
            )


def _lists(folder: str, out: Path) -> bool:
    """Whether a listing of a folder goes into another one, which need not be there yet."""
    end = Path(os.path.realpath(out))
    for root in _roots(folder):
        if end.is_relative_to(root) and not any(map(is_hidden, end.relative_to(root).parts)):
            return True
    return False


def _roots(folder: str) -> Iterator[str]:
    """A folder, and those that a link in it leads to, which are listed as classes."""
    yield os.path.realpath(folder)
    with os.scandir(folder) as entries:
        links = [one.path for one in entries if one.is_symlink() and not is_hidden(one.name)]
    yield from map(os.path.realpath, filter(os.path.isdir, links))
