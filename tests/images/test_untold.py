"""Nothing is left out of a scan without a word: other numbers than told, images out of reach."""

from __future__ import annotations

import errno
import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import Dataset, Subset

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError, OutOfReach
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import groups_of, labels_of
from unbraid.images.identity import fingerprint, ids_of
from unbraid.images.open import open_images as ImageFolder
from unbraid.images.pictures import decode_picture, read_picture


def scanned(dataset: Dataset[Any], out: Path, **options: Any) -> unbraid.Scan:
    return unbraid.scan(build("3x3"), "layer", dataset, out, batch_size=4, **options)


# --- other numbers than told ----------------------------------------------------------------------


class Ten(SyntheticImages):
    """Ten images, whatever is told of them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(10)
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], index % 4


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"targets": [0, 1, 2]}, "targets are 3 for 10 images"),
        ({"targets": [0] * 13}, "targets are 13 for 10 images"),
        ({"targets": torch.zeros(9)}, "targets are 9 for 10 images"),
        ({"targets": None, "labels": [0] * 3}, "labels are 3 for 10 images"),
        ({"ids": [*range(10)], "sizes": [1] * 4}, "sizes are 4 for 10 images"),
        ({"ids": [*range(10)], "sizes": torch.ones(11)}, "sizes are 11 for 10 images"),
        ({"root": "/", "samples": [("/a", 0)]}, "samples are 1 for 10 images"),
        ({"groups": [[1]] * 10}, r"groups cannot be compared \(unhashable"),
        ({"ids": [f"\ud800{k}" for k in range(10)]}, "cannot be written as UTF-8"),
    ],
)
def test_lists_that_do_not_fit_the_images_are_refused(told, match, tmp_path):
    dataset = Ten(**told)
    with pytest.raises(DataError, match=match):
        scanned(dataset, tmp_path / "scan")
    assert not (tmp_path / "scan").exists()
    if "labels" not in match and "targets" not in match:
        return
    with pytest.raises(DataError, match=match):
        labels_of(Subset(dataset, [0, 1]))


def test_lists_that_fit_are_taken():
    dataset = Ten(
        groups=["a", "b"] * 5, ids=["\udc80"] + [f"é{k}" for k in range(9)], sizes=[1] * 10
    )
    assert labels_of(dataset) == [k % 4 for k in range(10)]
    assert groups_of(dataset) == [0, 1] * 5
    assert ids_of(dataset) == dataset.ids
    assert fingerprint(dataset, labels_of(dataset)) != fingerprint(Ten(), labels_of(dataset))


# --- data sets without a list of labels -----------------------------------------------------------


class Listless(Dataset[Any]):
    """Labels come with the images only, of which the third is broken."""

    def __init__(self, label: Callable[[int], Any] = lambda index: index % 4) -> None:
        self.inner, self.label = SyntheticImages(9), label
        self.read: list[int] = []

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        if index == 2:
            raise OSError("truncated")
        return self.inner[index][0], self.label(index)


def test_a_broken_image_does_not_stop_the_search_for_labels(tmp_path):
    dataset = Listless()
    assert labels_of(dataset) == [0, 1, UNLABELLED, 3, 0, 1, 2, 3, 0]
    scan = scanned(dataset, tmp_path / "skipped", skip_broken=True)
    assert scan.broken() == [2]
    (records,) = scan.shards()
    assert records.label.tolist() == [0, 1, 3, 0, 1, 2, 3, 0]
    with pytest.raises(DataError, match=r"Image 2 of the data set cannot be read \(truncated\)"):
        scanned(dataset, tmp_path / "stopped")


def test_images_that_the_network_labels_are_not_read_for_their_labels(tmp_path):
    dataset = Listless()
    assert labels_of(dataset, needed=False) == [UNLABELLED] * 9
    assert dataset.read == []
    scan = scanned(dataset, tmp_path / "scan", skip_broken=True, labels="predicted")
    assert scan.broken() == [2]
    listed = SyntheticImages(9)
    expected = scanned(listed, tmp_path / "listed", labels="predicted")
    (records,), (others,) = scan.shards(), expected.shards()
    assert torch.equal(records.label, others.label[records.index])
    again = scanned(dataset, tmp_path / "scan", skip_broken=True, labels="predicted")
    assert again.broken() == [2]
    chosen = scanned(
        dataset, tmp_path / "chosen", skip_broken=True, labels="predicted", classes=[3]
    )
    assert [n for records in chosen.shards() for n in records.index.tolist()] == [3, 7]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_that_is_no_number_stops_the_scan_though_broken_images_do_not(workers, tmp_path):
    dataset = Listless(lambda index: None if index > 5 else 0)
    with pytest.raises(DataError, match=r"^The label of image 6 is a NoneType, not a class's"):
        scanned(dataset, tmp_path, skip_broken=True, labels="predicted", workers=workers)


def test_a_data_set_of_nothing_but_broken_images_is_not_one_without_labels(tmp_path):
    with pytest.raises(DataError, match=r"No image can be read: .*truncated"):
        scanned(Subset(Listless(), [2, 2]), tmp_path, skip_broken=True)


# --- broken, or out of reach ----------------------------------------------------------------------


class Failing(SyntheticImages):
    """From the sixth image on, reading fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__(9)
        self.error = error
        self.ids, self.sizes = [*range(9)], [1] * 9  # so that none is read for a fingerprint

    def __getitem__(self, index: int) -> Any:
        if index >= 5:
            raise self.error
        return super().__getitem__(index)


