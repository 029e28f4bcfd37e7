"""A tau that fits the layer, and what other thresholds find: against the oracle and `find`."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import unbraid
from checks import assert_agrees_with_find, assert_sensitivity, assert_tau_chosen, truth_of
from handmade import random_shares, scan_of_causes, write_scan
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import UsageError
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.finding.arv import class_cosines, class_sums, cosines_of
from unbraid.finding.thresholds import GAMMAS, PS, TAUS, Cell, Sensitivity
from unbraid.scanning import records


def uneven_labels(n_images: int, n_classes: int, seed: int = 0) -> list[int]:
    """Classes of very different sizes, of one image up to most of them; some have none."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(n_classes, generator=generator) ** 3
    return torch.multinomial(sizes, n_images, replacement=True, generator=generator).tolist()


@pytest.mark.parametrize(("kind", "min_share"), [("3x3", 0.005), ("groups", 0.08), ("tokens", 0.3)])
def test_tau_is_the_one_of_the_rule_on_networks(kind, min_share, tmp_path):
    network, dataset = build(kind), SyntheticImages(22)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, batch_size=6, min_share=min_share)
    truth = truth_of(network, dataset)
    tau = unbraid.find(scan, tau="auto").tau
    assert_tau_chosen(tau, truth.shares, truth.labels, 2, min_share)  # a quarter of 8 channels


@pytest.mark.parametrize("seed", range(6))
def test_tau_is_the_one_of_the_rule_for_any_shares_and_classes(seed, tmp_path):
    n_channels = (7, 24, 39, 48, 64, 90)[seed]
    n_matter = (2, 6, 10, 10, 10, 10)[seed]
    shares, labels = random_shares(61, n_channels, seed), uneven_labels(61, 9, seed)
    scan = write_scan(tmp_path, shares=shares, labels=labels)
    found = unbraid.find(scan, tau="auto")
    assert not found.note
    assert_tau_chosen(found.tau, shares, labels, n_matter, 0.005)


def chosen(folder: Path, shares: Tensor, labels: list[int], **options: Any) -> float:
    return unbraid.find(write_scan(folder, shares=shares, labels=labels, **options), tau="auto").tau


def test_tau_does_not_depend_on_shards_or_order_or_shares_left_out(tmp_path):
    shares, labels = random_shares(50, 48), uneven_labels(50, 5)
    order = torch.randperm(50)
    tau = chosen(tmp_path / "1", shares, labels, shard_size=1)
    assert chosen(tmp_path / "2", shares, labels, shard_size=64) == tau
    assert chosen(tmp_path / "3", shares[order], [labels[n] for n in order.tolist()]) == tau
    shares, labels = random_shares(40, 200), [n % 4 for n in range(40)]
    fine = chosen(tmp_path / "fine", shares, labels, min_share=1e-6)
    assert fine == chosen(tmp_path / "coarse", shares, labels, min_share=0.01) > 0.01


def test_a_scan_that_kept_too_few_shares_gives_its_smallest_and_says_so(tmp_path):
    labels = [n % 2 for n in range(20)]
    scan = write_scan(tmp_path, shares=random_shares(20, 60), labels=labels, min_share=0.2)
    found = unbraid.find(scan, tau="auto")
    assert found.tau == 0.2
    assert found.note == (
        "The tau chosen is the smallest share that the scan kept, 0.2: fewer than 10 channels of a "
        "typical image reach it; scan with a smaller min_share to go lower."
    )
    assert str(found).endswith(f"\nNote: {found.note}")


def test_tau_is_never_cut_below_the_smallest_share_kept(tmp_path):
    shares, labels = torch.full((4, 8), 0.01239, dtype=torch.float64), [0, 1, 0, 1]
    found = unbraid.find(
        write_scan(tmp_path, shares=shares, labels=labels, min_share=0.0123456), tau="auto"
    )
    assert (found.tau, found.note) == (0.0123456, "")


@pytest.fixture(scope="module")
def two_causes(tmp_path_factory) -> unbraid.Scan:
    """Two classes with causes of their own, which share most channels."""
    labels = [n % 2 for n in range(30)]
    pooled, shares = torch.eye(2, dtype=torch.float64)[labels], random_shares(30, 60)
    folder = tmp_path_factory.mktemp("two")
    return write_scan(folder, shares=shares, labels=labels, pooled=pooled)


def test_the_tau_as_printed_finds_the_same(two_causes):
    auto = unbraid.find(two_causes, tau="auto", p=0.5)
    printed = re.search(r"\(tau (\S+) \(auto\), p 0\.5, gamma 0\.5\)", str(auto))
    assert printed
    by_hand = unbraid.find(two_causes, tau=float(printed[1]), p=0.5)
    assert auto.pairs
    assert [(pair.channel, pair.cosine) for pair in auto.pairs] == [
        (pair.channel, pair.cosine) for pair in by_hand.pairs
    ]
    assert (auto.auto, by_hand.auto) == (True, False)
    assert f"(tau {by_hand.tau:g}, p 0.5, gamma 0.5)" in str(by_hand)
    own = unbraid.find(two_causes, tau="auto", channels={3: [[0], [1]]})
    assert (own.tau, own.channels) == (auto.tau, (3,))


