"""Pictures of more than 8 bits a sample: read right, or refused in words; never black or white."""

import errno
import io
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from sources import png, scanned, write_tar
from torchvision.transforms import v2

import unbraid
from unbraid.base.errors import DataError, OutOfReach, UnfitPicture
from unbraid.images.pictures import decode_picture, read_picture

RAMP = np.linspace(0, 1, 64)[None].repeat(4, 0)
COLOURS = np.stack([RAMP, RAMP[:, ::-1], RAMP], -1)
U16 = 65535
MODES = {"png": "1 L LA P RGB RGBA", "jpg": "L RGB CMYK", "webp": "RGB RGBA", "tif": "1 P CMYK"}
TRANSFORM = v2.Compose([v2.Resize((6, 6)), v2.PILToTensor(), v2.ToDtype(torch.float64, scale=True)])


def tiff(values, dtype, photometric=1, deflate=False, more=()):
    """A TIFF of one strip, in the byte order that the type says."""
    values = np.asarray(values).astype(dtype)
    height, width, n = (*values.shape, 1)[:3]
    content = zlib.compress(values.tobytes()) if deflate else values.tobytes()
    directory = ImageFileDirectory_v2({"<": b"II*\0", ">": b"MM\0*"}[dtype[0]] + bytes(4))
    tags = {256: width, 257: height, 258: (8 * values.dtype.itemsize,) * n, 262: photometric}
    tags |= {259: 8 if deflate else 1, 277: n, 278: height, 284: 1, 279: len(content)}
    tags |= {273: 0}  # where the strip is, which Pillow counts from the start
    tags |= {339: ("uif".index(values.dtype.kind) + 1,) * n, **dict(more)}
    for tag, value in tags.items():
        directory[tag] = value
    file = io.BytesIO()
    directory.save(file)
    return file.getvalue() + content


def pnm(values, maximum):
    values = np.asarray(values).astype(">u2" if maximum > 255 else "u1")
    kind = 5 if values.ndim == 2 else 6
    head = f"P{kind}\n{values.shape[1]} {values.shape[0]}\n{maximum}\n".encode()
    return head + values.tobytes()


def read(content):
    return np.asarray(decode_picture(io.BytesIO(content), "it")).astype(int)


def ramp(kind):
    return COLOURS if "colours" in kind else RAMP


FORMS = {  # from 16-bit values, (height, width), or of colours (height, width, 3)
    "grey <u2": lambda v: tiff(v, "<u2"),
    "packed grey >u2": lambda v: tiff(v, ">u2", deflate=True),
    "png": lambda v: png(v, 0),
    "png, alpha": lambda v: png(np.dstack([v, np.full(v.shape[:2], U16)]), 4),
    "colours <u2": lambda v: tiff(v, "<u2", 2),
    "packed colours >u2": lambda v: tiff(v, ">u2", 2, deflate=True),
    "png, colours": lambda v: png(v, 2),
    "png, colours and alpha": lambda v: png(np.dstack([v, np.full(v.shape[:2], U16)]), 6),
}
READ = {
    **{kind: FORMS[kind](ramp(kind) * U16) for kind in FORMS},
    "packed white is zero": tiff(U16 - RAMP * U16, "<u2", 0, deflate=True),
    "pgm": pnm(RAMP * 255, 255),
    "ppm of colours": pnm(COLOURS * 255, 255),
}
PNM = "PNM or PFM of more than 8 bits"
UNFIT = {
    "floats": (tiff(RAMP, "<f4"), "floating-point numbers of 32 bits"),
    "wide": (tiff(RAMP * U16, "<u4"), "whole numbers of 32 bits"),
    "planes": (tiff(COLOURS * U16, "<u2", 2, more={284: 2}), "16-bit numbers plane by plane"),
    "says 15 bits": (tiff(RAMP * 32767, "<u2", more={281: 32767}), "of which 32767 is white"),
    "pfm": (b"Pf\n64 4\n-1.0\n" + RAMP.astype("<f4").tobytes(), PNM),
    "ppm": (pnm(COLOURS * 4095, 4095), PNM),
    "palette": (tiff(RAMP * 255, "<u1", 3, more={320: (*range(256),) * 3}), "palette of nearly bl"),
}
BROKEN = {  # whatever a program lets Pillow read
    "cut": (tiff(RAMP * U16, "<u2")[:300], "cannot be read"),
    "none": (b"no picture", "of no known kind"),
    "enormous": (png(RAMP, 0, 8, (20_000, 10_000)), r"cannot be read \(it has 200000000 pixels\)"),
    "a line": (pnm(np.zeros((1, 300)), 255), "its sides are 300 and 1 pixels"),
}


