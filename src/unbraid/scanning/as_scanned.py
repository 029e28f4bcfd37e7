"""A data set in the order in which it was scanned, wherever its images lie by now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from unbraid.base.errors import DataError
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import labels_of, lie_at
from unbraid.images.identity import ids_of
from unbraid.images.which import Around
from unbraid.scanning.records import Scan


class AsScanned(Around):
    """A data set in the order in which it was scanned: `now` says where an index of then lies."""

    samples = root = sizes = groups = None  # the data set's are in its own order

    def __init__(
        self, dataset: Dataset[Any], now: Mapping[int, int], ids: Mapping[int, str]
    ) -> None:
        """Look up the labels; no image is read."""
        self.dataset, self.now = dataset, now
        labels, indices = labels_of(dataset), range(max(ids) + 1)
        self.targets = [labels[now[i]] if i in now else UNLABELLED for i in indices]
        self.ids = [ids.get(i, f"image {i}") for i in indices]

    def __len__(self) -> int:
        """Number of images, those that are gone included."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return the image that had an index, and its label."""
        image, label = self.dataset[self.source(index)]
        return image, label

    def source(self, index: int) -> int:
        """Return where in the data set the image is that had an index."""
        if index not in self.now:
            raise DataError(f"Image {self.ids[index]} is gone; bring it back, or scan again.")
        return self.now[index]


def as_scanned(dataset: Dataset[Any], scan: Scan) -> Dataset[Any]:
    """Put a data set's images under the indices of a scan, by their ids if both have them."""
    known = ids_of(dataset)
    if known is None or all(lie_at(own, known) for own in scan.ids_by_shard()):
        return dataset
    scanned = scan.ids()
    by_id = {one: index for index, one in enumerate(known)}
    now = {index: by_id[one] for index, one in scanned.items() if one in by_id}
    return AsScanned(dataset, now, scanned) if now else dataset
