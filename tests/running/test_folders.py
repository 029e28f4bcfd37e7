"""Where results lie: each run takes a folder for good, and what is there is told apart."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unbraid.base import files
from unbraid.base.files import set_aside, write_new
from unbraid.finding.findings import Findings
from unbraid.reporting.pictures import Sight
from unbraid.running.folders import (
    Settings,
    Thresholds,
    home_of,
    is_numbered,
    read_settings,
    take_folder,
)

SETTINGS = Settings("", Thresholds(), {})
FOUND = Findings(0.03, 0.75, 0.5, (), {}, (), "", "2", "")


def of(tau: float) -> Settings:
    return replace(SETTINGS, thresholds=Thresholds(tau))


def test_take_folder_of_many_at_once_gives_each_its_own(tmp_path: Path) -> None:
    taus = [0.01 * n for n in range(1, 25)]
    with ThreadPoolExecutor(len(taus)) as pool:
        taken = list(pool.map(lambda tau: take_folder(tmp_path, of(tau), FOUND), taus))
    assert len(set(taken)) == len(taus)
    assert [take_folder(tmp_path, of(tau), FOUND) for tau in taus] == taken
    assert [read_settings(folder) for folder in taken] == [of(tau) for tau in taus]


def test_take_folder_fills_a_gap_and_finds_a_later_folder(tmp_path: Path) -> None:
    for tau in (0.01, 0.02, 0.03):
        last = take_folder(tmp_path, of(tau), FOUND)
    shutil.rmtree(tmp_path / "settings-2")
    assert take_folder(tmp_path, of(0.03), FOUND) == last == tmp_path / "settings-3"
    assert take_folder(tmp_path, of(0.04), FOUND) == tmp_path / "settings-2"


def test_take_folder_leaves_a_link_that_leads_nowhere_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "settings.json").symlink_to(tmp_path / "gone")
    (tmp_path / "settings-2").write_text("mine")
    assert take_folder(tmp_path, SETTINGS, FOUND) == tmp_path / "settings-3"
    assert (tmp_path / "settings-2").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "numbered"),
    [("settings-2", True), ("settings-10", True)]
    + [(f"settings-{n}", False) for n in ("1", "0", "02", "x", "")]
    + [("settings", False), ("my-settings-2", False)],
)
def test_is_numbered_by_name(name: str, numbered: bool) -> None:
    assert is_numbered(Path("run") / name) is numbered


def test_home_of_a_folder_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "settings-2"
    inside.mkdir()
    assert home_of(inside) == inside  # nothing else there
    (tmp_path / "scan-val").mkdir()
    assert home_of(inside) == tmp_path
    monkeypatch.chdir(inside)
    assert home_of(Path(".")) == tmp_path
    (inside / "scan-val").mkdir()
    assert home_of(inside) == inside


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"title": "y", "source": {"data": "x"}, "sight": Sight(1.0)}, True),
        ({"scans": ("a", "c")}, False),
        ({"scans": ()}, True),  # of an older version
        ({"thresholds": Thresholds(tau=0.05)}, False),
        ({"thresholds": Thresholds(concepts="clusters")}, False),
        ({"encoder": "timm:x"}, False),
        ({"labels": "predicted"}, False),
    ],
)
def test_same_results_by_what_decides_on_them(other: dict[str, Any], same: bool) -> None:
    settings = replace(SETTINGS, scans=("a", "b"))
    assert settings.same_results(replace(settings, **other)) is same


def test_settings_in_words_name_what_is_unusual() -> None:
    usual = "tau 0.03, p 0.75, gamma 0.5"
    assert str(SETTINGS) == usual
    odd = replace(SETTINGS, labels="predicted", encoder="timm:x")
    assert str(odd) == f"{usual}, labels predicted, encoder timm:x"


def test_read_settings_of_another_version_passes_over_what_is_not_known(tmp_path: Path) -> None:
    text = '{"title": "x", "thresholds": {"tau": 0.1}, "source": {}, "mood": {"width": 1.0}}'
    (tmp_path / "settings.json").write_text(text)
    assert read_settings(tmp_path) == Settings("x", Thresholds(0.1), {})


def test_set_aside_never_takes_a_name_that_is_taken(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / "a").write_text(str(n))
        assert set_aside(tmp_path / "a", ".old").read_text() == str(n)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.2.old", "a.3.old", "a.old"]


@pytest.mark.parametrize("links", [True, False])
def test_write_new_writes_only_where_nothing_is(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no hard links here")

    if not links:
        monkeypatch.setattr(files.os, "link", refuse)
    assert write_new(tmp_path / "a/b", b"one")
    assert not write_new(tmp_path / "a/b", b"two")
    assert (tmp_path / "a/b").read_bytes() == b"one"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
