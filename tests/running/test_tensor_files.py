"""Folders of tensors on the command line: signals, volumes and bands, from run to page."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensor_folders import CODE, SHAPES, save, write

from unbraid.__main__ import main
from unbraid.base import files
from unbraid.exploring.explorer import open_explorer
from unbraid.exploring.opened import open_run
from unbraid.networks.models import load_model
from unbraid.running.finished import Run
from unbraid.running.network import changes_tensors, open_pictures

LOOSE = ("--tau", "0.01", "--p", "0.1", "--gamma", "0.9999", "--no-features")
HAS_TIFF = importlib.util.find_spec("tifffile") is not None
TIF = pytest.param("tif", marks=pytest.mark.skipif(not HAS_TIFF, reason="needs .[tiff]"))
KINDS = ["npy", "pt", "safetensors", TIF]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Run the command line where the folders are: exit code, and all that it said."""

    def run(*words):
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["unbraid", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensors")
    (folder / "net.py").write_text(CODE)
    for kind in SHAPES:
        if kind == "tif" and not HAS_TIFF:
            continue
        write(folder / kind / "train", kind, 10)
        write(folder / kind / "val", kind, 4)
    return folder


@pytest.fixture
def made(request, place, call):
    """A kind of file, and the folder of a run over such files, which is made once."""
    kind, out = request.param, place / f"run-{request.param}"
    if not (out / "report.html").exists():
        more = ("--bands", "4,2,0") if len(SHAPES[kind]) == 3 else ()
        named = ("--model", f"net.py:{kind}", "--data", kind, "--layer", "2", "--out", out)
        code, _, err = call("run", *named, *LOOSE, *more)
        assert code == 0, err
        assert ("each goes into the network as it is" in err) == (kind != "tif")
        assert "ImageNet" not in err
    return kind, out


@pytest.mark.parametrize("made", KINDS, indirect=True)
def test_every_command_takes_folders_of_tensors(made, place, call):
    kind, out = made
    model, page = f"net.py:{kind}", (out / "report.html").read_text()
    n_pictures = page.count("data:image")
    assert n_pictures > 6
    is_map = len(SHAPES[kind]) == 3
    assert ("Pictures show bands 4, 2, 0 of 6" in page) == is_map
    assert ("where it answers" in page) == is_map
    assert call("report", out)[0] == 0
    assert (out / "report.html").read_text().count("data:image") == n_pictures
    channel = Run(out).split.channels[0].channel
    calls = [
        ("figure", out, "--channel", channel, "--out", f"{kind}.svg"),
        ("explain", out, f"{kind}/val/ant/0.{kind}", f"{kind}/val/bee/1.{kind}", "--model", model),
        ("suggest", out),
        ("share", out, "--out", f"shared-{kind}", "--pictures"),
        ("check", out),
    ]
    if kind in ("npy", "tif"):
        calls += [
            ("circuit", out, "--channel", channel, "--model", model),
            ("edit", out, "--off", f"{channel}.0", "--model", model, "--out", f"edited-{kind}"),
        ]
    for words in calls:
        code, _, err = call(*words)
        assert code == 0, (words, err)
    assert len(list((out / "explained").glob("*.png"))) == 2
    explorer = open_explorer(open_run(out, str(place / f"net.py:{kind}")), None)
    shown = explorer.explain("run", "val/3", channel)
    assert shown["logits"]["classes"]


@pytest.mark.parametrize("made", [TIF], indirect=True)
def test_a_tensor_is_explained_as_it_was_scanned(made, place, monkeypatch):
    kind, out = made
    monkeypatch.chdir(place)
    opened = open_run(out, f"net.py:{kind}")
    assert changes_tensors(opened.run, opened.network)
    assert not changes_tensors(opened.run, None)
    image, raw = opened.val_images[3][0], opened.run.images[3][0]
    assert torch.allclose(image, raw / 1000 - 8)
    explorer = open_explorer(opened, None)
    seen = explorer.seen("val/3").dataset[0][0]
    assert torch.equal(seen, image)


@pytest.mark.parametrize("made", ["npy"], indirect=True)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(made, place, call):
    kind, out = made
    again = place / "stopped"
    named = ("--model", f"net.py:{kind}", "--data", kind, "--layer", "2", "--out", again, *LOOSE)
    written, real = [], files._write

    def write_or_stop(path, *how):
        if len(written) in (3, 6, 11):
            written.append("")
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, *how)

    codes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_write", write_or_stop)
        while not codes or codes[-1]:
            codes.append(call("run", *named)[0])
    assert codes == [130, 130, 130, 0]
    for name in ("split.safetensors", "findings.csv", "evaluation.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    for path in (again / "scan-val").glob("shard*"):
        assert path.read_bytes() == (out / "scan-val" / path.name).read_bytes()


def test_two_processes_make_the_same_scan_as_one(place, call):
    named = ("--model", "net.py:npy", "--data", "npy/train", "--layer", "2", "--out")
    assert call("scan", *named, "alone")[0] == 0
    many = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*many, "-m", "unbraid", "scan", *named, "together"],
        **{"cwd": place, "env": os.environ, "capture_output": True, "text": True, "timeout": 300},
    )
    assert done.returncode == 0, done.stderr
    alone, together = (
        {path.name: path.read_bytes() for path in (place / name).glob("shard*")}
        for name in ("alone", "together")
    )
    assert alone == together != {}
    assert (place / "together/images.safetensors").exists()


