"""Concepts without labels: which images a channel answers to, and which of them share a cause."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cluster_oracle
import oracle
import unbraid
from checks import (
    Truth,
    assert_close,
    assert_csv,
    assert_evaluation,
    assert_published_rho,
    assert_published_rows,
    assert_same_outputs,
    assert_same_split,
    truth_of,
)
from handmade import CAUSES, Planted, plant, reshard, write_scan
from tiny_networks import SyntheticImages, build
from unbraid import Findings, Scan, Split
from unbraid.base.errors import UsageError
from unbraid.finding import clusters
from unbraid.finding.arv import class_sums
from unbraid.finding.clusters import DescribedImages, cluster_images, top_images
from unbraid.finding.findings import Pair
from unbraid.finding.membership import belongs, concept_of, concerned, mean_responses, numbers_seen
from unbraid.measuring.reference_images import TopImages, reference_images
from unbraid.scanning.records import Cluster, no_records, write_shard

FIRST = 10  # a number behind all classes


# --- networks of several kinds against the oracle -------------------------------------------------


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


def test_there_are_at_most_so_many_top_images(case, monkeypatch):
    monkeypatch.setattr(clusters, "_N_TOP", 5)
    for channel, top in top_images(case.scan):
        assert len(top.label) <= 5
        assert_top(top, case, channel, n_top=5)


@pytest.mark.parametrize("shard_size", [1, 7])
def test_top_images_depend_neither_on_shards_nor_on_memory(shard_size, case, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "_BYTES_AT_ONCE", 1)  # a channel at a time
    for channel, top in top_images(reshard(case.scan, tmp_path, shard_size)):
        assert_top(top, case, channel)


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


def assert_members(scan: Scan, expected: dict[int, list[int]]) -> None:
    """The images of each number, however they are asked for, are these."""
    shards = list(scan.shards())
    for number, images in expected.items():
        own = [records.index[belongs(scan, records, number)].tolist() for records in shards]
        assert list(itertools.chain(*own)) == images
        assert concerned(scan, [number]) == images
        assert (number in numbers_seen(scan, expected)) == bool(images)
    assert concerned(scan, expected) == sorted(set(itertools.chain(*expected.values())))
    groups = [tuple(expected)[:1], tuple(expected)[1:]]
    found = torch.cat([concept_of(scan, records, groups) for records in shards]).tolist()
    for n, concept in enumerate(found):
        wanted = [k for k, group in enumerate(groups) if any(n in expected[m] for m in group)]
        assert concept == (wanted[0] if wanted else -1)


@pytest.mark.parametrize("channel", [0, 3])
@pytest.mark.parametrize("shard_size", [4, 100])
def test_images_belong_to_the_cluster_of_the_nearest_centre(channel, shard_size, case, tmp_path):
    found = by_hand(case, channel)
    expected = members(case, found)
    assert sum(map(len, expected.values())) == 20
    assert min(map(len, expected.values())) > 0
    scan = replace(reshard(case.scan, tmp_path, shard_size), clusters=found)
    assert_members(scan, expected)


def test_classes_are_asked_for_as_clusters_are(case):
    expected = {c: [n for n, t in enumerate(case.truth.labels) if t == c] for c in range(4)}
    assert_members(case.scan, expected)
    scan = replace(case.scan, clusters=by_hand(case, 1))
    assert_members(scan, expected)


def test_a_cluster_or_class_without_an_image_is_not_seen(case):
    found = by_hand(case, 1)
    far = {number: replace(cluster, least=1e9) for number, cluster in found.items()}
    assert_members(replace(case.scan, clusters=far), {number: [] for number in far})
    assert numbers_seen(replace(case.scan, clusters=far), [FIRST, 0]) == {0, 1, 2, 3}


def test_the_check_of_members_sees_what_is_wrong(case):
    found = by_hand(case, 0)
    expected = members(case, found)
    scan = replace(case.scan, clusters=found)
    assert_members(scan, expected)
    for number, images in expected.items():
        for wrong in (images[1:], sorted({*images, *range(30)} - {images[0]}), []):
            with pytest.raises(AssertionError):
                assert_members(scan, {**expected, number: wrong})


def test_an_image_without_relevance_belongs_to_no_cluster(tmp_path):
    pooled = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]).double()
    scan = write_scan(tmp_path, shares=torch.ones(3, 1), labels=[0, 0, 0], pooled=pooled)
    found = {5 + k: Cluster(0, k, torch.eye(2).double(), -1.0) for k in range(2)}
    assert_members(replace(scan, clusters=found), {5: [1], 6: [2]})


def test_mean_responses_are_the_layers_output(case):
    (records,) = case.scan.shards()
    channels = [3, 0, case.scan.layer.n_out - 1]
    found = mean_responses(case.scan, records.pooled, records.n_positions, channels)
    assert_close(found, torch.tensor([case.answers(o) for o in channels], dtype=torch.float64).T)


def assert_read_again(scan: Scan, channel: int, images: Sequence[int], number: Tensor) -> None:
    """The images that a channel's clusters were made of belong to them, and no others do."""
    expected: dict[int, list[int]] = {n: [] for n in scan.clusters}
    for place, own in zip(images, number.tolist(), strict=True):
        expected[own].append(place)
    assert_members(scan, expected)


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
            assert_read_again(replace(one, clusters=made), channel, places, number)


