"""Groups of images by hand: who belongs to them, corrections of what was found, files."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import checks
import cluster_oracle
import oracle
import unbraid
from tiny_networks import SyntheticImages
from unbraid.base.errors import RunError, UsageError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.finding.findings import Findings
from unbraid.splitting.least_squares import Weights, fit_least_squares
from unbraid.splitting.silence import choose_rest

GROUPS = [[30, 3, 12, 7], [8, 41], [0, 1, 2, 5, 40]]
of_every_kind = pytest.mark.parametrize("case", ["3x3", "groups", "tokens"], indirect=True)


@pytest.fixture
def named(case, tmp_path):
    """The same images with ids."""
    images = SyntheticImages(42, n_classes=6)
    images.ids = [f"a/{n}.png" for n in range(42)]
    return unbraid.scan(case.network, "layer", images, tmp_path / "named", batch_size=16)


def members_of(scan, found, channel):
    members = found.members_in(scan)
    return [members.indices(concept) for concept in found.concepts[channel]]


@of_every_kind
def test_given_images_are_the_members_and_elsewhere_the_nearest_centre_is(case, tmp_path):
    channel = 2
    found = unbraid.find(case.scan, images={channel: GROUPS})
    assert members_of(case.scan, found, channel) == [sorted(group) for group in GROUPS]
    relevance = case.truth.input_relevance[:, channel]
    arvs = [relevance[group].mean(0) for group in GROUPS]
    cosines = [oracle.cosine(arvs[i], arvs[j]) for i in range(3) for j in range(i + 1, 3)]
    checks.assert_close(sorted(cosines), [pair.cosine for pair in found.pairs])
    assert found.kind == "groups"
    others = SyntheticImages(60, n_classes=6)
    others.targets = [0] * 60  # another data set
    other = unbraid.scan(case.network, "layer", others, tmp_path, batch_size=16)
    assert other.manifest.data != case.scan.manifest.data
    truth = checks.truth_of(case.network, others)
    responses = [float(z[channel].mean()) for z in truth.z]
    centres = torch.stack([F.normalize(relevance[g], dim=1).mean(0) for g in GROUPS])
    least = min(responses_of(case, channel)[n] for group in GROUPS for n in group) - 1e-6
    own = list(truth.input_relevance[:, channel])
    expected = cluster_oracle.members(responses, own, centres, least)
    assert members_of(other, found, channel) == expected
    assert any(expected)


def responses_of(case, channel):
    return [float(z[channel].mean()) for z in case.truth.z]


@of_every_kind
def test_groups_go_through_split_file_network_and_measures(case, named, tmp_path):
    ids = [[f"a/{n}.png" if n % 2 else n for n in group] for group in GROUPS]
    found = unbraid.find(named, images={2: GROUPS, 0: GROUPS[:2]})
    assert unbraid.find(named, images={2: ids, 0: GROUPS[:2]}).pairs == found.pairs
    found.save(tmp_path / "found.safetensors")
    found = Findings.load(tmp_path / "found.safetensors")
    split = unbraid.split(named, found)
    split.save(tmp_path / "split.safetensors")
    loaded = unbraid.Split.load(tmp_path / "split.safetensors")
    assert members_of(named, found, 2) == [sorted(group) for group in GROUPS]
    assert loaded.members_in(named).indices(loaded[2].concepts[1]) == sorted(GROUPS[1])
    measured = unbraid.evaluate(loaded, named).channels[1]
    assert [concept.n_images for concept in measured.concepts] == [4, 2, 5]
    network = unbraid.apply(case.network, loaded)
    images = torch.stack([case.images[n][0] for n in range(4)])
    assert torch.equal(network(images), case.network(images))
    unbraid.report(tmp_path / "r.html", scan=named, found=found, split=loaded)


def groups_after(kind):
    """Concepts (0, 1), (2,), (3, 4, 5) of channel 1, corrected, by plain sets."""
    of = {c: [n for n, t in enumerate(kind.truth.labels) if t == c] for c in range(6)}
    a, b, c = sorted(of[0] + of[1]), of[2], sorted(of[3] + of[4] + of[5])
    moved = sorted([*b, a[0]])
    return {
        "join": ({"join": [[2, 0]]}, [sorted(a + c), b]),
        "chain": ({"join": [[0, 1]], "move": {a[0]: None}}, [sorted(a[1:] + b), c]),
        "move": ({"move": {a[0]: 1, c[1]: None}}, [a[1:], moved, [c[0], *c[2:]]]),
        "groups": ({"groups": GROUPS}, [sorted(group) for group in GROUPS]),
    }


@pytest.mark.parametrize("case", ["3x3"], indirect=True)
@pytest.mark.parametrize("how", ["join", "chain", "move", "groups"])
def test_corrections_are_those_of_plain_sets(how, case):
    found = unbraid.find(case.scan, channels={1: [[0, 1], [2], [3, 4, 5]], 4: [[0], [2]]})
    options, expected = groups_after(case)[how]
    corrected = found.correct(case.scan, 1, **options)
    assert members_of(case.scan, corrected, 1) == expected
    assert (corrected.concepts[4], corrected.kind) == (found.concepts[4], "classes")
    again = corrected.correct(case.scan, 4, groups=[[1], [2]])
    assert (again.kind, members_of(case.scan, again, 1)) == ("groups", expected)
    assert len(unbraid.split(case.scan, corrected)[1].concepts) == len(expected)


@pytest.mark.parametrize("case", ["3x3", "groups"], indirect=True)
def test_parts_of_a_concept_take_the_images_that_are_nearest_to_them(case):
    found = unbraid.find(case.scan, channels={1: [[0, 1], [2]]})
    whole, other = members_of(case.scan, found, 1)
    examples = [whole[:2], whole[3:4]]
    corrected = found.correct(case.scan, 1, part={0: examples})
    relevance = F.normalize(case.truth.input_relevance[:, 1], dim=1)
    centres = [relevance[own].mean(0) for own in examples]
    expected = [list(own) for own in examples]
    for n in set(whole) - {n for own in examples for n in own}:
        cosines = [oracle.cosine(relevance[n], centre) for centre in centres]
        expected[cosines.index(max(cosines))].append(n)
    assert members_of(case.scan, corrected, 1) == [*map(sorted, expected), other]


@pytest.mark.parametrize("case", ["3x3"], indirect=True)
@pytest.mark.parametrize(
    ("images", "told"),
    [
        ({2: [[1, 2], [99]]}, "Channel 2 names image 99, which the scan has not"),
        ({2: [["a/1.png"], ["b.png"]]}, "Channel 2 names image 'b.png', which the scan has not"),
        ({2: [[1, 2], ["a/2.png"]]}, "Channel 2 names image 'a/2.png' twice"),
        ({2: [[1, 2], []]}, "A group of channel 2 is empty"),
        ({2: [[1, 2]]}, "Channel 2 has 1 group of images; give two or more"),
        ({2: [1, 2]}, "The groups of channel 2 are no lists of images"),
        ({2: [[1], [2.5]]}, "an image of channel 2 is 2.5; give a whole number"),
        ({80: [[1], [2]]}, "images names channel 80, but layer 'layer' has channels 0 to "),
        ({}, "images are no groups of images per channel"),
        ([[1], [2]], "images are no groups of images per channel"),
    ],
)
def test_wrong_groups_are_refused_in_one_sentence(images, told, named):
    with pytest.raises(UsageError) as error:
        unbraid.find(named, images=images)
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["3x3"], indirect=True)
def test_wrong_corrections_are_refused(case):
    found = unbraid.find(case.scan, channels={1: [[0, 1], [2]]})
    own = members_of(case.scan, found, 1)[1]
    for options, told in (
        ({"join": [[0, 1]]}, "has 1 group of images"),
        ({"join": [[0, 2]]}, "has no concept 2"),
        ({"move": dict.fromkeys(own)}, "A group of channel 1 is empty"),
        ({"part": {0: [[own[0]], [own[1]]]}}, "is not of the concept"),
        ({"groups": GROUPS, "join": [[0, 1]]}, "not both"),
        ({"move": {"a.png": 1}}, "knows no ids"),
        ({"join": [0, 1]}, "join, move or part is not of the form"),
        ({"join": 3}, "join, move or part is not of the form"),
        ({"move": [1]}, "join, move or part is not of the form"),
        ({"part": [1]}, "join, move or part is not of the form"),
        ({"move": {own[0]: True}}, "has no concept True"),
        ({"join": [[0, 1]], "part": {0: [[0], [1]], 1: [[2], [3]]}}, "are joined"),
    ):
        with pytest.raises(UsageError, match=told):
            found.correct(case.scan, 1, **options)
    for channel in (-1, 80, 2.5):
        with pytest.raises(UsageError, match="channel"):
            found.correct(case.scan, channel, groups=GROUPS)
    with pytest.raises(UsageError, match="scan is 'x'"):
        found.correct("x", 1, groups=GROUPS)
    with pytest.raises(UsageError, match="was not found"):
        found.correct(case.scan, 3, join=[[0, 1]])
    for other in ({"channels": {1: [[0], [1]]}}, {"concepts": "clusters"}):
        with pytest.raises(UsageError, match="Pass images alone"):
            unbraid.find(case.scan, images={1: GROUPS}, **other)


@pytest.mark.parametrize("case", ["3x3", "groups"], indirect=True)
def test_a_refit_fits_what_changed_with_the_same_weights_and_keeps_the_rest(case):
    found = unbraid.find(case.scan, images={1: GROUPS, 4: GROUPS[:2]})
    before = unbraid.split(case.scan, found)
    corrected = found.correct(case.scan, 1, move={12: 1}).correct(case.scan, 2, groups=GROUPS)
    split = unbraid.split(case.scan, corrected, refit=before)
    assert [part.channel for part in split.channels] == [1, 2, 4]
    assert split[4] is before[4]
    assert not torch.equal(split[1].masks, before[1].masks)
    members = corrected.members_in(case.scan)
    penalty = min(part.info["lambda"] for part in before.channels)
    rest = (members, choose_rest(members, corrected.concepts))
    weights = Weights(penalty, before[4].info["omega"])
    fits = fit_least_squares(members, corrected.concepts, weights, rest)
    for part in split.channels:
        assert torch.equal(part.masks, fits[part.channel].masks.to(part.masks.dtype))
    again = unbraid.split(case.scan, corrected, refit=split)
    assert all(part is split[part.channel] for part in again.channels)
    assert [part.channel for part in unbraid.split(case.scan, found, refit=split).channels] == [
        1,
        4,
    ]


@pytest.mark.parametrize("case", ["3x3"], indirect=True)
def test_a_refit_refuses_splits_that_tell_no_weights_or_are_of_other_layers(case):
    found = unbraid.find(case.scan, images={1: GROUPS})
    before = unbraid.split(case.scan, found)
    published = unbraid.split(case.scan, found, method="published", rho=0.7)
    other = replace(before, layer=replace(before.layer, name="other"))
    for options, told in (
        ({"refit": published}, "refit is a split without lambda and omega"),
        ({"refit": other}, "of another network or layer than the split"),
        ({"refit": before, "method": "published", "rho": 0.7}, "refit belongs to least squares"),
        ({"refit": "split"}, "refit is 'split'; give one object of type Split"),
    ):
        with pytest.raises(UsageError, match=told):
            unbraid.split(case.scan, found, **options)


@pytest.mark.parametrize("case", ["3x3"], indirect=True)
def test_what_was_made_from_another_scan_is_neither_refitted_nor_corrected(case, named, tmp_path):
    found = unbraid.find(case.scan, images={1: GROUPS})
    split = unbraid.split(case.scan, found)
    split.save(tmp_path / "split.safetensors")
    found.save(tmp_path / "found.safetensors")
    kept = unbraid.Split.load(tmp_path / "split.safetensors")
    assert kept.scans == split.scans == (case.scan.manifest.scan_id,)
    both = unbraid.split(case.scan, found, everything=named)
    assert both.scans == (case.scan.manifest.scan_id, named.manifest.scan_id)
    again = unbraid.split(case.scan, found, everything=named, refit=both)
    assert again[1] is both[1]
    # With all that feeds it the same, and yet of other images.
    for scan, before, more in (
        (named, kept, {}),
        (case.scan, kept, {"everything": named}),
        (case.scan, both, {}),
    ):
        with pytest.raises(UsageError, match="made from another scan, such as a first look; pass"):
            unbraid.split(scan, found, refit=before, **more)
        unbraid.split(scan, found, start=before, **more)
    for before in (found, Findings.load(tmp_path / "found.safetensors")):
        with pytest.raises(UsageError, match="findings are of another scan, such as a first look"):
            before.correct(named, 1, join=[[0, 1]])


def test_ids_of_some_images_are_looked_up_without_those_of_all(named, monkeypatch):
    everything = {n: f"a/{n}.png" for n in range(42)}
    assert named.ids() == everything
    assert named.ids([41, 3, 3, 99]) == {3: "a/3.png", 41: "a/41.png"}
    assert list(named.ids([])) == []
    parts = list(named.ids_by_shard())
    assert len(parts) == named.n_shards
    assert {k: v for part in parts for k, v in part.items()} == everything
    monkeypatch.setattr(type(named), "ids", None)  # finding by id asks for no more than a shard's
    ids = [[f"a/{n}.png" for n in group] for group in GROUPS]
    assert members_of(named, unbraid.find(named, images={1: ids}), 1) == [*map(sorted, GROUPS)]


@pytest.mark.parametrize("case", ["3x3"], indirect=True)
def test_splits_and_findings_of_earlier_versions_name_no_scan_and_are_taken(case):
    found = unbraid.find(case.scan, images={1: GROUPS})
    old = replace(unbraid.split(case.scan, found), scans=())
    with pytest.warns(UserWarning, match="of an earlier version, which did not note its scan"):
        assert unbraid.split(case.scan, found, refit=old)[1] is old[1]
    assert replace(found, scan="").correct(case.scan, 1, join=[[0, 1]]).kind == "groups"


@pytest.mark.parametrize("case", ["3x3"], indirect=True)
def test_groups_of_one_image_each_are_found_split_and_corrected(case):
    found = unbraid.find(case.scan, images={1: [[3], [8]]})
    assert members_of(case.scan, found, 1) == [[3], [8]]
    split = unbraid.split(case.scan, found)
    assert [k.n_images for k in unbraid.evaluate(split, case.scan).channels[0].concepts] == [1, 1]
    assert members_of(case.scan, found.correct(case.scan, 1, move={9: 0}), 1) == [[3, 9], [8]]


def without_clusters(found):
    return replace(found, clusters={})


@pytest.mark.parametrize("case", ["3x3"], indirect=True)
@pytest.mark.parametrize("kind", ["classes", "nothing", "images"])
def test_findings_are_read_as_they_were_written(kind, case, tmp_path):
    options = {
        "classes": {"tau": 0.05, "p": 0.5, "gamma": 0.99},
        "nothing": {"tau": 0.9, "gamma": -1.0},
        "images": {"images": {1: GROUPS}},
    }[kind]
    found, path = unbraid.find(case.scan, **options), tmp_path / "found.safetensors"
    if kind == "classes":
        unknown = replace(found.pairs[0], low=math.nan, high=math.nan)
        found = replace(found, pairs=(unknown, *found.pairs[1:]))
    found.save(path)
    loaded = Findings.load(path)
    assert str(loaded) == str(found)
    assert repr(without_clusters(loaded)) == repr(without_clusters(found))
    assert members_of_all(case.scan, loaded) == members_of_all(case.scan, found)
    tensors, about = read_tensors(path)
    wrong = {"schema": 2, "concepts": {"1": [[0]]}, "kind": "none", "extra": 1}
    for name, value in wrong.items():
        write_tensors(path, tensors, {**about, name: value})
        with pytest.raises(RunError, match=r"holds no findings|schema"):
            Findings.load(path)
    for name in (name for name in tensors if name.startswith("images.")):
        write_tensors(path, {**tensors, name: tensors[name].flip(0)}, about)
        with pytest.raises(RunError, match="no list of images in order"):
            Findings.load(path)


@pytest.mark.parametrize("case", ["3x3"], indirect=True)
@pytest.mark.parametrize("number", [-1, -(10**12), 2**20, 2**62])
def test_findings_of_numbers_that_cannot_be_are_refused(number, case, tmp_path):
    path = tmp_path / "found.safetensors"
    unbraid.find(case.scan, images={1: GROUPS}).save(path)
    tensors, about = read_tensors(path)
    unbraid.find(case.scan, tau=0.9, gamma=-1.0).save(path)
    about["nearest"] = read_tensors(path)[1]["nearest"]
    pair, near = about["pairs"][0], about["nearest"][0]
    cluster, entry = next(iter(about["clusters"].items()))
    wrong = [{"pairs": [{**pair, name: number}]} for name in ("channel", "class1", "class2")]
    wrong += [{"nearest": [{**near, "pair": {**near["pair"], "class2": number}}]}]
    wrong += [{"concepts": {"1": [[0], [number]]}}, {"concepts": {number: [[0], [1]]}}]
    wrong += [{"agreement": {number: 0.5}}, {"clusters": {number: entry}}]
    wrong += [{"clusters": {**about["clusters"], cluster: {**entry, "place": number}}}]
    wrong += [{"clusters": {**about["clusters"], cluster: {**entry, "channel": number}}}]
    if number < 0:
        wrong += [{"nearest": [{**near, "images": [[3], [number]]}]}]
    for values in wrong:
        write_tensors(path, {**tensors, f"images.{number}": torch.tensor([0])}, {**about, **values})
        with pytest.raises(RunError, match=rf"holds no findings .* is {number}, not 0 to"):
            Findings.load(path)


@pytest.mark.parametrize("case", ["3x3"], indirect=True)
def test_clusters_of_a_channel_that_is_not_theirs_are_refused(case, tmp_path):
    path = tmp_path / "found.safetensors"
    unbraid.find(case.scan, images={1: GROUPS}).save(path)
    tensors, about = read_tensors(path)
    number, entry = next(iter(about["clusters"].items()))
    clusters = {**about["clusters"], number: {**entry, "channel": 2}}
    more = {**tensors, "centres.2": tensors["centres.1"].clone()}
    write_tensors(path, more, {**about, "clusters": clusters})
    with pytest.raises(RunError, match=rf"channel 1 has cluster {number} of another channel"):
        Findings.load(path)
    write_tensors(path, tensors, about)
    far = {n: replace(c, channel=1000) for n, c in Findings.load(path).clusters.items()}
    with pytest.raises(UsageError, match="of another size"):
        replace(Findings.load(path), clusters=far).members_in(case.scan)


def members_of_all(scan, found):
    return {channel: members_of(scan, found, channel) for channel in found.channels}
