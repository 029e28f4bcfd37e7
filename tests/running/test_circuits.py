"""`unbraid circuit`: a run's circuits, through its earlier layer, on its pages, and mistakes."""

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch import nn

import unbraid
from pages import sections
from unbraid.__main__ import main
from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.cli.look import circuit
from unbraid.demo.network import load_images, load_network
from unbraid.running import circuits as module
from unbraid.running.check import check
from unbraid.running.circuits import circuits_of, earlier_runs
from unbraid.running.finished import Run
from unbraid.running.folders import CIRCUITS, Thresholds
from unbraid.running.network import load_again
from unbraid.running.several import run_layers
from unbraid.scanning.scan_options import Loading

LAYERS, WHOLE = ["look.8", "mix"], load_images


def some_images(split):
    """Every tenth of the demo's."""
    images = WHOLE(split)
    images.pictures, images.targets = images.pictures[::10], images.targets[::10]
    return images


@pytest.fixture(autouse=True, scope="module")
def _of_some_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbraid.demo.network.load_images", some_images)
        yield


def make(out, layers=LAYERS, said=None, **options):
    usual = {"thresholds": Thresholds(tau=0.015, gamma=0.85), "loading": Loading()}
    usual |= {"features": False, "source": {"demo": True}, "title": "x"}
    usual["say"] = (said if said is not None else []).append
    images = map(some_images, ("train", "test"))
    return run_layers(load_network(), layers, *images, out, **usual | options)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("several") / "run"
    said = []
    make(out, said=said)
    assert any("circuits of mix through earlier layers" in words for words in said)
    return out


def network():
    return load_again({"demo": True})


def test_a_layer_is_followed_to_the_one_before_and_its_inputs(out):
    run = Run(out / "mix")
    assert [one.folder for one in earlier_runs(run)] == [out / "look.8"]
    assert list(earlier_runs(Run(out / "look.8"))) == []
    channel = run.split.channels[0].channel
    own, through = circuits_of(run, channel, 1, n=3, network=network)
    expected = unbraid.circuit(run.split, run.train_scan, channel, 1, n=3)
    edges = [edge for edge in own.edges if edge.rank <= 3]
    assert [own.nodes[e.source].channel for e in edges] == [s.channel for s in expected.sources]
    before = Run(out / "look.8")
    expected = unbraid.circuit_from(
        before.split,
        run.split,
        run.val_scan,
        load_network(),
        some_images("test"),
        channel,
        1,
        n=3,
        n_images=module.N_IMAGES,
    )
    edges = [edge for edge in through.edges if edge.target == 0 and edge.rank <= 3]
    assert [through.nodes[e.source].name for e in edges] == [s.name for s in expected.sources]
    assert [e.share for e in edges] == [s.share for s in expected.sources]


def test_pages_show_circuits_through_layers_and_say_the_same_when_written_again(out):
    run = Run(out / "mix")
    text = run.page.read_text(encoding="utf-8")
    n_graphs = [len(s.all("figure", "circuit")) for s in sections(text).values()]
    n_followed = min(module.N_CHANNELS, len(n_graphs))
    assert n_graphs == [2] * n_followed + [1] * (len(n_graphs) - n_followed)
    told = (
        f"Circuits through an earlier layer are shown of {n_followed} of {len(n_graphs)} channels"
    )
    assert (told in text) == (n_followed < len(n_graphs))
    assert run.report().read_text(encoding="utf-8") == text
    other = (out / "look.8/report.html").read_text(encoding="utf-8")
    assert {len(s.all("figure", "circuit")) for s in sections(other).values()} == {1}


