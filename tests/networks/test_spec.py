"""Layers seen as rows of weights: what is pooled, what rows compute, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from checks import assert_pooled_inputs, assert_responses, assert_rows_explain_output, truth_of
from tiny_networks import KINDS, SyntheticImages, build, layer_input, stack
from unbraid.base.errors import LayerError
from unbraid.networks.layers import bias_of, describe, resolve_layer, weight_rows, why_not
from unbraid.networks.spec import LayerSpec, channels_first, pooled_input, respond

IMAGES = SyntheticImages(3)


@pytest.fixture(params=KINDS)
def network(request):
    return build(request.param)


def test_pooled_inputs_are_the_gradient_of_the_summed_output_by_the_weights(network):
    spec = describe("layer", network.layer)
    x = channels_first(spec, layer_input(network, IMAGES.images))
    assert_pooled_inputs(pooled_input(spec, x), truth_of(network, IMAGES))


def test_rows_times_pooled_inputs_and_bias_give_the_summed_output(network):
    spec = describe("layer", network.layer)
    x = channels_first(spec, layer_input(network, IMAGES.images))
    truth = truth_of(network, IMAGES)
    assert_rows_explain_output(
        pooled_input(spec, x),
        weight_rows(network.layer),
        bias_of(network.layer),
        [z.shape[1] for z in truth.z],
        truth,
    )


def test_a_layers_own_rows_respond_as_the_layer(network):
    spec = describe("layer", network.layer)
    x = layer_input(network, IMAGES.images)
    own = respond(
        spec,
        channels_first(spec, x),
        weight_rows(network.layer),
        bias_of(network.layer),
        range(spec.n_out),
    )
    with torch.no_grad():
        expected = channels_first(spec, network.layer(x))
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_new_rows_in_any_order_respond_in_the_group_of_their_channel(network):
    spec = describe("layer", network.layer)
    x = channels_first(spec, layer_input(network, IMAGES.images))
    last = spec.n_out - 1
    channels = [last, 0, last, 1]  # shuffled and repeated
    rows = torch.randn(4, spec.n_taps, generator=torch.Generator().manual_seed(1)).double()
    bias = bias_of(network.layer)[channels]
    new = respond(spec, x, rows, bias, channels)
    assert_responses(new.flatten(2), channels, rows, truth_of(network, IMAGES))


def test_pooled_inputs_of_half_precision_are_summed_in_single(network):
    spec = describe("layer", network.layer)
    x = channels_first(spec, layer_input(network, IMAGES.images))
    pooled = pooled_input(spec, x.half())
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, pooled_input(spec, x.half().double()).float())


def test_a_description_survives_json(network):
    spec = describe("layer", network.layer)
    assert LayerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_description_counts_what_the_weights_hold(network):
    spec = describe("layer", network.layer)
    assert (spec.n_out, spec.n_taps) == weight_rows(network.layer).shape
    assert spec.n_taps == spec.n_in_per_group * spec.taps_per_input
    groups = [spec.group_of(o) for o in range(spec.n_out)]
    assert groups == sorted(groups)
    assert set(groups) == set(range(spec.groups))


# --- finding a layer ------------------------------------------------------------------------------


def test_a_layer_is_found_by_name_and_by_itself():
    network = nn.Sequential(build("1x1"), nn.Identity())
    layer = network[0].layer
    assert resolve_layer(network, "0.layer") == ("0.layer", layer)
    assert resolve_layer(network, layer) == ("0.layer", layer)


@pytest.mark.parametrize("name", ["layr", "Layer", "lay.er"])
def test_an_unknown_name_gives_the_nearest_that_can_be_split(name):
    with pytest.raises(LayerError, match=r"no layer '.*'.* Did you mean layer\?"):
        resolve_layer(build("1x1"), name)


def test_a_name_near_only_to_what_cannot_be_split_gets_no_suggestion():
    with pytest.raises(LayerError) as caught:
        resolve_layer(stack(("norm", nn.BatchNorm2d(4)), ("fc", nn.Linear(4, 2))), "norms")
    assert "norm " not in str(caught.value)
    assert "unbraid layers" in str(caught.value)


def test_an_empty_name_is_no_layer():
    with pytest.raises(LayerError, match="no layer ''"):
        resolve_layer(build("1x1"), "")


def test_a_module_of_another_network_is_refused():
    with pytest.raises(LayerError, match="not part of the network"):
        resolve_layer(build("1x1"), build("1x1").layer)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        pytest.param(nn.Conv2d(6, 12, 3, groups=6), "single input channel", id="depthwise"),
        pytest.param(nn.Conv2d(1, 8, 3), "single input channel", id="grey images"),
        pytest.param(nn.Linear(1, 8), "single input", id="one feature"),
        pytest.param(nn.BatchNorm2d(6), "not a convolution", id="batch norm"),
        pytest.param(nn.ReLU(), "not a convolution", id="activation"),
        pytest.param(nn.ConvTranspose2d(6, 8, 3), "transposed convolution", id="transposed"),
        pytest.param(nn.Sequential(nn.Linear(6, 8)), "not a convolution", id="container"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(module, reason):
    assert reason in why_not(module)
    with pytest.raises(LayerError, match=rf"Layer 'it' \({type(module).__name__}\).*{reason}"):
        describe("it", module)


def test_every_kind_can_be_split(network):
    assert why_not(network.layer) is None
