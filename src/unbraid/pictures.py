"""Image files, read as they are meant to be seen."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from unbraid.depths import SAVE, UnfitNumbers, depth_of, mend_byte_order, to_eight_bits, unread_kind
from unbraid.errors import DataError, UnfitPicture, brief, out_of_reach

# Pillow knows more kinds, one of which hands the file to a program of its own (PostScript).
_KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
_MOST_PIXELS = 178_956_970  # as many as Pillow reads, unless a program lifts its bound for all
_LONGEST = 200  # times its width may a picture be high: resizing keeps that, and its memory
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
UNREAD = (".avif", ".heic", ".heif", ".jp2", ".jxl", ".tga")  # pictures all the same


def read_picture(path: str | Path) -> Image.Image:
    """Read an image file as it is meant to be seen: upright, RGB.

    Raises:
        OutOfReach: the system fails to give it, though it may be sound.
        UnfitPicture: it is sound, but which of its numbers is white is not known.
        DataError: it is missing, truncated, enormous or no image; the message names the file.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # the latter for what can be no file's name
        away = out_of_reach(f"Image {path}", error)
        raise away or DataError(f"Image {path} cannot be read (there is no such file).") from None
    if not stat.S_ISREG(mode):  # opening a pipe might never end
        raise DataError(f"Image {path} cannot be read (it is no regular file).")
    return decode_picture(path, str(path))


def decode_picture(file: str | Path | BinaryIO, name: str) -> Image.Image:
    """Read an image as it is meant to be seen from a file, open or not.

    Raises:
        OutOfReach: the system fails to give it, though it may be sound.
        UnfitPicture: it is sound, but which of its numbers is white is not known.
        DataError: it is truncated, enormous or no image; the message gives the name.
    """
    try:
        with warnings.catch_warnings(), _truncated_refused():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the error stays on
            with Image.open(file, formats=_KINDS) as opened:
                if opened.width * opened.height > _MOST_PIXELS:
                    raise ValueError(f"it has {opened.width * opened.height} pixels")
                if max(opened.size) > _LONGEST * min(opened.size):
                    raise ValueError(f"its sides are {opened.size[0]} and {opened.size[1]} pixels")
                depth = depth_of(opened)
                mend_byte_order(opened)
                picture = to_eight_bits(
                    ImageOps.exif_transpose(opened),
                    depth,
                    lambda: Image.open(file, formats=_KINDS),
                )
                if picture.mode == "P":  # a palette may carry transparency
                    picture = picture.convert("RGBA")
                return picture.convert("RGB")
    except UnfitNumbers as error:
        raise UnfitPicture(f"Image {name} {error}.") from None
    except UnidentifiedImageError:  # an OSError whose text is about the file, not the image
        _refuse_unread_kind(file, name)
        raise DataError(f"Image {name} cannot be read (it is of no known kind).") from None
    except Exception as error:  # a damaged file fails in any way
        away = out_of_reach(f"Image {name}", error)
        raise away or DataError(f"Image {name} cannot be read ({brief(error)}).") from None


def _refuse_unread_kind(file: str | Path | BinaryIO, name: str) -> None:
    try:
        with open(file, "rb") if isinstance(file, (str, Path)) else nullcontext(file) as stream:
            stream.seek(0)
            kind = unread_kind(stream)
    except OSError:
        return
    if kind:
        raise UnfitPicture(f"Image {name} {kind}, which are not read; {SAVE}.")


_inside_lock = threading.Lock()
_n_inside = 0
_outside = False  # what the switch says outside


@contextmanager
def _truncated_refused() -> Iterator[None]:
    """Turn off Pillow's switch to fill up what is cut off; a program may have turned it on."""
    global _n_inside, _outside
    with _inside_lock:
        if _n_inside == 0:  # as other threads may be inside, of which the last puts it back
            _outside, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _n_inside += 1
    try:
        yield
    finally:
        with _inside_lock:
            _n_inside -= 1
            if _n_inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _outside
