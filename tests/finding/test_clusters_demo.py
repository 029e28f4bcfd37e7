"""Clusters of images in a trained network: what is planted comes back, what is one stays one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

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

GAMMA = 0.5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def scan(home: Path, name: str, split: str = "train", layer: str = demo.LAYER, **settings) -> Scan:
    network = settings.pop("network", None) or demo.load_network()
    images = demo.load_images(split)
    return unbraid.scan(network, layer, images, home / name, batch_size=250, **settings)


@pytest.fixture(scope="module")
def train(home: Path) -> Scan:
    return scan(home, "train")


@pytest.fixture(scope="module")
def unseen(home: Path) -> Scan:
    return scan(home, "unseen", "test")


@pytest.fixture(scope="module")
def found(train: Scan) -> Findings:
    return unbraid.find(train, concepts="clusters")


def mean_answers(scan: Scan) -> Tensor:
    """(N, C_out), of a 1x1 convolution on 7 x 7 positions."""
    pooled = torch.cat([records.pooled[:, 0].double() for records in scan.shards()])
    return pooled @ scan.weight.double().T / 49 + scan.bias.double()


def concepts_at(scan: Scan, found: Findings, channel: int) -> list[int]:
    members = found.members_in(scan)
    parts = [members.concept_of(records, found.concepts[channel]) for records in scan.shards()]
    return torch.cat(parts).tolist()


# What there is in the trained network.


def test_clusters_agree_with_what_classes_make_of_the_same_images(found):
    assert len(found.channels) >= 8
    assert sum(found.known_agreement) / len(found.known_agreement) > 0.8


def test_clusters_are_there_in_unseen_images_too(found, unseen):
    sums = class_sums(unseen, [], found.clusters)
    assert all(sums.n_images[number] >= 10 for number in found.clusters)
    for channel in found.channels:
        numbers = [n for n, cluster in found.clusters.items() if cluster.channel == channel]
        cosines = class_cosines(unseen, sums, channel, numbers)
        for pair in found.pairs:
            if pair.channel == channel:
                again = cosines[numbers.index(pair.class1), numbers.index(pair.class2)]
                assert float(again) == pytest.approx(pair.cosine, abs=0.05)


def test_concept_channels_of_clusters_are_separated_on_unseen_images(found, train, unseen):
    split = unbraid.split(train, found)
    baseline = unbraid.split(train, found, method="published", rho=0.7)
    summary = unbraid.evaluate(split, unseen, baseline=baseline).summary
    errors = {method: figures["separation_error"] for method, figures in summary.items()}
    assert errors["least_squares"] < 0.15
    assert errors["least_squares"] < errors["published"] / 2
    images = demo.load_images("test")
    batch = torch.stack([images[n][0] for n in range(0, 2500, 50)])
    network = demo.load_network()
    assert_bit_equal(unbraid.apply(network, split)(batch), network(batch))


@pytest.mark.parametrize("label", range(10), ids=demo.CLASSES)
def test_images_of_one_class_have_one_cause(label, home, train):
    """So a channel fed by two random halves of a class is not polysemantic."""
    places = [n for n, own in enumerate(demo.load_images("train").targets) if own == label]
    one = scan(home, f"class-{label}", indices=places)
    assert one.manifest.n_images == 500
    assert unbraid.find(one, concepts="clusters").channels == ()


def test_an_early_layer_with_larger_kernels(home):
    """Its inputs are too much alike for the default gamma."""
    train, unseen = (scan(home, f"early-{s}", s, "look.4") for s in ("train", "test"))
    assert train.layer.taps_per_input == 9
    assert unbraid.find(train, concepts="clusters").channels == ()
    found = unbraid.find(train, concepts="clusters", gamma=0.95)
    assert found.channels
    split = unbraid.split(train, found)
    result = unbraid.evaluate(split, unseen)
    assert result.summary["least_squares"]["separation_error"] < 0.3


# Two channels added into one.


def only(found: Findings, channel: int) -> Findings:
    """The findings of one channel."""
    return replace(
        found,
        pairs=tuple(pair for pair in found.pairs if pair.channel == channel),
        concepts={channel: found.concepts[channel]},
        clusters={n: c for n, c in found.clusters.items() if c.channel == channel},
    )


def top_places(answers: Tensor) -> Tensor:
    order = answers.argsort(descending=True)[:1000]
    bound = answers.mean() + (answers[order[:10]].mean() - answers.mean()) / 4
    return order[answers[order] >= bound]


@pytest.fixture(scope="module")
def jobs(train: Scan) -> list[tuple[int, int]]:
    """Pairs of channels whose sum has two causes, below gamma, with a fifth of its top images each.

    The cause of an image is the channel that answers more to it.
    """
    answers = mean_answers(train)
    pooled = torch.cat([records.pooled[:, 0].double() for records in train.shards()])
    weight = train.weight.double()
    chosen = []
    for one, other in itertools.combinations(range(train.layer.n_out), 2):
        places = top_places(answers[:, one] + answers[:, other])
        of_other = answers[places, other] > answers[places, one]
        if not 0.2 <= of_other.double().mean() <= 0.8:
            continue
        relevance = pooled[places] * (weight[one] + weight[other])
        means = [relevance[own].mean(0) for own in (of_other, ~of_other)]
        if F.cosine_similarity(*means, dim=0) < GAMMA:
            chosen.append((one, other))
    return chosen


@dataclass
class Added:
    """A network in which one channel became the sum of two, found in and split."""

    channel: int
    train: Scan
    unseen: Scan
    found: Findings
    part: ChannelSplit
    causes: dict[str, Tensor]  # (N, 2), the answers of the two channels, of training and unseen


@pytest.fixture(scope="module")
def added(home: Path, train: Scan, unseen: Scan, jobs: list[tuple[int, int]]) -> list[Added]:
    assert jobs
    made = []
    for one, other in jobs:
        network = demo.load_network()
        with torch.no_grad():
            for values in (network.mix.weight, network.mix.bias):
                values[one] += values[other].clone()
        name = f"added-{one}-{other}"
        planted = scan(home, name, network=network)
        planted_unseen = scan(home, f"{name}-unseen", "test", network=network)
        found = unbraid.find(planted, concepts="clusters")
        assert len(found.concepts[one]) == 2
        part = unbraid.split(planted, only(found, one))[one]
        pairs = (("train", train), ("unseen", unseen))
        causes = {name: mean_answers(original)[:, [one, other]] for name, original in pairs}
        made.append(Added(one, planted, planted_unseen, found, part, causes))
    return made


def test_two_channels_with_different_jobs_added_into_one_are_told_apart(added):
    for one in added:
        assert_told_apart(one.train, one.causes["train"], one.found, one.channel)
        assert_told_apart(one.unseen, one.causes["unseen"], one.found, one.channel)
        assert_given_back(one.unseen, one.causes["unseen"], one.found, one.part)


def assert_told_apart(added: Scan, causes: Tensor, found: Findings, channel: int) -> None:
    """The concepts divide images as the two channels that were added do."""
    concept = concepts_at(added, found, channel)
    own = [n for n, k in enumerate(concept) if k >= 0]
    of_other = (causes[:, 1] > causes[:, 0]).tolist()
    score = adjusted_rand_index([concept[n] for n in own], [of_other[n] for n in own])
    assert len(own) >= 400
    assert score >= 0.95


def assert_given_back(added: Scan, causes: Tensor, found: Findings, part: ChannelSplit) -> None:
    """Over the concepts' images, each concept channel follows one of the two, and the sum neither.

    Both had channels of the layer before in common, so none can follow to the last bit.
    """
    concept = torch.tensor(concepts_at(added, found, part.channel))
    pooled = torch.cat([records.pooled[:, 0].double() for records in added.shards()])
    rows = torch.cat([part.weight[None], part.rows]).double()
    answers = (pooled @ rows.T)[concept >= 0].T  # the sum, then two concept channels
    causes = causes[concept >= 0].T
    likeness = torch.corrcoef(torch.cat([answers, causes]))[:3, 3:]
    pairing = likeness[1:].argmax(1)
    assert sorted(pairing.tolist()) == [0, 1]
    for k in range(2):
        assert likeness[1 + k, pairing[k]] > 0.75
        assert likeness[1 + k, pairing[k]] > likeness[0, pairing[k]] + 0.15
        assert likeness[1 + k, 1 - pairing[k]] < 0


def test_the_checks_of_what_was_added_see_what_is_wrong(added):
    one = added[0]
    causes, part = one.causes["unseen"], one.part
    with pytest.raises(AssertionError):
        assert_told_apart(one.unseen, causes.roll(1, 0), one.found, one.channel)
    for masks in (torch.full_like(part.masks, 0.5), part.masks[[0, 0]]):
        with pytest.raises(AssertionError):
            assert_given_back(one.unseen, causes, one.found, replace(part, masks=masks))
