"""TIFFs: pictures by Pillow, bands by tifffile, told apart by what the file holds."""

import builtins
import logging
import os
import threading
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from tensor_folders import save_tiff, write

import unbraid
from unbraid.base.errors import DataError, UnfitPicture
from unbraid.images import tiff
from unbraid.images.tensors import hold_tensors, read_tensor
from unbraid.images.tiff import holds_bands, read_bands

tifffile = pytest.importorskip("tifffile", reason="needs .[tiff]")

BANDS = np.arange(6 * 8 * 9, dtype=np.uint16).reshape(6, 8, 9)
LAST = np.ascontiguousarray(np.moveaxis(BANDS, 0, -1))
GREY = {"photometric": "minisblack"}
WRITTEN = {  # what is written, how, and what comes of it
    "plane by plane": (BANDS, {**GREY, "planarconfig": "separate"}, BANDS),
    "pixel by pixel": (LAST, {**GREY, "planarconfig": "contig"}, BANDS),
    "big": (LAST, {**GREY, "planarconfig": "contig", "bigtiff": True}, BANDS),
    "other byte order": (BANDS, {**GREY, "planarconfig": "separate", "byteorder": ">"}, BANDS),
    "tiles": (LAST, {**GREY, "planarconfig": "contig", "tile": (16, 16)}, BANDS),
    "deflate": (LAST, {**GREY, "planarconfig": "contig", "compression": "zlib"}, BANDS),
    "two": (BANDS[:2], {**GREY, "planarconfig": "separate"}, BANDS[:2]),
    "four": (BANDS[:4], {**GREY, "planarconfig": "separate"}, BANDS[:4]),
    "red, green, blue, infrared": (
        LAST[..., :4],
        {"photometric": "rgb", "extrasamples": ["unspecified"]},
        BANDS[:4],
    ),
    "floats": (BANDS.astype("f4"), {**GREY, "planarconfig": "separate"}, BANDS.astype("f4")),
    "pages": (BANDS, GREY, BANDS),
    "ImageJ's channels": (BANDS, {"imagej": True, "metadata": {"axes": "CYX"}}, BANDS),
    "ImageJ's slices": (BANDS, {"imagej": True, "metadata": {"axes": "ZYX"}}, BANDS[None]),
    "OME": (BANDS, {"ome": True, "metadata": {"axes": "CYX"}}, BANDS),
    "OME's volume": (
        np.stack([BANDS, BANDS + 1]),
        {"ome": True, "metadata": {"axes": "ZCYX"}},
        np.stack([BANDS, BANDS + 1], 1),
    ),
    "pages of pages": (
        np.stack([BANDS, BANDS + 1]),
        GREY,
        np.stack([BANDS, BANDS + 1]),
    ),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_bands_come_first_whatever_wrote_them(kind, tmp_path):
    values, options, expected = WRITTEN[kind]
    path = tmp_path / "a.tif"
    save_tiff(path, values, **options)
    assert holds_bands(str(path)) is True
    read = read_tensor(str(path))
    assert read.numpy().dtype == expected.dtype
    assert np.array_equal(read.numpy(), expected)


def test_compression_by_imagecodecs(tmp_path, monkeypatch):
    pytest.importorskip("imagecodecs", reason="needs .[tiff]")
    path = tmp_path / "a.tif"
    save_tiff(path, LAST, **GREY, planarconfig="contig", compression="lzw", predictor=2)
    assert np.array_equal(read_bands(str(path)).numpy(), BANDS)

    def asarray(*_, **__):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", asarray)
    with pytest.raises(UnfitPicture, match=r'only imagecodecs reads; .*"unbraid\[tiff\]"'):
        read_tensor(str(path))


def test_a_missing_library_is_told_in_a_sentence_and_stops(tmp_path, monkeypatch):
    root = write(tmp_path / "all", "tif", 2)
    real = builtins.__import__

    def without(name, *rest):
        if name == "tifffile":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    images = unbraid.open_images(root)  # that they are bands is known without it
    with pytest.raises(UnfitPicture, match=r'of several bands; install .*"unbraid\[tiff\]"'):
        images[0]


PICTURES = {
    **{mode: lambda path, mode=mode: Image.new(mode, (9, 8)).save(path) for mode in
       ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")},
    "pages that say nothing": lambda path: Image.new("L", (9, 8)).save(
        path, save_all=True, append_images=[Image.new("L", (9, 8))] * 5
    ),
    "one band": lambda path: save_tiff(path, BANDS[0], **GREY),
    "colours": lambda path: save_tiff(path, LAST[..., :3], photometric="rgb"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICTURES)
def test_ordinary_pictures_stay_pictures(kind, tmp_path):
    path = tmp_path / "a.tif"
    PICTURES[kind](path)
    assert holds_bands(str(path)) is False
    assert not hold_tensors([str(path)])


def test_one_kind_among_the_other_is_told(tmp_path):
    Image.new("RGB", (9, 8)).save(tmp_path / "a.tif")
    save_tiff(tmp_path / "b.tif", BANDS)
    images = unbraid.open_images(tmp_path)
    assert not images.of_tensors
    with pytest.raises(UnfitPicture, match=r"b\.tif is a TIFF of several bands, .* with three"):
        images[1]
    (tmp_path / "a.tif").rename(tmp_path / "c.tif")
    images = unbraid.open_images(tmp_path)
    assert images[0][0].shape == (6, 8, 9)
    with pytest.raises(DataError, match=r"c\.tif is of shape \(3, 8, 9\), and .*b\.tif of shape"):
        images[1]


@pytest.mark.parametrize(
    "options", [{}, {**GREY, "planarconfig": "contig", "rowsperstrip": 2}, GREY]
)
def test_a_tiff_cut_off_is_broken_and_says_nothing_else(options, tmp_path, caplog):
    path = tmp_path / "a.tif"
    values = LAST if "rowsperstrip" in options else BANDS
    save_tiff(path, values, **options)
    content = path.read_bytes()
    for at in (*range(0, len(content) - 20, 61), len(content) - 20):
        path.write_bytes(content[:at])
        with pytest.raises(DataError, match=r"a\.tif cannot be read \(") as caught:
            read_tensor(str(path))
        assert type(caught.value) is DataError
    assert not caplog.records
    logging.getLogger("tifffile").warning("heard")
    assert [record.message for record in caplog.records] == ["heard"]
    path.write_bytes(content)
    assert read_tensor(str(path)).shape == (6, 8, 9)


def test_a_tiff_larger_than_it_may_be_is_broken(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    save_tiff(path, BANDS)
    monkeypatch.setattr(tiff, "_MOST_BYTES", 4 * 6 * 8 * 9 - 1)
    with pytest.raises(DataError, match=r"says that it is of shape \(6, 8, 9\)"):
        read_tensor(str(path))
    monkeypatch.setattr(tiff, "_MOST_BYTES", 4 * 6 * 8 * 9)  # of 2 bytes there, and 4 here
    assert read_tensor(str(path)).shape == (6, 8, 9)


def test_other_files_that_a_tiff_names_are_never_opened(tmp_path):
    path = tmp_path / "a.tif"
    save_tiff(path, *WRITTEN["OME"][:1], **WRITTEN["OME"][1])
    text = tifffile.tiffcomment(path)
    (found,) = [part for part in text.split("<") if part.startswith("TiffData")]
    other = 'TiffData FirstC="3" IFD="3" PlaneCount="3"><UUID FileName="pipe.tif">urn:1</UUID>'
    tifffile.tiffcomment(path, text.replace(f"<{found}", f"<{other}</TiffData>"))
    os.mkfifo(tmp_path / "pipe.tif")  # opening it would never end
    ended = []

    def read():
        with pytest.raises(DataError, match="its OME text leads to other files"):
            read_tensor(str(path))
        ended.append(True)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(60)
    assert ended


def test_reading_tags_changes_no_warnings_of_other_threads(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    save_tiff(path, BANDS)
    real, n_inside, most = tiff.Tiff.ImageFileDirectory_v2.load, [0], [0]
    both = threading.Barrier(2, timeout=0.5)

    def load(tags, file):
        n_inside[0] += 1
        most[0] = max(most[0], n_inside[0])
        with suppress(threading.BrokenBarrierError):
            both.wait()  # until another thread has come here, or it does not
        real(tags, file)
        n_inside[0] -= 1

    monkeypatch.setattr(tiff.Tiff.ImageFileDirectory_v2, "load", load)
    before = list(warnings.filters)
    threads = [threading.Thread(target=holds_bands, args=(str(path),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert warnings.filters == before


def test_the_first_tiff_that_can_be_read_tells_however_many_cannot(tmp_path):
    for k in range(25):
        (tmp_path / f"{k:02}.tif").write_bytes(b"II*\x00 and no more")
    assert not unbraid.open_images(tmp_path).of_tensors
    save_tiff(tmp_path / "25.tif", BANDS)
    images = unbraid.open_images(tmp_path)
    assert images[25][0].shape == (6, 8, 9)
    with pytest.raises(DataError, match=r"24\.tif cannot be read"):
        images[24]


def test_the_tags_of_a_picture_are_read_once(tmp_path, monkeypatch):
    Image.new("RGB", (9, 8)).save(tmp_path / "a.tif")
    images = unbraid.open_images(tmp_path)

    def read_again(*_):
        raise AssertionError("tags are read again")

    monkeypatch.setattr(tiff, "_read_tags", read_again)
    monkeypatch.setattr("unbraid.images.pictures.are_bands", read_again)
    assert images[0][0].size == (9, 8)


def test_numbers_without_a_sign_go_in_as_they_are(tmp_path):
    save_tiff(tmp_path / "a.tif", BANDS + 60000)
    image = unbraid.open_images(tmp_path)[0][0]
    assert image.dtype == torch.float32
    assert float(image.min()) == 60000
