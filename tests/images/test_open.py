"""Sources of images: each gives the records that class folders give, or says what is wrong."""

from __future__ import annotations

import csv
import errno
import functools
import http.server
import io
import json
import os
import pickle
import re
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import unbraid
from checks import assert_same_files
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError, OutOfReach, RunError, UsageError
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import class_names_of, groups_of, labels_of, name_of, picture_of
from unbraid.images.identity import fingerprint, ids_of
from unbraid.images.labels import Outputs, read_classes
from unbraid.images.listing import Listing
from unbraid.images.open import (
    absolute,
    images_for,
    images_like,
    labelled,
    list_images,
    open_images,
    part_of,
)
from unbraid.images.open import open_images as ImageFolder
from unbraid.images.tar import expand
from unbraid.networks.models import LoadedModel
from unbraid.scanning.records import Scan
from unbraid.scanning.scan import as_scanned

CLASSES = ("ant", "bee")
MEMBERS = {"ant": 5, "bee": 3}  # images


def to_tensor(picture: Image.Image) -> Tensor:
    """What the networks of these tests take: (3, 7, 6), float64."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0).double() / 255


def save_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, (name, n) in enumerate(MEMBERS.items()):
        for k in range(n):
            save_picture(tmp_path / "images" / name / f"{k}.png", 10 * label + k)
    return tmp_path / "images"


def listed(folder: Path) -> list[tuple[str, str, int]]:
    """Path below the folder, class and label of every image, in order."""
    return [
        (f"{name}/{k}.png", name, label)
        for label, (name, n) in enumerate(MEMBERS.items())
        for k in range(n)
    ]


# --- the same images from every source ------------------------------------------------------------


def from_csv(folder: Path) -> Any:
    rows = [("path", "label"), *((path, name) for path, name, _ in listed(folder))]
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return open_images(folder / "list.csv", to_tensor)


def from_odd_csv(folder: Path) -> Any:
    """With a byte order mark, semicolons, other columns, quotes, blank lines; absolute paths."""
    text = 'note;label; path;weight\r\n"a;b";' + "\r\n\r\nx;".join(
        f'"{label}";{folder / path if label else "./" + path};3'
        for path, _, label in listed(folder)
    )
    (folder / "odd.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return open_images(folder / "odd.csv", to_tensor)


def from_tsv(folder: Path) -> Any:
    lines = ["label\tgroup\tpath", *(f"{name}\tg\t{path}" for path, name, _ in listed(folder))]
    (folder / "list.tsv").write_text("\n".join(lines))
    return open_images(str(folder / "list.tsv"), to_tensor)


def from_parquet(folder: Path, by_name: bool = True) -> Any:
    import pyarrow
    from pyarrow import parquet

    rows = listed(folder)
    labels = pyarrow.array([row[1 if by_name else 2] for row in rows])
    table = {
        "path": [row[0] for row in rows],
        "label": labels.dictionary_encode() if by_name else labels,
    }
    parquet.write_table(pyarrow.table(table), folder / "list.parquet")
    return open_images(folder / "list.parquet", to_tensor)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, sizes: tuple[int, ...], by_json: bool = False) -> list[Path]:
    """WebDataset shards, by the convention's own words rather than by a library."""
    rows, shards = listed(folder), []
    for k, size in enumerate(sizes):
        shards.append(folder.parent / "shards" / f"train-{k:03d}.tar")
        shards[-1].parent.mkdir(exist_ok=True)
        with tarfile.open(shards[-1], "w") as tar:
            for path, name, label in rows[:size]:
                key = path.removesuffix(".png")
                add(tar, f"{key}.PNG", (folder / path).read_bytes())
                if by_json:
                    add(tar, f"{key}.json", json.dumps({"label": name, "more": [1]}).encode())
                else:
                    add(tar, f"{key}.cls", f"{label}\n".encode())
                add(tar, f"{key}.mask.png", b"of no concern")
        rows = rows[size:]
    return shards


def from_tar(folder: Path) -> Any:
    return open_images(write_shards(folder, (8,))[0], to_tensor)


def from_json_tars(folder: Path) -> Any:
    return open_images(write_shards(folder, (3, 5), by_json=True)[0].parent, to_tensor)


def from_glob(folder: Path) -> Any:
    return open_images(write_shards(folder, (3, 1, 4))[0].with_name("train-*.tar"), to_tensor)


def from_range(folder: Path) -> Any:
    shards = write_shards(folder, (3, 1, 4))
    return open_images(shards[0].with_name("train-{000..002}.tar"), to_tensor)


