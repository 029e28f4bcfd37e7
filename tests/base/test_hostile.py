"""Files that mean harm: refused in one sentence, before they cost anything."""

import json
import os
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from sources import png
from torch import Tensor

import unbraid
from handmade import write_scan
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.images.pictures import read_picture
from unbraid.running.check import check
from unbraid.scanning.fields import no_records
from unbraid.scanning.manifest import MAX_CLASSES
from unbraid.scanning.records import shard_path, write_shard

GONE = object()


@pytest.fixture
def scan(tmp_path):
    shares = torch.full((21, 3), 1 / 3, dtype=torch.float64)
    return write_scan(tmp_path / "scan", shares=shares, labels=[n % 3 for n in range(21)])


def lie(scan, **entries):
    """Give the manifest, or the layer in it, other entries, or leave some out."""
    path = scan.path / "manifest.json"
    content = json.loads(path.read_text())
    layer = {key: entries.pop(key) for key in list(entries) if key in content["layer"]}
    content = {**content, **entries, "layer": {**content["layer"], **layer}}
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not GONE}))
    return scan.path


def forge(path, **changes):
    """Other tensors, with checksums that fit."""
    tensors, _ = read_tensors(path)
    write_tensors(path, {**tensors, **{k: make(tensors[k]) for k, make in changes.items()}}, {})


def test_open_scan_of_a_billion_claimed_shards_costs_nothing(scan):
    folder = lie(scan, n_images=10**12, shard_size=1000)
    with pytest.raises(RunError, match="999999997 of 1000000000 shards"):
        unbraid.open_scan(folder)
    assert check(folder).missing == [f"999,999,997 shards of 1000000000 in {folder}"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"shard_size": 0}, "shard_size is 0"),
        ({"n_images": 0}, "n_images is 0"),
        ({"threads": 10**9}, "threads is 1000000000"),
        ({"class_names": [""] * (MAX_CLASSES + 1)}, "number of class_names is 1048577"),
        ({"strange": 1}, "unknown entries"),
        ({"kernel": [1] * 9}, "not of one to three numbers"),
        ({"stride": [0]}, "stride is 0"),
        ({"groups": 0}, "groups is 0"),
        ({"groups": 2}, "cannot be divided among the groups"),
        ({"pad_mode": "x" * 10**6}, "pad_mode is none that is known"),
        ({"n_images": GONE}, "missing required field `n_images`"),
        ({"schema": [[]] * 1000}, r"schema \[\[\], \[\]"),
    ],
)
def test_open_scan_of_a_manifest_that_cannot_be_is_refused(entries, message, scan):
    with pytest.raises(RunError, match=message) as caught:
        unbraid.open_scan(lie(scan, **entries))
    assert len(str(caught.value)) < 500


def test_a_pipe_is_not_waited_for(scan, tmp_path):
    for path in (scan.path / "manifest.json", scan.path / "layer.safetensors"):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(RunError, match="it is no file"):
        unbraid.open_scan(scan.path)
    with pytest.raises(RunError, match="it is no file"):
        read_tensors(scan.path / "layer.safetensors")
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="no regular file"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("label", lambda x: x + 2**62, "'label' with numbers that cannot be"),
        ("label", lambda x: x.double(), "'label' that is no list of whole numbers"),
        ("prediction", lambda x: x + 2**40, "'prediction' with numbers that cannot be"),
        ("n_positions", lambda x: x * 0, "'n_positions' with numbers that cannot be"),
        ("pooled", lambda x: x * float("nan"), "'pooled' that is not of finite numbers"),
        ("pooled", lambda x: x.long(), "'pooled' that is not of finite numbers"),
        ("pooled", lambda x: x.half(), "'pooled' of another type than the network's"),
        ("pooled", lambda x: x.new_zeros(2**40, 0), "'pooled' of a wrong shape"),
        ("share_value", lambda x: x + 5, "'share_value' with numbers that cannot be"),
        ("share_value", lambda x: x[:-1], "holds shares of no image"),
        ("share_start", lambda x: x[:0], "holds shares of no image"),
        ("index", lambda x: x - 100, "'index' with numbers that cannot be"),
        ("broken", lambda x: x.new_zeros(10**6), "'broken' of a wrong shape"),
    ],
)
def test_shards_of_records_that_cannot_be_are_refused(name, change, message, scan):
    forge(shard_path(scan.path, 1), **{name: change})
    with pytest.raises(RunError, match=message):
        list(scan.shards())
    if name in ("label", "prediction", "share_start"):  # which are checked when read alone too
        with pytest.raises(RunError, match="shard-000001"):
            list(scan.columns(name))
    if name.startswith("share_"):
        with pytest.raises(RunError, match="shard-000001"):
            unbraid.find(scan, tau="auto")