@pytest.mark.parametrize("tau", ["autom", "Auto", "", "0.03"])
def test_a_word_that_is_no_rule_is_refused(tau, two_causes):
    told = re.escape(f"tau is {tau!r}; give a share such as 0.03, or 'auto'.")
    with pytest.raises(UsageError, match=f"^{told}$"):
        unbraid.find(two_causes, tau=tau)


class Relabelled(Dataset[tuple[Tensor, int]]):
    """Some of the demo's images, with their labels or with shuffled ones."""

    def __init__(self, shuffled: bool) -> None:
        self.images = load_images("train")
        self.places = list(range(0, len(self.images), 4))
        labels = torch.tensor([self.images[place][1] for place in self.places])
        self.targets = (labels[torch.randperm(len(labels))] if shuffled else labels).tolist()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[self.places[index]][0], self.targets[index]


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_trained_network_has_findings_and_shuffled_labels_have_none(shuffled, tmp_path):
    scan = unbraid.scan(load_network(), LAYER, Relabelled(shuffled), tmp_path, batch_size=250)
    found = unbraid.find(scan, tau="auto")
    assert bool(found.pairs) is not shuffled
    assert len(found.channels) < scan.layer.n_out / 2


@pytest.mark.parametrize("kind", ["3x3", "1x1", "batch norm behind"])
def test_a_random_network_has_no_flood_of_findings(kind, tmp_path):
    scan = unbraid.scan(build(kind), "layer", SyntheticImages(60, noise=2.0), tmp_path)
    assert len(unbraid.find(scan, tau="auto").channels) <= scan.layer.n_out / 4


# Sensitivity.


@pytest.mark.parametrize("kind", ["3x3", "groups", "tokens"])
def test_sensitivity_counts_the_published_pairs(kind, tmp_path):
    network, dataset = build(kind), SyntheticImages(19)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, batch_size=8)
    counted = unbraid.sensitivity(scan, [0.05, 0.1, 0.2, 0.9], [0.2, 0.75, 1], [-1, 0.2, 0.6, 1])
    assert_sensitivity(counted, truth_of(network, dataset))
    assert len({cell.n_pairs for cell in counted.cells}) > 2


@pytest.mark.parametrize("seed", range(2))
def test_sensitivity_counts_what_find_finds(seed, tmp_path):
    scan = scan_of_causes(tmp_path, seed)
    counted = unbraid.sensitivity(scan, [0.005, 0.02, 0.1], [0.1, 0.3, 0.75], [-0.5, 0.0, 0.5, 0.9])
    assert_agrees_with_find(counted, scan)
    assert len({cell.n_pairs for cell in counted.cells}) > 10


@pytest.mark.parametrize("seed", range(3))
def test_cosines_at_a_gamma_fall_on_the_same_side_as_with_find(seed, tmp_path):
    """Equal and opposite causes give cosines of 1, -1 and 0 up to rounding, which is not equal."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    directions[1] = -directions[0] / 3
    directions[2] -= directions[0] * (directions[2] @ directions[0]) / directions[0].square().sum()
    labels = [n % 9 for n in range(45)]
    length = torch.rand(45, 1, generator=generator, dtype=torch.float64) + 0.5
    scan = write_scan(
        tmp_path,
        shares=random_shares(45, 9, seed, spread=1.0),
        labels=labels,
        pooled=length * directions[torch.tensor(labels) % 3],
        weight=torch.ones(9, 7).double(),
    )
    cosines = {pair.cosine for pair in unbraid.find(scan, tau=0.03, p=0.5, gamma=0.99).pairs}
    assert any(abs(cosine) < 1e-12 for cosine in cosines)
    gammas = [-1.0, *sorted(cosines)[::5], 0.0, 1.0]
    counted = unbraid.sensitivity(scan, [0.03, 0.1], [0.2, 0.5], gammas)
    assert_agrees_with_find(counted, scan)


def test_a_class_is_never_unlike_itself(tmp_path):
    """Rounding can put a cosine of one below one; a class's with itself is still no finding."""
    draw = torch.Generator().manual_seed(0)
    vectors = (torch.rand(1, 5, generator=draw, dtype=torch.float64) for _ in range(1000))
    pooled = next(
        pair
        for pair in (torch.cat([v, 3 * v]) for v in vectors)
        if (cosines_of(pair).diagonal() < 1).any() and cosines_of(pair)[0, 1] == 1
    )
    shares = torch.full((2, 3), 0.3, dtype=torch.float64)
    weight = torch.ones(3, 5, dtype=torch.float64)
    scan = write_scan(tmp_path, shares=shares, labels=[0, 1], pooled=pooled, weight=weight)
    assert (class_cosines(scan, class_sums(scan, []), 0, [0, 1]) < 1).any()
    counted = unbraid.sensitivity(scan, gammas=[1.0])
    assert {(cell.n_channels, cell.n_pairs) for cell in counted.cells} == {(0, 0)}
    assert unbraid.find(scan, gamma=1.0).concepts == {}


