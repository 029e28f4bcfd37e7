"""What a scan says of the network: how often it is right, and on which preprocessing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from unbraid.accuracy import Accuracy, accuracy_of
from unbraid.data import Readable, class_names_of, sort_out
from unbraid.errors import UnbraidError
from unbraid.networks import device_of
from unbraid.records import Scan
from unbraid.relevance import undisturbed
from unbraid.running import run_network, stack_images
from unbraid.tables import one_line

LONG = 1024  # images, from which on a scan is long enough to look at some of them first
_PART, _MOST = 16, 256  # one in so many, but no more than these
_AT_ONCE = 32


def describe_fit(accuracy: Accuracy, preprocessing: str) -> str:
    """Say the accuracy and the preprocessing that it was got with, in a sentence."""
    words = one_line(preprocessing) or "not told by the data set"
    text = f"{accuracy}; preprocessing: {words}."
    return text[0].upper() + text[1:]


def sampled_accuracy(
    model: nn.Module, dataset: Dataset[Any], places: Sequence[int], at_once: int
) -> Accuracy | None:
    """Look at some images drawn from all, as those of a class often stand together.

    Args:
        model: gives logits.
        dataset: of (image, label).
        places: in the data set, of the images to scan.
        at_once: how many images go through the network at once, at most.

    Returns:
        None if nothing can be said; what is wrong with images, labels or network, the scan tells.
    """
    n = min(len(places) // _PART, _MOST)
    # Drawn rather than evenly spaced, as classes may take turns; the same ones every time.
    chosen = sorted(random.Random(0).sample(places, n))
    readable, size = Readable(dataset), min(at_once, _AT_ONCE)
    labels: list[int] = []
    predictions: list[int] = []
    n_outputs = 0
    try:
        device = device_of(model)
        with undisturbed(model), torch.no_grad():
            for start in range(0, n, size):
                items = [readable[place] for place in chosen[start : start + size]]
                good, _ = sort_out(items, skip_broken=True)
                if good:
                    index = torch.tensor([item[0] for item in good], dtype=torch.int64)
                    images = stack_images([item[1] for item in good], index).to(device)
                    logits = run_network(model, images)
                    labels += [item[2] for item in good]
                    predictions += logits.argmax(1).tolist()
                    n_outputs = logits.shape[1]
    except UnbraidError:
        return None
    if not n_outputs:
        return None
    names = class_names_of(dataset)
    return accuracy_of(np.array(labels), np.array(predictions), n_outputs, names)


def scanned_accuracy(scan: Scan) -> Accuracy | None:
    """Judge all images of a scan by their given labels; None if it took predicted ones."""
    if scan.manifest.labels != "given":
        return None
    columns = [
        (own["label"].numpy(), own["prediction"].numpy())
        for own in scan.tensors("label", "prediction")
    ]
    labels, predictions = (np.concatenate(own) for own in zip(*columns, strict=True))
    n_outputs = max(len(scan.class_names), int(predictions.max(initial=0)) + 1)
    return accuracy_of(labels, predictions, n_outputs, scan.class_names)
