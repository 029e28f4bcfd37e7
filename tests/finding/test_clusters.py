"""Clusters of points: known groups come back, one group stays whole, figures are the oracle's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Gamma, StudentT

import cluster_oracle as oracle
from unbraid.finding.clusters import adjusted_rand_index, chance_of_one, find_clusters, two_means


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def groups_of(
    sizes: Sequence[int], *, d: int = 32, noise: float = 0.5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Points of length one around orthogonal centres, shuffled, and the group of each.

    noise: length of what is added to a centre, of length one.
    """
    truth = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    truth = truth[torch.randperm(len(truth), generator=generator(seed))]
    centres = torch.linalg.qr(normal(d, len(sizes), seed + 1))[0].T
    points = centres[truth] + noise / math.sqrt(d) * normal(len(truth), d, seed + 2)
    return F.normalize(points, dim=1), truth


def assert_clusters(found: tuple[Tensor, Tensor], points: Tensor) -> None:
    """Every point belongs to the nearest centre, and every centre is that of its points."""
    nearest, centres = found
    assert nearest.shape == (len(points),)
    assert sorted(set(nearest.tolist())) == list(range(len(centres)))
    for n, point in enumerate(points):
        nearness = [float(point @ centre) for centre in centres]
        assert nearness[int(nearest[n])] >= max(nearness) - 1e-12
    for k, centre in enumerate(centres):
        total = sum(point for n, point in enumerate(points) if nearest[n] == k)
        torch.testing.assert_close(centre, total / total.norm())


def assert_partition(nearest: Tensor, truth: Tensor) -> None:
    """Two partitions of the same points agree, whatever the names of their parts."""
    assert oracle.adjusted_rand_index(nearest.tolist(), truth.tolist()) == 1


# Known groups.

SIZES = [(100, 100), (300, 30), (200, 100, 30), (60,) * 5, (150, 100, 60, 40, 20)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.6])
def test_separated_groups_come_back(sizes, noise, seed):
    points, truth = groups_of(sizes, noise=noise, seed=10 * seed)
    found = find_clusters(points)
    assert len(found[1]) == len(sizes)
    assert_partition(found[0], truth)
    assert_clusters(found, points)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_the_order_of_points_does_not_matter(period):
    """Data sets may go round their classes, and halves by place would part the groups."""
    points, truth = groups_of([80] * period, seed=3)
    turns = truth.argsort(stable=True).view(period, 80).T.flatten()
    assert truth[turns][: 2 * period].tolist() == 2 * list(range(period))
    for order in (turns, torch.randperm(80 * period, generator=generator(0)), truth.argsort()):
        assert_partition(find_clusters(points[order])[0], truth[order])


def test_find_clusters_leaves_torchs_random_numbers_alone():
    state = torch.get_rng_state()
    find_clusters(groups_of((50, 40, 30), noise=1.0)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_check_of_clusters_sees_what_is_wrong():
    points, _ = groups_of((40, 30))
    nearest, centres = find_clusters(points)
    wrong = nearest.clone()
    wrong[0] = 1 - wrong[0]
    for corrupted in (
        (wrong, centres),
        (nearest, centres.flip(0)),
        (nearest, torch.cat([centres, centres[:1]])),
        (nearest, F.normalize(centres + 0.01, dim=1)),
        (nearest[1:], centres),
    ):
        with pytest.raises(AssertionError):
            assert_clusters(corrupted, points)
    with pytest.raises(AssertionError):
        assert_partition(wrong, nearest)


# One group stays whole.


def draw(kind: Distribution, n: int, d: int, seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.sample((n, d)).double()


def arc(degrees: float, n: int, seed: int) -> Tensor:
    angle = math.radians(degrees) * (torch.rand(n, generator=generator(seed)).double() - 0.5)
    return torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)


def part_of_a_mixture(n: int, seed: int) -> Tensor:
    """Sparse, skewed and correlated: positive mixtures of three kinds of input."""
    kinds = normal(3, 64, 7).abs()
    return (normal(n, 3, seed).exp() @ kinds) * draw(Gamma(2.0, 1.0), n, 64, seed)


NULLS: dict[str, Callable[[int, int], Tensor]] = {
    "normal around a centre": lambda n, seed: torch.eye(8)[0] + 0.2 * normal(n, 8, seed),
    "normal, longer in some": lambda n, seed: (
        3 * torch.eye(64)[0] + normal(n, 64, seed) / torch.arange(1, 65)
    ),
    "all directions": lambda n, seed: normal(n, 64, seed),
    "rectified": lambda n, seed: (normal(n, 64, seed) + 0.3).clamp(min=0),
    "sparse": lambda n, seed: draw(Gamma(0.1, 1.0), n, 512, seed),
    "skewed": lambda n, seed: (1.5 * normal(n, 512, seed)).exp(),
    "heavy tails": lambda n, seed: 5 + draw(StudentT(2.0), n, 512, seed),
    "noise of any length": lambda n, seed: (
        torch.eye(32)[0] + normal(n, 32, seed) * normal(n, 1, seed).abs()
    ),
    "mixtures": part_of_a_mixture,
    "an arc of 60 degrees": lambda n, seed: arc(60, n, seed),
    "an arc of 90 degrees": lambda n, seed: arc(90, n, seed),
}


def n_divided(null: Callable[[int, int], Tensor], n_points: int, n_draws: int) -> int:
    """How many draws of a null come out as more than one cluster."""
    draws = (F.normalize(null(n_points, 1000 + seed).double(), dim=1) for seed in range(n_draws))
    return sum(len(find_clusters(points)[1]) > 1 for points in draws)


@pytest.mark.parametrize("n_points", [60, 250])
@pytest.mark.parametrize("null", NULLS.values(), ids=NULLS.keys())
def test_one_group_stays_whole_in_95_of_100_draws(null, n_points):
    n_draws = 40
    assert n_divided(null, n_points, n_draws) <= 0.05 * n_draws


def test_counting_divided_draws_can_find_some():
    assert n_divided(lambda n, seed: groups_of((n // 2, n // 2), seed=seed)[0], 60, 5) == 5


# Odd input.


@pytest.mark.parametrize(
    "points",
    [
        *(length * torch.ones(n, 2) for n in (16, 17, 100) for length in (0.0, 0.5**0.5)),
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


# The cut.


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


# The test of a cut.


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


# Agreement of partitions.


@pytest.mark.parametrize("seed", range(8))
def test_agreement_is_that_of_pair_counting(seed):
    n_things = 2 + 8 * seed
    one, other = (
        torch.randint(1 + seed % 4 + k, (n_things,), generator=generator(seed + 100 * k)).tolist()
        for k in range(2)
    )
    for first, second in ((one, other), (one, one), (one, [0] * n_things), (one, range(n_things))):
        expected = oracle.adjusted_rand_index(first, second)
        assert adjusted_rand_index(first, second) == pytest.approx(expected, abs=1e-12)
        assert adjusted_rand_index(second, first) == pytest.approx(expected, abs=1e-12)
