"""A tau that fits the layer: the documented rule, and what it must not depend on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import unbraid
from checks import assert_tau_chosen, truth_of
from handmade import random_shares, write_scan
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import UsageError
from unbraid.demo.network import LAYER, load_images, load_network


def uneven_labels(n_images: int, n_classes: int, seed: int = 0) -> list[int]:
    """Classes of very different sizes, of one image up to most of them; some have none."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(n_classes, generator=generator) ** 3
    return torch.multinomial(sizes, n_images, replacement=True, generator=generator).tolist()


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["3x3", "groups", "tokens"])
@pytest.mark.parametrize("min_share", [0.005, 0.08, 0.3])
def test_tau_is_the_one_of_the_rule_on_networks(kind, min_share, tmp_path):
    network, dataset = build(kind), SyntheticImages(22)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, batch_size=6, min_share=min_share)
    truth = truth_of(network, dataset)
    tau = unbraid.find(scan, tau="auto").tau
    assert_tau_chosen(tau, truth.shares, truth.labels, 2, min_share)  # a quarter of 8 channels


@pytest.mark.parametrize("seed", range(6))
def test_tau_is_the_one_of_the_rule_for_any_shares_and_classes(seed, tmp_path):
    n_channels = (7, 24, 39, 64, 64, 150)[seed]
    n_matter = (2, 6, 10, 10, 10, 10)[seed]
    shares, labels = random_shares(61, n_channels, seed), uneven_labels(61, 9, seed)
    scan = write_scan(tmp_path, shares=shares, labels=labels)
    found = unbraid.find(scan, tau="auto")
    assert not found.note
    assert_tau_chosen(found.tau, shares, labels, n_matter, 0.005)


@pytest.mark.parametrize(
    ("n_channels", "n_matter"), [(1, 1), (4, 1), (5, 2), (24, 6), (36, 9), (37, 10), (200, 10)]
)
def test_as_many_channels_matter_in_a_typical_image_as_the_layer_has_room_for(
    n_channels, n_matter, tmp_path
):
    shares = torch.arange(n_channels, 0, -1).double()[None] / 1000  # 0.2, 0.199 ... at most
    scan = write_scan(tmp_path, shares=shares, labels=[0], min_share=0.0001)
    tau = unbraid.find(scan, tau="auto").tau
    assert int((shares >= tau).sum()) == n_matter


def test_half_of_two_images_is_one(tmp_path):
    shares = torch.tensor([[0.4], [0.2]])
    scan = write_scan(tmp_path, shares=shares, labels=[0, 0])
    assert unbraid.find(scan, tau="auto").tau == 0.4
    assert_tau_chosen(0.4, shares.double(), [0, 0], 1, 0.005)


# --- what it does not depend on -------------------------------------------------------------------


def chosen(folder: Path, shares: Tensor, labels: list[int], **options: Any) -> float:
    return unbraid.find(write_scan(folder, shares=shares, labels=labels, **options), tau="auto").tau


def test_tau_does_not_depend_on_shards_or_order(tmp_path):
    shares, labels = random_shares(50, 48), uneven_labels(50, 5)
    order = torch.randperm(50)
    taus = {
        chosen(tmp_path / "1", shares, labels, shard_size=1),
        chosen(tmp_path / "2", shares, labels, shard_size=64),
        chosen(tmp_path / "3", shares[order], [labels[n] for n in order.tolist()]),
    }
    assert len(taus) == 1


def test_tau_does_not_depend_on_how_many_classes_or_images_there_are(tmp_path):
    shares, labels = random_shares(40, 48), [n % 4 for n in range(40)]
    tau = chosen(tmp_path / "1", shares, labels)
    more_classes = labels + [label + 4 for label in labels]
    assert chosen(tmp_path / "2", torch.cat([shares, shares]), more_classes) == tau
    first = [n for n in range(40) if labels[n] == 0]
    many = torch.cat([shares, *[shares[first]] * 20])
    assert chosen(tmp_path / "3", many, labels + [0] * 20 * len(first)) == tau
    assert chosen(tmp_path / "4", many, [0] * len(many)) != tau  # had all images the same weight


