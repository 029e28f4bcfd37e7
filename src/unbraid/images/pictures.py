"""Image files, read as they are meant to be seen: upright, RGB, 8 bits from black to white."""

from __future__ import annotations

import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from unbraid.base.errors import DataError, UnfitPicture, brief, out_of_reach

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

_SIGNED, _FLOAT = 2, 3  # TIFF's sample formats; 1 is unsigned
_NUMBERS = {
    1: "whole numbers",
    _SIGNED: "signed numbers",
    _FLOAT: "floating-point numbers",
    5: "complex numbers",
    6: "complex numbers",
}
_BITS, _FORMAT = TiffImagePlugin.BITSPERSAMPLE, TiffImagePlugin.SAMPLEFORMAT
_PHOTOMETRIC = TiffImagePlugin.PHOTOMETRIC_INTERPRETATION
_MAX_SAMPLE_VALUE = 281
# A picture that stays below this part of its range is dark, or its range is another one.
_LEAST = 1 / 4
_LOW_BYTES = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
_BOTH_BYTES = "RGBA"  # as which high and low byte of grey and alpha are read

_SWITCH = threading.Lock()  # of Pillow's, which holds for all threads


def read_picture(path: str | Path) -> Image.Image:
    """Read an image file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # the latter for what can be no file's name
        away = out_of_reach(f"Image {path}", error)
        raise away or DataError(f"Image {path} cannot be read (there is no such file).") from None
    if not stat.S_ISREG(mode):  # opening a pipe might never end
        raise DataError(f"Image {path} cannot be read (it is no regular file).")
    return decode_picture(path, str(path))


def decode_picture(file: str | Path | BinaryIO, name: str) -> Image.Image:
    """Read an image from a file, open or not; errors are those of `read_picture`."""
    try:
        with _SWITCH, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the error stays on
            # Else what is cut off is filled up, where a program has turned this on.
            before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            try:
                return _decoded(file)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = before
    except UnfitNumbers as error:
        raise UnfitPicture(f"Image {name} {error}.") from None
    except UnidentifiedImageError:  # an OSError whose text is about the file, not the image
        kind = unread_kind(file)
        if kind:
            raise UnfitPicture(f"Image {name} {kind}, which are not read; {_SAVE}.") from None
        raise DataError(f"Image {name} cannot be read (it is of no known kind).") from None
    except Exception as error:  # a damaged file fails in any way
        away = out_of_reach(f"Image {name}", error)
        raise away or DataError(f"Image {name} cannot be read ({brief(error)}).") from None


def _decoded(file: str | Path | BinaryIO) -> Image.Image:
    with Image.open(file, formats=_KINDS) as opened:
        if opened.width * opened.height > _MOST_PIXELS:
            raise ValueError(f"it has {opened.width * opened.height} pixels")
        if max(opened.size) > _LONGEST * min(opened.size):
            raise ValueError(f"its sides are {opened.size[0]} and {opened.size[1]} pixels")
        depth = _depth_of(opened)
        for tile in getattr(opened, "tile", ()):
            if tile.codec_name == "libtiff" and opened.mode == "F":
                # Floats that libtiff unpacked in the machine's order, which Pillow mixes up.
                opened.tile = [tile._replace(args=("F;32NF", *tile.args[1:]))]
        upright = ImageOps.exif_transpose(opened)
        picture = _to_eight_bits(upright, depth, lambda: Image.open(file, formats=_KINDS))
        if picture.mode == "P":  # a palette may carry transparency
            picture = picture.convert("RGBA")
        return picture.convert("RGB")


def unread_kind(file: str | Path | BinaryIO) -> str:
    """Say what numbers a picture holds that Pillow does not read, empty if that is not the reason.

    >>> import io
    >>> unread_kind(io.BytesIO(b"no picture"))
    ''
    """
    for factory in (TiffImagePlugin.TiffImageFile, JpegImagePlugin.JpegImageFile):
        try:
            with open(file, "rb") if isinstance(file, (str, Path)) else nullcontext(file) as stream:
                stream.seek(0)
                factory(stream, "")
        except Exception as error:  # a damaged file, or one of another kind, fails in any way
            if "-bit layers" in str(error):
                return "is a JPEG of values of other than 8 bits"
            if "unknown pixel mode" in str(error):
                return "is a TIFF of numbers or channels of an unusual kind"
    return ""


# --- pictures of more than 8 bits, brought to 8, or refused where white is not known --------------


class UnfitNumbers(Exception):
    """A picture's numbers cannot be read as from black to white; the message has no subject."""

    def __init__(self, reason: str, more: str = "") -> None:
        """Say what to do, too."""
        super().__init__(f"{reason}; {_SAVE}{more}")


@dataclass(frozen=True)
class _Depth:
    """What a file says of its numbers."""

    bits: int = 8
    told: bool = False  # whether the file says that white is 2**bits - 1
    white_is_zero: bool = False
    rounded: bool = False  # whether Pillow rounds colours to 8 bits, where it else cuts


def _depth_of(opened: Image.Image) -> _Depth:
    """Say what numbers an opened picture holds, before its pixels are read."""
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        return _depth_of_tiff(opened)
    tiles = getattr(opened, "tile", None)
    arguments = tiles[0].args if tiles else ""  # what Pillow's decoder is told of the bytes
    raw_mode = arguments[0] if isinstance(arguments, tuple) else arguments
    deep = opened.mode.startswith("I") or ";16" in str(raw_mode)
    if opened.format != "PPM":
        return _Depth(16) if deep else _Depth()
    # 8 bits are scaled by Pillow, and so is a maximum that is not the usual one.
    largest = arguments[1] if isinstance(arguments, tuple) else 65535
    if deep or largest > 255:
        return _Depth(16, told=largest != 65535, rounded=True)
    return _Depth()