def from_webdataset(folder: Path) -> Any:
    """As the library writes shards."""
    from webdataset import TarWriter

    with TarWriter(str(folder.parent / "written.tar")) as tar:
        for path, _, label in listed(folder):
            key = path.removesuffix(".png")
            tar.write({"__key__": key, "png": (folder / path).read_bytes(), "cls": label})
    return open_images(folder.parent / "written.tar", to_tensor)


def rows_of(folder: Path, **columns: Any) -> Any:
    import datasets

    content = {
        "image": [
            {"bytes": (folder / path).read_bytes(), "path": path} for path, *_ in listed(folder)
        ],
        "label": [label for *_, label in listed(folder)],
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    for name, (values, feature) in columns.items():
        content[name], features[name] = values, feature
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def from_rows(folder: Path) -> Any:
    return unbraid.from_hugging_face(rows_of(folder), transform=to_tensor)


def from_files_in_rows(folder: Path) -> Any:
    """Of paths alone, with names for labels, in columns of other names."""
    import datasets

    content = {
        "img": [str(folder / path) for path, *_ in listed(folder)],
        "kind": [name for _, name, _ in listed(folder)],
    }
    rows = datasets.Dataset.from_dict(content)
    return unbraid.from_hugging_face(rows, image="img", label="kind", transform=to_tensor)


def from_saved(folder: Path) -> Any:
    rows_of(folder).save_to_disk(folder.parent / "saved")
    return open_images(f"hf:{folder.parent / 'saved'}", to_tensor)


def from_saved_parquet(folder: Path) -> Any:
    (folder.parent / "parquet").mkdir()
    rows_of(folder).to_parquet(folder.parent / "parquet" / "train.parquet")
    return open_images(f"hf:{folder.parent / 'parquet'}", to_tensor)


def by_path(folder: Path) -> list[str]:
    return [path for path, *_ in listed(folder)]


def by_key(*sizes: int) -> Callable[[Path], list[str]]:
    def ids(folder: Path) -> list[str]:
        shards = [f"train-{k:03d}.tar" for k, size in enumerate(sizes) for _ in range(size)]
        keys = [path.removesuffix(".png") for path in by_path(folder)]
        return [f"{shard}/{key}" for shard, key in zip(shards, keys, strict=True)]

    return ids


def by_row(folder: Path) -> list[str]:
    """Saving to disk keeps the names of files but not of their folders, so that some are equal."""
    import datasets

    saved = datasets.load_from_disk(folder.parent / "saved")
    return [f"{saved._fingerprint}/{k}" for k in range(len(saved))]


SOURCES = {
    "csv": (from_csv, by_path),
    "odd csv": (from_odd_csv, by_path),
    "tsv": (from_tsv, by_path),
    "parquet": (from_parquet, by_path),
    "parquet of numbers": (functools.partial(from_parquet, by_name=False), by_path),
    "tar": (from_tar, by_key(8)),
    "folder of tars": (from_json_tars, by_key(3, 5)),
    "pattern": (from_glob, by_key(3, 1, 4)),
    "range": (from_range, by_key(3, 1, 4)),
    "webdataset's own": (
        from_webdataset,
        lambda folder: [f"written.tar/{path.removesuffix('.png')}" for path in by_path(folder)],
    ),
    "rows": (from_rows, by_path),
    "files in rows": (
        from_files_in_rows,
        lambda folder: [f"{folder}/{path}" for path in by_path(folder)],
    ),
    "saved": (from_saved, by_row),
    "saved as parquet": (from_saved_parquet, by_path),
}


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets", reason="needs .[datasets]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def scanned(images: Dataset[Any], out: Path, **options: Any) -> Scan:
    return unbraid.scan(build("3x3"), "layer", images, out, batch_size=3, **options)


def assert_same_records(scan: Scan, expected: Scan) -> None:
    """Bit for bit the same pooled inputs, shares and labels, image by image."""
    for name in ("index", "label", "prediction", "pooled", "share_start", "share_value"):
        for ours, theirs in zip(scan.columns(name), expected.columns(name), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.numpy().tobytes() == theirs.numpy().tobytes(), name


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_gives_the_records_of_class_folders(kind, folder, tmp_path):
    expected = scanned(ImageFolder(folder, to_tensor), tmp_path / "expected")
    make, ids = SOURCES[kind]
    images = make(folder)
    scan = scanned(images, tmp_path / "scan")
    assert_same_records(scan, expected)
    assert [one for records in scan.shards() for one in records.ids] == ids(folder)
    assert labels_of(images) == [label for *_, label in listed(folder)]
    assert name_of(images, 6) == ids(folder)[6]
    again = pickle.loads(pickle.dumps(images))  # as worker processes get it
    assert torch.equal(again[7][0], images[7][0])
    assert images.picture(7).mode == "RGB"


def test_other_pixels_are_noticed(folder, tmp_path):
    expected = scanned(ImageFolder(folder, to_tensor), tmp_path / "expected")
    save_picture(folder / "bee/1.png", 999)
    scan = scanned(from_tar(folder), tmp_path / "scan")
    with pytest.raises(AssertionError, match="pooled"):
        assert_same_records(scan, expected)


@pytest.mark.parametrize("kind", ["csv", "folder of tars", "saved"])
def test_worker_processes_read_a_source_too(kind, folder, tmp_path):
    images = SOURCES[kind][0](folder)
    for workers in (0, 2):
        scanned(images, tmp_path / str(workers), workers=workers)
    assert_same_files(tmp_path / "0", tmp_path / "2")


def test_class_names_and_groups_come_along(folder):
    assert from_tsv(folder).classes == list(CLASSES)
    assert groups_of(from_tsv(folder)) == [0] * 8
    assert groups_of(from_csv(folder)) is None
    assert from_odd_csv(folder).classes == ["0", "1"]
    assert from_rows(folder).classes == list(CLASSES)


def test_class_labels_of_hugging_face_keep_their_order(folder):
    import datasets

    rows = rows_of(folder, label=([2] * 3 + [0] * 5, datasets.ClassLabel(names=["z", "m", "a"])))
    images = unbraid.from_hugging_face(rows)
    assert labels_of(images) == [2] * 3 + [0] * 5
    assert images.classes == ["z", "m", "a"]


def test_rows_of_parquet_are_known_by_file_and_row_wherever_it_lies(folder, tmp_path):
    import datasets

    nameless = [{"bytes": (folder / path).read_bytes(), "path": None} for path in by_path(folder)]
    rows = rows_of(folder, image=(nameless, datasets.Image()))
    (tmp_path / "here").mkdir()
    rows.select(range(5)).to_parquet(tmp_path / "here/a.parquet")
    rows.select(range(5, 8)).to_parquet(tmp_path / "here/b.PARQUET")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    os.utime(tmp_path / "there/a.parquet", (1, 1))
    for place in ("here", "there"):
        images = open_images(f"hf:{tmp_path / place}")
        names = [f"a.parquet/{k}" for k in range(5)] + [f"b.PARQUET/{k}" for k in range(3)]
        assert ids_of(images) == names
        for k, path in enumerate(by_path(folder)):
            assert images.picture(k).tobytes() == Image.open(folder / path).tobytes()


def test_rows_without_paths_are_known_by_fingerprint_and_row(folder):
    import datasets

    nameless = [{"bytes": (folder / path).read_bytes(), "path": None} for path in by_path(folder)]
    rows = rows_of(folder, image=(nameless, datasets.Image()))
    ids = ids_of(unbraid.from_hugging_face(rows))
    assert ids == [f"{rows._fingerprint}/{k}" for k in range(8)]
    chosen = rows_of(folder).select([6, 1])
    assert ids_of(unbraid.from_hugging_face(chosen)) == ["bee/1.png", "ant/1.png"]


# --- ids ------------------------------------------------------------------------------------------


class WithIds(SyntheticImages):
    def __init__(self, ids: Any) -> None:
        super().__init__(4)
        self.ids = ids


def test_ids_are_those_of_the_source(folder):
    images = ImageFolder(folder)
    assert ids_of(images) == by_path(folder)
    assert ids_of(Subset(images, [6, 0])) == ["bee/1.png", "ant/0.png"]
    assert ids_of(Subset(images, [6, 6])) is None  # one image twice has no id of its own
    assert ids_of(SyntheticImages(4)) is None
    assert ids_of(WithIds(torch.arange(4))) == ["0", "1", "2", "3"]
    assert name_of(Subset(images, [6]), 0) == str(folder / "bee/1.png")


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (["a", "b", "a", "c"], "Two images have the id 'a'"),
        (["a", "b"], "ids are 2 for 4 images"),
        (["a", "b", "c", None], "NoneType"),
        (["1", 1, "2", "3"], "Two images have the id '1'"),
    ],
)
def test_ids_that_name_no_image_or_two_are_told_before_anything_is_written(ids, told, tmp_path):
    with pytest.raises(DataError, match=told):
        scanned(WithIds(ids), tmp_path / "scan")
    assert not (tmp_path / "scan").exists()


