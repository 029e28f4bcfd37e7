"""What only transposed convolutions have; all else of them is in the tests of every kind."""

from dataclasses import replace

import pytest
import torch
from pairs import images, make_split
from torch import nn

import unbraid
from checks import assert_bit_equal, assert_close
from tiny_networks import KINDS, SyntheticImages, around, build, layer_input
from unbraid.base.errors import LayerError
from unbraid.networks.layers import describe, weight_rows
from unbraid.networks.spec import as_rows, as_weight, inputs_at, pooled_input, tap_inputs

TRANSPOSED = [kind for kind in KINDS if kind.startswith("transposed")]


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_rows_are_torchs_weights_in_another_order(kind):
    layer = build(kind).layer
    spec = describe("layer", layer)
    rows = weight_rows(layer)
    assert_bit_equal(as_weight(spec, rows), layer.weight.detach())
    assert_bit_equal(as_rows(spec, as_weight(spec, rows)), rows)
    # By hand: output channel o of group g has weight[inputs of g, o within g].
    n_in, n_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for o in range(layer.out_channels):
        group, within = divmod(o, n_out)
        own = [layer.weight[group * n_in + i, within].flatten() for i in range(n_in)]
        assert_bit_equal(rows[o], torch.cat(own).detach())


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_only_what_is_taken_is_flipped(kind, monkeypatch):
    network = build(kind)
    layer, x = network.layer, layer_input(network, images(2))
    spec, flip, sizes = describe("layer", layer), torch.Tensor.flip, []

    def counted(tensor, *dims):
        sizes.append(tensor.numel())
        return flip(tensor, *dims)

    monkeypatch.setattr(torch.Tensor, "flip", counted)
    last = layer(x).shape[2:].numel() - 1
    at = torch.tensor([0, last])
    met = inputs_at(spec, [x], 2, torch.tensor([1, 0]), at)
    assert sizes == [met.numel()]
    for group in range(spec.groups):
        every = tap_inputs(spec, x, group)
        assert_bit_equal(met[:, group], torch.stack([every[1, :, 0], every[0, :, last]]).detach())


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_taps_meet_what_a_plain_loop_says(kind):
    """z[p] = sum of W[k] x[i] over the i, k with p = i * stride - padding + k * dilation."""
    network = build(kind)
    layer, x = network.layer, layer_input(network, images(2))
    spec, sizes = describe("layer", layer), layer(x).shape[2:]
    met = tap_inputs(spec, x, 0).detach()
    expected = torch.zeros(met.shape).double().unflatten(1, (-1, *layer.kernel_size))
    expected = expected.unflatten(-1, sizes)
    n_dims = len(sizes)
    for i in torch.cartesian_prod(*[torch.arange(n) for n in x.shape[2:]]).reshape(-1, n_dims):
        for k in torch.cartesian_prod(*[torch.arange(n) for n in spec.kernel]).reshape(-1, n_dims):
            p = [
                int(a) * s - q + int(b) * d
                for a, s, q, b, d in zip(
                    *(i, layer.stride, layer.padding, k, layer.dilation), strict=True
                )
            ]
            if all(0 <= at < n for at, n in zip(p, sizes, strict=True)):
                at = (slice(None), slice(None), *k.tolist(), *p)
                expected[at] += x[(slice(None), slice(spec.n_in_per_group), *i.tolist())]
    assert_close(met, expected.flatten(1 + 1 + n_dims).flatten(1, 1 + n_dims), 1e-12)
    assert_close(pooled_input(spec, x)[:, 0], met.sum(2), 1e-12)
    wrong = replace(spec, padding=tuple((a + 3, b + 3) for a, b in spec.padding))
    with pytest.raises(AssertionError):
        assert_close(pooled_input(wrong, x)[:, 0], met.sum(2), 1e-12)


def test_an_output_size_of_the_layers_own_passes_and_another_is_told(tmp_path):
    class Sized(nn.Module):
        def __init__(self, more):
            super().__init__()
            self.layer, self.more = nn.ConvTranspose2d(3, 4, 3, stride=2).double(), more

        def forward(self, x):
            size = [2 * n + 1 + self.more for n in x.shape[2:]]
            return self.layer(x, output_size=size).mean((2, 3))

    network, dataset = Sized(0), SyntheticImages(4)
    unbraid.scan(network, "layer", dataset, tmp_path / "0")
    changed = unbraid.apply(network, make_split(network, {1: [[0], [1]]}))
    assert_bit_equal(changed(images()), network(images()))
    with pytest.raises(LayerError, match="output_size"):
        unbraid.scan(Sized(1), "layer", dataset, tmp_path / "1")


def test_impossible_padding_is_refused():
    spec = describe("layer", around(nn.ConvTranspose1d(6, 8, 4, 2)).layer)
    spec.check()
    for pair in ((4, 4), (3, 5), (3, 2)):
        with pytest.raises(ValueError, match="transposed"):
            replace(spec, padding=(pair,)).check()
