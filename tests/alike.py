"""Whether two figures show the same, whatever versions of fonts and libraries drew them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

CELLS = 48  # in a row: coarse, so that letters a pixel aside change little
UNLIKE = 24  # levels of 255 by which a cell differs
SHARE = 0.003  # of the cells may; a photograph of a teaser takes about five times that
FREQUENT = 0.012  # share of the pixels: more than the blurred edges of frames have
VIVID = 60  # levels between a colour's channels; photographs of the demo are grey
SAME = 12  # levels


def open_white(content: bytes | Path) -> Image.Image:
    """Open a picture, on white paper."""
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as picture:
        shown = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")


def unlike_share(one: Image.Image, other: Image.Image) -> float:
    """Share of coarse cells in which two pictures differ."""
    size = CELLS, round(CELLS * one.height / one.width)
    coarse = [
        np.asarray(picture.resize(size, Image.Resampling.BOX)).astype(float)
        for picture in (one, other)
    ]
    return float((np.abs(coarse[0] - coarse[1]).max(-1) > UNLIKE).mean())


def colours(picture: Image.Image) -> list[np.ndarray]:
    """The vivid colours that a picture was drawn with."""
    found, counts = np.unique(np.asarray(picture).reshape(-1, 3), axis=0, return_counts=True)
    frequent = found[counts > FREQUENT * counts.sum()].astype(int)
    return [colour for colour in frequent if np.ptp(colour) > VIVID]


def assert_alike(one: bytes | Path, other: bytes | Path) -> None:
    """Two pictures have one size, the same colours, and differ in few places only."""
    pictures = open_white(one), open_white(other)
    for side, again in zip(*(picture.size for picture in pictures), strict=True):
        assert abs(side - again) <= 0.01 * side
    drawn = [colours(picture) for picture in pictures]
    for mine, others in (drawn, drawn[::-1]):
        assert mine
        for colour in mine:
            assert min((np.abs(colour - o).max() for o in others), default=255) <= SAME, colour
    share = unlike_share(*pictures)
    assert share <= SHARE, share
