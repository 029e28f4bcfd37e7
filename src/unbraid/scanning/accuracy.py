"""What a scan says of the network: how often it is right, and on which preprocessing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from unbraid.base.errors import UnbraidError
from unbraid.base.tables import one_line, percent
from unbraid.images.batches import in_batches, read_images
from unbraid.images.dataset import class_names_of
from unbraid.networks.copying import device_of
from unbraid.networks.outputs import run_network
from unbraid.networks.relevance import undisturbed
from unbraid.scanning.records import Scan

Whole = NDArray[np.int64]
Tried = tuple[str, Whole, Whole, Whole]  # in words; labels so read, and given; predictions

LONG = 1024  # images, from which on a scan is long enough to look at some of them first
_PART, _MOST, _AT_ONCE = 16, 256, 32  # looked at: one in so many, at most, at a time
_LEVEL = 1e-3  # of significance
_DOUBT = 0.2  # below which it is not likely by chance either
_ORDERS, _MOST_ORDERED = 4000, 20_000  # orders of predictions tried, for so many images at most
_TIMES = 3  # as often must another reading be right, on the images that it reads otherwise
_MOST_CLASSES = 2048  # for which classes are matched to outputs: the table is that size squared
_ABOUT = 0.9  # of an accuracy is about as good
_N_SHOWN = 3  # classes, as examples
_MISFIT = "labels or preprocessing do not fit this network"


@dataclass(frozen=True)
class Accuracy:
    """How often a network's top class is the given label, and what that says."""

    n_images: int
    n_right: int
    chance: float  # accuracy if predictions had nothing to do with labels
    warning: str = ""  # what is probably wrong, in a sentence

    def __str__(self) -> str:
        """Say the accuracy in a few words."""
        return (
            f"top-1 accuracy by the given labels {percent(self.n_right / self.n_images, 1)} of "
            f"{self.n_images:,} images (chance {percent(self.chance, 1)})"
        )


def accuracy_of(
    labels: Whole, predictions: Whole, n_outputs: int, names: Sequence[str] = ()
) -> Accuracy | None:
    """Judge predictions by given labels, (N,) each; None if no label is known, 0 or more."""
    known = labels >= 0
    labels, predictions = labels[known], predictions[known]
    n = len(labels)
    if n == 0:
        return None
    chance = _chance(labels, predictions, n_outputs)
    found = Accuracy(n, int((labels == predictions).sum()), chance)
    p_value = _p_value(labels, predictions, chance)
    reading = _better_reading(labels, predictions, n_outputs, names)
    # Of too few images not even full accuracy would be above chance.
    can_tell = _tail(n, n, _chance(labels, labels, n_outputs)) < _LEVEL
    if reading:
        warning = (
            f"It seems that {_MISFIT}: {found}, but {reading}; name the classes by output number "
            "or name."
        )
    elif p_value < _LEVEL or not can_tell:
        warning = ""
    elif p_value < _DOUBT:
        warning = (
            f"Perhaps {_MISFIT}, or there are too few images to tell: {found}, which is not above "
            "chance beyond doubt; scan more images, or check both."
        )
    else:
        warning = (
            f"It seems that {_MISFIT}: {found}, which is not above chance; check both before you "
            "trust what follows."
        )
    return replace(found, warning=warning)


def _chance(labels: Whole, predictions: Whole, n_outputs: int) -> float:
    """What these predictions would get on these labels in another order."""
    if labels.min() == labels.max():
        return 1 / n_outputs
    size = max(int(labels.max()), int(predictions.max())) + 1
    counts = [
        np.bincount(numbers, minlength=size) / len(numbers) for numbers in (labels, predictions)
    ]
    return float(counts[0] @ counts[1])


def _p_value(labels: Whole, predictions: Whole, chance: float) -> float:
    """How likely so many are right by chance: by the binomial test, or by trying other orders.

    The latter sees more where classes are uneven, or few of many.
    """
    n, n_right = len(labels), int((labels == predictions).sum())
    p_value = _tail(n_right, n, chance)
    alone = labels.min() == labels.max()  # whose order says nothing
    if p_value < _LEVEL or alone or n > _MOST_ORDERED or n_right <= chance * n:
        return p_value
    random, often = np.random.default_rng(0), 0
    for tried in range(1, _ORDERS + 1):
        often += int((labels == random.permutation(predictions)).sum()) >= n_right
        if often >= _LEVEL * _ORDERS:
            return min(p_value, often / tried)
    return min(p_value, often / _ORDERS)


def _tail(n_right: int, n: int, chance: float) -> float:
    """How likely so many or more are right by chance."""
    from scipy.stats import binom  # slow to import, and seldom asked for

    return float(binom.sf(n_right - 1, n, chance))


