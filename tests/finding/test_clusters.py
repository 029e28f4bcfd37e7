"""Clusters of points: known groups come back, one group stays whole, figures are the oracle's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cluster_oracle as oracle
from checks import assert_bit_equal
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
    assert nearest.shape == (len(points),)
    assert set(nearest.tolist()) == set(range(len(centres)))
    nearness = points @ centres.T
    assert (nearness[range(len(points)), nearest] >= nearness.max(1).values - 1e-12).all()
    for k, centre in enumerate(centres):
        total = points[nearest == k].sum(0)
        torch.testing.assert_close(centre, total / total.norm())


def assert_partition(nearest, truth):
    """Two partitions of the same points agree, whatever the names of their parts."""
    assert oracle.adjusted_rand_index(nearest.tolist(), truth.tolist()) == 1


SIZES = [(100, 100), (300, 30), (100,) * 3, (200, 100, 30), (60,) * 5, (150, 100, 60, 40, 20)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.6])
def test_separated_groups_come_back(sizes, noise, seed):
    points, truth = groups_of(sizes, noise=noise, seed=10 * seed)
    state = torch.get_rng_state()
    found, again = find_clusters(points), find_clusters(points.clone())
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(found, again, strict=True):
        assert_bit_equal(one, other)
    assert len(found[1]) == len(sizes)
    assert_partition(found[0], truth)
    assert_clusters(found, points)


def test_small_groups_of_points_without_noise_come_back():
    points = torch.eye(5).double().repeat_interleave(torch.tensor([8, 9, 10, 20, 40]), 0)
    nearest, centres = find_clusters(points)
    assert_partition(nearest, points.argmax(1))
    assert len(centres) == 5


@pytest.mark.parametrize("noise", [0.9, 1.1])
def test_groups_in_noise_as_long_as_their_centres_come_back_nearly_whole(noise):
    scores = []
    for seed in range(10):
        points, truth = groups_of((150, 100, 80), noise=noise, seed=10 * seed)
        nearest = find_clusters(points)[0]
        scores.append(oracle.adjusted_rand_index(nearest.tolist(), truth.tolist()))
    assert sorted(scores)[1] >= 0.95


@pytest.mark.parametrize("d", [1, 2, 3])
def test_points_of_few_dimensions_are_divided(d):
    truth = torch.arange(60) % 2
    points = F.normalize((2.0 * truth[:, None] - 1) * torch.ones(1, d).double(), dim=1)
    assert_partition(find_clusters(points)[0], truth)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_the_order_of_points_does_not_matter(period):
    """Data sets may go round their classes, and halves by place would part the groups."""
    points, truth = groups_of([80] * period, seed=3)
    turns = truth.argsort(stable=True).view(period, 80).T.flatten()
    for order in (turns, truth.argsort(), torch.randperm(80 * period)):
        assert_partition(find_clusters(points[order])[0], truth[order])


def test_the_checks_of_clusters_see_what_is_wrong():
    points, _ = groups_of((40, 30))
    nearest, centres = find_clusters(points)
    wrong = nearest.clone()
    wrong[0] = 1 - wrong[0]
    moved, more = F.normalize(centres + 0.01, dim=1), torch.cat([centres, centres[:1]])
    of_wrong_centres = ((nearest, other) for other in (centres.flip(0), moved, more))
    for corrupted in ((wrong, centres), (nearest[1:], centres), *of_wrong_centres):
        with pytest.raises(AssertionError):
            assert_clusters(corrupted, points)
    with pytest.raises(AssertionError):
        assert_partition(wrong, nearest)


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
    draws = (F.normalize(torch.as_tensor(null(rng, n_points)), dim=1) for rng in rngs)
    return sum(len(find_clusters(points)[1]) > 1 for points in draws)


@pytest.mark.parametrize("n_points", [60, 250])
@pytest.mark.parametrize("null", NULLS.values(), ids=NULLS.keys())
def test_one_group_stays_whole_in_95_of_100_draws(null, n_points):
    assert n_divided(null, n_points, 40) <= 0.05 * 40


def test_two_random_halves_of_a_group_are_one_and_two_groups_are_two():
    points = torch.as_tensor(np.random.default_rng(5).gamma(0.5, size=(300, 40)) + 0.2)
    for half in (points[:150], points[150:], points):
        assert len(find_clusters(F.normalize(half, dim=1))[1]) == 1
    assert n_divided(lambda rng, n: groups_of((n // 2, n // 2))[0], 60, 5) == 5


@pytest.mark.parametrize("n_points", [1, 2, 3, 8, 15, 16, 17, 100])
@pytest.mark.parametrize("length", [0.0, 1.0])
def test_points_that_do_not_differ_are_one_cluster(n_points, length):
    direction = length * F.normalize(normal(1, 7, 3), dim=1)
    nearest, centres = find_clusters(direction.repeat(n_points, 1))
    assert nearest.tolist() == [0] * n_points
    torch.testing.assert_close(centres, direction)


@pytest.mark.parametrize("n_points", [0, 1, 2, 7, 15])
def test_too_few_points_to_test_are_one_cluster_and_none_are_none(n_points):
    nearest, centres = find_clusters(torch.eye(2).double()[torch.arange(n_points) % 2])
    assert nearest.tolist() == [0] * n_points
    assert centres.shape == (min(n_points, 1), 2)


@pytest.mark.parametrize("n_few", [1, 3, 7])
def test_a_group_of_fewer_than_eight_is_left_with_the_nearest(n_few):
    points = torch.eye(3).double().repeat_interleave(torch.tensor([40, 40, n_few]), 0)
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


def test_the_best_cut_is_better_than_any_other():
    points, _ = groups_of((4, 3), d=4)
    best = oracle.best_cut(points)
    for n in range(7):
        other = best.clone()
        other[n] = ~other[n]
        assert oracle.scatter(points, other.tolist()) > oracle.scatter(points, best.tolist())


def test_of_several_cuts_the_best_is_taken_and_equal_points_are_not_cut():
    """Five equal groups have many cuts that stand, some of which run through a group."""
    for seed in range(20):
        points, truth = groups_of([30] * 5, noise=0.6, seed=10 * seed)
        side = two_means(points)
        for k in range(5):
            assert side[truth == k].all() or not side[truth == k].any()
    for n_points in (2, 3, 50):
        assert len(two_means(normal(1, 9, 4).repeat(n_points, 1)).unique()) == 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.2, 0.4, 0.6])
def test_chance_is_the_oracles_for_few_points(noise, seed):
    points, _ = groups_of((9, 9), d=5, noise=noise, seed=10 * seed)
    expected = oracle.chance_of_one(points, oracle.best_cut)
    assert chance_of_one(points) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sizes", [(100,), (150, 100), (90, 9), (101, 100, 60)], ids=str)
@pytest.mark.parametrize("noise", [0.5, 2.0, 4.0])
def test_chance_is_the_oracles_for_many_points(sizes, noise):
    points, _ = groups_of(sizes, noise=noise)
    expected = oracle.chance_of_one(points, two_means)
    assert chance_of_one(points) == pytest.approx(expected, rel=1e-9)


def test_chance_has_values_of_all_sizes_and_is_one_without_a_cut_or_a_point_to_count():
    """So that agreement with the oracle says something."""
    points = [groups_of((100, 100), noise=noise, seed=4)[0] for noise in (0.5, 2.0, 3.0)]
    values = [chance_of_one(of_noise) for of_noise in points]
    assert values[0] < 1e-6 < values[1] < 0.5 < values[2] <= 1
    assert chance_of_one(normal(1, 4, 0).repeat(20, 1)) == 1.0
    ends = torch.tensor([-1.0, 1.0]).repeat_interleave(8)
    far = torch.stack([ends.repeat_interleave(2), 100 * torch.ones(32)], 1).double()
    far[1::2, 0] *= 3  # every other point lies beyond both ends
    assert chance_of_one(far) == oracle.chance_of_one(far, two_means)


@pytest.mark.parametrize("seed", range(20))
def test_agreement_is_that_of_pair_counting(seed):
    rng = np.random.default_rng(seed)
    one, other = (rng.integers(1 + seed % 4 + k, size=2 + 3 * seed).tolist() for k in range(2))
    for second in (other, one, [0] * len(one), range(len(one))):
        expected = oracle.adjusted_rand_index(one, second)
        assert adjusted_rand_index(one, second) == pytest.approx(expected, abs=1e-12)
        assert adjusted_rand_index(second, one) == pytest.approx(expected, abs=1e-12)
