"""Accuracy by given labels: what it says, and what scan and find say of it before anything else."""

from __future__ import annotations

import warnings
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset

import unbraid
from unbraid.demo.network import LAYER, DemoImages, load_images, load_network
from unbraid.scanning.accuracy import (
    Accuracy,
    accuracy_of,
    sampled_accuracy,
    scanned_accuracy,
)


def judge(labels: list[int] | np.ndarray, predictions: list[int] | np.ndarray, n: int) -> Accuracy:
    found = accuracy_of(np.asarray(labels), np.asarray(predictions), n)
    assert found is not None
    return found


def network(labels: np.ndarray, n_outputs: int, accuracy: float, seed: int = 0) -> np.ndarray:
    """Predictions that are right in a part of the images, else any."""
    random = np.random.default_rng(seed)
    right = random.random(len(labels)) < accuracy
    return np.where(right, labels, random.integers(0, n_outputs, len(labels)))


@pytest.mark.parametrize(
    ("n_outputs", "accuracy"), [(2, 0.7), (10, 0.3), (100, 1.0), (1000, 0.3), (1000, 0.7)]
)
def test_accuracy_of_a_network_that_knows_its_classes_warns_of_nothing(
    n_outputs: int, accuracy: float
) -> None:
    labels = np.arange(256) * n_outputs // 256
    found = judge(labels, network(labels, n_outputs, accuracy), n_outputs)
    assert found.warning == ""
    assert found.n_right == (labels == network(labels, n_outputs, accuracy)).sum()


@pytest.mark.parametrize("n_outputs", [2, 10, 1000])
def test_accuracy_of_random_predictions_is_told_to_be_chance(n_outputs: int) -> None:
    labels = np.arange(256) % n_outputs
    for seed in range(20):
        found = judge(labels, network(labels, n_outputs, 0, seed), n_outputs)
        assert not found.above_chance
        assert "not above chance" in found.warning
        assert found.reading == ""


def test_accuracy_of_one_answer_to_everything_is_chance_however_common_the_answer() -> None:
    labels = np.array([0] * 240 + [1] * 16)
    assert not judge(labels, np.zeros(256, dtype=int), 2).above_chance


def test_accuracy_of_few_images_says_nothing() -> None:
    assert judge([0, 1, 2], [2, 0, 1], 1000).warning == ""
    assert judge([0, 1, 0], [1, 0, 1], 2).warning == ""


def test_accuracy_of_a_single_class_is_measured_by_the_outputs() -> None:
    found = judge([7] * 64, [7] * 40 + [1] * 24, 1000)
    assert found.chance == 1 / 1000
    assert found.warning == ""
    assert "not above chance" in judge([7] * 64, [1] * 64, 1000).warning


READINGS = {
    "classes were counted from 1": lambda k, n: k - 1,
    "output 0 stood for no class": lambda k, n: k + 1,
    "classes stood in reverse order": lambda k, n: n - 1 - k,
    "numbers had been sorted as text": lambda k, n: sorted(map(str, range(n))).index(str(k)),
    "numbers had not been sorted as text": lambda k, n: int(sorted(map(str, range(n)))[k]),
}


@pytest.mark.parametrize(
    ("words", "n_outputs"), zip(READINGS, (12, 1000, 12, 1000, 1000), strict=True)
)
def test_accuracy_tells_a_usual_misreading_by_its_name(words: str, n_outputs: int) -> None:
    labels = 1 + np.arange(256) * (n_outputs - 2) // 256
    meant = np.array([READINGS[words](int(k), n_outputs) for k in labels])
    found = judge(labels, network(meant, n_outputs, 0.6), n_outputs)
    assert found.reading == words
    assert found.n_right_read / found.n_read > 0.5
    assert words in found.warning


@pytest.mark.parametrize("order", [(0, 1, 2, 4, 3), (1, 0, 2, 3, 4), (2, 3, 4, 0, 1)])
def test_accuracy_tells_classes_that_were_exchanged(order: tuple[int, ...]) -> None:
    labels = np.arange(300) % 5
    found = judge(labels, network(np.array(order)[labels], 5, 0.9), 5)
    moved = next(k for k in range(5) if order[k] != k)
    assert f"label {moved} stood for output {order[moved]}" in found.warning


def test_accuracy_takes_common_confusions_for_no_other_reading() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(4000) % 4
    # Of classes 2 and 3 (two bathing suits, say) half are taken for the other.
    exchanged = np.where((labels >= 2) & (random.random(4000) < 0.52), 5 - labels, labels)
    assert judge(labels, exchanged, 4).warning == ""


def test_accuracy_of_any_true_order_is_never_called_a_misreading() -> None:
    labels = np.arange(64) % 4
    for seed, order in enumerate(permutations(range(4))):
        renamed = np.array(order)[labels]
        assert judge(renamed, network(renamed, 4, 0.6, seed), 4).warning == ""


def test_accuracy_leaves_out_images_without_a_label() -> None:
    assert accuracy_of(np.array([-1, -1]), np.array([0, 1]), 2) is None
    assert judge([-1, 0, 1], [0, 0, 0], 2).n_images == 2


