"""Images of any source: what it lists, and a data set of it."""

from __future__ import annotations

import hashlib
import operator
import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.errors import DataError, ModelError, UsageError, brief, is_of_file, out_of_reach
from unbraid.base.tables import one_line
from unbraid.images.dataset import UNLABELLED, Readable, first_readable
from unbraid.images.folders import NO_LABELS
from unbraid.images.labels import HIGHEST, Outputs, Reading, read_classes, reading_of, show_names
from unbraid.networks.class_names import number_in, output_names
from unbraid.networks.copying import unwrap
from unbraid.networks.outputs import count_outputs

# Shards behind URLs, fetched whole into a cache.


def is_url(where: str) -> bool:
    """Say whether something to open is a URL.

    Raises:
        UsageError: it is a command, which `webdataset` would run.
    """
    if where.startswith("pipe:"):
        raise UsageError("Commands (pipe:) are not run; write what it prints to a tar file.")
    return re.match(r"[a-z][a-z0-9+.-]*://", where) is not None


def fetch(url: str) -> Path:
    """Fetch a file that the library `webdataset` can open, unless it is in the cache.

    The cache is the folder `unbraid/shards` in `$XDG_CACHE_HOME`, by default `~/.cache`.

    Raises:
        UsageError: webdataset is not installed.
        DataError: it cannot be fetched.
    """
    try:
        from webdataset import gopen
    except ImportError:
        raise UsageError(
            "Shards behind a URL need the library webdataset; pip install webdataset."
        ) from None
    path = _cache() / hashlib.sha256(url.encode()).hexdigest()[:16] / Path(urlsplit(url).path).name
    if os.path.exists(path):  # whatever is wrong with the cache is told below
        return path
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            with gopen(url, "rb") as stream:
                shutil.copyfileobj(stream, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:  # each kind of URL fails in its own way
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        status = re.search(r"exit \d+", str(error))  # the rest of it would be a whole command
        reason = status.group() if status else one_line(str(error))
        raise DataError(
            f"{url} cannot be fetched ({reason}); check the URL, or fetch it yourself and name the "
            "file."
        ) from None
    return path


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "unbraid" / "shards"


# What is known of the outputs of a network for which images are opened in Python.


GivenOutputs = Sequence[str] | int | nn.Module


def outputs_of(given: GivenOutputs | None, images: Callable[[], Any]) -> Outputs:
    """Settle what a caller says of a network's outputs.

    Args:
        given: their names, their number, or the network.
        images: gives the images; a network is run on the first one to count its outputs.

    Raises:
        UsageError: it is none of these, or the images have no transform.
        DataError: the first images cannot be read.
        ModelError: the network cannot run on the image.
    """
    if given is None:
        return Outputs()
    if isinstance(given, nn.Module):
        names, n = output_names(unwrap(given)), _count(given, _first(images()))
        return Outputs(names if len(names) == n else (), n)
    if isinstance(given, Iterable) and not isinstance(given, (str, dict, Set)):
        names = tuple(given)
        if names and all(isinstance(name, str) for name in names):
            return Outputs(tuple(map(str, names)), len(names))
    n = _index(given)
    if n < 1:
        raise UsageError(
            f"outputs is {brief(ValueError(repr(given)))}; give the names of a network's outputs, "
            "their number, or the network."
        )
    return Outputs((), n)


def _first(images: Any) -> Tensor:
    if images.transform is None:
        raise UsageError(
            "outputs is a network, which is run on an image to count its outputs; give transform "
            "too, or outputs as a number."
        )
    image = first_readable(images, range(len(images)))
    if image is None:
        raise DataError(
            "None of the first images can be read, so the network's outputs cannot be counted "
            f"({_reason(images)}); mend them, or give outputs as a number."
        )
    return image


def _reason(images: Any) -> str:
    *_, reason = Readable(images)[0]
    return str(reason).rstrip(".")


def _index(given: Any) -> int:
    try:
        return 0 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        return 0


def _count(model: nn.Module, image: Tensor) -> int:
    try:
        return count_outputs(model, image)
    except Exception as error:  # of a network of anyone's own
        raise ModelError(
            f"The network cannot run on the first image ({brief(error)}), so its outputs cannot be "
            "counted; give the transform that it needs, or outputs as a number."
        ) from error


# Images of any source: what it lists, and a data set of it.


Transform = Callable[[Image.Image], Any]

_LONGEST = 255  # characters of a class's name, as of a folder's


@dataclass(frozen=True)
class Listing:
    """What a source holds, before it is known which output each class stands for. N images."""

    source: str  # for messages
    ids: list[str]  # (N,), what names each image for good
    read: Callable[[int], Image.Image]  # by place; goes to worker processes
    classes: list[str]  # names, in their order; none without labels
    class_of: list[int]  # (N,), place among the classes, UNLABELLED without labels
    groups: list[str] | None = None  # (N,), which images belong together
    sizes: list[int] | None = None  # (N,), bytes

    @property
    def used(self) -> list[str]:
        """The classes that have images."""
        return [self.classes[k] for k in sorted(set(self.class_of)) if k != UNLABELLED]


class ListedImages(Dataset[tuple[Any, int]]):
    """Images of a listing.

    Args:
        listing: of a source.
        transform: from an RGB picture to a tensor; None hands on the picture.
        labels: label of each class, or a reading of them; by default `read_classes` decides. With
            none at all, images count as unlabelled.
        class_names: names by label; by default those of the classes.

    Raises:
        DataError: there is no image, or a class has no label.
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
        reading = _read(listing, labels)
        self.labels, self.reading = reading.labels, reading.how
        self.targets = _targets(listing, self.labels)
        self.classes = list(class_names) or show_names(reading, {}, listing.used)
        self.ids, self.sizes, self.groups = listing.ids, listing.sizes, listing.groups
        self.transform = transform
        self._read = listing.read

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Read one image."""
        picture = self.picture(index)
        return (picture if self.transform is None else self.transform(picture)), self.targets[index]

    def picture(self, index: int) -> Image.Image:
        """Read one image as an RGB picture, before the transform."""
        return self._read(index)


def look_at(file: str, what: str) -> os.stat_result | None:
    """Look for a file that something names; None where there is none, or no regular one.

    Raises:
        OutOfReach: the system fails to say; the message calls the file `what`.
    """
    try:
        found = os.stat(file)
    except (OSError, ValueError) as error:  # the latter for what can be no file's name
        away = None if is_of_file(error) else out_of_reach(what, error)
        if away is not None:
            raise away from None
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def read_listing(listing: Listing, outputs: Outputs) -> Reading:
    """Decide which output each class stands for.

    Raises:
        DataError: names contradict each other or the outputs, or there are too many.
    """
    if not listing.classes:
        return Reading({}, NO_LABELS)
    return read_classes(listing.classes, outputs, listing.source, used=listing.used)


def _read(listing: Listing, labels: dict[str, int] | Reading | None) -> Reading:
    if labels == {} or not listing.classes:
        return Reading({}, NO_LABELS)
    return reading_of(labels, listing.classes, listing.source, used=listing.used)


def _targets(listing: Listing, labels: dict[str, int]) -> list[int]:
    if not labels:
        return [UNLABELLED] * len(listing.ids)
    known = [labels.get(name, UNLABELLED) for name in listing.classes]
    return [known[k] for k in listing.class_of]


def by_class(labels: Sequence[str], source: str) -> tuple[list[str], list[int]]:
    """Sort images into classes by what they are labelled with.

    Numbers are one class however they are written, and so are names in any Unicode form.

    Returns:
        The classes, sorted, numbers as such; and the place among them of each label.

    Raises:
        DataError: a label is empty, very long or a very large number.

    >>> by_class(["10", "9", "10"], "it")
    (['9', '10'], [1, 0, 1])
    >>> by_class(["2.0", "1.0", "2"], "it")
    (['1', '2'], [1, 0, 1])
    """
    distinct = set(labels)
    for label in distinct:
        if not label or len(label) > _LONGEST:
            raise DataError(
                f"{source} has a label of {len(label)} characters; name classes with 1 to "
                f"{_LONGEST}."
            )
    numbers = {label: number_in(label) for label in distinct}
    if None in numbers.values():
        own = {label: unicodedata.normalize("NFC", label) for label in distinct}
        classes = sorted(set(own.values()))
    else:
        highest = max((n for n in numbers.values() if n is not None), default=0)
        if highest >= HIGHEST:
            raise DataError(f"{source} has a class of number {highest}; number classes from 0 on.")
        own = {label: str(n) for label, n in numbers.items()}
        classes = sorted(set(own.values()), key=int)
    place = {name: k for k, name in enumerate(classes)}
    return classes, [place[own[label]] for label in labels]
