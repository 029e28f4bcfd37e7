"""The report stays below ten megabytes, whatever is found, and says what its lists leave out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_report import Run, assert_harmless, read, run  # noqa: F401  # a fixture

import unbraid
from pages import LONG
from unbraid.reporting import report as page_module
from unbraid.reporting import view
from unbraid.reporting import view as pairs
from unbraid.reporting.words import number

LIMIT = 10_000_000


def test_of_many_pairs_the_lowest_cosines_are_listed(run: Run, tmp_path: Path) -> None:  # noqa: F811
    known = run.found.pairs
    many = tuple(
        replace(known[n % len(known)], cosine=(n * 7919 % 60_000) / 100_000) for n in range(60_000)
    )
    file = tmp_path / "r.html"
    page = run.report(file, found=replace(run.found, pairs=many))
    assert file.stat().st_size <= LIMIT
    assert_harmless(page)
    rows = read(page).all("table", "pairs")[0].all("tbody")[0].all("tr")
    lowest = sorted(pair.cosine for pair in many)[:1000]
    assert [row.all("td")[1].text for row in rows] == [number(cosine) for cosine in lowest]
    (notes,) = (aside.text for aside in read(page).all("aside"))
    assert "the 1,000 with the lowest cosines of 60,000; the other 59,000 are in findings" in notes
    assert "60,000 pairs of classes" in read(page).all("ul", "facts")[0].text
    told = re.search(r"\? marks ([\d,]+) uncertain pairs? of 1,000 listed", read(page).text)
    n_uncertain = sum("?" in row.all("td")[2].text for row in rows)
    assert int(told[1].replace(",", "")) == n_uncertain if told else n_uncertain == 0


def test_a_list_that_is_whole_says_nothing(run: Run, tmp_path: Path) -> None:  # noqa: F811
    page = run.report(tmp_path / "r.html")
    assert "The list of" not in " ".join(aside.text for aside in read(page).all("aside"))


def test_endless_lists_of_endless_names_stay_below_the_limit(run: Run, tmp_path: Path) -> None:  # noqa: F811
    names = tuple(f"{n}<&'\"{LONG[:300]}" for n in range(120))
    concepts = {n: tuple((c,) for c in range(120)) for n in range(3000)}
    few = tuple(
        replace(run.found.pairs[0], channel=n % 3000, class1=n % 120, class2=(n + 1) % 120)
        for n in range(3000)
    )
    found = replace(run.found, concepts=concepts, pairs=few, class_names=names)
    file = tmp_path / "r.html"
    page = run.report(file, found=found, split=None, evaluation=None)
    assert file.stat().st_size <= LIMIT
    assert_harmless(page)
    rows = read(page).all("table", "overview")[0].all("tbody")[0].all("tr")
    notes = read(page).all("aside")[0].text
    assert f"The list of channels has {len(rows):,} of 3,000" in notes
    assert "3,000 of the 6 channels" in read(page).all("p", "lead")[0].text
    assert "and 94 more" in rows[0].text


def test_the_least_that_is_shown_is_small(
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page_module, "LIMIT", 60_000)
    file = tmp_path / "r.html"
    page = run.report(file)
    assert_harmless(page)
    assert not read(page).all("article")
    n = len(run.split.channels)
    assert f"none of {n} is shown in full" in read(page).all("aside")[0].text
    assert len(read(page).all("table", "overview")[0].all("tbody")[0].all("tr")) >= 1
    assert file.stat().st_size <= 60_000


def test_channels_shown_in_full_are_listed_in_any_case(
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n = len(run.split.channels)
    for module in (pairs, view):
        monkeypatch.setattr(module, "MAX_LISTED", n)
    nearer = [replace(run.found.pairs[0], channel=90 + k, cosine=-0.9) for k in range(5)]
    concepts = {**run.found.concepts, **{pair.channel: ((0,), (1,)) for pair in nearer}}
    found = replace(run.found, concepts=concepts, pairs=(*nearer, *run.found.pairs))
    page = run.report(tmp_path / "r.html", found=found)
    assert_harmless(page)
    rows = read(page).all("table", "overview")[0].all("tbody")[0].all("tr")
    listed = {int(row.all("th")[0].text) for row in rows}
    assert listed == {part.channel for part in run.split.channels}


def test_too_many_thresholds_are_no_map(
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = unbraid.sensitivity(run.train_scan, found=run.found)
    assert "Other thresholds" in run.report(tmp_path / "a.html", sensitivity=counted)
    monkeypatch.setattr(view, "_MAX_CELLS", len(counted.cells) - 1)
    page = run.report(tmp_path / "b.html", sensitivity=counted)
    assert not read(page).all("div", "maps")
    assert "Other thresholds are left out" in read(page).all("aside")[0].text
