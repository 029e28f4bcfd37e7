"""A tau that fits the layer, and what other thresholds find: against the oracle and `find`."""

import csv
import math
import re
from dataclasses import replace

import pytest
import torch

import oracle
import unbraid
from checks import assert_agrees_with_find, assert_sensitivity, assert_tau_chosen, truth_of
from handmade import random_shares, scan_of_causes, write_scan
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import UsageError
from unbraid.base.progress import QUIET
from unbraid.demo.network import LAYER, DemoNet, load_images, load_network
from unbraid.finding import thresholds
from unbraid.finding.arv import class_cosines, class_sums, cosines_of
from unbraid.finding.sensitivity import GAMMAS, PS, TAUS, Cell, Sensitivity
from unbraid.scanning import records


@pytest.mark.parametrize("kind", ["3x3", "groups", "tokens"])
@pytest.mark.parametrize("min_share", [0.005, 0.08, 0.3])
def test_tau_auto_is_that_of_the_rule_on_networks(kind, min_share, tmp_path):
    network, images = build(kind), SyntheticImages(22)
    scan = unbraid.scan(network, "layer", images, tmp_path, batch_size=6, min_share=min_share)
    truth, tau = truth_of(network, images), unbraid.find(scan, tau="auto").tau
    assert_tau_chosen(tau, truth.shares, truth.labels, 2, min_share)  # a quarter of 8 channels


@pytest.mark.parametrize("seed", range(6))
def test_tau_auto_is_that_of_the_rule_for_any_shares_and_classes(seed, tmp_path):
    n_channels, n_matter = [(7, 2), (24, 6), (39, 10), (48, 10), (64, 10), (90, 10)][seed]
    shares, generator = random_shares(41, n_channels, seed), torch.Generator().manual_seed(seed)
    sizes = torch.rand(9, generator=generator) ** 3  # from one image up to most; some have none
    labels = torch.multinomial(sizes, 41, replacement=True, generator=generator).tolist()
    found = unbraid.find(write_scan(tmp_path, shares=shares, labels=labels), tau="auto")
    assert not found.note
    assert_tau_chosen(found.tau, shares, labels, n_matter, 0.005)


def test_tau_auto_lets_as_many_channels_matter_as_the_layer_has_room_for(tmp_path):
    for n_channels, n_matter in ((1, 1), (4, 1), (5, 2), (24, 6), (36, 9), (37, 10), (200, 10)):
        shares = torch.arange(n_channels, 0, -1).double()[None] / 1000  # 0.2, 0.199 ... at most
        scan = write_scan(tmp_path, shares=shares, labels=[0], min_share=0.0001)
        assert int((shares >= unbraid.find(scan, tau="auto").tau).sum()) == n_matter


def test_tau_auto_depends_neither_on_shards_nor_order_nor_shares_left_out(tmp_path):
    shares, labels = random_shares(40, 200), [n % 4 for n in range(40)]
    order = torch.randperm(40)
    mixed = {"shares": shares[order], "labels": [labels[n] for n in order.tolist()]}
    scans = (
        write_scan(tmp_path / "1", shares=shares, labels=labels, shard_size=1),
        write_scan(tmp_path / "2", **mixed, shard_size=64, min_share=1e-6),
        write_scan(tmp_path / "3", **mixed, min_share=0.01),
    )
    one, *others = (unbraid.find(scan, tau="auto").tau for scan in scans)
    assert others == [one, one]
    assert one > 0.01


def test_tau_is_never_below_the_smallest_share_kept_and_a_note_says_where_that_bounds_it(tmp_path):
    labels = [n % 2 for n in range(20)]
    scan = write_scan(tmp_path / "a", shares=random_shares(20, 60), labels=labels, min_share=0.2)
    found = unbraid.find(scan, tau="auto")
    assert found.tau == 0.2
    assert found.note.startswith("The tau chosen is the smallest share that the scan kept, 0.2: ")
    assert str(found).endswith(f"\nNote: {found.note}")
    assert unbraid.find(scan, tau="auto", concepts="clusters").note == ""  # which ask no tau
    shares = torch.full((20, 8), 0.01239, dtype=torch.float64)  # cut to three digits, 0.0123
    scan = write_scan(tmp_path / "b", shares=shares, labels=labels, min_share=0.0123456)
    found = unbraid.find(scan, tau="auto")
    assert (found.tau, found.note) == (0.0123456, "")


