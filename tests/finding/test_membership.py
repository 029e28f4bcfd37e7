"""Which images belong to which class or cluster, and what splits of clusters measure."""

import itertools
from dataclasses import replace
from types import MappingProxyType
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import checks
import cluster_oracle
import oracle
import unbraid
from handmade import write_scan
from tiny_networks import SyntheticImages, build
from unbraid import Split
from unbraid.base.errors import UsageError
from unbraid.finding import clusters
from unbraid.finding.arv import class_sums
from unbraid.finding.membership import Cluster, Members, mean_responses
from unbraid.measuring.reference_images import reference_images

FIRST = 10  # a number behind all classes
KINDS = ["3x3", "groups", "batch norm behind", "tokens", "pooled features"]
of_every_kind = pytest.mark.parametrize("case", KINDS, indirect=True)


def described(case, channel):
    responses = [float(z[channel].mean()) for z in case.truth.z]
    return responses, case.truth.input_relevance[:, channel]


def assert_top(top, case, channel, n_top=1000):
    """A channel's top images are the oracle's, in the order of the data set."""
    responses, relevance = described(case, channel)
    images, least = cluster_oracle.top_images(responses, list(relevance), n_top)
    assert top.label.tolist() == [case.truth.labels[n] for n in images]
    checks.assert_close(top.relevance, relevance[images])
    assert least - 1e-6 < top.least <= least


@of_every_kind
@pytest.mark.parametrize(("n_top", "n_bytes"), [(1000, 1 << 30), (5, 1)])
def test_top_images_are_those_of_brute_force_whatever_the_memory(n_top, n_bytes, case, monkeypatch):
    monkeypatch.setattr(clusters, "_BYTES_AT_ONCE", n_bytes)
    monkeypatch.setattr(clusters, "_N_TOP", n_top)
    gather = Mock(wraps=clusters._gather)
    monkeypatch.setattr(clusters, "_gather", gather)
    found = dict(clusters.top_images(case.scan))
    n_channels = case.scan.layer.n_out
    assert gather.call_count == (1 if n_bytes > 1 else n_channels)
    assert list(found) == list(range(case.scan.layer.n_out))
    for channel, top in found.items():
        assert_top(top, case, channel, n_top)
        for wrong in (
            *({"relevance": value} for value in (top.relevance + 1e-6, top.relevance.flip(0))),
            *({"least": top.least + by} for by in (1e-3, -1e-3)),
            {"label": (top.label + 1) % 6},
            {"label": top.label[1:], "relevance": top.relevance[1:]},
        ):
            with pytest.raises(AssertionError):
                assert_top(replace(top, **wrong), case, channel, n_top)
        with pytest.raises(AssertionError):
            assert_top(top, case, channel, len(top.label) - 1)


def by_hand(case, channel):
    """Clusters around the three strongest images; the weakest third belongs to none."""
    responses, relevance = described(case, channel)
    centres = F.normalize(relevance[torch.tensor(responses).topk(3).indices], dim=1)
    least = sorted(responses)[len(responses) // 3] - 1e-9
    own = cluster_oracle.members(responses, list(relevance), centres, least)
    made = {FIRST + k: Cluster(channel, k, centres, least) for k in range(3)}
    return made, {FIRST + k: images for k, images in enumerate(own)}


def assert_members(scan, expected, found=MappingProxyType({})):
    members = Members(scan, found)
    assert {number: members.indices([number]) for number in expected} == expected
    assert members.indices(expected) == sorted(itertools.chain(*expected.values()))
    assert members.count(expected) == {number: len(own) for number, own in expected.items()}
    first, *others = expected
    parts = [members.concept_of(records, [[first], others]) for records in scan.shards()]
    wanted = torch.full((scan.manifest.n_images,), -1)
    for number, images in expected.items():
        wanted[images] = int(number != first)
    assert torch.equal(torch.cat(parts), wanted)


@of_every_kind
@pytest.mark.parametrize("channel", [0, 3])
def test_images_belong_to_the_cluster_of_the_nearest_centre(channel, case):
    made, expected = by_hand(case, channel)
    assert min(map(len, expected.values())) > 0
    assert sum(map(len, expected.values())) == 42 - 42 // 3
    assert_members(case.scan, expected, made)
    for number, images in expected.items():
        others = sorted(set(range(42)) - {images[0]})
        for wrong in (images[1:], others, []):
            with pytest.raises(AssertionError):
                assert_members(case.scan, {**expected, number: wrong}, made)


@of_every_kind
@pytest.mark.parametrize("channel", [0, 3])
def test_class_sums_of_clusters_and_classes_are_those_of_their_images(channel, case):
    made, own = by_hand(case, channel)
    own |= {t: case.truth.images((t,)) for t in range(6)}
    sums = class_sums(case.scan, [0.1], made)
    assert sums.n_images.sum() == sum(map(len, own.values()))
    for number, images in own.items():
        assert sums.n_images[number] == len(images)
        checks.assert_close(sums.pooled[number], sum(case.truth.pooled(n) for n in images))


@of_every_kind
def test_mean_responses_are_the_layers_output(case):
    channels = [3, 0, case.scan.layer.n_out - 1]
    found = [
        mean_responses(case.scan, records.pooled, records.n_positions, channels)
        for records in case.scan.shards()
    ]
    checks.assert_close(torch.cat(found), torch.stack([z[channels].mean(1) for z in case.truth.z]))


def test_members_of_classes_and_numbers_without_an_image(case, tmp_path):
    of_class = {c: [n for n, t in enumerate(case.truth.labels) if t == c] for c in range(7)}
    made, _ = by_hand(case, 1)
    assert_members(case.scan, of_class, made)
    far = {number: replace(cluster, least=1e9) for number, cluster in made.items()}
    assert_members(case.scan, {number: [] for number in far}, far)
    # An image without relevance belongs to no cluster.
    pooled = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]).double()
    scan = write_scan(tmp_path, shares=torch.ones(3, 1), labels=[0, 0, 0], pooled=pooled)
    made = {5 + k: Cluster(0, k, torch.eye(2).double(), -1.0) for k in (0, 1)}
    assert_members(scan, {5: [1], 6: [2]}, made)


