"""Concept channels in a network: the same outputs to the last bit, gates, hooks, both forms."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
    assert_same_outputs,
    assert_same_split,
    assert_untouched,
    snapshot,
)
from tiny_networks import (
    KINDS,
    CallsByKeyword,
    OverwritesInput,
    PadsSame,
    SyntheticImages,
    WithBroken,
    build,
    layer_input,
)
from unbraid.base.errors import (
    DataError,
    ModelError,
    OutputChangedError,
    RunError,
    UsageError,
)
from unbraid.splitting.splits import ChannelSplit, Split
from unbraid.surgery.split_layer import Pad

TWO = {1: [[0], [1]], 0: [[2, 0], [3]], 3: [[3], [1, 2]]}  # two concepts each
THREE = {2: [[0], [1, 3], [2]], 0: [[3], [0]]}  # three in one channel, two in another


def make_split(
    network: nn.Module,
    folder: Path,
    channels: dict[int, Any] = TWO,
    layer: str | nn.Module = "layer",
) -> Split:
    """A split with masks of all sizes between 0 and 1, since outputs must not depend on them."""
    dtype = next(network.parameters()).dtype
    scan = unbraid.scan(network, layer, SyntheticImages(8, dtype=dtype), folder)
    found = unbraid.find(scan, channels=channels)
    split = unbraid.split(scan, found, method="published", rho=0.7)
    generator = torch.Generator().manual_seed(3)

    def some_masks(part: ChannelSplit) -> Tensor:
        random = torch.rand(part.masks.shape, generator=generator).to(dtype)
        return torch.where(random > 0.5, part.masks, random)

    return replace(
        split, channels=tuple(replace(part, masks=some_masks(part)) for part in split.channels)
    )


def images(n_images: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return SyntheticImages(n_images, seed=7, dtype=dtype).images


def layer_output(network: nn.Module, x: Tensor, layer: str = "layer") -> Tensor:
    """What leaves the layer, copied before the next module can write into it."""
    seen = []
    handle = network.get_submodule(layer).register_forward_hook(
        lambda _module, _args, output: seen.append(output.detach().clone())
    )
    network(x)
    handle.remove()
    return seen[0]


def dimension(layer: nn.Module) -> int:
    """Where the channels are in a layer's output."""
    return -1 if isinstance(layer, nn.Linear) else 1


class Splits:
    """Splits of the networks of every kind, each made once, since nothing changes a split."""

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self._make_folder = make_folder
        self._made: dict[Any, Split] = {}

    def __call__(
        self, kind: str, channels: dict[int, Any] = TWO, dtype: torch.dtype = torch.float64
    ) -> Split:
        key = (kind, str(channels), dtype)
        if key not in self._made:
            self._made[key] = make_split(build(kind, dtype), self._make_folder("scan"), channels)
        return self._made[key]


@pytest.fixture(scope="module")
def split_of(tmp_path_factory) -> Splits:
    return Splits(tmp_path_factory.mktemp)


class Pair:
    """A network, a split of it, and the network split."""

    def __init__(self, kind: str, split: Split) -> None:
        self.network, self.split = build(kind), split
        self.changed = unbraid.apply(self.network, split)


@pytest.fixture(params=KINDS)
def pair(request, split_of) -> Pair:
    return Pair(request.param, split_of(request.param))


@pytest.fixture
def one_pair(split_of) -> Pair:
    return Pair("3x3", split_of("3x3"))


# --- the same output ------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [TWO, THREE], ids=["two concepts", "three concepts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_apply_keeps_outputs_to_the_last_bit_and_the_split_its_file(
    kind, dtype, channels, split_of, tmp_path
):
    network, split = build(kind, dtype), split_of(kind, channels, dtype)
    changed = unbraid.apply(network, split)
    assert changed.layer.rows.dtype == dtype
    for n_images in (1, 6):
        assert_same_outputs(network, changed, images(n_images, dtype))
    split.save(tmp_path / "split.safetensors")
    assert_same_split(Split.load(tmp_path / "split.safetensors"), split)


def _in_training(network: nn.Module, changed: nn.Module) -> None:
    assert_bit_equal(changed.train()(images()), network.train()(images()))


