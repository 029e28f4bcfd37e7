"""Relevance of channels and of their inputs, and a network left as it was."""

import pytest
import torch

from checks import assert_close, truth_of
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
    gradients = relevance.gradients_at(cut.outputs, own)
    (product,) = relevance.output_relevance("layer", cut.outputs, gradients)
    return channels_first(describe("layer", network.layer), product).flatten(2).sum(2)


def test_relevance_is_gradient_times_activation_of_each_images_own_class(network):
    found, truth = relevance_of(network), truth_of(network, IMAGES)
    assert_close(found, truth.relevance)
    assert_close(relevance.shares(found), truth.shares)


def test_input_relevance_is_input_times_gradient_of_the_summed_channel(network):
    spec = describe("layer", network.layer)
    pooled = pooled_input(spec, channels_first(spec, layer_input(network, IMAGES.images)))
    by_channel = pooled.repeat_interleave(spec.n_out // spec.groups, 1)  # (N, C_out, J)
    found = relevance.input_relevance(weight_rows(network.layer), by_channel, spec.taps_per_input)
    assert_close(found, truth_of(network, IMAGES).input_relevance)
