"""Layers seen as rows of weights: what is pooled, what rows compute, what is refused."""

import pytest
import torch
from torch import nn

from checks import assert_close, assert_responses, assert_rows_explain_output, truth_of
from tiny_networks import KINDS, SyntheticImages, build, layer_input, stack
from unbraid.base.errors import LayerError, ModelError
from unbraid.networks.layers import bias_of, describe, resolve_layer, weight_rows, why_not
from unbraid.networks.spec import channels_first, pooled_input, respond

IMAGES = SyntheticImages(3)


@pytest.fixture(params=KINDS)
def case(request):
    """A network, its layer's description, and what reaches the layer."""
    network = build(request.param)
    spec = describe("layer", network.layer)
    return network, spec, channels_first(spec, layer_input(network, IMAGES.images))


def test_pooled_input_is_the_gradient_of_the_summed_output_by_the_weights(case):
    network, spec, x = case
    assert why_not(network.layer) is None
    spec.check()
    truth = truth_of(network, IMAGES)
    pooled = pooled_input(spec, x)
    assert_close(pooled, torch.stack([truth.pooled(n) for n in range(len(x))]))
    rows, bias = weight_rows(network.layer), bias_of(network.layer)
    assert_rows_explain_output(pooled, rows, bias, [z.shape[1] for z in truth.z], truth)
    if x.dim() == 4:
        last = x.contiguous(memory_format=torch.channels_last)
        assert_close(pooled_input(spec, last), pooled)
    half = pooled_input(spec, x.half())  # which is summed in single precision
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, pooled_input(spec, x.half().double()).float())


def test_respond_is_the_layer_and_new_rows_in_any_order_are_in_the_group_of_their_channel(case):
    network, spec, x = case
    rows, bias = weight_rows(network.layer), bias_of(network.layer)
    expected = channels_first(spec, network.layer(layer_input(network, IMAGES.images)).detach())
    own = respond(spec, x, rows, bias, range(spec.n_out))
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
    channels = [spec.n_out - 1, 0, spec.n_out - 1, 1]  # shuffled and repeated
    rows = torch.randn(4, spec.n_taps).double()
    new = respond(spec, x, rows, bias[channels], channels)
    assert_responses(new.flatten(2), channels, rows, truth_of(network, IMAGES))


def test_resolve_layer_finds_a_layer_by_name_and_by_itself_or_says_what_there_is():
    network = nn.Sequential(build("1x1"), nn.Identity())
    layer = network[0].layer
    assert resolve_layer(network, "0.layer") == ("0.layer", layer)
    assert resolve_layer(network, layer) == ("0.layer", layer)
    network = stack(("norm", nn.BatchNorm2d(4)), ("layer", nn.Linear(4, 2)))
    for layer, sentence in (
        ("lay.er", r"no layer 'lay.er'.* Did you mean layer\?"),
        ("norms", r"no layer 'norms'\. `unbraid layers` lists"),  # near to what cannot be split
        ("module.", "no layer ''"),
        (build("1x1").layer, "not part of the network"),
        (3, "3 is no layer"),
    ):
        with pytest.raises(LayerError, match=sentence):
            resolve_layer(network, layer)


def test_describe_of_what_cannot_be_split_says_why():
    for module, reason in (
        (nn.Conv2d(6, 12, 3, groups=6), "single input channel"),
        (nn.Linear(1, 8), "single input"),
        (nn.ReLU(), "not a convolution"),
        (nn.ConvTranspose2d(6, 12, 3, groups=6), "single input channel"),
    ):
        assert reason in why_not(module)
        with pytest.raises(LayerError, match=rf"Layer 'it' \({type(module).__name__}\).*{reason}"):
            describe("it", module)


@pytest.mark.parametrize(
    "layer", [nn.LazyConv2d(4, 3), nn.Conv2d(3, 4, 3, device="meta")], ids=["lazy", "meta"]
)
def test_weight_rows_of_a_layer_without_numbers_is_told_in_a_sentence(layer):
    with pytest.raises(ModelError, match=r"makes weights \(in a Lazy|meta device, so holds no num"):
        weight_rows(layer)
