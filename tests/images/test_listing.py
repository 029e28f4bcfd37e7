"""Folders of images: what is left out is told, and what cannot be read."""

import errno
import functools
import os
import tarfile
import warnings
from pathlib import Path

import pytest
from PIL import Image
from sources import MEMBERS, as_tar

from unbraid.base.errors import DataError
from unbraid.images.broken import UNLABELLED
from unbraid.images.open import open_images

HIDDEN = (".hidden.png", "ant/.ipynb_checkpoints/0.png", "__MACOSX/ant/._0.png", "@eaDir/a.jpg")
KINDS = {"GIF": "gif GIF", "JPEG": "jpg jpeg jfif JPG", "PPM": "ppm pgm pbm pnm"}
KINDS |= {"TIFF": "tif tiff", "WEBP": "webp", "BMP": "bmp"}


def test_list_folder_images_beside_class_folders_are_refused(folder):
    Image.new("RGB", (4, 4)).save(folder / "cover.png")
    with pytest.raises(DataError, match=r"1 image of its own, such as cover\.png, and 8 in fold"):
        open_images(folder)
    images = open_images(folder, labels={}, class_names=("ant", "bee"))
    assert (images.targets, images.classes) == ([UNLABELLED] * 9, ["ant", "bee"])
    assert (images.ids[0], images.ids[5], images.ids[8]) == ("ant/0.png", "bee/0.png", "cover.png")
    for path in folder.glob("*/*.png"):
        path.rename(path.with_suffix(".txt"))
    assert open_images(folder).targets == [UNLABELLED]
    (folder / "cover.png").unlink()
    with pytest.raises(DataError, match=r"holds no image \(.*\.png.*\); fill or remove it\."):
        open_images(folder, labels={})


@pytest.mark.parametrize("name", HIDDEN)
def test_list_images_hidden_files_and_those_of_programs_are_passed_over(name, folder, tmp_path):
    shards = as_tar(folder, MEMBERS).parent
    flat = not name.startswith("ant")
    for place in (folder, *((folder / "bee", shards) if flat else ())):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"no picture")
    with tarfile.open(shards / "train-000.tar", "a") as tar:
        tar.add(folder / name, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_images(folder)) == len(open_images(shards)) == 8
        assert len(open_images(folder / "bee")) == 3


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
    for link, target, told in (
        ("ant/more", tmp_path, "ant/more is a link to a folder, which is not followed"),
        ("c", ".", "c is a link to a folder"),
        ("c", "c", "c is a link to what is not there"),
        ("b", "/no/such/folder", "b is a link to what is not there; mend or remove it"),
        ("ant/new", "/no/such/folder", "ant/new is a link to what is not there; mend or remove it"),
    ):
        (folder / link).symlink_to(target)
        with pytest.raises(DataError, match=told):
            open_images(folder)
        (folder / link).unlink()


@pytest.mark.parametrize("where", ["", "ant", "ant/b"])
def test_list_folder_that_cannot_be_read_is_not_passed_over(where, folder, monkeypatch):
    (folder / "ant/b").mkdir()
    (folder / "ant/0.png").rename(folder / "ant/b/0.png")

    def refusing(listed, path):
        if Path(path) == folder / where:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, functools.partial(refusing, getattr(os, name)))
    with pytest.raises(DataError, match=rf"Folder {folder / where} cannot be read \(Permission"):
        open_images(folder)


def test_list_folder_every_kind_that_is_read_and_no_other_passed_over(folder):
    endings = [(kind, ending) for kind, some in KINDS.items() for ending in some.split()]
    for kind, ending in endings:
        Image.new("RGB", (4, 4)).save(folder / f"ant/of {ending}.{ending}", kind)
    (folder / "ant/notes.txt").touch()
    images = open_images(folder)
    assert len(images) == 8 + len(endings)
    assert all(images.picture(k).mode == "RGB" for k in range(len(images)))
    for path in (folder / "ant/b.heic", folder / "c.AVIF"):
        path.touch()
        with pytest.raises(DataError, match=rf"{path.name} is a picture of a kind that is not"):
            open_images(folder)
        path.unlink()
