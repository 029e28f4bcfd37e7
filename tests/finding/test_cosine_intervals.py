"""How sure a cosine is, against replicates that are computed one by one from the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import oracle
import unbraid
from checks import Truth, assert_close, truth_of
from handmade import write_scan
from tiny_networks import SyntheticImages, build
from unbraid.finding import cosine_intervals as chance
from unbraid.finding.arv import class_sums
from unbraid.finding.cosine_intervals import uniforms, with_chance
from unbraid.finding.findings import Findings, Pair
from unbraid.scanning.records import Scan, read_shard, write_shard

FIGURES = ("low", "high", "half1", "half2")


# Slowly.


def slow_uniform(index: int, number: int) -> float:
    """SplitMix64's output at a counter, in whole numbers of any size."""
    z = (index * 2**20 + number) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (((z ^ (z >> 31)) >> 11) + 0.5) / 2**53


def slow_replicates(images: dict[int, Tensor]) -> list[Tensor]:
    """Stretched weighted means of the images of a class, by place in the data set."""
    n = len(images)
    mean = sum(images.values()) / n
    replicates = []
    for b in range(200):
        total, weights = torch.zeros_like(mean), 0.0
        for index, vector in images.items():
            weight = -math.log(slow_uniform(index, b))
            total, weights = total + weight * vector, weights + weight
        replicates.append(mean + math.sqrt((n + 1) / (n - 1)) * (total / weights - mean))
    return replicates


def slow_quantile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    below = math.floor(part * (len(ordered) - 1))
    rest = part * (len(ordered) - 1) - below
    return ordered[below] + rest * (ordered[below + 1] - ordered[below])


def slow_pull(images: dict[int, Tensor], replicates: Sequence[Tensor]) -> float:
    mean, centre = sum(images.values()) / len(images), sum(replicates) / len(replicates)
    length = float((mean**2).sum())
    noise = sum(float(((v - centre) ** 2).sum()) for v in replicates) / (len(replicates) - 1)
    return (length + noise) / (length - noise) if noise < length else math.inf


