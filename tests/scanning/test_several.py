"""Several layers at once: one pass, each with the records of a scan of its own; one network."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import structures
import unbraid
from checks import assert_bit_equal, assert_close, assert_same_files
from tiny_networks import N_CLASSES, CountingNetwork, SyntheticImages, WithBroken
from unbraid.base.errors import LayerError, ModelError, UsageError

IMAGES = SyntheticImages(11, seed=5)
CONCEPTS = {1: [[0], [1]], 3: [[0], [1], [2]]}


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(6, N_CLASSES)
        self.unused = nn.Linear(6, 2)

    def forward(self, x):
        x = self.norm(self.first(x)).relu_()
        x = (self.blocks[0](x) + self.blocks[1](x)).relu_()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    network = Deep().double().eval()
    network.norm.running_mean.uniform_(-0.3, 0.3)
    network.norm.running_var.uniform_(0.5, 2)
    return network


def test_one_pass_keeps_of_every_layer_what_a_pass_of_its_own_keeps(network, tmp_path):
    counting = CountingNetwork(network)
    names = [f"network.{name}" for name in ("blocks.1", "first", "head", "blocks.0")]
    asked = [names[0], network.first, *names[2:]]
    scans = unbraid.scan(counting, asked, IMAGES, tmp_path / "all", batch_size=4)
    assert (counting.n_images, list(scans)) == (len(IMAGES), names)
    kept = scans["network.first"].path / "shard-000000.safetensors"
    before = kept.stat().st_mtime_ns
    (scans["network.head"].path / kept.name).unlink()  # only what a layer lacks is scanned again
    unbraid.scan(counting, asked, IMAGES, tmp_path / "all", batch_size=4)
    assert kept.stat().st_mtime_ns == before
    for name, scan in scans.items():
        assert scan.layer.name == name
        unbraid.scan(counting, name, IMAGES, tmp_path / name, batch_size=4)
        assert_same_files(scan.path, tmp_path / name)


@pytest.mark.parametrize("kind", structures.STRUCTURES)
def test_every_structure_can_be_scanned_layer_beside_layer(kind, tmp_path):
    network, images = structures.build(kind), structures.images()
    scans = unbraid.scan(network, "*", images, tmp_path / "all")
    assert len(scans) > 1
    for name, scan in scans.items():
        unbraid.scan(network, name, images, tmp_path / name)
        assert_same_files(scan.path, tmp_path / name)


def test_a_pattern_stands_for_the_layers_that_fit_it(network, tmp_path):
    images = WithBroken(6)
    images.broken = (0,)  # another one tells what fits
    for asked, names in (
        ("*", ["first", "blocks.0", "blocks.1", "head"]),  # not "unused"
        (["head", "blocks.?", "blocks.1"], ["head", "blocks.0", "blocks.1"]),
        (["first"], ["first"]),
    ):
        assert list(unbraid.scan(network, asked, images, tmp_path, skip_broken=True)) == names
        assert [unbraid.open_scan(tmp_path / name).layer.name for name in names] == names


def test_a_name_with_brackets_or_dots_is_a_name_and_has_a_folder_inside(tmp_path):
    network = nn.Sequential()
    for name, part in {"conv[0]": nn.Conv2d(3, 4, 1), "/etc": nn.Flatten()}.items():
        network._modules[name] = part
    network._modules["../up"] = nn.Linear(4 * 42, N_CLASSES)
    asked, images = ["conv[0]", "../up"], SyntheticImages(4)
    for name, scan in unbraid.scan(network.double(), asked, images, tmp_path).items():
        assert (scan.layer.name, scan.path.parent) == (name, tmp_path)


def test_layers_that_cannot_be_scanned_are_named(network, tmp_path):
    for asked, error, message in (
        ([], UsageError, "No layer is named"),
        ("*.conv9", LayerError, r"No layer that can be split fits '\*.conv9'"),
        (["first", "second"], LayerError, "no layer 'second'"),
        (["first", "unused"], LayerError, "'unused' does not run"),
        (["first", "norm"], LayerError, r"'norm' \(BatchNorm2d\) cannot be split"),
    ):
        with pytest.raises(error, match=message):
            unbraid.scan(network, asked, IMAGES, tmp_path)
    assert not list(tmp_path.glob("**/shard-*"))


def split(scan):
    return unbraid.split(scan, unbraid.find(scan, channels=CONCEPTS))


@pytest.fixture(scope="module")
def scans(network, tmp_path_factory):
    return unbraid.scan(network, ["first", "blocks.*"], IMAGES, tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def splits(scans):
    return {name: split(scan) for name, scan in scans.items()}


def test_outputs_and_gradients_stay_with_several_layers_split(network, splits):
    changed = unbraid.apply(network, splits)
    assert_bit_equal(changed(IMAGES.images), network(IMAGES.images))
    plain = unbraid.apply(network, splits, form="plain")
    results = []
    for model in (network, changed, unbraid.apply(network, list(splits.values())[::-1]), plain):
        x = IMAGES.images.clone().requires_grad_()
        outputs = model(x)
        outputs[:, 0].sum().backward()
        results.append(torch.cat([outputs.flatten(), x.grad.flatten()]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-12)


def test_outputs_stay_to_the_last_bit_in_single_precision(network, tmp_path):
    single, images = copy.deepcopy(network).float(), copy.copy(IMAGES)
    images.images = IMAGES.images.float()
    scans = unbraid.scan(single, ["first", "blocks.*"], images, tmp_path)
    changed = unbraid.apply(single, [split(scan) for scan in scans.values()])
    assert_bit_equal(changed(images.images), single(images.images))


def test_gates_and_ablation_act_each_on_the_layer_named(network, splits):
    changed = unbraid.apply(network, splits)
    before, alone = changed(IMAGES.images), {}
    for name in ("first", "blocks.1"):
        only = unbraid.apply(network, splits[name])
        with changed.gate(name, 1, 0, 0.0), only.gate(name, 1, 0, 0.0):
            alone[name] = changed(IMAGES.images)
            assert torch.allclose(only(IMAGES.images), alone[name], rtol=1e-10)
        assert not torch.allclose(alone[name], before)
    with changed.gate("first", 1, 0, 0.0), changed.gate("blocks.1", 1, 0, 0.0):
        both = changed(IMAGES.images)
    assert not any(torch.allclose(both, one) for one in alone.values())
    assert torch.equal(changed(IMAGES.images), before)
    with changed.gate("blocks.0", 1, 0, 0.0):  # moves do not count, in whatever layer
        found = unbraid.ablate(changed, IMAGES, layer="blocks.1")
    assert found == unbraid.ablate(unbraid.apply(network, splits["blocks.1"]), IMAGES)
    with pytest.raises(UsageError, match="name one of 'first'"):
        unbraid.ablate(changed, IMAGES)
    for wrong in ([], [splits["first"], splits["first"]]):
        with pytest.raises(UsageError, match="one split or more, each of another layer"):
            unbraid.apply(network, wrong)


def test_a_gate_takes_a_value_for_each_window_of_an_image(tmp_path):
    network, images = structures.build("windows"), structures.images()
    changed = unbraid.apply(network, split(unbraid.scan(network, "layer", images, tmp_path)))
    expected, values = network(images.images), torch.ones(len(images)).double()
    values[3] = 0
    with changed.gate("layer", 1, 0, 0.0):
        without = changed(images.images)
    assert not torch.allclose(without[3], expected[3])
    expected[3] = without[3]
    with changed.gate("layer", 1, 0, values.repeat_interleave(6)):  # windows of an image
        torch.testing.assert_close(changed(images.images), expected)
    wrong = pytest.raises(UsageError, match="8 images and the layer runs on 48, windows")
    with changed.gate("layer", 1, 0, values), wrong:
        changed(images.images)


def source_relevances(network, before, row, classes):
    """Gradient x activation of every source: the parts of a channel share its gradient."""
    x = IMAGES.images[[label in classes for label in IMAGES.targets]]
    z = network.first(x).detach().requires_grad_()
    hidden = network.norm(z).relu()
    response = nn.functional.conv2d(hidden, row.reshape(1, 6, 3, 3), padding=1).sum()
    z, (gradient,) = z.detach(), torch.autograd.grad(response, z)
    parts = {str(o): (o, z[:, o]) for o in range(6)}
    for channel in before.channels:
        o, kernels = channel.channel, channel.rows.reshape(-1, 3, 3, 3)
        bias = torch.full([len(kernels)], channel.bias, dtype=z.dtype)
        own = nn.functional.conv2d(x, kernels, bias, padding=1)
        parts |= {f"{o}.{k}": (o, own[:, k]) for k in range(len(kernels))}
        parts[f"{o}.residual"] = (o, z[:, o] - own.sum(1))
        del parts[str(o)]
    return {name: float((gradient[:, o] * z).sum()) / len(x) for name, (o, z) in parts.items()}


def assert_circuit(found, network, splits, channel, concept):
    part = splits["blocks.1"][channel]
    own, whole = (
        source_relevances(network, splits["first"], row, part.concepts[concept])
        for row in (part.rows[concept], part.weight)
    )
    positive = sum(a for a in own.values() if a > 0)
    assert [source.name for source in found.sources] == sorted(own, key=lambda n: -abs(own[n]))
    for source in found.sources:
        assert_close(source.relevance, own[source.name])
        assert_close(source.share, own[source.name] / positive)
        assert_close(source.kept, own[source.name] / whole[source.name])


@pytest.mark.parametrize("batch_size", [2, 64])
def test_concept_channels_are_sources_in_the_next_layer(batch_size, network, splits, scans):
    arguments = (splits["first"], splits["blocks.1"], scans["blocks.1"], network, IMAGES)
    for channel, concepts in CONCEPTS.items():
        for concept in range(len(concepts)):
            options = {"n": 100, "batch_size": batch_size}
            found = unbraid.circuit_from(*arguments, channel, concept, **options)
            assert_circuit(found, network, splits, channel, concept)
    names = "0 2 4 5 1.0 1.1 1.residual 3.0 3.1 3.2 3.residual"
    assert {source.name for source in found.sources} == set(names.split())
    first, *others = found.sources
    wrong = replace(first, relevance=first.relevance * 1.01)
    with pytest.raises(AssertionError):
        assert_circuit(replace(found, sources=(wrong, *others)), network, splits, channel, concept)


def test_what_no_circuit_leads_through_is_refused(network, splits, scans):
    first, later = splits["first"], splits["blocks.1"]
    usual = {"before": first, "split": later, "scan": scans["blocks.1"], "model": network}
    usual |= {"dataset": IMAGES, "channel": 1, "concept": 0}
    for error, told, changed in (
        (LayerError, "does not feed layer 'blocks", {"before": splits["blocks.0"]}),
        (UsageError, "not the one that", {"dataset": SyntheticImages(7)}),
        (UsageError, "no concept 5 of channel 1", {"concept": 5}),
        (UsageError, "another network or layer", {"scan": scans["blocks.0"]}),
        (ModelError, "before they are applied", {"model": unbraid.apply(network, first)}),
    ):
        with pytest.raises(error, match=told):
            unbraid.circuit_from(**{**usual, **changed})


def test_all_layers_of_a_network_that_is_one_layer_says_to_wrap_it(tmp_path):
    images = torch.utils.data.TensorDataset(torch.randn(4, 6), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(LayerError, match=r"is a single layer, .* wrap it: torch\.nn\.Sequential"):
        unbraid.scan(nn.Linear(6, 3), "all", images, tmp_path)
