"""Several layers at once: one pass, each with the records of a scan of its own; one network."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import structures
import unbraid
from checks import assert_close
from tiny_networks import N_CLASSES, CountingNetwork, SyntheticImages
from unbraid.base.errors import LayerError, ModelError, UsageError
from unbraid.measuring.circuit import Circuit
from unbraid.scanning.scan import usable_layers

IMAGES = SyntheticImages(11, seed=5)
CONCEPTS = {1: [[0], [1]], 3: [[0], [1], [2]]}


class Deep(nn.Module):
    """Three layers one behind the other, and one to the side of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(6, N_CLASSES)
        self.unused = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu_()
        x = (self.blocks[0](x) + self.blocks[1](x)).relu_()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Deep:
    torch.manual_seed(3)
    network = Deep().double().eval()
    with torch.no_grad():
        network.norm.running_mean.uniform_(-0.3, 0.3)
        network.norm.running_var.uniform_(0.5, 2)
    return network


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name != "manifest.json"  # names versions and the like
    }


def assert_as_alone(model: nn.Module, together: Path, name: str, tmp_path: Path) -> None:
    """What one pass kept of a layer is, to the last bit, what a pass for it alone keeps."""
    unbraid.scan(model, name, IMAGES, tmp_path / f"alone-{name}", batch_size=4)
    assert files(together / name) == files(tmp_path / f"alone-{name}")


# --- scan -----------------------------------------------------------------------------------------


def test_one_pass_keeps_of_every_layer_what_a_pass_of_its_own_keeps(network, tmp_path):
    names = ["blocks.1", "first", "head", "blocks.0"]
    asked = ["blocks.1", network.first, "head", "blocks.0"]
    counting = CountingNetwork(network)
    prefixed = [f"network.{name}" for name in names]
    unbraid.scan(counting, prefixed, IMAGES, tmp_path / "counted", batch_size=4)
    assert counting.n_images == len(IMAGES)
    scans = unbraid.scan(network, asked, IMAGES, tmp_path / "all", batch_size=4)
    assert list(scans) == names
    for name, scan in scans.items():
        assert scan.layer.name == name
        assert_as_alone(network, tmp_path / "all", name, tmp_path)


@pytest.mark.parametrize("kind", structures.STRUCTURES)
def test_every_structure_can_be_scanned_layer_beside_layer(kind, tmp_path):
    network = structures.build(kind)
    images = structures.images()
    names = [spec.name for spec in usable_layers(network, images.images[:1])]
    assert len(names) > 1
    unbraid.scan(network, names, images, tmp_path / "all")
    for name in names:
        unbraid.scan(network, name, images, tmp_path / f"alone-{name}")
        assert files(tmp_path / "all" / name) == files(tmp_path / f"alone-{name}")


def test_a_changed_record_is_told(network, tmp_path):
    unbraid.scan(network, ["first"], IMAGES, tmp_path / "all", batch_size=4)
    shard = tmp_path / "all" / "first" / "shard-000000.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(bytes(damaged))
    with pytest.raises(AssertionError):
        assert_as_alone(network, tmp_path / "all", "first", tmp_path)


def test_only_what_a_layer_lacks_is_scanned_again(network, tmp_path):
    names = ["first", "head"]
    unbraid.scan(network, names, IMAGES, tmp_path / "all", batch_size=4)
    kept = files(tmp_path / "all" / "first")
    (tmp_path / "all" / "head" / "shard-000000.safetensors").unlink()
    made_anew = tmp_path / "all" / "first" / "shard-000000.safetensors"
    before = made_anew.stat().st_mtime_ns
    unbraid.scan(network, names, IMAGES, tmp_path / "all", batch_size=4)
    assert made_anew.stat().st_mtime_ns == before
    assert files(tmp_path / "all" / "first") == kept
    assert_as_alone(network, tmp_path / "all", "head", tmp_path)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("*", ["first", "blocks.0", "blocks.1", "head"]),  # not "unused"
        (["head", "blocks.?", "blocks.1"], ["head", "blocks.0", "blocks.1"]),
        (["first"], ["first"]),
    ],
)
def test_a_pattern_stands_for_the_layers_that_fit_it(asked, names, network, tmp_path):
    assert list(unbraid.scan(network, asked, IMAGES, tmp_path / "all")) == names
    for name in names:
        assert unbraid.open_scan(tmp_path / "all" / name).layer.name == name


