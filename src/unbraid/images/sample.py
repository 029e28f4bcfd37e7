"""The images of a first look: the same on every machine, in balance over classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import labels_of, size_of
from unbraid.images.identity import hash_of, ids_of
from unbraid.images.mapped import as_array

SIZES = {"train": 2048, "val": 1024}  # images, in whole shards
# Where there are more classes, the first look is at these many, so that each has images enough.
MOST_CLASSES = 128


def sample_of(dataset: Dataset[Any], n: int, *, by_class: bool) -> list[int]:
    """Return the indices, in order, of n images, or of all where there are no more.

    Args:
        dataset: of (image, label); images without ids go by their indices.
        n: how many.
        by_class: keep the data set's labels in balance.
    """
    size = size_of(dataset)
    if size <= n:
        return list(range(size))
    ids = ids_of(dataset)
    labels = labels_of(dataset) if by_class else [UNLABELLED] * size
    return choose(map(str, range(size)) if ids is None else ids, labels, n)


def choose(ids: Iterable[str], labels: Sequence[int], n: int) -> list[int]:
    """Choose n images by the hashes of their ids: the lowest of each class, then the next lowest.

    Of more than 128 classes, those whose numbers have the lowest hashes go before all others.
    """
    classes, class_of = np.unique(as_array(labels), return_inverse=True)
    hashes = np.fromiter(map(hash_of, ids), np.uint64, len(labels))
    turns = np.array([hash_of(str(label)) for label in classes.tolist()], np.uint64)
    turn_of = turns.argsort().argsort()[class_of]
    order = np.lexsort((hashes, class_of))  # class by class, lowest hash first
    firsts = np.searchsorted(class_of[order], np.arange(len(classes)))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - firsts[class_of[order]]
    chosen = np.lexsort((turn_of, rank, turn_of >= MOST_CLASSES))[:n]
    return sorted(chosen.tolist())
