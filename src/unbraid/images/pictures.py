"""Image files, read as they are meant to be seen."""

from __future__ import annotations

import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, TiffTags, UnidentifiedImageError

from unbraid.base.errors import DataError, UnfitPicture, brief, out_of_reach

# Pictures of more than 8 bits a sample, brought to 8, or refused where white is not known.


_SIGNED, _FLOAT = 2, 3  # TIFF's sample formats; 1 is unsigned
_NUMBERS = {
    1: "whole numbers",
    _SIGNED: "signed numbers",
    _FLOAT: "floating-point numbers",
    5: "complex numbers",
    6: "complex numbers",
}
_MAX_SAMPLE_VALUE = 281
# A picture that stays below this part of its range is dark, or its range is another one.
_LEAST = 1 / 4
_LOW_BYTES = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
_BOTH_BYTES = "RGBA"  # as which high and low byte of grey and alpha are read
SAVE = "save the pictures with 8 bits, black 0 and white 255, and start again"


class UnfitNumbers(Exception):
    """A picture's numbers cannot be read as from black to white; the message has no subject."""


@dataclass(frozen=True)
class Depth:
    """What a file says of its numbers."""

    bits: int = 8
    told: bool = False  # whether the file says that white is 2**bits - 1
    white_is_zero: bool = False
    rounded: bool = False  # whether Pillow rounds colours to 8 bits, where it else cuts
    fault: str = ""  # why they cannot be read


def depth_of(opened: Image.Image) -> Depth:
    """Say what numbers an opened picture holds, before its pixels are read."""
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        return _depth_of_tiff(opened)
    arguments = _arguments(opened)
    if opened.format == "PPM":
        # 8 bits are scaled by Pillow, and so is a maximum that is not the usual one.
        largest = arguments[1] if isinstance(arguments, tuple) else 65535
        if _is_deep(opened) or largest > 255:
            return Depth(16, told=largest != 65535, rounded=True)
        return Depth()
    return Depth(16) if _is_deep(opened) else Depth()


def to_eight_bits(
    picture: Image.Image, depth: Depth, open_again: Callable[[], Image.Image]
) -> Image.Image:
    """Bring a picture to 8 bits a sample; one that has them is returned as it is.

    Args:
        picture: read, and perhaps turned.
        depth: of the file.
        open_again: opens the file once more.

    Raises:
        UnfitNumbers: it is not known which of its values is white.
    """
    if depth.fault:
        raise UnfitNumbers(f"{depth.fault}; {SAVE}")
    if picture.mode == "F":
        return Image.fromarray(_from_floats(np.asarray(picture), depth.white_is_zero))
    if picture.mode.startswith("I"):
        return Image.fromarray(_from_integers(np.asarray(picture), depth))
    if depth.bits > 8 and not depth.told:
        _refuse_dark_colours(picture, depth, open_again)
    return picture


def unread_kind(file: BinaryIO) -> str:
    """Say what numbers a picture holds that Pillow does not read, empty if that is not the reason.

    >>> import io
    >>> unread_kind(io.BytesIO(b"no picture"))
    ''
    """
    prefix = file.read(16)
    for factory, accept in (Image.OPEN[kind] for kind in ("TIFF", "JPEG")):
        if accept is not None and accept(prefix) is True:
            file.seek(0)
            try:
                factory(file, "")
            except Exception as error:  # a damaged file fails in any way
                if "-bit layers" in str(error):
                    return "is a JPEG of values of other than 8 bits"
                if "unknown pixel mode" in str(error):
                    return _tiff_in_words(file)
    return ""


def mend_byte_order(opened: Image.Image) -> None:
    """Let Pillow read floats that libtiff unpacked in the machine's order, which it mixes up."""
    for tile in getattr(opened, "tile", ()):
        if tile.codec_name == "libtiff" and opened.mode == "F":
            opened.tile = [tile._replace(args=("F;32NF", *tile.args[1:]))]  # type: ignore[attr-defined]


def _arguments(opened: Image.Image) -> Any:
    """What Pillow's decoder is told of the bytes."""
    tiles = getattr(opened, "tile", None)
    return tiles[0].args if tiles else ""


def _is_deep(opened: Image.Image) -> bool:
    arguments = _arguments(opened)
    raw_mode = arguments[0] if isinstance(arguments, tuple) else arguments
    return opened.mode.startswith("I") or ";16" in str(raw_mode)


def _depth_of_tiff(opened: TiffImagePlugin.TiffImageFile) -> Depth:
    tags = opened.tag_v2
    bits = max(_numbers(tags.get(TiffImagePlugin.BITSPERSAMPLE, 1)))
    formats = set(_numbers(tags.get(TiffImagePlugin.SAMPLEFORMAT, 1)))
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if _SIGNED in formats or (bits > 16 and formats != {_FLOAT}):
        return Depth(fault=_tags_in_words(tags))
    palette = tags.get(TiffImagePlugin.COLORMAP, ())
    if palette and 0 < max(palette) < 256:  # Pillow keeps the high byte
        return Depth(fault="has a palette of nearly black colours")
    planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1)
    if bits > 8 and planes == 2 and len(opened.getbands()) > 1:  # Pillow mixes up their bytes
        return Depth(fault=f"{_tags_in_words(tags)}, plane by plane")
    if 8 < bits < 16:
        return Depth(bits, told=True, white_is_zero=white_is_zero)
    if bits == 16:
        largest = max(_numbers(tags.get(_MAX_SAMPLE_VALUE, 65535)))
        if 255 <= largest < 65535 and largest & (largest + 1) == 0:
            return Depth(largest.bit_length(), told=True, white_is_zero=white_is_zero)
    return Depth(bits, white_is_zero=white_is_zero)


