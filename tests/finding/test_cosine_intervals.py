"""How sure a cosine is, against replicates that are computed one by one from the images."""

import math
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import oracle
import unbraid
from checks import assert_close
from handmade import scan_of_causes, write_scan
from unbraid.finding import cosine_intervals
from unbraid.finding import find as find_module
from unbraid.scanning.records import read_shard, write_shard

FIGURES = ("low", "high", "half1", "half2")
NOISY = [(1.0, 0.2), (0.8, -0.1), (1.1, 0.0), (0.9, 0.1)]
N_TRIALS, N_TAPS = 200, 24


def slow_uniform(index, number):
    """SplitMix64's output at a counter, in whole numbers of any size."""
    z = (index * 2**20 + number) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (((z ^ (z >> 31)) >> 11) + 0.5) / 2**53


def slow_replicates(images):
    """Stretched weighted means of the images of a class: relevance vectors by index."""
    n = len(images)
    mean = sum(images.values()) / n
    replicates = []
    for b in range(200):
        weights = [-math.log(slow_uniform(index, b)) for index in images]
        drawn = sum(w * v for w, v in zip(weights, images.values(), strict=True)) / sum(weights)
        replicates.append(mean + math.sqrt((n + 1) / (n - 1)) * (drawn - mean))
    return replicates


def slow_pull(images, replicates):
    mean, centre = sum(images.values()) / len(images), sum(replicates) / len(replicates)
    length = float((mean**2).sum())
    noise = sum(float(((v - centre) ** 2).sum()) for v in replicates) / (len(replicates) - 1)
    return (length + noise) / (length - noise) if noise < length else math.inf