def test_the_fingerprint_knows_ids_and_sizes(folder, tmp_path):
    images = from_tar(folder)
    before = fingerprint(images, images.targets)
    assert fingerprint(from_tar(folder), images.targets) == before
    images.ids[0], images.ids[1] = images.ids[1], images.ids[0]
    assert fingerprint(images, images.targets) != before
    images = from_tar(folder)
    images.sizes[3] += 1
    assert fingerprint(images, images.targets) != before
    scanned(from_csv(folder), tmp_path / "scan")
    (folder / "bee/2.png").write_bytes((folder / "bee/2.png").read_bytes() + b"more")
    with pytest.raises(RunError, match="the images or labels"):
        scanned(from_csv(folder), tmp_path / "scan")


def test_damaged_ids_in_a_scan_are_told(folder, tmp_path):
    from unbraid.scanning.records import read_shard, write_shard

    scan = scanned(from_csv(folder), tmp_path / "scan")
    records = read_shard(scan.path, 0)
    for damage in (
        {"id_start": records.id_start[1:]},
        {"id_start": records.id_start.flip(0)},
        {"id_start": records.id_start + 1},
        {"id_bytes": records.id_bytes[:-1]},
        {"id_bytes": None},
    ):
        damaged = read_shard(scan.path, 0)
        vars(damaged).update(damage)
        write_shard(tmp_path / "scan", 0, damaged)
        with pytest.raises(RunError, match="holds"):
            list(scan.shards())
        write_shard(tmp_path / "scan", 0, records)
        assert next(scan.shards()).ids == by_path(folder)