def test_a_layer_whose_name_is_no_folder_gets_one_inside(tmp_path):
    parts = {"/etc": nn.Flatten(), "../up": nn.Linear(75, N_CLASSES)}
    network = nn.Sequential()
    for key, part in parts.items():
        network._modules[key] = part
    images = SyntheticImages(4)
    images.images = images.images[:, :, :5, :5]
    (scan,) = unbraid.scan(network.double(), ["../up"], images, tmp_path / "all").values()
    assert scan.path.parent == tmp_path / "all"


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ([], UsageError, "No layer is named"),
        ("*.conv9", LayerError, "No layer that can be split fits '\\*.conv9'"),
        (["first", "norm"], LayerError, "'norm' \\(BatchNorm2d\\) cannot be split"),
        (["first", "second"], LayerError, "no layer 'second'"),
        (["first", "unused"], LayerError, "'unused' does not run"),
    ],
)
def test_layers_that_cannot_be_scanned_are_named(asked, error, message, network, tmp_path):
    with pytest.raises(error, match=message):
        unbraid.scan(network, asked, IMAGES, tmp_path / "all")
    assert not list((tmp_path).glob("**/shard-*"))


# --- split and apply ------------------------------------------------------------------------------


def splits_of(network: nn.Module, names: list[str], folder: Path) -> dict[str, unbraid.Split]:
    scans = unbraid.scan(network, names, IMAGES, folder)
    return {
        name: unbraid.split(scan, unbraid.find(scan, channels=CONCEPTS))
        for name, scan in scans.items()
    }


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("several") / "train"


@pytest.fixture(scope="module")
def splits(network, train) -> dict[str, unbraid.Split]:
    return splits_of(network, ["first", "blocks.0", "blocks.1"], train)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_stay_to_the_last_bit_with_several_layers_split(dtype, network, tmp_path):
    network = copy.deepcopy(network).to(dtype)
    images = copy.copy(IMAGES)
    images.images = IMAGES.images.to(dtype)
    scans = unbraid.scan(network, ["first", "blocks.*"], images, tmp_path / "train")
    splits = [unbraid.split(s, unbraid.find(s, channels=CONCEPTS)) for s in scans.values()]
    changed = unbraid.apply(network, splits)
    assert torch.equal(network(images.images), changed(images.images))
    assert [n for n, m in changed.named_modules() if n.endswith(".concepts")] == [
        "first.concepts",
        "blocks.0.concepts",
        "blocks.1.concepts",
    ]


def test_the_order_of_splits_does_not_matter_and_gradients_stay(network, splits):
    grads = []
    for model in (
        network,
        unbraid.apply(network, splits),
        unbraid.apply(network, list(splits.values())[::-1]),
    ):
        x = IMAGES.images.clone().requires_grad_()
        model(x)[:, 0].sum().backward()
        grads.append(x.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-10, atol=1e-12)


def test_the_plain_form_takes_several_layers(network, splits):
    plain = unbraid.apply(network, splits, form="plain")
    torch.testing.assert_close(plain(IMAGES.images), network(IMAGES.images), rtol=1e-10, atol=1e-12)
    assert "1.residual" in plain.blocks[1].names


def test_gates_of_several_layers_act_each_on_its_own(network, splits):
    changed = unbraid.apply(network, splits)
    before = changed(IMAGES.images)
    alone = {}
    for name in ("first", "blocks.1"):
        with changed.gate(name, 1, 0, 0.0):
            alone[name] = changed(IMAGES.images)
        only = unbraid.apply(network, splits[name])
        with only.gate(name, 1, 0, 0.0):
            assert torch.allclose(only(IMAGES.images), alone[name], rtol=1e-10)
        assert not torch.allclose(alone[name], before)
    with changed.gate("first", 1, 0, 0.0), changed.gate("blocks.1", 1, 0, 0.0):
        both = changed(IMAGES.images)
    assert not any(torch.allclose(both, one) for one in alone.values())
    assert torch.equal(changed(IMAGES.images), before)


def test_ablation_is_of_the_layer_named(network, splits):
    changed = unbraid.apply(network, splits)
    with pytest.raises(UsageError, match="Several layers are split; name one of 'first'"):
        unbraid.ablate(changed, IMAGES)
    with pytest.raises(UsageError, match="Layer 'head' is not split"):
        unbraid.ablate(changed, IMAGES, layer="head")
    with changed.gate("blocks.0", 1, 0, 0.0):  # moves do not count, in whatever layer
        found = unbraid.ablate(changed, IMAGES, layer="blocks.1")
    assert found == unbraid.ablate(unbraid.apply(network, splits["blocks.1"]), IMAGES)


