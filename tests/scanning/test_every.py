"""Every layer, or as many as the disk's budget holds: evenly over depth, the rest told."""

import re
import shlex
from dataclasses import replace

import pytest
import torch
from torch import nn

import structures
import unbraid
from checks import assert_same_files
from tiny_networks import N_CLASSES, SyntheticImages
from unbraid.base.errors import UsageError
from unbraid.networks.layers import describe
from unbraid.scanning import every, place_shards
from unbraid.scanning.every import scan_bytes, within_disk
from unbraid.scanning.place_shards import most_place_bytes

IMAGES = SyntheticImages(11, seed=5)
LAYER = describe("x", nn.Linear(100, 10))


def network(n=5):
    torch.manual_seed(3)
    layers = [nn.Conv2d(3 if k == 0 else 4, 4, 3, padding=1) for k in range(n)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 42, N_CLASSES)).double().eval()


@pytest.mark.parametrize("kind", structures.STRUCTURES)
def test_a_scan_takes_no_more_than_it_is_said_to(kind, tmp_path):
    scans = unbraid.scan(structures.build(kind), "all", structures.images(), tmp_path)
    for scan in scans.values():
        tensors = [own for records in scan.shards() for own in vars(records).values()]
        kept = sum(own.nbytes for own in tensors if own is not None)
        number = 8 if scan.manifest.dtype == "float64" else 4
        assert 0 < kept <= scan_bytes(scan.layer, scan.manifest.n_images, number) + 64


@pytest.mark.parametrize(
    ("n_held", "chosen"),
    [(0, []), (1, [3]), (2, [1, 3]), (3, [1, 3, 5]), (5, [0, 1, 2, 3, 5]), (7, list(range(7)))],
)
def test_a_budget_holds_layers_evenly_over_depth(n_held, chosen):
    layers = [replace(LAYER, name=str(k)) for k in range(7)]
    budget = n_held * (scan_bytes(LAYER, 20, 4) + scan_bytes(LAYER, 10, 4))
    held = within_disk(layers, [20, 10], 4, budget)
    assert [int(layer.name) for layer in held] == chosen


def test_a_layer_too_large_makes_room_for_others():
    large = replace(LAYER, n_in=10**6)
    layers = [large if k == 3 else replace(LAYER, name=str(k)) for k in range(7)]
    held = within_disk(layers, [20], 4, 6 * scan_bytes(LAYER, 20, 4))
    assert large not in held
    assert len(held) == 6


def test_places_count_towards_the_budget(tmp_path, monkeypatch):
    layers = [replace(LAYER, name=str(k)) for k in range(7)]
    need = scan_bytes(LAYER, 20, 4) + most_place_bytes(LAYER, 3, 4)
    assert [int(own.name) for own in within_disk(layers, [20], 4, 2 * need, places=3)] == [1, 3]
    assert len(within_disk(layers, [20], 4, 2 * need, places=2)) == 2
    assert len(within_disk(layers, [20], 4, 2 * need - 1, places=3)) == 1
    assert within_disk(layers, [20], 4, scan_bytes(LAYER, 20, 4), places=3) == []
    # A layer whose places alone are refused is left out, and the others are scanned.
    spec = describe("2", network(1)[2])
    most = most_place_bytes(spec, 200, 8) - 1
    monkeypatch.setattr(place_shards, "_MOST_BYTES", most)
    monkeypatch.setattr(every, "DISK", most)
    with pytest.raises(UsageError, match="or keep fewer places"):
        unbraid.scan(network(1), "all", IMAGES, tmp_path / "none", places=20000)
    with pytest.warns(UserWarning, match="--layer 2 "):
        scans = unbraid.scan(network(1), "all", IMAGES, tmp_path, places=200)
    assert list(scans) == ["0"]


def test_all_is_every_layer_and_the_command_told_makes_what_is_left_out(tmp_path, monkeypatch):
    model = network()
    every_one = unbraid.scan(model, "all", IMAGES, tmp_path / "all", batch_size=4)
    assert list(every_one) == list(unbraid.scan(model, "*", IMAGES, tmp_path / "star"))
    monkeypatch.setattr(every, "DISK", 3 * scan_bytes(every_one["1"].layer, len(IMAGES), 8))
    with pytest.warns(UserWarning, match="layers? left out") as told:
        some = unbraid.scan(model, "all", IMAGES, tmp_path / "some", batch_size=4)
    (text,) = (str(one.message) for one in told if "left out" in str(one.message))
    words = shlex.split(re.search(r"with (--layer .*) in place", text)[1])
    assert 0 < len(some) < len(every_one)
    unbraid.scan(model, words[1::2], IMAGES, tmp_path / "some", batch_size=4)
    for name in every_one:
        assert_same_files(tmp_path / "all" / name, tmp_path / "some" / name)
    monkeypatch.setattr(every, "DISK", 1)
    with pytest.raises(UsageError, match="name the layers to scan"):
        unbraid.scan(model, "all", IMAGES, tmp_path / "none")


def test_a_layer_of_the_name_all_is_that_layer(tmp_path):
    model = nn.Sequential()
    model.add_module("all", nn.Conv2d(3, 4, 1))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(4 * 42, N_CLASSES))
    scan = unbraid.scan(model.double(), "all", IMAGES, tmp_path)
    assert (scan.layer.name, scan.path) == ("all", tmp_path)
