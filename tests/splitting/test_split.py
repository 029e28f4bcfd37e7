"""What a split knows, what cannot be split, and files that are no split."""

import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.linalg import LinAlgError

import unbraid
from checks import assert_same_split
from handmade import plant
from tiny_networks import SyntheticImages, build
from unbraid import Split
from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.scanning.records import read_shard, write_shard
from unbraid.splitting.box_solver import Gram
from unbraid.splitting.conjugate import Common

OWN = {1: [[0], [1]], 5: [[2, 0], [3]]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    home, network, images = tmp_path_factory.mktemp("home"), build("3x3"), SyntheticImages(14)
    scan = unbraid.scan(network, "layer", images, home / "scan")  # without positions
    some = unbraid.scan(network, "layer", images, home / "some", classes=[0, 1, 2])
    other = unbraid.scan(network, "head", images, home / "other")
    found = unbraid.find(scan, tau=0.04, p=0.6, gamma=0.3, channels=OWN)
    split = unbraid.split(scan, found)
    return SimpleNamespace(scan=scan, some=some, other=other, found=found, split=split)


def test_a_split_says_what_it_was_made_of_and_is_the_same_from_an_earlier_one(world):
    split = world.split
    assert split.method == "least_squares"
    assert split.settings == {"tau": 0.04, "p": 0.6, "gamma": 0.3}
    assert (split.weights, split.layer) == (world.scan.manifest.weights, world.scan.layer)
    assert split.name((2, 0)) == "class 2, class 0"
    with pytest.raises(KeyError, match="channel 7 was not split"):
        split[7]
    _, columns, *rows = str(split).splitlines()
    assert columns.split() == ["channel", "concept", "classes", "weight", "kept"]
    assert [row.split()[:2] for row in rows] == [["1", "0"], ["1", "1"], ["5", "0"], ["5", "1"]]
    again = unbraid.split(world.scan, world.found, start=world.split)
    for part, twin in zip(again.channels, world.split.channels, strict=True):
        # The fit ends where a step would move no mask further.
        torch.testing.assert_close(part.masks, twin.masks, rtol=0, atol=3e-4)


def rescan(world, folder, change):
    """The scan with other numbers, from a function of pooled inputs (N, G, J)."""
    shutil.copytree(world.scan.path, folder)
    for shard in range(world.scan.n_shards):
        records = read_shard(folder, shard)
        write_shard(folder, shard, replace(records, pooled=change(records.pooled)))
    return unbraid.open_scan(folder)


def test_inputs_too_large_for_float32_are_fitted_as_others_are(world, tmp_path):
    masks = []
    for scale in (2.0**30, 2.0**66, 2.0**100):  # beside which biases count nothing
        scan = rescan(world, tmp_path / str(scale), lambda pooled, by=scale: by * pooled)
        masks.append([part.masks for part in unbraid.split(scan, world.found).channels])
    for own in masks[1:]:
        for some, others in zip(own, masks[0], strict=True):
            torch.testing.assert_close(some, others, rtol=0, atol=0.01)


def put(value, *at):
    def change(pooled):
        changed = pooled.clone()
        changed[at] = value
        return changed

    return change


@pytest.mark.parametrize(
    "change",
    [put(v) for v in (0.0, 1.0, 1e-30, 1e30, -1e30)]  # all of them
    + [put(v, slice(1, 2)) for v in (0.0, 1e10, 1e18, 1e35)]  # an image of each shard
    + [put(v, ..., 3) for v in (0.0, 1e10, 1e31)]  # a tap
    + [put(v, 2, 0, 3) for v in (1e20, 1e30, 3e38)],
)
def test_inputs_that_are_far_apart_dead_or_alike_are_fitted(change, world, tmp_path):
    scan = rescan(world, tmp_path / "scan", change)
    split = unbraid.split(scan, world.found)
    assert all(((part.masks >= 0) & (part.masks <= 1)).all() for part in split.channels)
    assert all(math.isfinite(k) for part in split.channels for k in part.info.values())


def test_masks_that_are_no_answer_are_told(world, tmp_path):
    scan = rescan(world, tmp_path / "scan", lambda pooled: 1e-12 * pooled)
    with pytest.warns(UserWarning, match="Masks of . channels?, such as ., are not the best ones"):
        unbraid.split(scan, world.found)


def test_what_cannot_be_factorised_is_refused_in_one_sentence(world, monkeypatch):
    def fail(*_):
        raise LinAlgError("no")

    monkeypatch.setattr(Gram, "solver", fail)
    monkeypatch.setattr(Common, "of", lambda *_: None)
    with pytest.raises(DataError, match="What feeds channel 1 has numbers too far apart in size"):
        unbraid.split(world.scan, world.found)


def test_split_refuses_what_makes_no_sense_and_of_no_finding_tells_the_hint(world):
    for arguments, message in (
        *(
            ({"method": "published", "rho": r}, f"rho is {r:g}; it must lie above 0")
            for r in (0.0, -0.5, 1.05, math.nan)
        ),
        ({"method": "magic"}, "no method 'magic'"),
        ({"rho": 0.7}, "rho belongs to the published method"),
        ({"method": "published", "rho": 0.7, "start": "split"}, "start belongs to least squares"),
        ({"method": "published"}, r"needs positions: .*positions=True.* or give rho"),
        ({"scan": "some"}, "no image of class class 3"),
        ({"scan": "other"}, "pass a scan of the same network and layer"),
        ({"everything": "other"}, "pass a scan of the same network and layer"),
        ({"start": "of other"}, "start is a split of layer 'head', the scan of 'layer'"),
    ):
        known = {**vars(world), "of other": replace(world.split, layer=world.other.layer)}
        given = {"scan": "scan", "found": "found", **arguments}
        given = {name: known.get(value, value) for name, value in given.items()}
        with pytest.raises(UsageError, match=message):
            unbraid.split(**given)
    nothing = unbraid.find(world.scan, gamma=-1.0)
    with pytest.raises(UsageError, match=f"nothing to split: .*{re.escape(nothing.hint)}$"):
        unbraid.split(world.scan, nothing)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A split of clusters."""
    home = tmp_path_factory.mktemp("saved")
    scan = plant(home).scan
    split = unbraid.split(scan, unbraid.find(scan, concepts="clusters"))
    split.save(home / "split.safetensors")
    assert_same_split(Split.load(home / "split.safetensors"), split)
    return home / "split.safetensors"


def test_a_description_that_cannot_be_is_refused(saved, tmp_path):
    for path, value, message in (
        ("schema", 2, "schema 2, this version reads 1"),
        ("layer.n_out", 0, ""),
        ("settings", {}, "tau is inf"),
        ("class_names", 7, "class_names"),
        ("channels.0.channel", 9, ""),
        ("channels.1.channel", 0, "a channel stands there twice"),
        ("channels.0.concepts", [[4, 5]], "the concepts of channel 0 are not two or more groups"),
        ("channels.0.concepts", [[4], [10**12]], "a class is 1000000000000"),
        ("channels.0.concepts", [[4], [5], [6]], "the masks of channel 0 do not fit"),
        ("clusters.4.channel", 9, "a cluster's channel is 9"),
        ("clusters.4.place", 9, "a cluster's place is 9"),
        ("clusters.4.alike", 2.0, "the least cosine of a cluster's images is 2"),
        ("clusters.4.named", [-1], "a class is -1"),
        ("clusters.-1", {"channel": 0, "place": 0, "least": 0.0}, "a cluster's number is -1"),
        ("clusters.99", {"channel": 0, "place": 0, "least": 0.0}, "a cluster's number is 99"),
    ):
        tensors, about = read_tensors(saved)
        *keys, last = path.split(".")
        place = about
        for key in keys:
            place = place[int(key) if isinstance(place, list) else key]
        place[last] = value
        write_tensors(tmp_path / "split.safetensors", tensors, about)
        with pytest.raises(RunError, match=f"is not a split that can be read .*{message}"):
            Split.load(tmp_path / "split.safetensors")


def test_tensors_that_do_not_fit_are_refused(saved, tmp_path):
    for name, corrupt, message in (
        ("weight", lambda x: x * math.nan, "'weight' is not of finite numbers"),
        ("weight", lambda x: x[:, 1:], "weight and bias do not fit"),
        ("masks.0", lambda x: x + 2, "the masks of channel 0 do not fit"),
        ("centres.0", lambda x: x[:, 1:], "the centres of channel 0 do not fit"),
    ):
        tensors, about = read_tensors(saved)
        tensors[name] = corrupt(tensors[name])
        write_tensors(tmp_path / "split.safetensors", tensors, about)
        with pytest.raises(RunError, match=f"is not a split that can be read .*{message}"):
            Split.load(tmp_path / "split.safetensors")


def test_a_split_without_origin_and_nearness_is_that_of_an_earlier_version(saved, tmp_path):
    tensors, about = read_tensors(saved)
    for entry in about["clusters"].values():
        del entry["alike"], entry["named"]
    older = {name: tensor for name, tensor in tensors.items() if not name.startswith("origin")}
    assert len(older) < len(tensors)
    write_tensors(tmp_path / "split.safetensors", older, about)
    for cluster in Split.load(tmp_path / "split.safetensors").clusters.values():
        assert (cluster.origin, cluster.alike, cluster.named) == (None, -1.0, ())
    wrong = {**older, "origin.0": torch.ones(3).double()}
    write_tensors(tmp_path / "split.safetensors", wrong, about)
    with pytest.raises(RunError, match="the origin of channel 0 does not fit its layer"):
        Split.load(tmp_path / "split.safetensors")