def slow_half(images: dict[int, Tensor]) -> float:
    cosines = []
    for h in range(10):
        order = sorted(images, key=lambda index, h=h: slow_uniform(index, 2**19 + h))
        parts = order[: len(order) // 2], order[len(order) // 2 :]
        one, other = (sum(images[index] for index in part) / len(part) for part in parts)
        cosines.append(oracle.cosine(one, other))
    return sum(cosines) / len(cosines)


@dataclass
class SlowChance:
    truth: Truth
    _replicates: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def images(self, channel: int, label: int) -> dict[int, Tensor]:
        return {n: self.truth.input_relevance[n, channel] for n in self.truth.images((label,))}

    def replicates(self, channel: int, label: int) -> list[Tensor]:
        key = channel, label
        if key not in self._replicates:
            self._replicates[key] = slow_replicates(self.images(channel, label))
        return self._replicates[key]

    def figures(self, pair: Pair) -> dict[str, float]:
        sides = [(pair.channel, pair.class1), (pair.channel, pair.class2)]
        one, other = (self.replicates(*side) for side in sides)
        cosines = [oracle.cosine(u, v) for u, v in zip(one, other, strict=True)]
        pull = math.sqrt(
            math.prod(slow_pull(self.images(*side), self.replicates(*side)) for side in sides)
        )
        low, high = (slow_quantile(cosines, part) * pull for part in (0.025, 0.975))
        if pull == math.inf:
            low, high = -1.0, 1.0
        halves = [slow_half(self.images(*side)) for side in sides]
        return dict(zip(FIGURES, [max(low, -1.0), min(high, 1.0), *halves], strict=True))


def assert_chance(pairs: Sequence[Pair], slow: SlowChance) -> None:
    """Every pair has its interval and yardsticks."""
    assert pairs
    for pair in pairs:
        for name, expected in slow.figures(pair).items():
            assert_close(getattr(pair, name), expected)


@dataclass
class Case:
    pairs: tuple[Pair, ...]
    slow: SlowChance


@pytest.fixture(scope="module", params=["3x3", "groups", "tokens"])
def case(request, tmp_path_factory) -> Case:
    network = build(request.param)
    dataset = SyntheticImages(28, noise=2.0)
    scan = unbraid.scan(network, "layer", dataset, tmp_path_factory.mktemp("scan"), batch_size=16)
    concepts = [[label] for label in range(4)]
    pairs = unbraid.find(scan, channels={0: concepts, 5: concepts}).pairs
    return Case(pairs, SlowChance(truth_of(network, dataset)))


def test_intervals_and_yardsticks_are_those_of_replicates_made_one_by_one(case):
    assert len(case.pairs) == 12
    assert len({(pair.low, pair.high) for pair in case.pairs}) > 8
    assert_chance(case.pairs, case.slow)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("by", [1e-6, -1e-6])
def test_a_figure_that_is_off_is_seen(case, name, by):
    *others, last = case.pairs
    wrong = replace(last, **{name: getattr(last, name) + by})
    with pytest.raises(AssertionError):
        assert_chance([*others, wrong], case.slow)


def test_the_figures_of_another_channel_are_seen(case):
    other = next(pair for pair in case.pairs if pair.channel != case.pairs[0].channel)
    wrong = replace(case.pairs[0], **{name: getattr(other, name) for name in FIGURES})
    with pytest.raises(AssertionError):
        assert_chance([wrong], case.slow)


def test_replicates_of_every_image_number_are_used():
    numbers = uniforms(torch.tensor([0, 1, 41, 1_281_166]), 7, 5)
    expected = [[slow_uniform(i, k) for k in range(7, 12)] for i in (0, 1, 41, 1_281_166)]
    assert_close(numbers, expected, 0)


def test_random_numbers_are_even_and_unrelated():
    numbers = uniforms(torch.arange(2000), 0, 200)
    assert 0 < numbers.min() < numbers.max() < 1
    assert abs(numbers.mean() - 1 / 2) < 0.002  # 4 standard errors
    assert abs(numbers.var() - 1 / 12) < 0.001
    for one, other in (
        (numbers[1:], numbers[:-1]),  # neighbours in the data set
        (numbers[:, 1:], numbers[:, :-1]),  # neighbours among replicates
        (numbers, uniforms(torch.arange(2000), 1 << 19, 200)),  # replicates and halvings
    ):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.007


# Whatever way records are divided.

N_IMAGES, N_CLASSES = 60, 5


def random_scan(folder: Path, *, shard_size: int = 7, n_more: int = 0, dtype=torch.float64) -> Scan:
    """Five classes of twelve images; `n_more` images of a sixth class behind them."""
    generator = torch.Generator().manual_seed(3)
    labels = [n % N_CLASSES for n in range(N_IMAGES)] + [N_CLASSES] * n_more
    causes = torch.randn(N_CLASSES + 1, 6, generator=generator).double()
    weight = torch.randn(3, 6, generator=generator)
    noise = torch.randn(N_IMAGES + 9, 6, generator=generator).double()[: len(labels)]
    return write_scan(
        folder,
        shares=torch.full((len(labels), 3), 0.3, dtype=dtype),
        labels=labels,
        pooled=(causes[labels] + noise).to(dtype),
        weight=weight.to(dtype),
        shard_size=shard_size,
    )


def figures(pairs: Sequence[Pair]) -> Tensor:
    rows = [[getattr(pair, name) for name in FIGURES] for pair in pairs]
    return torch.tensor(rows, dtype=torch.float64)


def pairs_of(scan: Scan) -> tuple[Pair, ...]:
    concepts = [[label] for label in range(N_CLASSES)]
    return unbraid.find(scan, channels={0: concepts, 2: concepts}).pairs


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Tensor:
    return figures(pairs_of(random_scan(tmp_path_factory.mktemp("usual"))))


@pytest.mark.parametrize(
    ("options", "n_bytes", "tolerance"),
    [
        *(({"shard_size": size}, 1 << 30, 1e-9) for size in (1, 12, 100)),
        ({"n_more": 9}, 1 << 30, 1e-9),
        *(({"shard_size": 100}, n_bytes, 1e-9) for n_bytes in (1, 10_000)),
        ({"dtype": torch.float32}, 1 << 30, 1e-4),
    ],
)
def test_shards_other_classes_memory_and_precision_do_not_matter(
    options, n_bytes, tolerance, usual, tmp_path, monkeypatch
):
    monkeypatch.setattr(chance, "_BYTES_AT_ONCE", n_bytes)
    scan = random_scan(tmp_path, **options)
    pairs = pairs_of(scan)
    assert_close(figures(pairs), usual, tolerance)
    assert pairs_of(scan) == pairs


def test_the_order_of_records_does_not_matter(usual, tmp_path):
    scan = random_scan(tmp_path, shard_size=20)
    full = range(scan.manifest.n_images // 20)
    every = [read_shard(scan.path, shard) for shard in full]
    for shard, records in zip(full, reversed(every), strict=True):
        write_shard(scan.path, shard, records)
    some = replace(scan, manifest=replace(scan.manifest, indices="in no order of places"))
    assert_close(figures(pairs_of(some)), usual)


def test_without_pairs_nothing_is_read(tmp_path):
    scan = random_scan(tmp_path)
    sums = class_sums(scan, [])
    for shard in tmp_path.glob("shard-*"):
        shard.unlink()
    assert with_chance(scan, sums, []) == []


# Few images, no noise, nothing but noise.


def two_classes(folder: Path, one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]):
    """The pair of two classes whose images have these relevance vectors."""
    pooled = torch.tensor([*one, *other], dtype=torch.float64)
    labels = [0] * len(one) + [1] * len(other)
    shares = torch.full((len(labels), 1), 0.5).double()
    scan = write_scan(folder, shares=shares, labels=labels, pooled=pooled)
    (pair,) = unbraid.find(scan, channels={0: [[0], [1]]}).pairs
    return pair


NOISY = [(1.0, 0.2), (0.8, -0.1), (1.1, 0.0), (0.9, 0.1)]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        # Of a single image nothing is known.
        ([(0.1, 1.0)], NOISY, (math.nan, math.nan, math.nan, None)),
        # Two images are each other's halves.
        ([(0.0, 1.0), (0.6, 0.8)], NOISY, (None, None, 0.8, None)),
        # Images without noise leave no doubt, nor do those that do not feed the channel at all.
        ([(0.6, 0.8)] * 5, [(2.0, 0.0)] * 3, (0.6, 0.6, 1.0, 1.0)),
        ([(0.0, 0.0)] * 4, [(0.0, 0.0)] * 3, (1.0, 1.0, 1.0, 1.0)),
        # Where there may be nothing but noise, 1/7 of a squared unit, the cosine can be anything.
        *(
            ([(mean + 1, 0.01), (mean - 1, 0.01)] * 4, NOISY, (-1.0, 1.0, None, None))
            for mean in (0.01, 0.2, 0.3)
        ),
    ],
)
def test_few_images_no_noise_and_nothing_but_noise(one, other, expected, tmp_path):
    pair = two_classes(tmp_path, one, other)
    assert math.isfinite(pair.cosine)
    assert not pair.low > pair.high
    for name, value in zip(FIGURES, expected, strict=True):
        if value is not None:
            assert getattr(pair, name) == pytest.approx(value, abs=1e-9, nan_ok=True)


