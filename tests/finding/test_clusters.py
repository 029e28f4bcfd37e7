"""Clusters of points: known groups come back, one group stays whole, figures are the oracle's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cluster_oracle as oracle
from checks import assert_bit_equal
from unbraid.finding.clusters import (
    adjusted_rand_index,
    cover,
    directions,
    find_clusters,
    nearest_centres,
)


def normal(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def groups_of(sizes, *, d=32, noise=0.5, seed=0):
    """Points of length one around orthogonal centres, shuffled, and the group of each."""
    truth = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    truth = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))]
    centres = torch.linalg.qr(normal(d, len(sizes), seed + 1))[0].T
    points = centres[truth] + noise / math.sqrt(d) * normal(len(truth), d, seed + 2)
    return F.normalize(points, dim=1), truth


def divide(relevance, origin=0.0):
    """Clusters of images, (N,), and the lowest cosine of two, as `search_clusters` makes them."""
    origin = origin * torch.ones(relevance.shape[1]).double()
    centres, cosine = find_clusters(relevance, origin)
    return nearest_centres(directions(relevance, origin), centres), cosine


def assert_partition(nearest, truth):
    """Two partitions of the same points agree, whatever the names of their parts."""
    assert oracle.adjusted_rand_index(nearest.tolist(), truth.tolist()) == 1


SIZES = [(100, 100), (300, 60), (100,) * 3, (200, 100, 60), (60,) * 5, (150, 100, 80, 70)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("origin", [0.0, 0.05])
def test_separated_groups_come_back(sizes, noise, origin):
    points, truth = groups_of(sizes, noise=noise, seed=10)
    state = torch.get_rng_state()
    found, again = (find_clusters(points, origin * torch.ones(32).double()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert_bit_equal(found[0], again[0])
    assert found[1] == again[1] < 0.5
    nearest, _ = divide(points, origin)
    assert len(found[0]) == len(sizes)
    assert_partition(nearest, truth)
    with pytest.raises(AssertionError):
        assert_partition(nearest.clamp(min=1) if len(sizes) > 2 else nearest * 0, truth)


@pytest.mark.parametrize("noise", [0.9, 1.1])
def test_groups_in_noise_as_long_as_their_centres_come_back_nearly_whole(noise):
    scores = []
    for seed in range(10):
        points, truth = groups_of((150, 100, 80), noise=noise, seed=10 * seed)
        nearest = divide(points)[0]
        own = nearest >= 0
        assert own.double().mean() > 0.9
        scores.append(oracle.adjusted_rand_index(nearest[own].tolist(), truth[own].tolist()))
    assert sorted(scores)[1] >= 0.95


@pytest.mark.parametrize("period", [2, 3, 4])
def test_the_order_of_points_does_not_matter(period):
    """Data sets may go round their classes, and halves by place would part the groups."""
    points, truth = groups_of([80] * period, seed=3)
    turns = truth.argsort(stable=True).view(period, 80).T.flatten()
    for order in (turns, truth.argsort(), torch.randperm(80 * period)):
        assert_partition(divide(points[order])[0], truth[order])


@pytest.mark.parametrize("noise", [1.4, 1.7, 2.0])
def test_images_on_the_verge_of_groups_go_to_the_same_ones_in_any_order(noise):
    """Where places in the data set made the halves, thin evidence fell out otherwise."""
    points, _ = groups_of((120, 90, 60), noise=noise, seed=5)
    nearest, cosine = divide(points)
    assert len(set(nearest.tolist())) > 2
    for seed in range(3):
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
        again, its = divide(points[order])
        assert again.tolist() == nearest[order].tolist()
        assert its == pytest.approx(cosine, rel=1e-9)
        assert again.tolist() != nearest.tolist()


@pytest.mark.parametrize("sizes", [(60, 50), (90, 60, 40), (200,)], ids=str)
@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_clusters_and_their_cosine_are_the_oracles(sizes, noise):
    points, _ = groups_of(sizes, d=12, noise=noise, seed=20)
    origin = 0.1 * normal(1, 12, 4)[0]
    expected, lowest = oracle.find_clusters(points, origin)
    centres, cosine = find_clusters(points, origin)
    torch.testing.assert_close(centres, expected.reshape(centres.shape))
    assert cosine == pytest.approx(lowest, rel=1e-9)
    other = oracle.find_clusters(points, origin + 0.1)[0]
    assert not torch.equal(centres, other)


@pytest.mark.parametrize("n_few", [1, 3, 7])
def test_a_group_of_fewer_than_eight_is_no_cluster(n_few):
    points = torch.eye(3).double().repeat_interleave(torch.tensor([40, 40, n_few]), 0)
    centres = cover(points)
    assert len(centres) == 2
    assert nearest_centres(points, centres)[80:].tolist() == [-1] * n_few


@pytest.mark.parametrize("n_points", [0, 1, 2, 7, 15, 100])
@pytest.mark.parametrize("length", [0.0, 1.0])
def test_points_that_do_not_differ_are_at_most_one_cluster(n_points, length):
    direction = length * F.normalize(normal(1, 7, 3), dim=1)
    nearest, cosine = divide(direction.repeat(n_points, 1))
    assert set(nearest.tolist()) <= {0, -1}
    assert cosine == 1.0


def mixtures(rng, n):
    """Sparse, skewed and correlated: positive mixtures of three kinds of input."""
    kinds = np.abs(np.random.default_rng(7).normal(size=(3, 64)))
    return np.exp(rng.normal(size=(n, 3))) @ kinds * rng.gamma(2.0, size=(n, 64))


def arc(rng, n, degrees):
    angle = math.radians(degrees) * (rng.random(n) - 0.5)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


NULLS = {
    "a ball": lambda rng, n: np.eye(8)[0] + 0.2 * rng.normal(size=(n, 8)),
    "512 dimensions": lambda rng, n: np.eye(512)[0] + rng.normal(size=(n, 512)) / 22,
    "longer in some": lambda rng, n: 3 * np.eye(64)[0] + rng.normal(0, 1 / np.r_[1:65], (n, 64)),
    "all directions": lambda rng, n: rng.normal(size=(n, 64)),
    "rectified": lambda rng, n: rng.normal(0.3, size=(n, 64)).clip(min=0),
    "few rectified": lambda rng, n: rng.normal(0.5, size=(n, 6)).clip(min=0) + 1e-3,
    "sparse": lambda rng, n: rng.gamma(0.1, size=(n, 512)),
    "skewed": lambda rng, n: rng.lognormal(0, 1.5, (n, 512)),
    "heavy tails": lambda rng, n: 5 + rng.standard_t(2, (n, 512)),
    "heavy tails around nothing": lambda rng, n: rng.standard_t(1.5, (n, 512)),
    "noise of any length": lambda rng, n: (
        np.eye(32)[0] + rng.normal(size=(n, 32)) * np.abs(rng.normal(size=(n, 1)))
    ),
    "mixtures": mixtures,
    "an arc of 60 degrees": lambda rng, n: arc(rng, n, 60),
    "an arc of 90 degrees": lambda rng, n: arc(rng, n, 90),
}


def n_divided(null, n_points, n_draws):
    rngs = (np.random.default_rng(1000 + seed) for seed in range(n_draws))
    return sum(divide(torch.as_tensor(null(rng, n_points)))[1] < 0.5 for rng in rngs)


@pytest.mark.parametrize("n_points", [60, 250])
@pytest.mark.parametrize("null", NULLS.values(), ids=NULLS.keys())
def test_one_group_stays_whole_in_95_of_100_draws(null, n_points):
    assert n_divided(null, n_points, 40) <= 0.05 * 40


def test_counting_divided_draws_can_find_some():
    assert n_divided(lambda rng, n: groups_of((n // 2, n // 2))[0], 100, 5) == 5


@pytest.mark.parametrize("seed", range(20))
def test_agreement_is_that_of_pair_counting(seed):
    rng = np.random.default_rng(seed)
    one, other = (rng.integers(1 + seed % 4 + k, size=2 + 3 * seed).tolist() for k in range(2))
    for second in (other, one, [0] * len(one), range(len(one))):
        expected = oracle.adjusted_rand_index(one, second)
        assert adjusted_rand_index(one, second) == pytest.approx(expected, abs=1e-12)
        assert adjusted_rand_index(second, one) == pytest.approx(expected, abs=1e-12)


def test_a_channel_has_no_more_clusters_than_the_bound():
    points, _ = groups_of((40,) * 12, noise=0.05)
    assert len(cover(points)) == 8
    assert len(cover(groups_of((40,) * 7, noise=0.05)[0])) == 7
