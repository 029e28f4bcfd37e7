"""A run makes each result once; a second one destroys nothing of the first, however it ends."""

import itertools
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unbraid
from tiny_networks import SyntheticImages
from unbraid.base import files, progress
from unbraid.base.errors import ModelError, RunError, UsageError
from unbraid.running import finished, measures
from unbraid.running import run as running
from unbraid.running.check import check
from unbraid.running.finished import Run
from unbraid.running.folders import Thresholds, is_numbered, read_settings
from unbraid.running.several import run_layers
from unbraid.scanning.scan_options import Loading
from unbraid.visualizing import visualize as making
from unbraid.visualizing.features import Feature, Features

LOOSE = Thresholds(0.01, 0.5, 0.99)
STRICT = Thresholds(0.2, 0.5, 0.99)  # leaves one class out
NOTHING = Thresholds(0.9, 1.0, -1.0)
WITH_RHO = replace(LOOSE, rho=0.5)
USUAL = {"source": {}, "title": "x", "features": False, "say": lambda _: None}
USUAL |= {"thresholds": LOOSE, "loading": Loading(batch_size=16)}
TRAIN, VAL = SyntheticImages(48, seed=48), SyntheticImages(24, seed=24)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)),
    ).double()


def run(out, thresholds=LOOSE, seed=0, **options):
    options = {**USUAL, "thresholds": thresholds, **options}
    return running.run(network(seed), "2", TRAIN, VAL, out, **options)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_kept(out, before):
    after = content(out)
    assert [name for name in before if after.get(name) != before[name]] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run; one in it with positions of its own, one that shares the first run's."""
    folder = tmp_path_factory.mktemp("first") / "run"
    n_found = [len(run(folder, thresholds).found) for thresholds in (LOOSE, STRICT, WITH_RHO)]
    assert n_found[0] == n_found[2] > n_found[1] > 0
    return folder


@pytest.fixture
def family(made, tmp_path, monkeypatch):
    monkeypatch.setattr(finished, "validation_images", lambda *_: VAL)
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def out(made, tmp_path):
    """The first run alone."""
    ignored = shutil.ignore_patterns("settings-*")
    return Path(shutil.copytree(made, tmp_path / "run", ignore=ignored))


