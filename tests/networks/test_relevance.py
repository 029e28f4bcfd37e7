"""Relevance of channels and of their inputs, and a network left as it was."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from checks import (
    assert_input_relevance,
    assert_relevance,
    assert_shares,
    assert_untouched,
    snapshot,
    truth_of,
)
from tiny_networks import KINDS, SyntheticImages, build, layer_input
from unbraid.base.errors import LayerError
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


def own_relevance(outputs, logits, labels):
    """Of each image's own class, call by call."""
    own = logits.gather(1, labels[:, None]).sum()
    return output_relevance("layer", outputs, gradients_at(outputs, own))


def relevance_of(network: nn.Module) -> torch.Tensor:
    """(N, C_out), by the fast path on one batch."""
    with undisturbed(network), cut_at(network.layer, torch.clone) as cut:
        logits = network(IMAGES.images)
    (product,) = own_relevance(cut.outputs, logits, LABELS)
    return channels_first(describe("layer", network.layer), product).flatten(2).sum(2)


def test_relevance_is_gradient_times_activation_of_each_images_own_class(network):
    assert_relevance(relevance_of(network), truth_of(network, IMAGES))


def test_shares_divide_by_the_positive_relevance_of_the_image(network):
    assert_shares(shares(relevance_of(network)), truth_of(network, IMAGES))


def test_input_relevance_is_input_times_gradient_of_the_summed_channel(network):
    spec = describe("layer", network.layer)
    pooled = pooled_input(spec, channels_first(spec, layer_input(network, IMAGES.images)))
    by_channel = pooled.repeat_interleave(spec.n_out // spec.groups, 1)  # (N, C_out, J)
    found = input_relevance(weight_rows(network.layer), by_channel, spec.taps_per_input)
    assert_input_relevance(found, truth_of(network, IMAGES))


def test_what_is_cut_is_the_layers_input_and_output_before_the_in_place_activation():
    network = build("3x3")
    x = layer_input(network, IMAGES.images)
    expected = network.layer(x).detach()
    assert expected.min() < 0  # else an activation could not be told
    with undisturbed(network), cut_at(network.layer, torch.clone) as cut:
        network(IMAGES.images)
    assert torch.equal(cut.outputs[0], expected)
    assert torch.equal(cut.inputs[0], x)


def test_the_cut_changes_no_logit(network):
    expected = network(IMAGES.images)
    with undisturbed(network), cut_at(network.layer, torch.clone):
        assert torch.equal(network(IMAGES.images), expected)


def test_no_graph_is_kept_in_front_of_the_layer():
    network = build("3x3")
    with undisturbed(network), cut_at(network.layer, torch.clone) as cut:
        network(IMAGES.images)
    assert cut.outputs[0].is_leaf
    assert not cut.inputs[0].requires_grad


def test_an_image_without_positive_relevance_has_no_share():
    assert torch.equal(shares(torch.tensor([[-1.0, 0.0, -2.0]])), torch.zeros(1, 3))


# --- left as it was -------------------------------------------------------------------------------


def mixed_network() -> nn.Module:
    """Modes and wanted gradients differ from module to module, a gradient and a hook are there."""
    network = build("batch norm behind").train()
    network.stem_norm.eval()
    network.behind.eval()
    network.stem.weight.requires_grad_(False)
    network(IMAGES.images).sum().backward()
    network.layer.register_forward_hook(lambda *_: None)
    return network


def test_a_network_is_undisturbed_afterwards():
    network = mixed_network()
    before = snapshot(network)
    with undisturbed(network), cut_at(network.layer, torch.clone):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        network(IMAGES.images)
    assert_untouched(before, snapshot(network))


def test_a_network_is_undisturbed_after_an_exception():
    network = mixed_network()
    before = snapshot(network)
    error = RuntimeError("in the middle")

    def fail() -> None:
        with undisturbed(network), cut_at(network.layer, torch.clone):
            network(IMAGES.images)
            raise error

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert_untouched(before, snapshot(network))


def test_a_network_that_fails_midway_is_undisturbed():
    network = mixed_network()
    before = snapshot(network)
    too_small = torch.zeros(1, 3, 0, 0, dtype=torch.float64)
    with pytest.raises(RuntimeError), undisturbed(network), cut_at(network.layer, torch.clone):
        network(too_small)
    assert_untouched(before, snapshot(network))


# --- layers that have no relevance ----------------------------------------------------------------


class SideBranch(nn.Module):
    """The layer runs, but what it computes is thrown away, or detached."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        parts = OrderedDict(pool=nn.Flatten(), head=nn.Linear(3 * 7 * 6, 4))
        self.main, self.layer, self.detached = nn.Sequential(parts), nn.Conv2d(3, 4, 1), detached
        self.double()

    def forward(self, x):
        side = self.layer(x).flatten(2).mean(2)
        return self.main(x) + side.detach() if self.detached else self.main(x)


@pytest.mark.parametrize("detached", [True, False])
def test_a_layer_that_does_not_reach_the_logits_is_refused(detached):
    with pytest.raises(LayerError, match="does not reach the logits"):
        relevance_of(SideBranch(detached))


class PartlyUsed(nn.Module):
    """The logits have a graph, but not from the layer's cut output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)
        self.double()
        self.free = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def forward(self, x):
        return self.head(self.layer(x).detach().flatten(2).mean(2)) + self.free


def test_a_graph_that_does_not_lead_back_to_the_layer_is_refused():
    with pytest.raises(LayerError, match="does not reach the logits"):
        relevance_of(PartlyUsed())


def test_relevance_does_not_depend_on_the_other_images_of_the_batch():
    network = build("batch norm behind")
    together = relevance_of(network)
    with undisturbed(network), cut_at(network.layer, torch.clone) as cut:
        logits = network(IMAGES.images[2:3])
    alone = own_relevance(cut.outputs, logits, LABELS[2:3])[0].flatten(2).sum(2)
    torch.testing.assert_close(together[2:3], alone, rtol=1e-10, atol=1e-12)
