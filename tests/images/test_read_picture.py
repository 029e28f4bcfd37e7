"""Pictures of every mode and form come out as upright RGB, or are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unbraid.base.errors import DataError
from unbraid.images.pictures import read_picture


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "RGB", "LA", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
def test_read_picture_of_every_mode_comes_out_as_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    array = np.full((6, 8), 40000 if mode == "I;16" else 156, dtype=np.uint16)
    grey = Image.fromarray(array) if mode == "I;16" else Image.fromarray(array.astype(np.uint8))
    picture = grey if mode == "I;16" else grey.convert(mode)
    path = tmp_path / f"p.{kind}"
    writes = {"png": "1 L LA P RGB RGBA I;16", "jpg": "1 L RGB CMYK", "webp": "RGB RGBA"}
    if mode not in writes.get(kind, "1 L P RGB RGBA CMYK I;16").split():
        picture = Image.new("RGB", (8, 6), (156, 156, 156))
    picture.save(path)
    read = read_picture(path)
    assert (read.mode, read.size) == ("RGB", (8, 6))
    if mode != "1":
        assert abs(np.asarray(read).mean() - 156) < 3


def test_read_picture_of_a_rotated_photograph_turns_it_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (10, 4)).save(tmp_path / "p.jpg", exif=exif)
    assert read_picture(tmp_path / "p.jpg").size == (4, 10)


def test_read_picture_of_what_is_none_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for content in (whole[:500], b"no picture", whole):
        path.write_bytes(content)
        if content == whole:  # refused before it is unpacked
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(DataError, match=r"p\.png cannot be read"):
            read_picture(path)
