"""A run makes each result once; a second one destroys nothing of the first, however it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unbraid
from tiny_networks import SyntheticImages
from unbraid.base import files
from unbraid.base.errors import ModelError, RunError, UsageError
from unbraid.running import run as running
from unbraid.running.check import check
from unbraid.running.folders import Thresholds, is_numbered, read_settings
from unbraid.running.run import Run, run_layers
from unbraid.scanning.scan_options import Loading

LOOSE = Thresholds(0.01, 0.5, 0.99)
STRICT = Thresholds(0.2, 0.5, 0.99)  # leaves one class out
NOTHING = Thresholds(0.9, 1.0, -1.0)
USUAL: dict[str, Any] = {"source": {}, "title": "x", "features": False, "say": lambda _: None}
USUAL |= {"thresholds": LOOSE, "loading": Loading(batch_size=16)}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)),
    ).double()


def run(out: Path, thresholds: Thresholds = LOOSE, seed: int = 0, **options: Any) -> Run:
    options = {**USUAL, "thresholds": thresholds, **options}
    val = options.pop("val", SyntheticImages(24, seed=24))
    return running.run(network(seed), "2", SyntheticImages(48, seed=48), val, out, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_kept(out: Path, before: dict[str, bytes]) -> None:
    after = content(out)
    assert [name for name in before if after.get(name) != before[name]] == []


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "run"
    assert len(run(folder).found) > len(run(folder.with_name("strict"), STRICT).found) > 0
    return folder


@pytest.fixture
def out(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "run"))


OTHERS: dict[str, tuple[Thresholds, dict[str, Any]]] = {
    "tau": (Thresholds(0.02, 0.5, 0.99), {}),
    "tau that fits": (Thresholds("auto", 0.5, 0.99), {}),
    "p": (Thresholds(0.01, 0.75, 0.99), {}),
    "gamma": (Thresholds(0.01, 0.5, 0.9), {}),
    "rho": (Thresholds(0.01, 0.5, 0.99, 0.5), {}),
    "clusters": (Thresholds(0.01, 0.5, 0.99, None, "clusters"), {}),
    "nothing found": (NOTHING, {}),
    "encoder": (LOOSE, {"encoder": "timm:any"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_run_with_other_settings_gets_a_folder_of_its_own(
    name: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "load_encoder", lambda *_, **__: lambda x: x.flatten(1))
    before, said = content(out), []
    thresholds, options = OTHERS[name]
    done = run(out, thresholds, say=said.append, **options)
    assert done.page == out / "settings-2/report.html"
    told = f"{out} holds a run with tau 0.01, p 0.5, gamma 0.99; this one goes into "
    assert f"{told}{out / 'settings-2'}." in said
    assert_kept(out, before)
    own = {path.name for path in (out / "settings-2").glob("positions-*")}
    shares = done.found.classes in ((), (0, 1, 2, 3))  # of which the first run has positions
    assert own == (set() if shares else {"positions-train", "positions-val"})
    after = content(out)
    assert run(out, thresholds, **options).page == done.page  # again: it goes on there
    assert content(out) == after
    assert run(out).page == out / "report.html"
    assert_kept(out, after)
    assert check(out).whole


def test_run_into_a_folder_of_other_settings_by_name(out: Path) -> None:
    inside = run(out, STRICT).folder
    assert run(inside, STRICT).folder == inside
    assert run(inside, NOTHING).folder == out / "settings-3"
    free = run(out / "settings-7", Thresholds(0.02, 0.5, 0.99))
    assert free.folder == out / "settings-7"
    assert run(out / "settings-9").folder == out  # where these settings are
    assert sorted(p.name for p in out.glob("**/scan-*")) == ["scan-train", "scan-val"]


@pytest.mark.parametrize("same", [{"title": "y"}, {"source": {"data": "moved"}}, {}])
def test_run_with_what_changes_no_result_makes_no_folder(same: dict[str, Any], out: Path) -> None:
    before = content(out)
    assert run(out, **same).page == out / "report.html"
    changed = {name for name, now in content(out).items() if now != before.get(name)}
    assert changed <= {"settings.json", "report.html"}
    settings = json.loads((out / "settings.json").read_text())
    assert {name: settings[name] for name in same} == same


def test_run_with_other_settings_scans_only_what_is_not_there(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    scan_into = running.scan_into

    def spy(model: Any, folders: dict[str, Path], *args: Any, **kwargs: Any) -> Any:
        there = (path for path in folders.values() if not (path / "manifest.json").exists())
        begun.extend(str(path.relative_to(out)) for path in there)
        return scan_into(model, folders, *args, **kwargs)

    monkeypatch.setattr(running, "scan_into", spy)
    run(out, Thresholds(0.01, 0.5, 0.99, 0.5))
    assert begun == []
    run(out, STRICT)
    assert begun == ["settings-3/positions-train", "settings-3/positions-val"]
    run(out, replace(STRICT, rho=0.5))
    assert len(begun) == 2
    assert not list((out / "settings-4").glob("positions-*"))
    shutil.rmtree(out / "settings-3/positions-val")  # may be deleted to save room
    run(out, replace(STRICT, rho=0.5))
    assert begun[2:] == ["settings-4/positions-val"]


def test_run_layers_leaves_what_a_run_of_each_does(out: Path) -> None:
    data = (SyntheticImages(48, seed=48), SyntheticImages(24, seed=24))
    both = out.with_name("both")
    done = run_layers(network(), ["0", "2"], *data, both, **USUAL)
    assert done.output is not None
    assert done.output.max_abs_logit_diff == 0
    alone = content(out)
    for name, now in content(both / "2").items():
        if not name.startswith(("settings", "report")) and not name.endswith("manifest.json"):
            assert now == alone[name], name
    assert [read_settings(both / layer).title for layer in "02"] == ["x · 0", "x · 2"]
    assert check(both).whole


class FewerClasses(SyntheticImages):
    """Validation images of three of four classes."""

    def __init__(self) -> None:
        super().__init__(24, seed=24)
        keep = [n for n, label in enumerate(self.targets) if label != 0]
        self.targets = [self.targets[n] for n in keep]
        self.images = self.images[keep]


def test_run_layers_tells_classes_without_validation_images_first(tmp_path: Path) -> None:
    said: list[str] = []
    data = (SyntheticImages(48, seed=48), FewerClasses(), tmp_path / "run")
    done = run_layers(network(), ["2"], *data, **{**USUAL, "say": said.append}).runs["2"]
    assert "have none of 1 class (class 0); channels that one of them uses" in said[0]
    whole = run(tmp_path / "whole")
    assert 0 < len(done.found.concepts) < len(whole.found.concepts)
    assert "left out, as the validation images have none" in done.found.note
    assert "left out, as the validation images" in done.page.read_text()
    assert check(tmp_path / "run").whole


# --- killed, and failing --------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> None:
    """Die at this call of a function."""
    calls: list[Any] = []
    function = getattr(holder, name)

    def call_or_die(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            raise Killed
        return function(*args)

    monkeypatch.setattr(holder, name, call_or_die)


def die_until_done(
    start: Callable[[], Run], check_between: Callable[[], None], holder: Any, name: str
) -> tuple[Run, int]:
    """Start again and again, each start killed one call later than the one before."""
    for number in range(1, 100):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(number, patch, holder, name)
            try:
                return start(), number
            except Killed:
                check_between()
    raise AssertionError("it never came to an end")


@pytest.mark.parametrize("thresholds", [STRICT, NOTHING])
def test_run_killed_before_any_file_loses_nothing_of_the_first(
    thresholds: Thresholds, out: Path
) -> None:
    before = content(out)
    done, n_kills = die_until_done(
        lambda: run(out, thresholds), lambda: assert_kept(out, before), files, "_write"
    )
    assert n_kills >= 4  # settings, findings, sensitivity, report
    assert_kept(out, before)
    whole = run(out.with_name("undisturbed"), thresholds)
    assert done.folder == out / "settings-2"
    own = {k: v for k, v in content(done.folder).items() if k != "settings.json"}
    theirs = content(whole.folder)
    assert own == {k: v for k, v in theirs.items() if k in own}
    assert not [p for p in out.iterdir() if is_numbered(p) and p.name != "settings-2"]


def test_run_killed_while_replacing_is_finished_by_the_next(out: Path) -> None:
    positions = {k: v for k, v in content(out).items() if k.startswith(("scan", "positions"))}
    undisturbed = run(out.with_name("undisturbed"), STRICT).folder
    _, n_kills = die_until_done(
        lambda: run(out, STRICT, overwrite=True),
        lambda: assert_kept(out, positions),
        Path,
        "rename",
    )
    assert n_kills > 4
    assert_kept(out, positions)
    assert [p.name for p in out.iterdir() if is_numbered(p)] == []
    for name in ("findings.csv", "split.safetensors", "evaluation.json", "report.html"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    assert check(out).whole


def test_run_that_fails_with_overwrite_leaves_what_is_there(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(out)

    def fail(*_: Any, **__: Any) -> None:
        raise RunError("The network has gone.")

    monkeypatch.setattr(running, "ablate", fail)
    for overwrite in (True, False):
        with pytest.raises(RunError):
            run(out, STRICT, overwrite=overwrite)
        assert_kept(out, before)
    with pytest.raises(UsageError):
        run(out, Thresholds(tau=3.0), overwrite=True)
    with pytest.raises(RunError, match="weights"):
        run(out, STRICT, seed=1, overwrite=True)
    assert_kept(out, before)


def test_run_killed_before_its_settings_leaves_the_folder_free(tmp_path: Path) -> None:
    class Fails(SyntheticImages):
        def __getitem__(self, index: int) -> Any:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "run", val=Fails(24))
    assert run(tmp_path / "run", STRICT).page == tmp_path / "run/report.html"
    assert run(tmp_path / "run").page == tmp_path / "run/settings-2/report.html"


def test_run_on_scans_made_anew_of_another_network_leaves_the_results(out: Path) -> None:
    for kind in ("train", "val"):
        shutil.rmtree(out / f"scan-{kind}")
    before = content(out)
    assert run(out, seed=1).page == out / "settings-2/report.html"
    assert_kept(out, before)


def test_run_on_results_without_settings_keeps_them_unless_they_are_the_same(out: Path) -> None:
    (out / "settings.json").rename(out / "settings.json.damaged")
    before = content(out)
    assert run(out, STRICT).folder == out / "settings-2"
    assert_kept(out, before)
    assert run(out).folder == out  # the same: it only lacked its settings
    assert {p.name for p in out.iterdir()} >= {"settings.json", "settings.json.damaged"}


@pytest.mark.parametrize("place", [".", "settings-2"])
def test_run_tells_settings_of_no_run_before_anything_is_scanned(
    place: str, tmp_path: Path
) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "settings.json").write_text("{}")
    with pytest.raises(RunError, match="not that of a run"):
        run(tmp_path)
    assert sorted(content(tmp_path)) == [str(Path(place, "settings.json"))]


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        (lambda x: x.flatten(1)[:, :0], "not one embedding each"),
        (lambda x: x.flatten(1) / 0, "NaN or infinite"),
        (lambda x: x @ x, "cannot run on images"),
    ],
)
def test_run_tells_an_encoder_that_fails_before_anything_is_scanned(
    encoder: Callable[[Any], Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "load_encoder", lambda *_, **__: encoder)
    with pytest.raises(ModelError, match=told):
        run(tmp_path / "run", encoder="timm:any")
    assert not (tmp_path / "run").exists()


def test_scan_with_positions_into_one_without_is_refused(out: Path) -> None:
    before = content(out)
    with pytest.raises(RunError, match="whether positions are kept"):
        unbraid.scan(network(), "2", SyntheticImages(24, seed=24), out / "scan-val", positions=True)
    assert content(out) == before


# --- read again -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with positions of its own, and one that shares the first run's."""
    folder = Path(shutil.copytree(first, tmp_path_factory.mktemp("family") / "run"))
    run(folder, STRICT)
    run(folder, Thresholds(0.01, 0.5, 0.99, 0.5))
    return folder


