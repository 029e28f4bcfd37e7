"""Truth tests of METHOD.md section 7, on a small network whose channels are taught a job each."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

import fashion
import unbraid
from truth import halves_told_apart, shuffled_findings
from unbraid.demo.network import load_images, load_network, normalise
from unbraid.finding.clusters import adjusted_rand_index, cluster_images, top_images

N_SETS = 6  # of planted channels, for each number of them


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    images = load_images("train")
    with torch.random.fork_rng(devices=[]):
        pictures, labels = normalise(images.pictures), torch.tensor(images.targets)
        network = fashion.train("jobs", pictures, labels, seed=1)
    folder = tmp_path_factory.mktemp("jobs")
    return unbraid.scan(network, fashion.LAYER, images, folder, batch_size=250)


def answers(scan, rows):
    """What rows (K, J) answer to every image, (N, K), without bias."""
    return torch.cat([r.pooled[:, 0].double() @ rows.double().T for r in scan.shards()])


def correlation(one, other):
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


def plant(scan, channels):
    """Add the weights of channels up, in the place of the first."""
    weight, bias = scan.weight.clone(), scan.bias.clone()
    weight[channels[0]] = scan.weight[list(channels)].sum(0)
    bias[channels[0]] = scan.bias[list(channels)].sum()
    return replace(scan, weight=weight, bias=bias)


def sets_of(n_concepts):
    """Sets of the ten taught channels; channel c was taught class c."""
    every = list(itertools.combinations(range(10), n_concepts))
    return random.Random(n_concepts).sample(every, N_SETS)


def recovered(scan, channels, masks=None):
    """Correlations of concept channels with the channels they were made of, over all images."""
    one = plant(scan, channels)
    found = unbraid.find(one, channels={channels[0]: [[c] for c in channels]})
    rows = unbraid.split(one, found)[channels[0]].rows
    if masks is not None:
        rows = masks * one.weight[channels[0]]
    pairs = zip(answers(scan, scan.weight[list(channels)]).T, answers(scan, rows).T, strict=True)
    return [correlation(truth, answer) for truth, answer in pairs]


@pytest.mark.parametrize("n_concepts", [2, 3, 5])
def test_planted_channels_are_recovered_over_all_images(scan, n_concepts):
    correlations = [r for channels in sets_of(n_concepts) for r in recovered(scan, channels)]
    assert sum(correlations) / len(correlations) >= 0.95
    assert min(correlations) >= 0.8


def test_a_wrong_split_does_not_recover_them(scan):
    channels = sets_of(3)[0]
    halves = torch.full((3, scan.layer.n_taps), 0.5)
    assert max(recovered(scan, channels, masks=halves)) < 0.8


@pytest.mark.parametrize("n_concepts", [2, 3])
def test_clusters_find_planted_channels_without_labels(scan, n_concepts):
    agreements = []
    for channels in sets_of(n_concepts):
        one = plant(scan, channels)
        described = next(top for o, top in top_images(one) if o == channels[0])
        own = torch.isin(described.label, torch.tensor(channels))
        number = cluster_images(described, channels[0], 0)[1]
        agreements.append(adjusted_rand_index(described.label[own].tolist(), number[own].tolist()))
    assert sorted(agreements)[1] >= 0.7  # all sets but one: two of the classes may be fed alike


def test_halves_of_a_class_are_one_concept_and_shuffled_labels_find_nothing(scan, tmp_path):
    apart, total = halves_told_apart(scan, 0.5, tmp_path / "halves")
    assert total == 240
    assert apart <= 0.05 * total
    demo = unbraid.scan(load_network(), "mix", load_images("train"), tmp_path / "demo")
    thresholds = {"tau": 0.03, "p": 0.75, "gamma": 0.5}
    assert len(unbraid.find(demo, **thresholds)) > 0
    assert shuffled_findings(demo, thresholds, tmp_path / "shuffled") == 0
