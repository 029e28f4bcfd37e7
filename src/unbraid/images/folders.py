"""Folders of images: one folder per class and what it stands for, or no classes at all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from unbraid.base.errors import DataError
from unbraid.base.tables import count, one_line
from unbraid.images.dataset import UNLABELLED
from unbraid.images.labels import Outputs, Reading, read_classes, reading_of, show_names
from unbraid.images.pictures import EXTENSIONS, UNREAD, read_picture

NO_LABELS = "there are no labels"
# Folders that systems, file servers and archives leave beside what is in them.
_OF_PROGRAMS = {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}


class ImageFolder(Dataset[tuple[Any, int]]):
    """Images in one folder per class, labelled by the names of these folders.

    Args:
        root: the folder that holds the class folders.
        transform: from an RGB picture to a tensor; None hands on the picture.
        labels: label of each class folder, or a reading of them; by default `read_classes` decides.
        class_names: names by label; by default those of the folders.

    Raises:
        DataError: the folder is missing, has no class folder, or a class has no image or no label;
            or a folder or image below cannot be listed.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Image.Image], Any] | None = None,
        labels: dict[str, int] | Reading | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        """List the images; none is read yet."""
        self.root = Path(root)
        self.transform = transform
        folders = class_folders(self.root)
        reading = reading_of(labels, folders, str(self.root), distinct=True)
        self.samples: list[tuple[str, int]] = []
        for name in folders:
            paths = _pictures_below(self.root / name)
            if not paths:
                raise DataError(
                    f"Class folder {self.root / name} holds no image ({', '.join(EXTENSIONS)}); "
                    "fill it or remove it."
                )
            self.samples += [(path, reading.labels[name]) for path in paths]
        self.labels, self.reading = reading.labels, reading.how
        self.targets = [label for _, label in self.samples]
        self.classes = list(class_names) or show_names(reading, {}, folders)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Read one image."""
        picture, label = self.picture(index), self.targets[index]
        return (picture if self.transform is None else self.transform(picture)), label

    def picture(self, index: int) -> Image.Image:
        """Read one image as an RGB picture, before the transform."""
        return read_picture(self.samples[index][0])


class UnlabelledFolder(Dataset[tuple[Any, int]]):
    """Images anywhere below a folder, without labels.

    Args:
        root: the folder.
        transform: from an RGB picture to a tensor; None hands on the picture.
        class_names: names of the network's outputs, for what it predicts.

    Raises:
        DataError: the folder is missing or holds no image, or a folder or image below cannot be
            listed.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Image.Image], Any] | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        """List the images; none is read yet."""
        self.root = Path(root)
        self.transform = transform
        paths = _pictures_below(self.root)
        if not paths:
            raise DataError(
                f"{self.root} holds no image ({', '.join(EXTENSIONS)}); name a folder that does."
            )
        self.labels: dict[str, int] = {}
        self.reading = NO_LABELS
        self.samples = [(path, UNLABELLED) for path in paths]
        self.targets = [UNLABELLED] * len(paths)
        self.classes = list(class_names)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Read one image."""
        picture = self.picture(index)
        return (picture if self.transform is None else self.transform(picture)), UNLABELLED

    def picture(self, index: int) -> Image.Image:
        """Read one image as an RGB picture, before the transform."""
        return read_picture(self.samples[index][0])


def holds_classes(root: Path) -> bool:
    """Say whether a folder has class folders, rather than images of its own.

    Raises:
        DataError: there is no such folder, or it has as many images of its own as in folders.
    """
    own = _own_pictures(root)
    return not own or bool(_strays(root, own))


def _strays(root: Path, own: list[str]) -> list[str]:
    """List the images that lie beside class folders, so belong to no class.

    Raises:
        DataError: they are as many as those in the folders, so it is not plain what is meant.
    """
    for name in own:
        _refuse_unread(root / name)
    held = sum(_count_pictures(path) for path in shown_in(root, "images") if path.is_dir())
    if 0 < held <= len(own):
        raise DataError(
            f"{root} has {count(len(own), 'image')} of its own and {held:,} in folders, so it is "
            "not plain whether the folders are classes; move one or the other elsewhere."
        )
    return own if held else []


def stray_note(root: Path) -> str:
    """Tell of images beside class folders, which are left out; empty where there are none."""
    found = _strays(root, _own_pictures(root))
    if not found:
        return ""
    names = ", ".join(map(one_line, found[:3])) + (", ..." if len(found) > 3 else "")
    return (
        f"{count(len(found), 'image')} beside the class folders of {root} left out, as of no class "
        f"({names})."
    )


def _own_pictures(root: Path) -> list[str]:
    """Images that lie in a folder itself."""
    found = [path for path in shown_in(root, "images") if _is_picture(path) and not path.is_dir()]
    return sorted(path.name for path in found)


def _count_pictures(folder: Path) -> int:
    n = 0
    with _listing_told(folder):
        for _, folders, files in os.walk(folder, onerror=_fail):
            folders[:] = [name for name in folders if not is_hidden(name)]
            n += sum(_is_picture(Path(name)) for name in files if not is_hidden(name))
    return n


def is_hidden(name: str) -> bool:
    """Say whether a file or folder is a program's own, not the user's.

    >>> is_hidden(".ipynb_checkpoints"), is_hidden("._a.png"), is_hidden("a.png")
    (True, True, False)
    """
    return name.startswith(".") or name in _OF_PROGRAMS


def shown_in(root: Path, what: str) -> list[Path]:
    """List what is in a folder but hidden things, as `inside` does."""
    return [path for path in inside(root, what) if not is_hidden(path.name)]


def class_folders(root: Path) -> list[str]:
    """List the class folders of a folder, sorted.

    Raises:
        DataError: there are none, or one is a link to what holds it, or to nothing.
    """
    shown = shown_in(root, "a folder per class")
    found = [path for path in shown if path.is_dir()]
    for path in shown:
        _refuse_link_to_nothing(path)
    for path in found:
        if path.is_symlink() and _is_around(path):
            raise DataError(f"Class folder {path} is a link to a folder around it; remove it.")
    names = sorted(path.name for path in found)
    if not names:
        raise DataError(
            f"{root} has no class folders; put the images of each class into a folder of its own."
        )
    return names


def label_folders(
    folders: Sequence[str], outputs: Sequence[str], n_outputs: int
) -> tuple[dict[str, int], str]:
    """Decide which output of a network each class folder stands for, as `read_classes` does.

    Args:
        folders: their names, sorted.
        outputs: names of the network's outputs, empty where unknown.
        n_outputs: how many outputs there are.

    Returns:
        The output of each folder, and what had to be guessed; empty if nothing was.

    Raises:
        DataError: names contradict each other or the outputs, or there are too many.

    >>> label_folders(["530", "938"], [], 1000)
    ({'530': 530, '938': 938}, '')
    >>> label_folders(["Cat", "dog"], ["dog", "cat"], 2)
    ({'Cat': 1, 'dog': 0}, '')
    >>> label_folders(["cat", "dog"], [], 1000)[0]
    {'cat': 0, 'dog': 1}
    """
    known = Outputs(tuple(outputs), n_outputs)
    reading = read_classes(folders, known, "The data set", distinct=True)
    return reading.labels, reading.note


def inside(root: Path, what: str) -> list[Path]:
    """List a folder that should hold something.

    Raises:
        DataError: it is missing or cannot be read.
    """
    with _listing_told(root):
        if not root.is_dir():
            raise DataError(f"There is no folder {root}; name one that holds {what}.")
        found = list(root.iterdir())
        for path in found[:1]:
            path.lstat()  # which fails where a folder may be listed but not looked into
        return found


@contextmanager
def _listing_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where, reason = error.filename or folder, error.strerror or error
        raise DataError(f"Folder {where} cannot be read ({reason}); mend that.") from None


def _is_picture(path: Path) -> bool:
    """Whether a name says so; a link to nothing and a pipe are told later, as broken images."""
    return path.suffix.lower() in (*EXTENSIONS, *UNREAD)


def _refuse_link_to_nothing(path: Path) -> None:
    if path.is_symlink() and not os.path.exists(path):
        raise DataError(f"{path} is a link to what is not there; mend or remove it.")


def _is_around(link: Path) -> bool:
    """Whether a link leads to a folder that the link itself is in."""
    here = link.parent.resolve()
    return link.resolve() in (here, *here.parents)


def _pictures_below(folder: Path) -> list[str]:
    """List the images, sorted folder by folder.

    Links to folders are not followed, so none leads round in circles; those to elsewhere are told.

    Raises:
        DataError: a folder cannot be read, a link leads nowhere, or pictures are of another kind.
    """
    found: list[str] = []
    elsewhere: list[Path] = []
    with _listing_told(folder):
        for where, folders, files in os.walk(folder, onerror=_fail):
            here = Path(where)
            folders[:] = [name for name in folders if not is_hidden(name)]
            links = [here / name for name in folders if os.path.islink(os.path.join(where, name))]
            elsewhere += [link for link in links if not _is_around(link)]
            for name in files:
                if is_hidden(name):  # editors keep links to nothing, as locks
                    continue
                path = here / name
                if _is_picture(path):
                    _refuse_unread(path)
                    found.append(str(path))
                else:
                    _refuse_link_to_nothing(path)
    if elsewhere:
        warnings.warn(
            f"{len(elsewhere)} links to folders are not followed, the first is {elsewhere[0]}; put "
            "the images' own folders in their place if they are wanted.",
            stacklevel=4,
        )
    return sorted(found, key=lambda path: path.split(os.sep))


def _fail(error: OSError) -> None:
    raise error


def _refuse_unread(path: Path) -> None:
    if path.suffix.lower() in UNREAD:
        raise DataError(f"{path} is a picture of a kind that is not read; convert or remove it.")