def test_accuracy_of_uneven_or_few_of_many_classes_is_seen_to_be_above_chance() -> None:
    rare = np.array([1] * 4 + [0] * 296)
    found = judge(rare, np.array([1] * 4 + [0] * 290 + [1] * 6), 2)  # 98 %, where chance is 95 %
    assert found.warning == ""
    two_of_many = np.array([5] * 15 + [9] * 15)
    predictions = np.where(np.arange(30) % 2 == 0, two_of_many, np.arange(30) + 100)
    assert judge(two_of_many, predictions, 1000).warning == ""
    turned = np.where(np.arange(30) % 4 == 0, 14 - two_of_many, predictions)
    assert "not above chance" in judge(two_of_many, turned, 1000).warning


def test_accuracy_that_may_be_chance_is_told_as_doubt() -> None:
    labels = np.arange(16) % 2
    found = judge(labels, np.where(np.arange(16) < 3, 1 - labels, labels), 2)
    assert not found.above_chance
    assert found.warning.startswith("Perhaps labels or preprocessing do not fit this network, or")
    assert "81.2% of 16 images (chance 50.0%)" in found.warning


def test_accuracy_calls_exchanged_classes_by_name() -> None:
    labels = np.arange(300) % 5
    predictions = np.array([0, 1, 2, 4, 3])[labels]
    found = accuracy_of(labels, predictions, 5, ["ant", "bee", "cat", "d\nog", "4"])
    assert found is not None
    assert found.reading == "label 3 stood for output 4 (class d og), label 4 stood for output 3"


# --- what scan and find say ----------------------------------------------------------------------


class Demo(Dataset[Any]):
    """Some of the demo's images, with labels and brightness changed on the way."""

    def __init__(self, change: Any = None, invert: bool = False) -> None:
        self.images: DemoImages = load_images("test")
        chosen = [int(k) for k in torch.linspace(0, len(self.images) - 1, 256).long()]
        self.chosen, self.invert = chosen, invert
        change = change or (lambda label: label)
        self.targets = [change(self.images.targets[k]) for k in chosen]
        self.classes = self.images.classes
        self.transform = "Inverted()" if invert else "Normal()"

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[self.chosen[index]][0]
        return (-50 * image if self.invert else image), self.targets[index]


def told(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught]


def test_scan_and_find_warn_of_nothing_where_labels_fit(tmp_path: Path) -> None:
    assert told(lambda: unbraid.scan(load_network(), LAYER, Demo(), tmp_path)) == []
    assert told(lambda: unbraid.find(unbraid.open_scan(tmp_path))) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda label: 9 - label, "classes stood in reverse order"),
        (lambda label: (label * 7 + 3) % 10, "label 0 stood for output 1"),
    ],
)
def test_scan_and_find_tell_labels_that_stand_for_other_outputs(
    tmp_path: Path, change: Any, words: str
) -> None:
    scanned = told(lambda: unbraid.scan(load_network(), LAYER, Demo(change), tmp_path))
    found = told(lambda: unbraid.find(unbraid.open_scan(tmp_path)))
    for said in (scanned, found):
        assert len(said) == 1
        assert "labels or preprocessing do not fit this network" in said[0]
    assert words in found[0]  # from all images


def test_scan_and_find_tell_preprocessing_that_leaves_chance(tmp_path: Path) -> None:
    data = Demo(invert=True)
    for call in (
        lambda: unbraid.scan(load_network(), LAYER, data, tmp_path),
        lambda: unbraid.find(unbraid.open_scan(tmp_path)),
    ):
        (said,) = told(call)
        assert "labels or preprocessing do not fit this network" in said
        assert "not above chance" in said


def test_scan_says_accuracy_and_preprocessing_before_it_begins_and_when_it_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ConcatDataset([load_images("test")] * 2)
    for n in ("256", f"{len(many):,}"):  # a sample first; all of a finished scan
        unbraid.scan(load_network(), LAYER, many, tmp_path, progress=True, batch_size=250)
        said = capsys.readouterr().err
        assert f"of {n} images (chance 1" in said
        assert "%); preprocessing: " in said
        assert (said.index("Top-1 accuracy") < said.index("Scanning")) == (n == "256")


def test_scan_says_nothing_of_labels_that_it_does_not_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Demo(lambda label: 9 - label)
    scan = unbraid.scan(load_network(), LAYER, wrong, tmp_path, labels="predicted", progress=True)
    assert "accuracy" not in capsys.readouterr().err
    assert scanned_accuracy(scan) is None


def test_accuracy_of_a_scan_is_that_of_all_its_images(tmp_path: Path) -> None:
    data, network = Demo(), load_network()
    scan = unbraid.scan(network, LAYER, data, tmp_path)
    with torch.no_grad():
        right = sum(int(network(image[None]).argmax()) == label for image, label in data)
    found = scanned_accuracy(scan)
    assert found is not None
    assert (found.n_images, found.n_right) == (256, right)


def test_sampled_accuracy_leaves_what_is_wrong_to_the_scan() -> None:
    class Broken(Demo):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            raise ValueError("broken")

    assert sampled_accuracy(load_network(), Broken(), range(256), 32) is None
    data = Demo()
    half = type(
        "Half", (Demo,), {"__getitem__": lambda s, i: Demo.__getitem__(s, i) if i % 2 else 1 / 0}
    )
    found = sampled_accuracy(load_network(), half(), range(1, 256), 32)
    assert found is not None
    assert 0 < found.n_images < len(data)
