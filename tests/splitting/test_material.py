"""What fits look at: the same however much memory holds, and half of it where a scan is large."""

import pytest
import torch

import unbraid
from checks import assert_same_split
from tiny_networks import SyntheticImages, build
from unbraid.base import progress
from unbraid.splitting import material, silence

OWN = {1: [[0], [1]], 4: [[0, 1], [2]], 5: [[0], [1], [2]]}


@pytest.fixture(params=["3x3", "groups"])
def case(request, tmp_path):
    """A scan of several shards, and findings of channels that share classes."""
    images = SyntheticImages(300)  # shards of 128
    scan = unbraid.scan(build(request.param), "layer", images, tmp_path, positions=True)
    return scan, unbraid.find(scan, channels=OWN)


def test_portions_of_channels_make_the_same_split(case, monkeypatch):
    scan, found = case
    reads = []
    read = material.Reader.read

    def told(reader, wanted, channels):
        reads.append(list(channels))
        return read(reader, wanted, channels)

    monkeypatch.setattr(material.Reader, "read", told)
    whole = unbraid.split(scan, found)
    assert reads[-1] == list(OWN)
    reads.clear()
    monkeypatch.setattr(material, "_BYTES_AT_ONCE", 1)
    assert_same_split(unbraid.split(scan, found), whole)
    assert reads[-len(OWN) :] == [[o] for o in OWN]
    monkeypatch.setattr(material, "N_SHAPED", 5)
    with pytest.raises(AssertionError):
        assert_same_split(unbraid.split(scan, found), whole)


def test_half_as_many_images_of_a_large_scan_are_looked_at(case, monkeypatch):
    scan, found = case
    monkeypatch.setattr(silence, "N_TOP", 6)
    monkeypatch.setattr(silence, "N_EVEN", 8)
    members = found.members_in(scan)
    for largest, n_top, step in ((300, 6, 37), (299, 3, 75)):
        monkeypatch.setattr(silence, "_LARGE", largest)
        rest = silence.choose_rest(members, found.concepts)
        for place, weight in zip(rest.place.values(), rest.weight.values(), strict=True):
            top = place[weight == 1]
            assert len(top) == n_top
            even = place[weight != 1]
            assert len(even)
            assert (even % step == 0).all()


def test_split_and_find_tell_how_far_they_are_only_if_asked(case, monkeypatch, capsys):
    scan, _ = case
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    for asked in ({}, {"progress": False}, {"progress": True}):
        found = unbraid.find(scan, channels=OWN, **asked)
        unbraid.split(scan, found, **asked)
        told = capsys.readouterr().err
        assert bool(told) == bool(asked.get("progress"))
    n_concepts = sum(map(len, OWN.values()))
    for line in (
        "Reading the scan: 300 of 300",
        "Judging chance: 300 of 300",
        "Looking for what else excites channels: 300 of 300",
        f"Splitting: {n_concepts} of {n_concepts}",
        "How usual responses are: 3 of 3",
    ):
        assert line in told
    found = unbraid.find(scan, concepts="clusters", progress=True)
    assert f"Clustering: {scan.layer.n_out} of {scan.layer.n_out}" in capsys.readouterr().err


def test_split_reads_what_clusters_and_classes_share(case, monkeypatch):
    scan, _ = case
    index = torch.cat(list(scan.columns("index")))
    label = torch.cat(list(scan.columns("label")))
    groups = {5: [index[label == number].tolist() for number in (0, 1)]}
    by_hand = unbraid.split(scan, unbraid.find(scan, images=groups))
    by_class = unbraid.split(scan, unbraid.find(scan, channels={5: [[0], [1]]}))
    torch.testing.assert_close(by_hand[5].masks, by_class[5].masks)
