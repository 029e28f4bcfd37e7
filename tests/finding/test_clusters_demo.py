"""Clusters of images in a trained network: what is planted comes back, what is one stays one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unbraid
from checks import assert_bit_equal
from unbraid import Findings, Scan
from unbraid.demo import network as demo
from unbraid.finding.arv import class_cosines, class_sums
from unbraid.finding.clusters import adjusted_rand_index
from unbraid.splitting.splits import ChannelSplit


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> tuple[Scan, Scan]:
    """Of the training images, and of unseen ones."""
    home, network = tmp_path_factory.mktemp("demo"), demo.load_network()
    train, unseen = (
        unbraid.scan(network, demo.LAYER, demo.load_images(name), home / name, batch_size=250)
        for name in demo.SPLITS
    )
    return train, unseen


@pytest.fixture(scope="module")
def found(scans) -> Findings:
    return unbraid.find(scans[0], concepts="clusters")


def test_clusters_agree_with_classes_and_are_there_in_unseen_images_too(found, scans):
    assert len(found.channels) >= 8
    assert sum(found.known_agreement) / len(found.known_agreement) > 0.8
    sums = class_sums(scans[1], [], found.clusters)
    assert all(sums.n_images[number] >= 10 for number in found.clusters)
    for pair in found.pairs:
        again = class_cosines(scans[1], sums, pair.channel, [pair.class1, pair.class2])[0, 1]
        assert float(again) == pytest.approx(pair.cosine, abs=0.05)


def test_concept_channels_of_clusters_are_separated_on_unseen_images(found, scans):
    train, unseen = scans
    split = unbraid.split(train, found)
    baseline = unbraid.split(train, found, method="published", rho=0.7)
    summary = unbraid.evaluate(split, unseen, baseline=baseline).summary
    errors = {method: figures["separation_error"] for method, figures in summary.items()}
    assert errors["least_squares"] < 0.15
    assert errors["least_squares"] < errors["published"] / 2
    network = demo.load_network()
    batch = demo.normalise(demo.load_images("test").pictures[::50])
    assert_bit_equal(unbraid.apply(network, split)(batch), network(batch))


@pytest.mark.parametrize("label", range(10), ids=demo.CLASSES)
def test_images_of_one_class_have_one_cause(label, tmp_path):
    """So a channel fed by two random halves of a class is not polysemantic."""
    network, images = demo.load_network(), demo.load_images("train")
    own = {"classes": [label], "batch_size": 250}
    one = unbraid.scan(network, demo.LAYER, images, tmp_path, **own)
    assert one.manifest.n_images == 500
    assert unbraid.find(one, concepts="clusters").channels == ()


# Two channels added into one.


def inputs_of(scan: Scan) -> Tensor:
    return torch.cat([records.pooled[:, 0].double() for records in scan.shards()])


def mean_responses(scan: Scan) -> Tensor:
    """(N, C_out), of a 1x1 convolution on 7 x 7 positions."""
    return inputs_of(scan) @ scan.weight.double().T / 49 + scan.bias.double()


def jobs(scan: Scan) -> list[tuple[int, int]]:
    """Pairs of channels whose sum has two causes, below gamma, with a fifth of its top images each.

    The cause of an image is the channel that responds more to it.
    """
    responses, inputs, weight = mean_responses(scan), inputs_of(scan), scan.weight.double()
    chosen = []
    for one, other in itertools.combinations(range(scan.layer.n_out), 2):
        summed = responses[:, one] + responses[:, other]
        order = summed.argsort(descending=True)[:1000]
        bound = summed.mean() + (summed[order[:10]].mean() - summed.mean()) / 4
        places = order[summed[order] >= bound]
        of_other = responses[places, other] > responses[places, one]
        relevance = inputs[places] * (weight[one] + weight[other])
        means = [relevance[own].mean(0) for own in (of_other, ~of_other)]
        even = 0.2 <= of_other.double().mean() <= 0.8
        if even and F.cosine_similarity(*means, dim=0) < 0.5:
            chosen.append((one, other))
    return chosen


@dataclass
class Added:
    """Scans in which one channel became the sum of two, found in and split."""

    scans: list[Scan]
    found: Findings
    part: ChannelSplit
    causes: list[Tensor]  # (N, 2), the responses of the two channels, in each scan


def add_up(scans: tuple[Scan, Scan], one: int, other: int) -> Added:
    summed = []
    for scan in scans:
        weight, bias = scan.weight.clone(), scan.bias.clone()
        weight[one] += scan.weight[other]
        bias[one] += scan.bias[other]
        summed.append(replace(scan, weight=weight, bias=bias))
    found = unbraid.find(summed[0], concepts="clusters")
    found = replace(found, concepts={one: found.concepts[one]})
    causes = [mean_responses(scan)[:, [one, other]] for scan in scans]
    return Added(summed, found, unbraid.split(summed[0], found)[one], causes)


def concepts_at(scan: Scan, added: Added) -> Tensor:
    members, concepts = added.found.members_in(scan), added.part.concepts
    return torch.cat([members.concept_of(records, concepts) for records in scan.shards()])


def assert_told_apart(added: Added) -> None:
    """Two concepts divide images as the two channels that were added do."""
    assert len(added.part.concepts) == 2
    for scan, causes in zip(added.scans, added.causes, strict=True):
        concept = concepts_at(scan, added)
        own = concept >= 0
        of_other = causes[:, 1] > causes[:, 0]
        assert own.sum() >= 400
        assert adjusted_rand_index(concept[own].tolist(), of_other[own].tolist()) >= 0.95


def assert_given_back(added: Added) -> None:
    """Over the concepts' images, each concept channel follows one of the two, and the sum neither.

    Both had channels of the layer before in common, so none can follow to the last bit.
    """
    scan, causes, part = added.scans[1], added.causes[1], added.part
    own = concepts_at(scan, added) >= 0
    rows = torch.cat([part.weight[None], part.rows]).double()
    responses = (inputs_of(scan) @ rows.T)[own].T  # the sum, then two concept channels
    likeness = torch.corrcoef(torch.cat([responses, causes[own].T]))[:3, 3:]
    pairing = likeness[1:].argmax(1)
    assert sorted(pairing.tolist()) == [0, 1]
    for k in range(2):
        assert likeness[1 + k, pairing[k]] > 0.75
        assert likeness[1 + k, pairing[k]] > likeness[0, pairing[k]] + 0.15
        assert likeness[1 + k, 1 - pairing[k]] < 0


def test_two_channels_with_different_jobs_added_into_one_are_told_apart(scans):
    planted = [add_up(scans, *pair) for pair in jobs(scans[0])]
    for added in planted:
        assert_told_apart(added)
        assert_given_back(added)
    added = planted[0]
    with pytest.raises(AssertionError):
        assert_told_apart(replace(added, causes=[causes.roll(1, 0) for causes in added.causes]))
    for masks in (torch.full_like(added.part.masks, 0.5), added.part.masks[[0, 0]]):
        with pytest.raises(AssertionError):
            assert_given_back(replace(added, part=replace(added.part, masks=masks)))