class Picked(Dataset[Any]):
    """Some of a source's images, in another order."""

    def __init__(self, inner: Any, places: list[int]) -> None:
        self.inner, self.places = inner, places
        self.ids = [inner.ids[k] for k in places]
        self.targets = [inner.targets[k] for k in places]
        self.classes = inner.classes

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.inner[self.places[index]]

    def picture(self, index: int) -> Image.Image:
        return self.inner.picture(self.places[index])


def test_images_are_found_again_by_id_where_their_order_changed(folder, tmp_path):
    images = from_csv(folder)
    scan = scanned(images, tmp_path / "scan")
    assert as_scanned(images, scan) is images
    moved = as_scanned(Picked(images, [7, 3, 5, 0, 1, 6]), scan)  # 2 and 4 are gone
    assert len(moved) == 8
    for k in (0, 1, 3, 5, 6, 7):
        assert torch.equal(moved[k][0], images[k][0])
        assert moved[k][1] == images.targets[k] == labels_of(moved)[k]
        assert picture_of(moved, k).tobytes() == images.picture(k).tobytes()
    for read in (moved.__getitem__, lambda index: picture_of(moved, index)):
        with pytest.raises(DataError, match=r"Image ant/2\.png is gone"):
            read(2)
    assert name_of(moved, 4) == "ant/4.png"
    assert class_names_of(moved) == CLASSES
    assert labels_of(moved)[4] == UNLABELLED
    strangers = from_tar(folder)
    assert as_scanned(strangers, scan) is strangers  # no id is known: places must do


def test_a_report_shows_the_same_pictures_whatever_the_order(folder, tmp_path):
    images = from_csv(folder)
    scan = scanned(images, tmp_path / "scan", positions=True)
    found = unbraid.find(scan, channels={1: [[0], [1]]})
    split = unbraid.split(scan, found)

    def page(dataset: Any) -> bytes:
        path = tmp_path / "report.html"
        return unbraid.report(
            path, scan=scan, found=found, split=split, dataset=dataset
        ).read_bytes()

    turned = Picked(images, [*range(7, -1, -1)])
    assert page(images) == page(turned)
    assert b'title="\xe2\x81\xa8ant/3.png\xe2\x81\xa9"' in page(images)  # images go by their ids
    turned.ids = [f"{k}" for k in range(8)]  # of other names, so by place: other pictures
    turned.targets = images.targets
    turned.places = [1, 2, 3, 4, 0, 6, 7, 5]
    assert page(images) != page(turned)


# --- labels ---------------------------------------------------------------------------------------


def loaded(*names: str, n_outputs: int = 4) -> LoadedModel:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(n_outputs))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias.expand(len(x), n_outputs)

    return LoadedModel(Network(), to_tensor, names, {})


def test_classes_stand_for_outputs_by_the_rules_of_class_folders(folder):
    images, warning = images_for(loaded("bee", "cat", "ant", "dog"), str(from_and_name(folder)))
    assert (labels_of(images), warning) == ([2] * 5 + [0] * 3, "")
    assert images.classes == ["bee", "cat", "ant", "dog"]
    images, warning = images_for(loaded(), str(folder / "list.csv"))
    assert "taken in order" in warning
    from_odd_csv(folder)
    images, warning = images_for(loaded(n_outputs=2), str(folder / "odd.csv"))
    assert (labels_of(images), warning) == ([0] * 5 + [1] * 3, "")
    (folder / "list.csv").write_text("path,label\nant/0.png,a\nant/1.png,b\nant/2.png,c\n")
    with pytest.raises(DataError, match="3 classes but the network has 2 outputs"):
        images_for(loaded(n_outputs=2), str(folder / "list.csv"))
    (folder / "list.csv").write_text("path,label\nant/0.png,1\nant/1.png,2\n")
    with pytest.raises(DataError, match="a class of number 2, but the network's outputs go"):
        images_for(loaded(n_outputs=2), str(folder / "list.csv"))


