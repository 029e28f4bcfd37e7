"""What a source of images holds, how a folder is listed, and a data set of any listing."""

from __future__ import annotations

import os
import stat
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from unbraid.base.errors import DataError, OutOfReach, brief, is_of_file, out_of_reach
from unbraid.base.tables import count, one_line
from unbraid.images.broken import UNLABELLED
from unbraid.images.labels import NO_LABELS, Classes, Reading, reading_of, show_names
from unbraid.images.mapped import Numbers, Pairs, Texts, distinct
from unbraid.images.pictures import EXTENSIONS, UNREAD, read_picture
from unbraid.images.tensors import (
    TENSORS,
    AsFloat32,
    first_of,
    hold_tensors,
    is_tensor_name,
    read_tensor,
)
from unbraid.networks.class_names import LONGEST, number_in, output_number

Transform = Callable[[Any], Any]  # from an RGB picture or a tensor
Reader = Callable[[int], Any]  # to either

# Folders that systems, file servers and archives leave beside what is in them.
_OF_PROGRAMS = {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}


@dataclass(frozen=True)
class Files:
    """Reads image files by index; where their sizes are known, none that was changed since."""

    paths: Sequence[str]
    sizes: Sequence[int] | None = None  # bytes, -1 for a file that was gone
    of_tensors: bool = False  # not of pictures

    def __call__(self, index: int) -> Image.Image | Tensor:
        """Read one image."""
        path = self.paths[index]
        found = None if self.sizes is None else look_at(path, f"Image {path}")
        if found is not None and self.sizes is not None and found.st_size != self.sizes[index]:
            raise OutOfReach(f"{path} was changed since it was listed; start again.")
        return read_tensor(path) if self.of_tensors else read_picture(path)


def files_at(paths: Sequence[str], sizes: Sequence[int] | None = None) -> Files:
    """Take files for pictures or tensors, whichever the first one is."""
    return Files(paths, sizes, hold_tensors(paths))


@dataclass(frozen=True)
class Items:
    """Gives tensors of a data set by index, as the network takes them."""

    dataset: Dataset[Any]
    bands: Any = None  # by which they are shown

    def __call__(self, index: int) -> Any:
        """Give one."""
        return self.dataset[index][0]


@dataclass(frozen=True)
class Listing:
    """What a source holds, before it is known which output each class stands for. N images."""

    source: str  # for messages
    ids: Sequence[str]  # (N,), what names each image for good
    read: Reader  # by index; goes to worker processes
    classes: list[str]  # names, in their order; none without labels
    class_of: Sequence[int]  # (N,), index among the classes, UNLABELLED without labels
    groups: Sequence[str] | None = None  # (N,), which images belong together
    sizes: Sequence[int] | None = None  # (N,), bytes
    root: str | None = None  # of a folder, whose images are named by their paths
    divided: str = ""  # if this is a part of what the source holds, how it was divided, in words
    seen: Sequence[str] = ()  # then the classes with images in either part

    @property
    def known(self) -> Classes:
        """Its classes, and which have images."""
        used = distinct(self.class_of)
        seen = self.seen or [name for k, name in enumerate(self.classes) if k in used]
        return Classes(self.classes, self.source, seen, of_folders=self.root is not None)

    @property
    def of_tensors(self) -> bool:
        """Whether its files hold tensors."""
        return isinstance(self.read, Files) and self.read.of_tensors


