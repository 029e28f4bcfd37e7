"""Image files, read as they are meant to be seen: upright, RGB, 8 bits from black to white."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL import TiffImagePlugin as Tiff

from unbraid.base.errors import DataError, UnfitPicture, brief, out_of_reach
from unbraid.base.tables import one_line
from unbraid.images.tiff import SWITCH, are_bands, has_bands

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
UNREAD = (".avif", ".heic", ".heif", ".jp2", ".jxl", ".tga")  # pictures all the same
# Pillow knows more kinds, one of which hands the file to a program of its own (PostScript).
_KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
_MOST_PIXELS = 178_956_970  # as many as Pillow reads, unless a program lifts its bound for all
_LONGEST = 200  # times its width may a picture be high: resizing keeps that, and its memory
_SAVE = "save the pictures with 8 bits, black 0 and white 255, and start again"
_WHITE = 65535  # of 16 bits
_DARK = _WHITE // 4  # what stays below is dark, or its range is another one
_NUMBERS = {2: "signed numbers", 3: "floating-point numbers", 5: "complex", 6: "complex"}  # of TIFF
_MAX_SAMPLE_VALUE = 281


class _UnfitNumbers(Exception):
    """A picture's numbers cannot be read as from black to white; the message has no subject."""


class _SeveralBands(Exception):
    """A TIFF is a tensor."""


def read_picture(path: str | Path) -> Image.Image:
    """Read an image file."""
    shown = f"Image {one_line(str(path))}"
    require_file(path, shown)
    try:
        # Opened here, as Pillow 13 maps a TIFF that it is given by name, and turns it wrongly.
        with open(path, "rb") as file:
            return decode_picture(file, str(path))
    except OSError as error:
        away = out_of_reach(shown, error)
        raise away or DataError(f"{shown} cannot be read ({brief(error)}).") from None


def require_file(path: str | Path, shown: str) -> None:
    """Raise DataError of an image that is no file, or is gone."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # the latter for what can be no file's name
        away = out_of_reach(shown, error)
        raise away or DataError(f"{shown} cannot be read (there is no such file).") from None
    if not stat.S_ISREG(mode):  # opening a pipe might never end
        raise DataError(f"{shown} cannot be read (it is no regular file).")


def decode_picture(file: BinaryIO, name: str) -> Image.Image:
    """Read an image from an open file."""
    shown = f"Image {one_line(name)}"
    try:
        with SWITCH, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the error stays on
            # Else what is cut off is filled up, where a program has turned this on.
            before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            try:
                return _decoded(file)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = before
    except _UnfitNumbers as error:
        raise UnfitPicture(f"{shown} {error}; {_SAVE}.") from None
    except _SeveralBands:
        raise _unfit_bands(shown) from None
    except UnidentifiedImageError:  # an OSError whose text is about the file, not the image
        if are_bands(file):
            raise _unfit_bands(shown) from None
        raise DataError(
            f"{shown} cannot be read (it is of no known kind or of numbers that are not read)."
        ) from None
    except Exception as error:  # a damaged file fails in any way
        away = out_of_reach(shown, error)
        raise away or DataError(f"{shown} cannot be read ({brief(error)}).") from None


def _unfit_bands(shown: str) -> UnfitPicture:
    return UnfitPicture(
        f"{shown} is a TIFF of several bands, not a picture; save pictures with three samples, "
        "red, green and blue, and keep tensors in a folder of their own."
    )


def _decoded(file: BinaryIO) -> Image.Image:
    with Image.open(file, formats=_KINDS) as opened:
        if opened.width * opened.height > _MOST_PIXELS:
            raise ValueError(f"it has {opened.width * opened.height} pixels")
        if max(opened.size) > _LONGEST * min(opened.size):
            raise ValueError(f"its sides are {opened.size[0]} and {opened.size[1]} pixels")
        if isinstance(opened, Tiff.TiffImageFile):
            if has_bands(opened.tag_v2, bool(opened.tag_v2.next)):
                raise _SeveralBands
            is_deep = _is_deep_tiff(opened)
            white_is_zero = opened.tag_v2.get(Tiff.PHOTOMETRIC_INTERPRETATION) == 0
        else:
            is_deep, white_is_zero = _is_deep(opened), False
        picture = ImageOps.exif_transpose(opened)
        if is_deep:
            picture = _to_eight_bits(picture, white_is_zero)
        if picture.mode == "P":  # a palette may carry transparency
            picture = picture.convert("RGBA")
        return picture.convert("RGB")


def _is_deep(opened: Image.Image) -> bool:
    """Whether an opened picture has 16 bits a sample; refuses PNM of more than 8."""
    tile = opened.tile[0] if getattr(opened, "tile", None) else None  # type: ignore[attr-defined]
    arguments: Any = getattr(tile, "args", "")  # what Pillow's decoder is told of the bytes
    if opened.format == "PPM":
        scaled = str(getattr(tile, "codec_name", "")).startswith("ppm")
        if opened.mode[0] in "IF" or (scaled and arguments[1] > 255):
            raise _UnfitNumbers("is a PNM or PFM of more than 8 bits")
        return False
    raw_mode = arguments[0] if isinstance(arguments, tuple) else arguments
    return opened.mode.startswith("I") or ";16" in str(raw_mode)


def _is_deep_tiff(opened: Tiff.TiffImageFile) -> bool:
    """Whether a TIFF has 16 bits a sample; refuses other numbers than whole ones of 8 or 16."""

    def values(tag: int, usual: int = 1) -> list[int]:
        value = opened.tag_v2.get(tag, usual)
        return [int(v) for v in (value if isinstance(value, tuple) else (value,))]

    bits, white = max(values(Tiff.BITSPERSAMPLE)), max(values(_MAX_SAMPLE_VALUE, _WHITE))
    odd = set(values(Tiff.SAMPLEFORMAT)) & _NUMBERS.keys()
    if odd or (bits > 8 and bits != 16):
        numbers = _NUMBERS[min(odd)] if odd else "whole numbers"
        raise _UnfitNumbers(f"holds {numbers} of {bits} bits")
    if 0 < max(values(Tiff.COLORMAP, _WHITE)) < 256:  # Pillow keeps the high byte
        raise _UnfitNumbers("has a palette of nearly black colours")
    if bits > 8 and values(Tiff.PLANAR_CONFIGURATION) == [2] and len(opened.getbands()) > 1:
        raise _UnfitNumbers("holds 16-bit numbers plane by plane")  # Pillow mixes up their bytes
    if bits > 8 and 255 <= white < _WHITE and white & (white + 1) == 0:
        raise _UnfitNumbers(f"holds 16-bit numbers of which {white} is white")
    return bits > 8


def _to_eight_bits(picture: Image.Image, white_is_zero: bool) -> Image.Image:
    """Keep the high byte; refuse what is so dark that white may be another number than 65535."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int32)
        largest = int(values.max())
        values = _WHITE - values if white_is_zero else values
        # As Pillow does with colours; it undoes both usual ways from 8 bits: v * 256, v * 257.
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    else:  # Pillow has kept the high bytes alone, so what is black may be very dark
        bands = zip(picture.split(), picture.getbands(), strict=True)
        highest: list[Any] = [band.getextrema()[1] for band, name in bands if name != "A"]
        largest = 256 * max(highest) or 1
    if 0 < largest <= _DARK:
        raise _UnfitNumbers(
            f"holds 16-bit numbers up to about {largest}, so it is dark, or of fewer bits"
        )
    return picture
