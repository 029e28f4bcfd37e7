"""Concept channels moved: several gates and clamps at once, and that all of it is taken back."""

import math

import pytest
import steering
import torch
from pairs import VALUES, assert_moved, images, split_network
from torch import nn

import unbraid
from checks import assert_close, assert_same_outputs
from tiny_networks import build
from unbraid.base.errors import UsageError


def test_gates_of_several_concepts_per_image_and_for_all_work_together_and_can_be_learned(pair):
    gate = pair.changed.gate
    with gate("layer", 1, 0, VALUES), gate("layer", 3, 1, 0.0), gate("layer", 0, 0, VALUES > 0):
        change = pair.change()
        on_graph = pair.changed(images())
        with torch.no_grad():
            assert torch.equal(pair.changed(images()), on_graph)
    assert_close(change[1], (VALUES[:, None] - 1) * pair.concept_map(1, 0))
    assert_close(change[3], -pair.concept_map(3, 1))
    assert_close(change[0], torch.where(VALUES[:, None] > 0, 0.0, -pair.concept_map(0, 0)))
    value = torch.ones(5, dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    row = pair.changed.layer.names.index("1.0")
    kept = []
    concepts = pair.changed.layer.concepts
    concepts.register_forward_hook(lambda _m, _a, z: kept.append(z) or z.retain_grad())
    for gate in (value, one):
        with pair.changed.gate("layer", 1, 0, gate):
            pair.changed(images())[:, 2].sum().backward()
    expected = (kept[0] * kept[0].grad)[:, row].flatten(1).sum(1)
    assert expected.abs().max() > 0
    assert_close(value.grad, expected, 1e-10)
    assert_close(one.grad, expected.sum(), 1e-10)


@pytest.mark.parametrize("n_values", [1, 6])
def test_gate_for_another_number_of_images_is_refused_when_run(pair, n_values):
    with pair.changed.gate("layer", 1, 0, torch.ones(n_values)):
        with pytest.raises(UsageError, match=f"values for {n_values} images .* runs on 5"):
            pair.changed(images())
        other = pair.changed(images(n_values))
    assert_close(other, pair.network(images(n_values)), 1e-12)
    assert_same_outputs(pair.network, pair.changed, images())


def test_a_move_that_cannot_be_is_refused_without_a_trace(pair):
    for move, arguments, sentence in (
        ("gate", ("layer", 1, 0, torch.ones(5, 2)), r"one per image, not one of shape \(5, 2\)"),
        ("gate", ("layer", 1, 0, math.nan), "cannot be NaN"),
        ("clamp", ("layer", 1, 0, 1.0, 0.0), "needs low <= high"),
        ("clamp", ("layer", 1, 0, 0.0, math.nan), "needs low <= high"),
        ("gate", ("head", 1, 0, 0.0), "'head' has no concept channels; name one of layer"),
        ("gate", (nn.ReLU(), 1, 0, 0.0), "Layer of type ReLU has no concept channels"),
        ("gate", ("layer", 2, 0, 0.0), "has no concept 0 of channel 2; it has"),
    ):
        with pytest.raises(UsageError, match=sentence):
            getattr(pair.changed, move)(*arguments)
        assert pair.changed.layer.moves == []
        with pytest.raises(UsageError, match=r"has no concept channels; pass .* unbraid\.apply"):
            getattr(unbraid, move)(pair.network, *arguments)


def test_of_several_moves_of_a_concept_channel_the_latest_counts(pair):
    z_k = pair.concept_map(1, 0)
    with pair.changed.gate("layer", 1, 0, 3.0):
        gate = pair.changed.gate("layer", 1, 0, 0.0)
        with unbraid.clamp(pair.changed, pair.changed.layer, 1, 0, high=0.05):
            with pair.changed.gate("layer", 1, 0, VALUES):
                assert_moved(pair, 1, 0, VALUES[:, None] * z_k)
            gate.remove()
            assert_moved(pair, 1, 0, z_k.clamp(max=0.05))
        assert_moved(pair, 1, 0, 3 * z_k)
    assert_same_outputs(pair.network, pair.changed, images())


def test_a_network_with_an_attribute_called_clamp_keeps_it():
    network = build("1x1")
    network.clamp = lambda: "its own"
    changed = split_network(network)
    assert changed.clamp() == "its own"
    with unbraid.clamp(changed, "layer", 1, 0, high=-1.0):
        assert not torch.equal(changed(images()), network(images()))


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