def _in_inference(network: nn.Module, changed: nn.Module) -> None:
    with torch.inference_mode():
        assert_bit_equal(changed(images()), network(images()))


def _in_half(network: nn.Module, changed: nn.Module) -> None:
    assert_same_outputs(network, changed, images(4, torch.float16))


def _in_autocast(network: nn.Module, changed: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_outputs(network, changed, images(4, torch.float32))


def _in_memory_formats(network: nn.Module, changed: nn.Module) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images(5, torch.float32).contiguous(memory_format=memory_format)
        assert_same_outputs(network, changed, x)


@pytest.mark.parametrize(
    ("kind", "dtype", "check"),
    [
        ("batch norm behind", torch.float64, _in_training),
        ("3x3", torch.float64, _in_inference),
        ("1x1", torch.float16, _in_half),
        ("3x3", torch.float32, _in_autocast),
        ("3x3", torch.float32, _in_memory_formats),
    ],
)
def test_apply_keeps_outputs_in_every_mode(kind, dtype, check, split_of):
    network = build(kind, dtype)
    if check is _in_memory_formats:
        network = network.to(memory_format=torch.channels_last)
    check(network, unbraid.apply(network, split_of(kind, dtype=dtype)))


def test_apply_keeps_even_the_sign_of_a_zero(one_pair):
    zeros: list[Tensor] = []

    def minus_zero(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        zeros.append(torch.full_like(output, -0.0))
        return zeros[-1]

    one_pair.changed.layer.original.register_forward_hook(minus_zero)
    for graph in (torch.enable_grad, torch.no_grad):
        with graph():
            output = layer_output(one_pair.changed, images())
        assert_bit_equal(output, zeros[-1])


def test_apply_splits_every_channel_at_once(split_of):
    network = build("groups")
    channels = {o: [[0, 1], [2], [3]] for o in range(8)}
    changed = unbraid.apply(network, split_of("groups", channels))
    assert len(changed.layer.names) == 24
    assert_same_outputs(network, changed, images())
    assert_same_input_gradients(network, changed, images())


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "channels"), [*((kind, TWO) for kind in KINDS), ("groups", THREE)]
)
def test_apply_keeps_gradients_by_the_image(kind, channels, split_of):
    pair = Pair(kind, split_of(kind, channels))
    assert_same_input_gradients(pair.network, pair.changed, images())


def test_apply_gives_gradients_of_a_channels_weights_to_its_new_rows(pair):
    for network in (pair.network, pair.changed):
        network(images()).square().sum().backward()
    original, layer = pair.network.layer.weight.grad.flatten(1), pair.changed.layer
    for name, gradient in zip(layer.names, layer.rows.grad, strict=False):
        channel = int(name.split(".")[0])
        assert original[channel].abs().max() > 0
        assert_close(gradient, original[channel], 1e-10)
    for gradient, channel in zip(layer.rows.grad[len(layer.names) :], layer.channels, strict=True):
        assert_close(gradient, -original[channel], 1e-10)  # residuals are subtracted
    kept = layer.original.weight.grad.flatten(1)
    for o in range(len(kept)):
        expected = torch.zeros_like(kept[o]) if o in TWO else original[o]
        assert_close(kept[o], expected, 1e-10)
    after = dict(pair.changed.named_parameters())
    for name, parameter in pair.network.named_parameters():
        if not name.startswith("layer."):
            assert_close(after[name].grad, parameter.grad, 1e-10)


# --- gates ----------------------------------------------------------------------------------------


def concept_maps(pair: Pair, channel: int, concept: int, x: Tensor) -> Tensor:
    """z_k of every image by the oracle, (N, P)."""
    row = pair.split[channel].rows[concept]
    inputs = layer_input(pair.network, x)
    return torch.stack(
        [oracle.channel_map(pair.network.layer, channel, row, one) for one in inputs]
    )