def test_the_tau_as_printed_finds_the_same(tmp_path):
    labels = [n % 2 for n in range(30)]  # of causes of their own
    pooled, shares = torch.eye(2, dtype=torch.float64)[labels], random_shares(30, 60)
    scan = write_scan(tmp_path, shares=shares, labels=labels, pooled=pooled)
    auto = unbraid.find(scan, tau="auto", p=0.5)
    printed = re.search(r"\(tau (\S+) \(auto\), p 0\.5, gamma 0\.5\)", str(auto))
    by_hand = unbraid.find(scan, tau=float(printed[1]), p=0.5)
    assert auto.pairs == by_hand.pairs != ()
    assert (auto.auto, by_hand.auto) == (True, False)
    own = unbraid.find(scan, tau="auto", p=0.5, channels={3: [[0], [1]]})
    assert (own.tau, own.channels) == (auto.tau, (3,))


def lowered(scan, shares, labels, gamma):
    """Tau by the rule of docs/thresholds.md, one call of `find` per tau."""
    n = scan.layer.n_out
    highest, lowest = (
        max(float(f"{math.floor(1e6 * tau) / 1e6:.6f}"), scan.manifest.min_share)
        for tau in (
            oracle.automatic_tau(shares, labels, min(10, math.ceil(n / 4))),
            oracle.automatic_tau(shares, labels, min(40, math.ceil(n / 2))),
        )
    )
    most, best, tau, step = -1, None, highest, 0
    while tau > lowest * 1.02 and most < min(8, math.ceil(n / 4)):
        pairs = unbraid.find(scan, tau=tau, p=0.2, gamma=gamma).pairs
        sure = len({pair.channel for pair in pairs if pair.high < gamma})
        most, best = (sure, tau) if sure > most else (most, best)
        step += 1
        tau = highest * 0.9**step
    return best, most


@pytest.mark.parametrize(("seed", "gamma"), [(0, 0.5), (1, 0.8), (3, 0.0), (4, -0.9), (5, 0.9)])
def test_tau_auto_is_lowered_as_far_as_sure_findings_ask(seed, gamma, tmp_path):
    scan = scan_of_causes(tmp_path, seed)
    labels = torch.cat(list(scan.columns("label"))).tolist()
    expected, most = lowered(scan, random_shares(90, 20, seed), labels, gamma)
    found = unbraid.find(scan, tau="auto", p=0.2, gamma=gamma)
    assert found.tau == pytest.approx(expected, rel=0.02)
    assert len(found.sure_channels) >= most


@pytest.mark.parametrize("auto", [False, True])
def test_candidates_are_found_with_their_thresholds_best_first(case, auto):
    gamma = -0.5
    found = unbraid.find(case.scan, tau="auto" if auto else 0.9, p=0.5, gamma=gamma)
    assert not found.pairs
    assert found.nearest
    ranks = [(c.gamma > gamma, -c.tau if c.gamma == gamma else c.gamma) for c in found.nearest]
    assert ranks == sorted(ranks)
    assert found.nearest[0].pair.channel == int(re.findall(r"channel (\d+)", found.hint)[0])
    assert len({c.pair.channel for c in found.nearest}) == len(found.nearest) <= 8
    pooled = torch.cat([r.pooled for r in case.scan.shards()]).double()
    positions, labels = (torch.cat(list(case.scan.columns(n))) for n in ("n_positions", "label"))
    for candidate in found.nearest:
        pair, o = candidate.pair, candidate.pair.channel
        taken = unbraid.find(case.scan, tau=candidate.tau, p=0.5, gamma=candidate.gamma)
        words = candidate.options(found).split()
        given = {name[2:]: float(n) for name, n in zip(words[::2], words[1::2], strict=True)}
        asked = {"tau": "auto" if auto else 0.9, "gamma": gamma, **given}
        assert unbraid.find(case.scan, p=0.5, **asked).pairs == taken.pairs
        assert pair in taken.pairs, candidate
        z = pooled[:, case.scan.layer.group_of(o)] @ case.scan.weight[o].double()
        z = z / positions + case.scan.bias[o].double()
        for label, images in zip((pair.class1, pair.class2), candidate.images, strict=True):
            own = sorted((labels == label).nonzero()[:, 0].tolist(), key=lambda n: -z[n])
            assert list(images) == own[:3]
    # With another gamma, a tau by rule would be another.
    same = replace(found.nearest[0], tau=found.tau, gamma=0.3)
    assert same.options(found) == (f"--tau {found.tau!r} --gamma 0.3" if auto else "--gamma 0.3")


