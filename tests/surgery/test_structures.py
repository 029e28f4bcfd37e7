"""Layers built in in every way: records, equal outputs, gates; networks in wrappers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import unbraid
from checks import (
    assert_bit_equal,
    assert_close,
    assert_same_input_gradients,
    assert_untouched,
    snapshot,
)
from structures import STRUCTURES, Around, Tokens, build, images, trace
from tiny_networks import SyntheticImages
from unbraid.base.errors import LayerError, ModelError, RunError
from unbraid.networks.layers import describe, splittable_layers, why_not
from unbraid.networks.spec import tap_inputs
from unbraid.networks.weights import hash_weights
from unbraid.scanning.records import Records
from unbraid.scanning.scan import usable_layers

CONCEPTS = {1: [[0], [1], [2, 3]], 4: [[0, 1], [3]]}


def split_network(network: nn.Module, folder: Any, **settings: Any) -> unbraid.Split:
    scan = unbraid.scan(network, "layer", images(), folder, batch_size=3, **settings)
    split = unbraid.split(scan, unbraid.find(scan, channels=CONCEPTS))
    generator = torch.Generator().manual_seed(3)
    parts = [
        replace(part, masks=torch.rand(part.masks.shape, generator=generator).double())
        for part in split.channels
    ]
    return replace(split, channels=tuple(parts))


def assert_traced(records: Records, kind: str, min_share: float) -> None:
    """Every record is what a run on that image alone says, with nothing cut."""
    dataset = images()
    assert records.index.tolist() == list(range(len(dataset)))
    for n, (image, label) in enumerate(dataset):
        truth = trace(kind, image, label)
        assert_close(records.pooled[n], truth.pooled)
        assert records.n_positions[n] == truth.n_positions
        shares = oracle.shares(truth.relevance)
        for o, share in enumerate(shares.tolist()):
            expected = share if share >= min_share else 0.0
            assert_close(records.share_of(o)[n], expected)


@pytest.fixture(scope="module")
def split_of(tmp_path_factory) -> Any:
    """A split of each structure, made once."""
    return cache(lambda kind: split_network(build(kind), tmp_path_factory.mktemp("scan")))


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_records_hold_what_a_run_on_each_image_alone_says(kind, batch_size, tmp_path):
    network = build(kind)
    before = snapshot(network)
    scan = unbraid.scan(network, "layer", images(), tmp_path, batch_size=batch_size)
    assert_untouched(before, snapshot(network))
    (records,) = scan.shards()
    assert_traced(records, kind, scan.manifest.min_share)
    if batch_size == 3 and kind == "runs again":  # that a wrong record is noticed
        for damage in ("pooled", "n_positions", "share_value", "index"):
            (wrong,) = scan.shards()
            getattr(wrong, damage).view(-1)[3] += 1
            with pytest.raises(AssertionError):
                assert_traced(wrong, kind, scan.manifest.min_share)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_apply_keeps_outputs_and_gradients_in_every_structure(kind, split_of):
    network, x, split = build(kind), images().images, split_of(kind)
    assert "layer" in [spec.name for spec in usable_layers(network, x[:2])]
    changed = unbraid.apply(network, split)
    with torch.no_grad():
        assert_bit_equal(changed(x), network(x))
    if STRUCTURES[kind].differentiable:
        assert_same_input_gradients(network, changed, x)
    with changed.gate("layer", 1, 0, 0.0):
        assert not torch.equal(changed(x), network(x))
    assert_close(unbraid.apply(network, split, form="plain")(x), network(x), 1e-10)
    if STRUCTURES[kind].weight is not None:  # computed, which copies and state dicts survive
        assert why_not(network.layer) is None
        again = unbraid.apply(network, split)
        again.load_state_dict(changed.state_dict())
        assert_bit_equal(again(x), network(x))
        with torch.no_grad():
            next(network.layer.parameters()).view(-1)[0] += 0.1
        with pytest.raises((ModelError, RunError)):
            unbraid.apply(network, split)


class AddsCodes(Around):
    """Adds codes of positions, computed by a layer of their own from positions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Linear(2, 6)

    def body(self, x: Tensor) -> Tensor:
        places = torch.cartesian_prod(torch.arange(7.0), torch.arange(6.0)).to(x)
        return self.layer(x + self.codes(input=places).T.reshape(6, 7, 6)).relu_()


@pytest.mark.parametrize("n_images", [1, 2])
def test_a_layer_that_sees_no_image_is_not_listed(n_images):
    network = AddsCodes().double().eval()
    for x in (images(n_images).images, torch.zeros(n_images, 3, 7, 6)):
        assert [spec.name for spec in usable_layers(network, x)] == ["stem", "layer", "head"]


# --- several runs, parts of images ----------------------------------------------------------------