def from_and_name(folder: Path) -> Path:
    from_csv(folder)
    return folder / "list.csv"


def test_numbers_from_one_on_are_not_taken_for_names_in_order():
    listing = Listing("it", [], lambda _: Image.new("RGB", (1, 1)), ["1", "2", "10"], [0, 1, 2])
    with pytest.raises(DataError, match="number 10"):
        read_classes(listing.known, Outputs((), 3))


def test_validation_images_get_the_labels_of_training(folder):
    train, _ = images_for(loaded("bee", "cat", "ant", "dog"), str(from_and_name(folder)))
    (folder / "val.csv").write_text("path,label\nbee/0.png,bee\n")
    val = images_like(train, str(folder / "val.csv"))
    assert (labels_of(val), val.classes) == ([0], train.classes)
    (folder / "val.csv").write_text("path,label\nbee/0.png,wasp\n")
    with pytest.raises(DataError, match="a class 'wasp' that the training images have not"):
        images_like(train, str(folder / "val.csv"))


def test_shards_without_labels_are_unlabelled(folder, tmp_path):
    with tarfile.open(tmp_path / "bare.tar", "w") as tar:
        for path in by_path(folder):
            add(tar, path, (folder / path).read_bytes())
    images, warning = images_for(loaded(), str(tmp_path / "bare.tar"))
    assert "images without labels; the network's predictions are taken" in warning
    assert set(labels_of(images)) == {UNLABELLED}
    assert not labelled(images)
    assert not labelled(images_like(images, str(from_and_name(folder))))
    assert labelled(from_csv(folder))
    with pytest.raises(UsageError, match="no labels"):
        scanned(images, tmp_path / "scan")
    assert labels_of(unbraid.from_hugging_face(rows_of(folder), label=None)) == [UNLABELLED] * 8


# --- where images are -----------------------------------------------------------------------------


def test_a_runs_data_is_found_by_part(folder, tmp_path):
    for part in ("train", "val"):
        (tmp_path / "run" / part).mkdir(parents=True)
    assert part_of(f"{tmp_path}/run", "val") == str(tmp_path / "run/val")
    (tmp_path / "run/val.csv").touch()
    assert part_of(f"{tmp_path}/run", "val") == str(tmp_path / "run/val.csv")
    assert part_of(f"{tmp_path}/run", "train") == str(tmp_path / "run/train")
    (tmp_path / "run/val.tar").touch()
    with pytest.raises(DataError, match=r"both val\.csv and val\.tar; keep one"):
        part_of(f"{tmp_path}/run", "val")
    assert part_of(f"hf:{tmp_path}/run", "val") == f"hf:{tmp_path}/run/val"
    (tmp_path / "run/val").rename(tmp_path / "run/validation")
    assert part_of(f"hf:{tmp_path}/run", "val") == f"hf:{tmp_path}/run/validation"


def test_sources_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a.csv") == str(tmp_path / "a.csv")
    assert absolute("hf:a") == f"hf:{tmp_path}/a"
    assert absolute("https://host/a-{0..1}.tar") == "https://host/a-{0..1}.tar"


def test_class_folders_beside_tar_files_are_class_folders(folder):
    tarfile.open(folder / "leftover.tar", "w").close()
    assert len(open_images(folder)) == 8


def test_no_tar_file_of_a_folder_is_passed_over(folder):
    shards = write_shards(folder, (3, 5))
    shards[1].rename(shards[1].with_suffix(".TAR"))
    assert len(open_images(shards[0].parent)) == 8
    assert part_of(str(shards[0].parent), "train-001") == str(shards[1].with_suffix(".TAR"))
    for ending in ("tar.gz", "TAR.ZST", "tgz"):
        packed = shards[0].with_name(f"more.{ending}")
        packed.touch()
        with pytest.raises(DataError, match=rf"more\.{ending} is compressed; unpack it"):
            open_images(shards[0].parent)
        packed.unlink()
    for path in shards[0].parent.iterdir():
        path.unlink()
    (shards[0].parent / "all.tar.gz").touch()
    with pytest.raises(DataError, match="is compressed"):
        open_images(shards[0].parent)


