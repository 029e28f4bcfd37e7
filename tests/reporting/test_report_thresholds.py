"""The page's maps of what other thresholds find."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import unbraid
from handmade import scan_of_causes
from unbraid.base.errors import UsageError
from unbraid.reporting.material import Material
from unbraid.reporting.view import maps


def write_page(path: Path, scan: unbraid.Scan, found: unbraid.Findings, **given: Any) -> str:
    return unbraid.report(path, scan=scan, found=found, **given).read_text(encoding="utf-8")


def numbers_on(page: str) -> list[tuple[float, ...]]:
    """The numbers that a reader gets by pointing at the cells of the maps."""
    pattern = r"<title>tau (\S+), p (\S+), gamma (\S+): ([\d,]+) channels?, ([\d,]+) pairs?</title>"
    return [
        tuple(float(n.replace(",", "")) for n in numbers) for numbers in re.findall(pattern, page)
    ]


def outlined(page: str) -> list[str]:
    return re.findall(r'<title>(tau [^:]*):[^<]*</title><rect class="tile[^"]* chosen"', page)


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
    for cell in counted.cells:  # and once more in the table
        assert len(re.findall(rf">{cell.n_channels:,} channels?, {cell.n_pairs:,} pairs?<", page))
    assert page.count('<td class="figure">') >= len(counted.cells)
    assert page.count("the table below has all numbers") == len(counted.ps)


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


def test_counts_of_another_network_are_refused(tmp_path):
    scan = scan_of_causes(tmp_path / "scan", 0)
    other = replace(unbraid.sensitivity(scan), weights="1" * 64)
    with pytest.raises(UsageError, match="The sensitivity is of another network or layer"):
        write_page(tmp_path / "page.html", scan, unbraid.find(scan), sensitivity=other)
    assert not (tmp_path / "page.html").exists()


def test_more_channels_have_a_stronger_shade_and_none_has_no_shade(tmp_path):
    scan = scan_of_causes(tmp_path / "scan", 0)
    counted = unbraid.sensitivity(scan)
    material = Material(scan, unbraid.find(scan), None, None, None, counted)
    tiles = [tile for one in maps(material) for row in one.rows for tile in row]
    shades = {tile.cell.n_channels: tile.shade for tile in tiles}
    assert len(shades) > 3
    ordered = [shades[number] for number in sorted(shades)]
    assert ordered == sorted(set(ordered))
    assert (shades[0], ordered[-1]) == (0, 1)
