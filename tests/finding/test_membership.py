"""Which images belong to which class or cluster, and what splits of clusters measure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cluster_oracle
import unbraid
from checks import (
    Truth,
    assert_close,
    assert_evaluation,
    assert_published_rho,
    assert_published_rows,
    assert_same_outputs,
    assert_same_split,
    truth_of,
)
from handmade import reshard, write_scan
from tiny_networks import SyntheticImages, build
from unbraid import Findings, Scan, Split
from unbraid.base.errors import UsageError
from unbraid.finding import clusters
from unbraid.finding.arv import class_sums
from unbraid.finding.clusters import DescribedImages, cluster_images, top_images
from unbraid.finding.findings import Pair
from unbraid.finding.membership import Cluster, Clusters, Members, mean_responses
from unbraid.measuring.reference_images import TopImages, reference_images

FIRST = 10  # a number behind all classes


# Networks of several kinds against the oracle.


@dataclass
class Case:
    network: nn.Module
    images: SyntheticImages
    scan: Scan
    truth: Truth

    def answers(self, channel: int) -> list[float]:
        return [float(z[channel].mean()) for z in self.truth.z]

    def relevance(self, channel: int) -> Tensor:
        return self.truth.input_relevance[:, channel]


@pytest.fixture(scope="module", params=["3x3", "groups", "tokens", "head"])
def case(request, tmp_path_factory) -> Case:
    network, images = build(request.param), SyntheticImages(30)
    scan = unbraid.scan(network, "layer", images, tmp_path_factory.mktemp("scan"), batch_size=8)
    return Case(network, images, scan, truth_of(network, images))


def assert_top(top: DescribedImages, case: Case, channel: int, n_top: int = 1000) -> None:
    """A channel's top images are the oracle's, in the order of the data set."""
    relevance = case.relevance(channel)
    images, least = cluster_oracle.top_images(case.answers(channel), list(relevance), n_top)
    assert top.label.tolist() == [case.truth.labels[n] for n in images]
    assert_close(top.relevance, relevance[images])
    assert least - 1e-6 < top.least <= least


def test_top_images_are_those_of_brute_force(case):
    found = list(top_images(case.scan))
    assert [channel for channel, _ in found] == list(range(case.scan.layer.n_out))
    for channel, top in found:
        assert_top(top, case, channel)


@pytest.mark.parametrize(("shard_size", "n_top"), [(1, 1000), (7, 5)])
def test_top_images_are_at_most_so_many_whatever_the_shards_and_memory(
    shard_size, n_top, case, tmp_path, monkeypatch
):
    monkeypatch.setattr(clusters, "_BYTES_AT_ONCE", 1)  # a channel at a time
    monkeypatch.setattr(clusters, "_N_TOP", n_top)
    for channel, top in top_images(reshard(case.scan, tmp_path, shard_size)):
        assert len(top.label) <= n_top
        assert_top(top, case, channel, n_top)


def test_the_check_of_top_images_sees_what_is_wrong(case):
    channel, top = next(iter(top_images(case.scan)))
    assert_top(top, case, channel)
    relevance = top.relevance.clone()
    relevance[0, 0] += 1e-6
    for corrupted in (
        replace(top, relevance=relevance),
        replace(top, relevance=top.relevance.flip(0)),
        replace(top, label=(top.label + 1) % 4),
        replace(top, label=top.label[1:], relevance=top.relevance[1:]),
        replace(top, least=top.least + 1e-3),
        replace(top, least=top.least - 1e-3),
    ):
        with pytest.raises(AssertionError):
            assert_top(corrupted, case, channel)
    with pytest.raises(AssertionError):
        assert_top(top, case, channel, n_top=len(top.label) - 1)


def by_hand(case: Case, channel: int, first: int = FIRST) -> dict[int, Cluster]:
    """Clusters around the three strongest images; the weakest third of the images has none."""
    answers = torch.tensor(case.answers(channel))
    centres = F.normalize(case.relevance(channel)[answers.topk(3).indices], dim=1)
    least = sorted(case.answers(channel))[10] - 1e-9
    return {first + k: Cluster(channel, k, centres, least) for k in range(3)}


def members(case: Case, found: dict[int, Cluster]) -> dict[int, list[int]]:
    """The images of each cluster of a channel, by brute force."""
    cluster = next(iter(found.values()))
    answers, relevance = case.answers(cluster.channel), list(case.relevance(cluster.channel))
    own = cluster_oracle.members(answers, relevance, cluster.centres, cluster.least)
    return {number: own[cluster.place] for number, cluster in found.items()}


def assert_members(
    scan: Scan, expected: dict[int, list[int]], found: Clusters = MappingProxyType({})
) -> None:
    """The images of each number, however they are asked for, are these."""
    members, shards = Members(scan, found), list(scan.shards())
    for number, images in expected.items():
        own = [records.index[members.of(records, number)].tolist() for records in shards]
        assert list(itertools.chain(*own)) == images
        assert members.indices([number]) == images
    assert members.count(expected) == {number: len(own) for number, own in expected.items()}
    assert members.indices(expected) == sorted(set(itertools.chain(*expected.values())))
    groups = [tuple(expected)[:1], tuple(expected)[1:]]
    concepts = torch.cat([members.concept_of(records, groups) for records in shards]).tolist()
    for n, concept in enumerate(concepts):
        wanted = [k for k, group in enumerate(groups) if any(n in expected[m] for m in group)]
        assert concept == (wanted[0] if wanted else -1)


@pytest.mark.parametrize("channel", [0, 3])
@pytest.mark.parametrize("shard_size", [4, 100])
def test_images_belong_to_the_cluster_of_the_nearest_centre(channel, shard_size, case, tmp_path):
    found = by_hand(case, channel)
    expected = members(case, found)
    assert sum(map(len, expected.values())) == 20
    assert min(map(len, expected.values())) > 0
    assert_members(reshard(case.scan, tmp_path, shard_size), expected, found)


def test_classes_are_asked_for_as_clusters_are(case):
    expected = {c: [n for n, t in enumerate(case.truth.labels) if t == c] for c in range(4)}
    assert_members(case.scan, expected)
    assert_members(case.scan, expected, by_hand(case, 1))


def test_a_cluster_or_class_without_an_image_has_none(case):
    found = by_hand(case, 1)
    far = {number: replace(cluster, least=1e9) for number, cluster in found.items()}
    assert_members(case.scan, {number: [] for number in (*far, 4)}, far)


def test_the_check_of_members_sees_what_is_wrong(case):
    found = by_hand(case, 0)
    expected = members(case, found)
    assert_members(case.scan, expected, found)
    for number, images in expected.items():
        for wrong in (images[1:], sorted({*images, *range(30)} - {images[0]}), []):
            with pytest.raises(AssertionError):
                assert_members(case.scan, {**expected, number: wrong}, found)


def test_an_image_without_relevance_belongs_to_no_cluster(tmp_path):
    pooled = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]).double()
    scan = write_scan(tmp_path, shares=torch.ones(3, 1), labels=[0, 0, 0], pooled=pooled)
    found = {5 + k: Cluster(0, k, torch.eye(2).double(), -1.0) for k in range(2)}
    assert_members(scan, {5: [1], 6: [2]}, found)


def test_mean_responses_are_the_layers_output(case):
    (records,) = case.scan.shards()
    channels = [3, 0, case.scan.layer.n_out - 1]
    found = mean_responses(case.scan, records.pooled, records.n_positions, channels)
    assert_close(found, torch.tensor([case.answers(o) for o in channels], dtype=torch.float64).T)


def assert_read_again(scan: Scan, made: Clusters, images: Sequence[int], number: Tensor) -> None:
    """The images that a channel's clusters were made of belong to them, and no others do."""
    expected: dict[int, list[int]] = {n: [] for n in made}
    for place, own in zip(images, number.tolist(), strict=True):
        expected[own].append(place)
    assert_members(scan, expected, made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["3x3", "groups", "tokens"])