def test_splits_that_do_not_fit_together_are_refused(network, splits, tmp_path):
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.head.weight.add_(1)
    strange = splits_of(other, ["first"], tmp_path / "other")
    for wrong in ([], [splits["first"], splits["first"]]):
        with pytest.raises(UsageError, match="one split or more, each of another layer"):
            unbraid.apply(network, wrong)
    with pytest.raises(ModelError, match="other weights"):
        unbraid.apply(network, {**splits, **strange})
    with pytest.raises(UsageError, match=r"has no concept channels; pass one"):
        unbraid.gate(network, "first", 1, 0, 0.0)


# --- circuits -------------------------------------------------------------------------------------


def source_relevances(
    network: Deep, before: unbraid.Split, row: Tensor, target: nn.Module, classes: tuple[int, ...]
) -> dict[str, float]:
    """Gradient x activation of every source, image by image, on concept channels built by hand.

    The earlier layer is rebuilt of one variable for each source, added up to what it puts out.
    """
    total: dict[str, float] = {}
    chosen = [n for n, label in enumerate(IMAGES.targets) if label in classes]
    for n in chosen:
        x = IMAGES.images[n : n + 1]
        z = network.first(x).detach()
        sources = {str(o): z[:, o].clone() for o in range(z.shape[1])}
        for part in before.channels:
            del sources[str(part.channel)]
            for k, weight in enumerate(part.rows):
                kernel = weight.reshape(1, 3, 3, 3)
                bias = torch.tensor([part.bias], dtype=z.dtype)
                made = nn.functional.conv2d(x, kernel, bias, padding=1)[:, 0]
                sources[f"{part.channel}.{k}"] = made
            own = sum(sources[f"{part.channel}.{k}"] for k in range(len(part.concepts)))
            sources[f"{part.channel}.residual"] = own - z[:, part.channel]
        for value in sources.values():
            value.requires_grad_()
        columns = []
        for o in range(z.shape[1]):
            parts = [v for name, v in sources.items() if name.split(".")[0] == str(o)]
            minus = sources.get(f"{o}.residual")
            columns.append(
                sum(p for p in parts if p is not minus) - (0 if minus is None else minus)
            )
        hidden = network.norm(torch.stack(columns, 1)).relu()
        response = nn.functional.conv2d(hidden, row.reshape(1, 6, 3, 3), padding=1).sum()
        grads = torch.autograd.grad(response, list(sources.values()))
        for (name, value), grad in zip(sources.items(), grads, strict=True):
            total[name] = total.get(name, 0.0) + float((value * grad).sum().detach()) / len(chosen)
    return total


def assert_circuit(
    found: Circuit, network: Deep, splits: dict[str, unbraid.Split], channel: int, concept: int
) -> None:
    part = splits["blocks.1"][channel]
    classes = part.concepts[concept]
    arguments = (network.blocks[1], classes)
    own = source_relevances(network, splits["first"], part.rows[concept], *arguments)
    whole = source_relevances(network, splits["first"], part.weight, *arguments)
    positive = sum(a for a in own.values() if a > 0)
    order = sorted(own, key=lambda name: -abs(own[name]))
    assert [source.name for source in found.sources] == order[: len(found.sources)]
    for source in found.sources:
        assert_close(source.relevance, own[source.name])
        assert_close(source.share, own[source.name] / positive)
        assert_close(source.kept, own[source.name] / whole[source.name])


@pytest.mark.parametrize("batch_size", [2, 64])
def test_concept_channels_are_sources_of_the_next_layers_concepts(
    batch_size, network, splits, train
):
    scan = unbraid.open_scan(train / "blocks.1")
    for channel, concepts in CONCEPTS.items():
        for concept in range(len(concepts)):
            found = unbraid.circuit_from(
                splits["first"],
                splits["blocks.1"],
                scan,
                network,
                IMAGES,
                channel,
                concept,
                n=100,
                batch_size=batch_size,
            )
            assert {source.name for source in found.sources} == {
                *("0", "2", "4", "5", "1.0", "1.1", "1.residual"),
                *("3.0", "3.1", "3.2", "3.residual"),
            }
            assert_circuit(found, network, splits, channel, concept)