# --- what follows of clusters: split, network, measures -------------------------------------------


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
    scan = replace(reshard(divided.case.scan, tmp_path, 7), clusters=divided.found.clusters)
    sums = class_sums(scan, [0.1])
    for number in [*divided.found.clusters, 0, 1, 2, 3]:
        truth = divided.truth if number >= FIRST else divided.case.truth
        images = truth.images((number,))
        assert sums.n_images[number] == len(images)
        assert_close(sums.pooled[number], sum(truth.pooled(n) for n in images))


@pytest.mark.parametrize("method", ["least_squares", "published"])
def test_a_split_of_clusters_has_the_oracles_measures(method, divided, tmp_path):
    case, found = divided.case, divided.found
    scan = replace(case.scan, clusters=found.clusters)
    images = concerned(scan, found.classes)
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


# --- planted causes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def found(planted) -> Findings:
    return unbraid.find(planted.scan, concepts="clusters")


def concepts_of(scan: Scan, found: Findings, channel: int) -> list[int]:
    """Which concept of a channel each image belongs to, -1 for none."""
    scan = replace(scan, clusters=found.clusters)
    parts = [concept_of(scan, records, found.concepts[channel]) for records in scan.shards()]
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
        (shuffled, found),
        (planted.cause, replace(found, concepts={0: concepts[0]})),
        (planted.cause, replace(found, concepts={**concepts, 2: concepts[0]})),
        (planted.cause, replace(found, concepts={**concepts, 1: concepts[1][:2]})),
        (planted.cause, replace(found, concepts={**concepts, 1: (concepts[1][0],) * 3})),
    ):
        with pytest.raises(AssertionError):
            assert_causes_found(planted.scan, cause, wrong)


@pytest.mark.parametrize("shard_size", [1, 50, 1000])
def test_findings_do_not_depend_on_shards(shard_size, planted, found, tmp_path):
    again = unbraid.find(plant(tmp_path, shard_size=shard_size).scan, concepts="clusters")
    assert_same_findings(again, found, 1e-9)


def assert_same_findings(one: Findings, other: Findings, tolerance: float = 0.0) -> None:
    """Pairs, concepts and clusters are the same."""
    assert one.concepts == other.concepts
    assert len(one.pairs) == len(other.pairs)
    for pair, twin in zip(one.pairs, other.pairs, strict=True):
        figures = ([p.channel, p.class1, p.class2, p.cosine, p.use1, p.use2] for p in (pair, twin))
        assert_close(next(figures), next(figures), tolerance)
    assert one.clusters.keys() == other.clusters.keys()
    for number, cluster in one.clusters.items():
        twin = other.clusters[number]
        assert (cluster.channel, cluster.place) == (twin.channel, twin.place)
        assert_close(cluster.centres, twin.centres, tolerance)
        assert_close(cluster.least, twin.least, tolerance)