def test_where_there_is_more_than_noise_something_is_known(tmp_path):
    pair = two_classes(tmp_path, [(2.0, 0.01), (0.0, 0.01)] * 4, NOISY)
    assert pair.low > 0.5
    assert pair.half2 > 0.9


# How often an interval holds the truth.

N_TRIALS, N_TAPS = 200, 24


def trials(folder: Path, cosine: float, n_images: int, noise: float, gamma: float) -> Findings:
    """Pairs of classes with causes at a known angle, each at a channel of its own."""
    generator = torch.Generator().manual_seed(11)
    one, other = torch.randn(2, N_TRIALS, N_TAPS, generator=generator).double()
    one /= one.norm(dim=1, keepdim=True)
    other -= (one * other).sum(1, keepdim=True) * one
    other = cosine * one + math.sqrt(1 - cosine**2) * other / other.norm(dim=1, keepdim=True)
    causes = torch.stack([one, other], 1).flatten(0, 1)  # (2 * trials, taps)
    spread = math.sqrt(math.log(1 + noise**2))
    factors = torch.randn(n_images, *causes.shape, generator=generator).double()
    pooled = causes * (spread * factors - spread**2 / 2).exp()  # mean 1, skewed
    scan = write_scan(
        folder,
        shares=torch.full((n_images * len(causes), 1), 0.5).expand(-1, N_TRIALS).double(),
        labels=list(range(len(causes))) * n_images,
        pooled=pooled.flatten(0, 1),
        weight=torch.ones(N_TRIALS, N_TAPS).double(),
        shard_size=5000,
    )
    concepts = {o: [[2 * o], [2 * o + 1]] for o in range(N_TRIALS)}
    return unbraid.find(scan, channels=concepts, gamma=gamma)


