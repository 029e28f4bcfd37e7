"""Maps of what each choice of thresholds finds: one per p, a row per tau, a column per gamma."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from unbraid.report.material import Material
from unbraid.report.svg import svg, text, units
from unbraid.sensitivity import Cell
from unbraid.tables import count

_LEFT, _TOP = 54.0, 40.0  # room for the thresholds' values
_WIDE, _HIGH, _GAP = 53.0, 33.0, 2.0  # from one cell to the next, and between them
_PALEST, _STRONGEST = 0.1, 0.5  # shades on which the text's colour can still be read


@dataclass(frozen=True)
class Tile:
    """One choice of thresholds."""

    cell: Cell
    shade: float  # 0 where nothing is found, else more for more channels, on a log scale
    chosen: bool

    @property
    def words(self) -> str:
        """What it finds."""
        channels = count(self.cell.n_channels, "channel")
        return f"{channels}, {count(self.cell.n_pairs, 'pair')}"


@dataclass(frozen=True)
class Map:
    """All choices with one p; rows by tau, columns by gamma."""

    p: float
    rows: tuple[tuple[Tile, ...], ...]

    @property
    def has_chosen(self) -> bool:
        """Whether the page's own choice is in it."""
        return any(tile.chosen for tiles in self.rows for tile in tiles)


def maps(material: Material) -> tuple[Map, ...]:
    """Arrange what other thresholds find; nothing if it was not counted."""
    counted, found = material.sensitivity, material.found
    if counted is None:
        return ()
    chosen = (found.tau, found.p, found.gamma)
    largest = max(cell.n_channels for cell in counted.cells)

    def tile(tau: float, p: float, gamma: float) -> Tile:
        cell = counted.at(tau, p, gamma)
        shade = math.log1p(cell.n_channels) / math.log1p(max(1, largest))
        return Tile(cell, shade, (tau, p, gamma) == chosen)

    return tuple(
        Map(
            p, tuple(tuple(tile(tau, p, gamma) for gamma in counted.gammas) for tau in counted.taus)
        )
        for p in counted.ps
    )


def draw(data: Map) -> Markup:
    """Draw a map: the number of channels as shade and figure, of pairs as a small figure."""
    n_columns = len(data.rows[0])
    width = _LEFT + n_columns * _WIDE
    parts = [text("label", _LEFT + n_columns * _WIDE / 2, 13, "gamma", "middle")]
    parts.append(text("label", _LEFT - 8, 31, "tau", "end"))
    for column, tile in enumerate(data.rows[0]):
        middle = _LEFT + (column + 0.5) * _WIDE
        parts.append(text("value", middle, 31, f"{tile.cell.gamma:g}", "middle"))
    for row, tiles in enumerate(data.rows):
        y = _TOP + row * _HIGH
        parts.append(text("value", _LEFT - 8, y + 20, f"{tiles[0].cell.tau:g}", "end"))
        parts += [_tile(tile, _LEFT + column * _WIDE, y) for column, tile in enumerate(tiles)]
    numbers = [tile.cell.n_channels for tiles in data.rows for tile in tiles]
    title = (
        f"Polysemantic channels by tau and gamma at p {data.p:g}, from {min(numbers):,} to "
        f"{max(numbers):,}; the table below has all numbers"
    )
    return svg(title, _TOP + len(data.rows) * _HIGH, parts, width)


def _tile(tile: Tile, x: float, y: float) -> Markup:
    """Draw one cell, with its numbers in words for those who point at it."""
    cell = tile.cell
    middle, wide, high = x + _WIDE / 2, _WIDE - _GAP, _HIGH - _GAP
    kind = f"tile{' some' if cell.n_channels else ''}{' chosen' if tile.chosen else ''}"
    opacity = _PALEST + (_STRONGEST - _PALEST) * tile.shade if cell.n_channels else 1.0
    parts = [
        Markup(
            '<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="3" fill-opacity="{:.2f}"/>'
        ).format(kind, units(x + _GAP / 2), units(y + _GAP / 2), units(wide), units(high), opacity),
        text(
            "count" if cell.n_channels else "count none",
            middle,
            y + (15 if cell.n_channels else 20),
            f"{cell.n_channels:,}",
            "middle",
        ),
    ]
    if cell.n_pairs:
        parts.append(text("value", middle, y + 27, _short(cell.n_pairs), "middle"))
    words = f"tau {cell.tau:g}, p {cell.p:g}, gamma {cell.gamma:g}: {tile.words}"
    return Markup("<g><title>{}</title>{}</g>").format(words, Markup("").join(parts))


def _short(number: int) -> str:
    """Write a number in the room of a cell.

    >>> _short(2841), _short(220_153), _short(499_500_000)
    ('2,841', '220k', '500M')
    """
    if number < 100_000:
        return f"{number:,}"
    return f"{number / 1e3:.0f}k" if number < 10_000_000 else f"{number / 1e6:.0f}M"