def test_pairs_are_clusters_of_two_concepts_with_their_cosine_and_size(planted, found):
    pooled = torch.cat([records.pooled[:, 0] for records in planted.scan.shards()])
    by_number: dict[int, list[int]] = {}
    for number in found.clusters:
        scan = replace(planted.scan, clusters=found.clusters)
        by_number[number] = concerned(scan, [number])
    assert len(found.pairs) >= 1 + 3
    for channel, groups in found.concepts.items():
        relevance = pooled * planted.scan.weight[channel]
        top = [n for n, cluster in found.clusters.items() if cluster.channel == channel]
        assert sorted(itertools.chain(*groups)) == top
        n_top = sum(len(by_number[n]) for n in top)
        arvs = {n: sum(relevance[i] for i in by_number[n]) / len(by_number[n]) for n in top}
        expected = {
            (s, t): oracle.cosine(arvs[s], arvs[t]) for s, t in itertools.combinations(top, 2)
        }
        of_channel = [pair for pair in found.pairs if pair.channel == channel]
        wanted = {key for key, cosine in expected.items() if cosine < 0.5}
        assert {(pair.class1, pair.class2) for pair in of_channel} == wanted
        for pair in of_channel:
            assert_close(pair.cosine, expected[pair.class1, pair.class2])
            assert_close(pair.use1, len(by_number[pair.class1]) / n_top)
            assert_close(pair.use2, len(by_number[pair.class2]) / n_top)
    assert [pair.cosine for pair in found.pairs] == sorted(pair.cosine for pair in found.pairs)


def test_a_lower_gamma_finds_less(planted, found):
    gamma = found.pairs[2].cosine
    less = unbraid.find(planted.scan, concepts="clusters", gamma=gamma)
    assert [pair.cosine for pair in less.pairs] == [pair.cosine for pair in found.pairs[:2]]
    lowest = unbraid.find(planted.scan, concepts="clusters", gamma=found.pairs[0].cosine)
    assert (lowest.pairs, lowest.concepts, lowest.clusters) == ((), {}, {})
    assert lowest.kind == "clusters"


def test_tau_and_p_play_no_part(planted, found):
    for thresholds in ({"tau": 0.9, "p": 1.0}, {"tau": "auto", "p": 0.01}):
        other = unbraid.find(planted.scan, concepts="clusters", **thresholds)
        assert_same_findings(other, found)
        assert str(other) == str(found)


# --- labels play no part --------------------------------------------------------------------------


def shuffled_labels(planted: Planted) -> list[int]:
    order = torch.randperm(len(planted.cause), generator=torch.Generator().manual_seed(3))
    return (torch.tensor(planted.cause) % 4)[order].tolist()


def test_labels_change_names_and_agreement_only(planted, found, tmp_path):
    labels = shuffled_labels(planted)
    other = unbraid.find(plant(tmp_path, labels=labels).scan, concepts="clusters")
    assert_same_findings(other, found)
    assert other.class_names != found.class_names
    assert set(found.agreement) == set(other.agreement) == {0, 1}
    for channel in (0, 1):
        assert found.agreement[channel] > 0.95
        assert other.agreement[channel] == 0  # classes that do not differ are one


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


def test_agreement_is_unknown_where_no_class_has_enough_images(planted, tmp_path):
    labels = list(range(len(planted.cause)))
    other = unbraid.find(plant(tmp_path, labels=labels).scan, concepts="clusters")
    assert all(math.isnan(value) for value in other.agreement.values())
    assert other.known_agreement == []
    assert "greement" not in str(other)