def _better_reading(labels: Whole, predictions: Whole, n_outputs: int, names: Sequence[str]) -> str:
    """Say another reading of the labels that fits much better, and its accuracy; empty if none is.

    McNemar's exact test, at 1e-3 over all readings tried, must find it right more often.
    """
    usual = _usual(labels, predictions, n_outputs)
    tried = [*usual, *_learned(labels, predictions, n_outputs, names)]
    fitting = {}
    for words, read, given, got in tried:
        moved = read != given
        better, worse = ((one == got)[moved].sum() for one in (read, given))
        level = _LEVEL / len(tried)
        if 0 < better >= _TIMES * worse and _tail(better, better + worse, 0.5) < level:
            fitting[words] = (read == got).mean()
    # Of those that fit about as well, the first says most.
    enough = _ABOUT * max(fitting.values(), default=0)
    return next(
        (f"{percent(right, 1)} if {words}" for words, right in fitting.items() if right > enough),
        "",
    )


def _usual(labels: Whole, predictions: Whole, n_outputs: int) -> Iterator[Tried]:
    """Readings that come of usual mistakes; a label that one has no output for is read as -1."""
    known = np.arange(max(n_outputs, int(labels.max()) + 1), dtype=np.int64)
    in_text_order = np.array(sorted(range(n_outputs), key=str), dtype=np.int64)
    readings = {
        "classes were counted from 1": known - 1,
        "output 0 stood for no class": known + 1,
        "classes stood in reverse order": n_outputs - 1 - known,
        "numbers had been sorted as text": np.argsort(in_text_order),
        "numbers had not been sorted as text": in_text_order,
    }
    for words, outputs in readings.items():
        whole = np.full(len(known), -1, dtype=np.int64)
        whole[: len(outputs)] = outputs
        yield words, whole[labels], labels, predictions


def _learned(
    labels: Whole, predictions: Whole, n_outputs: int, names: Sequence[str]
) -> Iterator[Tried]:
    """The reading that suits half of the images best, to be tried on the other half."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    size = max(n_outputs, int(labels.max()) + 1, int(predictions.max()) + 1)
    if size > _MOST_CLASSES or labels.min() == labels.max():
        return
    counts = np.zeros((size, size))
    np.add.at(counts, (labels[::2], predictions[::2]), 1)
    counts[np.diag_indices(size)] += 0.5  # in doubt a label is what it is
    seen = np.unique(labels[::2])
    useful = np.unique(np.concatenate([predictions[::2], seen]))
    chosen, best = linear_sum_assignment(counts[np.ix_(seen, useful)], maximize=True)
    outputs = np.arange(size, dtype=np.int64)
    outputs[seen[chosen]] = useful[best]
    moved = np.flatnonzero(outputs != np.arange(size)).tolist()
    examples = []
    for label in moved[:_N_SHOWN]:
        name = one_line(names[label]) if label < len(names) else ""
        named = f" (class {name})" if name not in ("", str(label)) else ""
        examples.append(f"label {label} stood for output {outputs[label]}{named}")
    if moved:
        words = ", ".join(examples) + (" and so on" if len(moved) > _N_SHOWN else "")
        yield words, outputs[labels[1::2]], labels[1::2], predictions[1::2]


def describe_fit(accuracy: Accuracy, preprocessing: str) -> str:
    """Say the accuracy and the preprocessing that it was got with, in a sentence."""
    words = one_line(preprocessing) or "not told by the data set"
    return f"T{str(accuracy)[1:]}; preprocessing: {words}."


def sampled_accuracy(
    model: nn.Module, dataset: Dataset[Any], indices: Sequence[int], at_once: int
) -> Accuracy | None:
    """Judge some images; None if they cannot be run, which the scan tells."""
    # Drawn rather than evenly spaced, as classes may take turns; the same ones every time.
    n = min(len(indices) // _PART, _MOST)
    batches = in_batches(sorted(random.Random(0).sample(indices, n)), min(at_once, _AT_ONCE))
    labels: list[int] = []
    predictions: list[int] = []
    n_outputs = 0
    try:
        with undisturbed(model), torch.no_grad():
            for _, images, own in read_images(dataset, batches, workers=0, skip_broken=True):
                logits = run_network(model, images.to(device_of(model)))
                labels += own.tolist()
                predictions += logits.argmax(1).tolist()
                n_outputs = logits.shape[1]
    except UnbraidError:
        return None
    return accuracy_of(np.array(labels), np.array(predictions), n_outputs, class_names_of(dataset))


def scanned_accuracy(scan: Scan) -> Accuracy | None:
    """Judge all images of a scan by their given labels; None if its top classes are no answers.

    So it is of places, too.
    """
    if not scan.manifest.is_classified or scan.manifest.places_of:
        return None
    parts = list(scan.tensors("label", "prediction"))
    labels, predictions = (torch.cat([p[name] for p in parts]).numpy() for name in parts[0])
    n_outputs = max(len(scan.class_names), int(predictions.max(initial=0)) + 1)
    return accuracy_of(labels, predictions, n_outputs, scan.class_names)
