"""How much of each input channel every concept channel keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from unbraid.report.alt import of_masks
from unbraid.report.channels import ConceptView
from unbraid.report.svg import WIDTH, line, svg, text, units
from unbraid.splits import ChannelSplit
from unbraid.tables import count

_MAX_STEPS = 220  # of a chart, each two units wide
_LEFT, _ROW, _HEIGHT, _TOP = 34.0, 46.0, 30.0, 26.0


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of a channel's concepts."""

    concepts: tuple[ConceptView, ...]
    kept: np.ndarray  # (K, C_in), mean over an input channel's taps, 0 to 1
    order: np.ndarray  # (C_in,), by the concept that keeps most, and how much it keeps


def masks(views: Sequence[ConceptView], part: ChannelSplit, taps_per_input: int) -> Masks:
    """Average masks over the taps of each input channel, and put the input channels in order."""
    kept = part.masks.double().view(len(views), -1, taps_per_input).mean(2).numpy()
    order = np.lexsort((-kept.max(0), kept.argmax(0)))
    return Masks(tuple(views), kept, order)


def draw_masks(data: Masks, channel: int) -> Markup:
    """Draw a row of steps per concept, as high as what it keeps; all in one order."""
    kept = _in_steps(data.kept[:, data.order])
    wide = (WIDTH - _LEFT) / kept.shape[1]
    parts = [text("tick", 0, 13, "part of the weights kept")]
    for k, (concept, row) in enumerate(zip(data.concepts, kept, strict=True)):
        base = _TOP + k * _ROW + _HEIGHT
        path = [f"M{units(_LEFT)},{units(base)}"]
        for n, height in enumerate(row.tolist()):
            path.append(f"V{units(base - _HEIGHT * height)}H{units(_LEFT + (n + 1) * wide)}")
        path.append(f"V{units(base)}z")
        parts += [
            line("grid", _LEFT, base - _HEIGHT, WIDTH, base - _HEIGHT),
            Markup('<path class="kept k{}" d="{}"/>').format(concept.tone, "".join(path)),
            line("axis", _LEFT, base, WIDTH, base),
            text("tick", _LEFT - 4, base - _HEIGHT + 5, "1", "end"),
            text("tick", _LEFT - 4, base + 5, "0", "end"),
            text(f"letter k{concept.tone}", 0, base - _HEIGHT / 2 + 6, concept.letter),
        ]
    bottom = _TOP + (len(kept) - 1) * _ROW + _HEIGHT
    words = f"{count(data.kept.shape[1], 'input channel')}, by who keeps most"
    parts.append(text("label", (_LEFT + WIDTH) / 2, bottom + 23, words, "middle"))
    return svg(of_masks(data, channel), bottom + 30, parts)


def _in_steps(kept: np.ndarray) -> np.ndarray:
    """Average neighbours, if there are more input channels than steps fit in."""
    n = kept.shape[1]
    if n <= _MAX_STEPS:
        return kept
    edges = np.linspace(0, n, _MAX_STEPS + 1).astype(np.int64)
    return np.asarray(np.add.reduceat(kept, edges[:-1], axis=1) / np.diff(edges))