def assert_covered(pairs: Sequence[Pair], cosine: float, most_missed: float) -> None:
    """Intervals hold the truth about as often as they say, not always."""
    n_below = sum(pair.high < cosine for pair in pairs)
    n_above = sum(pair.low > cosine for pair in pairs)
    assert 0 < (n_below + n_above) / len(pairs) <= most_missed


@pytest.fixture(scope="module")
def some_trials(tmp_path_factory) -> tuple[Pair, ...]:
    return trials(tmp_path_factory.mktemp("trials"), 0.45, 40, 1.0, 0.5).pairs


def test_intervals_hold_the_truth_as_often_as_they_say(some_trials):
    assert_covered(some_trials, 0.45, 0.08)


@pytest.mark.parametrize(("cosine", "n_images", "noise"), [(0.45, 5, 0.5), (0.8, 20, 1.5)])
def test_a_little_less_often_with_few_images_or_much_noise(cosine, n_images, noise, tmp_path):
    assert_covered(trials(tmp_path, cosine, n_images, noise, 0.5).pairs, cosine, 0.12)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda p: replace(p, low=(3 * p.low + p.high) / 4, high=(p.low + 3 * p.high) / 4),
        lambda p: replace(p, low=p.low - 0.1, high=p.high - 0.1),
        lambda p: replace(p, low=p.low + 0.1, high=p.high + 0.1),
        lambda p: replace(p, low=-1.0, high=1.0),
    ],
    ids=["half as wide", "too low", "too high", "without bounds"],
)
def test_intervals_that_miss_the_truth_are_seen(corrupt: Callable[[Pair], Pair], some_trials):
    with pytest.raises(AssertionError):
        assert_covered([corrupt(pair) for pair in some_trials], 0.45, 0.08)


def test_low_cosines_that_are_only_noise_are_hardly_ever_sure(tmp_path):
    found = trials(tmp_path, 1.0, 4, 4.0, 0.5)
    low = [pair for pair in found.pairs if pair.cosine < 0.5]
    assert len(low) > 50  # two classes with one and the same cause
    assert sum(not found.uncertain(pair) for pair in low) <= 0.05 * len(low)


def test_cosines_that_are_truly_low_are_mostly_sure(tmp_path):
    found = trials(tmp_path, 0.2, 20, 1.0, 0.5)
    low = [pair for pair in found.pairs if pair.cosine < 0.5]
    assert sum(not found.uncertain(pair) for pair in low) >= 0.9 * len(low)