@of_every_kind
@pytest.mark.parametrize("alike", [-1.0, 0.2, 0.9])
@pytest.mark.parametrize("named", [(), (1, 4)])
def test_members_are_alike_apart_from_the_mean_image_and_of_no_named_class(alike, named, case):
    responses, relevance = described(case, 2)
    origin = relevance.mean(0)
    least = sorted(responses)[10]
    centred = [a - origin for a in relevance]
    top = torch.tensor(responses).topk(3).indices.tolist()
    centres = torch.stack([centred[n] / centred[n].norm() for n in top])
    expected = {FIRST + k: [] for k in range(3)}
    for n, response in enumerate(responses):
        cosines = [oracle.cosine(centred[n], centre) for centre in centres]
        fits = response >= least and max(cosines) >= alike
        if fits and case.truth.labels[n] not in named:
            expected[FIRST + cosines.index(max(cosines))].append(n)
    made = {
        FIRST + k: Cluster(2, k, centres, least - 1e-9, origin, alike - 1e-9, named)
        for k in range(3)
    }
    assert_members(case.scan, expected, made)
    for other in ({"origin": None}, {"origin": -origin}, {"named": (0, 1, 2, 3, 4, 5)}):
        changed = {n: replace(cluster, **other) for n, cluster in made.items()}
        with pytest.raises(AssertionError):
            assert_members(case.scan, expected, changed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["3x3", "groups", "tokens"])
def test_images_that_made_clusters_belong_to_them_in_batches_of_any_size(kind, dtype, tmp_path):
    network, images = build(kind, dtype), SyntheticImages(40, dtype=dtype)
    scan = unbraid.scan(network, "layer", images, tmp_path / "a", batch_size=40)
    again = unbraid.scan(network, "layer", images, tmp_path / "b", batch_size=3)
    (records,) = scan.shards()
    responses = mean_responses(scan, records.pooled, records.n_positions, range(8))
    for channel, top in clusters.top_images(scan):
        origin = top.relevance.mean(0)
        centres = clusters.directions(top.relevance[:2], origin)
        number = clusters.nearest_centres(clusters.directions(top.relevance, origin), centres)
        options = (centres, top.least, origin, clusters.ALIKE)
        made = {FIRST + k: Cluster(channel, k, *options) for k in range(2)}
        relevance = list(torch.ones(40, 1))  # no image of these is without
        images, _ = cluster_oracle.top_images(responses[:, channel].tolist(), relevance)
        expected = {FIRST + k: torch.tensor(images)[number == k].tolist() for k in range(2)}
        assert all(expected.values())
        assert_members(scan, expected, made)
        assert_members(again, expected, made)


@pytest.fixture(scope="module")
def divided(case):
    """Channel 3 with two concepts, the first of two clusters; the truth's labels are clusters."""
    made, own = by_hand(case, 3)
    labels = [next((m for m, images in own.items() if n in images), -1) for n in range(42)]
    found = replace(
        unbraid.find(case.scan, concepts="clusters"),
        concepts={3: ((10, 12), (11,))},
        class_names=(*[""] * FIRST, "cluster 1", "cluster 2", "cluster 3"),
        clusters=made,
    )
    return found, replace(case.truth, labels=labels)


@of_every_kind
@pytest.mark.parametrize(
    ("method", "which"), [("least_squares", "own"), ("published", "own"), ("published", "all")]
)
def test_a_split_of_clusters_has_the_oracles_measures(method, which, case, divided, tmp_path):
    found, truth = divided
    images = found.members_in(case.scan).indices(found.classes) if which == "own" else range(42)
    settings = {"indices": images, "positions": True, "batch_size": 5}
    maps = unbraid.scan(case.network, "layer", case.images, tmp_path / "maps", **settings)
    assert maps.manifest.n_images == len(images)
    split = unbraid.split(maps, found, method=method)
    if method == "published":
        checks.assert_published_rho(split[3], truth)
        checks.assert_published_rows(split[3], split[3].info["rho"], truth)
    split.save(tmp_path / "split.safetensors")
    loaded = Split.load(tmp_path / "split.safetensors")
    checks.assert_same_split(loaded, split)
    checks.assert_evaluation(unbraid.evaluate(loaded, maps), loaded, truth)
    changed = unbraid.apply(case.network, loaded)
    checks.assert_same_outputs(case.network, changed, case.images.images)
    top = reference_images(case.scan, loaded, n=30)[3].original
    concept_of = {10: 0, 12: 0, 11: 1, -1: -1}
    assert top.concept.tolist() == [concept_of[truth.labels[n]] for n in top.index.tolist()]


def test_without_images_of_a_cluster_nothing_is_split_or_measured(case, divided, tmp_path):
    found, truth = divided
    images = truth.images((10, 12))
    scan = unbraid.scan(case.network, "layer", case.images, tmp_path, indices=images)
    with pytest.raises(UsageError, match="no image of cluster 2, which"):
        unbraid.split(scan, found)
    with pytest.raises(UsageError, match="no image of cluster 2, concept 1 of channel 3"):
        unbraid.evaluate(unbraid.split(case.scan, found), scan)