@pytest.mark.parametrize("value", [0.0, 0.5, 3.0, -1.0])
def test_gate_scales_one_concept_channel_and_touches_no_other_channel(pair, value):
    x, dim = images(), dimension(pair.network.layer)
    before = layer_output(pair.network, x)
    for channel, concept in ((1, 0), (1, 1), (3, 1)):
        with pair.changed.gate("layer", channel, concept, value):
            after = layer_output(pair.changed, x)
        z_k = concept_maps(pair, channel, concept, x)
        change = (after - before).select(dim, channel).reshape(len(x), -1)
        assert_close(change, (value - 1) * z_k)
        others = [o for o in range(before.shape[dim]) if o not in TWO]
        for o in others:
            assert_bit_equal(after.select(dim, o), before.select(dim, o))
        for o in set(TWO) - {channel}:
            assert_close(after.select(dim, o), before.select(dim, o), 1e-12)


def test_gate_works_with_and_without_a_graph(one_pair):
    x, layer = images(), one_pair.changed.layer
    with one_pair.changed.gate("layer", 1, 0, 0.0):
        with_graph = one_pair.changed(x)
        with torch.no_grad():
            assert_bit_equal(one_pair.changed(x), with_graph.detach())
        with_graph.sum().backward()
    assert layer.rows.grad[0].abs().max() > 0  # channel 1 comes second
    assert layer.rows.grad[layer.names.index("1.0")].abs().max() == 0  # switched off


def test_gate_is_taken_back_by_the_block_an_exception_or_remove(one_pair):
    network, changed = one_pair.network, one_pair.changed

    def assert_back() -> None:
        assert_same_outputs(network, changed, images())

    with changed.gate("layer", 1, 0, 0.0):
        assert not torch.equal(changed(images()), network(images()))
    assert_back()
    with pytest.raises(RuntimeError, match="in the middle"), changed.gate("layer", 1, 0, 0.0):
        raise RuntimeError("in the middle")
    assert_back()
    handle = changed.gate("layer", 1, 0, 0.0)
    assert not torch.equal(changed(images()), network(images()))
    handle.remove()
    assert_back()
    with changed.gate("layer", 1, 0, 0.0) as handle:
        handle.remove()
    assert_back()
    first, second = changed.gate("layer", 1, 0, 0.0), changed.gate("layer", 1, 0, 0.5)
    first.remove()
    second.remove()
    assert_back()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("head", 1, 0), "Layer 'head' has no concept channels; name one of layer"),
        (("layr", 1, 0), "Layer 'layr' has no concept channels"),
        (("layer", 2, 0), "has no concept 0 of channel 2; it has"),
        (("layer", 1, 2), "has no concept 2 of channel 1"),
        (("layer", 1, -1), "has no concept -1 of channel 1"),
    ],
)
def test_gate_and_clamp_refuse_what_does_not_exist(one_pair, arguments, message):
    for move in (one_pair.changed.gate, one_pair.changed.clamp):
        with pytest.raises(UsageError, match=message):
            move(*arguments, 0.0)


# --- hooks on the concept channels ----------------------------------------------------------------


def row_of(pair: Pair, name: str) -> int:
    return pair.changed.layer.names.index(name)


def test_concepts_can_be_read_and_reading_changes_nothing(pair):
    seen: list[Tensor] = []
    pair.changed.layer.concepts.register_forward_hook(
        lambda _module, _args, output: seen.append(output.detach().clone())
    )
    x = images()
    assert_bit_equal(pair.changed(x), pair.network(x))
    dim = dimension(pair.network.layer)
    assert sorted(pair.changed.layer.names) == ["0.0", "0.1", "1.0", "1.1", "3.0", "3.1"]
    for name in pair.changed.layer.names:
        channel, concept = map(int, name.split("."))
        read = seen[0].select(dim, row_of(pair, name)).reshape(len(x), -1)
        assert_close(read, concept_maps(pair, channel, concept, x))


