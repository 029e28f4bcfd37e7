"""Concepts without labels: planted causes are found, and labels play no part."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import astuple, replace

import pytest
import torch

import cluster_oracle
import oracle
import unbraid
from checks import assert_close, assert_csv
from handmade import CAUSES, Planted, plant, write_scan
from unbraid import Findings, Scan, Split
from unbraid.demo import network as demo
from unbraid.finding.arv import class_cosines, class_sums
from unbraid.finding.clusters import top_images
from unbraid.scanning.records import no_records, write_shard


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def found(planted) -> Findings:
    return unbraid.find(planted.scan, concepts="clusters")


def concepts_of(scan: Scan, found: Findings, channel: int) -> list[int]:
    """Which concept of a channel each image belongs to, -1 for none."""
    members = found.members_in(scan)
    parts = [members.concept_of(records, found.concepts[channel]) for records in scan.shards()]
    return torch.cat(parts).tolist()


def assert_causes_found(scan: Scan, cause: Sequence[int], found: Findings) -> None:
    """Exactly the channels of several causes are found, each with a concept per cause."""
    assert found.channels == tuple(o for o, own in enumerate(CAUSES) if len(own) > 1)
    for channel, groups in found.concepts.items():
        assert len(groups) == len(CAUSES[channel])
        concept = concepts_of(scan, found, channel)
        own = [n for n, k in enumerate(concept) if k >= 0]
        truth = [cause[n] for n in own]
        score = cluster_oracle.adjusted_rand_index([concept[n] for n in own], truth)
        assert score >= 0.95
        for k in range(len(CAUSES[channel])):
            assert truth.count(k) >= 0.95 * list(cause).count(k)


def test_planted_causes_are_found_and_single_ones_stay_whole(planted, found):
    assert_causes_found(planted.scan, planted.cause, found)


def test_the_check_of_causes_sees_what_is_wrong(planted, found):
    shuffled = planted.cause[1:] + planted.cause[:1]
    concepts = found.concepts
    for cause, wrong in (
        (shuffled, concepts),
        (planted.cause, {0: concepts[0]}),
        (planted.cause, {**concepts, 2: concepts[0]}),
        (planted.cause, {**concepts, 1: concepts[1][:2]}),
        (planted.cause, {**concepts, 1: (concepts[1][0],) * 3}),
    ):
        with pytest.raises(AssertionError):
            assert_causes_found(planted.scan, cause, replace(found, concepts=wrong))


def assert_same_findings(one: Findings, other: Findings, tolerance: float = 0.0) -> None:
    """Pairs, concepts and clusters are the same."""
    assert one.concepts == other.concepts
    assert one.clusters.keys() == other.clusters.keys()
    for pair, twin in zip(one.pairs, other.pairs, strict=True):
        assert_close(astuple(pair), astuple(twin), tolerance)
    for number, cluster in one.clusters.items():
        for name, value in vars(cluster).items():
            assert_close(value, getattr(other.clusters[number], name), tolerance)


def test_pairs_are_clusters_of_two_concepts_with_their_cosine_and_size(planted, found):
    pooled = torch.cat([records.pooled[:, 0] for records in planted.scan.shards()])
    members = found.members_in(planted.scan)
    own = {number: members.indices([number]) for number in found.clusters}
    assert len(found.pairs) >= 1 + 3
    for channel, groups in found.concepts.items():
        relevance = pooled * planted.scan.weight[channel]
        top = [n for n, cluster in found.clusters.items() if cluster.channel == channel]
        assert sorted(itertools.chain(*groups)) == top
        n_top = sum(len(own[n]) for n in top)
        arvs = {n: sum(relevance[i] for i in own[n]) / len(own[n]) for n in top}
        cosines = {
            (s, t): oracle.cosine(arvs[s], arvs[t]) for s, t in itertools.combinations(top, 2)
        }
        expected = [
            [*pair, cosine, *(len(own[n]) / n_top for n in pair)]
            for pair, cosine in cosines.items()
            if cosine < 0.5
        ]
        pairs = [astuple(pair)[1:6] for pair in found.pairs if pair.channel == channel]
        assert_close(sorted(pairs), sorted(expected))
    assert [pair.cosine for pair in found.pairs] == sorted(pair.cosine for pair in found.pairs)


def test_shards_tau_and_p_play_no_part(planted, found, tmp_path):
    for shard_size in (5, 1000):
        scan = plant(tmp_path / str(shard_size), shard_size=shard_size).scan
        assert_same_findings(unbraid.find(scan, concepts="clusters"), found, 1e-9)
    for thresholds in ({"tau": 0.9, "p": 1.0}, {"tau": "auto", "p": 0.01}):
        other = unbraid.find(planted.scan, concepts="clusters", **thresholds)
        assert_same_findings(other, found)
        assert str(other) == str(found)


# Labels play no part.


def test_labels_change_names_and_agreement_only(planted, found, tmp_path):
    order = torch.randperm(len(planted.cause), generator=torch.Generator().manual_seed(3))
    labels = (torch.tensor(planted.cause) % 4)[order].tolist()
    other = unbraid.find(plant(tmp_path / "mixed", labels=labels).scan, concepts="clusters")
    assert_same_findings(other, found)
    assert other.class_names != found.class_names
    assert set(found.agreement) == set(other.agreement) == {0, 1}
    for channel in (0, 1):
        assert found.agreement[channel] > 0.95
        assert other.agreement[channel] == 0  # classes that do not differ are one
    # Where no class has enough images, agreement is unknown.
    labels = list(range(len(planted.cause)))
    other = unbraid.find(plant(tmp_path / "own", labels=labels).scan, concepts="clusters")
    assert all(math.isnan(value) for value in other.agreement.values())
    assert other.known_agreement == []
    assert "greement" not in str(other)


def test_agreement_is_that_of_pair_counting(planted, found, tmp_path):
    """Two classes per cause, some labels wrong, and a class too small to count."""
    generator = torch.Generator().manual_seed(0)
    labels = [2 * c + (n % 2) if c >= 0 else 8 for n, c in enumerate(planted.cause)]
    for n in torch.randperm(len(labels), generator=generator)[:40].tolist():
        labels[n] = int(torch.randint(6, (1,), generator=generator))
    own = [n for n, k in enumerate(concepts_of(planted.scan, found, 0)) if k >= 0]
    for n in own[:7]:
        labels[n] = 7
    other = unbraid.find(plant(tmp_path, labels=labels).scan, concepts="clusters")
    for channel in (0, 1):
        concept = concepts_of(planted.scan, found, channel)
        images = [n for n, k in enumerate(concept) if k >= 0 and labels[n] != 7]
        counts = {c: sum(labels[n] == c for n in images) for c in set(labels)}
        images = [n for n in images if counts[labels[n]] >= 8]
        # Of a cause, both classes have its relevance; they are one by complete linkage.
        groups = [labels[n] // 2 for n in images]
        assert max(groups) == (1 if channel == 0 else 2)
        expected = cluster_oracle.adjusted_rand_index(groups, [concept[n] for n in images])
        assert 0.2 < expected < 0.95
        assert_close(other.agreement[channel], expected)


def test_numbers_of_clusters_are_behind_all_classes(planted, found, tmp_path):
    manifest = replace(planted.scan.manifest, class_names=tuple("abcdefgh"))
    labels = [9, *[0] * (len(planted.cause) - 1)]
    for scan, first in (
        (planted.scan, 4),
        (replace(planted.scan, manifest=manifest), 8),
        (plant(tmp_path, labels=labels).scan, 10),
    ):
        numbers = sorted(unbraid.find(scan, concepts="clusters").clusters)
        assert numbers == list(range(first, first + len(found.clusters)))


def test_clusters_are_named_by_up_to_three_classes_that_a_fifth_of_their_images_have(
    planted, tmp_path
):
    """Of A's images a quarter is of another class, of B's a tenth, and C's are of four classes."""
    labels = [
        (5 if n % 4 == 0 else 0, 6 if n % 10 == 0 else 1, (2, 7, 8, 4)[n % 4], 9)[cause]
        for n, cause in enumerate(planted.cause)
    ]
    scan = plant(tmp_path, labels=labels).scan
    names = ("ant", "", "cat", "", "dog", "eel", "fly", "gnu", "hen")
    scan = replace(scan, manifest=replace(scan.manifest, class_names=names))
    found = unbraid.find(scan, concepts="clusters")
    for number, cluster in found.clusters.items():
        own = [labels[n] for n in found.members_in(scan).indices([number])]
        counts = {c: own.count(c) for c in set(own) if own.count(c) >= 0.2 * len(own)}
        start, classes = found.name(number).rstrip(")").split(" (")
        assert start == f"cluster {cluster.place + 1}"
        shown = [1 if word == "1" else names.index(word) for word in classes.split(", ")]
        assert [counts[c] for c in shown] == sorted(counts.values(), reverse=True)[:3]


