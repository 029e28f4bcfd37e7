"""Relevance of channels and of their inputs, and a network left as it was."""

from contextlib import suppress

import pytest
import torch

from checks import assert_close, assert_untouched, snapshot, truth_of
from tiny_networks import KINDS, SyntheticImages, build, layer_input
from unbraid.networks import relevance
from unbraid.networks.layers import describe, weight_rows
from unbraid.networks.spec import channels_first, pooled_input

IMAGES = SyntheticImages(5)
LABELS = torch.tensor(IMAGES.targets)


@pytest.fixture(params=KINDS)
def network(request):
    return build(request.param)


def relevance_of(network):
    """Of channels for each image's own class, (N, C_out), by the fast path on one batch."""
    with relevance.undisturbed(network), relevance.cut_at(network.layer, torch.clone) as cut:
        own = network(IMAGES.images).gather(1, LABELS[:, None]).sum()
    assert cut.outputs[0].is_leaf  # no graph in front
    assert not cut.inputs[0].requires_grad
    gradients = relevance.gradients_at(cut.outputs, own)
    (product,) = relevance.output_relevance("layer", cut.outputs, gradients)
    return channels_first(describe("layer", network.layer), product).flatten(2).sum(2)


def test_relevance_and_input_relevance_are_the_oracles(network):
    found, truth = relevance_of(network), truth_of(network, IMAGES)
    assert_close(found, truth.relevance)
    assert_close(relevance.shares(found), truth.shares)
    spec = describe("layer", network.layer)
    pooled = pooled_input(spec, channels_first(spec, layer_input(network, IMAGES.images)))
    by_channel = pooled.repeat_interleave(spec.n_out // spec.groups, 1)  # (N, C_out, J)
    found = relevance.input_relevance(weight_rows(network.layer), by_channel, spec.taps_per_input)
    assert_close(found, truth_of(network, IMAGES).input_relevance)


def test_cut_at_keeps_input_and_output_as_the_layer_meets_them(network):
    expected, x = network(IMAGES.images), layer_input(network, IMAGES.images)
    z = network.layer(x)  # before an activation in place
    with relevance.undisturbed(network), relevance.cut_at(network.layer, torch.clone) as cut:
        assert torch.equal(network(IMAGES.images), expected)
    assert torch.equal(cut.outputs[0], z)
    assert torch.equal(cut.inputs[0], x)
    assert z.min() < 0  # else an activation could not be told


def test_undisturbed_leaves_a_network_as_it_was_also_where_it_fails():
    network = build("batch norm behind").train()  # modes and wanted gradients differ by module
    network.stem_norm.eval()
    network.stem.weight.requires_grad_(False)
    network(IMAGES.images).sum().backward()
    network.layer.register_forward_hook(lambda *_: None)
    before = snapshot(network)
    for images in (IMAGES.images, IMAGES.images[..., :0]):  # which are too small
        with (
            suppress(RuntimeError),
            relevance.undisturbed(network),
            relevance.cut_at(network.layer, torch.clone),
        ):
            assert not any(module.training for module in network.modules())
            assert not any(parameter.requires_grad for parameter in network.parameters())
            network(images)
        assert_untouched(before, snapshot(network))