OF_SYSTEM = (
    *(OSError(number, "it fails") for number in (errno.EMFILE, errno.EIO, errno.ESTALE)),
    *(OSError(number, "it fails") for number in (errno.EACCES, errno.ENOTCONN, errno.ETIMEDOUT)),
    FileNotFoundError(errno.ENOENT, "No such file", "/no/such/folder/a.png"),
    MemoryError(),
)
OF_IMAGE = (
    OSError("image file is truncated"),
    OSError(errno.EINVAL, "Invalid argument"),
    ValueError("odd"),
    FileNotFoundError(errno.ENOENT, "No such file", f"{__file__}.png"),
    IsADirectoryError(errno.EISDIR, "Is a directory", "/"),
)


@pytest.mark.parametrize("error", OF_SYSTEM, ids=repr)
def test_what_the_system_fails_to_give_is_not_left_out_for_good(error, tmp_path):
    with pytest.raises(DataError, match=r"^Image 5 of the data set cannot be reached \(.*\); mend"):
        scanned(Failing(error), tmp_path, skip_broken=True)
    assert not list(tmp_path.glob("shard-*"))


@pytest.mark.parametrize("error", OF_IMAGE, ids=repr)
def test_what_is_damaged_itself_is_left_out(error, tmp_path):
    assert scanned(Failing(error), tmp_path, skip_broken=True).broken() == [5, 6, 7, 8]


