"""Pictures of more than 8 bits a sample: read right, or refused in words; never black or white."""

from __future__ import annotations

import errno
import io
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.transforms import v2

import unbraid
from tiny_networks import build
from unbraid.base.errors import DataError, OutOfReach, UnfitPicture
from unbraid.images.pictures import decode_picture, read_picture

RAMP = np.linspace(0, 1, 64)[None].repeat(4, 0)
COLOURS = np.stack([RAMP, RAMP[:, ::-1], RAMP], -1)
KINDS = {"u": 1, "i": 2, "f": 3, "c": 6}
BACKWARDS = {"<": ">", ">": "<"}


def tiff(
    values: Any, dtype: str, photometric: int = 1, deflate: bool = False, **tags: Any
) -> bytes:
    """A TIFF of one strip, in the byte order that the type says."""
    order = dtype[0]
    values = np.asarray(values).astype(dtype)
    height, width, n = (*values.shape, 1)[:3]
    planes = tags.pop("planes", 1)
    content = (values if planes == 1 else values.transpose(2, 0, 1)).tobytes()
    content = zlib.compress(content) if deflate else content
    bits = 8 * values.dtype.itemsize
    entries: dict[int, tuple[int, ...]] = {
        **{256: (width,), 257: (height,), 258: (bits,) * n, 259: (8 if deflate else 1,)},
        **{262: (photometric,), 277: (n,), 278: (height,), 284: (planes,)},
        339: (KINDS[values.dtype.kind],) * n,
        **{int(name[3:]): tuple(np.atleast_1d(value)) for name, value in tags.items()},
    }
    n_strips = 1 if planes == 1 else n
    size = len(content) // n_strips
    entries[273] = tuple(8 + size * k for k in range(n_strips))
    entries[279] = (size,) * len(entries[273])
    at = 8 + len(content)
    directory, after = b"", b""
    end = at + 2 + 12 * len(entries) + 4
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(packed) > 4:
            value = struct.pack(f"{order}I", end + len(after))
            after += packed
        else:
            value = packed
        directory += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + value
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, at)
    n_entries = struct.pack(f"{order}H", len(entries))
    return head + content + n_entries + directory + bytes(4) + after


def chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def png(values: Any, colours: int) -> bytes:
    rows = np.asarray(values).astype(">u2")
    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, colours, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def pnm(values: Any, maximum: int, plain: bool = False) -> bytes:
    values = np.asarray(values).astype(">u2" if maximum > 255 else "u1")
    letter = (5 if values.ndim == 2 else 6) - 3 * plain
    head = f"P{letter}\n{values.shape[1]} {values.shape[0]}\n{maximum}\n".encode()
    return head + (" ".join(map(str, values.ravel())).encode() if plain else values.tobytes())


def with_alpha(values: Any) -> Any:
    values = values if np.ndim(values) == 3 else np.asarray(values)[..., None]
    return np.concatenate([values, np.full_like(values[..., :1], 65535)], -1)


def read(content: bytes) -> Any:
    return np.asarray(decode_picture(io.BytesIO(content), "it")).astype(int)


U16 = 65535
GREY: dict[str, Callable[[Any], bytes]] = {  # from 16-bit values, (height, width)
    "grey <u2": lambda v: tiff(v, "<u2"),
    "packed grey >u2": lambda v: tiff(v, ">u2", deflate=True),
    "png": lambda v: png(v, 0),
    "png, alpha": lambda v: png(with_alpha(v), 4),
}
COLOURED: dict[str, Callable[[Any], bytes]] = {  # (height, width, 3)
    "colours <u2": lambda v: tiff(v, "<u2", 2),
    "packed colours >u2": lambda v: tiff(v, ">u2", 2, deflate=True),
    "png, colours": lambda v: png(v, 2),
    "png, colours and alpha": lambda v: png(with_alpha(v), 6),
}
FORMS = {**GREY, **COLOURED}


def ramp(kind: str) -> Any:
    return COLOURS if kind in COLOURED or "ppm" in kind else RAMP


READ = {
    **{kind: FORMS[kind](ramp(kind) * U16) for kind in FORMS},
    "white is zero": tiff(U16 - RAMP * U16, "<u2", 0),
    "packed white is zero": tiff(U16 - RAMP * U16, "<u2", 0, deflate=True),
    "pgm": pnm(RAMP * 255, 255),
    "ppm": pnm(COLOURS * 255, 255),
}