def test_numbers_of_clusters_are_behind_all_classes(planted, found, tmp_path):
    assert sorted(found.clusters) == list(range(4, 4 + len(found.clusters)))
    manifest = replace(planted.scan.manifest, class_names=tuple("abcdefgh"))
    named = replace(planted.scan, manifest=manifest)
    numbers = sorted(unbraid.find(named, concepts="clusters").clusters)
    assert numbers == list(range(8, 8 + len(found.clusters)))
    labels = [9, *[0] * (len(planted.cause) - 1)]
    other = unbraid.find(plant(tmp_path, labels=labels).scan, concepts="clusters")
    assert min(other.clusters) == 10


def test_clusters_are_named_by_up_to_three_classes_that_a_fifth_of_their_images_have(
    planted, tmp_path
):
    """Of A's images a quarter is of another class, of B's a tenth, and C's are of four classes."""
    seen = [0, 0, 0]
    labels = []
    for cause in planted.cause:
        if cause < 0:
            labels.append(9)
            continue
        k = seen[cause] = seen[cause] + 1
        labels.append([5 if k % 4 == 0 else 0, 6 if k % 10 == 0 else 1, (2, 7, 8, 4)[k % 4]][cause])
    scan = plant(tmp_path, labels=labels).scan
    names = ("ant", "", "cat", "", "dog", "eel", "fly", "gnu", "hen")
    scan = replace(scan, manifest=replace(scan.manifest, class_names=names))
    named = unbraid.find(scan, concepts="clusters")
    n_names = set()
    for number, cluster in named.clusters.items():
        own = [labels[n] for n in concerned(replace(scan, clusters=named.clusters), [number])]
        counts = {c: own.count(c) for c in set(own) if own.count(c) >= 0.2 * len(own)}
        start, brackets = named.name(number).split(" (")
        words = brackets.rstrip(")").split(", ")
        assert start == f"cluster {cluster.place + 1}"
        shown = [1 if word == "1" else names.index(word) for word in words]
        assert len(shown) == min(3, len(counts))
        assert [counts[c] for c in shown] == sorted(counts.values(), reverse=True)[:3]
        n_names.add(len(counts))
    assert {1, 2, 4} <= n_names


# --- measures on other images ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["least_squares", "published"])
def test_the_concept_channels_of_other_images_follow_their_causes(method, planted, found, tmp_path):
    other = plant(tmp_path / "other", seed=7)
    rho = 0.7 if method == "published" else None
    split = unbraid.split(planted.scan, found, method=method, rho=rho)
    split.save(tmp_path / "split.safetensors")
    result = unbraid.evaluate(Split.load(tmp_path / "split.safetensors"), other.scan)
    for channel, answers in result.responses.items():
        concept = concepts_of(other.scan, found, channel)
        assert answers.concept.tolist() == [k for k in concept if k >= 0]
    assert all(channel.separation_error < 0.3 for channel in result.channels)
    assert_causes_found(other.scan, other.cause, found)


# --- printing -------------------------------------------------------------------------------------


def test_findings_of_clusters_print_as_a_table(found):
    head, columns, *rows, legend, agreement = str(found).splitlines()
    assert head == f"{len(found)} pairs of clusters in 2 polysemantic channels (gamma 0.5)"
    assert columns.split("  ")[0] == "channel"
    for word in ("cosine", "cluster 1", "top images", "cluster 2"):
        assert word in columns
    assert columns.count("top images") == 2
    assert len(rows) == len(found.pairs)
    for row, pair in zip(rows, found.pairs, strict=True):
        assert row.startswith(f"{pair.channel} ")
        for words in (
            f"{pair.cosine:.4f}",
            *(found.name(n) for n in (pair.class1, pair.class2)),
            *(f"{use:.0%}" for use in (pair.use1, pair.use2)),
        ):
            assert words in row
    assert legend.startswith("top images: ")
    mean = (found.agreement[0] + found.agreement[1]) / 2
    assert f" {mean:.3f} (adjusted Rand index" in agreement
    for word in ("class 1", "tau", "nan", "interval", "halves", "uncertain"):
        assert word not in str(found)