def test_folders_without_classes_and_folders_that_are_not_divided(place, call):
    scan = ("scan", "--model", "net.py:pt", "--layer", "2", "--data")
    code, out, err = call(*scan, "pt/val/ant", "--out", "flat")
    assert (code, "without class folders; the network's predictions" in err) == (0, True)
    code, out, err = call(*scan, "pt/train/val", "--out", "fifth")
    assert (code, "hash of their ids" in err, "Scanned " in out) == (0, True, True)


BROKEN = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read (it has"),
    "objects": (
        lambda path: np.save(path, np.array([{}]), allow_pickle=True),
        "holds Python objects, which are never loaded",
    ),
    "NaN": (lambda path: np.save(path, np.full((2, 64), np.nan)), "NaN or infinite"),
    "three bands": (lambda path: np.save(path, np.zeros((3, 64))), "is of shape (3, 64), and"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_tensor_is_named_or_left_out(kind, tmp_path, place, call):
    folder = write(tmp_path / "broken", "npy", 3)
    damage, words = BROKEN[kind]
    damage(folder / "bee/1.npy")
    scan = ("scan", "--model", "net.py:npy", "--layer", "2", "--data", folder, "--out")
    code, _, err = call(*scan, tmp_path / "out")
    (said,) = [line for line in err.splitlines() if line.startswith("unbraid: ")]
    assert code == 1
    assert "bee/1.npy" in said
    assert words in said
    code, out, err = call(*scan, tmp_path / "out", "--skip-broken")
    assert (code, "Scanned 8 images" in out) == (0, True)
    assert "Left out 1 image" in err


def test_what_does_not_fit_is_told_in_a_sentence(tmp_path, place, call):
    write(tmp_path / "mixed", "npy", 1)
    mixed = tmp_path / "mixed/list.csv"
    mixed.write_text("path,label\nant/0.npy,0\na.png,0\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed/a.png")
    pictures = tmp_path / "pictures/ant"
    pictures.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    for model, data, words, more in (
        ("npy", mixed, "holds both tensors", ()),
        ("npy", place / "pt/val", "cannot run on an image of shape (1, 6, 8, 7)", ()),
        ("npy", place / "npy", "leave them out", ("--bands", "1")),
        ("safetensors", place / "safetensors", "numbers from 0 to 5", ("--bands", "6")),
        ("tif", pictures.parent, "has no attribute 'dtype'", ()),
    ):
        out = tmp_path / "out"
        command = "run" if more else "scan"
        code, _, err = call(
            *(command, "--model", f"net.py:{model}", "--layer", "2", "--data", data),
            *("--out", out, *more),
        )
        said = [line for line in err.splitlines() if line.startswith("unbraid: ")]
        assert code, err
        assert words in said[-1]
        assert not Path(out).exists()


def test_whole_numbers_are_not_scaled(tmp_path, place, call):
    for part, n in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cow")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for k in range(n):
                values = torch.full((2, 64), 40 * label + k, dtype=torch.uint8)
                save(tmp_path / "data" / part / name / f"{k}.npy", values)
    named = ("--model", "net.py:npy", "--layer", "2", "--data", tmp_path / "data")
    code, _, err = call("run", *named, "--out", tmp_path / "out", "--no-features")
    assert (code, "whole numbers unscaled" in err) == (0, True)
    assert float(Run(tmp_path / "out").images[5][0].max()) == 81.0
    images = open_pictures(
        [tmp_path / "data/val/cow/1.npy"],
        load_model(f"{place}/net.py:npy"),
        as_in_files=True,
    )
    assert images[0][0].dtype == torch.float32
