"""Truth tests of METHOD.md section 7, on a small network whose channels are taught a job each.

Channels that share a job, as nearly all do in a small network, cannot be told apart again whatever
the rule; `benchmarks/split.py` measures that too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fashion
import unbraid
from truth import halves_told_apart, shuffled_findings
from unbraid.demo.network import load_images, load_network, normalise
from unbraid.finding.clusters import adjusted_rand_index
from unbraid.scanning.records import Scan

N_SETS = 6  # of planted channels, for each number of them


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Scan:
    images = load_images("train")
    with torch.random.fork_rng(devices=[]):
        pictures, labels = normalise(images.pictures), torch.tensor(images.targets)
        network = fashion.train("jobs", pictures, labels, seed=1)
    return unbraid.scan(
        network, fashion.LAYER, images, tmp_path_factory.mktemp("jobs"), batch_size=250
    )


def answers(scan: Scan, rows: Tensor) -> Tensor:
    """What rows (K, J) answer to every image, (N, K), without bias."""
    return torch.cat([r.pooled[:, 0].double() @ rows.double().T for r in scan.shards()])


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


def plant(scan: Scan, channels: tuple[int, ...]) -> Scan:
    """Add the weights of channels up, in the place of the first."""
    weight, bias = scan.weight.clone(), scan.bias.clone()
    weight[channels[0]] = scan.weight[list(channels)].sum(0)
    bias[channels[0]] = scan.bias[list(channels)].sum()
    return replace(scan, weight=weight, bias=bias)


def sets_of(n_concepts: int) -> list[tuple[int, ...]]:
    """Sets of the ten taught channels; channel c was taught class c."""
    every = list(itertools.combinations(range(10), n_concepts))
    return random.Random(n_concepts).sample(every, N_SETS)


def recovered(scan: Scan, channels: tuple[int, ...], masks: Tensor | None = None) -> list[float]:
    """Correlations of concept channels with the channels they were made of, over all images."""
    one = plant(scan, channels)
    found = unbraid.find(one, channels={channels[0]: [[c] for c in channels]})
    rows = unbraid.split(one, found)[channels[0]].rows
    if masks is not None:
        rows = masks * one.weight[channels[0]]
    pairs = zip(answers(scan, scan.weight[list(channels)]).T, answers(scan, rows).T, strict=True)
    return [correlation(truth, answer) for truth, answer in pairs]


# Of five, concept channels are also asked to answer to images on which the truth is silent.
@pytest.mark.parametrize(("n_concepts", "least"), [(2, 0.95), (3, 0.95), (5, 0.93)])
def test_planted_channels_are_recovered_over_all_images(scan, n_concepts, least):
    correlations = [r for channels in sets_of(n_concepts) for r in recovered(scan, channels)]
    assert sum(correlations) / len(correlations) >= least
    assert min(correlations) >= 0.8


def test_a_wrong_split_does_not_recover_them(scan):
    channels = sets_of(3)[0]
    halves = torch.full((3, scan.layer.n_taps), 0.5)
    assert max(recovered(scan, channels, masks=halves)) < 0.8


def class_cosines(scan: Scan, pairs: Iterable[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Cosines of the ARVs of two classes for the sum of the channels that were taught them."""
    labels = torch.cat(list(scan.columns("label")))
    pooled = torch.cat(list(scan.columns("pooled")))[:, 0].double()
    mean = [pooled[labels == c].mean(0) for c in range(10)]
    arvs = {p: [scan.weight[list(p)].sum(0).double() * mean[c] for c in p] for p in pairs}
    return {p: float(torch.cosine_similarity(*own, dim=0)) for p, own in arvs.items()}


def test_clusters_find_the_planted_channels_whose_classes_are_fed_differently(scan):
    """No labels: found are all pairs that classes tell apart, and no pair far from it."""
    labels = torch.cat(list(scan.columns("label")))
    cosines = class_cosines(scan, itertools.combinations(range(10), 2))
    agreements = {}
    for channels in cosines:
        one = plant(scan, channels)
        found = unbraid.find(one, concepts="clusters", gamma=0.5)
        if channels[0] in found.concepts:
            members, groups = found.members_in(one), found.concepts[channels[0]]
            concept = torch.cat([members.concept_of(records, groups) for records in one.shards()])
            own = torch.isin(labels, torch.tensor(channels)) & (concept >= 0)
            truth = labels[own].tolist()
            agreements[channels] = adjusted_rand_index(truth, concept[own].tolist())
    different = {channels for channels, cosine in cosines.items() if cosine < 0.5}
    assert len(different) >= 5
    assert different <= agreements.keys()
    assert min(agreements[channels] for channels in different) >= 0.95
    assert max(cosines[channels] for channels in agreements) < 0.6


def test_halves_of_a_class_are_one_concept(scan, tmp_path):
    apart, total = halves_told_apart(scan, 0.5, tmp_path / "halves")
    assert total == 240
    assert apart <= 0.05 * total


def test_shuffled_labels_find_nothing(scan, tmp_path):
    demo = unbraid.scan(load_network(), "mix", load_images("train"), tmp_path / "demo")
    thresholds = {"tau": 0.03, "p": 0.75, "gamma": 0.5}
    assert len(unbraid.find(demo, **thresholds)) > 0
    assert shuffled_findings(demo, thresholds, tmp_path / "shuffled") == 0
