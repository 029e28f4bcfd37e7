"""Tables and counts in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]]) -> str:
    """Line up rows of cells in columns; a line break in a cell becomes a space.

    >>> print(align([("channel", "cosine"), ("12", "0.333")]))
    channel  cosine
    12       0.333
    """
    flat = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*flat, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in flat
    )
    return "\n".join(lines)


def count(n: int, one: str, many: str = "") -> str:
    """Write a number of things.

    >>> count(1, "pair"), count(2048, "channel"), count(2, "class", "classes")
    ('1 pair', '2,048 channels', '2 classes')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"