def test_tau_does_not_depend_on_shares_that_the_scan_left_out(tmp_path):
    shares, labels = random_shares(40, 200), [n % 4 for n in range(40)]
    fine, coarse = (
        chosen(tmp_path / str(least), shares, labels, min_share=least) for least in (1e-6, 0.01)
    )
    assert fine == coarse > 0.01


# --- where the scan kept too little ---------------------------------------------------------------


def test_a_scan_that_kept_too_few_shares_gives_its_smallest_and_says_so(tmp_path):
    scan = write_scan(
        tmp_path, shares=random_shares(20, 60), labels=[n % 2 for n in range(20)], min_share=0.2
    )
    found = unbraid.find(scan, tau="auto")
    assert found.tau == 0.2
    assert found.note == (
        "The tau chosen is the smallest share that the scan kept, 0.2: fewer than 10 channels of a "
        "typical image reach it; scan with a smaller min_share to go lower."
    )
    assert str(found).endswith(f"\nNote: {found.note}")


def test_tau_is_never_cut_below_the_smallest_share_kept(tmp_path):
    least = 0.0123456
    shares = torch.full((4, 8), 0.01239, dtype=torch.float64)
    found = unbraid.find(
        write_scan(tmp_path, shares=shares, labels=[0, 1, 0, 1], min_share=least), tau="auto"
    )
    assert (found.tau, found.note) == (least, "")


# --- for people -----------------------------------------------------------------------------------


def two_cause_scan(folder: Path) -> unbraid.Scan:
    """Two classes with causes of their own, which share most channels."""
    labels = [n % 2 for n in range(30)]
    pooled = torch.eye(2, dtype=torch.float64)[labels]
    return write_scan(folder, shares=random_shares(30, 60), labels=labels, pooled=pooled)


def test_the_number_as_printed_finds_the_same(tmp_path):
    scan = two_cause_scan(tmp_path)
    auto = unbraid.find(scan, tau="auto", p=0.5)
    printed = re.search(r"\(tau (\S+) \(auto\), p 0\.5, gamma 0\.5\)", str(auto))
    assert printed
    by_hand = unbraid.find(scan, tau=float(printed[1]), p=0.5)
    assert auto.pairs
    assert [(pair.channel, pair.cosine) for pair in auto.pairs] == [
        (pair.channel, pair.cosine) for pair in by_hand.pairs
    ]
    assert (auto.auto, by_hand.auto) == (True, False)
    assert f"(tau {by_hand.tau:g}, p 0.5, gamma 0.5)" in str(by_hand)


def test_own_concepts_go_with_a_chosen_tau(tmp_path):
    scan = two_cause_scan(tmp_path)
    found = unbraid.find(scan, tau="auto", channels={3: [[0], [1]]})
    assert found.tau == unbraid.find(scan, tau="auto").tau
    assert found.channels == (3,)


@pytest.mark.parametrize("tau", ["autom", "Auto", "", "0.03"])
def test_a_word_that_is_no_rule_is_refused(tau, tmp_path):
    scan = two_cause_scan(tmp_path)
    told = re.escape(f"tau is {tau!r}; give a share such as 0.03, or 'auto'.")
    with pytest.raises(UsageError, match=f"^{told}$"):
        unbraid.find(scan, tau=tau)


@pytest.mark.parametrize(("name", "value"), [("p", 0.0), ("p", math.nan), ("gamma", 2.0)])
def test_other_thresholds_are_checked_as_ever(name, value, tmp_path):
    with pytest.raises(UsageError, match=f"^{name} is "):
        unbraid.find(two_cause_scan(tmp_path), tau="auto", **{name: value})


# --- truth tests ----------------------------------------------------------------------------------


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
