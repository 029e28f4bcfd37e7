"""`unbraid check`: damage of every kind is found, set aside and made again."""

import errno
import itertools
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base import files as temporary
from unbraid.base.errors import RunError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.base.tables import csv_text
from unbraid.finding.findings import COLUMNS as FINDINGS
from unbraid.finding.sensitivity import COLUMNS as SENSITIVITY
from unbraid.running.check import check
from unbraid.visualizing.features import Feature, Features

IMAGES = SyntheticImages(2 * 128 + 9)
SHARD = "scan-train/shard-000001.safetensors"
IF_FOUND = ("split.safetensors", "split-published.safetensors", "evaluation.json")
KINDS = ("damaged", "missing", "unreadable", "lost")


def scan(folder):
    unbraid.scan(build("1x1"), "layer", IMAGES, folder, positions=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every file of a run."""
    run = tmp_path_factory.mktemp("run")
    scan(run / "scan-train")
    shutil.copytree(run / "scan-train", run / "scan-val")
    (run / "settings.json").write_text('{"thresholds": {}, "source": {}, "title": ""}')
    pair = (0, 0, 1, 0.25, 0.9, 0.8, "clock, digital", "=b", 0.1, float("nan"), 0.9, 0.9, True)
    (run / "findings.csv").write_text(csv_text(FINDINGS, [pair]))
    (run / "sensitivity.csv").write_text(csv_text(SENSITIVITY, [(0.03, 0.75, 0.5, 1, 1)]))
    trained = unbraid.open_scan(run / "scan-train")
    found = unbraid.find(trained, channels={0: [[0], [1]]})
    for name in IF_FOUND[:2]:
        split = unbraid.split(trained, found, method="published", rho=0.7)
        split.save(run / name)
    unbraid.evaluate(split, trained).save(run / "evaluation.json")
    picture = Feature(0, None, 0, Image.new("RGBA", (64, 64), (255, 0, 0, 255)), (1.0,))
    Features("layer", "0", (picture,)).save(run / "features")
    (run / "report.html").write_text("<html></html>")
    return run


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith(".damaged")}


def test_check_of_a_whole_scan_or_run_removes_only_what_a_killed_process_left(run):
    before = content(run / "scan-train")
    for folder, n_files in ((run, 17), (run / "scan-train", 5)):
        found = check(folder)
        assert (found.whole, str(found)) == (True, f"{n_files} files sound.")
    assert content(run / "scan-train") == before
    leftover = run / f"{SHARD}.{temporary._HOST}.1.0123abcd.tmp"
    mine = run / "scan-train/mine.tmp"
    leftover.touch()
    mine.touch()
    assert check(run).whole
    assert (leftover.exists(), mine.exists()) == (False, True)


def flip(path):
    """One bit of the last tensor, which safetensors itself does not notice."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


def rewrite(name, change):
    """Impossible records, with checksums that fit."""

    def damage(path):
        tensors, _ = read_tensors(path)
        write_tensors(path, {**tensors, name: change(tensors[name])}, {})

    return damage


FAULTS = {  # to a file, and what it is told as
    (SHARD, "damaged"): (
        *(flip, cut, lambda path: save_file({"strange": torch.zeros(3)}, path)),
        *(rewrite("label", lambda x: x - 5), rewrite("share_channel", lambda x: x + 99)),
        *(rewrite("index", lambda x: x.flip(0)), lambda path: path.write_bytes(b"")),
        *(rewrite("share_start", lambda x: x.flip(0)), rewrite("pooled", lambda x: x[..., :-1])),
    ),
    (SHARD, "missing"): (Path.unlink,),
    ("scan-train/layer.safetensors", "missing"): (Path.unlink,),
    ("scan-train/layer.safetensors", "damaged"): (flip,),
    ("scan-train/manifest.json", "lost"): (Path.unlink, cut, edit('"schema": 1', '"schema": ""')),
    ("scan-train/manifest.json", "unreadable"): (edit('"schema": 1', '"schema": 2'),),
    ("scan-train", "missing"): (shutil.rmtree,),
    ("settings.json", "damaged"): (cut,),
    ("findings.csv", "damaged"): (
        *(lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\xff\xfe\n")),
        *(edit("0.25", "a quarter"), edit(",0.9,0.9,True\n", "")),
    ),
    ("findings.csv", "unreadable"): (edit("channel,", "number,"),),
    ("sensitivity.csv", "damaged"): (edit("0.75", "0,75"),),
    ("split.safetensors", "damaged"): (cut,),
    ("split.safetensors", "unreadable"): (lambda path: write_tensors(path, {}, {"schema": 2}),),
    ("split-published.safetensors", "damaged"): (flip,),
    ("evaluation.json", "damaged"): (
        *(cut, edit('"output": null', '"output": {"x": 1}')),
        *(edit('"auroc": ', '"auroc": "a", "rest": '), edit('"semantics": null', '"semantics": 7')),
    ),
    ("features/features.json", "damaged"): (cut, lambda path: cut(path.with_name("0.png"))),
    ("features/features.json", "unreadable"): (edit('"schema": 1', '"schema": 2'),),
}
CASES = [(name, kind, act) for (name, kind), acts in FAULTS.items() for act in acts]
CASES += [(name, "missing", Path.unlink) for name in ("findings.csv", "report.html", *IF_FOUND)]


@pytest.mark.parametrize(("name", "kind", "act"), CASES)
def test_check_of_a_fault_sets_damage_aside_to_be_made_anew(name, kind, act, run, whole):
    folder = run / "scan-train"
    act(run / name)
    if name == SHARD:
        with pytest.raises(RunError, match="shard"):
            list(unbraid.open_scan(folder).shards())
    before = content(folder) if folder.exists() else {}
    found = check(run)
    assert [k for k in KINDS if getattr(found, k)] == [kind]
    (text,) = getattr(found, kind)
    told = "1 shard of 3 in " if (name, kind) == (SHARD, "missing") else Path(name).stem
    assert told in text
    aside = [str(path.relative_to(run)) for path in run.rglob("*.damaged")]
    assert aside == ([f"{name}.damaged"] if kind == "damaged" else [])
    again = "Start the command that made the folder again" in str(found)
    assert again == (kind in ("damaged", "missing"))
    if again and folder.name in name:
        scan(folder)
        assert content(folder) == content(whole / "scan-train")
        assert check(run).whole
    elif not again and folder.exists():
        assert content(folder) == before


def fail_to(patch, method, name, number, after=0):
    """Make a method of `Path` fail for files of a name from a certain call on."""
    own, calls = getattr(Path, method), itertools.count()

    def fail(self, *args, **kwargs):
        if name in self.name and next(calls) >= after:
            raise OSError(number, os.strerror(number))
        return own(self, *args, **kwargs)

    patch.setattr(Path, method, fail)


READS = [("open", name, after) for name in ("shard-000001", "layer") for after in (0, 1)]
READS += [("open", "manifest", 0), ("iterdir", "scan-train", 0)]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize(("method", "name", "after"), READS)
def test_check_leaves_what_cannot_be_read(method, name, number, after, run, monkeypatch):
    before = content(run / "scan-train")
    with monkeypatch.context() as patch:
        fail_to(patch, method, name, number, after)
        found = check(run / "scan-train")
    (told,) = found.unreadable
    assert name in told
    assert os.strerror(number) in told
    assert [found.damaged, found.missing, found.lost, found.whole] == [[], [], [], False]
    assert content(run / "scan-train") == before


def test_check_of_what_torch_cannot_map_leaves_it(run, monkeypatch):
    too_many = RuntimeError("unable to open file in read-only mode: Too many open files (24)")
    monkeypatch.setattr("unbraid.base.files.safe_open", Mock(side_effect=too_many))
    found = check(run / "scan-train")
    assert (len(found.unreadable), found.damaged) == (4, [])


def test_check_of_damage_that_cannot_be_set_aside_tells(run, monkeypatch):
    cut(run / SHARD)
    fail_to(monkeypatch, "replace", "shard", errno.EACCES)
    found = check(run)
    assert "It could not be set aside (Permission denied)." in found.lost[0]
    assert not found.damaged
    assert (run / SHARD).exists()


def test_check_of_a_run_that_found_nothing_lacks_nothing_and_a_folder_of_neither_is_refused(run):
    (run / "findings.csv").write_text(csv_text(FINDINGS, []))
    for name in IF_FOUND:
        (run / name).unlink()
    assert check(run).whole
    with pytest.raises(RunError, match="holds no scan and no run"):
        check(run / "features")