@pytest.mark.parametrize("kind", READ)
def test_decode_picture_of_many_bits_goes_from_black_to_white(kind):
    values, expected = read(READ[kind]), ramp(kind) * 255
    expected = expected if expected.ndim == 3 else expected[..., None]
    assert np.abs(values - expected).max() <= 1.01
    assert (values.min(), values.max()) == (0, 255)


@pytest.mark.parametrize("kind", FORMS)
def test_decode_picture_of_one_colour_is_that_colour(kind):
    for white in (0.5, 1.0) if kind in COLOURED or "alpha" in kind else (0.0, 0.5, 1.0):
        values = np.zeros_like(ramp(kind)) + white
        assert np.abs(read(FORMS[kind](values * U16)) - 255 * white).max() <= 1


def test_decode_picture_of_16_bits_keeps_the_high_byte():
    every = np.arange(65536).reshape(256, 256)
    for kind in ("grey <u2", "packed grey >u2", "png"):
        assert (read(GREY[kind](every))[..., 0] == every >> 8).all()


@pytest.mark.parametrize("bits", [8, 12, 14])
@pytest.mark.parametrize("kind", [*FORMS, "white is zero"])
def test_decode_picture_of_fewer_bits_than_16_is_refused_with_what_to_do(kind, bits):
    form = FORMS.get(kind, lambda v: tiff(v, "<u2", 0))
    with pytest.raises(UnfitPicture, match=r"so it is dark, or of fewer bits; save .* 8 bits"):
        read(form(ramp(kind) * (2**bits - 1)))


def jpeg_of_12_bits() -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    at = content.index(b"\xff\xc0")
    content[at + 1], content[at + 4] = 0xC1, 12
    return bytes(content)


