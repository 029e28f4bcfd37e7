"""Networks of half precision and of either memory format: sums in float32, equal outputs, gates."""

import pytest
import torch
from torch import nn

import oracle
import unbraid
from checks import assert_same_outputs
from tiny_networks import KINDS, PooledFeatures, SyntheticImages, build, stack

HALF = [torch.float16, torch.bfloat16]
MIN_SHARE = 0.005


def pictures(n_images=8, gain=1.0, height=7):
    """In float32, as a data set gives them."""
    dataset = SyntheticImages(n_images, size=(3, height, 6), dtype=torch.float32)
    dataset.images *= gain
    return dataset


def wide_sums(network, dataset):
    """Pooled inputs (N, G, J) and shares (N, C): the network in its own format, sums in float64."""
    seen, leaves = [], []

    def cut(_module, args, output):
        seen.append(args[0].detach().clone())
        leaves.append(output.detach().clone().requires_grad_())
        return leaves[-1].clone()

    with network.layer.register_forward_hook(cut):
        logits = network(dataset.images.to(next(network.parameters()).dtype))
    own = sum(row[label] for row, label in zip(logits, dataset.targets, strict=True))
    (gradient,) = torch.autograd.grad(own, leaves[0])
    product = leaves[0].detach().double() * gradient.double()
    relevance = [oracle._by_channel(network.layer, part).sum(1) for part in product]
    pooled = [oracle.pooled_input(network.layer, x) for x in seen[0]]
    return torch.stack(pooled), torch.stack([oracle.shares(r) for r in relevance])


def assert_summed_in_single(actual, expected):
    """Sums in float64 and what is recorded differ by no more than float32 rounds."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    difference = float((actual.double() - expected).abs().max())
    assert difference <= 2e-6 * float(expected.abs().max())


def assert_scanned_in_single(network, dataset, scan):
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


@pytest.mark.parametrize("kind", ["3x3", "groups", "tokens"])
@pytest.mark.parametrize("by", ["network", "option"])
def test_sums_under_autocast_are_of_single(kind, by, tmp_path):
    network, dataset = build(kind, torch.float32), pictures(height=60)
    network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)
    own = network if by == "network" else build(kind, torch.float32)
    scan = unbraid.scan(own, "layer", dataset, tmp_path, autocast=by == "option")
    assert_scanned_in_single(network, dataset, scan)


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
        changed = unbraid.apply(network, splits[-1])
        assert {parameter.dtype for parameter in changed.parameters()} == {format_}
        assert_same_outputs(network, changed, dataset.images[:5].to(format_))
    for half, single in zip(*(split.channels for split in splits), strict=True):
        assert half.masks.dtype == dtype
        assert half.info.get("rho") == single.info.get("rho")
        difference = (half.masks.double() - single.masks.double()).abs().max()
        assert float(difference) <= torch.finfo(dtype).eps
