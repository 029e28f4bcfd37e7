"""Concept channels moved: gates per image, clamps, and that all of it is taken back."""

from __future__ import annotations

import math

import pytest
import steering
import torch
from test_apply import Pair, Splits, concept_maps, dimension, images, layer_output, make_split
from torch import Tensor, nn

import unbraid
from checks import assert_close, assert_same_outputs
from tiny_networks import build
from unbraid.base.errors import UsageError

KINDS = ["3x3", "groups", "pooled features", "tokens", "grid of tokens", "one dimension"]
VALUES = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0], dtype=torch.float64)  # one per image


@pytest.fixture(scope="module")
def split_of(tmp_path_factory) -> Splits:
    return Splits(tmp_path_factory.mktemp)


@pytest.fixture(params=KINDS)
def pair(request, split_of) -> Pair:
    return Pair(request.param, split_of(request.param))


@pytest.fixture
def one_pair(split_of) -> Pair:
    return Pair("3x3", split_of("3x3"))


def change_of(pair: Pair, channel: int, before: Tensor) -> Tensor:
    """What the moves in force add to a channel, (N, P)."""
    change = layer_output(pair.changed, images()) - before
    return change.select(dimension(pair.network.layer), channel).reshape(len(change), -1)


def assert_moved(pair: Pair, channel: int, concept: int, before: Tensor, wanted: Tensor) -> None:
    """The concept channel answers as wanted, (N, P), and no other channel is touched."""
    z_k = concept_maps(pair, channel, concept, images())
    assert not torch.allclose(wanted, z_k)  # else the test could not tell
    assert_close(change_of(pair, channel, before), wanted - z_k)
    for o in range(before.shape[dimension(pair.network.layer)]):
        if o != channel:
            assert float(change_of(pair, o, before).abs().max()) <= 1e-12


def test_a_move_that_did_something_else_is_told(one_pair):
    before = layer_output(one_pair.network, images())
    z_k = concept_maps(one_pair, 1, 0, images())
    with one_pair.changed.gate("layer", 1, 0, 0.5):
        assert_moved(one_pair, 1, 0, before, 0.5 * z_k)
        with pytest.raises(AssertionError):
            assert_moved(one_pair, 1, 0, before, 0.51 * z_k)
        with one_pair.changed.gate("layer", 3, 0, 0.5), pytest.raises(AssertionError):
            assert_moved(one_pair, 1, 0, before, 0.5 * z_k)


# --- gates per image ------------------------------------------------------------------------------


def test_a_gate_per_image_scales_each_image_by_its_own_value(pair):
    before = layer_output(pair.network, images())
    z_k = concept_maps(pair, 1, 1, images())
    with pair.changed.gate("layer", 1, 1, VALUES):
        assert_moved(pair, 1, 1, before, torch.stack([VALUES[n] * z_k[n] for n in range(5)]))
    assert_same_outputs(pair.network, pair.changed, images())


def test_gates_per_image_and_for_all_work_together(one_pair):
    before = layer_output(one_pair.network, images())
    with (
        one_pair.changed.gate("layer", 1, 0, VALUES),
        one_pair.changed.gate("layer", 3, 1, 0.0),
        one_pair.changed.gate("layer", 0, 0, VALUES > 0),
    ):
        changes = {o: change_of(one_pair, o, before) for o in (1, 3, 0)}
    z = {key: concept_maps(one_pair, *key, images()) for key in ((1, 0), (3, 1), (0, 0))}
    assert_close(changes[1], (VALUES[:, None] - 1) * z[1, 0])
    assert_close(changes[3], -z[3, 1])
    assert_close(changes[0], torch.where(VALUES[:, None] > 0, 0.0, -z[0, 0]))


