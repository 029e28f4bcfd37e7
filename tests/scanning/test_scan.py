"""Scans: what the records of a layer hold, beside the oracle, whatever images and labels are."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from sources import MEMBERS, opened, write
from torch import nn
from torch.utils.data import Subset

import checks
import oracle
import structures
import unbraid
from tiny_networks import KINDS, CallsByKeyword, CountingNetwork, SyntheticImages, Unlabelled, build
from unbraid.base.errors import DataError, LayerError, ModelError, RunError, UsageError
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import labels_of
from unbraid.running.folders import as_labelled
from unbraid.scanning import batch


def dataset_of(n_images, images=(), labels=()):
    """Some of whose images are of one value, and some with labels of their own."""
    dataset = SyntheticImages(n_images)
    for index, value in dict(images).items():
        dataset.images[index, 0] = value
    for index, label in dict(labels).items():
        dataset.targets[index] = label
    return dataset


def predicted(kind, dataset):
    relabelled = copy.copy(dataset)
    with torch.no_grad():
        relabelled.targets = build(kind)(dataset.images).argmax(1).tolist()
    return relabelled


def of_sizes(*widths):
    dataset = SyntheticImages(len(widths))
    dataset.images = [image[..., :n] for image, n in zip(dataset.images, widths, strict=True)]
    return dataset


@pytest.mark.parametrize("kind", KINDS)
def test_records_hold_what_the_oracle_says(kind, tmp_path):
    network, dataset = build(kind), SyntheticImages(9)
    truth = checks.truth_of(network, dataset)
    scan = unbraid.scan(network, "layer", dataset, tmp_path / "a", min_share=0.06, batch_size=4)
    checks.assert_records(list(scan.shards()), truth, 0.06, range(9))
    kept = sum(len(records.share_channel) for records in scan.shards())
    assert 0 < kept < truth.shares.numel()  # the threshold kept some and dropped some
    network.train()  # in which it is not scanned
    maps = unbraid.scan(network, network.layer, dataset, tmp_path, positions=True, batch_size=100)
    assert (scan.positions, maps.positions) == (False, True)
    checks.assert_records(list(maps.shards()), truth, 0.005, range(9))
    assert all(records.input_map is not None for records in maps.shards())
    checks.assert_bit_equal(scan.weight, oracle.rows_of(network.layer, network.layer.weight))
    assert (scan.layer.name, scan.class_names) == ("layer", tuple(dataset.classes))


def test_records_of_a_layer_called_by_keyword_and_of_images_of_two_sizes(tmp_path):
    network, dataset = build("3x3"), SyntheticImages(5)
    truth, options = checks.truth_of(network, dataset), {"positions": True, "batch_size": 1}
    scan = unbraid.scan(CallsByKeyword(network), "layer", dataset, tmp_path, **options)
    checks.assert_records(list(scan.shards()), truth, 0.005, range(5))
    dataset = of_sizes(6, 5, 6, 6, 6, 5, 5, 5, 5, 6)
    truth = checks.truth_of(network, dataset)
    for name, options in OF_SIZES.items():
        scan = unbraid.scan(network, "layer", dataset, tmp_path / name, **options)
        checks.assert_records(list(scan.shards()), truth, 0.005, range(10))


OF_SIZES = {"one": {"batch_size": 1}, "four": {"batch_size": 4, "workers": 1}, "usual": {}}


def test_the_usual_batch_holds_as_many_as_memory_does_of_the_largest_of_some_images(
    tmp_path, monkeypatch
):
    small, large = (of_sizes(*sizes) for sizes in ([5] * 16, [5] * 12 + [6] + [5] * 3))
    network, of_one = build("3x3"), batch.bytes_of_one
    monkeypatch.setattr(batch, "_MEMORY", 8 * of_one(network, [network.layer], small[0][0]))
    for name, images, n in (("small", small, 8), ("large", large, 4)):
        scan = unbraid.scan(network, "layer", images, tmp_path / name)
        assert scan.manifest.batch_size == n


@pytest.mark.parametrize("kind", ["folders", "csv", "folder of tars"])
def test_workers_give_the_same_bytes_whatever_the_source(kind, tmp_path):
    images = opened(kind, write(tmp_path / "data", MEMBERS))
    for workers in (0, 1):
        options = {"positions": True, "batch_size": 3, "workers": workers}
        unbraid.scan(build("3x3"), "layer", images, tmp_path / str(workers), **options)
    checks.assert_same_files(tmp_path / "0", tmp_path / "1")


GAIN = 1.0


def scaled(picture):
    return torch.full((3, 7, 6), GAIN * picture.getpixel((0, 0))[0], dtype=torch.float64)


def test_a_scan_goes_on_only_with_the_same_global_that_its_transform_uses(tmp_path, monkeypatch):
    images = opened("folders", write(tmp_path / "data", MEMBERS), transform=scaled)
    unbraid.scan(build("3x3"), "layer", images, tmp_path / "scan")
    unbraid.scan(build("3x3"), "layer", images, tmp_path / "scan")
    monkeypatch.setitem(globals(), "GAIN", 2.0)
    with pytest.raises(RunError, match="a difference in the preprocessing;"):
        unbraid.scan(build("3x3"), "layer", images, tmp_path / "scan")


@pytest.mark.parametrize(
    ("chosen", "positions"),
    [
        ({"classes": [3, 1]}, False),
        ({"classes": np.array([3, 1])}, True),
        ({"indices": (5, 2, 2, 7)}, True),
        *(({"indices": i}, False) for i in ({2, 5, 7}, torch.tensor([2, 7, 5]), range(2, 8, 1))),
    ],
    ids=str,
)
def test_scan_runs_only_the_chosen_images(chosen, positions, tmp_path):
    network, dataset = CountingNetwork(build("3x3")), SyntheticImages(11)
    options = {"positions": positions, "batch_size": np.int64(4), "workers": np.uint8(0), **chosen}
    scan = unbraid.scan(network, "network.layer", dataset, tmp_path, **options)
    indices = sorted({int(n) for n in chosen.get("indices", ())})
    indices = indices or [n for n, label in enumerate(dataset.targets) if label in (1, 3)]
    assert network.n_images == len(indices)
    truth = checks.truth_of(network, dataset, "network.layer")
    checks.assert_records(list(scan.shards()), truth, 0.005, indices)
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
    with pytest.raises(RunError, match="a difference in whether it runs compiled;"):
        unbraid.scan(build("1x1"), "layer", SyntheticImages(6), tmp_path)


@pytest.mark.parametrize("kind", ["3x3", "tokens"])
def test_predicted_labels_are_those_of_a_data_set_labelled_by_the_network(kind, tmp_path):
    dataset = SyntheticImages(40)
    relabelled = predicted(kind, dataset)
    assert relabelled.targets != dataset.targets
    for labels, images in (("predicted", dataset), ("given", relabelled)):
        options = {"labels": labels, "batch_size": 5}
        unbraid.scan(build(kind), "layer", images, tmp_path / labels, **options)
    checks.assert_same_tensors(tmp_path / "predicted", tmp_path / "given")


@pytest.mark.parametrize("label", [UNLABELLED, 99])
def test_any_number_stands_for_a_label_that_is_not_there(label, tmp_path):
    network, dataset = build("3x3"), Unlabelled(9, label)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, labels="predicted")
    relabelled = predicted("3x3", SyntheticImages(9))
    truth = checks.truth_of(network, relabelled)
    checks.assert_records(list(scan.shards()), truth, 0.005, range(9))
    assert (scan.class_names, scan.manifest.labels) == ((), "predicted")
    assert labels_of(as_labelled(dataset, scan)) == relabelled.targets
    given = unbraid.scan(network, "layer", dataset.inner, tmp_path / "given")
    assert as_labelled(dataset.inner, given) is dataset.inner


@pytest.mark.parametrize("label", [4, UNLABELLED])
def test_listed_label_that_is_no_output_is_told_before_the_first_batch(label, tmp_path):
    network = CountingNetwork(build("3x3"))
    dataset = Subset(dataset_of(300, labels={299: label}), range(1, 300))
    with pytest.raises(DataError, match=f"^Image 298 has label {label}, but the network has 4 "):
        unbraid.scan(network, "network.layer", dataset, tmp_path, positions=True, batch_size=4)
    assert network.n_images == 0  # a first look leaves no trace
    assert not list(tmp_path.glob("shard-*"))


def changed(change, name=""):
    """A network of which one part puts out what is made of it; a part is never run."""
    network = build("3x3")
    network.head.add_module("spare", nn.Linear(4, 4).double())
    network.get_submodule(name).register_forward_hook(lambda *seen: change(seen[-1]))
    return network


class Swapping(structures.Around):
    """Hooks swap images and tokens before the layer, and back behind it."""

    def __init__(self):
        super().__init__(nn.Linear(6, 6))
        self.layer.register_forward_pre_hook(lambda _, args: (args[0].transpose(0, 1),))
        self.layer.register_forward_hook(lambda *seen: seen[-1].transpose(0, 1))

    def body(self, x):
        return self.layer(x.flatten(2).mT).mT


class InPlace(structures.Around):
    def body(self, x):
        y = self.layer(x).exp()
        y += 1
        return y


NAN = "Image {} drives the network to NaN"
NO_LABEL = "image 0 is {}, not a class's"
BROKEN = build("3x3")
BROKEN.head.weight.data.fill_(math.nan)
INFINITE = build("3x3")
INFINITE.stem_norm.running_var.fill_(math.inf)
PREDICTED = {"labels": "predicted"}
REFUSED = [  # network or images, options
    (BROKEN, {}, ModelError, "'head.weight' holds"),
    (INFINITE, {}, ModelError, "'stem_norm.running_var' holds"),
    (dataset_of(8, images={5: math.nan}), {"batch_size": 4}, ModelError, NAN.format(5)),
    (dataset_of(8, images={5: 1e308}), {"batch_size": 4}, ModelError, NAN.format(5)),
    (changed(lambda logits: (logits - 1e6).sqrt()), {}, ModelError, NAN.format(0)),
    (dataset_of(8, labels={3: 4}), {}, DataError, "Image 3 has label 4, but the network has 4 out"),
    (dataset_of(8, labels={3: -1}), {}, DataError, "Image 3 has label -1, but the network has 4"),
    (Unlabelled(4), {}, UsageError, r"no labels; pass labels='predicted'\.$"),
    (Unlabelled(4, torch.tensor([0, 1])), PREDICTED, DataError, NO_LABEL.format("a Tensor")),
    (Unlabelled(4, "cat"), {}, DataError, NO_LABEL.format("a str")),
    (Unlabelled(4, 0.5), PREDICTED, DataError, NO_LABEL.format("a float")),
    (Unlabelled(4, 2**70), PREDICTED, DataError, NO_LABEL.format("an int")),
    (SyntheticImages(4, size=(1, 7, 6)), {}, ModelError, r"cannot run on .* \(1, 7, 6\)"),
    (of_sizes(6, 5), {"batch_size": 1, "positions": True}, DataError, "maps of different sizes"),
    (iter(()), {}, UsageError, "must be map-style"),
    (changed(lambda logits: logits[:, :, None]), {}, ModelError, r"a tensor \(4, 4, 1\), not"),
    (changed(torch.clone), {"layer": "head.spare"}, LayerError, "'head.spare' does not run"),
    (changed(lambda z: 2 * z, "layer"), {}, LayerError, "does not compute"),
    (Swapping().double(), {}, LayerError, "has 42 rows of numbers for 4 images, perhaps because a"),
    (InPlace().double(), {}, ModelError, r"no gradient at the layer .* choose a layer behind"),
]


@pytest.mark.parametrize(("given", "options", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_scan_is_refused_without_a_shard(given, options, error, message, tmp_path):
    is_network = isinstance(given, nn.Module)
    network, images = (given, SyntheticImages(4)) if is_network else (build("3x3"), given)
    with pytest.raises(error, match=message):
        unbraid.scan(network, **{"layer": "layer", "dataset": images, "out": tmp_path, **options})
    assert not list(tmp_path.glob("shard-*"))


@pytest.mark.parametrize(
    ("names", "instead"),
    [(["batchsize", "a", "b", "c"], "use batch_size"), (["shuffle", "batchsize"], "leave it out")],
)
def test_the_first_unknown_argument_is_told_in_the_words_of_scan(names, instead, tmp_path):
    sentence = re.escape(f"scan() takes no argument '{names[0]}'; {instead}.")
    with pytest.raises(TypeError, match=sentence):
        unbraid.scan(build("3x3"), "layer", SyntheticImages(4), tmp_path, **dict.fromkeys(names))