# Measures on other images.


@pytest.mark.parametrize("method", ["least_squares", "published"])
def test_the_concept_channels_of_other_images_follow_their_causes(method, planted, found, tmp_path):
    other = plant(tmp_path / "other", seed=7)
    rho = 0.7 if method == "published" else None
    split = unbraid.split(planted.scan, found, method=method, rho=rho)
    split.save(tmp_path / "split.safetensors")
    result = unbraid.evaluate(Split.load(tmp_path / "split.safetensors"), other.scan)
    for channel, responses in result.responses.items():
        concept = concepts_of(other.scan, found, channel)
        assert responses.concept.tolist() == [k for k in concept if k >= 0]
    assert all(channel.separation_error < 0.3 for channel in result.channels)
    assert_causes_found(other.scan, other.cause, found)


# Printing, and what comes nearest.


def test_findings_of_clusters_in_print_and_files(found, tmp_path):
    head, columns, *rows, legend, agreement = str(found).splitlines()
    assert head == f"{len(found)} pairs of clusters in 2 polysemantic channels (gamma 0.5)"
    side = ["top images", "cluster 2", "top images"]
    assert re.split("  +", columns) == ["channel", "cosine", "cluster 1", *side]
    for row, pair in zip(rows, found.pairs, strict=True):
        one, other = found.name(pair.class1), found.name(pair.class2)
        expected = [one, f"{pair.use1:.0%}", other, f"{pair.use2:.0%}"]
        assert re.split("  +", row) == [str(pair.channel), f"{pair.cosine:.4f}", *expected]
    assert legend.startswith("top images: ")
    mean = (found.agreement[0] + found.agreement[1]) / 2
    assert f" {mean:.3f} (adjusted Rand index" in agreement
    for word in ("class 1", "tau", "nan", "interval", "halves", "uncertain"):
        assert word not in str(found)
    found.to_csv(tmp_path / "findings.csv")
    assert_csv(tmp_path / "findings.csv", found)


