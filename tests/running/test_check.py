"""`unbraid check`: damage of every kind is found, set aside and made anew."""

from __future__ import annotations

import errno
import io
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


def scan(folder: Path) -> None:
    unbraid.scan(build("1x1"), "layer", IMAGES, folder, positions=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    scan(folder / "scan-train")
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith(".damaged")}


def test_check_of_a_whole_scan_finds_nothing(run: Path) -> None:
    for folder in (run, run / "scan-train", run.parent):
        before = content(run / "scan-train")
        found = check(folder)
        assert found.whole
        assert found.n_sound == len(before) == 2 + 3
        assert str(found) == "5 files sound."
        assert content(run / "scan-train") == before


def flip(path: Path) -> None:
    """One bit of the last tensor, which safetensors itself does not notice."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    load_file(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def strange(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Impossible records, with checksums that fit."""

    def damage(path: Path) -> None:
        tensors, _ = read_tensors(path)
        write_tensors(path, {name: change(name, own) for name, own in tensors.items()}, {})

    return damage


def one(changed: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return strange(lambda name, own: change(own) if name == changed else own)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit": flip,
    "its end": cut,
    "an image": strange(lambda _, x: x[:-1] if x.shape[0] in (128, 129) else x),
    "everything": lambda path: path.write_bytes(b""),
    "channels": one("share_channel", lambda x: x + 100),
    "negative channels": one("share_channel", lambda x: x - 100),
    "starts": one("share_start", lambda x: x.flip(0)),
    "order": one("index", lambda x: x.flip(0)),
    "labels": one("label", lambda x: x - 5),
    "shape": one("pooled", lambda x: x[..., :-1]),
    "a tensor of another name": lambda path: save_file({"strange": torch.zeros(3)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_of_a_damaged_shard_sets_it_aside_to_be_made_anew(
    damage: str, run: Path, whole: Path
) -> None:
    folder = run / "scan-train"
    shard = folder / "shard-000001.safetensors"
    DAMAGES[damage](shard)
    with pytest.raises(RunError, match="shard-000001"):
        list(unbraid.open_scan(folder).shards())
    found = check(run)
    assert not found.whole
    assert len(found.damaged) == 1
    assert "shard-000001" in found.damaged[0]
    assert not shard.exists()
    assert shard.with_name(f"{shard.name}.damaged").exists()
    scan(folder)
    assert content(folder) == content(whole / "scan-train")
    assert check(run).whole


def schema(value: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema": value}))

    return write


FAULTS: dict[str, tuple[str, Callable[[Path], object], str, str]] = {  # what is told, and as what
    "shard gone": ("shard-000000.safetensors", Path.unlink, "missing", "1 shard of 3 in "),
    "layer gone": ("layer.safetensors", Path.unlink, "missing", "layer.safetensors"),
    "layer damaged": ("layer.safetensors", flip, "damaged", "layer.safetensors"),
    "manifest gone": ("manifest.json", Path.unlink, "lost", "without a manifest"),
    "manifest damaged": ("manifest.json", cut, "lost", "manifest.json"),
    "of another version": ("manifest.json", schema(2), "unreadable", "this version reads 1"),
    "of no version": ("manifest.json", schema("two"), "lost", "this version reads 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_of_a_faulty_scan_tells_and_has_it_made_anew_if_it_can_be(
    fault: str, run: Path, whole: Path
) -> None:
    name, act, kind, told = FAULTS[fault]
    folder = run / "scan-train"
    act(folder / name)
    before = content(folder)
    leftover = folder / f"shard-000000.safetensors.{temporary._HOST}.1.0123abcd.tmp"
    mine = folder / "mine.tmp"
    leftover.touch()
    mine.touch()
    found = check(run)
    assert (leftover.exists(), mine.exists()) == (False, True)
    mine.unlink()
    assert [k for k in ("damaged", "missing", "unreadable", "lost") if getattr(found, k)] == [kind]
    (text,) = getattr(found, kind)
    assert told in text
    assert not found.whole
    again = "Start the command that made the folder again"
    if kind in ("damaged", "missing"):
        assert again in str(found)
        scan(folder)
        assert content(folder) == content(whole / "scan-train")
    else:
        assert again not in str(found)
        assert content(folder) == before


# --- what cannot be read is no damage -------------------------------------------------------------


def failing(number: int, name: str, after: int) -> Callable[..., Any]:
    """`Path.open`, which fails for files of a name from a certain call on."""
    calls: list[Path] = []

    def open_or_fail(self: Path, *args: Any, **kwargs: Any) -> Any:
        if name in self.name:
            calls.append(self)
            if len(calls) > after:
                raise OSError(number, os.strerror(number))
        return io.open(self, *args, **kwargs)  # noqa: UP020 - what Path.open itself does

    return open_or_fail


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize(
    ("name", "after"),
    [("shard-000001", 0), ("shard-000001", 1), ("layer", 0), ("layer", 1), ("manifest", 0)],
)
def test_check_of_what_cannot_be_read_tells_and_leaves_it(
    name: str, number: int, after: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(run / "scan-train")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing(number, name, after))
        found = check(run)
    assert len(found.unreadable) == 1
    assert name in found.unreadable[0]
    assert os.strerror(number) in found.unreadable[0]
    assert [found.damaged, found.missing, found.lost, found.whole] == [[], [], [], False]
    assert "Not read, and left as it is" in str(found)
    assert content(run / "scan-train") == before
    assert not list(run.rglob("*.damaged"))


def test_check_of_what_torch_cannot_map_leaves_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(*_: Any, **__: Any) -> Any:
        raise RuntimeError("unable to open file in read-only mode: Too many open files (24)")

    monkeypatch.setattr("unbraid.base.files.safe_open", too_many)
    found = check(run)
    assert len(found.unreadable) == 4
    assert not found.damaged


def test_check_of_a_folder_that_cannot_be_read_tells(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Path.iterdir

    def list_or_fail(self: Path) -> Any:
        if self.name == "scan-train":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", list_or_fail)
    assert "scan-train cannot be read (Permission denied)" in check(run).unreadable[0]


def test_check_of_damage_that_cannot_be_set_aside_tells(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = run / "scan-train" / "shard-000001.safetensors"
    cut(shard)

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        found = check(run)
    assert "It could not be set aside (Permission denied)." in found.lost[0]
    assert not found.damaged
    assert shard.exists()


# --- runs -----------------------------------------------------------------------------------------


EVALUATION = """{"output": null, "ablation": null, "summary": {}, "channels": [{
    "layer": "layer", "channel": 0, "semantics": null, "ablation": null,
    "separation_error": 0.1, "separation_error_rectified": null, "concepts": [{
        "classes": [0], "name": "a", "n_images": 3, "auroc": 1, "ratios": [],
        "retention": 1.0, "leakage": null, "mimic_error": 0.1, "silence_error": 0.0}]}]}"""


@pytest.fixture
def results(run: Path) -> Path:
    """Every file of a run."""
    shutil.copytree(run / "scan-train", run / "scan-val")
    (run / "settings.json").write_text('{"thresholds": {}, "source": {}, "title": ""}')
    pair = (0, 0, 1, 0.25, 0.9, 0.8, "clock, digital", "=b", 0.1, float("nan"), 0.9, 0.9, True)
    (run / "findings.csv").write_text(csv_text(FINDINGS, [pair]))
    (run / "sensitivity.csv").write_text(csv_text(SENSITIVITY, [(0.03, 0.75, 0.5, 1, 1)]))
    trained = unbraid.open_scan(run / "scan-train")
    found = unbraid.find(trained, channels={0: [[0], [1]]})
    divided = unbraid.split(trained, found, method="published", rho=0.7)
    for name in ("split", "split-published"):
        divided.save(run / f"{name}.safetensors")
    (run / "evaluation.json").write_text(EVALUATION)
    picture = Feature(0, None, 0, Image.new("RGBA", (64, 64), (255, 0, 0, 255)), (1.0,))
    Features("layer", "0", (picture,)).save(run / "features")
    (run / "report.html").write_text("<html></html>")
    return run


def change(old: str, new: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return write


RESULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "settings": ("settings.json", cut, "damaged"),
    "row of findings": ("findings.csv", change("0.25", "a quarter"), "damaged"),
    "end of findings": ("findings.csv", change(",0.9,0.9,True\n", ""), "damaged"),
    "no findings": ("findings.csv", lambda path: path.write_bytes(b""), "damaged"),
    "bytes of findings": ("findings.csv", lambda path: path.write_bytes(b"\xff\xfe\n"), "damaged"),
    "columns": ("findings.csv", change("channel,", "number,"), "unreadable"),
    "sensitivity": ("sensitivity.csv", change("0.75", "0,75"), "damaged"),
    "split": ("split.safetensors", cut, "damaged"),
    "new split": ("split.safetensors", lambda p: write_tensors(p, {}, {"schema": 2}), "unreadable"),
    "published": ("split-published.safetensors", flip, "damaged"),
    "end of evaluation": ("evaluation.json", cut, "damaged"),
    "output": ("evaluation.json", change('"output": null', '"output": {"x": 1}'), "damaged"),
    "measures": ("evaluation.json", change('"auroc": 1', '"auroc": "good"'), "damaged"),
    "ablation": ("evaluation.json", change('"summary"', '"ablation": 7, "summary"'), "damaged"),
    "semantics": ("evaluation.json", change('"semantics": null', '"semantics": 7'), "damaged"),
    "features": ("features/features.json", cut, "damaged"),
    "new features": ("features/features.json", schema(2), "unreadable"),
    "scan gone": ("scan-train", shutil.rmtree, "missing"),
    "findings gone": ("findings.csv", Path.unlink, "missing"),
    "split gone": ("split.safetensors", Path.unlink, "missing"),
    "published gone": ("split-published.safetensors", Path.unlink, "missing"),
    "evaluation gone": ("evaluation.json", Path.unlink, "missing"),
    "report gone": ("report.html", Path.unlink, "missing"),
}


def test_check_of_a_whole_run_finds_nothing(results: Path) -> None:
    found = check(results)
    assert str(found) == f"{2 * 5 + 7} files sound."
    assert found.whole


@pytest.mark.parametrize("fault", RESULTS)
def test_check_of_a_faulty_run_tells_and_sets_damaged_files_aside(
    fault: str, results: Path
) -> None:
    name, act, kind = RESULTS[fault]
    act(results / name)
    found = check(results)
    assert [k for k in ("damaged", "missing", "unreadable", "lost") if getattr(found, k)] == [kind]
    (text,) = getattr(found, kind)
    assert str(results / name).removesuffix("/features.json") in text
    aside = [str(path.relative_to(results)) for path in results.rglob("*.damaged")]
    assert aside == ([f"{name}.damaged"] if kind == "damaged" else [])


def test_check_of_a_damaged_picture_sets_their_list_aside(results: Path) -> None:
    cut(results / "features" / "0.png")
    assert "no feature visualisations that can be read" in check(results).damaged[0]
    assert (results / "features" / "features.json.damaged").exists()


def test_check_of_a_run_that_found_nothing_lacks_nothing(results: Path) -> None:
    (results / "findings.csv").write_text(csv_text(FINDINGS, []))
    for name in ("split.safetensors", "split-published.safetensors", "evaluation.json"):
        (results / name).unlink()
    assert check(results).whole


def test_check_of_a_folder_without_either_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no scan and no run"):
        check(tmp_path)


def test_check_sets_aside_beside_what_was_set_aside_before(results: Path) -> None:
    split = results / "split.safetensors"
    kept = []
    for n in range(3):
        kept.append(b"junk %d" % n)
        split.write_bytes(kept[-1])
        assert len(check(results).damaged) == 1
    assert sorted(p.read_bytes() for p in results.glob("split.safetensors*.damaged")) == kept
