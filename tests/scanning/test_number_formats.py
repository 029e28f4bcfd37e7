"""Networks of half precision and of either memory format: sums in float32, equal outputs, gates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import unbraid
from checks import assert_same_outputs
from tiny_networks import KINDS, PooledFeatures, SyntheticImages, build, layer_input, stack

HALF = [torch.float16, torch.bfloat16]
CONCEPTS = {1: [[0], [1], [2]], 3: [[0, 3], [1, 2]]}
CHANNEL, CONCEPT = 1, 2
MIN_SHARE = 0.005


def pictures(n_images: int = 8, gain: float = 1.0, height: int = 7) -> SyntheticImages:
    """In float32, as a data set gives them."""
    dataset = SyntheticImages(n_images, size=(3, height, 6), dtype=torch.float32)
    dataset.images *= gain
    return dataset


def wide_sums(network: nn.Module, dataset: SyntheticImages) -> tuple[Tensor, Tensor]:
    """Pooled inputs (N, G, J) and shares (N, C): the network in its own format, sums in float64."""
    seen, leaves = [], []

    def cut(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(args[0].detach().clone())
        leaves.append(output.detach().clone().requires_grad_())
        return leaves[-1].clone()

    handle = network.layer.register_forward_hook(cut)
    logits = network(dataset.images.to(next(network.parameters()).dtype))
    handle.remove()
    own = sum(row[label] for row, label in zip(logits, dataset.targets, strict=True))
    (gradient,) = torch.autograd.grad(own, leaves[0])
    product = leaves[0].detach().double() * gradient.double()
    relevance = [oracle._by_channel(network.layer, part).sum(1) for part in product]
    pooled = [oracle.pooled_input(network.layer, x) for x in seen[0]]
    return torch.stack(pooled), torch.stack([oracle.shares(r) for r in relevance])


def assert_summed_in_single(actual: Tensor, expected: Tensor) -> None:
    """Sums in float64 and what is recorded differ by no more than float32 rounds."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    difference = float((actual.double() - expected).abs().max())
    assert difference <= 2e-6 * float(expected.abs().max())


def assert_scanned_in_single(network: nn.Module, dataset: SyntheticImages, scan: Any) -> Tensor:
    """Records are of sums in float32; return the pooled inputs in float64."""
    (records,) = scan.shards()
    pooled, shares = wide_sums(network, dataset)
    assert_summed_in_single(records.pooled, pooled)
    kept = torch.stack([records.share_of(o) for o in range(shares.shape[1])], 1)
    too_small = (kept == 0) & (shares < MIN_SHARE + 1e-5)
    assert_summed_in_single(torch.where(too_small, shares.to(kept), kept), shares)
    return pooled


@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_a_network_of_half_precision_are_of_single(kind, tmp_path):
    network, dataset = build(kind, HALF[list(KINDS).index(kind) % 2]), pictures(height=60)
    assert_scanned_in_single(network, dataset, unbraid.scan(network, "layer", dataset, tmp_path))


def test_sums_may_be_larger_than_half_precision_holds_and_rounded_ones_are_noticed(tmp_path):
    network, dataset = build("3x3", torch.float16), pictures(gain=100, height=900)
    scan = unbraid.scan(network, "layer", dataset, tmp_path)
    pooled = assert_scanned_in_single(network, dataset, scan)
    assert pooled.max() > 2 * torch.finfo(torch.float16).max
    one = pooled.float()
    one[3, 0, 7] += 1e-4 * float(pooled.max())
    for wrong in (pooled.bfloat16(), pooled.bfloat16().float(), one):
        with pytest.raises(AssertionError):
            assert_summed_in_single(wrong, pooled)


def split_of(network: nn.Module, folder: Path) -> unbraid.Split:
    """With masks of all sizes, since outputs must not depend on them."""
    scan = unbraid.scan(network, "layer", pictures(), folder)
    split = unbraid.split(scan, unbraid.find(scan, channels=CONCEPTS))
    return replace(
        split, channels=tuple(replace(c, masks=torch.rand_like(c.masks)) for c in split.channels)
    )


FORMATS = [
    (torch.float32, torch.channels_last),
    (torch.float16, torch.channels_last),
    (torch.bfloat16, torch.channels_last),
    (torch.bfloat16, torch.contiguous_format),
]
CASES = [(kind, *FORMATS[k % 4]) for k, kind in enumerate(KINDS)]


