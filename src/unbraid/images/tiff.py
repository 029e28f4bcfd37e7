"""TIFFs of several bands, which are tensors: told from pictures by their tags, read by tifffile."""

from __future__ import annotations

import logging
import math
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import TiffImagePlugin as Tiff
from torch import Tensor

from unbraid.base.errors import UnfitPicture
from unbraid.base.tables import one_line

TIFF = (".tif", ".tiff")
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}  # samples, by what a TIFF says they are
_GREY = (0, 1)
_KIND, _DESCRIPTION, _N_SAMPLES, _EXTRA_SAMPLES = _NEEDED_TAGS = 262, 270, 277, 338
_UNSPECIFIED = 0  # of an extra sample that is no transparency
_BIG = 43  # of BigTIFF, whose offsets have 8 bytes
_OME = "<OME"
_STACKS = ("ImageJ=", '{"shape"', "<?xml", _OME)  # how a description of several pages begins
_MOST_BYTES = 2**31  # as float32, near what pictures may take: a few bytes may stand for any
_FLOAT = 4  # bytes
_NEEDED = 'install what reads them, pip install "unbraid[tiff]", and start again'

_Tags = dict[int, Any]  # of a page, None where it lacks one

SWITCH = threading.Lock()  # of filters of warnings and Pillow's switches, which threads share


def holds_bands(path: str) -> bool | None:
    """Whether a TIFF holds bands, not a picture; None if it cannot be read.

    Bands are more samples than its colours and a transparency, or pages that the file itself says
    belong together, as tifffile, ImageJ and OME write them.
    """
    try:
        with open(path, "rb") as file:
            return are_bands(file)
    except Exception:  # there is no such file, or what is none
        return None


def are_bands(file: BinaryIO) -> bool | None:
    """What `holds_bands` says, of an open file."""
    try:
        first = _read_tags(file, 2)
        return has_bands(first[0], len(first) > 1)
    except Exception:  # a damaged file fails in any way
        return None


def has_bands(tags: Mapping[int, Any], is_followed: bool) -> bool:
    """Whether a TIFF of such a first page, followed by others or not, holds bands."""
    first = {tag: tags.get(tag) for tag in _NEEDED_TAGS}
    return (is_followed and _is_stack(first)) or _has_more_samples(first)


def _read_tags(file: BinaryIO, most: int | None = None) -> list[_Tags]:
    """Read what is needed of each page's tags; ValueError if the pages do not come to an end."""
    found: list[_Tags] = []
    seen = set[int]()
    with SWITCH, warnings.catch_warnings():
        file.seek(0)
        head = file.read(8)
        if head[2] == _BIG:
            head += file.read(8)
        tags = Tiff.ImageFileDirectory_v2(head)
        while tags.next and len(found) != most:
            if tags.next in seen:
                raise ValueError("its pages lead round in a circle")
            seen.add(tags.next)
            file.seek(tags.next)
            warnings.simplefilter("error")  # as of tags that are cut off
            tags.load(file)
            warnings.simplefilter("ignore")
            found.append({tag: tags.get(tag) for tag in _NEEDED_TAGS})
    return found


def _is_stack(tags: _Tags) -> bool:
    """Whether a first page's description says that the pages after it belong to it."""
    text = str(tags[_DESCRIPTION] or "").lstrip()
    return text.startswith(_STACKS) and (not text.startswith("<?xml") or _OME in text)


def _has_more_samples(tags: _Tags) -> bool:
    """Whether a page has more samples than a picture."""
    kind, n_samples, said = tags[_KIND] or 0, tags[_N_SAMPLES] or 1, tags[_EXTRA_SAMPLES]
    n_extra = n_samples - _COLOURS.get(kind, n_samples)
    if n_extra == 1 and said is None:  # of colours that is a transparency, as writers forget
        return kind in _GREY
    values = said if isinstance(said, tuple) else (said,)
    return n_extra > 1 or (n_extra == 1 and _UNSPECIFIED in values)


def read_bands(path: str) -> Tensor:
    """Read a TIFF's numbers: bands (C, H, W), or a stack over time or depth (C, T, H, W).

    Raises:
        UnfitPicture: a library is missing.
        ValueError: it is cut off, or something else than rows of pixels.
    """
    shown = f"Image {one_line(path)}"
    try:
        import tifffile
    except ImportError:
        raise UnfitPicture(f"{shown} is a TIFF of several bands; {_NEEDED}.") from None
    with open(path, "rb") as opened:
        tags = _read_tags(opened)
    is_stack = len(tags) > 1 and _is_stack(tags[0])
    # What a text in it names may be any file, a pipe too, so no other one is opened.
    alone: dict[str, Any] = {"_multifile": False, "is_mmstack": False, "is_ndtiff": False}
    with _quiet(), tifffile.TiffFile(path, **alone) as file:
        first = file.pages[0]
        part: Any = file.series[0] if is_stack else first
        if is_stack and _OME in str(tags[0][_DESCRIPTION]) and part.kind.lower() != "ome":
            raise ValueError("its OME text leads to other files, or is damaged")
        if math.prod(part.shape) * max(part.dtype.itemsize, _FLOAT) > _MOST_BYTES:
            raise ValueError(f"it says that it is of shape {part.shape}")
        _require_all(part.pages if is_stack else [first], os.path.getsize(path))
        try:
            array = part.asarray(maxworkers=1)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise UnfitPicture(
                f"{shown} is compressed as only imagecodecs reads; {_NEEDED}."
            ) from None
        return torch.from_numpy(_in_order(array, part.axes))


def _require_all(pages: Any, size: int) -> None:
    """Raise ValueError unless all of a file's pixels lie in it; tifffile would fill them up."""
    for page in pages:
        ends = page and map(sum, zip(page.dataoffsets, page.databytecounts, strict=False))
        if page is None or max(ends, default=0) > size:
            raise ValueError("it is cut off")


def _in_order(array: np.ndarray[Any, Any], axes: str) -> np.ndarray[Any, Any]:
    """Bring axes, named as tifffile names them, to bands, then time and depth, then the picture."""
    if "Y" not in axes or "X" not in axes:
        raise ValueError(f"its axes are {axes}")
    bands = [k for k, axis in enumerate(axes) if axis in "CS"]
    picture = [axes.index("Y"), axes.index("X")]
    others = [k for k in range(len(axes)) if k not in (*bands, *picture)]
    if not bands and others and axes[others[0]] not in "TZ":  # not named, so bands as they stand
        bands = [others.pop(0)]
    shape = [array.shape[k] for k in (*others, *picture)]
    ordered = array.transpose(*bands, *others, *picture).reshape(-1, *shape)
    return np.ascontiguousarray(ordered, ordered.dtype.newbyteorder("="))


@contextmanager
def _quiet() -> Iterator[None]:
    """Let tifffile say nothing of what is odd in a file, as it is read or refused."""
    logger = logging.getLogger("tifffile")

    def refuse(_record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(refuse)
    try:
        yield
    finally:
        logger.removeFilter(refuse)
