"""Accuracy by given labels: what it says, and what scan and find say of it before anything else."""

import re
import warnings
from itertools import permutations
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import unbraid
from tiny_networks import SyntheticImages
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.scanning import accuracy
from unbraid.scanning.accuracy import accuracy_of, sampled_accuracy, scanned_accuracy


def judge(labels, predictions, n_outputs, names=()):
    return accuracy_of(np.asarray(labels), np.asarray(predictions), n_outputs, names)


def predictions(labels, n_outputs, accuracy, seed=0):
    """They are right in a part of the images, else any."""
    random = np.random.default_rng(seed)
    right = random.random(len(labels)) < accuracy
    return np.where(right, labels, random.integers(0, n_outputs, len(labels)))


@pytest.mark.parametrize(("n_outputs", "accuracy"), [(2, 0.7), (10, 0.3), (100, 1), (1000, 0.3)])
def test_accuracy_tells_predictions_at_random_from_those_that_know(n_outputs, accuracy):
    labels = np.arange(256) * n_outputs // 256
    found = judge(labels, predictions(labels, n_outputs, accuracy), n_outputs)
    assert found.warning == ""
    for seed in range(20):
        at_random = predictions(labels, n_outputs, 0, seed)
        found = judge(labels, at_random, n_outputs)
        assert "which is not above chance" in found.warning
        assert found.n_right == (labels == at_random).sum()


TWO = np.array([5] * 15 + [9] * 15)
HALF_RIGHT = np.where(np.arange(30) % 2 == 0, TWO, 100)
FEWER_RIGHT = np.where(np.arange(30) % 4 == 0, 14 - TWO, HALF_RIGHT)
JUDGED = {  # labels, predictions, outputs, part of a warning
    "one answer to all": ([0] * 240 + [1] * 16, [0] * 256, 2, "not above chance"),
    "too few images": ([0, 1, 2], [2, 0, 1], 1000, ""),
    "one class": ([7] * 64, [7] * 40 + [1] * 24, 1000, ""),
    "one class, wrong": ([7] * 64, [1] * 64, 1000, "not above chance"),
    "uneven classes": ([1] * 4 + [0] * 296, [1] * 4 + [0] * 290 + [1] * 6, 2, ""),
    "two of many": (TWO, HALF_RIGHT, 1000, ""),
    "two of many, wrong": (TWO, FEWER_RIGHT, 1000, "not above chance"),
    "in doubt": ([0, 1] * 8, [1, 0, 1] + [1, 0] * 6 + [1], 2, "81.2% of 16 images (chance 50.0%)"),
}


@pytest.mark.parametrize("case", JUDGED)
def test_accuracy_is_judged_by_what_chance_would_give(case):
    *given, told = JUDGED[case]
    warning = judge(*given).warning
    assert told in warning
    assert bool(warning) == bool(told)
    assert warning.startswith("Perhaps") == (case == "in doubt")


READINGS = {
    "classes were counted from 1": (12, lambda k, n: k - 1),
    "output 0 stood for no class": (1000, lambda k, n: k + 1),
    "classes stood in reverse order": (12, lambda k, n: n - 1 - k),
    "numbers had been sorted as text": (1000, lambda k, n: sorted(range(n), key=str).index(k)),
    "numbers had not been sorted as text": (1000, lambda k, n: sorted(range(n), key=str)[k]),
}


@pytest.mark.parametrize("words", READINGS)
def test_accuracy_tells_a_usual_misreading_by_its_name(words):
    n_outputs, read = READINGS[words]
    labels = 1 + np.arange(256) * (n_outputs - 2) // 256
    meant = np.array([read(int(k), n_outputs) for k in labels])
    found = judge(labels, predictions(meant, n_outputs, 0.6), n_outputs)
    told, right = re.search(r", but ([\d.]+)% if (.*); name", found.warning).group(2, 1)
    assert (told, float(right) > 50) == (words, True)