def shuffle(labels, seed):
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(
    ("weights", "order"),
    [("trained", "given"), ("trained", 0), ("trained", 1), (0, "given"), (1, "given"), (2, 2)],
)
def test_tau_auto_finds_surely_only_with_trained_weights_and_true_labels(weights, order, tmp_path):
    images = load_images("train")
    some = range(0, len(images), 10)
    labels = torch.tensor(images.targets)[some]
    labels = labels if order == "given" else shuffle(labels, order)
    network = load_network()
    if weights != "trained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights)
            network = DemoNet().eval()
    dataset = [(images[n][0], int(label)) for n, label in zip(some, labels, strict=True)]
    scan = unbraid.scan(network, LAYER, dataset, tmp_path, batch_size=250)
    found = unbraid.find(scan, tau="auto")
    meant = (weights, order) == ("trained", "given")
    assert (len(found.sure_channels) >= 4) is meant
    assert bool(found.pairs) is meant
    assert bool(found.nearest) is not meant
    assert len(found.channels) < scan.layer.n_out / 2


@pytest.mark.parametrize("noise", [0.5, 1.5])
@pytest.mark.parametrize("n_images", [5, 40])
def test_tau_auto_finds_nothing_surely_in_many_channels_of_classes_with_one_cause(
    n_images, noise, tmp_path
):
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(8).repeat_interleave(n_images)
        causes = 1 + torch.rand(8, 30, generator=generator, dtype=torch.float64)
        drawn = torch.randn(8 * n_images, 30, generator=generator, dtype=torch.float64)
        own = {
            "shares": random_shares(8 * n_images, 60, seed, spread=0.5),
            "weight": torch.rand(60, 30, generator=generator, dtype=torch.float64),
        }
        n_sure = []
        for apart in (0, 5):  # how far each class's cause lies from what is common to all
            pooled = (1 + apart * (causes > 1.7)[labels]) * (noise * drawn).exp()
            of_labels = labels if apart else shuffle(labels, seed)
            folder = tmp_path / f"{seed}-{apart}"
            scan = write_scan(folder, labels=of_labels.tolist(), pooled=pooled, **own)
            n_sure.append(len(unbraid.find(scan, tau="auto", p=0.5).sure_channels))
        assert n_sure[0] == 0
        assert n_sure[1] >= 8 or noise > 1 or n_images < 40  # too little to tell


@pytest.mark.parametrize("kind", ["3x3", "1x1", "batch norm behind"])
def test_tau_auto_makes_no_flood_of_findings_in_a_random_network(kind, tmp_path):
    scan = unbraid.scan(build(kind), "layer", SyntheticImages(60), tmp_path)
    assert len(unbraid.find(scan, tau="auto").channels) <= scan.layer.n_out / 4


def test_sensitivity_counts_the_published_pairs(case):
    grids = [0.05, 0.1, 0.2, 0.9], [0.2, 0.75, 1], [-1, 0.2, 0.6, 1]
    counted = unbraid.sensitivity(case.scan, *grids)
    assert_sensitivity(counted, case.truth)
    assert len({cell.n_pairs for cell in counted.cells}) > 2


@pytest.mark.parametrize("seed", range(2))
def test_sensitivity_counts_what_find_finds(seed, tmp_path):
    scan = scan_of_causes(tmp_path / "five", seed, shard_size=90)
    counted = unbraid.sensitivity(scan, [0.005, 0.02, 0.1], [0.1, 0.3, 0.75], [-0.5, 0.0, 0.5, 0.9])
    assert_agrees_with_find(counted, scan)
    assert len({cell.n_pairs for cell in counted.cells}) > 10
    one = unbraid.sensitivity(scan_of_causes(tmp_path / "one", 2, n_causes=1), [0.005], [0.1])
    assert one.at(0.005, 0.1, 0.3) == Cell(0.005, 0.1, 0.3, 0, 0)  # all classes share the cause


@pytest.mark.parametrize("seed", range(3))
def test_cosines_at_a_gamma_fall_on_the_same_side_as_with_find(seed, tmp_path):
    """Classes with equal, opposite and orthogonal causes have cosines of 1, -1 and 0, rounded."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    directions[1] = -directions[0] / 3
    directions[2] -= directions[0] * (directions[2] @ directions[0]) / directions[0].square().sum()
    labels = [n % 9 for n in range(27)]
    length = torch.rand(27, 1, generator=generator, dtype=torch.float64) + 0.5
    pooled = length * directions[torch.tensor(labels) % 3]
    shares = random_shares(27, 6, seed, spread=1.0)
    scan = write_scan(tmp_path, shares=shares, labels=labels, pooled=pooled)
    cosines = {pair.cosine for pair in unbraid.find(scan, tau=0.03, p=0.5, gamma=0.99).pairs}
    assert any(abs(cosine) < 1e-12 for cosine in cosines)
    gammas = [-1.0, *sorted(cosines)[::5], 0.0, 1.0]
    assert_agrees_with_find(unbraid.sensitivity(scan, [0.03, 0.1], [0.2, 0.5], gammas), scan)


def test_a_class_is_never_unlike_itself(tmp_path):
    """Rounding can put a cosine of one below one; a class's with itself is still no finding."""
    draw = torch.Generator().manual_seed(0)
    vectors = (torch.rand(1, 5, generator=draw, dtype=torch.float64) for _ in range(1000))
    pooled = next(
        pair
        for pair in (torch.cat([v, 3 * v]) for v in vectors)
        if (cosines_of(pair).diagonal() < 1).any() and cosines_of(pair)[0, 1] == 1
    )
    scan = write_scan(tmp_path, shares=torch.full((2, 3), 0.3), labels=[0, 1], pooled=pooled)
    assert (class_cosines(scan, class_sums(scan, []), 0, [0, 1]) < 1).any()
    counted = unbraid.sensitivity(scan, gammas=[1.0])
    assert {(cell.n_channels, cell.n_pairs) for cell in counted.cells} == {(0, 0)}
    assert unbraid.find(scan, gamma=1.0).concepts == {}


