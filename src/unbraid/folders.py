"""Folders of images: one folder per class and what it stands for, or no classes at all."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from unbraid.data import UNLABELLED
from unbraid.errors import DataError
from unbraid.pictures import EXTENSIONS, UNREAD, read_picture


class ImageFolder(Dataset[tuple[Any, int]]):
    """Images in one folder per class, labelled by the sorted names of these folders.

    Args:
        root: the folder that holds the class folders.
        transform: from an RGB picture to a tensor; None hands on the picture.
        labels: label of each class folder; by default their sorted order.
        class_names: names by label; by default those of the folders.

    Raises:
        DataError: the folder is missing, has no class folder, or a class has no image; or a folder
            or image below cannot be listed.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Image.Image], Any] | None = None,
        labels: dict[str, int] | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        """List the images; none is read yet."""
        self.root = Path(root)
        self.transform = transform
        folders = class_folders(self.root)
        numbers = labels or {name: label for label, name in enumerate(folders)}
        unknown = sorted(set(folders) - set(numbers))
        if unknown:
            raise DataError(
                f"{self.root} has a class folder {unknown[0]!r} that the training images have not; "
                "remove it, or add the class there."
            )
        self.samples: list[tuple[str, int]] = []
        for name in folders:
            paths = _pictures_below(self.root / name)
            if not paths:
                raise DataError(
                    f"Class folder {self.root / name} holds no image ({', '.join(EXTENSIONS)}); "
                    "fill it or remove it."
                )
            self.samples += [(path, numbers[name]) for path in paths]
        self.labels = numbers
        self.targets = [label for _, label in self.samples]
        self.classes = list(class_names)
        if not self.classes:
            self.classes = [""] * (max(numbers.values()) + 1)
            for name, label in numbers.items():
                self.classes[label] = name

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
        DataError: there is no such folder.
    """
    return not any(_is_picture(path) and not path.is_dir() for path in inside(root, "images"))


def class_folders(root: Path) -> list[str]:
    """List the class folders of a folder, sorted.

    Raises:
        DataError: there are none, or one is a link to what holds it, or to nothing.
    """
    shown = [p for p in inside(root, "a folder per class") if not p.name.startswith(".")]
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
) -> tuple[dict[str, int], bool]:
    """Decide which output of a network each class folder, or other class, stands for.

    In this order: folders named by output number; by output name; by WordNet id as in ImageNet
    (the list comes with timm); else as many folders as outputs, or fewer, in their order.

    Args:
        folders: their names, in their order, which is sorted for folders.
        outputs: names of the network's outputs, empty where unknown.
        n_outputs: how many outputs there are.

    Returns:
        The output of each folder, and whether it had to be guessed (fewer folders than outputs).

    Raises:
        DataError: there are more folders than outputs, or WordNet ids cannot be looked up.

    >>> label_folders(["530", "938"], [], 1000)
    ({'530': 530, '938': 938}, False)
    >>> label_folders(["cat", "dog"], ["dog", "cat"], 2)
    ({'cat': 1, 'dog': 0}, False)
    >>> label_folders(["cat", "dog"], [], 1000)
    ({'cat': 0, 'dog': 1}, True)
    """
    if len(folders) > n_outputs:
        raise DataError(
            f"There are {len(folders)} classes but the network has {n_outputs} outputs; remove "
            "those that it does not know."
        )
    if all(name.isdecimal() and int(name) < n_outputs for name in folders):
        return {name: int(name) for name in folders}, False
    if outputs and set(folders) <= set(outputs):
        return {name: list(outputs).index(name) for name in folders}, False
    wordnet_ids = all(re.fullmatch(r"n\d{8}", name) for name in folders)
    if wordnet_ids and n_outputs == 1000 and len(folders) < 1000:
        ids = _imagenet_ids()
        unknown = sorted(set(folders) - set(ids))
        if unknown:
            raise DataError(f"{unknown[0]} is no class of ImageNet-1k; remove or rename it.")
        return {name: ids.index(name) for name in folders}, False
    in_order = {name: label for label, name in enumerate(folders)}
    return in_order, len(folders) < n_outputs


def _imagenet_ids() -> list[str]:
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        raise DataError(
            "Classes named by WordNet id need timm's list of them; pip install timm, or "
            "name them by output number."
        ) from None
    return list(ImageNetInfo("imagenet-1k").label_names())


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
            links = [here / name for name in folders if os.path.islink(os.path.join(where, name))]
            elsewhere += [link for link in links if not _is_around(link)]
            for name in files:
                path = here / name
                if _is_picture(path):
                    _refuse_unread(path)
                    found.append(str(path))
                elif not name.startswith("."):  # editors keep links to nothing, as locks
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
