"""Whether two figures show the same, whatever versions of fonts and libraries drew them."""

import io

import numpy as np
from PIL import Image

CELLS = 48  # in a row: coarse, so that letters a pixel aside change little
UNLIKE, SHARE = 24, 0.003  # levels by which a cell differs, and how many may; a photograph takes 5x
FREQUENT = 0.012  # share of the pixels: more than the blurred edges of frames have
VIVID, SAME = 60, 12  # levels: between a colour's channels, where grey has none; between colours


def open_white(content):
    """Open a picture, on white paper."""
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as picture:
        shown = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")


def vivid_colours(picture):
    """The vivid colours that a picture was drawn with, (n, 3)."""
    found, counts = np.unique(np.asarray(picture).reshape(-1, 3), axis=0, return_counts=True)
    frequent = found[counts > FREQUENT * counts.sum()].astype(int)
    return frequent[np.ptp(frequent, axis=1) > VIVID]


def assert_alike(one, other):
    """Two pictures have one size, the same colours, and differ in few coarse cells only."""
    pictures = open_white(one), open_white(other)
    assert np.allclose(pictures[0].size, pictures[1].size, rtol=0.01)
    mine, others = map(vivid_colours, pictures)
    apart = np.abs(mine[:, None] - others).max(-1)
    assert apart.size
    assert apart.min(0).max() <= SAME
    assert apart.min(1).max() <= SAME
    size = CELLS, round(CELLS * pictures[0].height / pictures[0].width)
    cells = [np.asarray(p.resize(size, Image.Resampling.BOX)).astype(int) for p in pictures]
    share = float((np.abs(cells[0] - cells[1]).max(-1) > UNLIKE).mean())
    assert share <= SHARE, share