def test_a_channel_that_all_classes_use_for_one_cause_counts_for_nothing(tmp_path):
    scan = scan_of_causes(tmp_path, 2, n_causes=1)
    counted = unbraid.sensitivity(scan, [0.005], [0.1], [0.3])
    assert counted.cells == (Cell(0.005, 0.1, 0.3, 0, 0),)


def test_sensitivity_reads_the_scan_once_however_it_is_divided(tmp_path, monkeypatch):
    whole = unbraid.sensitivity(scan_of_causes(tmp_path / "whole", 0, shard_size=1000))
    scan = scan_of_causes(tmp_path / "parts", 0, shard_size=10)
    read, read_shard = [], records.read_shard
    monkeypatch.setattr(records, "read_shard", lambda *a: read.append(a[1]) or read_shard(*a))
    assert unbraid.sensitivity(scan) == whole
    assert read == list(range(9))


def test_the_default_grid_holds_the_published_thresholds_and_those_of_the_findings(tmp_path):
    scan = scan_of_causes(tmp_path, 0)
    default = unbraid.sensitivity(scan)
    assert (default.taus, default.ps, default.gammas) == (TAUS, PS, GAMMAS)
    assert default.at(0.03, 0.75, 0.5) in default.cells
    found = unbraid.find(scan, tau="auto", p=0.4, gamma=0.55)
    around = unbraid.sensitivity(scan, found=found)
    assert around.taus == tuple(sorted({*TAUS, found.tau}))
    assert around.at(found.tau, 0.4, 0.55).n_pairs == len(found.pairs) > 0
    own = unbraid.sensitivity(scan, [0.1, 0.02, 0.1], [1], [0.5, -1], found=found)
    assert (own.taus, own.ps, own.gammas) == ((0.02, 0.1), (1.0,), (-1.0, 0.5))


@pytest.mark.parametrize("least", [0.0123, 0.4])
def test_the_default_grid_goes_no_lower_than_the_scan(least, tmp_path):
    scan = scan_of_causes(tmp_path, 0, min_share=least)
    taus = unbraid.sensitivity(scan).taus
    assert taus == (least, *(tau for tau in TAUS if tau > least))


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"taus": []}, "taus is empty; give a value or more, or None for the default grid."),
        ({"ps": ()}, "ps is empty; give a value or more, or None for the default grid."),
        ({"gammas": []}, "gammas is empty; give a value or more, or None for the default grid."),
        ({"taus": ["auto"]}, "taus holds 'auto'; give a list of numbers."),
        ({"taus": 0.03}, "taus is 0.03; give a list of numbers."),
        ({"gammas": [None]}, "gammas holds None; give a list of numbers."),
        ({"taus": [0.03, 0.001]}, "tau is 0.001, but the scan keeps no share below 0.005;"),
        ({"taus": [0.03, 1.5]}, "tau is 1.5; a share must lie above 0 and not above 1."),
        ({"taus": [math.nan]}, "tau is nan; a share must lie above 0"),
        ({"ps": [0.0, 0.5]}, "p is 0; a fraction"),
        ({"gammas": [0.5, 2]}, "gamma is 2; a cosine must lie between -1 and 1."),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(grid, told, two_causes):
    with pytest.raises(UsageError, match=f"^{re.escape(told)}") as caught:
        unbraid.sensitivity(two_causes, **grid)
    assert str(caught.value).count(".\n") == 0
    assert str(caught.value).endswith(".")


def test_sensitivity_in_print_and_files(tmp_path):
    numbers = [(580, 2841), (700, 220_153), (9, 20), (0, 0)]
    choices = [(tau, 0.75, gamma) for tau in (0.01, 0.03) for gamma in (0.5, 0.6)]
    cells = tuple(Cell(*c, *n) for c, n in zip(choices, numbers, strict=True))
    small = Sensitivity("layer4.2.conv3", "0" * 64, 2048, (0.01, 0.03), (0.75,), (0.5, 0.6), cells)
    assert str(small) == (
        "Polysemantic channels, and pairs of classes in brackets, of the 2,048 channels of layer "
        "layer4.2.conv3\n\n"
        "p 0.75    gamma 0.5    gamma 0.6\n"
        "tau 0.01  580 (2,841)  700 (220,153)\n"
        "tau 0.03  9 (20)       0 (0)"
    )
    assert small.at(0.03, 0.75, 0.5) == Cell(0.03, 0.75, 0.5, 9, 20)
    with pytest.raises(KeyError):
        small.at(0.02, 0.75, 0.5)
    small.to_csv(tmp_path / "new" / "sensitivity.csv")
    with (tmp_path / "new" / "sensitivity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["tau", "p", "gamma", "n_channels", "n_pairs"]
    assert list(rows[0]) == columns
    expected = [[c.tau, c.p, c.gamma, c.n_channels, c.n_pairs] for c in cells]
    assert [[float(row[name]) for name in columns] for row in rows] == expected
    frame = small.to_pandas()
    assert list(frame.columns) == columns
    assert frame.to_numpy().tolist() == expected
