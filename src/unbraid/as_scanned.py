"""Images at the places that they had when they were scanned, whatever their order is now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from unbraid.data import UNLABELLED, labels_of
from unbraid.errors import DataError
from unbraid.identity import ids_of
from unbraid.nested import Around
from unbraid.records import Scan


class AsScanned(Around):
    """A data set in another order; all else is the data set's own.

    Args:
        dataset: of (image, label).
        places: where in it the images are now, by the place at which they were scanned.
        ids: by that place too.
    """

    samples = root = sizes = groups = None  # the data set's are in its own order

    def __init__(
        self, dataset: Dataset[Any], places: Mapping[int, int], ids: Mapping[int, str]
    ) -> None:
        """Look up the labels; no image is read."""
        self.dataset, self.places = dataset, places
        own, places_scanned = labels_of(dataset), range(max(ids) + 1)
        self.targets = [own[places[i]] if i in places else UNLABELLED for i in places_scanned]
        self.ids = [ids.get(i, f"image {i}") for i in places_scanned]

    def __len__(self) -> int:
        """Number of places."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return the image that was scanned at a place, and its label."""
        image, label = self.dataset[self.source(index)]
        return image, label

    def __getattr__(self, name: str) -> Any:
        """Give what else the data set has, such as `classes`."""
        if name == "dataset":  # not yet there, as in a copy being made
            raise AttributeError(name)
        kept = getattr(self.dataset, name)
        return (lambda index: kept(self.source(index))) if name == "picture" else kept

    def source(self, index: int) -> int:
        """Return the place in the data set of the image that was scanned at a place."""
        if index not in self.places:
            raise DataError(f"Image {self.ids[index]} is gone; bring it back, or scan anew.")
        return self.places[index]


def as_scanned(dataset: Dataset[Any], scan: Scan) -> Dataset[Any]:
    """Find the images of a scan again by their ids.

    Returns:
        The data set itself where scan or data set have no ids, no id is known, or all are where
        they were; else its images at the places of the scan.
    """
    known, scanned = ids_of(dataset), scan.ids()
    if known is None:
        return dataset
    now = {one: place for place, one in enumerate(known)}
    places = {index: now[one] for index, one in scanned.items() if one in now}
    unmoved = len(places) == len(scanned) and all(i == place for i, place in places.items())
    return dataset if unmoved or not places else AsScanned(dataset, places, scanned)
