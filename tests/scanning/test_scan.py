"""Scans: what the records of a layer hold, beside the oracle, whatever images and labels are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sources import MEMBERS, opened, write
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import structures
import unbraid
from checks import (
    assert_bit_equal,
    assert_input_maps,
    assert_records,
    assert_same_files,
    assert_same_tensors,
    truth_of,
)
from tiny_networks import (
    KINDS,
    CallsByKeyword,
    CountingNetwork,
    OverwritesInput,
    SyntheticImages,
    Unlabelled,
    build,
)
from unbraid.base.errors import DataError, LayerError, ModelError, RunError, UsageError
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import Relabelled, labels_of
from unbraid.running.run import as_labelled
from unbraid.scanning.scan import usable_layers


def predictions(kind: str, dataset: Dataset[Any]) -> list[int]:
    with torch.no_grad():
        logits = [build(kind)(dataset[n][0][None])[0] for n in range(len(dataset))]
    return [int(row.argmax()) for row in logits]


def with_image(index: int, value: float) -> SyntheticImages:
    dataset = SyntheticImages(8)
    dataset.images[index, 0] = value
    return dataset


def with_labels(n_images: int, labels: dict[int, Any]) -> SyntheticImages:
    dataset = SyntheticImages(n_images)
    for index, label in labels.items():
        dataset.targets[index] = label
    return dataset


def of_sizes(*widths: int) -> SyntheticImages:
    dataset = SyntheticImages(len(widths))
    dataset.images = [image[:, :, :n] for image, n in zip(dataset.images, widths, strict=True)]
    return dataset


@pytest.mark.parametrize("kind", KINDS)
def test_records_hold_what_the_oracle_says(kind, tmp_path):
    network, dataset = build(kind), SyntheticImages(9)
    truth = truth_of(network, dataset)
    scan = unbraid.scan(network, "layer", dataset, tmp_path / "a", min_share=0.06, batch_size=4)
    assert_records(list(scan.shards()), truth, 0.06, range(9))
    kept = sum(len(records.share_channel) for records in scan.shards())
    assert 0 < kept < truth.shares.numel()  # the threshold kept some and dropped some
    maps = unbraid.scan(network, network.layer, dataset, tmp_path, positions=True, batch_size=3)
    assert (scan.positions, maps.positions) == (False, True)
    assert_records(list(maps.shards()), truth, 0.005, range(9))
    assert_input_maps(list(maps.shards()), truth)
    assert_bit_equal(scan.weight, network.layer.weight.flatten(1))
    assert (scan.layer.name, scan.class_names) == ("layer", tuple(dataset.classes))


CASES: dict[str, Any] = {  # network, how it is called, and options of the scan
    "one by one": (lambda: build("batch norm behind"), nn.Module.eval, {"batch_size": 1}),
    "all at once": (lambda: build("batch norm behind"), nn.Module.eval, {"batch_size": 1000}),
    "training mode": (lambda: build("batch norm behind"), nn.Module.train, {"batch_size": 7}),
    "input overwritten": (OverwritesInput, nn.Module.eval, {"positions": True}),
    "input by keyword": (lambda: build("3x3"), CallsByKeyword, {}),
    "two sizes": (lambda: build("3x3"), nn.Module.eval, {"batch_size": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_records_do_not_depend_on_how_the_network_is_run(case, tmp_path):
    make, call, options = CASES[case]
    network, dataset = make(), of_sizes(*([6, 5] if case == "two sizes" else [6, 6]) * 5)
    truth = truth_of(network, dataset)
    scan = unbraid.scan(call(network), "layer", dataset, tmp_path, **options)
    assert_records(list(scan.shards()), truth, 0.005, range(10))
    if scan.positions:
        assert_input_maps(list(scan.shards()), truth)


@pytest.mark.parametrize("kind", ["folders", "csv", "tar", "saved"])
def test_workers_give_the_same_bytes_whatever_the_source(kind, tmp_path):
    images = opened(kind, write(tmp_path / "data", MEMBERS))
    for workers in (0, 1):
        options = {"positions": True, "batch_size": 3, "workers": workers}
        unbraid.scan(build("3x3"), "layer", images, tmp_path / str(workers), **options)
    assert_same_files(tmp_path / "0", tmp_path / "1")


def test_a_shard_that_grew_since_it_was_listed_is_told(tmp_path):
    images = opened("tar", write(tmp_path / "data", MEMBERS))
    with (tmp_path / "shards/train-000.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"train-000\.tar was changed since it was listed; start"):
        unbraid.scan(build("3x3"), "layer", images, tmp_path / "scan", skip_broken=True)


GAIN = 1.0


def scaled(picture: Any) -> Tensor:
    return torch.full((3, 7, 6), GAIN * picture.getpixel((0, 0))[0], dtype=torch.float64)


def test_a_scan_goes_on_only_with_the_same_global_that_its_transform_uses(tmp_path, monkeypatch):
    images = opened("folders", write(tmp_path / "data", MEMBERS), transform=scaled)
    unbraid.scan(build("3x3"), "layer", images, tmp_path / "scan")
    unbraid.scan(build("3x3"), "layer", images, tmp_path / "scan")
    monkeypatch.setitem(globals(), "GAIN", 2.0)
    with pytest.raises(RunError, match="the preprocessing differ"):
        unbraid.scan(build("3x3"), "layer", images, tmp_path / "scan")


@pytest.mark.parametrize(
    ("chosen", "positions"),
    [
        ({"classes": [3, 1]}, False),
        ({"classes": [3, 1]}, True),
        ({"indices": (5, 2, 2, 7)}, True),
        *(({"indices": i}, False) for i in ({2, 5, 7}, torch.tensor([2, 7, 5]), range(2, 8, 1))),
    ],
    ids=str,
)
def test_scan_runs_only_the_chosen_images(chosen, positions, tmp_path):
    network, dataset = CountingNetwork(build("3x3")), SyntheticImages(11)
    options = {"positions": positions, "batch_size": 4, **chosen}
    scan = unbraid.scan(network, "network.layer", dataset, tmp_path, **options)
    indices = sorted({int(n) for n in chosen.get("indices", ())})
    indices = indices or [n for n, label in enumerate(dataset.targets) if label in (1, 3)]
    assert network.n_images == len(indices)
    truth = truth_of(network, dataset, "network.layer")
    assert_records(list(scan.shards()), truth, 0.005, indices)
    network.n_images = 0
    again = unbraid.scan(network, "network.layer", dataset, tmp_path, **options)
    assert (network.n_images, again.manifest) == (0, scan.manifest)


def test_scan_of_an_older_version_can_be_opened_and_one_that_ran_compiled_too(tmp_path):
    scan = unbraid.scan(build("1x1"), "layer", SyntheticImages(6), tmp_path)
    path = tmp_path / "manifest.json"
    older = json.loads(path.read_text())
    for name, usual in (("labels", "given"), ("indices", ""), ("compiled", False), ("output", "")):
        assert older.pop(name) == usual
    path.write_text(json.dumps(older))
    assert unbraid.open_scan(tmp_path).manifest == scan.manifest
    path.write_text(json.dumps({**older, "compiled": True}))
    assert unbraid.open_scan(tmp_path).manifest.compiled
    with pytest.raises(RunError, match="whether it runs compiled differ"):
        unbraid.scan(build("1x1"), "layer", SyntheticImages(6), tmp_path)


@pytest.mark.parametrize("kind", ["3x3", "tokens"])
def test_predicted_labels_are_those_of_a_data_set_labelled_by_the_network(kind, tmp_path):
    dataset, network = SyntheticImages(40), build(kind)
    relabelled = Relabelled(dataset, dict(enumerate(predictions(kind, dataset))))
    assert relabelled.targets != dataset.targets
    scans = [
        unbraid.scan(network, "layer", images, tmp_path / labels, labels=labels, batch_size=5)
        for labels, images in (("predicted", dataset), ("given", relabelled))
    ]
    assert_same_tensors(scans[0].path, scans[1].path)
    found = [unbraid.find(scan, tau=0.02, p=0.3, gamma=1.0) for scan in scans]
    assert found[0] == found[1]
    assert found[0].pairs or kind != "3x3"


@pytest.mark.parametrize("label", [UNLABELLED, 0, 99])
def test_any_number_stands_for_a_label_that_is_not_there(label, tmp_path):
    network, dataset = build("3x3"), Unlabelled(9, label)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, labels="predicted")
    relabelled = SyntheticImages(9)
    relabelled.targets = predictions("3x3", relabelled)
    assert_records(list(scan.shards()), truth_of(network, relabelled), 0.005, range(9))
    assert (scan.class_names, scan.manifest.labels) == ((), "predicted")
    assert labels_of(as_labelled(dataset, scan)) == relabelled.targets
    given = unbraid.scan(network, "layer", dataset.inner, tmp_path / "given")
    assert as_labelled(dataset.inner, given) is dataset.inner


@pytest.mark.parametrize(("label", "part"), [(4, True), (UNLABELLED, False)])
def test_listed_label_that_is_no_output_is_told_before_the_first_batch(label, part, tmp_path):
    network, dataset = CountingNetwork(build("3x3")), with_labels(300, {298: label, 299: label})
    if part:
        dataset = Subset(dataset, range(1, 300))
    options = {"positions": True, "batch_size": 4}  # a shard is of 128 images
    told = f"^Image {298 - part} has label {label}, but the network has 4 "
    with pytest.raises(DataError, match=told):
        unbraid.scan(network, "network.layer", dataset, tmp_path, **options)
    assert network.n_images == 0  # a first look leaves no trace
    assert not list(tmp_path.glob("shard-*"))


class Wrapped(nn.Module):
    """A network, and what is made of its logits."""

    def __init__(self, wrap: Any = lambda logits: logits) -> None:
        super().__init__()
        self.network, self.wrap, self.spare = build("1x1"), wrap, nn.Linear(4, 4)

    @property
    def layer(self) -> nn.Module:
        return self.network.layer

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.network(x))


class InPlace(structures.Around):
    def body(self, x: Tensor) -> Tensor:
        y = self.layer(x).exp()
        y += 1
        return y


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    network = build("3x3")
    change(network)
    return network


NAN = "Image {} drives the network to NaN"
NO_LABEL = "image 0 is a {}, not a class's"
DOUBLED = changed(lambda n: n.layer.register_forward_hook(lambda *seen: 2 * seen[-1]))
PREDICTED = {"labels": "predicted"}
INNER = {"layer": "network.layer"}
REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [  # network or images, options
    (changed(lambda n: n.head.weight.data.fill_(math.nan)), {}, ModelError, "'head.weight' holds"),
    (with_image(5, math.nan), {"batch_size": 4}, ModelError, NAN.format(5)),
    (with_image(5, 1e308), {"batch_size": 4}, ModelError, NAN.format(5)),
    (Wrapped(lambda logits: (logits - 1e6).sqrt()), INNER, ModelError, NAN.format(0)),
    (with_labels(8, {3: 4}), {}, DataError, "Image 3 has label 4, but the network has 4 out"),
    (Unlabelled(4), {}, UsageError, r"no labels; pass labels='predicted'\.$"),
    (Unlabelled(4, torch.tensor([0, 1])), PREDICTED, DataError, NO_LABEL.format("Tensor")),
    (Unlabelled(4, 2**70), PREDICTED, DataError, NO_LABEL.format("int")),
    (SyntheticImages(4, size=(1, 7, 6)), {}, ModelError, r"cannot run on .* \(1, 7, 6\)"),
    (of_sizes(6, 6, 5, 5), {}, DataError, r"Image 2 is \(3, 7, 5\) where image 0 is \(3, 7, 6\)"),
    (of_sizes(6, 5), {"batch_size": 1, "positions": True}, DataError, "maps of different sizes"),
    (iter(()), {}, UsageError, "must be map-style"),
    (Wrapped(lambda logits: logits[:, :, None]), INNER, ModelError, r"a tensor \(1, 4, 1\), not"),
    (Wrapped(), {"layer": "spare"}, LayerError, "'spare' does not run when the network does"),
    (DOUBLED, {}, LayerError, "does not compute"),
    (InPlace().double(), {}, ModelError, r"no gradient at the layer .* choose a layer behind"),
]


@pytest.mark.parametrize(("given", "options", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_scan_of_what_cannot_be_scanned_is_refused_without_a_shard(
    given, options, error, message, tmp_path: Path
):
    network, images = build("3x3"), SyntheticImages(4)
    if isinstance(given, nn.Module):
        network = given
    else:
        images = given
    with pytest.raises(error, match=message):
        unbraid.scan(network, **{"layer": "layer", "dataset": images, "out": tmp_path, **options})
    assert not list(tmp_path.glob("shard-*"))


def test_usable_layers_of_a_network_that_writes_in_place_are_found_one_by_one():
    layers = usable_layers(InPlace().double(), SyntheticImages(1).images)
    assert [spec.name for spec in layers] == ["head"]
