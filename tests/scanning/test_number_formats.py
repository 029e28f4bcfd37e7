"""Networks of half precision and of either memory format: sums in float32, equal outputs, gates."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import unbraid
from checks import assert_same_files, assert_same_outputs
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


# --- what is recorded -----------------------------------------------------------------------------


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


def recorded_shares(records: Any, expected: Tensor) -> Tensor:
    """All shares, with the expected ones where those are too small to be kept."""
    kept = torch.stack([records.share_of(o) for o in range(expected.shape[1])], 1)
    too_small = (kept == 0) & (expected < MIN_SHARE + 1e-5)
    return torch.where(too_small, expected.to(kept), kept)


def assert_scanned_in_single(
    network: nn.Module, dataset: SyntheticImages, scan: unbraid.Scan
) -> Tensor:
    """Records are of sums in float32; return the pooled inputs in float64."""
    (records,) = scan.shards()
    pooled, shares = wide_sums(network, dataset)
    assert_summed_in_single(records.pooled, pooled)
    assert_summed_in_single(recorded_shares(records, shares), shares)
    return pooled


@pytest.mark.parametrize(("kind", "dtype"), zip(KINDS, cycle(HALF), strict=False))
def test_sums_over_a_network_of_half_precision_are_of_single(kind, dtype, tmp_path):
    network, dataset = build(kind, dtype), pictures(height=60)
    assert_scanned_in_single(network, dataset, unbraid.scan(network, "layer", dataset, tmp_path))


def test_sums_may_be_larger_than_half_precision_holds(tmp_path):
    network, dataset = build("3x3", torch.float16), pictures(gain=100, height=900)
    scan = unbraid.scan(network, "layer", dataset, tmp_path)
    pooled = assert_scanned_in_single(network, dataset, scan)
    assert pooled.max() > 2 * torch.finfo(torch.float16).max


@pytest.mark.parametrize(
    ("wrong", "dtype"), zip(("format", "rounded", "one"), (*HALF, torch.float16), strict=True)
)
def test_sums_that_are_not_of_single_are_noticed(dtype, wrong):
    network, dataset = build("3x3", dtype), pictures(height=60)
    pooled, _ = wide_sums(network, dataset)
    sums = {"format": pooled.to(dtype), "rounded": pooled.to(dtype).float(), "one": pooled.float()}
    sums["one"][3, 0, 7] *= 1 + 1e-4
    sums["one"][3, 0, 7] += 1e-4 * float(pooled.max())
    assert_summed_in_single(pooled.float(), pooled)
    with pytest.raises(AssertionError):
        assert_summed_in_single(sums[wrong], pooled)


# --- splits ---------------------------------------------------------------------------------------


def split_of(network: nn.Module, folder: Path) -> unbraid.Split:
    """With masks of all sizes, since outputs must not depend on them."""
    scan = unbraid.scan(network, "layer", pictures(), folder, batch_size=3)
    split = unbraid.split(scan, unbraid.find(scan, channels=CONCEPTS))
    generator = torch.Generator().manual_seed(3)
    parts = [
        replace(part, masks=torch.rand(part.masks.shape, generator=generator).to(part.masks))
        for part in split.channels
    ]
    return replace(split, channels=tuple(parts))


def layer_output(network: nn.Module, x: Tensor) -> Tensor:
    seen = []
    handle = network.layer.register_forward_hook(
        lambda _module, _args, output: seen.append(output.detach().clone())
    )
    with torch.no_grad():
        network(x)
    handle.remove()
    return seen[0]


FORMATS = [
    (torch.float32, torch.channels_last),
    (torch.float16, torch.channels_last),
    (torch.bfloat16, torch.channels_last),
    (torch.bfloat16, torch.contiguous_format),
]
CASES = [(kind, *FORMATS[k % 4]) for k, kind in enumerate(KINDS)]
CASES += [(kind, *own) for kind in ("groups", "tokens") for own in FORMATS]


@pytest.mark.parametrize(("kind", "dtype", "memory_format"), CASES, ids=range(len(CASES)))
def test_a_split_network_of_any_format_is_the_original_until_a_gate_moves(
    kind, dtype, memory_format, tmp_path
):
    network = build(kind, dtype)
    if any(isinstance(module, nn.Conv2d) for module in network.modules()):
        network = network.to(memory_format=memory_format)
    split = split_of(network, tmp_path)
    part = split[CHANNEL]
    x = pictures(5).images.to(dtype).contiguous(memory_format=memory_format)
    for form in ("exact", "plain"):
        changed = unbraid.apply(network, split, form=form)
        assert {p.dtype for p in changed.parameters()} == {dtype}
        if form == "exact":
            assert_same_outputs(network, changed, x)
            assert layer_output(changed, x).stride() == layer_output(network, x).stride()
        assert_layer_is(changed, network, x, part, ())
    changed = unbraid.apply(network, split)
    with changed.gate("layer", CHANNEL, CONCEPT, 0.0):
        assert_layer_is(changed, network, x, part, (CONCEPT,))
    assert_same_outputs(network, changed, x)


def assert_layer_is(
    changed: nn.Module, network: nn.Module, x: Tensor, part: Any, without: tuple[int, ...]
) -> None:
    """Up to rounding in its own format the channel is the original without some concepts."""
    layer = network.layer
    actual = torch.stack([oracle._by_channel(layer, z) for z in layer_output(changed, x)]).double()
    seen = layer_input(network, x)
    maps = [
        torch.stack([oracle.channel_map(layer, CHANNEL, row, one) for one in seen])
        for row in part.rows
    ]
    whole = torch.stack([oracle.channel_map(layer, CHANNEL, part.weight, one) for one in seen])
    expected = whole - sum(maps[k] for k in without)
    scale = max(float(z.abs().max()) for z in (whole, *maps))
    difference = actual[:, CHANNEL] - expected.reshape(actual[:, CHANNEL].shape)
    assert float(difference.abs().max()) <= 6 * torch.finfo(x.dtype).eps * scale


@pytest.mark.parametrize("dtype", HALF)
def test_another_concept_off_is_noticed(dtype, tmp_path):
    network = build("3x3", dtype)
    split, x = split_of(network, tmp_path), pictures(5).images.to(dtype)
    changed = unbraid.apply(network, split)
    for wrong in (0, 1):
        with changed.gate("layer", CHANNEL, wrong, 0.0), pytest.raises(AssertionError):
            assert_layer_is(changed, network, x, split[CHANNEL], (CONCEPT,))


# --- fits with positions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "dtype"), zip(("least_squares", "published"), HALF, strict=True)
)
def test_fits_with_positions_are_those_of_the_same_numbers_in_single(dtype, method, tmp_path):
    """Of rectified sums beyond the range of float16."""
    dataset = pictures(12, gain=100, height=300)
    dataset.images = dataset.images.to(dtype).float()
    torch.manual_seed(0)
    network = stack(
        ("layer", nn.Conv2d(3, 8, 3)),
        ("behind", nn.ReLU()),
        ("pool", PooledFeatures()),
        ("head", nn.Linear(8, 4)),
    ).to(dtype)
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


# --- autocast -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["pads by size", "tokens"])
def test_autocast_around_a_scan_changes_nothing(kind, tmp_path):
    network, dataset = build(kind, torch.float32), pictures()
    unbraid.scan(network, "layer", dataset, tmp_path / "1", positions=True)
    with torch.autocast("cpu", torch.bfloat16):
        unbraid.scan(network, "layer", dataset, tmp_path / "2", positions=True)
        assert torch.is_autocast_enabled("cpu")
    assert_same_files(tmp_path / "1", tmp_path / "2")
