"""All layers in one run: what each finds, which get a report, and an index that a kill spares."""

import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torchvision import models

import unbraid
from tiny_networks import SyntheticImages
from unbraid.base.errors import LayerError, ModelError, OutputChangedError
from unbraid.reporting.layers import read_layers
from unbraid.running import run as running
from unbraid.running import sample, several
from unbraid.running.check import check
from unbraid.running.folders import Thresholds
from unbraid.running.several import run_layers
from unbraid.scanning import every
from unbraid.scanning.scan_options import Loading
from unbraid.visualizing.visualize import visualize

TRAIN, VAL = SyntheticImages(48, seed=48), SyntheticImages(24, seed=24)
LOOSE = Thresholds(0.01, 0.5, 0.99)
NAMES = ["0", "2", "4", "8"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.ReLU()),
        *(nn.Conv2d(10, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    ).double()


def run(out, layers=("all",), said=None, **options):
    usual = {"source": {}, "title": "x", "features": False, "thresholds": LOOSE}
    usual |= {"loading": Loading(batch_size=16), "say": (said if said is not None else []).append}
    return run_layers(network(), layers, TRAIN, VAL, out, **usual | options)


def data(out):
    return [(out / name).read_bytes() for name in ("layers.json", "layers.csv", "index.html")]


@pytest.fixture(autouse=True, scope="module")
def _few_in_full():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(several, "N_FULL", 1)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("all") / "run"
    return out, run(out)


def test_every_layer_is_searched_and_the_first_get_a_report(made):
    out, done = made
    assert [row.layer for row in done.layers.layers] == NAMES
    for row in done.layers.layers:
        train, val = (unbraid.open_scan(out / row.layer / f"scan-{k}") for k in ("train", "val"))
        found = unbraid.find(train, tau=0.01, p=0.5, gamma=0.99)
        counted = (row.n_sure, row.n_sure + row.n_uncertain, row.n_pairs)
        assert counted == (len(found.sure_channels), len(found.concepts), len(found.pairs))
        if found.concepts and not row.page:  # by the records alone
            measured = unbraid.evaluate(unbraid.split(train, found), val)
            mean = measured.summary["least_squares"]
            assert row.coverage == pytest.approx(mean["coverage"])
            assert row.r_precision == pytest.approx(mean["r_precision"])
    assert list(done.runs) == [max(done.layers.layers, key=lambda row: row.n_sure).layer]
    for name, own in done.runs.items():
        (row,) = (row for row in done.layers.layers if row.layer == name)
        mean = own.evaluation.summary["least_squares"]
        assert (out / row.page, row.coverage) == (own.page, pytest.approx(mean["coverage"]))
    assert read_layers(out) == done.layers
    assert check(out).lost == check(out).unreadable == []


def test_the_options_told_make_the_reports_that_are_missing(made, tmp_path):
    out, done = Path(shutil.copytree(made[0], tmp_path / "run")), made[1]
    (note,) = (note for note in done.layers.notes if "no report" in note)
    words = shlex.split(re.search(r"with (--layer .*) in place", note)[1])
    found = [row for row in done.layers.layers if row.n_sure + row.n_uncertain]
    left = [row.layer for row in found if not row.page]
    assert words[1::2] == left != []
    before = {row.layer: row for row in done.layers.layers}
    again = run(out, left)
    for row in again.layers.layers:
        assert (out / row.page).is_file() == (row.layer in [own.layer for own in found])
        if row.layer not in left:
            assert row == before[row.layer]
    assert (again.layers.notes, again.output.max_abs_logit_diff) == ((), 0)


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("n_written", [1, 3, 5])
def test_killed_after_any_layer_it_goes_on_and_finds_the_same(
    n_written, made, tmp_path, monkeypatch
):
    written, searched, write, search = [], [], several.write_index, several._search

    def write_or_die(*args):
        written.append(args)
        if len(written) > n_written:
            raise Killed
        return write(*args)

    def note_search(job, scans, *args):
        searched.append(scans[0].layer.name)
        return search(job, scans, *args)

    with monkeypatch.context() as patch:
        patch.setattr(several, "write_index", write_or_die)
        with pytest.raises(Killed):
            run(tmp_path / "run")
    monkeypatch.setattr(several, "_search", note_search)
    done = run(tmp_path / "run")
    assert searched == NAMES[n_written:]
    assert done.layers == made[1].layers


def test_a_finished_layer_is_not_made_anew(tmp_path, monkeypatch):
    first = run(tmp_path)
    before = data(tmp_path)

    def refuse(*_):
        raise AssertionError("a step was taken again")

    monkeypatch.setattr(running, "_make", refuse)
    monkeypatch.setattr(several, "_search", refuse)
    assert run(tmp_path).layers == first.layers
    assert data(tmp_path) == before
    (tmp_path / next(iter(first.runs)) / "evaluation.json").unlink()
    with pytest.raises(AssertionError, match="taken again"):
        run(tmp_path)


def test_a_finished_layers_page_is_drawn_again_where_bands_differ(tmp_path, monkeypatch):
    drawn = []
    run(tmp_path, ("all",), source={"bands": [0]})
    monkeypatch.setattr(running.Run, "report", lambda self: drawn.append(self.folder) or self.page)
    run(tmp_path, ("all",), source={})
    assert drawn
    drawn.clear()
    run(tmp_path, ("all",), source={})
    assert not drawn


def test_a_layer_whose_visualisation_was_refused_is_finished_all_the_same(tmp_path, monkeypatch):
    refusal = Mock(side_effect=ModelError("It cannot be seen."))
    monkeypatch.setattr(running, "visualize", refusal)
    first = run(tmp_path, features=True)
    (layer,) = first.runs
    assert (tmp_path / layer / "no-features.txt").read_text() == "It cannot be seen.\n"
    before = data(tmp_path)
    assert run(tmp_path, features=True).layers == first.layers
    assert (refusal.call_count, data(tmp_path)) == (1, before)
    # Left out because nobody asked for it is another thing.
    (tmp_path / layer / "no-features.txt").unlink()
    run(tmp_path, features=True)
    assert refusal.call_count == 2
    monkeypatch.undo()
    monkeypatch.setattr(several, "N_FULL", 1)
    monkeypatch.setattr(running, "visualize", partial(visualize, steps=2))
    run(tmp_path, [layer], features=True)
    assert not (tmp_path / layer / "no-features.txt").exists()
    assert (tmp_path / layer / "features").exists()


def test_nothing_found_in_any_layer_says_what_to_look_at(tmp_path):
    done = run(tmp_path, thresholds=Thresholds(0.9, 1.0, -1.0))
    assert done.runs == {}
    assert done.layers.notes[-1].startswith("Nothing was found in any layer; a run with --layer")
    assert "Nothing was found in any layer" in (tmp_path / "index.html").read_text()


def test_damaged_data_of_layers_are_set_aside_and_made_anew(made, tmp_path):
    out = Path(shutil.copytree(made[0], tmp_path / "run"))
    (out / "layers.json").write_text("{")
    assert "layers.json" in str(check(out).damaged)
    assert run(out).layers == made[1].layers


def test_other_settings_have_an_index_of_their_own(tmp_path):
    run(tmp_path)
    before = data(tmp_path)
    other = run(tmp_path, thresholds=Thresholds(0.2, 0.5, 0.99))
    assert other.index == tmp_path / "settings-2/index.html"
    assert data(tmp_path) == before
    assert all((other.index.parent / row.page).is_file() for row in other.layers.layers if row.page)


def test_time_bounds_measures_and_reports_and_the_next_start_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(several, "MEASURED_SECONDS", -1.0)
    monkeypatch.setattr(several, "FULL_SECONDS", -1.0)
    hurried = run(tmp_path)
    assert hurried.runs == {}
    assert [row.n_measured for row in hurried.layers.layers] == [0] * 4
    assert sum(row.n_sure for row in hurried.layers.layers) > 0
    assert "not measured within" in hurried.index.read_text()
    monkeypatch.undo()
    again = run(tmp_path)
    assert "not measured within" not in again.index.read_text()
    rows = again.layers.layers
    assert all(bool(row.n_measured) == bool(row.n_sure + row.n_uncertain) for row in rows)


def test_layers_that_the_disk_does_not_hold_are_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(every, "DISK", 1_100_000)
    done = run(tmp_path, said=said)
    assert 0 < len(done.layers.layers) < len(NAMES)
    assert done.layers.n_layers == len(NAMES)
    (told,) = (text for text in said if "left out" in text)
    assert told in done.layers.notes
    assert told in done.index.read_text()


def test_a_layer_that_cannot_be_scanned_or_split_after_all_is_told(tmp_path, monkeypatch):
    said, scan, split = [], several.try_scan, several.try_layer

    def refusing(function, *odd):
        def refuse(job, names, **options):
            if set(odd) & set(names):
                raise LayerError(f"{names[0]} is odd.")
            return function(job, names, **options)

        return refuse

    monkeypatch.setattr(several, "try_scan", refusing(scan, "2"))
    monkeypatch.setattr(several, "try_layer", refusing(split, *NAMES))
    done = run(tmp_path / "a", said=said)
    assert [row.layer for row in done.layers.layers] == ["0", "4", "8"]
    assert "Layer 2 is left out: 2 is odd." in said
    (told,) = (text for text in said if "has no report" in text)
    assert told in done.layers.notes
    assert done.runs == {}
    monkeypatch.setattr(several, "try_scan", refusing(scan, *NAMES))
    with pytest.raises(LayerError, match="0 is odd"):
        run(tmp_path / "b")


@pytest.mark.parametrize("fault", [LayerError, ModelError, OutputChangedError])
def test_a_fault_of_one_layer_leaves_the_others_their_reports(fault, tmp_path, monkeypatch):
    said, tried, run_layer = [], [], several.run_layer

    def refusing_the_first(job, out, *rest):
        tried.append(out.name)
        if len(tried) == 1:
            raise fault("it is odd.")
        return run_layer(job, out, *rest)

    monkeypatch.setattr(several, "N_FULL", 2)
    monkeypatch.setattr(several, "run_layer", refusing_the_first)
    done = run(tmp_path, said=said)
    assert len(tried) == 2
    assert list(done.runs) == tried[1:]
    told = f"Layer {tried[0]} has no report: it is odd."
    assert told in said
    assert told in done.layers.notes
    assert told in done.index.read_text()


def test_layers_named_are_beside_each_other_too(tmp_path):
    done = run(tmp_path, ["2", "0"])
    assert [row.layer for row in done.layers.layers] == ["0", "2"]
    assert [row.depth for row in done.layers.layers] == [1, 2]
    assert "2 of 4 layers that can be split were not searched" in done.layers.notes[0]
    assert run(tmp_path / "one", ["2"]).layers is None


def test_resnet50_is_searched_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(several, "N_FULL", 0)
    torch.manual_seed(0)
    model = models.resnet50(num_classes=4)
    data = [SyntheticImages(n, size=(3, 32, 32), dtype=torch.float32) for n in (16, 8)]
    options = {"source": {}, "title": "x", "features": False, "say": lambda _: None}
    options |= {"thresholds": Thresholds(0.03), "loading": Loading()}
    done = run_layers(model, ["all"], *data, tmp_path, **options)
    assert [row.depth for row in done.layers.layers] == list(range(1, 55))
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [row.layer for row in done.layers.layers] == names
    assert (done.runs, done.output) == ({}, None)


def test_of_many_channels_of_a_layer_only_those_with_the_lowest_cosines_are_measured(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(several, "N_MEASURED", 1)
    monkeypatch.setattr(several, "N_FULL", 0)
    rows = run(tmp_path).layers.layers
    assert max(row.n_sure + row.n_uncertain for row in rows) > 1
    assert {row.n_measured for row in rows if row.n_sure + row.n_uncertain} == {1}


def test_all_layers_split_are_compared_on_a_sample_but_as_accurate_as_on_all_images(
    tmp_path, monkeypatch
):
    for name, n in (("LEAST", 5), ("MOST", 5)):
        monkeypatch.setattr(sample, name, n)
    formats, said, formatted_as = [], [], several.formatted_as
    monkeypatch.setattr(
        several, "formatted_as", lambda *own: formats.append(own[0]) or formatted_as(*own)
    )
    done = run(tmp_path, ["2", "0"], said=said)
    assert done.output.n_images == 5
    assert any("on a sample of 5 of 24 validation images; --all takes all" in s for s in said)
    for own in done.runs.values():
        assert own.evaluation.output.top1_before == done.output.top1_before
    assert formats == [done.runs["2"].val_scan]
    everything = run(tmp_path, ["2", "0"], everything=True).output
    assert (everything.n_images, everything.top1_after) == (24, done.output.top1_after)


def test_layers_with_names_of_our_own_folders_have_others(tmp_path):
    names = ["quick", "scan-train", "settings-2", "head"]
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, (n_in, n_out) in zip(names, [(3, 8), (8, 10), (10, 6)], strict=False):
        model.add_module(name, nn.Conv2d(n_in, n_out, 1))
        model.add_module(f"{name}_", nn.ReLU())
    for name, module in (
        *(("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten())),
        ("head", nn.Linear(6, 4)),
    ):
        model.add_module(name, module)
    options = {"source": {}, "title": "x", "features": False, "thresholds": LOOSE}
    options |= {"loading": Loading(batch_size=16), "say": lambda _: None}
    done = run_layers(model.double(), ["all"], TRAIN, VAL, tmp_path, **options)
    assert [row.layer for row in done.layers.layers] == names
    assert not any((tmp_path / name).exists() for name in names[:3])
    assert check(tmp_path).whole
    made = {own.page for own in done.runs.values()}
    # Another start knows that the folder is of several layers, and where each lies.
    again = run_layers(model.double(), ["settings-2"], TRAIN, VAL, tmp_path, **options)
    assert again.runs["settings-2"].folder == tmp_path / "%73ettings-2"
    assert again.runs["settings-2"].page.parent.parent == tmp_path
    assert all(page.exists() for page in made)