def test_pictures_of_other_kinds_in_a_shard_are_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", b"x")
        add(tar, "2.HEIC", b"x")
    with pytest.raises(DataError, match=r"2\.HEIC in .* is a picture of a kind that is not read"):
        open_images(tmp_path / "a.tar")


def test_ranges_are_written_out():
    assert expand("a{8..10}b{0..1}") == ["a8b0", "a8b1", "a9b0", "a9b1", "a10b0", "a10b1"]
    assert expand("{x}.tar") == ["{x}.tar"]
    for many in ("{0..99999999999}", "{0..999999}-{0..999999}.tar", "{1..1000}{1..1000}{1..2}"):
        with pytest.raises(UsageError, match="more than"):
            expand(many)


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """A server of two shards on this machine."""
    root = write_shards(folder, (3, 5))[0].parent

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    asked: list[str] = []
    handler = functools.partial(Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_shards_behind_a_url_are_fetched_once(address, folder, tmp_path):
    expected = scanned(ImageFolder(folder, to_tensor), tmp_path / "expected")
    url = address + "/train-{000..001}.tar"
    images = open_images(url, to_tensor)
    assert_same_records(scanned(images, tmp_path / "scan"), expected)
    assert ids_of(images) == by_key(3, 5)(folder)
    kept = sorted((tmp_path / "cache").rglob("*.tar"), key=lambda path: path.name)
    assert [path.name for path in kept] == ["train-000.tar", "train-001.tar"]
    for path in (folder.parent / "shards").iterdir():
        path.unlink()  # from now on, nothing can be fetched
    assert ids_of(open_images(url)) == by_key(3, 5)(folder)
    with pytest.raises(DataError, match=r"train-009\.tar cannot be fetched \(exit 22\)"):
        open_images(address + "/train-009.tar")
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert set((tmp_path / "cache").rglob("*.tar")) == set(kept)


# --- what is wrong is told ------------------------------------------------------------------------

GOOD = "path,label\nant/0.png,ant\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no column 'path'"),
        ("file,label\nant/0.png,ant", "no column 'path'"),
        ("path\nant/0.png", "no column 'label'"),
        ("path,label,path\na,b,c", "two columns 'path'"),
        ("path,label\n", "holds no image"),
        (GOOD + "ant/1.png\n", "Line 3 .* has 1 cells for 2"),
        (GOOD + "ant/1.png,a,b\n", "Line 3 .* has 3 cells for 2"),
        (GOOD + ",ant\n", "Line 3 .* has no text under 'path'"),
        (GOOD + "ant/1.png, \n", "Line 3 .* has the label ' '"),
        (GOOD + "ant/1.png,-1\n", "Line 3 .* has the label '-1'"),
        (GOOD + "bee/../ant/0.png,ant\n", "a second time"),
        (GOOD + "ant/none.png,ant\nant,ant", "2 of 3 files .* are not there, the first is"),
        (GOOD + "ant/\0.png,ant\n", "no text|line contains NUL"),
        (GOOD + "a" * 5000 + ",ant\n", "1 of 2 files"),
        (GOOD + '"ant/1.png,ant\n', "can be read"),
        (GOOD + f"ant/1.png,{'n' * 256}\n", "a label of 256 characters"),
        ("path,label\nant/0.png,99999999\n", "number 99999999"),
        ("path,label,group\nant/0.png,ant,\n", "no text under 'group'"),
        (b"path,label\nant/\xff.png,ant\n", "write UTF-8"),
        ("x" * (1 << 20), "a line without an end"),
    ],
)
def test_what_is_wrong_with_a_list_is_told(folder, content, told):
    (folder / "list.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=told) as error:
        open_images(folder / "list.csv")
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def fail_at(monkeypatch: pytest.MonkeyPatch, ending: str, number: int) -> None:
    """Let the system fail to look at a file."""
    look = os.stat

    def stat(path: Any, *rest: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(ending):
            raise OSError(number, os.strerror(number), str(path))
        return look(path, *rest, **options)

    monkeypatch.setattr(os, "stat", stat)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_files_of_a_list_that_cannot_be_looked_at_are_not_called_missing(
    number, folder, monkeypatch
):
    (folder / "list.csv").write_text(GOOD + "gone.png,ant\nant/1.png,ant\n")
    fail_at(monkeypatch, "ant/1.png", number)
    told = rf"ant/1\.png, which .*list\.csv names, cannot be reached \({os.strerror(number)}\);"
    with pytest.raises(OutOfReach, match=told):
        open_images(folder / "list.csv")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG])