def test_the_images_that_made_clusters_belong_to_them_in_batches_of_any_size(kind, dtype, tmp_path):
    network, images = build(kind, dtype), SyntheticImages(40, dtype=dtype)
    scan = unbraid.scan(network, "layer", images, tmp_path / "a", batch_size=40)
    again = unbraid.scan(network, "layer", images, tmp_path / "b", batch_size=3)
    (records,) = scan.shards()
    answers = mean_responses(scan, records.pooled, records.n_positions, range(8))
    for channel, top in top_images(scan):
        made, number = cluster_images(top, channel, FIRST)
        relevance = list(torch.ones(40, 1))  # no image of these is without
        places, _ = cluster_oracle.top_images(answers[:, channel].tolist(), relevance)
        for one in (scan, again):
            assert_read_again(one, made, places, number)


# What follows of clusters: split, network, measures.


@dataclass
class Divided:
    case: Case
    found: Findings
    truth: Truth  # whose labels are the numbers of channel 3's clusters, -1 for none


@pytest.fixture(scope="module")
def divided(case) -> Divided:
    """Channel 3 with two concepts, the first of two clusters."""
    made = by_hand(case, 3)
    own = members(case, made)
    labels = [next((m for m, ns in own.items() if n in ns), -1) for n in range(len(case.images))]
    found = Findings(
        tau=0.03,
        p=0.75,
        gamma=0.5,
        pairs=(Pair(3, 10, 11, 0.1, 0.5, 0.3),),
        concepts={3: ((10, 12), (11,))},
        class_names=(*case.scan.class_names, *[""] * 6, "cluster 1", "cluster 2", "cluster 3"),
        hint="",
        layer="layer",
        weights=case.scan.manifest.weights,
        clusters=made,
        agreement={3: math.nan},
        kind="clusters",
    )
    return Divided(case, found, replace(case.truth, labels=labels))


