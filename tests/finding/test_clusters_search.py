"""Concepts without labels: planted causes are found, and labels play no part."""

import itertools
import re
from collections import Counter
from dataclasses import astuple, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import oracle
import unbraid
from checks import assert_bit_equal, assert_close, assert_csv
from cluster_oracle import adjusted_rand_index
from handmade import CAUSES, plant, write_scan
from unbraid import Split
from unbraid.demo import network as demo
from unbraid.finding.arv import class_cosines, class_sums
from unbraid.finding.clusters import top_images
from unbraid.measuring.results import join
from unbraid.scanning.fields import no_records
from unbraid.scanning.records import write_shard


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def found(planted):
    return unbraid.find(planted.scan, concepts="clusters")


def concepts_of(scan, found, channel):
    """Which concept of a channel each image belongs to, -1 for none."""
    members = found.members_in(scan)
    parts = [members.concept_of(records, found.concepts[channel]) for records in scan.shards()]
    return torch.cat(parts).tolist()


def assert_causes_found(scan, cause, found):
    """Exactly the channels of several causes are found, each with a concept per cause."""
    assert found.channels == tuple(o for o, own in enumerate(CAUSES) if len(own) > 1)
    for channel, groups in found.concepts.items():
        assert len(groups) == len(CAUSES[channel])
        concept = concepts_of(scan, found, channel)
        own = [n for n, k in enumerate(concept) if k >= 0]
        truth = [cause[n] for n in own]
        assert adjusted_rand_index([concept[n] for n in own], truth) >= 0.95
        for k in range(len(CAUSES[channel])):
            assert truth.count(k) >= 0.95 * list(cause).count(k)


def test_find_clusters_finds_planted_causes_and_leaves_single_ones_whole(planted, found):
    assert_causes_found(planted.scan, planted.cause, found)
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


def reordered(planted, order, folder):
    """The same images in another order."""
    scan = planted.scan
    return write_scan(
        folder,
        shares=torch.full((len(order), 4), 0.25),
        labels=torch.cat(list(scan.columns("label")))[order].tolist(),
        pooled=torch.cat(list(scan.columns("pooled")))[order, 0],
        weight=scan.weight,
        bias=scan.bias,
        shard_size=50,
    )


def test_find_clusters_groups_the_same_images_in_any_order(planted, found, tmp_path):
    order = torch.randperm(len(planted.cause), generator=torch.Generator().manual_seed(4))
    other = reordered(planted, order, tmp_path)
    again = unbraid.find(other, concepts="clusters")
    assert again.concepts == found.concepts
    for channel in found.channels:
        expected = concepts_of(planted.scan, found, channel)
        concept = concepts_of(other, again, channel)
        assert concept == [expected[n] for n in order.tolist()]
        assert concept != expected
    for pair, twin in zip(again.pairs, found.pairs, strict=True):
        assert_close(astuple(pair), astuple(twin), 1e-9)


def assert_same_findings(one, other, tolerance=0.0):
    assert one.concepts == other.concepts
    assert one.clusters.keys() == other.clusters.keys()
    for pair, twin in zip(one.pairs, other.pairs, strict=True):
        assert_close(astuple(pair), astuple(twin), tolerance)
    for number, cluster in one.clusters.items():
        twin = other.clusters[number]
        for name in ("channel", "place", "centres", "least"):
            assert_close(getattr(cluster, name), getattr(twin, name), tolerance)


