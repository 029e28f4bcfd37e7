"""Clusters of images in a trained network: what is planted comes back, what is one stays one."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import unbraid
from checks import assert_bit_equal
from cluster_oracle import adjusted_rand_index
from unbraid.demo import network as demo
from unbraid.finding.arv import class_cosines, class_sums


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
def found(train):
    return unbraid.find(train, concepts="clusters")


def pooled_of(scan):
    return torch.cat([records.pooled[:, 0].double() for records in scan.shards()])


def test_clusters_agree_with_classes_and_are_there_in_unseen_images_too(found, unseen):
    assert len(found.channels) >= 8
    assert sum(found.known_agreement) / len(found.known_agreement) > 0.8
    sums = class_sums(unseen, [], found.clusters)
    assert all(sums.n_images[number] >= 10 for number in found.clusters)
    for pair in found.pairs:
        again = class_cosines(unseen, sums, pair.channel, [pair.class1, pair.class2])[0, 1]
        assert float(again) == pytest.approx(pair.cosine, abs=0.05)


def test_concept_channels_of_clusters_are_separated_on_unseen_images(found, train, unseen):
    split = unbraid.split(train, found)
    baseline = unbraid.split(train, found, method="published", rho=0.7)
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
    train, unseen = scan("train", "look.4"), scan("test", "look.4")
    assert train.layer.taps_per_input == 9
    assert unbraid.find(train, concepts="clusters").channels == ()
    found = unbraid.find(train, concepts="clusters", gamma=0.95)
    assert found.channels
    result = unbraid.evaluate(unbraid.split(train, found), unseen)
    assert result.summary["least_squares"]["separation_error"] < 0.3


def mean_responses(scan):
    """(N, C_out), of a 1x1 convolution on 7 x 7 positions."""
    return pooled_of(scan) @ scan.weight.double().T / 49 + scan.bias.double()


def top_images(responses):
    order = responses.argsort(descending=True)[:1000]
    bound = responses.mean() + (responses[order[:10]].mean() - responses.mean()) / 4
    return order[responses[order] >= bound]


def pairs_of_jobs(train):
    """Pairs of channels whose sum has two causes: the channel that responds more to an image."""
    responses, pooled, weight = mean_responses(train), pooled_of(train), train.weight.double()
    for one, other in itertools.combinations(range(train.layer.n_out), 2):
        top = top_images(responses[:, one] + responses[:, other])
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