def test_sensitivity_reads_the_scan_once_however_it_is_divided(tmp_path, monkeypatch):
    whole = unbraid.sensitivity(scan_of_causes(tmp_path / "whole", 0, shard_size=1000))
    scan = scan_of_causes(tmp_path / "parts", 0, shard_size=10)
    read, read_shard = [], records.read_shard
    monkeypatch.setattr(records, "read_shard", lambda *a: read.append(a[1]) or read_shard(*a))
    assert unbraid.sensitivity(scan) == whole
    assert read == list(range(9))


def test_sensitivity_takes_published_thresholds_and_those_found_and_refuses_nonsense(tmp_path):
    scan = scan_of_causes(tmp_path / "5", 0)
    default = unbraid.sensitivity(scan)
    assert (default.taus, default.ps, default.gammas) == (TAUS, PS, GAMMAS)
    found = unbraid.find(scan, tau="auto", p=0.4, gamma=0.55)
    around = unbraid.sensitivity(scan, found=found)
    assert around.taus == tuple(sorted({*TAUS, found.tau}))
    assert around.at(found.tau, 0.4, 0.55).n_pairs == len(found.pairs) > 0
    own = unbraid.sensitivity(scan, [0.1, 0.02, 0.1], [1], [0.5, -1], found=found)
    assert (own.taus, own.ps, own.gammas) == ((0.02, 0.1), (1.0,), (-1.0, 0.5))
    scan = scan_of_causes(tmp_path / "few", 0, min_share=0.0123)
    assert min(unbraid.sensitivity(scan).taus) == 0.0123
    for grid, told in (
        ({"taus": []}, "taus is empty; give a value or more, or None for the default grid."),
        ({"gammas": [math.nan]}, "gamma is nan; a cosine must lie between -1 and 1."),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(told)}"):
            unbraid.sensitivity(scan_of_causes(tmp_path, 0), **grid)


def test_sensitivity_in_print_and_files(tmp_path):
    numbers = [(580, 2841), (700, 220_153)]
    choices = [(tau, 0.75, 0.5) for tau in (0.01, 0.03)]
    cells = tuple(Cell(*c, *n) for c, n in zip(choices, numbers, strict=True))
    small = Sensitivity("layer", "0" * 64, 2048, (0.01, 0.03), (0.75,), (0.5,), cells)
    table = "p 0.75    gamma 0.5\ntau 0.01  580 (2,841)\ntau 0.03  700 (220,153)"
    assert str(small).endswith(f" of the 2,048 channels of layer layer\n\n{table}")
    with pytest.raises(KeyError):
        small.at(0.02, 0.75, 0.5)
    small.to_csv(tmp_path / "new" / "sensitivity.csv")
    head, *rows = csv.reader((tmp_path / "new" / "sensitivity.csv").read_text().splitlines())
    assert head == list(small.to_pandas().columns) == list(vars(cells[0]))
    assert [tuple(map(float, row)) for row in rows] == [tuple(vars(c).values()) for c in cells]


def test_sums_of_only_so_many_taus_are_held_at_a_time(tmp_path, monkeypatch):
    scan = write_scan(tmp_path, shares=random_shares(40, 30), labels=[n % 4 for n in range(40)])
    taus, held, sums_of = [0.05, 0.04, 0.03, 0.02, 0.01], [], thresholds.class_sums
    monkeypatch.setattr(
        thresholds, "class_sums", lambda *own, **more: held.append(own[1]) or sums_of(*own, **more)
    )
    for n, portions in ((10, [taus]), (2, [taus[:2], taus[2:4], taus[4:]])):
        held.clear()
        monkeypatch.setattr(thresholds, "_COUNTS_AT_ONCE", n * 4 * 30 + 1)
        assert [tau for tau, *_ in thresholds._lower(scan, taus, 0.5, QUIET)] == taus
        assert held == portions
