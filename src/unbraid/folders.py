"""Folders of images: one folder per class and what it stands for, or no classes at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from unbraid.data import UNLABELLED
from unbraid.errors import DataError
from unbraid.pictures import EXTENSIONS, read_picture


class ImageFolder(Dataset[tuple[Any, int]]):
    """Images in one folder per class, labelled by the sorted names of these folders.

    Args:
        root: the folder that holds the class folders.
        transform: from an RGB picture to a tensor; None hands on the picture.
        labels: label of each class folder; by default their sorted order.
        class_names: names by label; by default those of the folders.

    Raises:
        DataError: the folder is missing, has no class folder, or a class has no image.
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
            paths = sorted(_pictures_below(self.root / name))
            if not paths:
                raise DataError(
                    f"Class folder {self.root / name} holds no image ({', '.join(EXTENSIONS)}); "
                    "fill it or remove it."
                )
            self.samples += [(str(path), numbers[name]) for path in paths]
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
        DataError: the folder is missing or holds no image.
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
        paths = sorted(_pictures_below(self.root))
        if not paths:
            raise DataError(
                f"{self.root} holds no image ({', '.join(EXTENSIONS)}); name a folder that does."
            )
        self.samples = [(str(path), UNLABELLED) for path in paths]
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
    return not any(p.suffix.lower() in EXTENSIONS and p.is_file() for p in _inside(root, "images"))


def class_folders(root: Path) -> list[str]:
    """List the class folders of a folder, sorted.

    Raises:
        DataError: there are none, or one is a link to what holds it.
    """
    inside = _inside(root, "a folder per class")
    found = [path for path in inside if path.is_dir() and not path.name.startswith(".")]
    here = root.resolve()
    for path in found:
        if path.is_symlink() and path.resolve() in (here, *here.parents):
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


def _inside(root: Path, what: str) -> Iterator[Path]:
    """Go through a folder that should hold something."""
    try:
        if not root.is_dir():
            raise DataError(f"There is no folder {root}; name one that holds {what}.")
        yield from root.iterdir()
    except OSError as error:
        raise DataError(f"Folder {root} cannot be read ({error.strerror}); name another.") from None


def _pictures_below(folder: Path) -> Iterator[Path]:
    """Go through the images; links to folders are not followed, so none leads round in circles."""
    return (p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
