"""Other labels for the same images; images without labels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import Relabelled, labels_of
from unbraid.images.listing import list_folder
from unbraid.images.open import open_images


class Unlabelled(Dataset[tuple[Tensor, Any]]):
    """Images with a stand-in for a label, and no list of labels."""

    def __init__(self, n_images: int, label: Any = UNLABELLED) -> None:
        self.inner, self.label = SyntheticImages(n_images), label

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.inner[index][0], self.label


def predictions(kind: str, dataset: Dataset[Any]) -> list[int]:
    with torch.no_grad():
        logits = [build(kind)(dataset[n][0][None])[0] for n in range(len(dataset))]
    return [int(row.argmax()) for row in logits]


# --- other labels for the same images -------------------------------------------------------------


def test_a_relabelled_data_set_is_the_data_set_but_for_labels():
    inner = SyntheticImages(6)
    other = Relabelled(inner, {0: 3, 5: 2})
    assert len(other) == 6
    assert labels_of(other) == other.targets == [3, 1, 2, 3, 0, 2]
    assert [label for _, label in (other[n] for n in range(6))] == other.targets
    assert all(torch.equal(other[n][0], inner[n][0]) for n in range(6))
    assert other.classes == inner.classes
    assert inner.targets == [0, 1, 2, 3, 0, 1]
    with pytest.raises(AttributeError, match="samples"):
        other.samples  # noqa: B018


def test_a_relabelled_part_has_the_places_of_the_part():
    other = Relabelled(Subset(SyntheticImages(6), [4, 5]), {1: 7})
    assert labels_of(other) == [0, 7]


def test_worker_processes_can_read_a_relabelled_data_set(tmp_path):
    network, dataset = build("1x1"), Relabelled(SyntheticImages(6), {0: 2})
    scan = unbraid.scan(network, "layer", dataset, tmp_path, workers=1)
    (records,) = scan.shards()
    assert records.label.tolist() == [2, 1, 2, 3, 0, 1]


# --- outputs without labels -----------------------------------------------------------------------


def test_accuracy_is_unknown_without_labels_and_counts_only_images_that_have_one():
    network = build("3x3")
    none = unbraid.compare_outputs(network, network, Unlabelled(6))
    assert (none.top1_agreement, none.top1_before, none.top1_after) == (1.0, None, None)
    some = SyntheticImages(6)
    right = predictions("3x3", some)
    some.targets = [right[0], (right[1] + 1) % 4, *[UNLABELLED] * 4]
    compared = unbraid.compare_outputs(network, network, some)
    assert (compared.top1_before, compared.top1_after) == (0.5, 0.5)


@pytest.mark.parametrize("label", [None, "cat", torch.tensor([0, 1]), 0.5, float("inf"), 2**70])
def test_a_listed_label_that_is_no_number_is_told(label):
    listed = SyntheticImages(3)
    listed.targets = [0, 1, label]
    with pytest.raises(DataError, match="image 2"):
        labels_of(listed)


# --- folders without classes ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "deep/er/c.webp"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (len(name), 0, 0)).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_a_folder_without_classes_has_all_images_below_it_in_order(folder):
    images = open_images(folder, labels={}, class_names=("ant", "bee"))
    names = [str(Path(path).relative_to(folder)) for path, _ in images.samples]
    assert names == ["a.jpg", "b.png", "deep/er/c.webp"]
    assert len(images) == 3
    assert labels_of(images) == [UNLABELLED] * 3
    assert images.classes == ["ant", "bee"]
    picture, label = images[1]
    assert (picture.size, label) == ((8, 6), UNLABELLED)
    assert images.picture(2).mode == "RGB"
    assert open_images(folder, lambda _: torch.zeros(2), labels={})[0][0].shape == (2,)


def test_images_in_a_folder_itself_are_no_classes(folder):
    with pytest.raises(DataError, match=r"2 images of its own and 1 in folders, so it is not pl"):
        list_folder(folder)
    Image.new("RGB", (8, 6)).save(folder / "deep/own.png")
    shutil.rmtree(folder / "deep/er")
    assert not list_folder(folder / "deep").classes
    (folder / "deep/er").mkdir()
    (folder / "deep/own.png").rename(folder / "deep/er/c.png")
    assert list_folder(folder / "deep").classes
    assert open_images(folder / "deep").classes == ["er"]


def test_a_folder_without_images_or_none_at_all_is_told(tmp_path):
    with pytest.raises(DataError, match=r"holds no image \(.*\.png.*\); name a folder that does\."):
        open_images(tmp_path, labels={})
    with pytest.raises(DataError, match="There is no folder"):
        list_folder(tmp_path / "nowhere")
