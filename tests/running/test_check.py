"""`unbraid check`: damage of every kind is found, set aside and made anew."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base import files as temporary
from unbraid.base.errors import RunError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.base.tables import csv_text
from unbraid.finding.findings import COLUMNS as FINDINGS
from unbraid.finding.thresholds import COLUMNS as SENSITIVITY
from unbraid.running.check import check
from unbraid.visualizing.features import Feature, Features

IMAGES = SyntheticImages(2 * 128 + 9)
SHARD = "scan-train/shard-000001.safetensors"
IF_FOUND = ("split.safetensors", "split-published.safetensors", "evaluation.json")
KINDS = ("damaged", "missing", "unreadable", "lost")
EVALUATION = """{"output": null, "ablation": null, "summary": {}, "channels": [{
    "layer": "layer", "channel": 0, "semantics": null, "ablation": null,
    "separation_error": 0.1, "separation_error_rectified": null, "concepts": [{
        "classes": [0], "name": "a", "n_images": 3, "auroc": 1, "ratios": [],
        "retention": 1.0, "leakage": null, "mimic_error": 0.1, "silence_error": 0.0}]}]}"""
Act = Callable[[Path], object]


def scan(folder: Path) -> None:
    unbraid.scan(build("1x1"), "layer", IMAGES, folder, positions=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
        unbraid.split(trained, found, method="published", rho=0.7).save(run / name)
    (run / "evaluation.json").write_text(EVALUATION)
    picture = Feature(0, None, 0, Image.new("RGBA", (64, 64), (255, 0, 0, 255)), (1.0,))
    Features("layer", "0", (picture,)).save(run / "features")
    (run / "report.html").write_text("<html></html>")
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith(".damaged")}


def test_check_of_a_whole_scan_or_run_finds_nothing(run: Path) -> None:
    before = content(run / "scan-train")
    for folder, n_files in ((run, 17), (run / "scan-train", 5), (run.parent, 17)):
        found = check(folder)
        assert (found.whole, str(found)) == (True, f"{n_files} files sound.")
    assert content(run / "scan-train") == before


def flip(path: Path) -> None:
    """One bit of the last tensor, which safetensors itself does not notice."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    load_file(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def change(old: str, new: str) -> Act:
    return lambda path: path.write_text(path.read_text().replace(old, new))


def schema(value: Any) -> Act:
    return lambda path: path.write_text(
        json.dumps({**json.loads(path.read_text()), "schema": value})
    )


