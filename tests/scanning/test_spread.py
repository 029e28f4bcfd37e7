"""Deviations within images: what a scan keeps of fifty images at some of their positions."""

import pytest
import torch

import oracle
import structures
import unbraid
from checks import assert_bit_equal, assert_close
from tiny_networks import KINDS, SyntheticImages, WithBroken, build
from unbraid.base.errors import RunError, UsageError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.networks import spec
from unbraid.running.check import check
from unbraid.scanning.records import shard_path

N_IMAGES = 70
SHARD = 16


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("unbraid.scanning.scan.images_per_shard", lambda _: SHARD)


def sampled(indices):
    """Fifty of a list, or all of a shorter one."""
    return sorted({indices[k * len(indices) // 50] for k in range(50)})


def spread_of(layer, network, dataset, images):
    """The oracle's, (M, G, J), from what reaches the layer image by image."""
    inputs = []
    with network.layer.register_forward_hook(
        lambda _, args, __: inputs[-1].extend(args[0].clone())
    ):
        for n in images:
            inputs.append([])
            with torch.no_grad():
                network(dataset.images[n][None])
    return torch.cat([oracle.spread(layer, own) for own in inputs])


def assert_spread(scan, expected):
    for group in range(scan.layer.groups):
        assert_close(scan.spread(group), expected[:, group])


@pytest.mark.parametrize("kind", KINDS)
def test_spread_is_what_taps_meet_less_its_mean_over_an_image(kind, small_shards, tmp_path):
    network, dataset, scans = build(kind), SyntheticImages(N_IMAGES), []
    expected = spread_of(network.layer, network, dataset, sampled(range(N_IMAGES)))
    assert (len(expected) == 0) == (kind in ("pooled features", "head"))
    for positions in (False, True):
        options = {"positions": positions, "batch_size": 8}
        scans.append(unbraid.scan(network, "layer", dataset, tmp_path / str(positions), **options))
        assert_spread(scans[-1], expected)
    for group in range(scans[0].layer.groups):
        assert_bit_equal(*(scan.spread(group) for scan in scans))


def test_spread_of_other_positions_or_images_is_noticed(tmp_path):
    network, dataset = build("groups"), SyntheticImages(N_IMAGES)
    scan = unbraid.scan(network, "layer", dataset, tmp_path)
    sound = spread_of(network.layer, network, dataset, sampled(range(N_IMAGES)))
    for wrong in (
        *(sound.roll(1, 0), sound.flip(1), sound[1:], sound + 1e-6),
        spread_of(network.layer, network, dataset, range(50)),
    ):
        with pytest.raises(AssertionError):
            assert_spread(scan, wrong)


@pytest.mark.parametrize("kind", structures.STRUCTURES)
def test_spread_counts_positions_over_all_runs_on_an_image(kind, tmp_path):
    network, dataset = structures.build(kind), structures.images()
    layer = structures.bare_layer(kind, network)
    network.forward = torch.no_grad()(network.forward)
    expected = spread_of(layer, network, dataset, range(8))
    scan = unbraid.scan(structures.build(kind), "layer", dataset, tmp_path)
    assert_spread(scan, expected)


@pytest.mark.parametrize("chosen", [{}, {"classes": [1, 3]}, {"indices": range(5, 69)}], ids=str)
def test_spread_is_of_images_spread_over_those_scanned_less_broken_ones(
    chosen, small_shards, tmp_path
):
    network, dataset = build("groups"), WithBroken(N_IMAGES)
    indices = list(chosen.get("indices", range(N_IMAGES)))
    indices = [n for n in indices if n % 4 in chosen.get("classes", range(4))]
    dataset.broken = broken = tuple(sampled(indices)[3:9:2])
    left = [n for n in sampled(indices) if n not in broken]
    expected = spread_of(network.layer, network, dataset, left)
    for positions in (False, True):
        options = {**chosen, "skip_broken": True, "positions": positions}
        scan = unbraid.scan(network, "layer", dataset, tmp_path / str(positions), **options)
        assert scan.broken() == list(broken)
        assert_spread(scan, expected)


def test_spread_of_a_layer_of_many_taps_is_of_fewer_positions(tmp_path, monkeypatch):
    network, dataset = build("3x3"), SyntheticImages(N_IMAGES)
    for room, n in ((50 * 54 * 5 + 50, 5), (1, 1)):
        monkeypatch.setattr(spec, "_SAMPLED_NUMBERS", room)
        scan = unbraid.scan(network, "layer", dataset, tmp_path / str(n))
        assert scan.spread(0).shape == (50 * n, 54)


def test_spread_of_a_scan_that_was_begun_by_an_older_version_is_not_known(small_shards, tmp_path):
    network, dataset = build("groups"), SyntheticImages(N_IMAGES)
    scan = unbraid.scan(network, "layer", dataset, tmp_path)
    assert scan.spread(0) is not None
    with pytest.raises(UsageError, match="group is 2; give a whole number from 0 to 1"):
        scan.spread(2)
    tensors, _ = read_tensors(shard_path(tmp_path, 2))
    older = {name: tensor for name, tensor in tensors.items() if not name.startswith("spread")}
    write_tensors(shard_path(tmp_path, 2), older, {})
    for again in (unbraid.open_scan(tmp_path), unbraid.scan(network, "layer", dataset, tmp_path)):
        assert (again.spread(0), again.spread(1)) == (None, None)
        assert sum(len(records) for records in again.shards()) == N_IMAGES


@pytest.mark.parametrize(
    "damage",
    [
        lambda own: own["spread"].view(-1)[5].mul_(torch.nan),
        lambda own: own.update(spread=own["spread"][:-1]),
        lambda own: own.update(spread=own["spread"].float()),
        lambda own: own.update(spread=own["spread"][:, :1]),
        lambda own: own["spread_start"].mul_(2),
    ],
    ids=range(5),
)
def test_spread_that_is_damaged_is_refused_and_made_anew(damage, small_shards, tmp_path):
    network, dataset = build("groups"), SyntheticImages(N_IMAGES)
    scan, shard = unbraid.scan(network, "layer", dataset, tmp_path), shard_path(tmp_path, 1)
    before, content = scan.spread(1), shard.read_bytes()
    tensors, about = read_tensors(shard)
    damage(tensors)
    about.pop("crc32")
    write_tensors(shard, tensors, about)
    with pytest.raises(RunError, match=r"shard-000001\.safetensors holds"):
        unbraid.open_scan(tmp_path).spread(1)  # an open scan keeps what it read
    assert [shard.name in told for told in check(tmp_path).damaged] == [True]
    unbraid.scan(network, "layer", dataset, tmp_path)
    assert_bit_equal(unbraid.open_scan(tmp_path).spread(1), before)
    assert shard.read_bytes() == content