def slow_half(images):
    cosines = []
    for h in range(10):
        order = sorted(images, key=lambda index, h=h: slow_uniform(index, 2**19 + h))
        parts = order[: len(order) // 2], order[len(order) // 2 :]
        one, other = (sum(images[index] for index in part) / len(part) for part in parts)
        cosines.append(oracle.cosine(one, other))
    return sum(cosines) / len(cosines)


def slow_figures(truth, pair):
    sides = []
    for label in (pair.class1, pair.class2):
        images = {n: truth.input_relevance[n, pair.channel] for n in truth.images((label,))}
        replicates = slow_replicates(images)
        sides.append((replicates, slow_pull(images, replicates), slow_half(images)))
    (one, pull1, half1), (other, pull2, half2) = sides
    cosines = [oracle.cosine(u, v) for u, v in zip(one, other, strict=True)]
    pull = math.sqrt(pull1 * pull2)
    low, high = np.quantile(cosines, (0.025, 0.975)) * pull if pull < math.inf else (-1.0, 1.0)
    return max(low, -1.0), min(high, 1.0), half1, half2


def assert_chance(pairs, truth):
    assert pairs
    for pair in pairs:
        assert_close([getattr(pair, name) for name in FIGURES], slow_figures(truth, pair))


def test_intervals_and_yardsticks_are_those_of_replicates_made_one_by_one(case):
    concepts = [[label] for label in range(4)]
    pairs = unbraid.find(case.scan, channels={0: concepts, 5: concepts}).pairs
    assert len(pairs) == 12
    assert len({(pair.low, pair.high) for pair in pairs}) > 8
    assert_chance(pairs, case.truth)
    other = next(pair for pair in pairs if pair.channel != pairs[0].channel)
    elsewhere = {name: getattr(other, name) for name in FIGURES}
    off = ({name: elsewhere[name] + by} for name in FIGURES for by in (1e-6, -1e-6))
    for wrong in (replace(pairs[0], **elsewhere), *(replace(other, **by) for by in off)):
        with pytest.raises(AssertionError):
            assert_chance([wrong], case.truth)


def test_uniforms_are_those_of_splitmix_even_and_unrelated():
    numbers = cosine_intervals.uniforms(torch.arange(2000), 0, 200)
    assert 0 < numbers.min() < numbers.max() < 1
    assert abs(numbers.mean() - 1 / 2) < 0.002  # 4 standard errors
    assert abs(numbers.var() - 1 / 12) < 0.001
    for one, other in (
        (numbers[1:], numbers[:-1]),  # neighbours in the data set
        (numbers[:, 1:], numbers[:, :-1]),  # neighbours among replicates
        (numbers, cosine_intervals.uniforms(torch.arange(2000), 1 << 19, 200)),  # halvings
    ):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.007
    numbers = cosine_intervals.uniforms(torch.tensor([0, 1, 41, 1_281_166]), 7, 5)
    expected = [[slow_uniform(i, k) for k in range(7, 12)] for i in (0, 1, 41, 1_281_166)]
    assert_close(numbers, expected, 0)


def figures_in(scan):
    channels = {o: [[label] for label in range(5)] for o in (0, 2)}
    pairs = unbraid.find(scan, channels=channels).pairs
    return [[getattr(pair, name) for name in FIGURES] for pair in pairs]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return figures_in(scan_of_causes(tmp_path_factory.mktemp("usual"), 3))


def test_shards_memory_and_the_order_of_records_do_not_matter(usual, tmp_path, monkeypatch):
    weighted_means = cosine_intervals._weighted_means
    sizes = ((7, 1 << 30, 0), (1, 1 << 30, 1e-9), (100, 10_000, 1e-9), (100, 1, 1e-9))
    for shard_size, n_bytes, tolerance in sizes:
        passes = Mock(wraps=weighted_means)
        monkeypatch.setattr(cosine_intervals, "_weighted_means", passes)
        monkeypatch.setattr(cosine_intervals, "_BYTES_AT_ONCE", n_bytes)
        scan = scan_of_causes(tmp_path / f"{shard_size}-{n_bytes}", 3, shard_size=shard_size)
        assert_close(figures_in(scan), usual, tolerance)
        assert (passes.call_count > 1) == (n_bytes < 1 << 30)
    scan = scan_of_causes(tmp_path, 3, shard_size=30)
    every = [read_shard(scan.path, shard) for shard in range(3)]
    for shard, records in enumerate(reversed(every)):
        write_shard(scan.path, shard, records)
    some = replace(scan, manifest=replace(scan.manifest, indices="in no order of places"))
    assert_close(figures_in(some), usual)


def pair_of(folder, one, other):
    """The pair of two classes whose images have these relevance vectors."""
    pooled = torch.tensor([*one, *other], dtype=torch.float64)
    labels = [0] * len(one) + [1] * len(other)
    shares = torch.full((len(labels), 1), 0.5)
    scan = write_scan(folder, shares=shares, labels=labels, pooled=pooled)
    (pair,) = unbraid.find(scan, channels={0: [[0], [1]]}).pairs
    return pair


def test_few_images_no_noise_and_nothing_but_noise_or_more(tmp_path):
    for one, other, expected in (
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
    ):
        pair = pair_of(tmp_path, one, other)
        assert math.isfinite(pair.cosine)
        assert not pair.low > pair.high
        for name, value in zip(FIGURES, expected, strict=True):
            if value is not None:
                assert getattr(pair, name) == pytest.approx(value, abs=1e-9, nan_ok=True)
    pair = pair_of(tmp_path, [(2.0, 0.01), (0.0, 0.01)] * 4, NOISY)
    assert pair.low > 0.5
    assert pair.half2 > 0.9


def trials(folder, cosine, n_images, noise):
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
    shares = torch.full((n_images * len(causes), 1), 0.5).expand(-1, N_TRIALS).double()
    labels, pooled = list(range(len(causes))) * n_images, pooled.flatten(0, 1)
    scan = write_scan(folder, shares=shares, labels=labels, pooled=pooled, shard_size=5000)
    return unbraid.find(scan, channels={o: [[2 * o], [2 * o + 1]] for o in range(N_TRIALS)})


def assert_covered(pairs, cosine, most_missed):
    """Intervals hold the truth about as often as they say, not always."""
    n_missed = sum(not pair.low <= cosine <= pair.high for pair in pairs)
    assert 0 < n_missed / len(pairs) <= most_missed


@pytest.mark.parametrize(
    ("cosine", "n_images", "noise", "most_missed"),
    [(0.45, 40, 1.0, 0.08), (0.45, 5, 0.5, 0.12), (0.8, 20, 1.5, 0.12)],
)
def test_intervals_hold_the_truth_mostly(cosine, n_images, noise, most_missed, tmp_path):
    pairs = trials(tmp_path, cosine, n_images, noise).pairs
    assert_covered(pairs, cosine, most_missed)
    for corrupt in (
        lambda p: replace(p, low=(3 * p.low + p.high) / 4, high=(p.low + 3 * p.high) / 4),
        lambda p: replace(p, low=p.low - 0.1, high=p.high - 0.1),
        lambda p: replace(p, low=p.low + 0.1, high=p.high + 0.1),
        lambda p: replace(p, low=-1.0, high=1.0),
    ):
        with pytest.raises(AssertionError):
            assert_covered([corrupt(pair) for pair in pairs], cosine, most_missed)


@pytest.mark.parametrize(
    ("cosine", "n_images", "noise", "least", "most"),
    [(1.0, 4, 4.0, 0.0, 0.05), (0.2, 20, 1.0, 0.9, 1.0)],
)
def test_low_cosines_are_sure_only_where_truly_low(cosine, n_images, noise, least, most, tmp_path):
    found = trials(tmp_path, cosine, n_images, noise)
    low = [pair for pair in found.pairs if pair.cosine < 0.5]
    assert len(low) > 50
    assert least <= sum(not found.uncertain(pair) for pair in low) / len(low) <= most


def test_of_very_many_pairs_those_with_the_lowest_cosines_are_judged(case, monkeypatch):
    concepts = [[label] for label in range(4)]
    every = unbraid.find(case.scan, channels={0: concepts, 5: concepts})
    assert not every.note
    for module in (cosine_intervals, find_module):
        monkeypatch.setattr(module, "MOST_JUDGED", 5)
    some = unbraid.find(case.scan, channels={0: concepts, 5: concepts})
    assert [pair.cosine for pair in some.pairs] == [pair.cosine for pair in every.pairs]
    for k, (pair, whole) in enumerate(zip(some.pairs, every.pairs, strict=True)):
        figures = [getattr(pair, name) for name in FIGURES]
        if k < 5:
            assert_close(figures, [getattr(whole, name) for name in FIGURES])
        else:
            assert all(map(math.isnan, figures))
    assert "Of 12 pairs only the 5 with the lowest cosines have an interval" in some.note
    assert some.note in str(some)