def test_a_gate_can_be_learned(one_pair):
    """The gradient by a gate is the gradient by the channel, times the concept channel."""
    value = torch.ones(5, dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    row = one_pair.changed.layer.names.index("1.0")
    kept: list[Tensor] = []
    one_pair.changed.layer.concepts.register_forward_hook(
        lambda _m, _a, output: (output.retain_grad(), kept.append(output), None)[2]
    )
    for gate in (value, one):
        with one_pair.changed.gate("layer", 1, 0, gate):
            one_pair.changed(images())[:, 2].sum().backward()
    expected = (kept[0] * kept[0].grad)[:, row].flatten(1).sum(1)
    assert expected.abs().max() > 0
    assert_close(value.grad, expected, 1e-10)
    assert_close(one.grad, expected.sum(), 1e-10)


@pytest.mark.parametrize("n_values", [1, 4, 6])
def test_a_gate_for_another_number_of_images_is_refused_when_run(one_pair, n_values):
    with one_pair.changed.gate("layer", 1, 0, torch.ones(n_values)):
        with pytest.raises(UsageError, match=f"values for {n_values} images .* runs on 5"):
            one_pair.changed(images())
        other = one_pair.changed(images(n_values))
    assert_close(other, one_pair.network(images(n_values)), 1e-12)
    assert_same_outputs(one_pair.network, one_pair.changed, images())


@pytest.mark.parametrize(
    ("move", "values", "message"),
    [
        ("gate", (torch.ones(5, 2),), r"one per image, not one of shape \(5, 2\)"),
        ("gate", (math.nan,), "cannot be NaN"),
        ("clamp", (1.0, 0.0), "needs low <= high"),
        ("clamp", (math.nan, 1.0), "needs low <= high"),
        ("clamp", (0.0, math.nan), "needs low <= high"),
    ],
)
def test_values_that_cannot_be_are_refused_and_leave_no_trace(one_pair, move, values, message):
    with pytest.raises(UsageError, match=message):
        getattr(one_pair.changed, move)("layer", 1, 0, *values)
    assert_same_outputs(one_pair.network, one_pair.changed, images())


# --- clamps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(-0.01, 0.01), (0.2, 0.2), (-math.inf, 0.0), (0.0, math.inf)])
def test_a_clamp_bounds_a_concept_channel_at_every_position(pair, bounds):
    low, high = bounds
    before = layer_output(pair.network, images())
    z_k = concept_maps(pair, 3, 0, images())
    wanted = torch.stack([torch.stack([z.clip(low, high) for z in image]) for image in z_k])
    with pair.changed.clamp("layer", 3, 0, low, high):
        assert_moved(pair, 3, 0, before, wanted)
    assert_same_outputs(pair.network, pair.changed, images())


def test_bounds_can_be_given_by_name_and_singly(one_pair):
    before = layer_output(one_pair.network, images())
    z_k = concept_maps(one_pair, 1, 0, images())
    with one_pair.changed.clamp("layer", 1, 0, high=0.0):
        assert_moved(one_pair, 1, 0, before, z_k.clamp(max=0))
    with unbraid.clamp(one_pair.changed, one_pair.changed.layer, 1, 0, low=0.0):
        assert_moved(one_pair, 1, 0, before, z_k.clamp(min=0))


# --- several moves, and back ----------------------------------------------------------------------


def test_of_several_moves_of_a_concept_channel_the_latest_counts(one_pair):
    before = layer_output(one_pair.network, images())
    z_k = concept_maps(one_pair, 1, 0, images())
    with one_pair.changed.gate("layer", 1, 0, 3.0):
        with one_pair.changed.clamp("layer", 1, 0, -0.1, 0.1):
            with one_pair.changed.gate("layer", 1, 0, VALUES):
                assert_moved(one_pair, 1, 0, before, VALUES[:, None] * z_k)
            assert_moved(one_pair, 1, 0, before, z_k.clamp(-0.1, 0.1))
        assert_moved(one_pair, 1, 0, before, 3 * z_k)
    assert_same_outputs(one_pair.network, one_pair.changed, images())


def test_moves_taken_back_in_another_order_leave_the_others(one_pair):
    before = layer_output(one_pair.network, images())
    z_k = concept_maps(one_pair, 1, 0, images())
    gate = one_pair.changed.gate("layer", 1, 0, 0.0)
    clamp = one_pair.changed.clamp("layer", 1, 0, high=0.05)
    gate.remove()
    assert_moved(one_pair, 1, 0, before, z_k.clamp(max=0.05))
    clamp.remove()
    clamp.remove()
    assert_same_outputs(one_pair.network, one_pair.changed, images())


def test_all_moves_are_taken_back_after_an_exception(one_pair):
    def fail() -> None:
        with (
            one_pair.changed.gate("layer", 1, 0, VALUES),
            one_pair.changed.clamp("layer", 3, 0, low=0.0),
        ):
            one_pair.changed(images(3))  # three images, five gates

    with pytest.raises(UsageError):
        fail()
    assert one_pair.changed.layer.moves == []
    assert_same_outputs(one_pair.network, one_pair.changed, images())


class HasClamp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = build("1x1")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def clamp(self) -> str:
        return "its own"


def test_a_network_with_a_method_called_clamp_keeps_it(tmp_path):
    network = HasClamp()
    changed = unbraid.apply(network, make_split(network, tmp_path, layer="layer.layer"))
    assert changed.clamp() == "its own"
    with unbraid.clamp(changed, "layer.layer", 1, 0, high=-1.0):
        assert not torch.equal(changed(images()), network(images()))


# --- the documented example -----------------------------------------------------------------------


def test_the_cause_of_a_confusion_can_be_removed_at_little_cost_to_the_rest(tmp_path):
    """docs/steering.md: boots before bags; figures move with the split, what they say does not."""
    figures = steering.steer(tmp_path / "scan")
    nothing, concepts, alone, whole = figures.values()
    assert nothing.boot < 0.4 < nothing.bag
    assert concepts.boot > nothing.boot + 0.3
    assert concepts.bag < nothing.bag - 0.3
    for clean in ("clean_pair", "clean_rest"):
        assert getattr(concepts, clean) > getattr(nothing, clean) - 0.03
        assert getattr(concepts, clean) > getattr(whole, clean)
        assert getattr(alone, clean) == getattr(nothing, clean)
    assert (alone.boot, alone.bag) == (concepts.boot, concepts.bag)