class ListedImages(Dataset[tuple[Any, int]]):
    """Images of a listing, as a data set of (image, label).

    It keeps `targets`, `ids`, and, where known, `groups` and `sizes` in bytes, each (N,);
    `classes`, names by label; `labels` by class, and how they were found, `reading`; how they were
    divided into training and validation images, `divided`, empty where they came so.
    """

    def __init__(
        self,
        listing: Listing,
        transform: Transform | None = None,
        labels: dict[str, int] | Reading | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        """Label the images; none is read yet."""
        if not listing.ids:
            raise DataError(f"{listing.source} holds no image; name a source that does.")
        known, reading = listing.known, Reading({}, NO_LABELS)
        if labels and not listing.classes:
            what = "images without labels" if listing.root is None else "no class folders"
            raise DataError(f"{listing.source} has {what}; label the images as the others are.")
        if labels != {} and listing.classes:
            reading = reading_of(labels, known)
        self.labels, self.reading = reading.labels, reading.how
        # The last one is what UNLABELLED, -1, stands for.
        table = [self.labels.get(name, UNLABELLED) for name in listing.classes] + [UNLABELLED]
        self.targets: Sequence[int] = (
            listing.class_of.of(table)
            if isinstance(listing.class_of, Numbers)
            else [table[k] for k in listing.class_of]
        )
        self.classes = list(class_names) or show_names(reading, {}, known.seen)
        self.ids, self.sizes, self.groups = listing.ids, listing.sizes, listing.groups
        self.transform, self.divided, self.listed_in = transform, listing.divided, listing.source
        self._read = listing.read
        self.of_tensors = listing.of_tensors
        self.unprepared = False  # whether tensors are not as a network was given them
        if self.of_tensors and transform is None:
            self.transform = AsFloat32()
        if isinstance(listing.read, Items):
            self.transform, self.bands = None, listing.read.bands
        if isinstance(listing.read, Files) and listing.root is not None:
            self.root = listing.root
            paths = listing.read.paths
            mapped = isinstance(paths, Texts)
            self.samples: Sequence[tuple[str, int]] = (
                Pairs(paths, self.targets)
                if mapped
                else list(zip(paths, self.targets, strict=True))
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Read one image."""
        image = self._read(index)
        if self.of_tensors:
            image = self._prepared(image, index)
        elif self.transform is not None:
            image = self.transform(image)
        return image, self.targets[index]

    def _prepared(self, tensor: Tensor, index: int) -> Any:
        """Bring a tensor out of a file to what the network takes; DataError if it is unlike it."""
        assert isinstance(self._read, Files)
        assert self.transform is not None
        path = self._read.paths[index]
        shown, shape = f"Image {one_line(path)}", tuple(tensor.shape)
        if isinstance(self.transform, AsFloat32):
            name, first = self._first or (path, shape)
            if tensor.dim() != len(first) or (len(first) > 1 and shape[0] != first[0]):
                raise DataError(
                    f"{shown} is of shape {shape}, and {one_line(name)} of shape {first}; give all "
                    "the same number of bands."
                )
        try:
            made = self.transform(tensor)
        except Exception as error:  # of code of anyone's own
            stops = out_of_reach(shown, error) is not None  # not this file's fault
            raise (OutOfReach if stops else DataError)(
                f"{shown}, of shape {shape} and {tensor.dtype}, cannot be brought to what the "
                f"network takes ({brief(error)}); the preprocessing is given the file's tensor."
            ) from None
        floating = isinstance(made, Tensor) and made.is_floating_point()
        if floating and not made.isfinite().all():
            raise DataError(f"{shown} cannot be read (it holds NaN or infinite numbers).")
        return made

    @cached_property
    def _first(self) -> tuple[str, tuple[int, ...]] | None:
        """The first file that can be read, and the shape of its tensor, which others are like."""
        assert isinstance(self._read, Files)
        found = first_of(self._read.paths)
        return None if found is None else (found[0], tuple(found[1].shape))

    def shown(self, index: int) -> tuple[Dataset[Any], int] | str | None:
        """What an item shows: an item of the data set inside, or a file; None where neither is."""
        if isinstance(self._read, Items):
            return self._read.dataset, index
        return self._read.paths[index] if isinstance(self._read, Files) else None

    @property
    def read_by_code(self) -> bool:
        """Whether the images come of a data set of anyone's own, which may change."""
        return isinstance(self._read, Items)

    @property
    def picture(self) -> Reader:
        """Reads one image, by index, as an RGB picture, before the transform."""
        if self.of_tensors or isinstance(self._read, Items):
            raise AttributeError("These images are tensors, not pictures.")
        return self._read

    @property
    def file_tensor(self) -> Reader:
        """Reads one image, by index, as the tensor in its file, before the transform."""
        if not self.of_tensors:
            raise AttributeError("These images are no files of tensors.")
        return self._read


# --- what lists have in common --------------------------------------------------------------------


def make_listing(
    source: str,
    ids: list[str],
    read: Reader,
    labels: Sequence[str | None],
    groups: list[str] | None = None,
    sizes: list[int] | None = None,
) -> Listing:
    """Make a listing of images that are labelled one by one, all or none of them."""
    twice = next((one for one, n in Counter(ids).items() if n > 1), None)
    if twice is not None:
        raise DataError(f"{source} names {one_line(twice)} a second time; name each image once.")
    told = [label for label in labels if label is not None]
    if 0 < len(told) < len(ids):
        raise DataError(
            f"{one_line(ids[labels.index(None)])} has no label, but others have; label all images "
            "or none."
        )
    classes, class_of = by_class(told, source) if told else ([], [UNLABELLED] * len(ids))
    return Listing(source, ids, read, classes, class_of, groups, sizes)


def by_class(labels: Sequence[str], source: str) -> tuple[list[str], list[int]]:
    """Sort images into classes by their labels: numbers and names in any way of writing.

    >>> by_class(["10", "9.0", "10"], "it")
    (['9', '10'], [1, 0, 1])
    """
    numbers = {label: number_in(label) for label in set(labels)}
    for label in numbers:
        if not label or len(label) > LONGEST:
            raise DataError(
                f"{source} has a label of {len(label)} characters; name classes with 1 to "
                f"{LONGEST}."
            )
    if None in numbers.values():
        own = {label: unicodedata.normalize("NFC", label) for label in numbers}
        classes = sorted(set(own.values()))
    else:
        own = {label: str(n) for label, n in numbers.items()}
        classes = sorted(set(own.values()), key=int)
    number = {name: k for k, name in enumerate(classes)}
    return classes, [number[own[label]] for label in labels]


def label_text(value: Any, where: str) -> str:
    """Write a label out of a table as text."""
    number = output_number(value)
    text = value.strip() if isinstance(value, str) else "" if number is None else str(number)
    if not text or text.startswith("-"):
        shown = one_line(repr(value))
        raise DataError(
            f"{where} has the label {shown}; give an output's number or a class's name."
        )
    return text


def look_at(file: str, what: str) -> os.stat_result | None:
    """Look for a file that something names; None where there is none, or no regular one."""
    try:
        found = os.stat(file)
    except (OSError, ValueError) as error:  # the latter for what can be no file's name
        away = None if is_of_file(error) else out_of_reach(what, error)
        if away is not None:
            raise away from None
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def seen_from(root: str, path: str) -> str:
    """Name a file as seen from a folder, with slashes on every system."""
    prefix = os.path.join(root, "")  # most files lie below, where relpath takes much longer
    one = path[len(prefix) :] if path.startswith(prefix) else os.path.relpath(path, root)
    return one.replace(os.sep, "/")


# --- folders --------------------------------------------------------------------------------------


def list_folder(root: Path, with_classes: bool = True) -> Listing:
    """List a folder of class folders, or of images without classes."""
    classes, found = walk_folder(root, with_classes)
    paths: list[str] = []
    class_of: list[int] = []
    for number, own in found:
        paths += own
        class_of += [number] * len(own)
    return Listing(
        source=str(root),
        ids=[seen_from(str(root), path) for path in paths],
        read=files_at(paths),
        classes=classes,
        class_of=class_of,
        root=str(root),
    )


def walk_folder(
    root: Path, with_classes: bool
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The classes of a folder, and the images of each, with its number, as they are asked for."""
    shown = shown_in(root)
    classes = sorted(path.name for path in shown if path.is_dir()) if with_classes else []
    endings = _endings_in(root, classes)
    own = sorted(path.name for path in shown if not path.is_dir() and _is_image(path, endings))
    if with_classes and not own and not classes:
        raise DataError(
            f"{root} has no class folders; put the images of each class into a folder of its own."
        )
    n_below = sum(len(_images_below(root / name, endings)) for name in classes) if own else 0
    if n_below:
        raise DataError(
            f"{root} has {count(len(own), 'image')} of its own, such as {one_line(own[0])}, and "
            f"{n_below:,} in folders, so it is not plain whether the folders are classes; move one "
            "or the other elsewhere."
        )
    if own or not classes:
        return [], _found_in(root, [(UNLABELLED, root)], endings)
    for path in shown:
        _refuse_dangling(path)
    folders = [(k, root / name) for k, name in enumerate(classes)]
    return classes, _found_in(root, folders, endings)


def _endings_in(root: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """How images end: as pictures, or, where a folder holds none, as files of tensors."""
    links = (root / name for name in classes if os.path.islink(root / name))
    for folder in (root, *links):
        for _, folders, files in os.walk(folder, onerror=_refuse_unlisted):
            folders[:] = [name for name in folders if not is_hidden(name)]
            if any(name.lower().endswith(EXTENSIONS) and not is_hidden(name) for name in files):
                return EXTENSIONS
    return TENSORS


def _found_in(
    root: Path, folders: Sequence[tuple[int, Path]], endings: tuple[str, ...]
) -> Iterator[tuple[int, list[str]]]:
    """The images of each folder, with its number; warns of tensors passed over beside pictures."""
    n_passed, one = 0, ""
    for number, folder in folders:
        passed: list[str] = []
        yield number, _some_below(folder, endings, passed)
        n_passed, one = n_passed + len(passed), one or min(passed, default="")
    if n_passed:
        warnings.warn(
            f"{root} holds pictures, so tensors in it are passed over: {count(n_passed, 'file')}, "
            f"such as {one_line(one)}.",
            stacklevel=2,
        )


def is_hidden(name: str) -> bool:
    """Say whether a file or folder is a program's own, not the user's."""
    return name.startswith(".") or name in _OF_PROGRAMS


def shown_in(root: Path) -> list[Path]:
    """List a folder that should hold something, but for hidden things."""
    _, folders, files = next(os.walk(root, onerror=_refuse_unlisted))
    return [root / name for name in (*folders, *files) if not is_hidden(name)]


def _refuse_unlisted(error: OSError) -> NoReturn:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise DataError(f"There is no folder {error.filename}; name one that holds images.")
    raise DataError(
        f"Folder {error.filename} cannot be read ({error.strerror}); mend that."
    ) from None


def _is_image(path: Path, endings: tuple[str, ...]) -> bool:
    """Whether a name says so; a link to nothing and a pipe are told later, as broken images."""
    if path.suffix.lower() in UNREAD:
        raise DataError(f"{path} is a picture of a kind that is not read; convert or remove it.")
    return path.suffix.lower() in endings


def _refuse_dangling(path: Path) -> None:
    if path.is_symlink() and not os.path.exists(path):
        raise DataError(f"{path} is a link to what is not there; mend or remove it.")


def _some_below(folder: Path, endings: tuple[str, ...], passed: list[str]) -> list[str]:
    """List the images, and those passed over; DataError where there is none."""
    found = _images_below(folder, endings, passed)
    if not found:
        known = ", ".join(EXTENSIONS if endings == EXTENSIONS else (*EXTENSIONS, *TENSORS))
        raise DataError(f"Folder {folder} holds no image ({known}); fill or remove it.")
    return found


def _images_below(
    folder: Path, endings: tuple[str, ...], passed: list[str] | None = None
) -> list[str]:
    """List the images, sorted folder by folder; a link to a folder could lead round in circles."""
    found: list[str] = []
    for where, folders, files in os.walk(folder, onerror=_refuse_unlisted):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for link in filter(os.path.islink, (os.path.join(where, name) for name in folders)):
            raise DataError(
                f"{link} is a link to a folder, which is not followed there; put the folder itself "
                "in its place, or remove it."
            )
        for name in files:
            if is_hidden(name):  # editors keep links to nothing, as locks
                continue
            if _is_image(Path(where, name), endings):
                found.append(os.path.join(where, name))
                continue
            _refuse_dangling(Path(where, name))
            if passed is not None and is_tensor_name(name):
                passed.append(os.path.join(where, name))
    return sorted(found, key=lambda path: path.split(os.sep))
