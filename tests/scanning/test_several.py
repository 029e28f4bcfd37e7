"""Several layers at once: one pass, each with the records of a scan of its own; one network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import structures
import unbraid
from checks import assert_bit_equal, assert_close, assert_same_files
from tiny_networks import N_CLASSES, CountingNetwork, SyntheticImages, WithBroken
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


def test_one_pass_keeps_of_every_layer_what_a_pass_of_its_own_keeps(network, tmp_path):
    counting = CountingNetwork(network)
    names = [f"network.{name}" for name in ("blocks.1", "first", "head", "blocks.0")]
    asked = [names[0], network.first, *names[2:]]
    scans = unbraid.scan(counting, asked, IMAGES, tmp_path / "all", batch_size=4)
    assert counting.n_images == len(IMAGES)
    assert list(scans) == names
    kept = scans["network.first"].path / "shard-000000.safetensors"
    before = kept.stat().st_mtime_ns
    (scans["network.head"].path / kept.name).unlink()  # only what a layer lacks is scanned again
    unbraid.scan(counting, asked, IMAGES, tmp_path / "all", batch_size=4)
    assert kept.stat().st_mtime_ns == before
    for name, scan in scans.items():
        assert scan.layer.name == name
        unbraid.scan(counting, name, IMAGES, tmp_path / name, batch_size=4)
        assert_same_files(scan.path, tmp_path / name)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    with pytest.raises(AssertionError):
        assert_same_files(kept.parent, tmp_path / "network.first")


@pytest.mark.parametrize("kind", ["in place", "runs again", "windows", "checkpointed, reentrant"])
def test_every_structure_can_be_scanned_layer_beside_layer(kind, tmp_path):
    network, images = structures.build(kind), structures.images()
    names = [spec.name for spec in usable_layers(network, images.images[:1])]
    assert len(names) > 1
    for name, scan in unbraid.scan(network, names, images, tmp_path / "all").items():
        unbraid.scan(network, name, images, tmp_path / name)
        assert_same_files(scan.path, tmp_path / name)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("*", ["first", "blocks.0", "blocks.1", "head"]),  # not "unused"
        (["head", "blocks.?", "blocks.1"], ["head", "blocks.0", "blocks.1"]),
        (["first"], ["first"]),
    ],
)
def test_a_pattern_stands_for_the_layers_that_fit_it(asked, names, network, tmp_path):
    images = WithBroken(6)
    images.broken = (0,)  # another one tells what fits
    scans = unbraid.scan(network, asked, images, tmp_path, skip_broken=True)
    assert list(scans) == names
    assert [unbraid.open_scan(tmp_path / name).layer.name for name in names] == names


def test_a_name_with_brackets_or_dots_is_a_name_and_has_a_folder_inside(tmp_path):
    network = nn.Sequential()
    for name, part in {"conv[0]": nn.Conv2d(3, 4, 1), "/etc": nn.Flatten()}.items():
        network._modules[name] = part
    network._modules["../up"] = nn.Linear(4 * 42, N_CLASSES)
    scan = unbraid.scan(network.double(), "conv[0]", SyntheticImages(4), tmp_path / "one")
    assert scan.layer.name == "conv[0]"
    (scan,) = unbraid.scan(network, ["../up"], SyntheticImages(4), tmp_path / "all").values()
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
        unbraid.scan(network, asked, IMAGES, tmp_path)
    assert not list(tmp_path.glob("**/shard-*"))


def split(scan: unbraid.Scan) -> unbraid.Split:
    return unbraid.split(scan, unbraid.find(scan, channels=CONCEPTS))


@pytest.fixture(scope="module")
def scans(network, tmp_path_factory) -> dict[str, unbraid.Scan]:
    folder = tmp_path_factory.mktemp("several")
    return unbraid.scan(network, ["first", "blocks.*"], IMAGES, folder)


@pytest.fixture(scope="module")
def splits(scans) -> dict[str, unbraid.Split]:
    return {name: split(scan) for name, scan in scans.items()}


def test_outputs_and_gradients_stay_with_several_layers_split(network, splits):
    changed = unbraid.apply(network, splits)
    assert_bit_equal(changed(IMAGES.images), network(IMAGES.images))
    assert [n for n, m in changed.named_modules() if n.endswith(".concepts")] == [
        f"{name}.concepts" for name in splits
    ]
    plain = unbraid.apply(network, splits, form="plain")
    assert "1.residual" in plain.blocks[1].names
    results = []
    for model in (network, changed, unbraid.apply(network, list(splits.values())[::-1]), plain):
        x = IMAGES.images.clone().requires_grad_()
        outputs = model(x)
        outputs[:, 0].sum().backward()
        results.append(torch.cat([outputs.flatten(), x.grad.flatten()]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-12)


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
    expected, off = network(images.images), torch.arange(len(images)) == 3
    values = (~off).to(expected.dtype)
    with changed.gate("layer", 1, 0, 0.0):
        without = changed(images.images)
    assert not torch.allclose(without[off], expected[off])
    expected[off] = without[off]
    with changed.gate("layer", 1, 0, values.repeat_interleave(6)):  # windows of an image
        torch.testing.assert_close(changed(images.images), expected)
    wrong = pytest.raises(UsageError, match="8 images and the layer runs on 48, windows")
    with changed.gate("layer", 1, 0, values), wrong:
        changed(images.images)


def source_relevances(
    network: Deep, before: unbraid.Split, row: Tensor, classes: tuple[int, ...]
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
        columns = [torch.zeros_like(z[:, o]) for o in range(z.shape[1])]
        for name, value in sources.items():
            o = int(name.split(".")[0])
            columns[o] = columns[o] + (-value if name.endswith("residual") else value)
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
def test_concept_channels_are_sources_of_the_next_layers_concepts(
    batch_size, network, splits, scans
):
    options = {"n": 100, "batch_size": batch_size}
    arguments = (splits["first"], splits["blocks.1"], scans["blocks.1"], network, IMAGES)
    for channel, concepts in CONCEPTS.items():
        for concept in range(len(concepts)):
            found = unbraid.circuit_from(*arguments, channel, concept, **options)
            assert {source.name for source in found.sources} == {
                *("0", "2", "4", "5", "1.0", "1.1", "1.residual"),
                *("3.0", "3.1", "3.2", "3.residual"),
            }
            assert_circuit(found, network, splits, channel, concept)
    first, *others = found.sources
    wrong = replace(first, relevance=first.relevance * 1.01)
    with pytest.raises(AssertionError):
        assert_circuit(replace(found, sources=(wrong, *others)), network, splits, channel, concept)


def test_what_no_circuit_leads_through_is_refused(network, splits, scans):
    scan, other = scans["blocks.1"], scans["blocks.0"]
    first, later, aside = splits["first"], splits["blocks.1"], splits["blocks.0"]
    changed = unbraid.apply(network, first)
    for error, told, arguments in (
        (LayerError, "does not feed layer 'blocks", (aside, later, scan, network, IMAGES, 1, 0)),
        (UsageError, "not the one that", (first, later, scan, network, SyntheticImages(7), 1, 0)),
        (UsageError, "no concept 5 of channel 1", (first, later, scan, network, IMAGES, 1, 5)),
        (UsageError, "another network or layer", (first, later, other, network, IMAGES, 1, 0)),
        (ModelError, "before they are applied", (first, later, scan, changed, IMAGES, 1, 0)),
    ):
        with pytest.raises(error, match=told):
            unbraid.circuit_from(*arguments)