@pytest.fixture
def family(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    images = SyntheticImages(24, seed=24)
    monkeypatch.setattr(running, "validation_images", lambda *_: images)
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.mark.parametrize("name", [".", "settings-2", "settings-3"])
def test_report_and_figure_of_every_run_in_a_folder(name: str, family: Path) -> None:
    folder = family / name
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    (missing,) = check(family).missing
    assert missing == str(folder / "report.html")
    assert Run(folder).report() == folder / "report.html"
    assert (folder / "report.html").read_bytes() == page
    channel = unbraid.Split.load(folder / "split.safetensors").channels[0].channel
    assert Run(folder).figure(channel, "densities").axes
    assert check(folder).whole


def test_report_without_positions_says_what_makes_them(family: Path) -> None:
    page = (family / "report.html").read_bytes()
    shutil.rmtree(family / "positions-val")
    with pytest.raises(RunError, match=r"positions-val is gone.*start the run again"):
        Run(family).report()
    assert (family / "report.html").read_bytes() == page
    assert Run(family / "settings-2").report()  # has its own


def test_report_of_an_unfinished_run_says_so(family: Path) -> None:
    (family / "evaluation.json").unlink()
    with pytest.raises(RunError, match="holds an unfinished run; start it again"):
        Run(family).report()


def test_check_lists_what_a_folder_holds(family: Path) -> None:
    found = len((family / "findings.csv").read_text().splitlines()) - 1
    holds = check(family).holds
    run_lines = [line for line in holds if ": a run " in line]
    assert len(run_lines) == 3
    usual = "tau 0.01, p 0.5, gamma 0.99"
    assert run_lines[0].startswith(f"{family}: a run with {usual}; {found} pairs in ")
    strict = "tau 0.2, p 0.5, gamma 0.99; 2 pairs in 1 channel; "
    assert run_lines[1].startswith(f"{family / 'settings-2'}: a run with {strict}")
    assert f"a run with {usual}, rho 0.5; {found} pairs in " in run_lines[2]
    assert all(line.endswith("; split, evaluation, report.") for line in run_lines)
    assert f"{family / 'scan-train'}: a scan of layer 2, 48 images, finished." in holds
    own = family / "settings-2/positions-val"
    assert any(line.startswith(f"{own}: a scan of layer 2, ") for line in holds)
    assert ", with positions, finished." in " ".join(holds)


def test_check_lists_what_is_not_whole(family: Path) -> None:
    (family / "scan-val/shard-000000.safetensors").unlink()
    (family / "settings-2/settings.json").write_text("{")
    (family / "findings.csv").unlink()
    found = check(family)
    told = " ".join(found.holds)
    assert "24 images, 0 of 1 shard there." in told
    assert f"{family / 'settings-2'}: a run with unknown settings; " in told
    assert "; findings not there; split" in told
    assert (len(found.damaged), len(found.missing)) == (1, 2)
    shutil.rmtree(family / "scan-val")
    again = check(family)
    text = f"the scan in {family / 'scan-val'}"
    assert again.missing.count(text) == 1  # once, though three runs lack it
    assert str(family / "settings-2/settings.json") in again.missing
