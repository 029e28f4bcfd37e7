"""`unbraid check`: damage of every kind is found, set aside and made anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unbraid
from networks import SyntheticImages, build
from test_files import leave
from test_surgery import make_split
from unbraid.check import check
from unbraid.errors import RunError
from unbraid.files import read_tensors, write_tensors

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


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith(".damaged")}


def test_a_whole_scan_is_whole(run: Path) -> None:
    for folder in (run, run / "scan-train", run.parent):
        before = files(run / "scan-train")
        found = check(folder)
        assert found.whole
        assert found.n_sound == len(before) == 2 + 3
        assert str(found) == "5 files sound."
        assert files(run / "scan-train") == before


def flip(path: Path) -> None:
    """One bit of the last tensor, which safetensors itself does not notice."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    load_file(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shorten(path: Path) -> None:
    """Lose an image from every tensor, with checksums that fit."""
    tensors, about = read_tensors(path)
    shorter = {
        name: tensor[:-1] if tensor.shape[0] in (128, 129) else tensor
        for name, tensor in tensors.items()
    }
    write_tensors(path, shorter, {k: v for k, v in about.items() if k != "crc32"})


def strange(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Impossible records, with checksums that fit."""

    def damage(path: Path) -> None:
        tensors, _ = read_tensors(path)
        write_tensors(path, {**tensors, name: change(tensors[name])}, {})

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit": flip,
    "its end": cut,
    "an image": shorten,
    "everything": lambda path: path.write_bytes(b""),
    "channels": strange("share_channel", lambda x: x + 100),
    "negative channels": strange("share_channel", lambda x: x - 100),
    "starts": strange("share_start", lambda x: x.flip(0)),
    "order": strange("index", lambda x: x.flip(0)),
    "labels": strange("label", lambda x: x - 5),
    "shape": strange("pooled", lambda x: x[..., :-1]),
    "a tensor of another name": lambda path: save_file({"strange": torch.zeros(3)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_set_aside_and_made_anew(damage: str, run: Path, whole: Path) -> None:
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
    assert files(folder) == files(whole / "scan-train")
    assert check(run).whole


def test_what_is_missing_and_what_a_kill_left_is_told(run: Path, whole: Path) -> None:
    folder = run / "scan-train"
    (folder / "shard-000000.safetensors").unlink()
    leftover = leave(folder / "shard-000000.safetensors")
    mine = folder / "mine.tmp"
    mine.touch()
    found = check(run)
    assert found.missing == [f"1 shard of 3 in {folder}"]
    assert "Start the command that made the folder again" in str(found)
    assert not leftover.exists()
    assert mine.exists()


def test_a_damaged_layer_is_made_anew(run: Path, whole: Path) -> None:
    folder = run / "scan-train"
    flip(folder / "layer.safetensors")
    with pytest.raises(RunError, match="is not what was written"):
        unbraid.open_scan(folder)
    assert len(check(run).damaged) == 1
    scan(folder)
    assert files(folder) == files(whole / "scan-train")


def test_a_damaged_manifest_cannot_be_repaired_and_is_left(run: Path) -> None:
    manifest = run / "scan-train" / "manifest.json"
    manifest.write_text("{")
    found = check(run)
    assert len(found.lost) == 1
    assert "Cannot be repaired" in str(found)
    assert manifest.read_text() == "{"
    manifest.unlink()
    assert "without a manifest" in check(run).lost[0]


def test_damaged_results_of_a_run_are_set_aside(run: Path, tmp_path: Path) -> None:
    settings = {"thresholds": {}, "source": {}, "title": ""}
    (run / "settings.json").write_text(json.dumps(settings))
    make_split(build("1x1"), tmp_path / "train").save(run / "split.safetensors")
    (run / "evaluation.json").write_text('{"output": null}')
    assert check(run).whole
    cut(run / "split.safetensors")
    (run / "evaluation.json").write_text('{"output": {"strange": 1}}')
    found = check(run)
    assert len(found.damaged) == 2
    assert sorted(p.name for p in run.glob("*.damaged")) == [
        "evaluation.json.damaged",
        "split.safetensors.damaged",
    ]


def test_a_folder_without_either_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no scan and no run"):
        check(tmp_path)
