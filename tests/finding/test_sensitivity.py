"""What other thresholds find: against the oracle, against `find`, in print and on the page."""

from __future__ import annotations

import csv
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import unbraid
from checks import assert_agrees_with_find, assert_sensitivity, truth_of
from handmade import random_shares, write_scan
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import UnbraidError, UsageError
from unbraid.finding.arv import class_cosines, class_sums, cosines_of
from unbraid.finding.thresholds import GAMMAS, PS, TAUS, Cell, Sensitivity
from unbraid.reporting.view import shade_of
from unbraid.scanning import records

# --- against slow ways ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["3x3", "groups", "tokens"])
def test_every_choice_finds_the_published_pairs(kind, tmp_path):
    network, dataset = build(kind), SyntheticImages(19)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, batch_size=8)
    counted = unbraid.sensitivity(scan, [0.05, 0.1, 0.2, 0.9], [0.2, 0.75, 1], [-1, 0.2, 0.6, 1])
    assert_sensitivity(counted, truth_of(network, dataset))
    assert len({cell.n_pairs for cell in counted.cells}) > 2


def scan_of_causes(folder: Path, seed: int, n_causes: int = 5, **options: float) -> unbraid.Scan:
    """Many classes, some alike, one without images, that share channels for many reasons."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 12, (90,), generator=generator)
    labels[labels == 7] = 8
    causes = torch.randn(n_causes, 6, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(90, 6, generator=generator, dtype=torch.float64)
    return write_scan(
        folder,
        shares=random_shares(90, 20, seed),
        labels=labels.tolist(),
        pooled=causes[labels % n_causes] + noise,
        weight=torch.randn(20, 6, generator=generator, dtype=torch.float64),
        **options,
    )


@pytest.mark.parametrize("seed", range(4))
def test_every_choice_finds_what_find_finds(seed, tmp_path):
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


def test_counts_do_not_depend_on_shards(tmp_path):
    one, other = (
        unbraid.sensitivity(scan_of_causes(tmp_path / str(size), 1, shard_size=size))
        for size in (4, 1000)
    )
    assert one == other


def test_a_channel_that_all_classes_use_for_one_cause_counts_for_nothing(tmp_path):
    scan = scan_of_causes(tmp_path, 2, n_causes=1)
    counted = unbraid.sensitivity(scan, [0.005], [0.1], [0.3])
    assert counted.cells == (Cell(0.005, 0.1, 0.3, 0, 0),)


def test_the_scan_is_read_once(tmp_path, monkeypatch):
    scan = scan_of_causes(tmp_path, 0, shard_size=10)
    read = []
    whole = records.read_shard
    monkeypatch.setattr(records, "read_shard", lambda *a: read.append(a[1]) or whole(*a))
    unbraid.sensitivity(scan)
    assert read == list(range(9))


# --- the grid -------------------------------------------------------------------------------------


def test_the_default_grid_holds_the_published_thresholds_and_those_of_the_findings(tmp_path):
    scan = scan_of_causes(tmp_path, 0)
    default = unbraid.sensitivity(scan)
    assert (default.taus, default.ps, default.gammas) == (TAUS, PS, GAMMAS)
    assert default.at(0.03, 0.75, 0.5) in default.cells
    found = unbraid.find(scan, tau="auto", p=0.4, gamma=0.55)
    around = unbraid.sensitivity(scan, found=found)
    assert around.taus == tuple(sorted({*TAUS, found.tau}))
    assert around.at(found.tau, 0.4, 0.55).n_pairs == len(found.pairs) > 0


def test_a_grid_of_ones_own_is_sorted_and_left_as_it_is(tmp_path):
    scan = scan_of_causes(tmp_path, 0)
    found = unbraid.find(scan, tau=0.04)
    counted = unbraid.sensitivity(scan, [0.1, 0.02, 0.1], [1], [0.5, -1], found=found)
    assert (counted.taus, counted.ps, counted.gammas) == ((0.02, 0.1), (1.0,), (-1.0, 0.5))


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
def test_a_grid_that_makes_no_sense_is_refused(grid, told, tmp_path):
    with pytest.raises(UsageError, match=f"^{re.escape(told)}") as caught:
        unbraid.sensitivity(scan_of_causes(tmp_path, 0), **grid)
    assert str(caught.value).count(".\n") == 0
    assert str(caught.value).endswith(".")


# --- for people and files -------------------------------------------------------------------------


@pytest.fixture
def small() -> Sensitivity:
    numbers = [(580, 2841), (700, 220_153), (9, 20), (0, 0)]
    choices = [(tau, 0.75, gamma) for tau in (0.01, 0.03) for gamma in (0.5, 0.6)]
    return Sensitivity(
        layer="layer4.2.conv3",
        weights="0" * 64,
        n_out=2048,
        taus=(0.01, 0.03),
        ps=(0.75,),
        gammas=(0.5, 0.6),
        cells=tuple(Cell(*c, *n) for c, n in zip(choices, numbers, strict=True)),
    )


def test_it_prints_as_a_table(small):
    assert str(small) == (
        "Polysemantic channels, and pairs of classes in brackets, of the 2,048 channels of layer "
        "layer4.2.conv3\n\n"
        "p 0.75    gamma 0.5    gamma 0.6\n"
        "tau 0.01  580 (2,841)  700 (220,153)\n"
        "tau 0.03  9 (20)       0 (0)"
    )


def test_a_choice_can_be_looked_up(small):
    assert small.at(0.03, 0.75, 0.5) == Cell(0.03, 0.75, 0.5, 9, 20)
    with pytest.raises(KeyError):
        small.at(0.02, 0.75, 0.5)


def test_files_and_data_frames_hold_every_choice(small, tmp_path):
    small.to_csv(tmp_path / "new" / "sensitivity.csv")
    with (tmp_path / "new" / "sensitivity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["tau", "p", "gamma", "n_channels", "n_pairs"]
    assert list(rows[0]) == columns
    expected = [[c.tau, c.p, c.gamma, c.n_channels, c.n_pairs] for c in small.cells]
    assert [[float(row[name]) for name in columns] for row in rows] == expected
    frame = small.to_pandas()
    assert list(frame.columns) == columns
    assert frame.to_numpy().tolist() == expected


def test_without_pandas_it_says_how_to_get_it(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnbraidError, match="pip install pandas"):
        small.to_pandas()


# --- on the page ----------------------------------------------------------------------------------


def write_page(path: Path, scan: unbraid.Scan, found: unbraid.Findings, **given: Any) -> str:
    return unbraid.report(path, scan=scan, found=found, **given).read_text(encoding="utf-8")


def numbers_on(page: str) -> list[tuple[float, ...]]:
    """The numbers that a reader gets by pointing at the cells of the maps."""
    pattern = r'title="tau (\S+), p (\S+), gamma (\S+): ([\d,]+) channels?, ([\d,]+) pairs?"'
    return [
        tuple(float(n.replace(",", "")) for n in numbers) for numbers in re.findall(pattern, page)
    ]


def outlined(page: str) -> list[str]:
    return re.findall(r'class="tile[^"]* chosen" title="(tau [^:]*):', page)


@pytest.mark.parametrize("tau", ["auto", 0.9])
def test_the_page_shows_every_choice_and_outlines_its_own(tau, tmp_path):
    scan = scan_of_causes(tmp_path / "scan", 0)
    found = unbraid.find(scan, tau=tau, p=0.4)
    assert bool(found.pairs) == (tau == "auto")
    counted = unbraid.sensitivity(scan, found=found)
    page = write_page(tmp_path / "page.html", scan, found, sensitivity=counted)
    assert sorted(numbers_on(page)) == sorted(map(tuple, counted.rows()))
    assert outlined(page) == [f"tau {found.tau:g}, p 0.4, gamma 0.5"]
    assert "outlined, the choice of this page" in page
    for cell in counted.cells:  # and seen in the table
        pairs = f" <small>{cell.n_pairs:,}</small>" if cell.n_pairs else ""
        assert f'">{cell.n_channels:,}{pairs}</td>' in page


def test_a_page_whose_own_choice_is_not_in_the_grid_outlines_none(tmp_path):
    scan = scan_of_causes(tmp_path / "scan", 0)
    found = unbraid.find(scan, p=0.33)
    counted = unbraid.sensitivity(scan)
    page = write_page(tmp_path / "page.html", scan, found, sensitivity=counted)
    assert numbers_on(page)
    assert outlined(page) == []
    assert "outlined" not in page


def test_a_page_without_counts_has_no_map(tmp_path):
    scan = scan_of_causes(tmp_path / "scan", 0)
    assert "Other thresholds" not in write_page(tmp_path / "page.html", scan, unbraid.find(scan))


def test_the_page_says_what_to_know_of_the_tau_chosen(tmp_path):
    scan = scan_of_causes(tmp_path / "scan", 0, min_share=0.2)
    found = unbraid.find(scan, tau="auto")
    assert found.note
    page = write_page(tmp_path / "page.html", scan, found)
    assert f"<li><bdi>{found.note}</bdi></li>" in page
    assert "<dd><bdi>0.2 (auto)</bdi></dd>" in page


def test_counts_of_another_network_are_refused(small, tmp_path):
    scan = scan_of_causes(tmp_path / "scan", 0)
    with pytest.raises(UsageError, match="The sensitivity is of another network or layer"):
        write_page(tmp_path / "page.html", scan, unbraid.find(scan), sensitivity=small)
    assert not (tmp_path / "page.html").exists()


def test_more_channels_have_a_stronger_shade_and_none_has_no_shade(tmp_path):
    scan = scan_of_causes(tmp_path / "scan", 0)
    counted = unbraid.sensitivity(scan)
    shades = {cell.n_channels: shade_of(counted, cell) for cell in counted.cells}
    assert len(shades) > 3
    ordered = [shades[number] for number in sorted(shades)]
    assert ordered == sorted(ordered)
    assert (shades[0], ordered[-1]) == (0, 9)
