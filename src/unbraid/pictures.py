"""Image files, read as they are meant to be seen."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from unbraid.errors import DataError, brief

# Pillow knows more kinds, one of which hands the file to a program of its own (PostScript).
_KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
_LONGEST = 200  # times its width may a picture be high: resizing keeps that, and its memory
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def read_picture(path: str | Path) -> Image.Image:
    """Read an image file as it is meant to be seen: upright, RGB.

    Raises:
        DataError: it is truncated, enormous or no image; the message names the file.
    """
    if not os.path.isfile(path):  # opening a pipe might never end
        raise DataError(f"Image {path} cannot be read (there is no such file).")
    return decode_picture(path, str(path))


def decode_picture(file: str | Path | BinaryIO, name: str) -> Image.Image:
    """Read an image as it is meant to be seen from a file, open or not.

    Raises:
        DataError: it is truncated, enormous or no image; the message gives the name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the error stays on
            with Image.open(file, formats=_KINDS) as opened:
                if max(opened.size) > _LONGEST * min(opened.size):
                    raise ValueError(f"its sides are {opened.size[0]} and {opened.size[1]} pixels")
                picture = ImageOps.exif_transpose(opened)
                if picture.mode.startswith("I"):  # 16-bit grey: convert() would clip, not scale
                    picture = picture.point(lambda v: v / 256).convert("L")
                elif picture.mode == "P":  # a palette may carry transparency
                    picture = picture.convert("RGBA")
                return picture.convert("RGB")
    except UnidentifiedImageError:  # an OSError whose text is about the file, not the image
        raise DataError(f"Image {name} cannot be read (it is of no known kind).") from None
    except Exception as error:  # a damaged file fails in any way
        raise DataError(f"Image {name} cannot be read ({brief(error)}).") from None
