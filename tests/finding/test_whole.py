"""Concepts for the whole channel: planted causes beside the classes that use it, in any scan."""

from dataclasses import replace

import pytest
import torch

import checks
import oracle
import unbraid
from cluster_oracle import adjusted_rand_index
from handmade import plant
from unbraid import Split
from unbraid.finding.clusters import first_free, mean_pooled, name_cluster

CHANNEL = 1  # it has the causes A, B and C


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Every fourth image of A is of class 4, of B of class 5; all others are of classes 0 and 1."""
    cause = plant(tmp_path_factory.mktemp("cause")).cause
    labels = [c + 4 if c in (0, 1) and n % 4 == 0 else n % 2 for n, c in enumerate(cause)]
    return plant(tmp_path_factory.mktemp("planted"), labels=labels)


OWN = {CHANNEL: [[4], [5]]}


@pytest.fixture(scope="module")
def found(planted):
    return unbraid.find(planted.scan, channels=OWN, concepts="whole")


def concepts_of(scan, found):
    members = found.members_in(scan)
    parts = [members.concept_of(records, found.concepts[CHANNEL]) for records in scan.shards()]
    return torch.cat(parts).tolist()


def test_clusters_join_the_classes_of_their_cause_and_others_are_concepts_of_their_own(
    planted, found
):
    one, other, last = found.concepts[CHANNEL]
    assert (one[0], other[0], len(one), len(other), len(last)) == (4, 5, 2, 2, 1)
    assert sorted([one[1], other[1], *last]) == [6, 7, 8] == sorted(found.clusters)
    concept = concepts_of(planted.scan, found)
    own = [n for n, k in enumerate(concept) if k >= 0]
    assert adjusted_rand_index([concept[n] for n in own], [planted.cause[n] for n in own]) > 0.95
    assert sum(concept[n] >= 0 for n, c in enumerate(planted.cause) if c >= 0) >= 0.95 * 190


def test_images_of_a_named_class_are_of_its_concept_whatever_feeds_them(planted, found):
    concept = concepts_of(planted.scan, found)
    labels = torch.cat(list(planted.scan.columns("label"))).tolist()
    assert all(concept[n] == label - 4 for n, label in enumerate(labels) if label >= 4)
    free = {n: replace(cluster, named=()) for n, cluster in found.clusters.items()}
    members = replace(found, clusters=free).members_in(planted.scan)
    both = set(members.indices(found.clusters)) & set(members.indices([4, 5]))
    assert both  # and without the rule, they would be of clusters too


def test_clusters_keep_what_membership_asks_for(planted, found):
    pooled = torch.cat([records.pooled[:, 0] for records in planted.scan.shards()])
    checks.assert_close(mean_pooled(planted.scan)[0], pooled.mean(0))
    for number, cluster in found.clusters.items():
        assert (cluster.channel, cluster.named) == (CHANNEL, (4, 5))
        checks.assert_close(cluster.origin, (pooled * planted.scan.weight[CHANNEL]).mean(0))
        own = found.members_in(planted.scan).indices([number])
        centred = pooled[own] * planted.scan.weight[CHANNEL] - cluster.origin
        cosines = [oracle.cosine(a, cluster.centres[cluster.place]) for a in centred]
        assert min(cosines) >= cluster.alike > 0


def test_pairs_are_of_classes_and_the_table_names_all_concepts(planted, found):
    classes = unbraid.find(planted.scan, channels=OWN)
    assert found.pairs == classes.pairs
    assert classes.clusters == {}
    first, last = str(found).splitlines()[0], str(found).splitlines()[-1]
    assert first == str(classes).splitlines()[0]
    names = [", ".join(map(found.name, concept)) for concept in found.concepts[CHANNEL]]
    assert last == f"  channel {CHANNEL}: {'; '.join(names)}"
    assert "cluster 1 (" in last


@pytest.mark.parametrize("method", ["least_squares", "published"])
def test_splits_of_the_whole_channel_follow_causes_in_other_images(
    method, planted, found, tmp_path
):
    other = plant(tmp_path / "other", seed=7, labels=[c % 2 for c in planted.cause])
    rho = 0.7 if method == "published" else None
    split = unbraid.split(planted.scan, found, method=method, rho=rho)
    split.save(tmp_path / "split.safetensors")
    loaded = Split.load(tmp_path / "split.safetensors")
    checks.assert_same_split(loaded, split)
    concept = concepts_of(other.scan, replace(found, clusters=loaded.clusters))
    assert concept == concepts_of(other.scan, found)
    result = unbraid.evaluate(loaded, other.scan)
    assert result.responses[CHANNEL].concept.tolist() == [k for k in concept if k >= 0]
    assert result.channels[0].separation_error < 0.3


def test_without_channels_or_other_images_nothing_is_added(planted, tmp_path):
    none = unbraid.find(planted.scan, tau=1.0, concepts="whole")
    assert (none.concepts, none.clusters, none.kind) == ({}, {}, "whole")
    every = plant(tmp_path, labels=[c % 2 for c in planted.cause])
    found = unbraid.find(every.scan, channels={CHANNEL: [[0], [1]]}, concepts="whole")
    assert (found.concepts, found.clusters) == ({CHANNEL: ((0,), (1,))}, {})


def test_name_cluster_names_the_largest_class_even_if_small(planted):
    labels = torch.arange(20)
    assert name_cluster(planted.scan, 2, labels) == "cluster 3 (0 5%)"
    assert name_cluster(planted.scan, 0, labels // 10) == "cluster 1 (0 50%, 1 50%)"
    assert first_free(planted.scan) == 6