def test_a_damaged_file_is_left_out_and_set_aside_and_made_again(out, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    (copy / "mix" / CIRCUITS).write_text("{}")
    text = Run(copy / "mix").report().read_text(encoding="utf-8")
    assert {len(s.all("figure", "circuit")) for s in sections(text).values()} == {1}
    assert len(check(copy).damaged) == 1
    make(copy)
    sound = [(place / "mix" / CIRCUITS).read_bytes() for place in (out, copy)]
    assert sound[0] == sound[1]


def test_a_run_that_goes_on_follows_nothing_again(out, tmp_path):
    copy, said = tmp_path / "run", []
    shutil.copytree(out, copy)
    make(copy, said=said)
    assert not any("through earlier layers" in words for words in said)


def test_a_run_with_other_settings_follows_its_own_earlier_layer(out, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    make(copy, thresholds=Thresholds(tau=0.014, gamma=0.85), everything=True)
    for inside in ("", "settings-2"):
        (before,) = earlier_runs(Run(copy / "mix" / inside))
        assert before.folder.resolve() == (copy / "look.8" / inside).resolve()
    shutil.rmtree(copy / "look.8" / "settings-2")
    assert list(earlier_runs(Run(copy / "mix" / "settings-2"))) == []


@pytest.mark.parametrize("gone", [DataError("The images are gone."), RunError("The code is own.")])
def test_without_images_circuits_are_drawn_all_the_same(out, tmp_path, monkeypatch, capsys, gone):
    monkeypatch.setattr(Run, "images", property(Mock(side_effect=gone)))
    run = Run(out / "look.8")
    channel = run.split.channels[0].channel
    circuit(run.folder, channel=channel, out=tmp_path)
    told = capsys.readouterr()
    assert f"{gone} Circuits are drawn without images." in told.err
    assert (tmp_path / f"{channel}.svg").stat().st_size
    assert str(tmp_path / f"{channel}.png") in told.out


def test_what_cannot_be_followed_is_told_and_the_rest_is_there(out):
    def refuse():
        raise UsageError("no network here.")

    said, run = [], Run(out / "mix")
    channel = run.split.channels[0].channel
    (own,) = circuits_of(run, channel, network=refuse, say=said.append)
    assert said == ["The circuit through layer look.8 is left out: no network here."]
    assert len(own.columns()[0]) == len(run.split[channel].concepts)


def test_mistakes_are_told(out, tmp_path):
    run = Run(out / "mix")
    channel = run.split.channels[0].channel
    for arguments, told in (
        ((9999,), "Channel 9999 was not split; those that were are"),
        ((channel, 50), f"Channel {channel} has no concept 50; its concepts are 0 to"),
    ):
        with pytest.raises(UsageError, match=told):
            circuits_of(run, *arguments)
    bare = tmp_path / "bare"
    shutil.copytree(out / "mix", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(RunError, match="holds no split, so there are no circuits"):
        circuits_of(Run(bare), channel)


def test_the_command_prints_a_table_and_writes_pictures_and_figures(
    out, tmp_path, monkeypatch, capsys
):
    run = Run(out / "look.8")
    channel = run.split.channels[0].channel
    words = ["unbraid", "circuit", str(out / "look.8"), "--channel", str(channel)]
    for more, stem in ((["--concept", "0"], f"{channel}.0"), ([], f"{channel}")):
        monkeypatch.setattr(sys, "argv", [*words, *more, "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr().out
        assert not stopped.value.code
        assert f"What feeds channel {channel} of look.8" in said
        for ending in ("json", "png", "svg"):
            file = tmp_path / f"{stem}.{ending}"
            assert file.stat().st_size
            assert str(file) in said
        about = json.loads((tmp_path / f"{stem}.json").read_text())
        assert about["channel"] == channel
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(out / "mix")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "name another folder" in capsys.readouterr().err


def test_circuits_left_out_are_told_with_the_command_that_follows_them(out, tmp_path, monkeypatch):
    copy, said = Path(shutil.copytree(out, tmp_path / "a run")), []
    (copy / "mix" / CIRCUITS).unlink()
    monkeypatch.setattr(module, "N_CHANNELS", 1)
    job = Mock(model=load_network(), loading=Loading(), say=said.append)
    module.follow_layers(job, {"mix": Run(copy / "mix")})
    n_found = len(Run(copy / "mix").found.concepts)
    assert said == [
        f"Following 1 circuit of mix through earlier layers, those of {n_found} with the lowest "
        f"cosines; `unbraid circuit '{copy / 'mix'}' --channel N` follows another."
    ]


def test_a_run_follows_circuits_on_few_images_and_tells_how_far_it_is(monkeypatch):
    way = Mock()
    way.return_value.follow.return_value = []
    monkeypatch.setattr(module, "Through", way)
    monkeypatch.setattr(module, "_further", Mock(return_value={5: []}))
    monkeypatch.setattr(module, "circuit_graphs", Mock(return_value=["drawn"]))
    asked = (Mock(), [Mock()], {5: []}, nn.Module(), some_images("test"), {5: 3})
    assert module.through_earlier(*asked) == {5: "drawn"}
    assert module.N_IMAGES in way.call_args.args
    assert way.return_value.follow.call_args.kwargs == {"progress": True}