@pytest.mark.parametrize(("kind", "dtype", "memory_format"), CASES, ids=range(len(CASES)))
def test_a_split_network_of_any_format_is_the_original_until_a_gate_moves(
    kind, dtype, memory_format, tmp_path
):
    network = build(kind, dtype)
    if any(isinstance(module, nn.Conv2d) for module in network.modules()):
        network = network.to(memory_format=memory_format)
    split = split_of(network, tmp_path)
    x = pictures(5).images.to(dtype).contiguous(memory_format=memory_format)
    changed = unbraid.apply(network, split)
    assert {p.dtype for p in changed.parameters()} == {dtype}
    assert_same_outputs(network, changed, x)
    assert_layer_is(unbraid.apply(network, split, form="plain"), network, x, split, None)
    with changed.gate("layer", CHANNEL, CONCEPT, 0.0):
        assert_layer_is(changed, network, x, split, CONCEPT)
    with changed.gate("layer", CHANNEL, 1, 0.0), pytest.raises(AssertionError):
        assert_layer_is(changed, network, x, split, CONCEPT)
    assert_same_outputs(network, changed, x)


def assert_layer_is(
    changed: nn.Module, network: nn.Module, x: Tensor, split: unbraid.Split, without: int | None
) -> None:
    """Up to rounding in its own format the channel is the original without a concept."""
    layer, part, outputs = network.layer, split[CHANNEL], []
    handle = changed.layer.register_forward_hook(lambda _m, _x, z: outputs.append(z.clone()))
    with torch.no_grad():
        changed(x)
    handle.remove()
    actual = torch.stack([oracle._by_channel(layer, z)[CHANNEL] for z in outputs[0]]).double()
    whole, *concepts = (
        torch.stack(
            [oracle.channel_map(layer, CHANNEL, row, one) for one in layer_input(network, x)]
        )
        for row in (part.weight, *part.rows)
    )
    expected = whole if without is None else whole - concepts[without]
    scale = max(float(z.abs().max()) for z in (whole, *concepts))
    difference = actual - expected.reshape(actual.shape)
    assert float(difference.abs().max()) <= 6 * torch.finfo(x.dtype).eps * scale


@pytest.mark.parametrize(("method", "dtype"), [("least_squares", HALF[0]), ("published", HALF[1])])
def test_fits_with_positions_are_those_of_the_same_numbers_in_single(dtype, method, tmp_path):
    """Of rectified sums beyond the range of float16."""
    dataset = pictures(12, gain=100, height=300)
    dataset.images = dataset.images.to(dtype).float()
    layer, pool = nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), PooledFeatures())
    network = stack(("layer", layer), ("pool", pool), ("head", nn.Linear(8, 4))).to(dtype)
    splits = []
    for format_ in (dtype, torch.float32):  # from the same numbers, as the first layer sees them
        out = tmp_path / str(format_)
        scan = unbraid.scan(network.to(format_), "layer", dataset, out, positions=True)
        found = unbraid.find(scan, channels={1: [[0], [1]], 3: [[0], [2]]})
        splits.append(unbraid.split(scan, found, method=method))
    for half, single in zip(*(split.channels for split in splits), strict=True):
        assert half.masks.dtype == dtype
        assert half.info.get("rho") == single.info.get("rho")
        difference = (half.masks.double() - single.masks.double()).abs().max()
        assert float(difference) <= torch.finfo(dtype).eps


class Autocasts(nn.Module):
    """Switches autocast on for itself."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.network = network

    @property
    def layer(self) -> nn.Module:
        return self.network.layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(x)


@pytest.mark.parametrize("kind", ["3x3", "groups", "tokens"])
def test_a_network_that_autocasts_is_scanned_with_sums_of_single(kind, tmp_path):
    network, dataset = Autocasts(build(kind, torch.float32)), pictures(height=60)
    scan = unbraid.scan(network, "network.layer", dataset, tmp_path)
    assert_scanned_in_single(network, dataset, scan)
    split = unbraid.split(scan, unbraid.find(scan, channels=CONCEPTS))
    assert_same_outputs(network, unbraid.apply(network, split), dataset.images)
