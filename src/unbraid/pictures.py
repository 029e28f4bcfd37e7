"""Image files, read as they are meant to be seen."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps

from unbraid.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def read_picture(path: str | Path) -> Image.Image:
    """Read an image file as it is meant to be seen: upright, RGB.

    Raises:
        DataError: it is truncated, enormous or no image; the message names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the error stays on
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
                if picture.mode.startswith("I"):  # 16-bit grey: convert() would clip, not scale
                    picture = picture.point(lambda v: v / 256).convert("L")
                elif picture.mode == "P":  # a palette may carry transparency
                    picture = picture.convert("RGBA")
                return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"Image {path} cannot be read ({error}).") from None