def test_a_wrong_source_is_told(network, splits, train):
    scan = unbraid.open_scan(train / "blocks.1")
    arguments = (splits["first"], splits["blocks.1"], scan, network, IMAGES, 1, 0)
    found = unbraid.circuit_from(*arguments)
    wrong = replace(found.sources[0], relevance=found.sources[0].relevance * 1.01)
    with pytest.raises(AssertionError):
        assert_circuit(replace(found, sources=(wrong, *found.sources[1:])), network, splits, 1, 0)


def test_what_no_circuit_leads_through_is_refused(network, splits, train):
    scan, other = (unbraid.open_scan(train / name) for name in ("blocks.1", "blocks.0"))
    first, later, aside = splits["first"], splits["blocks.1"], splits["blocks.0"]
    changed = unbraid.apply(network, first)
    for error, told, arguments in (
        (LayerError, "does not feed layer 'blocks", (aside, later, scan, network, IMAGES, 0)),
        (UsageError, "not the one that", (first, later, scan, network, SyntheticImages(7), 0)),
        (UsageError, "no concept 5 of channel 1", (first, later, scan, network, IMAGES, 5)),
        (UsageError, "another network or layer", (first, later, other, network, IMAGES, 0)),
        (ModelError, "before they are applied", (first, later, scan, changed, IMAGES, 0)),
    ):
        *rest, concept = arguments
        with pytest.raises(error, match=told):
            unbraid.circuit_from(*rest, 1, concept)


# --- names, windows, outputs ----------------------------------------------------------------------


def test_a_pattern_is_tried_on_an_image_that_can_be_read(network, tmp_path):
    class Broken(SyntheticImages):
        def __getitem__(self, index):
            if index == 0:
                raise OSError("broken")
            return super().__getitem__(index)

    scans = unbraid.scan(network, "blocks.*", Broken(6), tmp_path / "all", skip_broken=True)
    assert list(scans) == ["blocks.0", "blocks.1"]


def test_a_name_with_brackets_is_a_name(tmp_path):
    network = nn.Sequential()
    network.add_module("conv[0]", nn.Conv2d(3, 4, 1))
    network.add_module("rest", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    scan = unbraid.scan(network.double(), "conv[0]", SyntheticImages(4), tmp_path)
    assert scan.layer.name == "conv[0]"


def test_wrapped_networks_take_patterns_and_names_with_and_without_the_prefix(
    network, splits, tmp_path
):
    wrapped = nn.DataParallel(network)
    assert list(unbraid.scan(wrapped, "module.blocks.*", IMAGES, tmp_path / "a")) == [
        "blocks.0",
        "blocks.1",
    ]
    changed = unbraid.apply(network, splits)
    for name in ("first", "module.first"):
        with unbraid.gate(nn.DataParallel(changed), name, 1, 0, 0.0):
            assert not torch.equal(changed(IMAGES.images), network(IMAGES.images))


def test_a_module_goes_by_any_of_its_names(tmp_path):
    network = structures.Around().double().eval()
    network.again = network.layer
    scan = unbraid.scan(network, "again", IMAGES, tmp_path)
    assert scan.layer.name == "layer"
    changed = unbraid.apply(network, unbraid.split(scan, unbraid.find(scan, channels=CONCEPTS)))
    with changed.gate("again", 1, 0, 0.0):
        assert not torch.equal(changed(IMAGES.images), network(IMAGES.images))


def test_a_gate_takes_a_value_for_each_window_of_an_image(tmp_path):
    network = structures.build("windows")
    images = structures.images()
    scan = unbraid.scan(network, "layer", images, tmp_path)
    changed = unbraid.apply(network, unbraid.split(scan, unbraid.find(scan, channels=CONCEPTS)))
    whole = network(images.images)
    values = torch.ones(len(images), dtype=whole.dtype)
    values[3] = 0
    n_windows = 6  # of an image
    with changed.gate("layer", 1, 0, values.repeat_interleave(n_windows)):
        some = changed(images.images)
    with changed.gate("layer", 1, 0, 0.0):
        none = changed(images.images)
    others = [n for n in range(len(images)) if n != 3]
    torch.testing.assert_close(some[others], whole[others])
    torch.testing.assert_close(some[3], none[3])
    assert not torch.allclose(some[3], whole[3])
    wrong = pytest.raises(UsageError, match="8 images and the layer runs on 48, windows")
    with changed.gate("layer", 1, 0, values), wrong:
        changed(images.images)
