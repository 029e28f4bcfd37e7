"""Scans: what the records of a layer hold, beside the oracle, whatever images and labels are."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset

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


class Torn(Unlabelled):
    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if index == 5:
            raise OSError("torn")
        return self.inner[index]


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3, 7, 6), 0


def predictions(kind: str, dataset: Dataset[Any]) -> list[int]:
    with torch.no_grad():
        logits = [build(kind)(dataset[n][0][None])[0] for n in range(len(dataset))]
    return [int(row.argmax()) for row in logits]


def changed(n_images: int, **changes: Any) -> SyntheticImages:
    """Images, with some of their attributes made anew from what they were."""
    dataset = SyntheticImages(n_images)
    for name, change in changes.items():
        setattr(dataset, name, change(getattr(dataset, name)))
    return dataset


def with_image(n_images: int, index: int, value: float) -> SyntheticImages:
    dataset = SyntheticImages(n_images)
    dataset.images[index, 0] = value
    return dataset


def with_labels(n_images: int, labels: dict[int, Any]) -> SyntheticImages:
    dataset = SyntheticImages(n_images)
    for index, label in labels.items():
        dataset.targets[index] = label
    return dataset


def narrowing(step: int) -> SyntheticImages:
    """Images of two sizes."""
    return changed(4, images=lambda x: [i[:, :, : 6 - n // step] for n, i in enumerate(x)])


# --- what the records hold ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_records_hold_what_the_oracle_says(kind, tmp_path):
    network, dataset = build(kind), SyntheticImages(9)
    truth = truth_of(network, dataset)
    scan = unbraid.scan(network, "layer", dataset, tmp_path / "a", min_share=0.06, batch_size=4)
    assert_records(list(scan.shards()), truth, 0.06, range(9))
    kept = sum(len(records.share_channel) for records in scan.shards())
    assert 0 < kept < truth.shares.numel()  # the threshold kept some and dropped some
    maps = unbraid.scan(network, "layer", dataset, tmp_path / "b", positions=True, batch_size=3)
    assert (scan.positions, maps.positions) == (False, True)
    assert_records(list(maps.shards()), truth, 0.005, range(9))
    assert_input_maps(list(maps.shards()), truth)


CASES: dict[str, Any] = {  # network, how it is called, and options of the scan
    "one by one": (lambda: build("batch norm behind"), nn.Module.eval, {"batch_size": 1}),
    "all at once": (lambda: build("batch norm behind"), nn.Module.eval, {"batch_size": 1000}),
    "training mode": (lambda: build("batch norm behind"), nn.Module.train, {"batch_size": 7}),
    "input overwritten": (OverwritesInput, nn.Module.eval, {"positions": True}),
    "input by keyword": (lambda: build("3x3"), CallsByKeyword, {}),
    "worker": (lambda: build("1x1"), nn.Module.eval, {"batch_size": 3, "workers": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_records_do_not_depend_on_how_the_network_is_run(case, tmp_path):
    make, call, options = CASES[case]
    dataset = SyntheticImages(10)
    network = make()
    truth = truth_of(network, dataset)
    scan = unbraid.scan(call(network), "layer", dataset, tmp_path, **options)
    assert_records(list(scan.shards()), truth, 0.005, range(10))
    if scan.positions:
        assert_input_maps(list(scan.shards()), truth)


def test_scan_works_where_gradients_are_switched_off_and_images_want_one(tmp_path):
    network, dataset = build("3x3"), SyntheticImages(4)
    dataset.images.requires_grad_()
    with torch.no_grad():
        scan = unbraid.scan(network, "layer", dataset, tmp_path)
    assert_records(list(scan.shards()), truth_of(network, SyntheticImages(4)), 0.005, range(4))


def test_scan_of_images_of_several_sizes_runs_them_one_by_one(tmp_path):
    network, dataset = build("3x3"), narrowing(1)
    dataset.images = [image[:, :, : 6 - n % 2] for n, image in enumerate(SyntheticImages(4).images)]
    scan = unbraid.scan(network, "layer", dataset, tmp_path, batch_size=1)
    assert_records(list(scan.shards()), truth_of(network, dataset), 0.005, range(4))


def test_two_scans_of_the_same_are_the_same_bytes(tmp_path):
    for name, workers in (("one", 0), ("two", 1)):
        options = {"positions": True, "workers": workers}
        unbraid.scan(build("groups"), "layer", SyntheticImages(150), tmp_path / name, **options)
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_scan_knows_the_layers_weights_and_the_class_names(tmp_path):
    network = build("3x3")
    scan = unbraid.scan(network, network.layer, SyntheticImages(4), tmp_path)
    assert_bit_equal(scan.weight, network.layer.weight.flatten(1))
    assert_bit_equal(scan.bias, network.layer.bias)
    assert scan.layer.name == "layer"
    assert scan.class_names == ("class 0", "class 1", "class 2", "class 3")


# --- some of the images ---------------------------------------------------------------------------


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
    options = {"positions": positions, "batch_size": 4}
    scan = unbraid.scan(network, "network.layer", dataset, tmp_path, **chosen, **options)
    indices = sorted({int(n) for n in chosen.get("indices", ())})
    indices = indices or [n for n, label in enumerate(dataset.targets) if label in (1, 3)]
    assert network.n_images == len(indices)
    truth = truth_of(network, dataset, "network.layer")
    assert_records(list(scan.shards()), truth, 0.005, indices)
    network.n_images = 0
    again = unbraid.scan(network, "network.layer", dataset, tmp_path, **chosen, **options)
    assert (network.n_images, again.manifest) == (0, scan.manifest)


SETTINGS = [
    ({}, {"labels": "predicted"}, "whether labels are given or predicted"),
    ({"labels": "predicted"}, {}, "whether labels are given or predicted"),
    ({"indices": [0, 1]}, {"indices": [0, 2]}, "the places in the data set"),
    ({"indices": [0, 1]}, {}, "the places in the data set"),
]


@pytest.mark.parametrize(("before", "after", "difference"), SETTINGS)
def test_scan_of_other_labels_or_places_refuses_the_folder(before, after, difference, tmp_path):
    network, dataset = CountingNetwork(build("1x1")), SyntheticImages(6)
    unbraid.scan(network, "network.layer", dataset, tmp_path, **before)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    network.n_images = 0
    with pytest.raises(RunError, match=rf"something else: {difference} differ\. Name another"):
        unbraid.scan(network, "network.layer", dataset, tmp_path, **after)
    unbraid.scan(network, "network.layer", dataset, tmp_path, **before)
    assert network.n_images == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_scan_of_an_older_version_can_be_opened_and_one_that_ran_compiled_too(tmp_path):
    scan = unbraid.scan(build("1x1"), "layer", SyntheticImages(6), tmp_path / "scan")
    path = tmp_path / "scan/manifest.json"
    older = json.loads(path.read_text())
    for name, usual in (("labels", "given"), ("indices", ""), ("compiled", False), ("output", "")):
        assert older.pop(name) == usual
    path.write_text(json.dumps(older))
    assert unbraid.open_scan(tmp_path / "scan").manifest == scan.manifest
    path.write_text(json.dumps({**older, "compiled": True}))
    assert unbraid.open_scan(tmp_path / "scan").manifest.compiled
    with pytest.raises(RunError, match="whether it runs compiled differ"):
        unbraid.scan(build("1x1"), "layer", SyntheticImages(6), tmp_path / "scan")


# --- predicted labels -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["3x3", "tokens"])
def test_predicted_labels_are_those_of_a_data_set_labelled_by_the_network(kind, tmp_path):
    dataset, network = SyntheticImages(40), build(kind)
    relabelled = Relabelled(dataset, dict(enumerate(predictions(kind, dataset))))
    assert relabelled.targets != dataset.targets
    settings = {"positions": True, "batch_size": 5}
    predicted = unbraid.scan(
        network, "layer", dataset, tmp_path / "predicted", labels="predicted", **settings
    )
    given = unbraid.scan(network, "layer", relabelled, tmp_path / "relabelled", **settings)
    assert_same_tensors(tmp_path / "predicted", tmp_path / "relabelled")
    found = [unbraid.find(scan, tau=0.02, p=0.3, gamma=1.0) for scan in (predicted, given)]
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


def test_labels_of_images_that_are_broken_or_not_scanned_are_no_concern(tmp_path):
    dataset = with_labels(9, {8: 99})
    scan = unbraid.scan(build("3x3"), "layer", dataset, tmp_path / "a", indices=range(8))
    assert scan.labels_seen() == {0, 1, 2, 3}
    options = {"batch_size": 2, "skip_broken": True}
    scan = unbraid.scan(build("3x3"), "layer", Torn(9), tmp_path / "b", **options)
    assert scan.broken() == [5]


# --- what cannot be scanned -----------------------------------------------------------------------


class Wrapped(nn.Module):
    """A network, and what is made of its logits."""

    def __init__(self, wrap: Any = None, **parts: nn.Module) -> None:
        super().__init__()
        self.network, self.wrap = build("1x1"), wrap or (lambda logits: logits)
        for name, part in parts.items():
            setattr(self, name, part)

    @property
    def layer(self) -> nn.Module:
        return self.network.layer

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.network(x))


def with_weight(where: str, value: float) -> nn.Module:
    network = build("3x3")
    network.state_dict()[where].flatten()[1] = value
    return network


def with_hook() -> nn.Module:
    network = build("3x3")
    network.layer.register_forward_hook(lambda _module, _args, output: 2 * output)
    return network


class InPlace(structures.Around):
    def body(self, x: Tensor) -> Tensor:
        y = self.layer(x).exp()
        y += 1
        return y


def on_images(dataset: Dataset[Any], **options: Any) -> tuple[Any, dict[str, Any]]:
    return lambda: build("3x3"), {"dataset": dataset, **options}


def wrapped(wrap: Any) -> tuple[Any, dict[str, Any]]:
    return lambda: Wrapped(wrap), {"layer": "network.layer"}


NO_INDEX = (None, "cat", torch.tensor([0, 1]), 0.5, math.inf, 2**70)
REFUSED: list[tuple[tuple[Any, dict[str, Any]], type[Exception], str]] = [
    *(
        ((lambda n=name, v=value: with_weight(n, v), {}), ModelError, f"'{name}' holds NaN")
        for name, value in (("head.weight", math.nan), ("stem_norm.running_var", math.inf))
    ),
    *(
        (
            on_images(with_image(8, 5, value), batch_size=4),
            ModelError,
            "Image 5 drives the network to NaN",
        )
        for value in (math.nan, math.inf, 1e308)
    ),
    (
        wrapped(lambda logits: (logits - 1e6).sqrt()),
        ModelError,
        "Image 0 drives the network to NaN",
    ),
    *(
        (
            on_images(with_labels(8, {3: label})),
            DataError,
            f"Image 3 has label {label}, but the network has 4 out",
        )
        for label in (4, -1)
    ),
    (on_images(Unlabelled(4)), UsageError, r"no labels; pass labels='predicted'\.$"),
    *(
        (
            on_images(Unlabelled(4, label), labels=("given", "predicted")[k % 2]),
            DataError,
            rf"image 0 is a {type(label).__name__}, not a class's",
        )
        for k, label in enumerate(NO_INDEX)
    ),
    (
        on_images(SyntheticImages(4, size=(1, 7, 6))),
        ModelError,
        r"cannot run on images of shape \(1, 7, 6\)",
    ),
    (on_images(narrowing(2)), DataError, r"Image 2 is \(3, 7, 5\) where image 0 is \(3, 7, 6\)"),
    (
        on_images(narrowing(2), batch_size=1, positions=True),
        DataError,
        "input maps of different sizes",
    ),
    (
        on_images(changed(4, images=lambda x: [image.numpy() for image in x])),
        DataError,
        r"Image 0 is a ndarray, not a tensor; .*transform",
    ),
    (on_images(Stream()), UsageError, "must be map-style"),
    (
        wrapped(lambda logits: {"out": logits}),
        ModelError,
        "output is a dict, not logits",
    ),
    (
        wrapped(lambda logits: logits[:, :, None]),
        ModelError,
        r"output is a tensor \(1, 4, 1\), not logits",
    ),
    (
        (lambda: Wrapped(spare=nn.Linear(4, 4)), {"layer": "spare"}),
        LayerError,
        "'spare' does not run when the network does",
    ),
    ((with_hook, {}), LayerError, "does not compute"),
    (
        (lambda: InPlace().double(), {}),
        ModelError,
        r"no gradient at the layer .* choose a layer behind",
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_scan_of_what_cannot_be_scanned_is_refused_without_a_shard(given, error, message, tmp_path):
    make, options = given
    arguments = {"layer": "layer", "dataset": SyntheticImages(4), "out": tmp_path, **options}
    with pytest.raises(error, match=message):
        unbraid.scan(make(), **arguments)
    assert not list(tmp_path.glob("shard-*"))


def test_usable_layers_of_a_network_that_writes_in_place_are_found_one_by_one():
    layers = usable_layers(InPlace().double(), SyntheticImages(1).images)
    assert [spec.name for spec in layers] == ["head"]
