"""Where results lie: each run takes a folder for good, and what is there is told apart."""

import inspect
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from unbraid.base import files
from unbraid.base.files import set_aside, write_new
from unbraid.cli import make
from unbraid.finding.findings import Findings
from unbraid.images.kept import LISTED, LISTED_PARTS
from unbraid.networks.layers import layer_folder
from unbraid.reporting.layers import DATA
from unbraid.reporting.pictures import Sight
from unbraid.running import folders
from unbraid.running.folders import Settings, Thresholds, home_of, read_settings, take_folder
from unbraid.scanning.records import PLACES

SETTINGS = Settings("", Thresholds(), {})
FOUND = Findings(0.03, 0.75, 0.5, (), {}, (), "", "2", "")


def test_take_folder_of_many_at_once_gives_each_its_own_and_fills_gaps(tmp_path):
    settings = [replace(SETTINGS, thresholds=Thresholds(0.01 * n)) for n in range(1, 25)]
    with ThreadPoolExecutor(len(settings)) as pool:
        taken = list(pool.map(lambda one: take_folder(tmp_path, one, FOUND), settings))
    assert set(taken) == {tmp_path, *(tmp_path / f"settings-{n}" for n in range(2, 25))}
    assert [read_settings(folder) for folder in taken] == settings
    gone = settings.pop(taken.index(tmp_path / "settings-2"))
    shutil.rmtree(tmp_path / "settings-2")
    taken.remove(tmp_path / "settings-2")
    assert [take_folder(tmp_path, one, FOUND) for one in settings] == taken
    assert take_folder(tmp_path, gone, FOUND) == tmp_path / "settings-2"


def test_take_folder_leaves_a_link_that_leads_nowhere_and_a_file(tmp_path):
    (tmp_path / "settings.json").symlink_to(tmp_path / "gone")
    (tmp_path / "settings-2").write_text("mine")
    assert take_folder(tmp_path, SETTINGS, FOUND) == tmp_path / "settings-3"
    assert (tmp_path / "settings-2").read_text() == "mine"


def test_is_numbered_and_home_of_a_folder_however_it_is_named(tmp_path, monkeypatch):
    names = [f"settings-{n}" for n in ("2", "10", "1", "0", "02", "x", "")]
    assert [n for n in names if folders.is_numbered(Path("a", n))] == ["settings-2", "settings-10"]
    inside = tmp_path / "settings-2"
    inside.mkdir()
    assert home_of(inside) == inside  # nothing else there
    (tmp_path / "scan-val").mkdir()
    monkeypatch.chdir(inside)
    assert home_of(Path(".")) == tmp_path
    (inside / "scan-val").mkdir()
    assert home_of(inside) == inside


def test_same_results_by_what_decides_on_them():
    for other, same in (
        ({"title": "y", "source": {"data": "x"}, "sight": Sight(1.0)}, True),
        ({"scans": ()}, True),  # of an older version
        ({"scans": ("a", "c")}, False),
        ({"thresholds": Thresholds(tau=0.05)}, False),
        ({"encoder": "timm:x"}, False),
        ({"labels": "predicted"}, False),
    ):
        settings = replace(SETTINGS, scans=("a", "b"))
        assert settings.same_results(replace(settings, **other)) is same


def test_read_settings_of_another_version_passes_over_what_is_not_known(tmp_path):
    text = '{"title": "x", "thresholds": {"tau": 0.1}, "source": {}, "mood": {"width": 1.0}}'
    (tmp_path / "settings.json").write_text(text)
    settings = read_settings(tmp_path)
    assert settings == Settings("x", Thresholds(0.1), {}, everything=True)
    assert str(settings) == "tau 0.1, p 0.75, gamma 0.5, images measured all"
    assert settings.thresholds.of_find == Thresholds(0.1).of_find


def test_results_of_a_version_that_knew_no_sample_are_of_all_images(tmp_path):
    old = '{"title": "", "thresholds": {"tau": "auto"}, "source": {}}'
    (tmp_path / "settings.json").write_text(old)
    assert take_folder(tmp_path, SETTINGS, FOUND) == tmp_path / "settings-2"
    assert (tmp_path / "settings.json").read_text() == old
    assert take_folder(tmp_path, replace(SETTINGS, everything=True), FOUND) == tmp_path
    for settings in (SETTINGS, replace(SETTINGS, everything=True)):
        own = take_folder(tmp_path / "new", settings, FOUND)
        assert read_settings(own) == settings


def test_set_aside_never_takes_a_name_that_is_taken(tmp_path):
    for n in range(3):
        (tmp_path / "a").write_text(str(n))
        assert set_aside(tmp_path / "a", ".old").read_text() == str(n)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.2.old", "a.3.old", "a.old"]


@pytest.mark.parametrize("links", [True, False])
def test_write_new_writes_only_where_nothing_is(links, tmp_path, monkeypatch):
    if not links:  # as some file systems have none
        monkeypatch.setattr(files.os, "link", lambda *_: os.stat(tmp_path / "nowhere"))
    assert write_new(tmp_path / "a/b", b"one")
    assert not write_new(tmp_path / "a/b", b"two")
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "a").iterdir()] == [("b", b"one")]


def test_a_run_chooses_tau_unless_one_is_given_and_find_has_the_published_one():
    defaults = [inspect.signature(f).parameters["tau"].default for f in (make.run, make.find)]
    assert [Thresholds().tau, *defaults] == ["auto", "auto", 0.03]


@pytest.mark.parametrize(
    "name",
    [
        *(folders.FIRST_LOOK, *folders.SCANS, folders.FEATURES, *folders._RESULTS),
        *(folders.SETTINGS, "settings-2", "settings-10", "positions-train", "positions-val-2"),
        *(DATA, "index.html", "layers.csv", LISTED, *LISTED_PARTS.values(), "manifest.json"),
        *("shard-000000.safetensors", f"{LISTED}.before", "circuits", "QUICK"),
        *(PLACES, "explained", "splits"),
    ],
)
def test_a_layer_never_has_the_folder_of_something_else(name, tmp_path):
    folder = layer_folder(tmp_path, name)
    assert folder.parent == tmp_path
    assert folder.name.lower() != name.lower()
    assert layer_folder(tmp_path, folder.name) != folder  # that of a layer of this very name