def test_pairs_are_clusters_of_two_concepts_with_their_cosine_and_size(planted, found):
    pooled = torch.cat([records.pooled[:, 0] for records in planted.scan.shards()])
    members = found.members_in(planted.scan)
    own = {number: members.indices([number]) for number in found.clusters}
    for channel, groups in found.concepts.items():
        relevance = pooled * planted.scan.weight[channel]
        top = [n for n, cluster in found.clusters.items() if cluster.channel == channel]
        assert sorted(itertools.chain(*groups)) == top
        n_top = sum(len(own[n]) for n in top)
        arvs = {n: relevance[own[n]].mean(0) for n in top}
        expected = [
            [s, t, cosine, len(own[s]) / n_top, len(own[t]) / n_top]
            for s, t in itertools.combinations(top, 2)
            if (cosine := oracle.cosine(arvs[s], arvs[t])) < 0.5
        ]
        pairs = [astuple(pair)[1:6] for pair in found.pairs if pair.channel == channel]
        assert_close(sorted(pairs), sorted(expected))
    assert len(found.pairs) >= 1 + 3
    assert [pair.cosine for pair in found.pairs] == sorted(pair.cosine for pair in found.pairs)


def test_shards_tau_and_p_play_no_part_and_labels_only_in_names(planted, found, tmp_path):
    scan = plant(tmp_path, shard_size=5).scan
    assert_same_findings(unbraid.find(scan, concepts="clusters"), found, 1e-9)
    other = unbraid.find(planted.scan, concepts="clusters", tau="auto", p=0.01)
    assert_same_findings(other, found)
    assert str(other) == str(found)
    order = torch.randperm(len(planted.cause), generator=torch.Generator().manual_seed(3))
    labels = (torch.tensor(planted.cause) % 4)[order].tolist()
    other = unbraid.find(plant(tmp_path / "mixed", labels=labels).scan, concepts="clusters")
    assert_same_findings(other, found)
    assert other.class_names != found.class_names
    assert min(found.agreement.values()) > 0.95
    assert set(other.agreement.values()) == {0}  # classes that do not differ are one
    labels = list(range(len(planted.cause)))  # no class has enough images
    other = unbraid.find(plant(tmp_path / "own", labels=labels).scan, concepts="clusters")
    assert other.known_agreement == []
    assert "greement" not in str(other)