def test_no_finding_of_clusters_hints_at_the_nearest(planted, found):
    nearest = found.pairs[0]
    none = unbraid.find(planted.scan, concepts="clusters", gamma=nearest.cosine)
    assert (none.pairs, none.concepts, none.clusters, none.kind) == ((), {}, {}, "clusters")
    hinted = math.ceil(nearest.cosine * 1000) / 1000
    assert none.hint == (
        f"Nearest: channel {nearest.channel} has clusters with a cosine of {hinted:.3f}, which "
        "gamma would have to exceed."
    )
    followed = unbraid.find(planted.scan, concepts="clusters", gamma=hinted + 0.001)
    assert followed.pairs[0].channel == nearest.channel


# Odd input.


@pytest.mark.parametrize("bias", [0.0, 1 / 3, -0.7, 1e30])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_channels_that_respond_the_same_to_all_images(bias, weight, tmp_path):
    """Rounding puts the mean of equal responses above or below them."""
    scan = write_scan(
        tmp_path,
        shares=torch.full((60, 3), 0.3),
        labels=[0] * 60,
        pooled=torch.full((60, 2), 0.3, dtype=torch.float64),
        weight=torch.full((3, 2), weight, dtype=torch.float64),
        bias=torch.full((3,), bias, dtype=torch.float64),
    )
    assert [len(top.label) for _, top in top_images(scan)] == [60 if weight else 0] * 3
    none = unbraid.find(scan, concepts="clusters")
    assert none.hint == "No channel's top images form clusters that differ."


def test_a_scan_without_an_image_has_no_clusters(tmp_path):
    """What is left where a scan found every image broken."""
    scan = write_scan(tmp_path, shares=torch.full((4, 3), 0.3), labels=[0, 1, 2, 0])
    broken = replace(no_records(scan.layer, positions=False), broken=torch.arange(4))
    write_shard(tmp_path, 0, broken)
    assert not unbraid.find(scan, concepts="clusters").concepts


# In a trained network.


def test_clusters_agree_with_classes_and_are_there_in_unseen_images_too(tmp_path):
    network = demo.load_network()
    train, unseen = (
        unbraid.scan(network, demo.LAYER, demo.load_images(name), tmp_path / name, batch_size=250)
        for name in demo.SPLITS
    )
    found = unbraid.find(train, concepts="clusters")
    assert len(found.channels) >= 8
    assert sum(found.known_agreement) / len(found.known_agreement) > 0.8
    sums = class_sums(unseen, [], found.clusters)
    assert all(sums.n_images[number] >= 10 for number in found.clusters)
    for pair in found.pairs:
        again = class_cosines(unseen, sums, pair.channel, [pair.class1, pair.class2])[0, 1]
        assert float(again) == pytest.approx(pair.cosine, abs=0.05)


@pytest.mark.parametrize("label", range(10), ids=demo.CLASSES)
def test_images_of_one_class_have_one_cause(label, tmp_path):
    """So a channel fed by two random halves of a class is not polysemantic."""
    network, images = demo.load_network(), demo.load_images("train")
    own = {"classes": [label], "batch_size": 250}
    one = unbraid.scan(network, demo.LAYER, images, tmp_path, **own)
    assert one.manifest.n_images == 500
    assert unbraid.find(one, concepts="clusters").channels == ()
