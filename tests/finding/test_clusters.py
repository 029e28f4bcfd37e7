"""Clusters of points: known groups come back, one group stays whole, figures are the oracle's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cluster_oracle as oracle
from unbraid.finding.clusters import adjusted_rand_index, chance_of_one, find_clusters, two_means


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


def assert_clusters(found, points):
    """Every point belongs to the nearest centre, and every centre is that of its points."""
    nearest, centres = found
    assert set(nearest.tolist()) == set(range(len(centres)))
    nearness = points @ centres.T
    assert (nearness[range(len(points)), nearest] >= nearness.max(1).values - 1e-12).all()
    for k, centre in enumerate(centres):
        total = points[nearest == k].sum(0)
        torch.testing.assert_close(centre, total / total.norm())


def assert_partition(nearest, truth):
    """Two partitions of the same points agree, whatever the names of their parts."""
    assert oracle.adjusted_rand_index(nearest.tolist(), truth.tolist()) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(100, 100), (300, 30), (150, 100, 60, 40, 20)], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.6])
def test_separated_groups_come_back(sizes, noise, seed):
    points, truth = groups_of(sizes, noise=noise, seed=10 * seed)
    state = torch.get_rng_state()
    found = find_clusters(points)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found[1]) == len(sizes)
    assert_partition(found[0], truth)
    assert_clusters(found, points)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_the_order_of_points_does_not_matter(period):
    """Data sets may go round their classes, and halves by place would part the groups."""
    points, truth = groups_of([80] * period, seed=3)
    turns = truth.argsort(stable=True).view(period, 80).T.flatten()
    for order in (turns, truth.argsort()):
        assert_partition(find_clusters(points[order])[0], truth[order])


def test_the_checks_of_clusters_see_what_is_wrong():
    points, _ = groups_of((40, 30))
    nearest, centres = find_clusters(points)
    wrong = nearest.clone()
    wrong[0] = 1 - wrong[0]
    moved = F.normalize(centres + 0.01, dim=1)
    for corrupted in ((wrong, centres), (nearest, centres.flip(0)), (nearest, moved)):
        with pytest.raises(AssertionError):
            assert_clusters(corrupted, points)
    with pytest.raises(AssertionError):
        assert_partition(wrong, nearest)


def mixtures(rng, n):
    """Sparse, skewed and correlated: positive mixtures of three kinds of input."""
    kinds = np.abs(np.random.default_rng(7).normal(size=(3, 64)))
    return np.exp(rng.normal(size=(n, 3))) @ kinds * rng.gamma(2.0, size=(n, 64))


def arc(rng, n):
    angle = math.radians(90) * (rng.random(n) - 0.5)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


NULLS = {
    "a ball": lambda rng, n: np.eye(8)[0] + 0.2 * rng.normal(size=(n, 8)),
    "longer in some": lambda rng, n: 3 * np.eye(64)[0] + rng.normal(0, 1 / np.r_[1:65], (n, 64)),
    "all directions": lambda rng, n: rng.normal(size=(n, 64)),
    "rectified": lambda rng, n: rng.normal(0.3, size=(n, 64)).clip(min=0),
    "sparse": lambda rng, n: rng.gamma(0.1, size=(n, 512)),
    "skewed": lambda rng, n: rng.lognormal(0, 1.5, (n, 512)),
    "heavy tails": lambda rng, n: 5 + rng.standard_t(2, (n, 512)),
    "mixtures": mixtures,
    "an arc": arc,
}


def n_divided(null, n_points, n_draws):
    rngs = (np.random.default_rng(1000 + seed) for seed in range(n_draws))
    draws = (F.normalize(torch.as_tensor(null(rng, n_points)), dim=1) for rng in rngs)
    return sum(len(find_clusters(points)[1]) > 1 for points in draws)


@pytest.mark.parametrize("n_points", [60, 250])
@pytest.mark.parametrize("null", NULLS.values(), ids=NULLS.keys())
def test_one_group_stays_whole_in_95_of_100_draws(null, n_points):
    assert n_divided(null, n_points, 40) <= 0.05 * 40


def test_counting_divided_draws_can_find_some():
    assert n_divided(lambda rng, n: groups_of((n // 2, n // 2))[0], 60, 5) == 5


@pytest.mark.parametrize(
    "points",
    [
        *(length * torch.ones(100, 2) for length in (0.0, 0.5**0.5)),
        *(torch.eye(2)[torch.arange(n) % 2] for n in (0, 1, 15)),  # too few to test
    ],
)
def test_points_that_do_not_differ_or_are_few_are_one_cluster_and_none_are_none(points):
    nearest, centres = find_clusters(points.double())
    assert nearest.tolist() == [0] * len(points)
    assert centres.shape == (min(len(points), 1), 2)


def test_a_group_of_fewer_than_eight_is_left_with_the_nearest():
    points = torch.eye(3).double().repeat_interleave(torch.tensor([40, 40, 7]), 0)
    nearest, centres = find_clusters(points)
    assert len(centres) == 2
    assert_partition(nearest[:80], points.argmax(1)[:80])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sizes", [(5, 5), (8, 3), (4, 4, 3)], ids=str)
def test_the_cut_is_the_best_of_all(sizes, seed):
    points, _ = groups_of(sizes, d=6, noise=0.3, seed=10 * seed)
    cuts = two_means(points), oracle.best_cut(points)
    found, best = (oracle.scatter(points, cut.tolist()) for cut in cuts)
    assert found == pytest.approx(best, rel=1e-9)


def test_of_several_cuts_the_best_is_taken_and_equal_points_are_not_cut():
    """Five equal groups have many cuts that stand, some of which run through a group."""
    for seed in range(20):
        points, truth = groups_of([30] * 5, noise=0.6, seed=10 * seed)
        side = two_means(points)
        for k in range(5):
            assert side[truth == k].all() or not side[truth == k].any()
    for n_points in (2, 3, 50):
        assert len(two_means(normal(1, 9, 4).repeat(n_points, 1)).unique()) == 1


@pytest.mark.parametrize("sizes", [(100,), (150, 100), (90, 9), (101, 100, 60)], ids=str)
@pytest.mark.parametrize("noise", [0.5, 2.0, 4.0])
def test_chance_is_the_oracles(sizes, noise):
    points, _ = groups_of(sizes, noise=noise)
    expected = oracle.chance_of_one(points, two_means)
    assert chance_of_one(points) == pytest.approx(expected, rel=1e-9)


def test_chance_without_a_cut_or_a_point_to_count_is_one():
    assert chance_of_one(normal(1, 4, 0).repeat(20, 1)) == 1.0
    ends = torch.tensor([-1.0, 1.0]).repeat_interleave(8)
    far = torch.stack([ends.repeat_interleave(2), 100 * torch.ones(32)], 1).double()
    far[1::2, 0] *= 3  # every other point lies beyond both ends
    assert chance_of_one(far) == oracle.chance_of_one(far, two_means)


@pytest.mark.parametrize("seed", range(8))
def test_agreement_is_that_of_pair_counting(seed):
    rng = np.random.default_rng(seed)
    one, other = (rng.integers(1 + seed % 4 + k, size=2 + 8 * seed).tolist() for k in range(2))
    for second in (other, one, [0] * len(one), range(len(one))):
        expected = oracle.adjusted_rand_index(one, second)
        assert adjusted_rand_index(one, second) == pytest.approx(expected, abs=1e-12)