OTHERS = {
    "tau that fits": (replace(LOOSE, tau="auto"), {}),
    "clusters": (replace(LOOSE, concepts="clusters"), {}),
    "whole": (replace(LOOSE, concepts="whole"), {}),
    "nothing found": (NOTHING, {}),
    "encoder": (LOOSE, {"encoder": "timm:any"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_run_with_other_settings_gets_a_folder_of_its_own(name, out, monkeypatch):
    monkeypatch.setattr(running, "load_encoder", lambda *_, **__: lambda x: x.flatten(1))
    before, said = content(out), []
    thresholds, options = OTHERS[name]
    done = run(out, thresholds, say=said.append, **options)
    assert done.page == out / "settings-2/report.html"
    assert any(f"{out} holds a run with tau 0.01, p 0.5, gamma 0.99; this" in text for text in said)
    assert_kept(out, before)
    own = {path.name for path in (out / "settings-2").glob("positions-*")}
    shares = done.found.classes in ((), (0, 1, 2, 3))  # of which the first run has positions
    assert own == (set() if shares else {"positions-train", "positions-val"})
    after = content(out)
    assert run(out, thresholds, **options).page == done.page  # again: it goes on there
    assert content(out) == after
    assert check(out).whole


def test_run_into_a_folder_of_other_settings_by_name(family):
    inside = family / "settings-2"
    assert run(inside, STRICT).folder == inside
    assert run(inside, NOTHING).folder == family / "settings-4"
    free = run(family / "settings-7", Thresholds(0.02, 0.5, 0.99))
    assert free.folder == family / "settings-7"
    assert run(family / "settings-9").folder == family  # where these settings are
    assert sorted(p.name for p in family.glob("**/scan-*")) == ["scan-train", "scan-val"]


def test_run_with_other_settings_scans_only_what_is_not_there(family, monkeypatch):
    begun, scan_into = [], running.scan_into

    def spy(model, folders, *args, **kwargs):
        there = (path for path in folders.values() if not (path / "manifest.json").exists())
        begun.extend(str(path.relative_to(family)) for path in there)
        return scan_into(model, folders, *args, **kwargs)

    monkeypatch.setattr(running, "scan_into", spy)
    assert len(list(family.glob("settings-*/positions-*"))) == 2
    run(family, replace(STRICT, rho=0.5))
    assert begun == []
    shutil.rmtree(family / "settings-2/positions-val")  # may be deleted to save room
    run(family, replace(STRICT, rho=0.5))
    assert begun == ["settings-4/positions-val"]


def test_run_layers_leaves_what_a_run_of_each_does(out):
    both = out.with_name("both")
    done = run_layers(network(), ["0", "2"], TRAIN, VAL, both, **USUAL)
    assert done.output.max_abs_logit_diff == 0
    alone = content(out)
    for name, now in content(both / "2").items():
        # Circuits lead from layer to layer.
        of_its_own = not name.startswith(("settings", "report", "circuits"))
        if of_its_own and not name.endswith("manifest.json"):
            assert now == alone[name], name
    assert [read_settings(both / layer).title for layer in "02"] == ["x · 0", "x · 2"]
    assert check(both).whole


def test_run_layers_tells_classes_without_validation_images_first(made, tmp_path):
    said = []
    fewer = SyntheticImages(24, seed=24)
    keep = [n for n, label in enumerate(fewer.targets) if label != 0]
    fewer.targets, fewer.images = [fewer.targets[n] for n in keep], fewer.images[keep]
    options = {**USUAL, "say": said.append}
    done = run_layers(network(), ["2"], TRAIN, fewer, tmp_path / "run", **options).runs["2"]
    assert "have none of 1 class (class 0); channels that one of them uses" in said[0]
    assert 0 < len(done.found.concepts) < len(Run(made).found.concepts)
    for told in (done.found.note, done.page.read_text()):
        assert "left out, as the validation images have none" in told


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def die_until_done(start, check_between, holder, name):
    """Start again and again, each start killed one call of a function later than the one before."""
    function = getattr(holder, name)
    for n_kills in range(100):
        calls = itertools.count(1)

        def call_or_die(*args, calls=calls, last=n_kills + 1):
            if next(calls) == last:
                raise Killed
            return function(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(holder, name, call_or_die)
            try:
                return start(), n_kills
            except Killed:
                check_between()


@pytest.mark.parametrize("thresholds", [STRICT, NOTHING])
def test_run_killed_before_any_file_loses_nothing_of_the_first(thresholds, out, made):
    before = content(out)
    done, n_kills = die_until_done(
        lambda: run(out, thresholds), lambda: assert_kept(out, before), files, "_write"
    )
    assert n_kills >= 3  # findings, sensitivity, report
    assert_kept(out, before)
    assert done.folder == out / "settings-2"
    whole = content(run(out.with_name("undisturbed"), thresholds).folder)
    own = {k: v for k, v in content(done.folder).items() if k != "settings.json"}
    assert own == {k: v for k, v in whole.items() if k in own}
    assert [p.name for p in out.iterdir() if is_numbered(p)] == ["settings-2"]


def test_run_killed_while_replacing_is_finished_by_the_next(out, made):
    positions = {k: v for k, v in content(out).items() if k.startswith(("scan", "positions"))}
    replacing = partial(run, out, STRICT, overwrite=True)
    _, n_kills = die_until_done(replacing, lambda: assert_kept(out, positions), Path, "rename")
    assert n_kills >= 4
    assert_kept(out, positions)
    assert [p.name for p in out.iterdir() if is_numbered(p)] == []
    for name in ("findings.csv", "split.safetensors", "evaluation.json", "report.html"):
        assert (out / name).read_bytes() == (made / "settings-2" / name).read_bytes()
    assert check(out).whole


def test_run_killed_before_its_settings_leaves_the_folder_free(tmp_path):
    class Fails(SyntheticImages):
        def __getitem__(self, index):
            if (tmp_path / "scan-val/manifest.json").exists():
                raise Killed
            return super().__getitem__(index)

    with pytest.raises(Killed):
        running.run(network(), "2", TRAIN, Fails(24, seed=24), tmp_path, **USUAL)
    assert run(tmp_path, STRICT).page == tmp_path / "report.html"


def test_run_that_fails_leaves_what_is_there(out, monkeypatch):
    before = content(out)
    monkeypatch.setattr(measures, "pass_once", Mock(side_effect=RunError("The network has gone.")))
    for overwrite in (True, False):
        with pytest.raises(RunError, match="has gone"):
            run(out, STRICT, overwrite=overwrite)
    with pytest.raises(UsageError):
        run(out, Thresholds(tau=3.0), overwrite=True)
    with pytest.raises(RunError, match="weights"):
        run(out, STRICT, seed=1, overwrite=True)
    assert_kept(out, before)


def test_run_on_results_of_another_network_or_without_settings_keeps_them(out):
    (out / "settings.json").rename(out / "settings.json.damaged")
    before = content(out)
    assert run(out, STRICT).folder == out / "settings-2"
    assert_kept(out, before)
    assert run(out).folder == out  # the same: it only lacked its settings
    for kind in ("train", "val"):
        shutil.rmtree(out / f"scan-{kind}")
    before = content(out)
    assert run(out, seed=1).page == out / "settings-3/report.html"
    assert_kept(out, before)


def test_run_tells_what_cannot_be_used_before_anything_is_scanned(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "load_encoder", lambda *_, **__: lambda x: x @ x)
    with pytest.raises(ModelError, match="cannot run on images"):
        run(tmp_path, encoder="timm:any")
    (tmp_path / "settings-2").mkdir()
    (tmp_path / "settings-2/settings.json").write_text("{}")
    with pytest.raises(RunError, match="not that of a run"):
        run(tmp_path)
    assert sorted(content(tmp_path)) == ["settings-2/settings.json"]


@pytest.mark.parametrize("name", [".", "settings-2"])
def test_report_and_figure_of_every_run_in_a_folder(name, family):
    page = family / name / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert check(family).missing == [str(page)]
    assert Run(family / name).report() == page
    assert page.read_bytes() == before
    channel = Run(family / name).split.channels[0].channel
    assert Run(family / name).figure(channel, "densities").axes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measures_are_taken_in_the_memory_format_of_the_scans(dtype, tmp_path, monkeypatch):
    seen, real = [], running.measure

    def note(nets, *more):
        for net in (nets.model, nets.model2):
            seen.append(net[0].weight.is_contiguous(memory_format=torch.channels_last))
        return real(nets, *more)

    monkeypatch.setattr(running, "measure", note)
    model = network().to(dtype)
    images = [SyntheticImages(n, seed=n, dtype=dtype) for n in (48, 24)]
    made = running.run(model, "2", *images, tmp_path, **USUAL)
    assert seen == [made.val_scan.manifest.channels_last] * 2 == [dtype == torch.float32] * 2
    assert model[0].weight.is_contiguous()
    assert made.evaluation.output.max_abs_logit_diff == 0


def test_a_run_whose_scan_was_replaced_is_told(family):
    other = {"scan-train": VAL, "scan-val": TRAIN}
    for name, images in other.items():
        folder = family / name
        shutil.rmtree(folder)
        unbraid.scan(network(), "2", images, folder, batch_size=16)
        with pytest.raises(RunError, match="is another scan than the one that the run in"):
            _ = Run(family).train_scan, Run(family).val_scan
        shutil.rmtree(folder)
        unbraid.scan(network(), "2", TRAIN if images is VAL else VAL, folder, batch_size=16)
        assert Run(family).train_scan.path == family / "scan-train"


def test_report_of_a_run_that_lacks_something_says_what_makes_it(family):
    shutil.rmtree(family / "positions-val")
    with pytest.raises(RunError, match=r"positions-val is gone.*start the run again"):
        Run(family).report()
    assert Run(family / "settings-2").report()  # has its own
    (family / "evaluation.json").unlink()
    with pytest.raises(RunError, match="holds an unfinished run; start it again"):
        Run(family).report()


def test_check_lists_what_a_folder_holds_and_what_is_not_whole(family):
    found = len((family / "findings.csv").read_text().splitlines()) - 1
    told = " ".join(check(family).holds)
    assert f"a run with tau 0.01, p 0.5, gamma 0.99, rho 0.5; {found} pairs in " in told
    assert f"{family / 'scan-train'}: a scan of layer 2, 48 images, finished." in told
    (family / "settings-2/settings.json").write_text("{")
    (family / "findings.csv").unlink()
    shutil.rmtree(family / "scan-val")
    less = check(family)
    for told in ("a run with unknown settings; ", "; findings not there; split"):
        assert told in " ".join(less.holds)
    assert str(family / "findings.csv") in less.missing
    n_told = less.missing.count(f"the scan in {family / 'scan-val'}")
    assert (n_told, len(less.damaged)) == (1, 1)  # though three runs lack it


def visualized(folder):
    """A run with visualisations, and what it told of them."""
    said = []
    run(folder, features=True, say=said.append)
    return Run(folder).features, [text for text in said if "isuali" in text]


def test_run_makes_visualisations_once_and_anew_where_they_are_damaged(out, monkeypatch):
    monkeypatch.setattr(running, "visualize", partial(running.visualize, steps=2))
    picture = Image.fromarray(np.zeros((7, 6, 4), dtype=np.uint8))
    Features("2", "abc", (Feature(12, 1, 0, picture, (2.0,)),)).save(out / "features")
    made, said = visualized(out)
    assert made.channels == Run(out).found.channels
    assert len(said) == 1
    assert not (out / "features" / "12.1.png").exists()  # of another split
    before = content(out / "features")
    assert visualized(out)[1] == []
    assert content(out / "features") == before
    (out / "features" / f"{made.channels[0]}.0.png").unlink()
    assert len(visualized(out)[1]) == 1
    assert_kept(out / "features", before)


def test_run_tells_visualisations_left_out(out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(running, "visualize", Mock(side_effect=ModelError("It cannot be seen.")))
        made, said = visualized(out)
    assert made is None
    assert said[-1] == "Feature visualisations are left out: It cannot be seen."
    monkeypatch.setattr(running, "SECONDS", 0.0)
    monkeypatch.setattr(making, "_PIXELS", 3 * 42)  # a channel at once
    made, said = visualized(out)
    assert (len(made.channels), made.left_out) == (1, len(Run(out).found.channels) - 1)
    assert said[-1].startswith("Visualised only the 1 channel with the lowest cosines, for lack of")
    assert "unbraid.visualize in Python makes the others" in said[-1]


def test_every_step_of_a_run_that_can_take_long_tells_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(running, "visualize", partial(making.visualize, steps=1))
    run(tmp_path, features=True)
    told = capsys.readouterr().err
    for title in (
        "Scanning 2: 48 of 48",
        "Scanning 2: 24 of 24",
        "Reading the scan: 48 of 48",
        "Judging chance: ",
        "Looking for what else excites channels: 48 of 48",
        "Choosing the penalty: ",
        "Choosing silence: ",
        "Splitting: ",
        "How usual responses are: ",
        "Choosing rho: ",
        "Comparing outputs, switching channels off: 24 of 24",
        "Reading responses: 24 of 24",
        "Measuring: ",
        "Visualising: ",
    ):
        assert title in told