@pytest.mark.parametrize("kind", READ)
def test_decode_picture_of_many_bits_goes_from_black_to_white(kind):
    values, expected = read(READ[kind]), np.atleast_3d(ramp(kind) * 255)
    assert np.abs(values - expected).max() <= 1.01
    assert (values.min(), values.max()) == (0, 255)
    whites = (0.5, 1.0) if "alpha" in kind or "colours" in kind else (0.0, 0.5, 1.0)
    for white in whites if kind in FORMS else ():  # of one colour
        flat = np.zeros_like(ramp(kind)) + white
        assert np.abs(read(FORMS[kind](flat * U16)) - 255 * white).max() <= 1
    if kind in ("grey <u2", "packed grey >u2", "png"):  # whose high bytes are kept
        every = np.arange(65536).reshape(256, 256)
        assert (read(FORMS[kind](every))[..., 0] == every >> 8).all()


@pytest.mark.parametrize("bits", [8, 12, 14])
@pytest.mark.parametrize("kind", [*FORMS, "white is zero"])
def test_decode_picture_of_fewer_bits_than_16_is_refused_with_what_to_do(kind, bits):
    form = FORMS.get(kind, lambda v: tiff(v, "<u2", 0))
    with pytest.raises(UnfitPicture, match=r"so it is dark, or of fewer bits; save .* 8 bits"):
        read(form(ramp(kind) * (2**bits - 1)))


@pytest.mark.parametrize("kind", [*UNFIT, *BROKEN])
def test_decode_picture_that_is_unfit_or_broken_is_refused_in_words(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    content, message = UNFIT.get(kind) or BROKEN[kind]
    message = rf"^Image it .*{message}.* and start again" if kind in UNFIT else message
    with pytest.raises(DataError, match=message) as caught:
        read(content)
    assert type(caught.value) is (UnfitPicture if kind in UNFIT else DataError)
    assert "\n" not in str(caught.value)


def test_decode_picture_that_is_cut_off_is_refused_whatever_pillow_was_told(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    Image.effect_noise((200, 200), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)

    def read_once(_):
        with pytest.raises(DataError, match="truncated"):
            read_picture(path)

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(read_once, range(100)))) == 100
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("source", ["data", "data.tar"])
def test_scan_stops_at_a_picture_that_is_unfit_though_broken_ones_are_skipped(source, tmp_path):
    sound, unfit = tiff(RAMP * U16, ">u2"), tiff(RAMP * 4095, "<u2")
    contents = {f"{k}.tif": content for k, content in enumerate((sound, b"-", sound, unfit))}
    (tmp_path / "data" / "a").mkdir(parents=True)
    for name, content in contents.items():
        (tmp_path / "data" / "a" / name).write_bytes(content)
    write_tar(tmp_path / "data.tar", *contents.items(), *((f"{k}.cls", b"0") for k in range(4)))
    images, options = unbraid.open_images(tmp_path / source, TRANSFORM), {"skip_broken": True}
    assert scanned(images, tmp_path / "sound", indices=[0, 1, 2], **options).broken() == [1]
    with pytest.raises(DataError, match=r"3(\.tif)? holds 16-bit numbers up to about 4095"):
        scanned(images, tmp_path / "unfit", **options)


def test_read_picture_a_missing_file_is_broken_but_a_folder_that_is_gone_out_of_reach(folder):
    path = folder / "bee/1.png"
    path.unlink()
    with pytest.raises(DataError, match=r"1\.png cannot be read \(there is no such file\)") as told:
        read_picture(path)
    assert not isinstance(told.value, OutOfReach)
    path.symlink_to("/no/such/folder/4.png")
    with pytest.raises(OutOfReach, match=r"bee/1\.png .*folder /no/such/folder is gone"):
        read_picture(path)
    shutil.rmtree(folder / "bee")
    for make in (lambda: None, (folder / "bee").mkdir):
        make()
        with pytest.raises(OutOfReach, match=r"folder .*/bee is gone or empty"):
            read_picture(path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("call", ["os.stat", "PIL.Image.open"])
def test_read_picture_out_of_reach_is_not_missing(call, number, folder, monkeypatch):
    monkeypatch.setattr(call, Mock(side_effect=OSError(number, "it fails")))
    with pytest.raises(OutOfReach, match=r"^Image .*1\.png cannot be reached \(it fails\)"):
        read_picture(folder / "bee/1.png")


@pytest.mark.parametrize(("kind", "modes"), MODES.items())
def test_read_picture_of_every_mode_comes_out_as_rgb(kind, modes, tmp_path):
    for mode in modes.split():
        Image.new("L", (8, 6), 156).convert(mode).save(tmp_path / f"p.{kind}")
        read = read_picture(tmp_path / f"p.{kind}")
        assert (read.mode, read.size) == ("RGB", (8, 6))
        assert mode == "1" or abs(np.asarray(read).mean() - 156) < 3


@pytest.mark.parametrize("kind", ["jpg", "tif"])
def test_read_picture_of_a_rotated_photograph_turns_it_upright(kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    steps = np.repeat(np.linspace(0, 250, 80, dtype=np.uint8)[None], 48, 0)
    Image.fromarray(steps).save(tmp_path / f"p.{kind}", exif=exif)
    read = np.asarray(read_picture(tmp_path / f"p.{kind}"))[..., 0].astype(int)
    assert np.abs(read - np.rot90(steps, -1)).max() < 8