def test_no_finding_of_clusters_hints_at_the_nearest(planted, found):
    none = unbraid.find(planted.scan, concepts="clusters", gamma=-1.0)
    nearest = found.pairs[0]
    hinted = math.ceil(nearest.cosine * 1000) / 1000
    assert str(none) == (
        "0 pairs of clusters in 0 polysemantic channels (gamma -1). "
        f"Nearest: channel {nearest.channel} has clusters with a cosine of {hinted:.3f}, which "
        "gamma would have to exceed."
    )
    followed = unbraid.find(planted.scan, concepts="clusters", gamma=hinted + 0.001)
    assert followed.pairs[0].channel == nearest.channel


def test_without_clusters_the_hint_says_so(tmp_path):
    scan = write_scan(tmp_path, shares=torch.full((50, 2), 0.3), labels=[0] * 50)
    none = unbraid.find(scan, concepts="clusters")
    assert none.hint == "No channel's top images form clusters that differ."


def test_the_csv_file_of_clusters_holds_their_pairs(found, tmp_path):
    found.to_csv(tmp_path / "findings.csv")
    assert_csv(tmp_path / "findings.csv", found)
    with (tmp_path / "findings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["uncertain"] for row in rows} == {"False"}
    assert {row["low"] for row in rows} == {""}
    assert all(row["name1"].startswith("cluster ") for row in rows)


# --- odd and wrong input --------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["cluster", "Clusters", "", None, 2])
def test_misspelt_concepts_are_refused(wrong, planted):
    with pytest.raises(UsageError, match="use 'classes' or 'clusters'"):
        unbraid.find(planted.scan, concepts=wrong)


def test_own_concepts_and_clusters_are_refused_together(planted):
    with pytest.raises(UsageError, match="not both"):
        unbraid.find(planted.scan, concepts="clusters", channels={0: [[0], [1]]})


@pytest.mark.parametrize("gamma", [-2, 1.5, math.nan])
def test_a_gamma_out_of_range_is_refused(gamma, planted):
    with pytest.raises(UsageError, match="gamma"):
        unbraid.find(planted.scan, concepts="clusters", gamma=gamma)


@pytest.mark.parametrize("n_images", [1, 2, 3, 15])
def test_few_images_have_no_clusters(n_images, tmp_path):
    pooled = torch.eye(2).double()[torch.arange(n_images) % 2]
    shares = torch.full((n_images, 3), 0.3)
    scan = write_scan(tmp_path, shares=shares, labels=[0] * n_images, pooled=pooled)
    assert not unbraid.find(scan, concepts="clusters").concepts


def test_images_that_do_not_differ_have_no_clusters(tmp_path):
    scan = write_scan(tmp_path, shares=torch.full((50, 2), 0.3), labels=[0] * 50)
    assert not unbraid.find(scan, concepts="clusters").concepts


@pytest.mark.parametrize("bias", [0.0, 0.1, 1 / 3, -0.7, 1e-30, 1e30])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_channels_that_answer_the_same_to_all_images(bias, weight, tmp_path):
    """Rounding puts the mean of equal answers above or below them."""
    n_images = 60
    scan = write_scan(
        tmp_path,
        shares=torch.full((n_images, 3), 0.3),
        labels=[0] * n_images,
        pooled=torch.full((n_images, 2), 0.3, dtype=torch.float64),
        weight=torch.full((3, 2), weight, dtype=torch.float64),
        bias=torch.full((3,), bias, dtype=torch.float64),
        shard_size=1,
    )
    for _, top in top_images(scan):
        assert len(top.label) == (n_images if weight else 0)
    assert not unbraid.find(scan, concepts="clusters").concepts


def test_a_scan_without_an_image_has_no_clusters(tmp_path):
    """What is left where a scan found every image broken."""
    scan = write_scan(tmp_path, shares=torch.full((4, 3), 0.3), labels=[0, 1, 2, 0])
    broken = replace(no_records(scan.layer, positions=False), broken=torch.arange(4))
    write_shard(tmp_path, 0, broken)
    assert scan.broken() == [0, 1, 2, 3]
    assert list(top_images(scan)) == []
    assert not unbraid.find(scan, concepts="clusters").concepts
