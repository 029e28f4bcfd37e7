"""Images: folders of class folders, labels and identity of any data set, broken images."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from unbraid.errors import DataError, UsageError
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
        transform: Callable[[Image.Image], Tensor] | None = None,
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


def class_folders(root: Path) -> list[str]:
    """List the class folders of a folder, sorted.

    Raises:
        DataError: there are none.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; name one that holds a folder per class.")
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(
            f"{root} has no class folders; put the images of each class into a folder of its own."
        )
    return names


def label_folders(
    folders: Sequence[str], outputs: Sequence[str], n_outputs: int
) -> tuple[dict[str, int], bool]:
    """Decide which output of a network each class folder stands for.

    In this order: folders named by output number; by output name; by WordNet id as in ImageNet
    (the list comes with timm); else as many folders as outputs, or fewer, in sorted order.

    Args:
        folders: their names, sorted.
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
            f"There are {len(folders)} class folders but the network has {n_outputs} outputs; "
            "remove the folders that it does not know."
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
            "Folders named by WordNet id need timm's list of them; pip install 'unbraid[timm]', or "
            "name the folders by output number."
        ) from None
    return list(ImageNetInfo("imagenet-1k").label_names())


def _pictures_below(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())


def labels_of(dataset: Dataset[Any]) -> list[int]:
    """Return all labels of a data set, without reading images where it keeps a list of them.

    Looks for `targets` or `labels` (the habit of torchvision's data sets) through Subsets.
    """
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        return [inner[i] for i in dataset.indices]
    for name in ("targets", "labels", "_labels"):
        kept = getattr(dataset, name, None)
        if kept is not None and hasattr(
            kept, "tolist"
        ):  # going through a tensor would make a tensor of every label
            kept = kept.tolist()
        if isinstance(kept, Sequence):
            return [int(label) for label in kept]
    return [int(dataset[i][1]) for i in range(size_of(dataset))]


def size_of(dataset: Dataset[Any]) -> int:
    """Return the number of images.

    Raises:
        UsageError: the data set has no length or no image.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"The data set ({type(dataset).__name__}) must be map-style: with __len__ and "
            "__getitem__ giving (image, label)."
        )
    size = len(dataset)
    if size == 0:
        raise UsageError("The data set holds no image; pass one that does.")
    return size


def check_loading(batch_size: int, workers: int) -> None:
    """Refuse numbers that no images can be loaded by.

    Raises:
        UsageError: one is out of range.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be 1 or more.")
    if workers < 0:
        raise UsageError(f"workers is {workers}; it must be 0 or more.")


def class_names_of(dataset: Dataset[Any]) -> tuple[str, ...]:
    """Return the names of a data set's classes by label, empty where it has none."""
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    return tuple(str(name) for name in getattr(inner, "classes", ()))


def name_of(dataset: Dataset[Any], index: int) -> str:
    """Name an image for people: its file, or its place in a data set that has no files."""
    samples = getattr(dataset, "samples", None)
    return str(samples[index][0]) if samples is not None else f"image {index}"


def preprocessing_of(dataset: Dataset[Any]) -> str:
    """Describe a data set's transform, as far as it tells."""
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    transform = getattr(inner, "transform", None)
    text = repr(transform) if transform is not None else ""
    # A default repr holds a memory address, which differs from run to run.
    return text if " at 0x" not in text else getattr(transform, "__qualname__", "custom")


def fingerprint(dataset: Dataset[Any], labels: Sequence[int]) -> str:
    """Hash what identifies a data set: labels, and file names and sizes or else sample images.

    A folder is known by the relative path and size of every file. Of any other data set, sixteen
    evenly spaced images are read.
    """
    digest = hashlib.sha256(torch.tensor(labels).numpy().tobytes())
    samples = getattr(dataset, "samples", None)
    root = getattr(dataset, "root", None)
    if samples is not None and root is not None:
        for path, _ in samples:
            size = Path(path).stat().st_size if Path(path).exists() else -1
            name = os.path.relpath(path, root)
            digest.update(os.fsencode(name) + f"\0{size}\0".encode())
    else:
        step = max(1, len(labels) // 16)
        for index in range(0, len(labels), step):
            try:
                image = torch.as_tensor(dataset[index][0])
            except Exception:  # a broken image is the scan's to report, with its rules
                continue
            digest.update(image.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


GoodItem = tuple[int, Tensor, int]  # index, image, label
BrokenItem = tuple[int, str]  # index, what went wrong


def sort_out(
    items: Sequence[GoodItem | BrokenItem], skip_broken: bool
) -> tuple[list[GoodItem], list[int]]:
    """Part the items of a Readable into images and the indices of broken ones.

    Raises:
        DataError: an image is broken, and broken ones are not to be skipped.
    """
    good = [item for item in items if len(item) == 3]
    broken = [item for item in items if len(item) == 2]
    if broken and not skip_broken:
        raise DataError(f"{broken[0][1]} Mend or remove it, or leave it out with skip_broken.")
    return good, [item[0] for item in broken]


class Readable(Dataset[GoodItem | BrokenItem]):
    """A data set whose items carry their index, and whose failures are items, not exceptions.

    So a broken image in a worker process neither kills it nor loses its place.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        """Wrap a data set of (image, label)."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of images."""
        return size_of(self.dataset)

    def __getitem__(self, index: int) -> GoodItem | BrokenItem:
        """Return (index, image, label), or (index, what went wrong)."""
        try:
            image, label = self.dataset[index]
        except DataError as error:
            return index, str(error)
        except Exception as error:
            return index, f"Image {index} of the data set cannot be read ({error})."
        if not isinstance(image, Tensor):
            kind = type(image).__name__
            return index, f"Image {index} is a {kind}, not a tensor; give the data set a transform."
        return index, image, int(label)