def test_files_of_a_list_that_are_missing_are_not_called_out_of_reach(number, folder, monkeypatch):
    (folder / "list.csv").write_text(GOOD + "gone/gone.png,ant\nant/1.png,ant\n")
    fail_at(monkeypatch, "ant/1.png", number)
    with pytest.raises(DataError, match=r"2 of 3 files .* are not there, the first is") as error:
        open_images(folder / "list.csv")
    assert not isinstance(error.value, OutOfReach)


@pytest.mark.parametrize("source", ["list.csv", "list.parquet", "shards.tar"])
def test_a_source_that_cannot_be_looked_at_is_not_called_missing(source, folder, monkeypatch):
    from_parquet(folder)
    from_csv(folder)
    write_shards(folder, (8,))[0].rename(folder / "shards.tar")
    assert len(open_images(folder / source)) == 8
    fail_at(monkeypatch, source, errno.EACCES)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EACCES, "Permission denied", source)

    monkeypatch.setattr("pathlib.Path.open", fail)
    monkeypatch.setattr("pyarrow.parquet.read_schema", fail)
    with pytest.raises(
        OutOfReach, match=rf"{source} cannot be reached \(Permission denied\); mend"
    ):
        open_images(folder / source)


def test_folders_and_caches_that_cannot_be_looked_into_are_told(folder, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/unbraid").touch()  # a file, where a folder is needed
    with pytest.raises(DataError, match=r"cannot be fetched \(.*Not a directory"):
        open_images("http://127.0.0.1:9/a.tar")
    fail_at(monkeypatch, "a.tar", errno.EACCES)
    with pytest.raises(DataError, match=r"cannot be fetched \(.*Not a directory"):
        open_images("http://127.0.0.1:9/a.tar")

    def fail(path: Path) -> Any:
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(DataError, match=r"images cannot be read \(Permission denied\); mend that"):
        part_of(str(folder), "train")


def test_a_pipe_in_a_list_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "list.csv").write_text(GOOD + "pipe.png,ant\n")
    with pytest.raises(DataError, match="1 of 2 files"):
        open_images(folder / "list.csv")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"path": ["ant/0.png"]}, "no column 'label'"),
        ({"path": ["ant/0.png"], "label": [0.5]}, "Row 1 .* has the label 0.5"),
        ({"path": ["ant/0.png"], "label": [True]}, "has the label True"),
        ({"path": ["ant/0.png", None], "label": [0, 0]}, "Row 2 .* has no text under 'path'"),
        ({"path": ["ant/0.png"], "label": [None]}, "has the label None"),
        ({"path": ["ant/0.png"], "label": [-1]}, "has the label -1"),
        ({"path": [3], "label": [0]}, "no text under 'path'"),
        ({"path": ["ant/0.png"] * 2, "label": [0, 0]}, "a second time"),
        ({"path": ["ant/0.png"], "label": [0], "group": [None]}, "no text under 'group'"),
    ],
)
def test_what_is_wrong_with_a_parquet_list_is_told(folder, columns, told):
    pyarrow = pytest.importorskip("pyarrow", reason="needs .[parquet]")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), folder / "list.parquet")
    with pytest.raises(DataError, match=told):
        open_images(folder / "list.parquet")


