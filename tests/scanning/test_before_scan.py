"""What scan, find and run say before anything else: accuracy, preprocessing, what does not fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset

import unbraid
from unbraid.demo.network import LAYER, DemoImages, load_images, load_network
from unbraid.networks.models import load_model
from unbraid.scanning.accuracy import sampled_accuracy, scanned_accuracy

CHOSEN = range(0, 4000, 25)


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
        (lambda label: (label + 1) % 10, "label 0 stood for output 9"),
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


def test_scan_says_accuracy_of_few_images_when_it_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unbraid.scan(load_network(), LAYER, Demo(), tmp_path, progress=True)
    assert "of 256 images (chance 10." in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("returned", "assumed"),
    [("net", True), ("(net, lambda picture: None)", False), ("(net, len, ['a'])", False)],
)
def test_load_model_says_where_preprocessing_is_assumed(
    tmp_path: Path, returned: str, assumed: bool
) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        f"import torch\ndef build():\n    net = torch.nn.Linear(2, 2)\n    return {returned}\n"
    )
    note = load_model(f"{file}:build").note
    assert ("ImageNet's usual one is assumed" in note) == assumed
