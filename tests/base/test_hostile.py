"""Files that mean harm: refused in one sentence, before they cost anything."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import unbraid
from handmade import write_scan
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.base.tables import csv_text, one_line
from unbraid.finding.arv import class_sums
from unbraid.finding.findings import Findings, Pair
from unbraid.finding.thresholds import nearest_finding
from unbraid.images.open import open_images
from unbraid.images.pictures import read_picture
from unbraid.measuring.results import read_semantics
from unbraid.running.check import check
from unbraid.running.folders import read_settings
from unbraid.scanning.manifest import MAX_CLASSES
from unbraid.scanning.records import Scan, no_records, shard_path, write_shard
from unbraid.splitting.splits import Split


@pytest.fixture
def scan(tmp_path: Path) -> Scan:
    shares = torch.full((21, 3), 1 / 3, dtype=torch.float64)
    return write_scan(tmp_path / "scan", shares=shares, labels=[n % 3 for n in range(21)])


# --- manifests ------------------------------------------------------------------------------------


GONE = object()


def lie(scan: Scan, **entries: Any) -> Path:
    """Give the manifest, or the layer in it, other entries, or leave some out."""
    path = scan.path / "manifest.json"
    content = json.loads(path.read_text())
    layer = {key: entries.pop(key) for key in list(entries) if key in content["layer"]}
    content = {**content, **entries, "layer": {**content["layer"], **layer}}
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not GONE}))
    return scan.path


def test_a_claim_of_a_billion_shards_costs_nothing(scan):
    folder = lie(scan, n_images=10**12, shard_size=1000)
    with pytest.raises(RunError, match="999999997 of 1000000000 shards"):
        unbraid.open_scan(folder)
    assert check(folder).missing == [f"999,999,997 shards of 1000000000 in {folder}"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"shard_size": 0}, "shard_size is 0"),
        ({"shard_size": True}, r"Expected `int`, got `bool` - at `\$.shard_size`"),
        ({"n_images": 2.5}, r"Expected `int`, got `float` - at `\$.n_images`"),
        ({"n_images": -1}, "n_images is -1"),
        ({"n_images": 0}, "n_images is 0"),
        ({"threads": 10**9}, "threads is 1000000000"),
        ({"min_share": "a"}, r"Expected `float`, got `str` - at `\$.min_share`"),
        ({"class_names": "abc"}, r"Expected `array`, got `str` - at `\$.class_names`"),
        ({"class_names": [1]}, r"Expected `str`, got `int` - at `\$.class_names"),
        ({"class_names": [""] * (MAX_CLASSES + 1)}, "number of class_names is 1048577"),
        ({"strange": 1}, "unknown entries"),
        ({"groups": 0}, "groups is 0"),
        ({"groups": 2}, "cannot be divided among the groups"),
        ({"kernel": [1] * 9}, "not of one to three numbers"),
        ({"stride": [0]}, "stride is 0"),
        ({"pad_mode": "x" * 10**6}, "pad_mode is none that is known"),
        ({"n_out": 10**30}, "does not fit into 64 bits"),
        ({"n_images": GONE}, "missing required field `n_images`"),
        ({"schema": [[]] * 1000}, r"schema \[\[\], \[\]"),
    ],
)
def test_numbers_that_no_scan_has_are_refused(entries, message, scan):
    with pytest.raises(RunError, match=message) as caught:
        unbraid.open_scan(lie(scan, **entries))
    assert len(str(caught.value)) < 500


def test_a_pipe_is_not_waited_for(scan, tmp_path):
    for path in (scan.path / "manifest.json", scan.path / "layer.safetensors"):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(RunError, match="it is no file"):
        unbraid.open_scan(scan.path)
    with pytest.raises(RunError, match="it is no file"):
        read_tensors(scan.path / "layer.safetensors")
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="no regular file"):
        read_picture(tmp_path / "a.png")


def test_text_that_cannot_be_written_is_made_writable(scan, tmp_path):
    path = scan.path / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "class_names": ["\ud800", "b", "c"]}))
    opened = unbraid.open_scan(scan.path)
    assert opened.class_names == ("?", "b", "c")
    unbraid.find(opened, channels={0: [[0], [1]]}).to_csv(tmp_path / "findings.csv")
    assert "?" in (tmp_path / "findings.csv").read_text()


# --- tensors --------------------------------------------------------------------------------------


def forge(path: Path, **changes: Callable[[Tensor], Tensor]) -> None:
    """Other tensors, with checksums that fit."""
    tensors, _ = read_tensors(path)
    write_tensors(path, {**tensors, **{k: make(tensors[k]) for k, make in changes.items()}}, {})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("label", lambda x: x + 2**62, "'label' with numbers that cannot be"),
        ("label", lambda x: x.double(), "'label' that is no list of whole numbers"),
        ("prediction", lambda x: x + 2**40, "'prediction' with numbers that cannot be"),
        ("n_positions", lambda x: x * 0, "'n_positions' with numbers that cannot be"),
        ("pooled", lambda x: x * float("nan"), "'pooled' that is not of finite numbers"),
        ("pooled", lambda x: x.long(), "'pooled' that is not of finite numbers"),
        ("pooled", lambda x: x.sum(), "'pooled' of a wrong shape"),
        ("pooled", lambda x: x.half(), "'pooled' of another type than the network's"),
        ("pooled", lambda x: x.new_zeros(2**40, 0), "'pooled' of a wrong shape"),
        ("share_value", lambda x: x + 5, "'share_value' with numbers that cannot be"),
        ("share_value", lambda x: x[:-1], "holds shares of no image"),
        ("share_start", lambda x: x[:0], "holds shares of no image"),
        ("index", lambda x: x - 100, "'index' with numbers that cannot be"),
        ("broken", lambda x: x.new_zeros(10**6), "'broken' of a wrong shape"),
    ],
)
def test_records_that_cannot_be_are_refused(name, change, message, scan):
    forge(shard_path(scan.path, 1), **{name: change})
    with pytest.raises(RunError, match=message):
        list(scan.shards())
    if name in ("label", "prediction", "share_start"):  # which are checked when read alone too
        with pytest.raises(RunError, match="shard-000001"):
            list(scan.columns(name))
    if name.startswith("share_"):
        with pytest.raises(RunError, match="shard-000001"):
            unbraid.find(scan, tau="auto")


def test_maps_of_another_type_or_of_zeros_are_refused_or_divided(tmp_path):
    """No convolution takes numbers of two types."""
    scan = unbraid.scan(build("uneven"), "layer", SyntheticImages(9), tmp_path, positions=True)
    assert scan.manifest.dtype == "float64"
    path, found = shard_path(scan.path, 0), unbraid.find(scan, channels={0: [[0], [1, 2]]})
    sound = path.read_bytes()
    forge(path, input_map=lambda x: x.half())
    with pytest.raises(RunError, match="'input_map' of another type than the network's"):
        unbraid.split(scan, found, method="published")
    path.write_bytes(sound)
    forge(path, input_map=torch.zeros_like)
    assert unbraid.split(scan, found).channels[0].masks.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": lambda x: x[:, :1]}, "no 'weight' of the layer's shape"),
        ({name: lambda x: x.half() for name in ("weight", "bias")}, "weights of another type"),
    ],
)
def test_weights_that_do_not_fit_are_refused(changes, message, scan):
    forge(scan.path / "layer.safetensors", **changes)
    with pytest.raises(RunError, match=message):
        unbraid.open_scan(scan.path)
    assert "layer.safetensors" in check(scan.path).damaged[0]


def test_a_header_that_lies_is_refused(scan):
    path = scan.path / "layer.safetensors"
    content = path.read_bytes()
    for told in (2**63, 2**40, 0):
        path.write_bytes(struct.pack("<Q", told) + content[8:])
        with pytest.raises(RunError, match="cannot be read"):
            read_tensors(path)
    text = content[8:].replace(b'"shape":[3,2]', b'"shape":[9,2]')
    path.write_bytes(content[:8] + text)
    with pytest.raises(RunError, match="cannot be read"):
        read_tensors(path, ["weight"])


def test_one_label_does_not_take_all_memory(scan):
    """Sums by class have a row for every number up to the largest label."""
    wide = replace(scan.manifest, layer=replace(scan.layer, n_in=2**20))
    assert wide.most_classes * (wide.layer.n_taps + wide.layer.n_out) <= 2**30
    forge(shard_path(scan.path, 0), label=lambda x: x + scan.manifest.most_classes - 2)
    with pytest.raises(RunError, match="'label'"):
        class_sums(scan, [0.03])


def test_a_scan_that_would_be_refused_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("unbraid.scanning.manifest._MOST_SUMS", 2 * (8 + 6))  # of 4 classes
    with pytest.raises(UsageError, match="number of class_names is 4, not 0 to 2"):
        unbraid.scan(build("1x1"), "layer", SyntheticImages(4), tmp_path / "scan")
    assert not (tmp_path / "scan").exists()


def test_groups_are_whole_numbers_even_of_a_shard_without_an_image(tmp_path):
    scan = unbraid.scan(
        build("1x1"), "layer", GroupedImages(130), tmp_path, skip_broken=True, positions=True
    )
    assert [shard.group.tolist() for shard in scan.shards()] == [[0] * 8, []]
    found = unbraid.find(scan, channels={0: [[0], [1]]})
    for method in ("published", "least_squares"):
        unbraid.evaluate(unbraid.split(scan, found, method=method), scan)
    assert unbraid.find(scan, tau="auto", concepts="clusters").note == ""


class GroupedImages(SyntheticImages):
    """The first eight images are sound."""

    groups = ("a",) * 130

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= 8:
            raise ValueError("broken")
        return super().__getitem__(index)


def test_no_tau_is_chosen_by_a_scan_without_an_image(tmp_path):
    scan = unbraid.scan(build("1x1"), "layer", SyntheticImages(9), tmp_path)
    records = replace(no_records(scan.layer, positions=False), broken=torch.arange(9))
    write_shard(scan.path, 0, records)
    opened = unbraid.open_scan(scan.path)
    assert opened.broken() == list(range(9))
    assert unbraid.find(opened).pairs == ()
    with pytest.raises(DataError, match="holds no image to choose tau by"):
        unbraid.find(opened, tau="auto")


def test_counts_for_many_thresholds_are_made_in_portions(scan, monkeypatch):
    whole = nearest_finding(scan, 0.5, 0.75, -1.0)
    monkeypatch.setattr("unbraid.finding.thresholds._COUNTS_AT_ONCE", 2 * 3 * 3)
    asked: list[int] = []

    def counted(scan: Scan, taus: list[float]) -> Any:
        asked.append(len(taus))
        return class_sums(scan, taus)

    monkeypatch.setattr("unbraid.finding.thresholds.class_sums", counted)
    assert nearest_finding(scan, 0.5, 0.75, -1.0) == whole
    assert max(asked) == 2
    assert len(asked) > 2


def test_a_split_that_cannot_be_is_refused(scan, tmp_path):
    found = unbraid.find(scan, channels={0: [[0], [1]]})
    path = tmp_path / "split.safetensors"
    split = unbraid.split(scan, found, method="published", rho=0.7)
    split.save(path)
    tensors, about = read_tensors(path)
    lies: dict[str, Any] = {
        "layer": {**about["layer"], "n_out": 0},
        "settings": {},
        "channels": [{"channel": 0, "concepts": [[0], [10**12]], "info": {}}],
        "clusters": {"9" * 5000: {"channel": 0, "place": 0, "least": 0.0}},
        "class_names": 7,
    }
    for name, value in lies.items():
        write_tensors(path, tensors, {**about, name: value})
        with pytest.raises(RunError, match="is not a split that can be read") as caught:
            Split.load(path)
        assert len(str(caught.value)) < 500
    write_tensors(path, {**tensors, "masks.0": tensors["masks.0"] + 2}, about)
    with pytest.raises(RunError, match="masks of channel 0"):
        Split.load(path)
    write_tensors(path, tensors, about)
    assert Split.load(path).channels[0].masks.equal(split.channels[0].masks)


# --- pictures and folders -------------------------------------------------------------------------


def png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(40_000, 40_000, zlib.compress(b"")), "decompression bomb"),
        (png(2**31 - 1, 1, zlib.compress(b"")), "cannot be read"),
        (png(10**6, 1, zlib.compress(bytes(10**6 + 1))), "sides are 1000000 and 1 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known kind"),
    ],
    ids=["bomb", "overflow", "strip", "program"],
)
def test_pictures_that_would_grow_or_run_are_refused(content, message, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_picture(path)
    path.write_bytes(png(200, 1, zlib.compress(bytes(201))))  # a strip that is not too long
    assert read_picture(path).size == (200, 1)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "1.png")
    return tmp_path / "data"


def test_links_in_circles_are_not_followed(classes):
    (classes / "a" / "up").symlink_to(classes)
    with pytest.raises(DataError, match="a/up is a link to a folder, which is not followed"):
        open_images(classes)
    (classes / "a" / "up").unlink()
    (classes / "a" / "2.png").symlink_to("2.png")
    images = open_images(classes)
    names = ("a/1.png", "a/2.png", "b/1.png")
    assert [path for path, _ in images.samples] == [str(classes / name) for name in names]
    with pytest.raises(DataError, match=r"a/2\.png cannot be read"):
        images[1]
    assert len(open_images(classes, labels={}).samples) == 3
    (classes / "c").symlink_to("c")
    with pytest.raises(DataError, match="/c is a link to what is not there"):
        open_images(classes)


@pytest.mark.parametrize(
    ("to", "message"),
    [(".", "is a link to a folder"), ("..", "is a link to a folder"), (None, "")],
)
def test_a_class_may_link_to_elsewhere_but_not_to_what_holds_it(to, message, classes, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "1.png")
    (classes / "c").symlink_to(to or tmp_path / "elsewhere")
    if to is None:
        assert open_images(classes).targets == [0, 1, 2]
        return
    with pytest.raises(DataError, match=message):
        open_images(classes)


def test_a_path_that_is_too_long_is_an_error_of_ours():
    with pytest.raises(DataError, match="cannot be read"):
        open_images("x" * 5000)


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r", " =", "＝", "＠"])  # noqa: RUF001
def test_spreadsheets_are_given_no_formula(start):
    cell = f"{start}cmd|' /C calc'!A0"
    text = csv_text(("name", "figure"), [(cell, -1.5), ("clock-face", 2)])
    assert f"'{cell}" in text.replace('"', "")
    assert ",-1.5\n" in text
    assert "\nclock-face,2\n" in text


def assert_short_cells(table: str, most: int) -> None:
    cells = [cell.strip() for line in table.splitlines() for cell in line.split("  ")]
    assert max(map(len, cells)) <= most


def test_names_of_a_million_characters_do_not_fill_the_screen():
    names = ("x" * 1_000_000, "\x1b]0;title\x07\u202e" + "y" * 1_000_000)
    pair = Pair(0, 0, 1, 0.1, 0.9, 0.9, 0.0, 0.2)
    found = Findings(0.03, 0.75, 0.5, (pair,), {0: ((0,), (1,))}, names, "", "layer", "0")
    text = str(found)
    assert_short_cells(text, 300)
    assert "\x1b" not in text
    assert "\u202e" not in text
    with pytest.raises(AssertionError):
        assert_short_cells("a  " + "x" * 301, 300)
    assert one_line("Ankle boot, 日本語, é") == "Ankle boot, 日本語, é"


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"title": 1, "thresholds": {}, "source": {}},
        {"title": "", "thresholds": {"tau": "rule"}, "source": {}},
        {"title": "", "thresholds": {"tau": [1]}, "source": {}},
        {"title": "", "thresholds": {"concepts": "x"}, "source": {}},
        {"title": "", "thresholds": {}, "source": {"data": 5}},
        {"title": "", "thresholds": {}, "source": {}, "scans": ["a", 1]},
        {"title": "", "thresholds": {}, "source": {}, "encoder": 3},
        [],
    ],
)
def test_settings_of_other_types_are_refused(settings, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(RunError, match="not that of a run"):
        read_settings(tmp_path)


# --- evaluations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", ["Infinity", "1e400", "NaN", "1.5", "true", '"7"', "1" * 5000])
def test_a_channel_of_no_whole_number_is_refused(channel, tmp_path):
    likeness = '{"monosemanticity": 0.5, "clarity": null}'
    semantics = (
        '{"encoder": "it", "n_images": 9, "n_top": 2, "positions": false, "crops": false, '
        f'"original": {likeness}, "concepts": [], "within": null, "between": 1.0}}'
    )
    path = tmp_path / "evaluation.json"
    path.write_text(f'{{"channels": [{{"channel": 7, "semantics": {semantics}}}]}}')
    known = read_semantics(path)
    assert known is not None
    assert known.channels[7].n_images == 9
    path.write_text(path.read_text().replace('"channel": 7', f'"channel": {channel}'))
    with pytest.raises(RunError, match="cannot be read"):
        read_semantics(path)