def test_sums_of_clusters_are_those_of_their_images(divided, tmp_path):
    scan = reshard(divided.case.scan, tmp_path, 7)
    sums = class_sums(scan, [0.1], divided.found.clusters)
    for number in [*divided.found.clusters, 0, 1, 2, 3]:
        truth = divided.truth if number >= FIRST else divided.case.truth
        images = truth.images((number,))
        assert sums.n_images[number] == len(images)
        assert_close(sums.pooled[number], sum(truth.pooled(n) for n in images))


@pytest.mark.parametrize("method", ["least_squares", "published"])
def test_a_split_of_clusters_has_the_oracles_measures(method, divided, tmp_path):
    case, found = divided.case, divided.found
    images = found.members_in(case.scan).indices(found.classes)
    settings = {"indices": images, "positions": True, "batch_size": 5}
    maps = unbraid.scan(case.network, "layer", case.images, tmp_path / "maps", **settings)
    assert maps.manifest.n_images == len(images)
    split = unbraid.split(maps, found, method=method, rho=0.7 if method == "published" else None)
    if method == "published":
        assert_published_rows(split[3], 0.7, divided.truth)
    split.save(tmp_path / "split.safetensors")
    loaded = Split.load(tmp_path / "split.safetensors")
    assert_same_split(loaded, split)
    for one in (split, loaded):
        assert_evaluation(unbraid.evaluate(one, maps), one, divided.truth)
    model2 = unbraid.apply(case.network, loaded)
    assert_same_outputs(case.network, model2, case.images.images)
    top = reference_images(case.scan, loaded, n=30)[3].original
    concept = [[(10, 12), (11,)].index(group) if group else -1 for group in _groups(divided, top)]
    assert top.concept.tolist() == concept


def _groups(divided: Divided, top: TopImages) -> list[tuple[int, ...] | None]:
    labels = [divided.truth.labels[n] for n in top.index.tolist()]
    return [next((g for g in divided.found.concepts[3] if m in g), None) for m in labels]


def test_the_published_rho_of_clusters_is_chosen_on_their_images(divided, tmp_path):
    case, found = divided.case, divided.found
    maps = unbraid.scan(case.network, "layer", case.images, tmp_path, positions=True)
    part = unbraid.split(maps, found, method="published")[3]
    assert_published_rho(part, divided.truth)


def test_without_images_of_a_cluster_nothing_is_split_or_measured(divided, tmp_path):
    case, found = divided.case, divided.found
    images = divided.truth.images((10, 12))
    scan = unbraid.scan(case.network, "layer", case.images, tmp_path, indices=images)
    with pytest.raises(UsageError, match="no image of cluster 2, which"):
        unbraid.split(scan, found)
    with pytest.raises(UsageError, match="no image of cluster 2, concept 1 of channel 3"):
        unbraid.evaluate(unbraid.split(case.scan, found), scan)
