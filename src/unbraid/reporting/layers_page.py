"""The index page of several layers, with a picture of how polysemantic each is, by depth."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from unbraid.base.files import write_whole
from unbraid.base.tables import count as counted
from unbraid.reporting.charts import WIDTH, axis, line, shape, svg, text, units
from unbraid.reporting.layers import LayerRow, Layers
from unbraid.reporting.report import hash_of, page_environment, read_part
from unbraid.reporting.words import bounded, isolate, number, percent

INDEX = "index.html"
_N_TOLD = 5  # layers that the picture's words name
_N_OPEN = 3  # layers named above the table


def write_index(layers: Layers, folder: Path) -> Path:
    """Write the page and, beside it, its data as JSON and CSV; return the page's path."""
    layers.save(folder)
    write_whole(folder / INDEX, render(layers).encode("utf-8", "backslashreplace"))
    return folder / INDEX


def render(layers: Layers) -> str:
    """Return the index page: one file that asks nothing of any network."""
    style = read_part("style.css")
    page = (
        page_environment()
        .get_template("layers.html.j2")
        .render(
            layers=layers,
            title=bounded(layers.title),
            facts=_facts(layers),
            picture=draw_layers(layers),
            worth=layers.worth_opening[:_N_OPEN],
            link=_link,
            style=style,
            style_hash=hash_of(style),
        )
    )
    return page


def _link(row: LayerRow) -> str:
    return "/".join(quote(part, safe="") for part in row.page.split("/"))


def _facts(layers: Layers) -> list[tuple[str, str, str]]:
    """Choose the figures at the top: how polysemantic, where most, how well it is explained."""
    rows = layers.layers
    n_sure, n_uncertain = sum(r.n_sure for r in rows), sum(r.n_uncertain for r in rows)
    n_channels = sum(row.n_channels for row in rows)
    n_with = sum(row.n_sure > 0 for row in rows)
    note = f"of {counted(n_channels, 'channel')}, {percent(n_sure / max(n_channels, 1), 1)}"
    if n_uncertain:
        note = f"and {n_uncertain:,} uncertain; {note}"
    facts = [(f"{n_sure:,}", f"polysemantic channel{'' if n_sure == 1 else 's'}", note)]
    left_out = layers.n_layers - len(rows)
    note = f"of {counted(len(rows), 'layer')}" + (f"; {left_out:,} left out" if left_out else "")
    facts.append((f"{n_with:,}", f"layer{'' if n_with == 1 else 's'} with any", note))
    if worth := layers.worth_opening:
        best = max(worth, key=lambda row: row.part)
        name = bounded(best.layer, 40)
        facts.append((percent(best.part), "in the most polysemantic layer", name))
        measured = [row for row in rows if row.n_measured]
        n = sum(row.n_measured for row in measured)
        if n:
            covered = sum(row.n_measured * row.coverage for row in measured) / n
            note = f"mean over {counted(n, 'channel')} measured; ideal 1"
            facts.append((number(covered), "coverage by concepts", note))
    return facts


def draw_layers(layers: Layers) -> Markup:
    """Draw a bar per layer, first to last: part of its channels surely, and perhaps, polysemantic.

    Layers without a bar or line were left out.
    """
    left, right, top, high = 50.0, 8.0, 10.0, 170.0
    bottom, wide = top + high, WIDTH - left - right
    pitch = wide / layers.n_layers
    most = max((_all(row) for row in layers.layers), default=0.0) or 0.01
    marks = [(mark, label) for mark, label in axis(0.0, 100 * most, 2.0 * high, 16.5) if mark >= 0]
    parts = []
    for mark, label in marks:
        y = bottom - mark / (100 * most) * high
        parts.append(line("axis" if mark == 0 else "grid", left, y, WIDTH - right, y))
        parts.append(text("tick", left - 5, y + 5, f"{label}%", "end"))
    for row in layers.layers:
        x = left + (row.depth - 1) * pitch
        gap = min(2.0, 0.15 * pitch)
        told = Markup("<title>{}</title>").format(_told(row))
        sure, every = (high * part / most for part in (row.part, _all(row)))
        bars = _bar("kept k0", x + gap / 2, bottom - sure, pitch - gap, sure)
        bars += _bar("maybe k0", x + gap / 2, bottom - every, pitch - gap, every - sure)
        # Also a layer without any tells its name to a pointer.
        bars += _bar("touch", x, top, pitch, high)
        parts.append(Markup("<g>{}{}</g>").format(told, bars))
    for depth in _depths(layers.n_layers):
        middle = left + (depth - 0.5) * pitch
        parts.append(shape("axis", f"M{units(middle)},{units(bottom)}v4"))
        parts.append(text("tick", middle, bottom + 19, str(depth), "middle"))
    words = "layer, first to last, as numbered below"
    parts.append(text("label", left + wide / 2, bottom + 40, words, "middle"))
    return svg(describe_layers(layers), bottom + 46, parts)


def describe_layers(layers: Layers) -> str:
    """Say what the picture shows, for those who do not see it."""
    told = "; ".join(map(_told, layers.worth_opening[:_N_TOLD]))
    rest = len(layers.worth_opening) - _N_TOLD
    told = f"Most in {told}" if told else "Surely none in any layer"
    more = f"; and {counted(rest, 'layer')} with fewer" if rest > 0 else ""
    n = counted(len(layers.layers), "layer")
    return (
        f"Part of each layer's channels that are polysemantic, {n} from first to last. "
        f"{told}{more}. The table below has all numbers."
    )


def _all(row: LayerRow) -> float:
    return (row.n_sure + row.n_uncertain) / row.n_channels


def _told(row: LayerRow) -> str:
    more = f", {row.n_uncertain:,} more uncertain" if row.n_uncertain else ""
    return (
        f"layer {row.depth}, {isolate(bounded(row.layer, 60))}: {row.n_sure:,} of "
        f"{row.n_channels:,} channels ({percent(row.part, 1)}){more}"
    )


def _bar(kind: str, x: float, y: float, wide: float, high: float) -> Markup:
    if high <= 0:
        return Markup("")
    return Markup('<rect class="{}" x="{}" y="{}" width="{:.2f}" height="{:.2f}"/>').format(
        kind, *map(units, (x, y)), wide, high
    )


def _depths(n: int) -> list[int]:
    """Numbers to write below: the first, and each that is a round step further.

    >>> _depths(4), _depths(54)
    ([1, 2, 3, 4], [1, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50])
    """
    step = next(k * 10**power for power in count() for k in (1, 2, 5) if n <= 12 * k * 10**power)
    return [1, *range(max(step, 2), n + 1, step)]
