"""Folders of images: what is left out is told, and what cannot be read."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sources import (
    MEMBERS,
    as_tar,
)

from unbraid.base.errors import DataError
from unbraid.images.broken import UNLABELLED
from unbraid.images.labels import Outputs, read_classes
from unbraid.images.listing import Listing
from unbraid.images.open import open_images


def test_list_folder_images_beside_class_folders_are_refused(folder):
    Image.new("RGB", (4, 4)).save(folder / "cover.png")
    with pytest.raises(DataError, match=r"1 image of its own, such as cover\.png, and 8 in fold"):
        open_images(folder)
    assert open_images(folder, labels={}).targets == [UNLABELLED] * 9
    for path in folder.glob("*/*.png"):
        path.rename(path.with_suffix(".txt"))
    assert open_images(folder).targets == [UNLABELLED]


HIDDEN = (
    *(".hidden.png", "._a.png", "ant/._0.png", ".ipynb_checkpoints/a-checkpoint.png"),
    *("ant/.ipynb_checkpoints/0-checkpoint.png", "__MACOSX/ant/._0.png", "@eaDir/ant/thumb.jpg"),
    *("ant/@eaDir/thumb.jpg", ".git/logo.png", ".Trash/ant/0.png"),
)


@pytest.mark.parametrize("name", HIDDEN)
def test_list_images_hidden_files_and_those_of_programs_are_passed_over(name, folder, tmp_path):
    for place in (folder, folder / "bee"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"no picture")
    shards = as_tar(folder, MEMBERS).parent
    with tarfile.open(shards / "train-000.tar", "a") as tar:
        tar.add(folder / name, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_images(folder)) == len(open_images(shards)) == 8
        if not name.startswith("ant"):
            assert len(open_images(folder / "bee")) == 3
            (shards / name).parent.mkdir(parents=True, exist_ok=True)
            (shards / name).write_bytes(b"no picture")
            assert len(open_images(shards)) == 8


def test_list_folder_links(folder, tmp_path):
    (folder / "c").symlink_to("ant")
    (folder / "ant/x.PNG").symlink_to("gone.png")
    (folder / "ant/.#notes").symlink_to("someone@host.123")  # the lock of an editor
    (folder / ".#notes").symlink_to("someone@host.123")
    for images in (open_images(folder), open_images(folder / "ant")):
        index = [path for path, _ in images.samples].index(str(folder / "ant/x.PNG"))
        with pytest.raises(DataError, match=r"x\.PNG cannot be read \(there is no such file\)"):
            images[index]
    assert open_images(folder).targets == [0] * 6 + [1] * 3 + [2] * 6
    (folder / "c").unlink()
    (folder / "c").symlink_to(folder)
    with pytest.raises(DataError, match="link to a folder"):
        open_images(folder)
    (folder / "c").unlink()
    (folder / "ant/more").symlink_to(tmp_path)
    with pytest.raises(DataError, match="ant/more is a link to a folder, which is not followed"):
        open_images(folder)
    (folder / "ant/more").unlink()
    for link in ("b", "ant/new"):
        (folder / link).symlink_to("/no/such/folder")
        with pytest.raises(DataError, match=rf"{link} is a link to what is not there; mend or rem"):
            open_images(folder)
        (folder / link).unlink()


@pytest.mark.parametrize("where", ["", "ant", "ant/b"])
def test_list_folder_that_cannot_be_read_is_not_passed_over(where, folder, monkeypatch):
    (folder / "ant/b").mkdir()
    (folder / "ant/0.png").rename(folder / "ant/b/0.png")
    listed = {name: getattr(os, name) for name in ("scandir", "listdir")}

    def refusing(name: str) -> Callable[..., Any]:
        def call(path: Any) -> Any:
            if Path(path) == folder / where:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return listed[name](path)

        return call

    for name in listed:
        monkeypatch.setattr(os, name, refusing(name))
    with pytest.raises(DataError, match=rf"Folder {folder / where} cannot be read \(Permission"):
        open_images(folder)


def test_list_folder_every_kind_that_is_read_and_no_other_passed_over(folder):
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
            Image.new("RGB", (4, 4)).save(folder / f"ant/of {ending}.{ending}", kind)
    (folder / "ant/notes.txt").touch()
    images = open_images(folder)
    assert len(images) == 8 + sum(map(len, kinds.values()))
    assert all(images.picture(k).mode == "RGB" for k in range(len(images)))
    for path in (folder / "ant/b.heic", folder / "c.AVIF"):
        path.touch()
        with pytest.raises(DataError, match=rf"{path.name} is a picture of a kind that is not"):
            open_images(folder)
        path.unlink()


def test_by_class_numbers_from_one_on_are_not_taken_for_names_in_order():
    listing = Listing("it", [], lambda _: Image.new("RGB", (1, 1)), ["1", "2", "10"], [0, 1, 2])
    with pytest.raises(DataError, match="number 10"):
        read_classes(listing.known, Outputs((), 3))


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "deep/er/c.webp"):
        (tmp_path / "flat" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (len(name), 0, 0)).save(tmp_path / "flat" / name)
    (tmp_path / "flat/notes.txt").write_text("no image")
    return tmp_path / "flat"


def test_list_folder_without_classes_has_all_images_below_it_in_order(flat):
    images = open_images(flat, labels={}, class_names=("ant", "bee"))
    names = [str(Path(path).relative_to(flat)) for path, _ in images.samples]
    assert names == images.ids == ["a.jpg", "b.png", "deep/er/c.webp"]
    assert (images.targets, images.classes) == ([UNLABELLED] * 3, ["ant", "bee"])
    assert images[1][0].size == (8, 6)
    with pytest.raises(DataError, match=r"2 images of its own, .* 1 in folders, so it is not pl"):
        open_images(flat)
    shutil.rmtree(flat)
    flat.mkdir()
    with pytest.raises(DataError, match=r"holds no image \(.*\.png.*\); fill or remove it\."):
        open_images(flat, labels={})