@pytest.mark.parametrize(
    "kind", ["date32[day]", "timestamp[us]", "duration[s]", "decimal128(9, 0)", "list<", "binary"]
)
def test_parquet_of_dates_and_the_like_is_refused(kind, folder):
    """Python's own dates end long before those of Parquet."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs .[parquet]")
    from pyarrow import parquet

    late = pyarrow.array([2**31 - 1], pyarrow.int32())
    labels = {
        "date32[day]": late.cast(pyarrow.date32()),
        "timestamp[us]": pyarrow.array([2**62], pyarrow.timestamp("us")),
        "duration[s]": pyarrow.array([2**62], pyarrow.duration("s")),
        "decimal128(9, 0)": pyarrow.array([1], pyarrow.decimal128(9, 0)),
        "list<": pyarrow.array([[1]]),
        "binary": pyarrow.array([b"ant"]),
    }
    table = pyarrow.table({"path": ["ant/0.png"], "label": labels[kind]})
    parquet.write_table(table, folder / "list.parquet")
    with pytest.raises(DataError, match="has the label|no list that can be read"):
        open_images(folder / "list.parquet")


def test_a_saved_data_set_whose_images_end_before_they_begin_is_refused(folder):
    from_saved(folder)
    (path,) = (folder.parent / "saved").glob("*.arrow")
    content = path.read_bytes()
    ends = np.cumsum([0, *((folder / image).stat().st_size for image, *_ in listed(folder))])
    sound = ends.astype("<i4").tobytes()
    ends[3] += 2000
    assert content.count(sound) == 1
    path.write_bytes(content.replace(sound, ends.astype("<i4").tobytes()))
    with pytest.raises(DataError, match="saved is damaged"):
        open_images(f"hf:{folder.parent / 'saved'}")


def test_a_parquet_file_that_is_junk(folder):
    (folder / "list.parquet").write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")
    with pytest.raises(DataError, match="no list that can be read"):
        open_images(folder / "list.parquet")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyarrow", "list.parquet"),
        ("datasets", "hf:saved"),
        ("webdataset", "http://127.0.0.1:9/a.tar"),
    ],
)
def test_a_library_that_is_not_installed_is_told(module, source, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=f"pip install {module}"):
        open_images(source)


def test_sources_that_are_none(folder, tmp_path):
    for source, told in (
        ("nowhere", "There is no folder"),
        ("nowhere.csv", "No such file"),
        ("nowhere.tar", r"There is no shard .*nowhere\.tar"),
        ("nowhere-*.tar", "There is no shard"),
        ("images/ant/0.png", "is no source of images"),
    ):
        with pytest.raises(DataError, match=told):
            open_images(tmp_path / source)
    with pytest.raises(DataError, match="no data set that `save_to_disk` saved"):
        open_images(f"hf:{tmp_path}/nowhere")
    with pytest.raises(UsageError, match=r"Commands \(pipe:\) are not run"):
        list_images(f"pipe:touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()


def test_what_is_wrong_with_rows_is_told(folder):
    import datasets

    def told(rows: Any, match: str, error: type[Exception] = DataError, **columns: Any) -> None:
        with pytest.raises(error, match=match):
            unbraid.from_hugging_face(rows, **columns)

    rows = rows_of(folder)
    told(rows, "no column 'img' but image, label", image="img")
    told(rows, "no column 'kind'", label="kind")
    told(rows, "Column 'label' .* holds no images", image="label")
    told(datasets.DatasetDict(train=rows), "several splits; take one of train", UsageError)
    told(rows.to_iterable_dataset(), "is a IterableDataset; pass", UsageError)
    told(SyntheticImages(3), "is a SyntheticImages", UsageError)
    told(
        rows_of(folder, label=([0.5] * 8, datasets.Value("float32"))), "something else than classes"
    )
    told(rows_of(folder, label=([0] * 7 + [-1], datasets.Value("int64"))), "something else")
    told(rows_of(folder, label=([0] * 7 + [None], datasets.Value("int64"))), "something else")
    told(rows.select([]), "holds no image")


def test_broken_images_are_named_by_id(folder, tmp_path):
    import datasets

    (folder / "ant/2.png").write_bytes(b"no picture")
    for make in (from_csv, from_tar, from_rows):
        images = make(folder)
        with pytest.raises(DataError, match=r"ant/2(\.png)? cannot be read"):
            scanned(images, tmp_path / "stopped")
        out = tmp_path / make.__name__
        scan = scanned(images, out, skip_broken=True)
        assert scan.broken() == [2]
        assert len(next(scan.shards()).ids) == 7
    os.mkfifo(folder / "pipe.png")
    files = [{"bytes": None, "path": str(folder / name)} for name in ("gone.png", "pipe.png")]
    rows = rows_of(folder, image=([*files, None, *files, *files, None], datasets.Image()))
    images = unbraid.from_hugging_face(rows)
    for k, told in enumerate(("no such file", "no regular file", "nor a file's path")):
        with pytest.raises(DataError, match=told):
            images[k]
    shard = folder.parent / "shards/train-000.tar"
    images = from_tar(folder)
    shard.write_bytes(shard.read_bytes()[:1024])
    with pytest.raises(DataError, match=r"train-000\.tar was changed since it was listed; start"):
        images[7]
    shard.unlink()
    with pytest.raises(DataError, match=r"Image train-000\.tar/bee/2 cannot be read"):
        images[7]


@pytest.mark.parametrize(
    ("cell", "advice"),
    [
        ("ant/a", "add the ending .png to the names"),
        ("ant\\a.png", "write paths with / in place of \\"),
        ("ant/a.png ", "remove the blanks around paths"),
        ("https://a.org/ant/a.png", "give paths of files on this machine"),
        ("ant/b.png", "paths are relative to the list's folder"),
    ],
)
def test_a_list_of_files_that_are_not_there_says_what_to_do(cell, advice, tmp_path):
    (tmp_path / "ant").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "ant" / "a.png")
    (tmp_path / "list.csv").write_text(f"path,label\n{cell},ant\n")
    with pytest.raises(DataError, match=re.escape(f"; {advice}.")):
        unbraid.open_images(tmp_path / "list.csv")
