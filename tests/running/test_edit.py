"""`unbraid edit`: files that compute what gates do, a page that shows it, and every mistake."""

import io
import json
import shutil

import pytest
import safetensors.torch
import torch

import unbraid
from pages import assert_harmless
from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.images.which import Around
from unbraid.running import edit as editing
from unbraid.running import run as running
from unbraid.running.edit import edit_run
from unbraid.running.finished import Run
from unbraid.running.folders import Thresholds
from unbraid.scanning.scan_options import Loading

SCALES = {"0.0": 0.0, "4.1": 2.0, "1.rest": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A demo run on some of its images."""
    images = load_images("train"), load_images("test")
    for one in images:
        one.pictures, one.targets = one.pictures[::5], one.targets[::5]
    options = {"thresholds": Thresholds(tau=0.03), "loading": Loading(), "features": False}
    options |= {"source": {"demo": True}, "say": lambda _: None, "title": "x"}
    out = tmp_path_factory.mktemp("run") / "run"
    made = running.run(load_network(), LAYER, *images, out, **options)
    assert {0, 1, 4} <= {part.channel for part in made.split.channels}
    return made


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    said = []
    out = tmp_path_factory.mktemp("edited")
    found = edit_run(run, SCALES, out, loading=Loading(), say=said.append)
    assert said == []
    return found


def gated(run):
    model2 = unbraid.apply(load_network(), run.split)
    for name, scale in SCALES.items():
        channel, concept = name.split(".")
        model2.gate(LAYER, int(channel), concept if concept == "rest" else int(concept), scale)
    return model2


def test_every_file_computes_what_gates_do_for_any_number_of_images(run, made):
    images = torch.stack([run.images[index][0] for index in range(5)])
    with torch.no_grad():
        expected = gated(run)(images)
        before = load_network()(images)
    assert (expected - before).abs().max() > 0.05 * expected.abs().max()
    files = {path.name: path for path in made.files}
    assert set(files) == {editing.STATE, editing.PROGRAM, editing.ONNX}
    network = load_network()
    network.load_state_dict(safetensors.torch.load_file(files[editing.STATE]))
    program = torch.export.load(io.BytesIO(files[editing.PROGRAM].read_bytes())).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(files[editing.ONNX].read_bytes())
    with torch.no_grad():
        outputs = [network(images), program(images)]
    outputs.append(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))
    for found in outputs:
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_page_and_figures_say_the_same(run, made):
    text = made.page.read_text(encoding="utf-8")
    assert_harmless(text, ["style"])
    about = json.loads((made.page.parent / editing.FIGURES).read_text())
    assert about["scales"] == SCALES
    assert about["right_after"] == made.changes.right_after
    assert len(about["flips"]) == len(made.changes.flips) > 0
    assert f"{len(made.changes.flips)} of 500 validation images are taken" in text
    for words in ("times 2", "off", "what no concept names", editing.ONNX):
        assert words in text
    assert text.count("<figure>") == min(48, len(made.changes.flips))


def test_what_cannot_be_exported_is_told_and_the_rest_is_written(run, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise RuntimeError("no such thing")

    said = []
    monkeypatch.setattr(torch.export, "export", refuse)
    (tmp_path / editing.ONNX).write_bytes(b"of an earlier edit")
    found = edit_run(run, SCALES, tmp_path, loading=Loading(), say=said.append)
    assert [path.name for path in found.files] == [editing.STATE]
    assert not (tmp_path / editing.ONNX).exists()
    assert len(said) == 1
    assert "torch.export fails" in said[0]


def test_an_onnx_file_that_computes_something_else_is_left_out(run, tmp_path, monkeypatch):
    said, real = [], editing._as_onnx
    original, _ = editing._export(load_network(), torch.zeros(2, 1, 28, 28))
    monkeypatch.setattr(editing, "_as_onnx", lambda _: real(original))
    found = edit_run(run, SCALES, tmp_path, loading=Loading(), say=said.append)
    assert editing.ONNX not in {path.name for path in found.files}
    assert "its logits differ by" in said[0]


def test_a_program_that_computes_something_else_is_left_out(run, tmp_path, monkeypatch):
    said, real = [], editing._export
    monkeypatch.setattr(editing, "_export", lambda _, example: real(load_network(), example))
    found = edit_run(run, SCALES, tmp_path, loading=Loading(), say=said.append)
    assert [path.name for path in found.files] == [editing.STATE]
    assert "its logits differ by" in said[0]


def test_a_few_images_are_compared_where_there_are_many(run, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(editing, "MOST_IMAGES", 100)
    found = edit_run(run, SCALES, tmp_path, loading=Loading(), say=said.append)
    assert found.changes.n_images == 100
    assert "Comparing on 100 validation images of 500" in said[0]
    assert "--all" in said[0]
    said.clear()
    every = edit_run(run, SCALES, tmp_path, loading=Loading(), everything=True, say=said.append)
    assert every.changes.n_images == 500
    assert "Comparing" not in " ".join(said)


class Torn(Around):
    """The same images, of which two cannot be read any more."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        if index in (3, 499):
            raise OSError("it is torn")
        return self.dataset[index]


def test_images_that_broke_since_are_told_or_left_out(run, made, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "images", Torn(run.images))
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"Image 3 .*torn.*skip_broken=True"):
        edit_run(run, SCALES, out, loading=Loading())
    assert not out.exists()
    found = edit_run(run, SCALES, out, loading=Loading(skip_broken=True))
    assert (found.changes.n_images, made.changes.n_images) == (498, 500)
    assert {path.name for path in found.files} == {path.name for path in made.files}
    whole = {flip.index: flip for flip in made.changes.flips}
    assert {flip.index for flip in found.changes.flips} == whole.keys() - {3, 499}


def test_mistakes_are_told_and_nothing_is_written(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"no concept channel '0\.9'"):
        edit_run(run, {"0.9": 0.0}, out, loading=Loading())
    with pytest.raises(UsageError, match="holds a run or scan"):
        edit_run(run, SCALES, run.folder, loading=Loading())
    bare = shutil.copytree(run.folder, tmp_path / "bare")
    (bare / "split.safetensors").unlink()
    with pytest.raises(RunError, match="holds no split"):
        edit_run(Run(bare), SCALES, out, loading=Loading())
    settings = json.loads((run.folder / "settings.json").read_text())
    unknown = shutil.copytree(run.folder, tmp_path / "unknown")
    (unknown / "settings.json").write_text(json.dumps({**settings, "source": {}}))
    with pytest.raises(UsageError, match="does not say which network"):
        edit_run(Run(unknown), SCALES, out, loading=Loading())
    assert not out.exists()