def rewrite(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Act:
    """Impossible records, with checksums that fit."""

    def damage(path: Path) -> None:
        tensors, _ = read_tensors(path)
        write_tensors(path, {**tensors, name: change(tensors[name])}, {})

    return damage


FAULTS: list[tuple[str, Act, str, str]] = [  # of a file: what is told, as what and in which words
    *((SHARD, act, "damaged", "shard-000001") for act in (flip, cut, empty)),
    (SHARD, lambda p: save_file({"strange": torch.zeros(3)}, p), "damaged", "shard-000001"),
    (SHARD, rewrite("label", lambda x: x[:-1]), "damaged", "shard-000001"),
    (SHARD, rewrite("label", lambda x: x - 5), "damaged", "shard-000001"),
    (SHARD, rewrite("share_channel", lambda x: x + 100), "damaged", "shard-000001"),
    (SHARD, rewrite("share_channel", lambda x: x - 100), "damaged", "shard-000001"),
    (SHARD, rewrite("share_start", lambda x: x.flip(0)), "damaged", "shard-000001"),
    (SHARD, rewrite("index", lambda x: x.flip(0)), "damaged", "shard-000001"),
    (SHARD, rewrite("pooled", lambda x: x[..., :-1]), "damaged", "shard-000001"),
    (SHARD, Path.unlink, "missing", "1 shard of 3 in "),
    ("scan-train/layer.safetensors", Path.unlink, "missing", "layer.safetensors"),
    ("scan-train/layer.safetensors", flip, "damaged", "layer.safetensors"),
    ("scan-train/manifest.json", Path.unlink, "lost", "without a manifest"),
    ("scan-train/manifest.json", cut, "lost", "manifest.json"),
    ("scan-train/manifest.json", schema(2), "unreadable", "this version reads 1"),
    ("scan-train/manifest.json", schema("two"), "lost", "this version reads 1"),
    ("scan-train", shutil.rmtree, "missing", "the scan in "),
    ("settings.json", cut, "damaged", "settings.json"),
    ("findings.csv", change("0.25", "a quarter"), "damaged", "findings.csv"),
    ("findings.csv", change(",0.9,0.9,True\n", ""), "damaged", "findings.csv"),
    ("findings.csv", empty, "damaged", "findings.csv"),
    ("findings.csv", lambda path: path.write_bytes(b"\xff\xfe\n"), "damaged", "findings.csv"),
    ("findings.csv", change("channel,", "number,"), "unreadable", "findings.csv"),
    ("sensitivity.csv", change("0.75", "0,75"), "damaged", "sensitivity.csv"),
    ("split.safetensors", cut, "damaged", "split.safetensors"),
    ("split.safetensors", lambda p: write_tensors(p, {}, {"schema": 2}), "unreadable", "split."),
    ("split-published.safetensors", flip, "damaged", "split-published."),
    ("evaluation.json", cut, "damaged", "evaluation.json"),
    ("evaluation.json", change('"output": null', '"output": {"x": 1}'), "damaged", "evaluation"),
    ("evaluation.json", change('"auroc": 1', '"auroc": "good"'), "damaged", "evaluation.json"),
    ("evaluation.json", change('"summary"', '"ablation": 7, "summary"'), "damaged", "evaluation"),
    ("evaluation.json", change('"semantics": null', '"semantics": 7'), "damaged", "evaluation"),
    ("features/features.json", cut, "damaged", "features"),
    ("features/features.json", schema(2), "unreadable", "features"),
    *((name, Path.unlink, "missing", name) for name in ("findings.csv", "report.html", *IF_FOUND)),
]


@pytest.mark.parametrize(("name", "act", "kind", "told"), FAULTS)
def test_check_of_a_fault_tells_it_and_sets_damage_aside_to_be_made_anew(
    name: str, act: Act, kind: str, told: str, run: Path, whole: Path
) -> None:
    folder = run / "scan-train"
    act(run / name)
    if name == SHARD:
        with pytest.raises(RunError, match="shard"):
            list(unbraid.open_scan(folder).shards())
    before = content(folder) if folder.exists() else {}
    found = check(run)
    assert [k for k in KINDS if getattr(found, k)] == [kind]
    (text,) = getattr(found, kind)
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


def test_check_removes_what_a_killed_process_left_and_nothing_else(run: Path) -> None:
    leftover = run / f"{SHARD}.{temporary._HOST}.1.0123abcd.tmp"
    mine = run / "scan-train/mine.tmp"
    leftover.touch()
    mine.touch()
    assert check(run).whole
    assert (leftover.exists(), mine.exists()) == (False, True)


def fail_to(patch: pytest.MonkeyPatch, method: str, name: str, number: int, after: int = 0) -> None:
    """Make a method of `Path` fail for files of a name from a certain call on."""
    own, calls = getattr(Path, method), []

    def fail(self: Path, *args: Any, **kwargs: Any) -> Any:
        calls.extend([self] * (name in self.name))
        if name in self.name and len(calls) > after:
            raise OSError(number, os.strerror(number))
        return own(self, *args, **kwargs)

    patch.setattr(Path, method, fail)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize(
    ("method", "name", "after"),
    [
        *(("open", name, after) for name in ("shard-000001", "layer") for after in (0, 1)),
        *(("open", "manifest", 0), ("iterdir", "scan-train", 0)),
    ],
)
def test_check_of_what_cannot_be_read_tells_and_leaves_it(
    method: str, name: str, number: int, after: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(run / "scan-train")
    with monkeypatch.context() as patch:
        fail_to(patch, method, name, number, after)
        found = check(run / "scan-train")
    (told,) = found.unreadable
    assert name in told
    assert os.strerror(number) in told
    assert [found.damaged, found.missing, found.lost, found.whole] == [[], [], [], False]
    assert "Not read, and left as it is" in str(found)
    assert content(run / "scan-train") == before


def test_check_of_what_torch_cannot_map_leaves_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(*_: Any, **__: Any) -> Any:
        raise RuntimeError("unable to open file in read-only mode: Too many open files (24)")

    monkeypatch.setattr("unbraid.base.files.safe_open", too_many)
    found = check(run / "scan-train")
    assert (len(found.unreadable), found.damaged) == (4, [])


def test_check_of_damage_that_cannot_be_set_aside_tells(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(run / SHARD)
    fail_to(monkeypatch, "replace", "shard", errno.EACCES)
    found = check(run)
    assert "It could not be set aside (Permission denied)." in found.lost[0]
    assert not found.damaged
    assert (run / SHARD).exists()


def test_check_of_a_damaged_picture_sets_their_list_aside(run: Path) -> None:
    cut(run / "features" / "0.png")
    assert "no feature visualisations that can be read" in check(run).damaged[0]
    assert (run / "features" / "features.json.damaged").exists()


def test_check_of_a_run_that_found_nothing_lacks_nothing(run: Path) -> None:
    (run / "findings.csv").write_text(csv_text(FINDINGS, []))
    for name in IF_FOUND:
        (run / name).unlink()
    assert check(run).whole


def test_check_of_a_folder_without_either_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no scan and no run"):
        check(tmp_path)