def _depth_of_tiff(opened: TiffImagePlugin.TiffImageFile) -> _Depth:
    tags = opened.tag_v2
    bits, formats = max(_numbers(tags, _BITS)), set(_numbers(tags, _FORMAT))
    white_is_zero = tags.get(_PHOTOMETRIC) == 0
    if _SIGNED in formats or (bits > 16 and formats != {_FLOAT}):
        raise UnfitNumbers(_tags_in_words(tags))
    palette = tags.get(TiffImagePlugin.COLORMAP, ())
    if palette and 0 < max(palette) < 256:  # Pillow keeps the high byte
        raise UnfitNumbers("has a palette of nearly black colours")
    planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1)
    if bits > 8 and planes == 2 and len(opened.getbands()) > 1:  # Pillow mixes up their bytes
        raise UnfitNumbers(f"{_tags_in_words(tags)}, plane by plane")
    if bits == 16:
        largest = max(_numbers(tags, _MAX_SAMPLE_VALUE, 65535))
        if 255 <= largest < 65535 and largest & (largest + 1) == 0:
            return _Depth(largest.bit_length(), told=True, white_is_zero=white_is_zero)
    return _Depth(bits, told=8 < bits < 16, white_is_zero=white_is_zero)


def _numbers(tags: Any, tag: int, usual: int = 1) -> list[int]:
    value = tags.get(tag, usual)
    return [int(v) for v in (value if isinstance(value, tuple) else (value,))]


def _tags_in_words(tags: Any) -> str:
    bits, formats = _numbers(tags, _BITS), _numbers(tags, _FORMAT)
    samples = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, len(bits))
    several = f" in {samples} channels" if samples != 1 else ""
    return f"holds {_NUMBERS.get(formats[0], 'numbers')} of {bits[0]} bits{several}"


def _to_eight_bits(
    picture: Image.Image, depth: _Depth, open_again: Callable[[], Image.Image]
) -> Image.Image:
    """Bring a picture to 8 bits a sample; one that has them is returned as it is."""
    if picture.mode == "F":
        return Image.fromarray(_from_floats(np.asarray(picture), depth.white_is_zero))
    if picture.mode.startswith("I"):
        return Image.fromarray(_from_integers(np.asarray(picture), depth))
    if depth.bits > 8 and not depth.told:
        # Pillow keeps the high byte of each value, so what is dark shows in it, unless it is zero.
        largest = _largest(picture)
        if largest:
            _refuse_dark(257 * largest - 128 if depth.rounded else 256 * largest)
        else:
            with open_again() as opened:
                _refuse_dark(_largest_low_byte(opened))
    return picture


def _from_floats(values: np.ndarray[Any, Any], white_is_zero: bool) -> np.ndarray[Any, Any]:
    low, high = float(values.min()), float(values.max())
    numbers = "holds floating-point numbers"
    if not np.isfinite(low) or not np.isfinite(high):
        raise UnfitNumbers(f"{numbers} that are not finite")
    if low < 0 or high > 1:
        raise UnfitNumbers(
            f"{numbers} from {low:.4g} to {high:.4g}, of which only 0 to 1 have a meaning"
        )
    if 0 < high < _LEAST:
        raise UnfitNumbers(f"{numbers} of up to {high:.4g}, so it is dark, or 1 is not white")
    scaled = 1 - values if white_is_zero else values
    return (scaled * 255 + 0.5).astype(np.uint8)


def _from_integers(values: np.ndarray[Any, Any], depth: _Depth) -> np.ndarray[Any, Any]:
    largest = int(values.max())
    if not depth.told:
        _refuse_dark(largest)
    elif largest >= 2**depth.bits:
        raise UnfitNumbers(f"holds values of up to {largest}, but says {depth.bits} bits")
    scaled = 2**depth.bits - 1 - values.astype(np.int32) if depth.white_is_zero else values
    # As Pillow does with colours; it undoes both usual ways from 8 bits to 16: v * 256, v * 257.
    return (scaled >> (depth.bits - 8)).astype(np.uint8)


def _refuse_dark(largest: int) -> None:
    if 0 < largest < 65536 * _LEAST:
        bits = max(8, largest.bit_length())
        bits += bits % 2  # as usual: 8, 10, 12, 14
        raise UnfitNumbers(
            f"holds 16-bit values below {2**bits}, so it is dark, or of {bits} bits",
            f" (or multiply all by {2 ** (16 - bits)}, if {2**bits - 1} is white)",
        )


def _largest(picture: Image.Image) -> int:
    bands = zip(picture.split(), picture.getbands(), strict=True)
    largest: list[Any] = [band.getextrema()[1] for band, name in bands if name != "A"]
    return int(max(largest))


def _largest_low_byte(opened: Image.Image) -> int:
    """The largest low byte of a picture whose high bytes are all zero."""
    tiles = opened.tile  # type: ignore[attr-defined]
    opened.tile = [tile._replace(args=_of_low_bytes(tile.args)) for tile in tiles]  # type: ignore[attr-defined]
    grey_and_alpha = opened.tile[0].args == _BOTH_BYTES  # type: ignore[attr-defined]
    return _largest(opened.getchannel("G") if grey_and_alpha else opened)


def _of_low_bytes(arguments: Any) -> Any:
    if not isinstance(arguments, tuple):
        return _BOTH_BYTES if arguments == "LA;16B" else _of_low_bytes((arguments,))[0]
    kind, _, order = arguments[0].partition(";")
    if not order:  # PNM, which Pillow scales: told of another maximum, it shows every value
        return (kind, 256)
    return (f"{kind};{_LOW_BYTES[order]}", *arguments[1:])
