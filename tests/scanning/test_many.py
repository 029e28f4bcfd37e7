"""Several scans read as one: the same as a scan of all images, whatever the order of folders."""

import os
import shutil
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch

import unbraid
from checks import assert_bit_equal, assert_close
from handmade import scan_of_causes
from tiny_networks import N_CLASSES, SyntheticImages, build
from unbraid.base.errors import RunError, UsageError
from unbraid.base.files import write_whole
from unbraid.scanning.manifest import read_manifest
from unbraid.scanning.records import COLUMNS
from unbraid.scanning.scan import scan_into

N_IMAGES = 90
CUTS = (0, 24, 41, N_IMAGES)
GROUP_OF = [n // 2 if n < 60 else 500 + n for n in range(N_IMAGES)]


class Part(SyntheticImages):
    """Some of the images, which have names."""

    def __init__(self, wanted, *, named=True, grouped=False):
        super().__init__(N_IMAGES)
        self.images = self.images[wanted]
        self.targets = [self.targets[n] for n in wanted]
        if named:
            self.ids = [f"image-{n}" for n in wanted]
        if grouped:
            self.groups = [GROUP_OF[n] for n in wanted]


def scan_of(folder, wanted, *, network=None, layer="layer", named=True, grouped=False, **options):
    network = build("1x1") if network is None else network
    dataset = Part(list(wanted), named=named, grouped=grouped)
    options = {"batch_size": 8, "threads": 1} | options
    return unbraid.scan(network, layer, dataset, folder, **options)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("unbraid.scanning.scan.images_per_shard", lambda _: 16)


@pytest.fixture
def folders(small_shards, tmp_path):
    """Three scans of all images together."""
    parts = [range(a, b) for a, b in pairwise(CUTS)]
    for name, part in zip("abc", parts, strict=True):
        scan_of(tmp_path / f"scan-{name}", part, grouped=True)
    return [tmp_path / f"scan-{name}" for name in "abc"]


def columns_by_id(scan, names):
    """What a scan holds of each image, by its id."""
    found = {}
    for records in scan.shards():
        for k, one in enumerate(records.ids):
            start, end = records.share_start[k : k + 2].tolist()
            shares = records.share_channel[start:end], records.share_value[start:end]
            found[one] = [getattr(records, name)[k] for name in names] + list(shares)
    return found


def test_images_are_those_of_all_scans_each_under_a_number_of_its_own(folders, tmp_path):
    many, whole = (
        unbraid.open_scan(folders),
        scan_of(tmp_path / "whole", range(N_IMAGES), grouped=True),
    )
    names = ("label", "prediction", "n_positions", "pooled")
    ours, all_of_them = columns_by_id(many, names), columns_by_id(whole, names)
    assert ours.keys() == all_of_them.keys()
    for one, own in ours.items():
        for mine, other in zip(own, all_of_them[one], strict=True):
            assert_close(mine, other)
    index = torch.cat(list(many.columns("index")))
    assert index.tolist() == sorted(set(index.tolist()))
    assert many.ids() == dict(
        zip(index.tolist(), [one for r in many.shards() for one in r.ids], strict=True)
    )
    assert many.manifest.n_images == N_IMAGES == len(index)
    # Groups part the images of each scan as before, and none is shared by two scans.
    groups = {one: int(g) for r in many.shards() for one, g in zip(r.ids, r.group, strict=True)}
    ends = [0, *CUTS[1:]]
    part = [sum(n >= end for end in ends[1:]) for n in range(N_IMAGES)]
    same = {(n, m): GROUP_OF[n] == GROUP_OF[m] and part[n] == part[m]
            for n in range(N_IMAGES) for m in range(N_IMAGES)}  # fmt: skip
    assert all(
        (groups[f"image-{n}"] == groups[f"image-{m}"]) == both for (n, m), both in same.items()
    )


def test_every_way_of_reading_tells_the_same(folders):
    many = unbraid.open_scan(folders)
    shards = list(many.shards())
    assert many.n_shards == len(shards) == sum(part.n_shards for part in many.parts)
    for name in COLUMNS:
        kept = [getattr(records, name) for records in shards]
        in_pairs = {COLUMNS[name].per, COLUMNS[name].starts} & {"id", "position"}
        if kept[0] is not None and not in_pairs:
            assert all(map(torch.equal, kept, many.columns(name)))
    for light, full in zip(many.light_shards(), shards, strict=True):
        assert torch.equal(light.index, full.index)
        assert torch.equal(light.group, full.group)
    only_group = [own["group"] for own in many.tensors("group")]
    assert all(map(torch.equal, only_group, (records.group for records in shards)))


def test_images_without_groups_beside_some_with_are_on_their_own(small_shards, tmp_path):
    scan_of(tmp_path / "a", range(0, 30), grouped=True)
    scan_of(tmp_path / "b", range(30, 60))
    many = unbraid.open_scan([tmp_path / "a", tmp_path / "b"])
    groups = torch.cat([own["group"] for own in many.tensors("group")])
    assert torch.equal(groups, torch.cat([records.group for records in many.shards()]))
    assert torch.equal(groups, torch.cat([records.group for records in many.light_shards()]))
    assert len(groups.unique()) == 15 + 30


def everything(scan, path, dataset):
    """All that is made of a scan, down to the page."""
    concepts = {0: [[0], [1, 2]], 3: [[0, 1], [3]]}
    found = unbraid.find(scan, channels=concepts, tau=0.01)
    split = unbraid.split(scan, found)
    evaluation = unbraid.evaluate(split, scan)
    counted = unbraid.sensitivity(scan, taus=[0.01], ps=[0.5], gammas=[0.5])
    given = {"split": split, "evaluation": evaluation, "train_scan": scan, "sensitivity": counted}
    unbraid.report(path, scan=scan, found=found, dataset=dataset, **given)
    return found, split, evaluation, path.read_text()


def test_order_and_pattern_do_not_matter_and_results_are_those_of_one_scan(folders, tmp_path):
    dataset = Part(range(N_IMAGES))
    one = everything(scan_of(tmp_path / "whole", range(N_IMAGES)), tmp_path / "whole.html", dataset)
    answers = []
    ways = [folders, folders[::-1], str(tmp_path / "scan-*")]
    for k, way in enumerate(ways):
        answers.append(everything(unbraid.open_scan(way), tmp_path / f"{k}.html", dataset))
    found, split, evaluation, page = answers[0]
    for other in answers[1:]:
        assert other[0] == found
        assert str(other[2]) == str(evaluation)
        for mine, theirs in zip(split.channels, other[1].channels, strict=True):
            assert_bit_equal(mine.masks, theirs.masks)
        assert other[3] == page
    assert found.concepts == one[0].concepts
    # Which images are near misses and which are sampled may differ, so that masks differ a little.
    for mine, theirs in zip(split.channels, one[1].channels, strict=True):
        assert float((mine.masks - theirs.masks).abs().max()) < 0.2
    assert "scan-a (24)" in page
    assert "scan-c (49)" in page


def test_arvs_and_uses_are_those_of_one_scan_of_all(small_shards, tmp_path):
    parts = [scan_of(tmp_path / name, range(k, N_IMAGES, 2)) for k, name in enumerate("ab")]
    many = unbraid.open_scan([part.path for part in parts])
    whole = scan_of(tmp_path / "whole", range(N_IMAGES))
    options = {"tau": 0.01, "p": 0.1, "gamma": 1.0}
    ours, theirs = unbraid.find(many, **options), unbraid.find(whole, **options)
    assert [p[:3] for p in map(tuple_of, ours.pairs)] == [
        p[:3] for p in map(tuple_of, theirs.pairs)
    ]
    for mine, other in zip(ours.pairs, theirs.pairs, strict=True):
        assert mine.cosine == pytest.approx(other.cosine, abs=1e-9)
        assert (mine.use1, mine.use2) == (other.use1, other.use2)


def tuple_of(pair):
    return pair.channel, pair.class1, pair.class2


def test_what_varies_within_images_is_kept_of_each_scan_by_its_size(folders):
    many = unbraid.open_scan(folders)
    largest = max(len(part.spread(0)) for part in many.parts)
    assert 0 < len(many.spread(0)) <= largest + len(folders)
    rows = {tuple(row.tolist()) for part in many.parts for row in part.spread(0)}
    assert {tuple(row.tolist()) for row in many.spread(0)} <= rows
    assert len(many.spread(0).unique(dim=0)) == len(many.spread(0))


def test_manifest_tells_all_sources(folders):
    manifest = unbraid.open_scan(folders).manifest
    told = {one["folder"]: one["n_images"] for one in manifest.source["scans"]}
    assert told == dict(zip(map(str, folders), [24, 17, 49], strict=True))
    data = {one["data"] for one in manifest.source["scans"]}
    assert data == {read_manifest(folder).data for folder in folders}
    assert manifest.data not in data
    assert unbraid.open_scan(folders[:2]).manifest.data != manifest.data
    assert manifest.classes is None
    assert manifest.indices == ""


def test_a_part_of_a_data_set_stays_a_part(small_shards, tmp_path):
    for name, options in {"a": {"classes": [0, 1]}, "b": {"classes": [2, 1]}, "c": {}}.items():
        start = 30 * "abc".index(name)
        scan_of(tmp_path / name, range(start, start + 30), **options)
    both = unbraid.open_scan([tmp_path / "a", tmp_path / "b"]).manifest
    assert both.classes == (0, 1, 2)
    assert both.indices == ""
    mixed = unbraid.open_scan([tmp_path / "a", tmp_path / "c"]).manifest
    assert mixed.classes is None
    assert mixed.indices


OTHERS = {
    "weights": ({"network": "other"}, "the network's weights"),
    "layer": ({"layer": "stem"}, "the layer"),
    "labels": ({"labels": "predicted"}, "whether labels are given or predicted"),
    "least share": ({"min_share": 0.05}, "the smallest share kept"),
    "positions": ({"positions": True}, "whether positions are kept"),
    "bfloat16": ({"autocast": True}, "whether it runs in bfloat16"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_scans_made_otherwise_are_refused_in_one_sentence(what, small_shards, tmp_path):
    options, words = OTHERS[what]
    if "network" in options:
        network = build("1x1")
        torch.nn.init.normal_(network.head.weight)
        options = {"network": network}
    scan_of(tmp_path / "a", range(0, 30))
    scan_of(tmp_path / "b", range(30, 60), **options)
    for way in permutations([tmp_path / "a", tmp_path / "b"]):
        with pytest.raises(RunError, match=rf"difference in ({words}|.*, {words}).*; name") as told:
            unbraid.open_scan(way)
        assert "\n" not in str(told.value)


def test_threads_and_shards_may_differ(small_shards, monkeypatch, tmp_path):
    scan_of(tmp_path / "a", range(0, 30))
    monkeypatch.setattr("unbraid.scanning.scan.images_per_shard", lambda _: 5)
    scan_of(tmp_path / "b", range(30, 60), threads=2, batch_size=5)
    many = unbraid.open_scan([tmp_path / "a", tmp_path / "b"])
    assert many.n_shards == 2 + 6
    assert many.manifest.threads == 0
    assert len(many.ids()) == 60


def test_scans_of_which_some_images_come_first_count_from_the_largest(small_shards, tmp_path):
    parts = {"a": (range(0, 41), 16), "b": (range(41, 90), 32)}
    for name, (part, n_first) in parts.items():
        usual = {"batch_size": 8, "threads": 1, "n_first": n_first}
        scan_into(build("1x1"), {"layer": tmp_path / name}, Part(list(part)), **usual)
    many = unbraid.open_scan([tmp_path / "a", tmp_path / "b"])
    assert sorted(part.manifest.n_first for part in many.parts) == [16, 32]
    assert (many.manifest.first, many.manifest.n_first) == ("", 0)
    index = torch.cat(list(many.columns("index"))).tolist()
    assert sorted(index) == list(range(N_IMAGES))
    assert index != sorted(index)
    assert sorted(many.ids().values()) == sorted(f"image-{n}" for n in range(N_IMAGES))
    found, whole = (
        unbraid.find(scan, tau=0.01, p=0.5, gamma=0.99)
        for scan in (many, scan_of(tmp_path / "whole", range(N_IMAGES)))
    )
    assert found.concepts == whole.concepts


def test_an_image_in_two_scans_is_named(small_shards, tmp_path):
    for name, part in {"a": range(0, 30), "b": range(30, 50), "c": range(49, 70)}.items():
        scan_of(tmp_path / name, part)
    unbraid.open_scan([tmp_path / "a", tmp_path / "b"])
    for way in permutations([tmp_path / name for name in "abc"]):
        with pytest.raises(RunError, match=r"both hold the image 'image-49'; name scans") as told:
            unbraid.open_scan(way)
        assert {tmp_path / "b", tmp_path / "c"} <= {
            tmp_path / name for name in "abc" if str(tmp_path / name) in str(told.value)
        }


def test_the_same_folder_twice_counts_once(folders, tmp_path):
    (tmp_path / "link").symlink_to(folders[0])
    again = [folders[0], str(folders[0]) + os.sep, tmp_path / "link"]
    assert unbraid.open_scan(again).manifest.n_images == CUTS[1]
    shutil.copytree(folders[0], tmp_path / "copy")  # but a copy is another scan of the same images
    with pytest.raises(RunError, match="both hold the image"):
        unbraid.open_scan([folders[0], tmp_path / "copy"])


def test_hashes_that_meet_by_chance_refuse_nothing(folders, monkeypatch):
    monkeypatch.setattr("unbraid.scanning.many.hash", lambda _: 7, raising=False)
    assert unbraid.open_scan(folders).manifest.n_images == N_IMAGES


def test_images_without_ids_cannot_be_told_apart(small_shards, tmp_path):
    scan_of(tmp_path / "a", range(0, 30))
    scan_of(tmp_path / "b", range(30, 60), named=False)
    with pytest.raises(RunError, match=r"in .*b does not name its images"):
        unbraid.open_scan([tmp_path / "a", tmp_path / "b"])
    assert not unbraid.open_scan(tmp_path / "b").ids()


def test_labels_that_mean_something_else_are_refused(folders):
    manifest = read_manifest(folders[1])
    for names, fine in ((("class 0", "", "class 2", "class 3", "more"), True), (("cat",), False)):
        renamed = replace(manifest, class_names=names)
        write_whole(folders[1] / "manifest.json", renamed.to_json().encode())
        if fine:
            assert unbraid.open_scan(folders).class_names[N_CLASSES:] == ("more",)
            continue
        with pytest.raises(RunError, match=r"as label 0 is '(cat|class 0)' in one and"):
            unbraid.open_scan(folders)


def test_what_names_no_scan_is_told(folders, tmp_path):
    for way, kind, words in (
        ([], UsageError, "names no scan"),
        (str(tmp_path / "run-*"), RunError, "No folder fits"),
        ([folders[0], None], UsageError, "path is None; give a path."),
        ([folders[0], tmp_path / "d"], RunError, "holds no scan"),
        ([folders[0], tmp_path], RunError, "holds several scans|holds no scan"),
    ):
        with pytest.raises(kind, match=words):
            unbraid.open_scan(way)


def test_a_folder_with_a_pattern_in_its_name_is_itself(tmp_path):
    made = scan_of_causes(tmp_path / "scan[1]*", 0)
    assert unbraid.open_scan(made.path).manifest == made.manifest