def _returned(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    layer.register_forward_hook(lambda _module, _args, output: change(output.clone()))


def _in_place(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    layer.register_forward_hook(lambda _module, _args, output: (change(output), None)[1])


def _before(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    layer.register_forward_pre_hook(lambda _module, args: (change(args[0].clone()),))


def _before_in_place(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    layer.register_forward_pre_hook(lambda _module, args: (change(args[0]), None)[1])


INTERVENTIONS = pytest.mark.parametrize(
    "intervene", [_returned, _in_place, _before, _before_in_place]
)


@INTERVENTIONS
@pytest.mark.parametrize("kind", ["3x3", "groups", "pooled features", "tokens"])
def test_concepts_what_a_hook_makes_of_them_counts(kind, intervene, split_of):
    pair, x = Pair(kind, split_of(kind)), images()
    dim, row = dimension(pair.network.layer), row_of(pair, "1.0")
    before, z_k = layer_output(pair.network, x), concept_maps(pair, 1, 0, x)

    def double(output: Tensor) -> Tensor:
        output.select(dim, row).mul_(2)
        return output

    def change() -> Tensor:
        return layer_output(pair.changed, x) - before

    intervene(pair.changed.layer.concepts, double)
    for graph in (torch.enable_grad, torch.no_grad):
        with graph():
            moved = change()
        assert_close(moved.select(dim, 1).reshape(len(x), -1), z_k)
        assert_close(moved.select(dim, 0), torch.zeros_like(moved.select(dim, 0)), 1e-12)
    with pair.changed.gate("layer", 1, 0, 0.25):  # which scales what the hook left
        moved = change()
    assert_close(moved.select(dim, 1).reshape(len(x), -1), (2 * 0.25 - 1) * z_k)


@INTERVENTIONS
def test_residuals_what_a_hook_makes_of_them_is_subtracted(one_pair, intervene):
    x = images()
    before = layer_output(one_pair.network, x)
    intervene(one_pair.changed.layer.residuals, lambda output: output.add_(1))
    change = layer_output(one_pair.changed, x) - before
    for o in range(before.shape[1]):
        assert_close(change[:, o], torch.full_like(change[:, o], -1.0 if o in TWO else 0.0))


def test_concepts_gradients_can_be_read_by_hooks(one_pair):
    kept: list[Tensor] = []
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    concepts = one_pair.changed.layer.concepts
    concepts.register_forward_hook(keep)
    concepts.register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    one_pair.changed(images())[:, 2].sum().backward()
    expected = output_gradient(one_pair.network, images())
    for row, name in enumerate(one_pair.changed.layer.names):
        for gradient in (kept[0].grad, seen[0]):
            assert_close(gradient[:, row], expected[:, int(name.split(".")[0])], 1e-10)


def _backward_hook(concepts: nn.Module) -> None:
    concepts.register_full_backward_hook(
        lambda _module, inputs, _outputs: (torch.zeros_like(inputs[0]),)
    )


def _detaching_hook(concepts: nn.Module) -> None:
    _returned(concepts, lambda output: output.detach())


@pytest.mark.parametrize("stop", [_backward_hook, _detaching_hook])
def test_concepts_a_hook_can_take_their_gradient_and_leave_the_value(stop, one_pair):
    stop(one_pair.changed.layer.concepts)
    logits = one_pair.changed(images())
    assert_close(logits, one_pair.network(images()), 1e-12)
    logits[:, 2].sum().backward()
    n_concepts = len(one_pair.changed.layer.names)
    assert one_pair.changed.layer.rows.grad[:n_concepts].abs().max() == 0


def test_concepts_a_module_in_their_place_is_run(one_pair):
    class Silence(nn.Module):
        def forward(self, concepts: Tensor) -> Tensor:
            return torch.zeros_like(concepts)

    x = images()
    before = layer_output(one_pair.network, x)
    one_pair.changed.layer.concepts = Silence()
    change = layer_output(one_pair.changed, x) - before
    both = concept_maps(one_pair, 1, 0, x) + concept_maps(one_pair, 1, 1, x)
    assert_close(change[:, 1].flatten(1), -both)


def test_concepts_are_seen_by_a_hook_on_all_modules(one_pair):
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _args, _output: seen.append(module)
    )
    try:
        one_pair.changed(images())
    finally:
        handle.remove()
    assert any(module is one_pair.changed.layer.concepts for module in seen)


def output_gradient(network: nn.Module, x: Tensor) -> Tensor:
    """Gradient of logit 2 by the layer's output."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output.retain_grad()
        kept.append(output)
        return output.clone()

    handle = network.layer.register_forward_hook(keep)
    network(x)[:, 2].sum().backward()
    handle.remove()
    return kept[0].grad


# --- the plain form -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [TWO, THREE], ids=["two concepts", "three concepts"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
def test_apply_plain_computes_the_same_up_to_rounding_in_standard_modules(
    kind, dtype, tolerance, channels, split_of
):
    network, x = build(kind, dtype), images(5, dtype)
    plain = unbraid.apply(network, split_of(kind, channels, dtype), form="plain")
    expected, actual = layer_output(network, x), layer_output(plain, x)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    difference = (plain(x) - network(x)).abs().max()
    assert difference <= 10 * tolerance * network(x).abs().max()
    kinds = {type(module) for module in plain.layer.modules()}
    parts = [name for name, _ in plain.layer.named_children()]
    if isinstance(network.layer, PadsSame):
        assert kinds == {nn.Sequential, nn.Conv2d, Pad}
        assert parts == ["pad", "wide", "merge"]
    else:
        assert kinds == {nn.Sequential, type(network.layer)}
        assert parts == ["wide", "merge"]


def test_apply_has_no_third_form(one_pair):
    with pytest.raises(UsageError, match="no form 'both'; use 'exact' or 'plain'"):
        unbraid.apply(one_pair.network, one_pair.split, form="both")


# --- the original, copies, files ------------------------------------------------------------------


def half_trained() -> nn.Module:
    network = build("batch norm behind").train()
    network.stem_norm.eval()
    network.stem.weight.requires_grad_(False)
    return network


@pytest.mark.parametrize("form", ["exact", "plain"])
def test_apply_leaves_the_original_network_as_it_is(form, split_of):
    network = half_trained()
    before, modules = snapshot(network), list(network.modules())
    changed = unbraid.apply(network, split_of("batch norm behind"), form=form)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(1)
    assert_untouched(before, snapshot(network))
    assert list(network.modules()) == modules
    assert not hasattr(network, "gate")


def test_apply_keeps_modes_and_wanted_gradients(split_of):
    network = half_trained()
    changed = unbraid.apply(network, split_of("batch norm behind"))
    modes = {name: module.training for name, module in changed.named_modules()}
    for name, module in network.named_modules():
        assert modes[name] == module.training
    assert modes["layer"]
    assert modes["layer.original"]
    wants = {name: parameter.requires_grad for name, parameter in changed.named_parameters()}
    assert wants["layer.rows"]
    assert not wants["stem.weight"]


def test_apply_keeps_eval_mode_and_the_attributes_of_the_layer(one_pair):
    assert not any(module.training for module in one_pair.changed.modules())
    layer = one_pair.changed.layer
    assert layer.stride == (1, 1)
    assert layer.out_channels == 8
    assert layer.weight is layer.original.weight
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = layer.colour


def _pickled(network: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(network))


def _saved_whole(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, _pickled, _saved_whole, lambda one: copy.deepcopy(_pickled(one))],
    ids=["deepcopy", "pickle", "torch.save", "both"],
)
def test_gates_of_a_copy_work_on_the_copy_alone(duplicate, one_pair):
    x, network, changed = images(), one_pair.network, one_pair.changed
    twin = duplicate(changed)
    assert_same_outputs(network, twin, x)
    for one, other in ((twin, changed), (changed, twin)):
        with one.gate("layer", 1, 0, 0.0):
            assert_same_outputs(network, other, x)
            assert not torch.equal(one(x), network(x))
    with changed.gate("layer", 1, 0, 0.5):  # which stays so in the copy
        twin = duplicate(changed)
        moved = changed(x)
    assert_bit_equal(twin(x), moved)
    assert_same_outputs(network, changed, x)


def test_a_split_keeps_names_and_settings_in_its_file_which_is_the_same_bytes(one_pair, tmp_path):
    split = replace(
        one_pair.split,
        class_names=("Uhr, digital", "Blumenkohl", "schnörkel ∞", ""),
        settings={"tau": 0.1 + 0.2, "p": 0.75, "gamma": -0.5},
    )
    paths = [tmp_path / "new folder" / name for name in ("one", "two")]
    for path in paths:
        split.save(path)
    assert_same_split(Split.load(paths[0]), split)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def _other_tensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_text("no tensors"),
        Path.unlink,
        _other_tensors,
    ],
)
def test_a_file_that_is_no_split_is_refused_by_name(damage, one_pair, tmp_path):
    path = tmp_path / "split.safetensors"
    one_pair.split.save(path)
    damage(path)
    with pytest.raises(RunError, match=r"split\.safetensors"):
        Split.load(path)


# --- networks that the split does not fit, and odd ones that it does -----------------------------


@pytest.mark.parametrize("changed", ["stem.weight", "layer.bias", "stem_norm.running_var"])
@pytest.mark.parametrize("form", ["exact", "plain"])
def test_apply_refuses_a_network_with_other_weights(changed, form, one_pair):
    other = build("3x3")
    with torch.no_grad():
        other.state_dict()[changed].flatten()[0].mul_(1 + 1e-12)
    for network in (other, one_pair.changed):  # which was split already
        with pytest.raises(ModelError, match="made for a network with other weights"):
            unbraid.apply(network, one_pair.split, form=form)


class TwoNames(nn.Module):
    """One layer under two names; the second is the one that is called."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 3)
        self.inner = nn.Module()
        self.holder = [self.inner if nested else self]
        self.holder[0].again = self.layer
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.holder[0].again(x).relu().flatten(2).mean(2))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("form", ["exact", "plain"])
def test_apply_replaces_a_layer_under_two_names_under_both(form, nested, tmp_path):
    network = TwoNames(nested).double()
    changed = unbraid.apply(network, make_split(network, tmp_path), form=form)
    again = changed.inner.again if nested else changed.again
    assert again is changed.layer
    assert type(again) is not nn.Conv2d
    assert_close(changed(images()), network(images()))
    if form == "exact":
        with changed.gate("layer", 1, 0, 0.0):
            assert not torch.equal(changed(images()), network(images()))


def test_apply_splits_a_network_that_overwrites_the_layers_input(tmp_path):
    network = OverwritesInput()
    changed = unbraid.apply(network, make_split(network, tmp_path))
    assert_same_outputs(network, changed, images())


@pytest.mark.parametrize("form", ["exact", "plain"])
@pytest.mark.parametrize("kind", ["3x3", "tokens"])
def test_apply_splits_a_layer_that_is_handed_its_input_by_keyword(kind, form, split_of):
    network = CallsByKeyword(build(kind))
    changed = unbraid.apply(network, split_of(kind), form=form)  # the weights are the same
    assert_close(changed(images()), network(images()), 1e-12)


class Encoder(nn.Module):
    """torch's own transformer, which in eval mode reads the weights of its layers past them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))


def test_gate_has_the_same_effect_with_and_without_a_graph_in_torchs_transformer(tmp_path):
    network, name = Encoder().double().eval(), "blocks.layers.0.linear1"
    changed = unbraid.apply(network, make_split(network, tmp_path, layer=name))
    with changed.gate(name, 1, 0, -9.0):
        moved = changed(images())
        with torch.no_grad():
            assert_close(changed(images()), moved)
    assert not torch.allclose(moved, network(images()))


# --- outputs compared -----------------------------------------------------------------------------


def nudged(network: nn.Module, name: str = "head.weight", by: float = 1e-3) -> nn.Module:
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.state_dict()[name].flatten()[0].add_(by)
    return changed


def accuracy(network: nn.Module, dataset: SyntheticImages) -> float:
    correct = [
        int(network(image[None]).argmax()) == label
        for image, label in zip(dataset.images, dataset.targets, strict=True)
    ]
    return sum(correct) / len(correct)


def test_compare_outputs_passes_a_split_network_with_no_tolerance_at_all(pair):
    dataset = SyntheticImages(9, seed=2)
    result = unbraid.compare_outputs(pair.network, pair.changed, dataset, tolerance=0.0)
    assert result.max_abs_logit_diff == 0.0
    assert result.top1_agreement == 1.0
    assert result.top1_before == result.top1_after == accuracy(pair.network, dataset)


def test_compare_outputs_passes_the_plain_form_with_a_tolerance(one_pair):
    plain = unbraid.apply(one_pair.network, one_pair.split, form="plain")
    result = unbraid.compare_outputs(one_pair.network, plain, SyntheticImages(9))
    assert 0 < result.max_abs_logit_diff < 1e-12


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_compare_outputs_counts_over_all_images(batch_size, one_pair):
    dataset = SyntheticImages(9, seed=2)
    other = nudged(one_pair.network, "head.bias", 0.3)
    result = unbraid.compare_outputs(
        one_pair.network, other, dataset, tolerance=1.0, batch_size=batch_size
    )
    with torch.no_grad():
        before, after = one_pair.network(dataset.images), other(dataset.images)
    same = before.argmax(1) == after.argmax(1)
    assert 0 < same.double().mean() < 1  # else the test could not tell
    assert_close(result.max_abs_logit_diff, 0.3)
    assert_close(result.top1_agreement, same.double().mean())
    assert result.top1_before == accuracy(one_pair.network, dataset)
    assert result.top1_after == accuracy(other, dataset)


@pytest.mark.parametrize("name", ["layer.original.weight", "stem.weight", "head.bias"])
def test_compare_outputs_notices_a_weight_changed_by_a_little(name, one_pair):
    other = nudged(one_pair.changed, name, 1e-3)
    with pytest.raises(OutputChangedError, match="more than the tolerance 0"):
        unbraid.compare_outputs(one_pair.network, other, SyntheticImages(9), tolerance=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_compare_outputs_refuses_what_are_no_numbers_whatever_the_tolerance(value, one_pair):
    class LastIsBroken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = one_pair.changed(x).clone()
            logits[x[:, 0, 0, 0] == 77.0] = value
            return logits

    dataset = SyntheticImages(9)
    dataset.images[8, 0, 0, 0] = 77.0  # in the last batch
    broken = nudged(one_pair.network, by=float("nan"))
    for one, other in ((one_pair.network, LastIsBroken()), (broken, broken)):
        with pytest.raises(OutputChangedError):
            unbraid.compare_outputs(one, other, dataset, tolerance=1e9, batch_size=4)


def test_compare_outputs_leaves_both_networks_as_they_were(split_of):
    network = half_trained()
    changed = unbraid.apply(network, split_of("batch norm behind"))
    before = snapshot(network), snapshot(changed)
    unbraid.compare_outputs(network, changed, SyntheticImages(5))
    broken = nudged(changed)
    with pytest.raises(OutputChangedError):
        unbraid.compare_outputs(network, broken, SyntheticImages(5), tolerance=0.0)
    assert_untouched(before[0], snapshot(network))
    assert_untouched(before[1], snapshot(changed))


def test_compare_outputs_stops_at_a_broken_image_or_leaves_it_out(one_pair):
    with pytest.raises(DataError, match=r"Image 3 .*picture-3\.jpg"):
        unbraid.compare_outputs(one_pair.network, one_pair.changed, WithBroken(5))
    result = unbraid.compare_outputs(
        one_pair.network, one_pair.changed, WithBroken(5), batch_size=1, skip_broken=True
    )
    rest = SyntheticImages(5)
    rest.images, rest.targets = rest.images[[0, 1, 2, 4]], [0, 1, 2, 0]
    assert result.top1_before == accuracy(one_pair.network, rest)


def _all_broken() -> SyntheticImages:
    dataset = WithBroken(2)
    dataset.broken = (0, 1)
    return dataset


def _of_many_sizes() -> SyntheticImages:
    dataset = SyntheticImages(4)
    dataset.images = [image[:, :, : 6 - n // 2] for n, image in enumerate(dataset.images)]
    return dataset


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (_all_broken, DataError, "No image could be read"),
        (_of_many_sizes, DataError, "Image 2"),
        (lambda: SyntheticImages(4, size=(1, 7, 6)), ModelError, r"shape \(1, 7, 6\)"),
    ],
)
def test_compare_outputs_tells_of_images_that_cannot_be_compared(dataset, error, message, one_pair):
    with pytest.raises(error, match=message):
        unbraid.compare_outputs(one_pair.network, one_pair.changed, dataset(), skip_broken=True)
