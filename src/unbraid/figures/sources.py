"""Where a channel's concepts come from: the input channels that feed each of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from unbraid.arvs import averaged_relevance, class_sums, concept_mean
from unbraid.errors import UsageError
from unbraid.figures.content import find_part, printable, refuse_other_scan
from unbraid.figures.densities import colour
from unbraid.figures.paper import BLACK, SIZE, SMALL, axes_at, blank, own_style, write, write_title
from unbraid.given import whole_number
from unbraid.relevance import input_relevance
from unbraid.report.channels import strongest_sources
from unbraid.report.charts import ticks
from unbraid.report.text import letter

if TYPE_CHECKING:
    from unbraid.records import Scan
    from unbraid.splits import Split

_MARGIN = 0.04
_NUMBERS = 0.32  # inches for the input channels' numbers
_TITLE = 0.20
_PITCH = 0.115  # from one input channel to the next
_BELOW = 0.30
_BETWEEN = 0.10  # panels
_LEAST_PANEL, _WIDE = 0.5, 1.2  # from the latter on there is room for every tick's number


@dataclass(frozen=True, eq=False)
class Sources:
    """The strongest input channels of one channel's concepts. Shapes: K concepts, n sources."""

    letters: tuple[str, ...]  # (K,)
    names: tuple[str, ...]  # (K,)
    inputs: tuple[int, ...]  # (n,), channels of the layer's input
    relevance: np.ndarray  # (K, n), for the original channel, mean over the concept's images
    kept: np.ndarray  # (K, n), for the concept's own channel


def gather_sources(split: Split, scan: Scan, channel: int, n: int) -> Sources:
    """Find the strongest input channels; arguments as in `unbraid.source_figure`."""
    n = whole_number("n", n, 1)
    part = find_part(split, channel)
    refuse_other_scan(split, scan)
    sums = class_sums(replace(scan, clusters=split.clusters), ())
    means = []
    for classes in part.concepts:
        there = tuple(label for label in classes if label < len(sums.n_images))
        if not there or not sums.n_images[list(there)].sum():
            raise UsageError(
                f"The scan has no image of {split.name(classes)}; scan images of all concepts."
            )
        means.append(concept_mean(sums, there))
    spec = split.layer
    group = spec.group_of(channel)
    pooled = torch.stack(means)  # (K, G, J)
    relevance = averaged_relevance(scan, channel, pooled).numpy()  # (K, C_in / G)
    kept = input_relevance(part.rows.double(), pooled[:, group], spec.taps_per_input).numpy()
    chosen = strongest_sources(relevance, n)
    first = group * spec.n_in_per_group
    return Sources(
        letters=tuple(map(letter, range(len(part.concepts)))),
        names=tuple(printable(split.name(classes)) for classes in part.concepts),
        inputs=tuple(first + i for i in chosen),
        relevance=relevance[:, chosen],
        kept=kept[:, chosen],
    )


def draw_sources(data: Sources, width: float) -> Figure:
    """Draw the figure; arguments as in `unbraid.source_figure`."""
    k_concepts, n = data.relevance.shape
    tall = n * _PITCH
    with own_style():
        figure = blank(width, _TITLE + tall + _BELOW)
        left = _MARGIN + _NUMBERS
        each = (width - left - _MARGIN - (k_concepts - 1) * _BETWEEN) / k_concepts
        if each < _LEAST_PANEL:
            raise UsageError(
                f"The channel has {k_concepts} concepts, too many for {width:g} inches; ask for a "
                "wider figure."
            )
        top = _BELOW + tall + 0.08
        write(figure, left - 0.06, top, "input", fontsize=SMALL, ha="right")
        for row, number in enumerate(data.inputs):
            middle = _BELOW + tall - (row + 0.5) * _PITCH
            style = {"fontsize": SMALL, "ha": "right", "va": "center_baseline"}
            write(figure, left - 0.06, middle, str(number), **style)
        values = np.concatenate([data.relevance, data.kept])
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        margin = 0.04 * (high - low) or 1.0
        for k in range(k_concepts):
            x = left + k * (each + _BETWEEN)
            axes = axes_at(figure, x, _BELOW, each, tall)
            axes.set_xlim(low - margin, high + margin)
            _bars(axes, data, k, wide=each > _WIDE)
            title: list[tuple[str, dict[str, Any]]] = [
                (data.letters[k], {"fontsize": SIZE, "weight": "bold", "color": colour(k)}),
                ("  " + data.names[k], {"fontsize": SIZE}),
            ]
            write_title(figure, x, top, each, title)
        label = "mean relevance for the original (pale) and the concept channel"
        write(figure, left + (width - left) / 2, 0.03, label, fontsize=SMALL, ha="center")
    return figure


def _bars(axes: Axes, data: Sources, k: int, *, wide: bool) -> None:
    """Draw one concept's bars: pale for the original channel, narrower what is kept."""
    places = np.arange(len(data.inputs))
    low, high = axes.get_xlim()
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(FixedLocator(ticks(low, high)[:: 1 if wide else 2]))
    name = data.letters[k]
    axes.barh(places, data.relevance[k], 0.76, color=colour(k), alpha=0.3, label=f"original {name}")
    axes.barh(places, data.kept[k], 0.4, color=colour(k), label=f"kept {name}")
    axes.axvline(0, color=BLACK, linewidth=0.6)