@pytest.mark.parametrize("kind", STRUCTURES)
def test_input_maps_are_kept_where_there_is_one(kind, tmp_path):
    network = build(kind)
    if not STRUCTURES[kind].once:
        with pytest.raises(LayerError, match="more than once on each image"):
            unbraid.scan(network, "layer", images(), tmp_path, positions=True)
        return
    scan = unbraid.scan(network, "layer", images(), tmp_path, batch_size=3, positions=True)
    (records,) = scan.shards()
    seen = torch.einsum("njp->nj", tap_inputs(scan.layer, records.input_map, 0))
    assert_close(seen, records.pooled[:, scan.layer.group_of(2)])


class Mixes(Around):
    """Lays halves of images into the batch, first all left ones and then all right ones."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.layer(torch.cat(self.stem(x).chunk(2, 3))).relu().chunk(2)
        return self.head((left + 2 * right).flatten(2).mean(2))


def test_images_that_lie_mixed_in_the_batch_are_refused(tmp_path):
    with pytest.raises(LayerError, match=r"\(8, 6, 7, 3\) for 4 images.*use batch_size=1"):
        unbraid.scan(Mixes().double(), "layer", images(4), tmp_path)
    scan = unbraid.scan(Mixes().double(), "layer", images(4), tmp_path, batch_size=1)
    assert next(scan.shards()).n_positions.tolist() == [42] * 4


def test_tokens_that_come_before_images_are_refused(tmp_path):
    network = Tokens(lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)).double().eval()
    with pytest.raises(LayerError, match=r"\(42, 4, 10\) for 4 images"):
        unbraid.scan(network, "layer", images(4), tmp_path)


# --- layers that compute their weights ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["spectral norm", "old spectral norm"])
def test_describing_a_layer_in_training_mode_changes_nothing(kind):
    network = build(kind).train()
    before = snapshot(network)
    assert describe("layer", network.layer).n_taps == 54
    assert_untouched(before, snapshot(network))


class KeepsComputed(Around):
    """Keeps what it computed from its weights, as some attention keeps its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[Tensor]] = {}

    def body(self, x: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = [2 * self.stem.bias[:, None, None]]
        return super().body(x + self.kept["bias"][0])


def test_a_network_that_keeps_what_it_computed_is_split(tmp_path):
    network, x = KeepsComputed().double().eval(), images().images
    split = split_network(network, tmp_path)
    network.kept.clear()
    expected = network(x)  # in a graph, which is kept
    changed = unbraid.apply(network, split)
    assert_bit_equal(changed(x), expected)
    changed.kept["bias"][0].data.zero_()
    assert_bit_equal(network(x), expected)  # nothing is shared


class Scales(nn.Conv2d):
    """Scales its output."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Twice(nn.Linear):
    """Is no single product."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.square())


class Needs(nn.Linear):
    """Needs a second argument."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class DependsOnInput(nn.Conv2d):
    """Has other weights for every input."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * x.mean(), self.bias)


def with_own_forward() -> nn.Module:
    module = nn.Linear(6, 8)
    module.forward = lambda x: 3 * nn.Linear.forward(module, x)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Scales(6, 8, 3), "does not compute what weights of its own say"),
        (Twice(6, 8), "runs 2 convolutions"),
        (Needs(6, 8), "cannot be run by itself"),
        (DependsOnInput(6, 8, 3), "does not compute what weights of its own say"),
        (nn.MultiheadAttention(4, 2).out_proj, "without running it"),
        (with_own_forward(), "does not compute"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_that_is_more_than_its_weights_is_refused(module, reason):
    assert reason in why_not(module)
    assert splittable_layers(nn.Sequential(module)) == []
    with pytest.raises(LayerError, match="cannot be split"):
        describe("it", module)


class Counts(nn.Conv2d):
    """Keeps how often it ran, as quantisation's observers do."""

    def __init__(self) -> None:
        super().__init__(6, 8, 3)
        self.register_buffer("n_runs", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.n_runs = torch.cat([self.n_runs, torch.ones(1)])
        return super().forward(x)


def test_looking_into_a_layer_leaves_no_trace_in_it():
    layer = Counts()
    layer.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    before = snapshot(layer)
    assert describe("layer", layer).padding == ((0, 0), (0, 0))
    assert_untouched(before, snapshot(layer))


def test_a_network_in_another_memory_format_gives_the_same_records(tmp_path):
    for name, memory_format in (("1", torch.contiguous_format), ("2", torch.channels_last)):
        network = build("plain").to(memory_format=memory_format)
        unbraid.scan(network, "layer", images(), tmp_path / name)
    one, other = (next(unbraid.open_scan(tmp_path / name).shards()) for name in ("1", "2"))
    assert_close(one.pooled, other.pooled)
    assert_close(one.share_value, other.share_value)


# --- what a network puts out ----------------------------------------------------------------------


@dataclass
class Output:
    """As other libraries put out what they computed."""

    logits: Tensor
    features: Tensor


class PutsOut(Around):
    def __init__(self, wrap: Any, n_logits: int = 4) -> None:
        super().__init__(n_logits=n_logits)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


def putting_out(wrap: Any, n_logits: int = 4) -> nn.Module:
    torch.manual_seed(5)
    return PutsOut(wrap, n_logits).double().eval()


PARTS = {
    "key": (lambda z: {"scores": z, "other": -z}, "scores"),
    "index": (lambda z: (-z, z), 1),
    "attribute": (lambda z: Output(z, -z), "logits"),
    "function": (lambda z: [[-z], [z]], lambda output: output[1][0]),
}


@pytest.mark.parametrize("part", PARTS)
def test_logits_are_picked_out_the_same_everywhere(part, tmp_path):
    wrap, pick = PARTS[part]
    network, bare = putting_out(wrap), putting_out(lambda z: z)
    picked = unbraid.with_logits(network, pick)
    assert hash_weights(picked) == hash_weights(network)
    assert [name for name, _ in picked.named_modules()] == [n for n, _ in network.named_modules()]
    scan = unbraid.scan(picked, "layer", images(), tmp_path / "picked")
    plain = unbraid.scan(bare, "layer", images(), tmp_path / "plain")
    for one, other in zip(scan.columns("share_value"), plain.columns("share_value"), strict=True):
        assert_bit_equal(one, other)
    split = split_network(bare, tmp_path / "split")
    changed = unbraid.apply(picked, split)
    assert unbraid.compare_outputs(picked, changed, images(), tolerance=0.0).top1_agreement == 1
    assert unbraid.ablate(changed, images()) == unbraid.ablate(unbraid.apply(bare, split), images())
    assert not isinstance(network(images().images), Tensor)  # the given one is as it was


def test_a_scan_with_other_logits_is_another_scan(tmp_path):
    network = putting_out(lambda z: (z, -z))
    unbraid.scan(unbraid.with_logits(network, 0), "layer", images(4), tmp_path)
    with pytest.raises(RunError, match="which part of the output is the logits"):
        unbraid.scan(unbraid.with_logits(network, 1), "layer", images(4), tmp_path)


@pytest.mark.parametrize("flat", [True, False])
def test_a_single_logit_tells_two_classes_apart(flat, tmp_path):
    network = putting_out(lambda z: z[:, 0] if flat else z, n_logits=1)
    dataset = SyntheticImages(8, n_classes=2)
    scan = unbraid.scan(network, "layer", dataset, tmp_path)
    (records,) = scan.shards()
    for n, (image, label) in enumerate(dataset):
        z = network(image[None]).flatten()[0]
        assert records.prediction[n] == int(z > 0)
        bare = nn.Sequential(network, nn.Flatten(0), nn.Unflatten(0, (1, 1)))
        relevance = oracle.relevance(bare, "0.layer", image, 0) * (1 if label == 1 else -1)
        expected = oracle.shares(relevance)
        for o, share in enumerate(expected.tolist()):
            assert_close(records.share_of(o)[n], share if share >= 0.005 else 0.0)


def test_rows_of_logits_that_are_not_one_an_image_are_refused(tmp_path):
    with pytest.raises(ModelError, match="2 rows of logits for 1 images"):
        unbraid.scan(putting_out(lambda z: torch.cat([z, z])), "layer", images(4), tmp_path)


# --- wrappers -------------------------------------------------------------------------------------


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "both": lambda n: nn.DataParallel(compiled(n)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_network_is_the_network(wrapper, tmp_path):
    network = build("plain")
    wrapped = WRAPPERS[wrapper](network)
    inside = next(name for name, module in wrapped.named_modules() if module is network.layer)
    for number, layer in enumerate(("layer", inside, network.layer)):
        scan = unbraid.scan(wrapped, layer, images(), tmp_path / str(number))
        assert scan.layer.name == "layer"
    split = split_network(network, tmp_path / "split")
    changed = unbraid.apply(wrapped, split)
    assert unbraid.compare_outputs(wrapped, changed, images(), tolerance=0.0).top1_agreement == 1
    assert [spec.name for spec in usable_layers(wrapped, images(1).images)] == [
        "stem",
        "layer",
        "head",
    ]


def test_a_network_with_a_compiled_part_is_scanned(tmp_path):
    network, bare = nn.Sequential(build("plain")), nn.Sequential(build("plain"))
    network[0] = compiled(network[0])
    network(images().images)  # compiled now, without hooks
    scan = unbraid.scan(network, "0._orig_mod.layer", images(), tmp_path / "compiled")
    plain = unbraid.scan(bare, "0.layer", images(), tmp_path / "plain")
    assert scan.manifest.weights == plain.manifest.weights
    for one, other in zip(scan.columns("share_value"), plain.columns("share_value"), strict=True):
        assert_bit_equal(one, other)
