"""What fits look at: the same however much memory holds, and half of it where a scan is large."""

import pytest
import torch

import unbraid
from checks import assert_same_split
from tiny_networks import SyntheticImages, build
from unbraid.base import progress
from unbraid.splitting import cross_validation, least_squares, material, quantiles, silence

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
        "Choosing the penalty: ",
        "Choosing silence: ",
        f"Splitting: {n_concepts} of {n_concepts}",
        "How usual responses are: 3 of 3",
    ):
        assert line in told
    found = unbraid.find(scan, concepts="clusters", progress=True)
    told = capsys.readouterr().err
    assert "Looking for top images: 300 of 300" in told
    assert f"Clustering: {scan.layer.n_out} of {scan.layer.n_out}" in told
    unbraid.split(scan, unbraid.find(scan, channels=OWN), method="published", progress=True)
    assert "Choosing rho: 300 of 300" in capsys.readouterr().err


def test_split_reads_what_clusters_and_classes_share(case, monkeypatch):
    scan, _ = case
    index = torch.cat(list(scan.columns("index")))
    label = torch.cat(list(scan.columns("label")))
    groups = {5: [index[label == number].tolist() for number in (0, 1)]}
    by_hand = unbraid.split(scan, unbraid.find(scan, images=groups))
    by_class = unbraid.split(scan, unbraid.find(scan, channels={5: [[0], [1]]}))
    torch.testing.assert_close(by_hand[5].masks, by_class[5].masks)


def test_fits_look_at_no_more_images_and_channels_than_the_bounds(case, monkeypatch):
    """And of a portion before nothing is kept that the next one does not need."""
    scan, found = case
    for module, name, most in (
        (cross_validation, "_N_CHANNELS", 2),
        (cross_validation, "_N_IMAGES", 6),
        (least_squares, "N_IMAGES", 9),
        (material, "N_SHAPED", 4),
        (material, "_BYTES_AT_ONCE", 1),
    ):
        monkeypatch.setattr(module, name, most)
    looked, read = [], material.Reader.read
    n_images = []
    reduce = material.moment
    monkeypatch.setattr(material, "moment", lambda x: n_images.append(len(x)) or reduce(x))

    def told(reader, wanted, channels):
        chosen = read(reader, wanted, channels)
        assert reader.known.keys() == wanted
        looked.append((list(channels), {len(kind.some.pooled) for kind in reader.known.values()}))
        return chosen

    monkeypatch.setattr(material.Reader, "read", told)
    unbraid.split(scan, found)
    assert looked == [([o], {4}) for o in (1, 5, 1, 4, 5)]  # two choose, three are split
    assert set(n_images) == {6, 9}


def test_percentiles_are_of_no_more_images_than_the_bounds(case, monkeypatch):
    scan, _ = case
    each = scan.layer.groups * scan.layer.n_taps
    for images, numbers, n in ((100, 2**40, 100), (2**40, 50 * each, 50), (2**40, 2**40, 300)):
        monkeypatch.setattr(quantiles, "_MOST_IMAGES", images)
        monkeypatch.setattr(quantiles, "_MOST_NUMBERS", numbers)
        assert [len(column) for column in quantiles._spaced_inputs(scan)] == [n, n]