UNUSUAL = "is a TIFF of numbers or channels that are not read"
PNM = "PNM or PFM of more than 8 bits"
UNFIT = {
    "f4": (tiff(RAMP, "<f4"), "floating-point numbers of 32 bits"),
    "f2": (tiff(RAMP, "<f2"), UNUSUAL),
    "i1": (tiff(RAMP * 127, "<i1"), "signed numbers of 8 bits"),
    ">i2": (tiff(RAMP * 32767, ">i2"), "signed numbers of 16 bits"),
    "<i4": (tiff(RAMP * U16, "<i4"), "signed numbers of 32 bits"),
    "<u4": (tiff(RAMP * U16, "<u4"), "whole numbers of 32 bits"),
    "c8": (tiff(RAMP, "<c8"), UNUSUAL),
    "two channels": (tiff(COLOURS[..., :2] * U16, "<u2"), UNUSUAL),
    "planes": (tiff(COLOURS * U16, "<u2", 2, planes=2), "16-bit numbers plane by plane"),
    ">u2, white is zero": (tiff(RAMP * U16, ">u2", 0), UNUSUAL),
    "says 15 bits": (tiff(RAMP * 32767, "<u2", tag281=32767), "of which 32767 is white"),
    "jpeg": (jpeg_of_12_bits(), "is a JPEG of numbers"),
    "black colours": (png(COLOURS * 0, 2), "so it is dark"),
    "pfm": (b"Pf\n64 4\n-1.0\n" + RAMP.astype("<f4").tobytes(), PNM),
    "pgm, 65535": (pnm(RAMP * U16, U16), PNM),
    "ppm, 65535": (pnm(COLOURS * U16, U16), PNM),
    "ppm, 4095": (pnm(COLOURS * 4095, 4095), PNM),
    "plain pgm": (pnm(RAMP * 4095, 4095, plain=True), PNM),
    "palette": (
        tiff(RAMP * 255, "<u1", 3, tag320=[k for _ in range(3) for k in range(256)]),
        "palette of nearly black colours",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_decode_picture_of_other_numbers_is_refused_in_words(kind):
    content, message = UNFIT[kind]
    with pytest.raises(UnfitPicture, match=rf"^Image it .*{message}.* and start again") as caught:
        read(content)
    assert "\n" not in str(caught.value)


def test_decode_picture_that_is_cut_off_is_broken_not_unfit():
    for content in (tiff(RAMP * U16, "<u2")[:300], png(RAMP * U16, 0)[:90], b"no picture"):
        with pytest.raises(DataError, match="cannot be read") as caught:
            read(content)
        assert not isinstance(caught.value, UnfitPicture)


TRANSFORM = v2.Compose([v2.Resize((6, 6)), v2.PILToTensor(), v2.ToDtype(torch.float64, scale=True)])


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_a_scan_stops_at_a_picture_that_is_unfit_though_broken_ones_are_skipped(source, tmp_path):
    sound, unfit = tiff(RAMP * U16, ">u2"), tiff(RAMP * 4095, "<u2")
    (tmp_path / "data" / "a").mkdir(parents=True)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for name, content in {"0": sound, "1": b"broken", "2": sound, "3": unfit}.items():
            (tmp_path / "data" / "a" / f"{name}.tif").write_bytes(content)
            for ending, part in (("tif", content), ("cls", b"0")):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    where = tmp_path / ("data" if source == "folder" else "data.tar")

    def scan(out: str, indices: list[int]) -> unbraid.Scan:
        images = unbraid.open_images(str(where), TRANSFORM)
        return unbraid.scan(
            build("3x3"), "layer", images, tmp_path / out, indices=indices, skip_broken=True
        )

    assert scan("sound", [0, 1, 2]).broken() == [1]
    with pytest.raises(DataError, match=r"3(\.tif)? holds 16-bit numbers up to about 4095"):
        scan("unfit", [0, 1, 2, 3])


# --- switches of Pillow's that a program may have turned ------------------------------------------


def test_enormous_pictures_are_refused_whatever_pillow_was_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)

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


def test_pictures_that_are_cut_off_are_refused_whatever_pillow_was_told(cut_off, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    told: list[str] = []

    def read_often() -> None:
        for _ in range(30):
            with pytest.raises(DataError, match="truncated"):
                decode_picture(cut_off, "it")
            told.append("truncated")

    threads = [threading.Thread(target=read_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 120
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# --- files that cannot be read --------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "data/a").mkdir(parents=True)
    for k in range(4):
        Image.effect_noise((6, 7), 50).convert("RGB").save(tmp_path / f"data/a/{k}.png")
    return tmp_path / "data"


def test_read_picture_a_missing_file_is_broken_but_a_folder_that_is_gone_out_of_reach(pictures):
    path = pictures / "a/2.png"
    path.unlink()
    with pytest.raises(DataError, match=r"2\.png cannot be read \(there is no such file\)") as told:
        read_picture(path)
    assert not isinstance(told.value, OutOfReach)
    for other in (pictures / "a").iterdir():
        other.unlink()
    with pytest.raises(OutOfReach, match=r"folder .*data/a is gone or empty"):
        read_picture(path)
    path.symlink_to("/no/such/folder/4.png")
    with pytest.raises(OutOfReach, match=r"a/2\.png .*folder /no/such/folder is gone"):
        read_picture(path)
    path.unlink()
    (pictures / "a").rmdir()
    with pytest.raises(OutOfReach, match=r"folder .*data/a is gone or empty"):
        read_picture(path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("call", ["os.stat", "PIL.Image.open"])
def test_read_picture_calls_no_file_missing_that_cannot_be_looked_at(
    call, number, pictures, monkeypatch
):
    def fail(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(number, "it fails", str(path))

    path = pictures / "a/1.png"
    monkeypatch.setattr(call, fail)
    with pytest.raises(OutOfReach, match=r"^Image .*1\.png cannot be reached \(it fails\)"):
        read_picture(path)


# --- every mode and form --------------------------------------------------------------------------


MODES = {"png": "1 L LA P RGB RGBA", "jpg": "L RGB CMYK", "webp": "RGB RGBA", "tif": "1 P CMYK"}


@pytest.mark.parametrize(("kind", "modes"), MODES.items())
def test_read_picture_of_every_mode_comes_out_as_rgb(tmp_path: Path, kind: str, modes: str) -> None:
    for mode in modes.split():
        Image.new("L", (8, 6), 156).convert(mode).save(tmp_path / f"p.{kind}")
        read = read_picture(tmp_path / f"p.{kind}")
        assert (read.mode, read.size) == ("RGB", (8, 6))
        assert mode == "1" or abs(np.asarray(read).mean() - 156) < 3


def test_read_picture_of_a_rotated_photograph_turns_it_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (10, 4)).save(tmp_path / "p.jpg", exif=exif)
    assert read_picture(tmp_path / "p.jpg").size == (4, 10)
