"""Concept channels switched off or scaled for good: the same as gates, in a layer's own weights."""

import copy
import math

import pytest
import torch
from pairs import NETWORKS, images, make_split
from torch import nn

import unbraid
from checks import assert_close
from tiny_networks import build
from unbraid.base.errors import ModelError, OutputChangedError, UsageError
from unbraid.networks.copying import unwrap
from unbraid.networks.layers import resolve_layer, weight_rows
from unbraid.networks.outputs import run_network
from unbraid.networks.weights import hash_weights
from unbraid.surgery.edit import check_edit

SCALES = {"1.0": 0.0, "0.1": 2.0, "3.rest": 0.5, "3.0": -1.0}


def run(network, x):
    with torch.no_grad():
        return run_network(unwrap(network), x)


@pytest.mark.parametrize("kind", sorted(NETWORKS))
def test_an_edited_network_computes_what_gates_do_and_the_original_stays(kind):
    network = NETWORKS[kind]()
    split = make_split(network)
    before, x = hash_weights(unwrap(network)), images()
    gated = unbraid.apply(network, split)
    for name, scale in SCALES.items():
        channel, concept = name.split(".")
        unbraid.gate(
            gated, "layer", int(channel), concept if concept == "rest" else int(concept), scale
        )
    edited = unbraid.edit(network, split, SCALES)
    expected = run(gated, x)
    assert_close(run(edited, x), expected, 1e-10)
    assert (expected - run(network, x)).abs().max() > 1e-3
    assert hash_weights(unwrap(network)) == before
    assert {type(m) for m in edited.modules()} <= {type(m) for m in unwrap(network).modules()} | {
        type(resolve_layer(edited, "layer")[1])
    }
    assert check_edit(network, split, SCALES, edited, x) < 1e-12


def test_scales_of_one_change_no_bit():
    network = build("3x3")
    edited = unbraid.edit(network, make_split(network), dict.fromkeys(SCALES, 1.0))
    assert hash_weights(edited) == hash_weights(network)


def test_rows_are_those_of_the_definition():
    network = build("3x3")
    split = make_split(network)
    rows = weight_rows(unbraid.edit(network, split, SCALES).layer)
    w, masks = split[3].weight, split[3].masks
    expected = w * (-1.0 * masks[0] + masks[1] + 0.5 * (1 - masks[0] - masks[1]))
    assert_close(rows[3], expected, 1e-12)
    assert torch.equal(rows[2], weight_rows(network.layer)[2])


def test_a_layer_that_shares_its_weights_is_edited_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1, dtype=torch.float64)
            self.other = nn.Conv2d(3, 4, 1, dtype=torch.float64)
            self.other.weight, self.other.bias = self.layer.weight, self.layer.bias

        def forward(self, x):
            return (self.layer(x) + self.other(x).square()).mean((2, 3))

    network = Twice()
    edited = unbraid.edit(network, make_split(network), {"1.0": 0.0})
    assert torch.equal(edited.other.weight, network.layer.weight)
    assert not torch.equal(edited.layer.weight, network.layer.weight)


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [
        ({}, "Say what to switch off"),
        ({"1.7": 0.0}, r"no concept channel '1.7'; there are 1.0, 1.1, 1.rest\."),
        ({"9.0": 0.0}, r"no concept channel '9.0'; there are 0.0, 0.1, 0.rest, 1.0"),
        ({1: 0.0}, "no concept channel 1; there are 1.0"),
        ({"1.0": math.nan}, "scale of 1.0 is nan; give a finite number"),
        ({"1.0": "off"}, "The scale of 1.0 is .*'off'"),
    ],
)
def test_what_cannot_be_edited_is_told(scales, sentence):
    network = build("3x3")
    with pytest.raises(UsageError, match=sentence):
        unbraid.edit(network, make_split(network), scales)


def test_another_network_and_an_edit_that_is_none_are_refused():
    network = build("3x3")
    split, other = make_split(network), copy.deepcopy(network)
    with torch.no_grad():
        other.layer.weight += 1
    with pytest.raises(ModelError, match="other weights"):
        unbraid.edit(other, split, SCALES)
    with pytest.raises(OutputChangedError, match="differ from those under gates"):
        check_edit(network, split, SCALES, network, images())
