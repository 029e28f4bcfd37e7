"""Pictures of places: what lies around each in its image, in place of whole images."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from unbraid.base.errors import DataError, UsageError
from unbraid.images.dataset import size_of
from unbraid.images.identity import ids_of
from unbraid.images.which import Around
from unbraid.reporting.pictures import Sight, open_picture, sight_of
from unbraid.scanning.records import Scan

_STEPS = 3  # from place to place, that a crop is wide and high
_LEAST = 0.25  # of the image
_GONE = -1  # index of an image that the data set has no more


class Crops(Around):
    """The places of a scan as a data set, from the data set of the images that they lie in."""

    samples = root = sizes = groups = None  # the data set's are of images

    def __init__(self, dataset: Dataset[Any], scan: Scan) -> None:
        """Look up the images; none is read."""
        self.dataset, self.transform = dataset, Sight()  # crops are shown as they are
        names = ("image", "label", "position", "rows", "columns")
        parts = list(scan.tensors(*names))
        own = {name: torch.cat([part[name] for part in parts]).tolist() for name in names}
        known, told = ids_of(dataset), scan.ids()
        self.ids = [told[place] for place in range(len(told))]
        self.images: list[int] = own["image"]
        if known is not None:  # the order of the data set may have changed
            now = {one: index for index, one in enumerate(known)}
            of = [text.rpartition(" @ ")[0] for text in self.ids]
            if any(one in now for one in of):  # else the images have other ids by now
                self.images = [now.get(one, _GONE) for one in of]
        if max(self.images) >= size_of(dataset):
            raise UsageError(
                "The data set has fewer images than were scanned; pass the data set that the "
                "places lie in."
            )
        self.targets: list[int] = own["label"]
        self._given = scan.manifest.labels == "given"
        self._at = list(zip(own["position"], own["rows"], own["columns"], strict=True))
        self._sight = sight_of(dataset)

    def __len__(self) -> int:
        """Number of places."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return the image that a place lies in, and its label."""
        image, label = self.dataset[self.source(index)]
        return image, label if self._given else self.targets[index]

    def source(self, index: int) -> int:
        """Return the index of the image that a place lies in; DataError if it is gone."""
        if self.images[index] == _GONE:
            image = self.ids[index].rpartition(" @ ")[0]
            raise DataError(f"Image {image} is gone; bring it back, or scan again.")
        return self.images[index]

    def picture(self, index: int) -> Image.Image:
        """Cut out what lies around a place.

        That is three steps from place to place wide and high, but at least a quarter of what the
        network sees. Where nobody can say what that is, or how the places lie, it is all of it.
        """
        picture = open_picture(self.dataset, self.source(index))
        position, rows, columns = self._at[index]
        if self._sight is None or (rows == 1 and columns > 1):
            return picture
        seen = self._sight(picture)
        box = crop_box(position, rows, columns)
        sizes = (seen.width, seen.height) * 2
        left, top, right, bottom = (round(part * s) for part, s in zip(box, sizes, strict=True))
        return seen.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def crop_box(position: int, rows: int, columns: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what lies around a place, in parts of the picture.

    >>> crop_box(5, 4, 4)
    (0.0, 0.0, 0.75, 0.75)
    """
    low, high = [], []
    for place, n in ((position % columns, columns), (position // columns, rows)):
        size = min(1.0, max(_STEPS / n, _LEAST))
        start = min(max((place + 0.5) / n - size / 2, 0.0), 1 - size)
        low.append(start)
        high.append(start + size)
    return (low[0], low[1], high[0], high[1])