def test_worker_processes_tell_what_is_out_of_reach_in_a_sentence(tmp_path):
    dataset = Failing(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(DataError, match=r"^Image 5 of the data set cannot be reached") as error:
        scanned(dataset, tmp_path, skip_broken=True, workers=2)
    assert "\n" not in str(error.value)


def test_a_fingerprint_is_not_made_of_what_could_be_reached(tmp_path):
    dataset = Failing(OSError(errno.EMFILE, "Too many open files"))
    dataset.ids = None
    with pytest.raises(OutOfReach, match="Too many open files"):
        fingerprint(dataset, dataset.targets)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for k in range(4):
        (tmp_path / "data/a").mkdir(parents=True, exist_ok=True)
        Image.effect_noise((6, 7), 50).convert("RGB").save(tmp_path / f"data/a/{k}.png")
    return tmp_path / "data"


def test_a_missing_file_is_broken_but_a_folder_that_is_gone_is_out_of_reach(pictures):
    (pictures / "a/2.png").unlink()
    with pytest.raises(
        DataError, match=r"2\.png cannot be read \(there is no such file\)"
    ) as error:
        read_picture(pictures / "a/2.png")
    assert not isinstance(error.value, OutOfReach)
    for path in (pictures / "a").iterdir():
        path.unlink()
    for _ in ("empty", "gone"):
        with pytest.raises(OutOfReach, match=r"folder .*data/a is gone or empty"):
            read_picture(pictures / "a/2.png")
        if (pictures / "a").exists():
            (pictures / "a").rmdir()


def test_a_link_into_a_folder_that_is_gone_is_out_of_reach(pictures):
    (pictures / "a/4.png").symlink_to("/no/such/folder/4.png")
    with pytest.raises(OutOfReach, match=r"a/4\.png .*folder /no/such/folder is gone"):
        read_picture(pictures / "a/4.png")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("call", ["os.stat", "PIL.Image.open"])
def test_no_file_is_called_missing_that_cannot_be_looked_at(call, number, pictures, monkeypatch):
    def fail(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(number, "it fails", str(path))

    path = pictures / "a/1.png"
    monkeypatch.setattr(call, fail)
    with pytest.raises(OutOfReach, match=r"^Image .*1\.png cannot be reached \(it fails\)"):
        read_picture(path)


def test_sizes_of_files_are_not_made_up_where_they_cannot_be_looked_at(pictures, monkeypatch):
    images = ImageFolder(pictures, labels={})

    def fail(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr("unbraid.images.identity.os.stat", fail)
    with pytest.raises(OutOfReach, match="Stale file handle"):
        fingerprint(images, images.targets)


# --- folders --------------------------------------------------------------------------------------


def test_a_dangling_link_to_an_image_is_a_broken_image(pictures):
    (pictures / "b").symlink_to("a")
    (pictures / "a/x.PNG").symlink_to("gone.png")
    for images in (ImageFolder(pictures), ImageFolder(pictures / "a")):
        place = [path for path, _ in images.samples].index(str(pictures / "a/x.PNG"))
        with pytest.raises(DataError, match=r"x\.PNG cannot be read \(there is no such file\)"):
            images[place]
    assert len(ImageFolder(pictures)) == 10


@pytest.mark.parametrize("link", ["b", "a/more"])
def test_a_dangling_link_that_may_be_a_folder_is_refused(link, pictures):
    (pictures / link).symlink_to("/no/such/folder")
    with pytest.raises(DataError, match=rf"{link} is a link to what is not there; mend or remove"):
        unbraid.open_images(pictures)


def test_the_lock_of_an_editor_is_no_fault(pictures):
    (pictures / "a/.#notes").symlink_to("someone@host.123")
    (pictures / ".#notes").symlink_to("someone@host.123")
    assert len(unbraid.open_images(pictures)) == 4


def test_a_link_to_a_folder_elsewhere_is_told(pictures, tmp_path):
    (tmp_path / "more").mkdir()
    (pictures / "a/more").symlink_to(tmp_path / "more")
    (pictures / "a/up").symlink_to(pictures)
    with pytest.warns(UserWarning, match=r"^1 links to folders are not followed.*a/more; put"):
        assert len(unbraid.open_images(pictures)) == 4


@pytest.mark.parametrize("where", ["", "a", "a/b"])
def test_a_folder_that_cannot_be_read_is_not_passed_over(where, pictures, monkeypatch):
    (pictures / "a/b").mkdir()
    (pictures / "a/0.png").rename(pictures / "a/b/0.png")
    listed = {name: getattr(os, name) for name in ("scandir", "listdir")}

    def refusing(name: str) -> Callable[..., Any]:
        def call(path: Any) -> Any:
            if Path(path) == pictures / where:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return listed[name](path)

        return call

    for name in listed:
        monkeypatch.setattr(os, name, refusing(name))
    with pytest.raises(DataError, match=rf"Folder {pictures / where} cannot be read \(Permission"):
        unbraid.open_images(pictures)


def test_every_kind_of_picture_that_is_read_is_listed_and_no_other_passed_over(pictures):
    kinds = {
        "GIF": ("gif", "GIF"),
        "JPEG": ("jpg", "jpeg", "jfif", "JPG"),
        "PPM": ("ppm", "pgm", "pbm", "pnm"),
        "TIFF": ("tif", "tiff"),
        "WEBP": ("webp",),
        "BMP": ("bmp",),
    }
    for kind, endings in kinds.items():
        for ending in endings:
            Image.new("RGB", (4, 4)).save(pictures / f"a/of {ending}.{ending}", kind)
    images = unbraid.open_images(pictures)
    assert len(images) == 4 + sum(map(len, kinds.values()))
    assert all(images.picture(k).mode == "RGB" for k in range(len(images)))
    (pictures / "a/notes.txt").touch()
    assert len(unbraid.open_images(pictures)) == len(images)
    for path in (pictures / "a/b.heic", pictures / "c.AVIF"):
        path.touch()
        with pytest.raises(DataError, match=rf"{path.name} is a picture of a kind that is not"):
            unbraid.open_images(pictures)
        path.unlink()


# --- switches of Pillow's that a program may have turned ------------------------------------------


def test_enormous_pictures_are_refused_whatever_pillow_was_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    head = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_001))
    content = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(DataError, match=r"cannot be read \(it has 200000000 pixels\)"):
        read_picture(tmp_path / "a.png")


@pytest.fixture
def cut_off(tmp_path: Path) -> Path:
    Image.effect_noise((200, 200), 50).convert("RGB").save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 3])
    return tmp_path / "a.jpg"


@pytest.mark.parametrize("switch", [False, True])
def test_a_picture_that_is_cut_off_is_refused_whatever_pillow_was_told(
    switch, cut_off, monkeypatch
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", switch)
    with pytest.raises(DataError, match="truncated"):
        read_picture(cut_off)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is switch


def test_threads_leave_the_switch_as_it_was(cut_off, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    told: list[str] = []

    def read() -> None:
        for _ in range(30):
            try:
                decode_picture(cut_off, "it")
            except DataError as error:
                told.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 120
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
