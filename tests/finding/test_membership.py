"""Which images belong to which class or cluster, and what splits of clusters measure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F

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
)
from handmade import write_scan
from tiny_networks import SyntheticImages, build
from unbraid import Findings, Scan, Split
from unbraid.base.errors import UsageError
from unbraid.finding import clusters
from unbraid.finding.clusters import DescribedImages, cluster_images, top_images
from unbraid.finding.membership import Cluster, Clusters, Members, mean_responses
from unbraid.measuring.reference_images import reference_images

FIRST = 10  # a number behind all classes


# A channel's top images.


def assert_top(top: DescribedImages, case, channel: int, n_top: int = 1000) -> None:
    """A channel's top images are the oracle's, in the order of the data set."""
    relevance = case.relevance(channel)
    images, least = cluster_oracle.top_images(case.responses(channel), list(relevance), n_top)
    assert top.label.tolist() == [case.truth.labels[n] for n in images]
    assert_close(top.relevance, relevance[images])
    assert least - 1e-6 < top.least <= least


@pytest.mark.parametrize(("n_top", "n_bytes"), [(1000, 1 << 30), (5, 1)])
def test_top_images_are_those_of_brute_force_whatever_the_memory(n_top, n_bytes, case, monkeypatch):
    monkeypatch.setattr(clusters, "_BYTES_AT_ONCE", n_bytes)
    monkeypatch.setattr(clusters, "_N_TOP", n_top)
    found = dict(top_images(case.scan))
    assert list(found) == list(range(case.scan.layer.n_out))
    for channel, top in found.items():
        assert_top(top, case, channel, n_top)


def test_the_check_of_top_images_sees_what_is_wrong(case):
    channel, top = next(iter(top_images(case.scan)))
    relevance = top.relevance.clone()
    relevance[0, 0] += 1e-6
    for corrupted in (
        replace(top, relevance=relevance),
        replace(top, relevance=top.relevance.flip(0)),
        replace(top, label=top.label[1:], relevance=top.relevance[1:]),
        replace(top, least=top.least - 1e-3),
    ):
        with pytest.raises(AssertionError):
            assert_top(corrupted, case, channel)


# Members.


def by_hand(case, channel: int) -> tuple[dict[int, Cluster], dict[int, list[int]]]:
    """Clusters around the three strongest images, and the images of each by brute force.

    The weakest third of the images has none.
    """
    responses, relevance = case.responses(channel), case.relevance(channel)
    centres = F.normalize(relevance[torch.tensor(responses).topk(3).indices], dim=1)
    least = sorted(responses)[len(responses) // 3] - 1e-9
    own = cluster_oracle.members(responses, list(relevance), centres, least)
    made = {FIRST + k: Cluster(channel, k, centres, least) for k in range(3)}
    return made, {FIRST + k: images for k, images in enumerate(own)}


def assert_members(
    scan: Scan, expected: dict[int, list[int]], found: Clusters = MappingProxyType({})
) -> None:
    """The images of each number, however they are asked for, are these."""
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


@pytest.mark.parametrize("channel", [0, 3])
def test_images_belong_to_the_cluster_of_the_nearest_centre(channel, case):
    made, expected = by_hand(case, channel)
    assert sum(map(len, expected.values())) == 28
    assert min(map(len, expected.values())) > 0
    assert_members(case.scan, expected, made)
    for number, images in expected.items():  # the check sees what is wrong
        for wrong in (images[1:], sorted({*images, *range(42)} - {images[0]}), []):
            with pytest.raises(AssertionError):
                assert_members(case.scan, {**expected, number: wrong}, made)


def test_classes_and_numbers_without_an_image_are_asked_for_as_clusters_are(case, tmp_path):
    of_class = {c: [n for n, t in enumerate(case.truth.labels) if t == c] for c in range(7)}
    made, _ = by_hand(case, 1)
    assert_members(case.scan, of_class)
    assert_members(case.scan, of_class, made)
    far = {number: replace(cluster, least=1e9) for number, cluster in made.items()}
    assert_members(case.scan, {number: [] for number in far}, far)
    # An image without relevance belongs to no cluster.
    pooled = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]).double()
    scan = write_scan(tmp_path, shares=torch.ones(3, 1), labels=[0, 0, 0], pooled=pooled)
    assert_members(
        scan, {5: [1], 6: [2]}, {5 + k: Cluster(0, k, torch.eye(2).double(), -1.0) for k in (0, 1)}
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["3x3", "groups", "tokens"])
def test_the_images_that_made_clusters_belong_to_them_in_batches_of_any_size(kind, dtype, tmp_path):
    network, images = build(kind, dtype), SyntheticImages(40, dtype=dtype)
    scan = unbraid.scan(network, "layer", images, tmp_path / "a", batch_size=40)
    again = unbraid.scan(network, "layer", images, tmp_path / "b", batch_size=3)
    (records,) = scan.shards()
    responses = mean_responses(scan, records.pooled, records.n_positions, range(8))
    for channel, top in top_images(scan):
        made, number = cluster_images(top, channel, FIRST)
        relevance = list(torch.ones(40, 1))  # no image of these is without
        images, _ = cluster_oracle.top_images(responses[:, channel].tolist(), relevance)
        numbered = list(zip(images, number.tolist(), strict=True))
        expected = {n: [image for image, own in numbered if own == n] for n in made}
        for one in (scan, again):
            assert_members(one, expected, made)


# What follows of clusters: split, network, measures.


@dataclass
class Divided:
    found: Findings
    truth: Truth  # whose labels are the numbers of channel 3's clusters, -1 for none


@pytest.fixture(scope="module")
def divided(case) -> Divided:
    """Channel 3 with two concepts, the first of two clusters."""
    made, own = by_hand(case, 3)
    labels = [next((m for m, images in own.items() if n in images), -1) for n in range(42)]
    found = replace(
        unbraid.find(case.scan, concepts="clusters"),
        concepts={3: ((10, 12), (11,))},
        class_names=(*[""] * FIRST, "cluster 1", "cluster 2", "cluster 3"),
        clusters=made,
    )
    return Divided(found, replace(case.truth, labels=labels))


@pytest.mark.parametrize("method", ["least_squares", "published"])
def test_a_split_of_clusters_has_the_oracles_measures(method, case, divided, tmp_path):
    found, truth = divided.found, divided.truth
    images = found.members_in(case.scan).indices(found.classes)
    settings = {"indices": images, "positions": True, "batch_size": 5}
    maps = unbraid.scan(case.network, "layer", case.images, tmp_path / "maps", **settings)
    assert maps.manifest.n_images == len(images)
    split = unbraid.split(maps, found, method=method)
    if method == "published":
        assert_published_rho(split[3], truth)
        assert_published_rows(split[3], split[3].info["rho"], truth)
    split.save(tmp_path / "split.safetensors")
    loaded = Split.load(tmp_path / "split.safetensors")
    assert_same_split(loaded, split)
    for one in (split, loaded):
        assert_evaluation(unbraid.evaluate(one, maps), one, truth)
    assert_same_outputs(case.network, unbraid.apply(case.network, loaded), case.images.images)
    top = reference_images(case.scan, loaded, n=30)[3].original
    concept_of = {10: 0, 12: 0, 11: 1, -1: -1}
    assert top.concept.tolist() == [concept_of[truth.labels[n]] for n in top.index.tolist()]


def test_without_images_of_a_cluster_nothing_is_split_or_measured(case, divided, tmp_path):
    images = divided.truth.images((10, 12))
    scan = unbraid.scan(case.network, "layer", case.images, tmp_path, indices=images)
    with pytest.raises(UsageError, match="no image of cluster 2, which"):
        unbraid.split(scan, divided.found)
    with pytest.raises(UsageError, match="no image of cluster 2, concept 1 of channel 3"):
        unbraid.evaluate(unbraid.split(case.scan, divided.found), scan)
