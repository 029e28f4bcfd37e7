"""Relevance of channels and of their inputs, and a network left as it was."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from checks import assert_close, assert_untouched, snapshot, truth_of
from tiny_networks import KINDS, SyntheticImages, build, layer_input
from unbraid.networks.layers import describe, weight_rows
from unbraid.networks.relevance import (
    cut_at,
    gradients_at,
    input_relevance,
    output_relevance,
    shares,
    undisturbed,
)
from unbraid.networks.spec import channels_first, pooled_input

IMAGES = SyntheticImages(5)
LABELS = torch.tensor(IMAGES.targets)


@pytest.fixture(params=KINDS)
def network(request):
    return build(request.param)


def relevance_of(network: nn.Module) -> torch.Tensor:
    """Of channels for each image's own class, (N, C_out), by the fast path on one batch."""
    with undisturbed(network), cut_at(network.layer, torch.clone) as cut:
        own = network(IMAGES.images).gather(1, LABELS[:, None]).sum()
    (product,) = output_relevance("layer", cut.outputs, gradients_at(cut.outputs, own))
    return channels_first(describe("layer", network.layer), product).flatten(2).sum(2)


def test_relevance_is_gradient_times_activation_of_each_images_own_class(network):
    found, truth = relevance_of(network), truth_of(network, IMAGES)
    assert_close(found, truth.relevance)
    assert_close(shares(found), truth.shares)


def test_input_relevance_is_input_times_gradient_of_the_summed_channel(network):
    spec = describe("layer", network.layer)
    pooled = pooled_input(spec, channels_first(spec, layer_input(network, IMAGES.images)))
    by_channel = pooled.repeat_interleave(spec.n_out // spec.groups, 1)  # (N, C_out, J)
    found = input_relevance(weight_rows(network.layer), by_channel, spec.taps_per_input)
    assert_close(found, truth_of(network, IMAGES).input_relevance)


def test_cut_at_keeps_input_and_output_as_the_layer_meets_them_and_no_graph_in_front(network):
    expected, x = network(IMAGES.images), layer_input(network, IMAGES.images)
    z = network.layer(x)  # before an activation in place
    with undisturbed(network), cut_at(network.layer, torch.clone) as cut:
        assert torch.equal(network(IMAGES.images), expected)
    assert cut.outputs[0].is_leaf
    assert not cut.inputs[0].requires_grad
    assert torch.equal(cut.outputs[0], z)
    assert torch.equal(cut.inputs[0], x)
    assert z.min() < 0  # else an activation could not be told


@pytest.mark.parametrize("fault", [None, lambda x: x[..., :0]])  # which is too small
def test_undisturbed_leaves_a_network_as_it_was(fault):
    network = build("batch norm behind").train()  # modes and wanted gradients differ by module
    network.behind.eval()
    network.stem.weight.requires_grad_(False)
    network(IMAGES.images).sum().backward()
    network.layer.register_forward_hook(lambda *_: None)
    before = snapshot(network)
    expected = nullcontext() if fault is None else pytest.raises(RuntimeError)
    with expected, undisturbed(network), cut_at(network.layer, torch.clone):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        network(IMAGES.images)
        network(IMAGES.images if fault is None else fault(IMAGES.images))
    assert_untouched(before, snapshot(network))