def test_split_of_maps_of_zeros_is_finite_and_of_another_type_refused(tmp_path):
    scan = unbraid.scan(build("uneven"), "layer", SyntheticImages(9), tmp_path, positions=True)
    found = unbraid.find(scan, channels={0: [[0], [1, 2]]})
    forge(shard_path(scan.path, 0), input_map=torch.zeros_like)
    assert unbraid.split(scan, found).channels[0].masks.isfinite().all()
    forge(shard_path(scan.path, 0), input_map=Tensor.half)
    with pytest.raises(RunError, match="'input_map' of another type than the network's"):
        unbraid.split(scan, found, method="published")


def test_find_in_a_scan_whose_labels_go_beyond_its_classes_does_not_take_all_memory(scan):
    """Sums by class have a row for every number up to the largest label."""
    wide = replace(scan.manifest, layer=replace(scan.layer, n_in=2**20))
    assert wide.most_classes * (wide.layer.n_taps + wide.layer.n_out) <= 2**30
    forge(shard_path(scan.path, 0), label=lambda x: x + scan.manifest.most_classes - 2)
    with pytest.raises(RunError, match="'label'"):
        unbraid.find(scan)


def test_open_scan_of_weights_that_do_not_fit_is_refused(scan):
    forge(scan.path / "layer.safetensors", weight=lambda x: x[:, :1])
    with pytest.raises(RunError, match="no 'weight' of the layer's shape"):
        unbraid.open_scan(scan.path)
    half = {"weight": lambda x: torch.zeros(3, 2).half(), "bias": Tensor.half}
    forge(scan.path / "layer.safetensors", **half)
    with pytest.raises(RunError, match="weights of another type"):
        unbraid.open_scan(scan.path)
    assert "layer.safetensors" in check(scan.path).damaged[0]


def test_read_tensors_of_a_header_that_lies_is_refused(scan):
    path = scan.path / "layer.safetensors"
    content = path.read_bytes()
    heads = [struct.pack("<Q", told) + content[8:] for told in (2**63, 2**40, 0)]
    for lying in (*heads, content.replace(b'"shape":[3,2]', b'"shape":[9,2]')):
        assert lying != content
        path.write_bytes(lying)
        with pytest.raises(RunError, match="cannot be read"):
            read_tensors(path, ["weight"])


def test_scan_that_would_be_refused_when_opened_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("unbraid.scanning.manifest._MOST_SUMS", 2 * (8 + 6))  # of 4 classes
    with pytest.raises(UsageError, match="number of class_names is 4, not 0 to 2"):
        unbraid.scan(build("1x1"), "layer", SyntheticImages(4), tmp_path / "scan")
    assert not (tmp_path / "scan").exists()


def test_find_in_a_scan_of_broken_images_alone_finds_nothing(tmp_path):
    scan = unbraid.scan(build("1x1"), "layer", SyntheticImages(9), tmp_path)
    records = replace(no_records(scan.layer, positions=False), broken=torch.arange(9))
    write_shard(scan.path, 0, records)
    assert unbraid.find(scan).pairs == ()
    assert unbraid.find(scan, concepts="clusters").concepts == {}
    with pytest.raises(DataError, match="holds no image to choose tau by"):
        unbraid.find(scan, tau="auto")


def test_read_picture_that_would_grow_or_run_is_refused(tmp_path):
    path = tmp_path / "a.png"
    for content, message in (
        (png(np.zeros((0, 0)), 0, 8, (40_000, 40_000)), "decompression bomb"),
        (png(np.zeros((0, 0)), 0, 8, (2**31 - 1, 1)), "cannot be read"),
        (png(np.zeros((1, 500_000)), 0, 8, (10**6, 1)), "sides are 1000000 and 1 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known kind"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_picture(path)
    path.write_bytes(png(np.zeros((1, 100)), 0, 8, (200, 1)))  # a strip that is not too long
    assert read_picture(path).size == (200, 1)