def _numbers(value: Any) -> list[int]:
    return [int(v) for v in (value if isinstance(value, tuple) else (value,))]


def _tags_in_words(tags: Any) -> str:
    bits = _numbers(tags.get(TiffImagePlugin.BITSPERSAMPLE, 1))
    formats = _numbers(tags.get(TiffImagePlugin.SAMPLEFORMAT, 1))
    kind = _NUMBERS.get(formats[0], "numbers")
    samples = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, len(bits))
    several = f" in {samples} channels" if samples != 1 else ""
    return f"holds {kind} of {bits[0]} bits{several}"


def _tiff_in_words(file: BinaryIO) -> str:
    file.seek(0)
    head = file.read(8)
    if head[2] == 43 or head[3] == 43:  # BigTIFF
        head += file.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head)
    file.seek(tags.next)
    tags.load(file)
    photometric = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
    names = TiffTags.lookup(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION).enum
    name = next((name for name, value in names.items() if value == photometric), "unknown")
    return f"{_tags_in_words(tags)} ({name})"


def _from_floats(values: np.ndarray[Any, Any], white_is_zero: bool) -> np.ndarray[Any, Any]:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise UnfitNumbers(f"holds floating-point numbers that are not finite; {SAVE}")
    if low < 0 or high > 1:
        raise UnfitNumbers(
            f"holds floating-point numbers from {low:.4g} to {high:.4g}, of which only 0 to 1 "
            f"have a meaning; {SAVE}"
        )
    if 0 < high < _LEAST:
        raise UnfitNumbers(
            f"holds floating-point numbers of up to {high:.4g}, so it is dark, or 1 is not white; "
            f"{SAVE}"
        )
    scaled = 1 - values if white_is_zero else values
    return (scaled * 255 + 0.5).astype(np.uint8)


def _from_integers(values: np.ndarray[Any, Any], depth: Depth) -> np.ndarray[Any, Any]:
    largest = int(values.max())
    if depth.told and largest >= 2**depth.bits:
        raise UnfitNumbers(f"holds values of up to {largest}, but says {depth.bits} bits; {SAVE}")
    if not depth.told:
        _refuse_dark(largest)
    scaled = 2**depth.bits - 1 - values.astype(np.int32) if depth.white_is_zero else values
    # As Pillow does with colours; it undoes both usual ways from 8 bits to 16: v * 256, v * 257.
    return (scaled >> (depth.bits - 8)).astype(np.uint8)


def _refuse_dark(largest: int) -> None:
    if 0 < largest < 65536 * _LEAST:
        bits = max(8, largest.bit_length())
        bits += bits % 2  # as usual: 8, 10, 12, 14
        raise UnfitNumbers(
            f"holds 16-bit values below {2**bits}, so it is dark, or of {bits} bits; {SAVE} "
            f"(or multiply all by {2 ** (16 - bits)}, if {2**bits - 1} is white)"
        )


def _refuse_dark_colours(
    picture: Image.Image, depth: Depth, open_again: Callable[[], Image.Image]
) -> None:
    """Pillow keeps the high byte of each value, so what is dark shows in it, unless it is zero."""
    largest = _largest(picture)
    if largest:
        _refuse_dark(257 * largest - 128 if depth.rounded else 256 * largest)
    else:
        with open_again() as opened:
            _refuse_dark(_look_at_low_bytes(opened))


def _largest(picture: Image.Image) -> int:
    bands = picture.split()
    colours = [band for band, name in zip(bands, picture.getbands(), strict=True) if name != "A"]
    largest: list[Any] = [band.getextrema()[1] for band in colours]  # a number for each band
    return int(max(largest))


def _look_at_low_bytes(opened: Image.Image) -> int:
    """The largest low byte of a picture whose high bytes are all zero."""
    tiles = opened.tile  # type: ignore[attr-defined]
    opened.tile = [tile._replace(args=_of_low_bytes(tile.args)) for tile in tiles]  # type: ignore[attr-defined]
    if opened.tile[0].args == _BOTH_BYTES:  # type: ignore[attr-defined]
        return _largest(opened.getchannel("G"))
    return _largest(opened)


def _of_low_bytes(arguments: Any) -> Any:
    if not isinstance(arguments, tuple):
        return _BOTH_BYTES if arguments == "LA;16B" else _of_low_bytes((arguments,))[0]
    kind, _, order = arguments[0].partition(";")
    if not order:  # PNM, which Pillow scales: told of another maximum, it shows every value
        return (kind, 256)
    return (f"{kind};{_LOW_BYTES[order]}", *arguments[1:])


# Image files, read as they are meant to be seen.


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
