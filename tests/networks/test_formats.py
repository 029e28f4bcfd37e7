"""Formats in which a network runs faster: which networks, and what a scan makes of it."""

import json

import pytest
import torch
from torch import nn

import checks
import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import RunError
from unbraid.networks import formats
from unbraid.networks.formats import faster_channels_last, faster_in_bfloat16

CONVOLUTION = nn.Conv2d(4, 8, 3)
KINDS = [
    (CONVOLUTION, True),
    (nn.Sequential(nn.Linear(3, 3), nn.Conv2d(8, 8, 3, groups=8)), True),
    (nn.Conv2d(4, 8, 1), True),
    (nn.Conv2d(3, 8, 16, stride=16), False),  # patches
    (nn.Linear(3, 3), False),
    (nn.Conv1d(3, 3, 3), False),
    (nn.Conv2d(4, 8, 3).double(), False),
    (nn.Conv2d(4, 8, 3, device="meta"), False),
    (nn.LazyConv2d(8, 3), False),
]


@pytest.mark.parametrize(("network", "faster"), KINDS)
def test_channels_last_is_chosen_by_kind(network, faster):
    assert faster_channels_last(nn.Sequential(network)) is faster


def test_channels_last_needs_the_library_it_was_measured_with(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not faster_channels_last(CONVOLUTION)


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_for_float32_on_a_processor_that_has_it(has, monkeypatch):
    monkeypatch.setattr(formats.torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert faster_in_bfloat16(CONVOLUTION) is has
    for other in (nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2, device="meta"), nn.ReLU()):
        assert not faster_in_bfloat16(other)


def scan(out, images=1100, **options):
    network = build("3x3", torch.float32)
    return unbraid.scan(
        network, "layer", SyntheticImages(images, dtype=torch.float32), out, **options
    )


def test_a_scan_keeps_its_choice_in_the_manifest_and_goes_on_with_it(tmp_path):
    chosen = {None: True, True: True, False: False}
    for asked, made in chosen.items():
        folder = tmp_path / str(asked)
        done = scan(folder, channels_last=asked)
        assert done.manifest.channels_last is made
        before = {path: path.read_bytes() for path in folder.iterdir()}
        (folder / "shard-000001.safetensors").unlink()
        scan(folder)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        with pytest.raises(RunError, match="whether it runs channels last"):
            scan(folder, channels_last=not made)
    checks.assert_same_tensors(tmp_path / "None", tmp_path / "True")
    one, other = (unbraid.open_scan(tmp_path / name) for name in ("True", "False"))
    for ours, theirs in zip(one.shards(), other.shards(), strict=True):
        torch.testing.assert_close(ours.pooled, theirs.pooled)


def test_a_scan_begun_before_there_was_a_choice_goes_on_as_it_was(tmp_path):
    scan(tmp_path, channels_last=False)
    path, shard = tmp_path / "manifest.json", tmp_path / "shard-000001.safetensors"
    entries, before = json.loads(path.read_text()), shard.read_bytes()
    del entries["channels_last"]
    path.write_text(json.dumps(entries))
    shard.unlink()
    scan(tmp_path)
    assert shard.read_bytes() == before