def test_accuracy_tells_exchanged_classes_and_takes_confusions_for_no_other_reading():
    for order, told in (("01243", "3 stood for output 4 (class dog)"), ("23401", "0 stood for")):
        labels, names = np.arange(300) % 5, ["ant", "bee", "cat", "dog", "4"]
        found = judge(labels, predictions(np.array([*map(int, order)])[labels], 5, 0.9), 5, names)
        assert f"label {told}" in found.warning
    assert accuracy_of(np.array([-1, -1]), np.array([0, 1]), 2) is None
    assert judge([-1, 0, 1], [0, 0, 0], 2).n_images == 2
    random, labels = np.random.default_rng(0), np.arange(4000) % 4
    # Of classes 2 and 3 (two bathing suits, say) half are taken for the other.
    exchanged = np.where((labels >= 2) & (random.random(4000) < 0.52), 5 - labels, labels)
    assert judge(labels, exchanged, 4).warning == ""
    for seed, order in enumerate(permutations(range(4))):
        renamed = np.array(order)[labels[:64]]
        assert judge(renamed, predictions(renamed, 4, 0.6, seed), 4).warning == ""


class Demo(SyntheticImages):
    """Some of the demo's images, with labels and brightness changed on the way."""

    def __init__(self, change=lambda label: label, factor=1):
        super().__init__(0)
        every = load_images("test")
        chosen = torch.linspace(0, len(every) - 1, 256).long().tolist()
        self.images = [factor * every[k][0] for k in chosen]
        self.targets, self.classes = [change(every.targets[k]) for k in chosen], every.classes


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (Demo(), None),
        (Demo(lambda label: 9 - label), "classes stood in reverse order"),
        (Demo(lambda label: (label * 7 + 3) % 10), "label 0 stood for output 1"),
        (Demo(factor=-50), "not above chance"),
    ],
    ids=range(4),
)
def test_scan_and_find_tell_labels_and_images_that_do_not_fit(images, words, tmp_path):
    for call in (
        lambda: unbraid.scan(load_network(), LAYER, images, tmp_path),
        lambda: unbraid.find(unbraid.open_scan(tmp_path)),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        said = [str(one.message) for one in caught]
        assert len(said) == (words is not None)
        assert all("labels or preprocessing do not fit this network" in one for one in said)
    assert words is None or words in said[0]  # from all images


def test_accuracy_of_a_scan_is_that_of_all_its_images_if_it_took_given_labels(tmp_path, capsys):
    data, network = Demo(), load_network()
    options = {"labels": "predicted", "progress": True}
    scan = unbraid.scan(network, LAYER, data, tmp_path / "predicted", **options)
    assert "accuracy" not in capsys.readouterr().err
    assert scanned_accuracy(scan) is None
    found = scanned_accuracy(unbraid.scan(network, LAYER, data, tmp_path / "given"))
    right = sum(int(network(image[None]).argmax()) == label for image, label in data)
    assert (found.n_images, found.n_right) == (256, right)


def test_sampled_accuracy_leaves_what_is_wrong_to_the_scan():
    class Torn(Demo):
        def __getitem__(self, index):
            return super().__getitem__(index if index % 2 else 1 / 0)

    assert sampled_accuracy(load_network(), Torn(), range(0, 256, 2), 32) is None
    found = sampled_accuracy(load_network(), Torn(), range(1, 256), 32)
    assert 0 < found.n_images < 15  # a few are drawn, of which those that can be read count


def test_accuracy_is_told_of_no_more_images_orders_and_classes_than_the_bounds(monkeypatch):
    for most, n in ((256, 256 // 16), (5, 5)):
        monkeypatch.setattr(accuracy, "_MOST", most)
        assert sampled_accuracy(load_network(), Demo(), range(256), 32).n_images == n
    labels = np.arange(300) % 5
    moved = labels, np.array([2, 3, 4, 0, 1])[labels], 5
    assert "label 0 stood for output 2" in judge(*moved).warning
    monkeypatch.setattr(accuracy, "_MOST_CLASSES", 4)
    assert "stood for output" not in judge(*moved).warning
    orders = Mock(side_effect=AssertionError)
    monkeypatch.setattr(np.random, "default_rng", orders)
    with pytest.raises(AssertionError):
        judge(TWO, HALF_RIGHT, 1000)
    monkeypatch.setattr(accuracy, "_MOST_ORDERED", 29)
    judge(TWO, HALF_RIGHT, 1000)
    assert orders.call_count == 1