def test_agreement_is_that_of_pair_counting(planted, found, tmp_path):
    """Two classes per cause, which are one by their relevance, some wrong, one class too small."""
    labels = [2 * c + (n % 2) if c >= 0 else 8 for n, c in enumerate(planted.cause)]
    labels[::9] = [n % 6 for n in range(len(labels[::9]))]
    first = concepts_of(planted.scan, found, 0)
    for n in [n for n, k in enumerate(first) if k >= 0][:7]:
        labels[n] = 7
    other = unbraid.find(plant(tmp_path, labels=labels).scan, concepts="clusters")
    for channel in (0, 1):
        concept = concepts_of(planted.scan, found, channel)
        own = [n for n, k in enumerate(concept) if k >= 0]
        counts = Counter(labels[n] for n in own if labels[n] != 7)
        own = [n for n in own if counts[labels[n]] >= 8]
        expected = adjusted_rand_index([labels[n] // 2 for n in own], [concept[n] for n in own])
        assert 0.2 < expected < 0.95
        assert_close(other.agreement[channel], expected)


def test_clusters_are_named_by_up_to_three_classes_of_a_tenth_of_their_images(planted, tmp_path):
    """Of B's images a tenth is of another class, and C's are of four classes."""
    labels = [(0, n % 10 == 0, 2 + n % 4, 9)[c] for n, c in enumerate(planted.cause)]
    scan = plant(tmp_path, labels=list(map(int, labels))).scan
    names = ("ant", "bee", "cat", "dog", "eel", "fly")
    scan = replace(scan, manifest=replace(scan.manifest, class_names=names))
    found = unbraid.find(scan, concepts="clusters")
    assert sorted(found.clusters) == list(range(10, 15))  # behind all classes
    for number, cluster in found.clusters.items():
        own = Counter(labels[n] for n in found.members_in(scan).indices([number]))
        start, classes = found.name(number).rstrip(")").split(" (")
        assert start == f"cluster {cluster.place + 1}"
        shown = [(own[names.index(c.split()[0])], c.split()[1]) for c in classes.split(", ")]
        largest = [n for _, n in own.most_common(3) if n >= 0.1 * own.total()]
        assert shown == [(n, f"{n / own.total():.0%}") for n in largest]


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


def test_findings_of_clusters_in_print_and_files_and_the_hint_of_none(found, tmp_path, planted):
    printed, pair = re.sub("  +", "  ", str(found)), found.pairs[0]
    one, other = found.name(pair.class1), found.name(pair.class2)
    assert printed.startswith(
        f"{len(found)} pairs of clusters in 2 polysemantic channels (gamma 0.5)\n"
        "channel  cosine  cluster 1  top images  cluster 2  top images\n"
        f"{pair.channel}  {pair.cosine:.4f}  {one}  {pair.use1:.0%}  {other}  {pair.use2:.0%}\n"
    )
    mean = (found.agreement[0] + found.agreement[1]) / 2
    assert f" {mean:.3f} (adjusted Rand index" in printed
    found.to_csv(tmp_path / "findings.csv")
    assert_csv(tmp_path / "findings.csv", found)
    nearest = found.pairs[0]
    none = unbraid.find(planted.scan, concepts="clusters", gamma=nearest.cosine)
    assert (none.pairs, none.concepts, none.clusters, none.kind) == ((), {}, {}, "clusters")
    told = rf"channel {nearest.channel} has clusters with a cosine of (0\.\d{{3}}),"
    hinted = float(re.search(told, none.hint)[1])  # unseen images may be more alike
    assert nearest.cosine <= hinted < nearest.cosine + 0.02
    followed = unbraid.find(planted.scan, concepts="clusters", gamma=hinted + 0.001)
    assert followed.pairs[0].channel == nearest.channel


@pytest.mark.parametrize("bias", [0.0, 0.1, 1 / 3, -0.7, 1e-30, 1e30])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_channels_that_respond_the_same_to_all_images(bias, weight, tmp_path):
    """Rounding puts the mean of equal responses above or below them."""
    sizes = {"shares": (60, 3), "pooled": (60, 2), "weight": (3, 2), "bias": (3,)}
    values = {"shares": 0.3, "pooled": 0.3, "weight": weight, "bias": bias}
    given = {name: torch.full(size, values[name]).double() for name, size in sizes.items()}
    scan = write_scan(tmp_path, labels=[0] * 60, shard_size=3, **given)
    assert [len(top.label) for _, top in top_images(scan)] == [60 if weight else 0] * 3
    none = unbraid.find(scan, concepts="clusters")
    assert none.hint == "No channel's top images form clusters that differ."


def test_a_scan_of_broken_images_alone_has_no_clusters(tmp_path):
    scan = write_scan(tmp_path, shares=torch.full((4, 3), 0.3), labels=[0, 1, 2, 0])
    broken = replace(no_records(scan.layer, positions=False), broken=torch.arange(4))
    write_shard(tmp_path, 0, broken)
    assert scan.broken() == [0, 1, 2, 3]
    assert list(top_images(scan)) == []
    assert not unbraid.find(scan, concepts="clusters").concepts


@pytest.mark.parametrize("n_after", [2, 3])
def test_an_image_is_known_once_more_behind_a_shard_of_broken_ones(n_after, tmp_path):
    scan = write_scan(
        tmp_path,
        shares=torch.full((6 + n_after, 3), 0.3),
        pooled=torch.tensor([1.0, 2, 3, 0, 0, 0, 3, 4, 5])[: 6 + n_after, None].double(),
        labels=list(range(6 + n_after)),
        shard_size=3,
    )
    for shard, records in enumerate(scan.shards()):
        own = replace(records, group=torch.zeros(len(records)).long())
        if shard == 1:
            none = no_records(scan.layer, positions=False)
            own = replace(none, broken=records.index, group=own.group[:0])
        write_shard(tmp_path, shard, own)
    for _, top in top_images(scan):
        assert top.label.tolist() == [0, 1, 2, 7, 8][: 3 + n_after - 1]


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    def scanned(name, layer=demo.LAYER, network=None, **settings):
        network, images = network or demo.load_network(), demo.load_images(name)
        folder = tmp_path_factory.mktemp("scan")
        return unbraid.scan(network, layer, images, folder, batch_size=250, **settings)

    return scanned


@pytest.fixture(scope="module")
def train(scan):
    return scan("train")


@pytest.fixture(scope="module")
def unseen(scan):
    return scan("test")


@pytest.fixture(scope="module")
def of_clothes(train):
    return unbraid.find(train, concepts="clusters")


def pooled_of(scan):
    return torch.cat([records.pooled[:, 0].double() for records in scan.shards()])


def test_clusters_agree_with_classes_and_are_there_in_unseen_images_too(of_clothes, unseen):
    found = of_clothes
    assert len(found.channels) >= 8
    assert sum(found.known_agreement) / len(found.known_agreement) > 0.8
    sums = class_sums(unseen, [], found.clusters)
    assert all(sums.n_images[number] >= 10 for number in found.clusters)
    for pair in found.pairs:
        again = class_cosines(unseen, sums, pair.channel, [pair.class1, pair.class2])[0, 1]
        assert float(again) == pytest.approx(pair.cosine, abs=0.05)


def test_concept_channels_of_clusters_are_separated_on_unseen_images(of_clothes, train, unseen):
    split = unbraid.split(train, of_clothes)
    baseline = unbraid.split(train, of_clothes, method="published", rho=0.7)
    summary = unbraid.evaluate(split, unseen, baseline=baseline).summary
    errors = {method: figures["separation_error"] for method, figures in summary.items()}
    assert errors["least_squares"] < 0.15
    assert errors["least_squares"] < errors["published"] / 2
    images, network = demo.load_images("test"), demo.load_network()
    batch = torch.stack([images[n][0] for n in range(0, 2500, 50)])
    assert_bit_equal(unbraid.apply(network, split)(batch), network(batch))


@pytest.mark.parametrize("label", range(10), ids=demo.CLASSES)
def test_images_of_one_class_have_one_cause(label, scan):
    """So a channel fed by two random halves of a class is not polysemantic."""
    one = scan("train", classes=[label])
    assert one.manifest.n_images == 500
    assert unbraid.find(one, concepts="clusters").channels == ()


def test_an_early_layer_with_larger_kernels(scan):
    """Its inputs are too much alike for the default gamma."""
    train, unseen = scan("train", "look.8"), scan("test", "look.8")
    assert train.layer.taps_per_input == 9
    assert unbraid.find(train, concepts="clusters").channels == ()
    found = unbraid.find(train, concepts="clusters", gamma=0.8)
    assert found.channels
    result = unbraid.evaluate(unbraid.split(train, found), unseen)
    assert result.summary["least_squares"]["separation_error"] < 0.32


def mean_responses(scan):
    """(N, C_out), of a 1x1 convolution on 7 x 7 positions."""
    return pooled_of(scan) @ scan.weight.double().T / 49 + scan.bias.double()


def strongest(responses):
    order = responses.argsort(descending=True)[:1000]
    bound = responses.mean() + (responses[order[:10]].mean() - responses.mean()) / 4
    return order[responses[order] >= bound]


def pairs_of_jobs(train):
    """Pairs of channels whose sum has two causes: the channel that responds more to an image."""
    responses, pooled, weight = mean_responses(train), pooled_of(train), train.weight.double()
    for one, other in itertools.combinations(range(train.layer.n_out), 2):
        top = strongest(responses[:, one] + responses[:, other])
        of_other = responses[top, other] > responses[top, one]
        relevance = pooled[top] * (weight[one] + weight[other])
        means = [relevance[own].mean(0) for own in (of_other, ~of_other)]
        if 0.2 <= of_other.double().mean() <= 0.8 and F.cosine_similarity(*means, dim=0) < 0.5:
            yield one, other


@pytest.fixture(scope="module")
def added(scan, train, unseen):
    """Networks in which one channel became the sum of two, found in and split."""
    made = []
    for one, other in pairs_of_jobs(train):
        network = demo.load_network()
        with torch.no_grad():
            for values in (network.mix.weight, network.mix.bias):
                values[one] += values[other].clone()
        planted = scan("train", network=network)
        found = unbraid.find(planted, concepts="clusters")
        assert len(found.concepts[one]) == 2
        part = unbraid.split(planted, replace(found, concepts={one: found.concepts[one]}))[one]
        for before, after in ((train, planted), (unseen, scan("test", network=network))):
            causes = mean_responses(before)[:, [one, other]]
            members = found.members_in(after)
            concept = [members.concept_of(records, part.concepts) for records in after.shards()]
            own = {"causes": causes, "concept": torch.cat(concept), "pooled": pooled_of(after)}
            made.append(SimpleNamespace(part=part, unseen=before is unseen, **own))
    assert made
    return made


def assert_told_apart(concept, causes):
    """The concepts divide images as the two channels that were added do."""
    own = concept >= 0
    of_other = causes[own, 1] > causes[own, 0]
    assert own.sum() >= 400
    assert adjusted_rand_index(concept[own].tolist(), of_other.tolist()) >= 0.95


def assert_given_back(one, rows):
    """Over its images each concept channel follows one of the two, and the sum neither."""
    own = one.concept >= 0
    rows = torch.cat([one.part.weight[None], rows]).double()  # the sum, then two concept channels
    likeness = torch.corrcoef(torch.cat([(one.pooled @ rows.T)[own].T, one.causes[own].T]))[:3, 3:]
    pairing = likeness[1:].argmax(1)
    assert sorted(pairing.tolist()) == [0, 1]
    for k in range(2):
        assert likeness[1 + k, pairing[k]] > 0.75
        assert likeness[1 + k, pairing[k]] > likeness[0, pairing[k]] + 0.15
        assert likeness[1 + k, 1 - pairing[k]] < 0


def test_two_channels_with_different_jobs_added_into_one_are_told_apart_and_given_back(added):
    for one in added:
        assert_told_apart(one.concept, one.causes)
        with pytest.raises(AssertionError):
            assert_told_apart(one.concept, one.causes.roll(1, 0))
    for one in (one for one in added if one.unseen):
        assert_given_back(one, one.part.rows)
        for masks in (torch.full_like(one.part.masks, 0.5), one.part.masks[[0, 0]]):
            with pytest.raises(AssertionError):
                assert_given_back(one, masks * one.part.weight)


@pytest.mark.parametrize("shard_size", [64, 7])
def test_an_image_that_is_several_items_counts_once_among_the_top_images(shard_size, tmp_path):
    planted = plant(tmp_path / "a")
    (records,) = [join([*planted.scan.shards()])]
    again = torch.arange(len(records)).repeat_interleave(1 + torch.arange(len(records)) % 3)

    def written(name, group):
        made = write_scan(
            tmp_path / name,
            shares=torch.full((len(again), 4), 0.25),
            labels=records.label[again].tolist(),
            pooled=records.pooled[again, 0] * (1 + 1e-9 * torch.randn(len(again), 1).double()),
            weight=planted.scan.weight,
            bias=planted.scan.bias,
            shard_size=shard_size,
        )
        for shard, own in enumerate(made.shards()):
            write_shard(made.path, shard, replace(own, group=group[own.index]))
        return made

    once, twice = written("b", again), written("c", torch.arange(len(again)))
    tops = [dict(top_images(scan)) for scan in (planted.scan, once, twice)]
    for channel in range(3):
        wanted, own, all_items = (top[channel].label.bincount() for top in tops)
        assert torch.equal(own, wanted)
        assert not torch.equal(all_items, wanted)
