"""Labels that are given, predicted or not there at all; scans of some places of a data set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

import unbraid
from checks import assert_input_maps, assert_records, assert_same_tensors, truth_of
from tiny_networks import CountingNetwork, SyntheticImages, build
from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import Relabelled, labels_of
from unbraid.images.listing import list_folder
from unbraid.images.open import open_images
from unbraid.running.run import as_labelled


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


# --- predicted labels -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["3x3", "groups", "tokens"])
def test_predicted_labels_are_those_of_a_data_set_labelled_by_the_network(kind, tmp_path):
    dataset = SyntheticImages(13)
    relabelled = SyntheticImages(13)
    relabelled.targets = predictions(kind, dataset)
    assert relabelled.targets != dataset.targets
    settings = {"positions": True, "batch_size": 5}
    predicted = unbraid.scan(
        build(kind), "layer", dataset, tmp_path / "predicted", labels="predicted", **settings
    )
    unbraid.scan(build(kind), "layer", relabelled, tmp_path / "relabelled", **settings)
    assert_same_tensors(tmp_path / "predicted", tmp_path / "relabelled")
    truth = truth_of(build(kind), relabelled)
    assert_records(list(predicted.shards()), truth, 0.005, range(13))
    assert_input_maps(list(predicted.shards()), truth)


@pytest.mark.parametrize("label", [UNLABELLED, 0, 99])
def test_any_number_stands_for_a_label_that_is_not_there(label, tmp_path):
    network = build("3x3")
    scan = unbraid.scan(network, "layer", Unlabelled(9, label), tmp_path, labels="predicted")
    relabelled = SyntheticImages(9)
    relabelled.targets = predictions("3x3", relabelled)
    assert_records(list(scan.shards()), truth_of(network, relabelled), 0.005, range(9))
    assert scan.class_names == ()
    assert scan.manifest.labels == "predicted"


def test_a_data_set_without_labels_wants_them_predicted(tmp_path):
    with pytest.raises(UsageError, match=r"no labels; pass labels='predicted'\.$"):
        unbraid.scan(build("3x3"), "layer", Unlabelled(4), tmp_path)
    with pytest.raises(UsageError, match="labels is 'guessed'; use 'given' or 'predicted'"):
        unbraid.scan(build("3x3"), "layer", SyntheticImages(4), tmp_path, labels="guessed")
    assert not list(tmp_path.iterdir())


def test_a_data_set_that_lacks_some_labels_is_told_which(tmp_path):
    dataset = SyntheticImages(6)
    dataset.targets[4] = UNLABELLED
    with pytest.raises(DataError, match="Image 4 has label -1"):
        unbraid.scan(build("3x3"), "layer", dataset, tmp_path)


@pytest.mark.parametrize("label", [4, UNLABELLED])
@pytest.mark.parametrize("part", [False, True])
def test_a_listed_label_that_is_no_output_is_told_before_the_first_batch(label, part, tmp_path):
    network, dataset = CountingNetwork(build("3x3")), SyntheticImages(300)
    dataset.targets[298] = dataset.targets[299] = label
    if part:
        dataset = Subset(dataset, range(1, 300))
    options = {"positions": True, "batch_size": 4}  # a shard is of 128 images
    place = 297 if part else 298
    with pytest.raises(
        DataError, match=f"^Image {place} has label {label}, but the network has 4 "
    ):
        unbraid.scan(network, "network.layer", dataset, tmp_path, **options)
    assert network.n_images == 0  # a first look leaves no trace
    assert not list(tmp_path.glob("shard-*"))
    assert not network._forward_hooks


def test_a_label_that_is_no_output_of_an_image_that_is_not_scanned_is_no_concern(tmp_path):
    dataset = SyntheticImages(9)
    dataset.targets[8] = 99
    scan = unbraid.scan(build("3x3"), "layer", dataset, tmp_path, indices=range(8))
    assert scan.labels_seen() == {0, 1, 2, 3}


def test_a_missing_label_of_a_broken_image_without_a_list_is_no_concern(tmp_path):
    class Torn(Unlabelled):
        def __getitem__(self, index: int) -> tuple[Tensor, Any]:
            if index == 5:
                raise OSError("torn")
            return self.inner[index]

    scan = unbraid.scan(build("3x3"), "layer", Torn(9), tmp_path, batch_size=2, skip_broken=True)
    assert scan.broken() == [5]


@pytest.mark.parametrize("label", [None, "cat", torch.tensor([0, 1]), 0.5, float("inf"), 2**70])
def test_a_label_that_is_no_number_is_told(label, tmp_path):
    for labels in ("given", "predicted"):
        with pytest.raises(DataError, match=rf"image 0 is a {type(label).__name__}, not a class's"):
            unbraid.scan(build("3x3"), "layer", Unlabelled(4, label), tmp_path, labels=labels)
    listed = SyntheticImages(3)
    listed.targets = [0, 1, label]
    with pytest.raises(DataError, match="image 2"):
        labels_of(listed)


def test_findings_of_predicted_labels_are_those_of_the_relabelled_data_set(tmp_path):
    dataset = SyntheticImages(40)
    network = build("3x3")
    predicted = unbraid.scan(network, "layer", dataset, tmp_path / "a", labels="predicted")
    relabelled = Relabelled(dataset, dict(enumerate(predictions("3x3", dataset))))
    given = unbraid.scan(network, "layer", relabelled, tmp_path / "b")
    found = [unbraid.find(scan, tau=0.02, p=0.3, gamma=1.0) for scan in (predicted, given)]
    assert found[0].pairs
    assert found[0] == found[1]


# --- a folder that belongs to something else ------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        ({}, {"labels": "predicted"}, "whether labels are given or predicted"),
        ({"labels": "predicted"}, {}, "whether labels are given or predicted"),
        ({}, {"indices": [0, 1, 2]}, "the places in the data set"),
        ({"indices": [0, 1]}, {"indices": [0, 2]}, "the places in the data set"),
        ({"indices": [0, 1]}, {}, "the places in the data set"),
    ],
)
def test_a_folder_of_other_labels_or_places_is_refused(before, after, difference, tmp_path):
    network, dataset = CountingNetwork(build("1x1")), SyntheticImages(6)
    unbraid.scan(network, "network.layer", dataset, tmp_path, **before)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    network.n_images = 0
    with pytest.raises(RunError, match=rf"something else: {difference} differ\. Name another"):
        unbraid.scan(network, "network.layer", dataset, tmp_path, **after)
    assert network.n_images == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("settings", [{"labels": "predicted"}, {"indices": [4, 1]}])
def test_the_same_labels_or_places_again_run_the_network_on_nothing(settings, tmp_path):
    network, dataset = CountingNetwork(build("1x1")), SyntheticImages(6)
    unbraid.scan(network, "network.layer", dataset, tmp_path, **settings)
    network.n_images = 0
    unbraid.scan(network, "network.layer", dataset, tmp_path, **settings)
    assert network.n_images == 0


def test_a_scan_of_before_labels_could_be_predicted_can_be_opened(tmp_path):
    scan = unbraid.scan(build("1x1"), "layer", SyntheticImages(6), tmp_path)
    path = tmp_path / "manifest.json"
    older = json.loads(path.read_text())
    assert (older.pop("labels"), older.pop("indices")) == ("given", "")
    path.write_text(json.dumps(older))
    assert unbraid.open_scan(tmp_path).manifest == scan.manifest


# --- places in the data set -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "indices", [[7, 2, 5], (5, 2, 2, 7), {2, 5, 7}, torch.tensor([2, 7, 5]), range(2, 8, 1)]
)
@pytest.mark.parametrize("positions", [False, True])
def test_only_images_at_the_chosen_places_are_scanned(indices, positions, tmp_path):
    network, dataset = CountingNetwork(build("3x3")), SyntheticImages(11)
    options = {"indices": indices, "positions": positions, "batch_size": 4}
    scan = unbraid.scan(network, "network.layer", dataset, tmp_path, **options)
    chosen = sorted({int(n) for n in indices})
    assert network.n_images == len(chosen)
    truth = truth_of(network, dataset, "network.layer")
    assert_records(list(scan.shards()), truth, 0.005, chosen)


def test_equal_places_are_one_scan_however_they_are_named(tmp_path):
    scans = [
        unbraid.scan(build("1x1"), "layer", SyntheticImages(9), tmp_path / str(k), indices=indices)
        for k, indices in enumerate(([7, 2], torch.tensor([2, 7, 2])))
    ]
    assert scans[0].manifest == scans[1].manifest


@pytest.mark.parametrize("indices", [[], [0, 4], [-1], [0, 10**9]])
def test_places_out_of_range_are_refused(indices, tmp_path):
    with pytest.raises(UsageError, match="places in the data set, 0 to 3, one or more"):
        unbraid.scan(build("3x3"), "layer", SyntheticImages(4), tmp_path, indices=indices)
    assert not list(tmp_path.iterdir())


def test_classes_and_places_are_refused_together(tmp_path):
    with pytest.raises(UsageError, match="classes and indices both say what to scan"):
        unbraid.scan(
            build("3x3"), "layer", SyntheticImages(4), tmp_path, classes=[0], indices=[0, 1]
        )


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


def test_images_are_shown_with_the_labels_that_a_scan_took_them_for(tmp_path):
    dataset = Unlabelled(7)
    scan = unbraid.scan(build("3x3"), "layer", dataset, tmp_path, labels="predicted")
    assert labels_of(as_labelled(dataset, scan)) == predictions("3x3", dataset)
    given = unbraid.scan(build("3x3"), "layer", dataset.inner, tmp_path / "given")
    assert as_labelled(dataset.inner, given) is dataset.inner


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


def test_scans_of_folders_with_other_files_differ(folder, tmp_path):
    def to_tensor(picture: Image.Image) -> Tensor:
        return torch.full((3, 7, 6), picture.getpixel((0, 0))[0] / 255.0).double()

    network = build("3x3")
    images = open_images(folder, to_tensor, labels={})
    unbraid.scan(network, "layer", images, tmp_path / "scan", labels="predicted")
    (folder / "a.jpg").rename(folder / "z.jpg")
    images = open_images(folder, to_tensor, labels={})
    with pytest.raises(RunError, match="the images or labels"):
        unbraid.scan(network, "layer", images, tmp_path / "scan", labels="predicted")
