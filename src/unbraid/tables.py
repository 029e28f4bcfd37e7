"""Tables and counts in plain text, and tables for other programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from unbraid.errors import UnbraidError

if TYPE_CHECKING:
    import pandas as pd


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


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table in CSV, numbers to the last digit, nan as an empty cell.

    >>> print(csv_text(("class", "cosine"), [("clock, digital", 1 / 3), ("b", math.nan)]), end="")
    class,cosine
    "clock, digital",0.3333333333333333
    b,
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value


def data_frame(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    """Make a table a DataFrame.

    Raises:
        UnbraidError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise UnbraidError("pandas is not installed; pip install 'unbraid[pandas]'.") from None
    return pd.DataFrame(list(rows), columns=list(columns))
