"""How results look in a notebook: HTML tables, every text escaped, nothing asked of a network."""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from unbraid.base.errors import UnbraidError

if TYPE_CHECKING:
    import pandas as pd


from html import escape

# Tables and counts in plain text, and tables for other programs.


_MAX_CELL = 300  # characters of a cell in plain text
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_BREAKS = ("\t", "\r", "\n")  # after which some spreadsheets begin anew
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # noqa: RUF001


def align(rows: Sequence[Sequence[str]]) -> str:
    """Line up rows of cells in columns; a line break in a cell becomes a space.

    >>> print(align([("channel", "cosine"), ("12", "0.333")]))
    channel  cosine
    12       0.333
    """
    flat = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*flat, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in flat
    )
    return "\n".join(lines)


def one_line(text: str) -> str:
    r"""Make a text fit for a line on a terminal: no control characters, and an end.

    >>> one_line("digital\n clock \x1b[31m"), len(one_line("x" * 1_000_000))
    ('digital clock �[31m', 300)
    """
    line = " ".join(text[: 4 * _MAX_CELL].split())
    line = line if len(line) <= _MAX_CELL else line[: _MAX_CELL - 1] + "…"
    # What sets a colour or turns the writing direction would also act on what stands behind.
    return "".join("�" if unicodedata.category(c) == "Cc" or c in _TURNS else c for c in line)


def count(n: int, one: str, many: str = "") -> str:
    """Write a number of things.

    >>> count(1, "pair"), count(2048, "channel"), count(2, "class", "classes")
    ('1 pair', '2,048 channels', '2 classes')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table in CSV, numbers to the last digit, nan as an empty cell.

    A text that a spreadsheet would take for a formula gets an apostrophe in front, which keeps it
    a text there.

    >>> print(csv_text(("class", "cosine"), [("clock, digital", 1 / 3), ("b", math.nan)]), end="")
    class,cosine
    "clock, digital",0.3333333333333333
    b,
    >>> print(csv_text(("class",), [("=HYPERLINK(1)",), (-1.5,)]), end="")
    class
    '=HYPERLINK(1)
    -1.5
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and (value[:1] in _BREAKS or value.lstrip().startswith(_FORMULA)):
        return f"'{value}"
    return "" if isinstance(value, float) and math.isnan(value) else value


def data_frame(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    """Make a table a DataFrame.

    Raises:
        UnbraidError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise UnbraidError("pandas is not installed; pip install pandas.") from None
    return pd.DataFrame(list(rows), columns=list(columns))


# How results look in a notebook: HTML tables, every text escaped, nothing asked of a network.


_MAX_ROWS = 60
_MAX_HTML_CELL = 300  # characters


class Shown:
    """A result that notebooks and IPython show as its table, not as what it is made of."""

    def _repr_html_(self) -> str:
        raise NotImplementedError

    def _repr_mimebundle_(self, **_asked: Any) -> dict[str, str]:
        # Not _repr_pretty_, to which IPython prefers the __repr__ of a dataclass.
        return {"text/plain": str(self), "text/html": self._repr_html_()}


def html_table(
    rows: Sequence[Sequence[str]], *, title: str = "", note: str = "", n_heads: int = 1
) -> str:
    """Write a table in HTML; of a long one the beginning, and how much is left out.

    Args:
        rows: cells; the first rows are heads.
        title: above the table.
        note: below it; each line a line.
        n_heads: how many rows are heads.

    >>> html_table([("class", "cosine"), ("<b>", "0.3")]).splitlines()[3]
    '<tr><td dir="auto">&lt;b&gt;</td><td dir="auto">0.3</td></tr>'
    """
    body = rows[n_heads : n_heads + _MAX_ROWS]
    lines = ["<table>"]
    if title:
        lines.append(f'<caption style="text-align:left">{_escaped(title)}</caption>')
    lines += [
        "<thead>" + "".join(_row(row, "th") for row in rows[:n_heads]) + "</thead>",
        "<tbody>",
    ]
    lines += [_row(row, "td") for row in body]
    n_more = len(rows) - n_heads - len(body)
    if n_more:
        cell = f'<td colspan="{len(rows[0])}">and {n_more:,} more</td>'
        lines.append(f"<tr>{cell}</tr>")
    lines += ["</tbody>", "</table>"]
    return "\n".join(lines) + html_lines(note)


def html_lines(text: str) -> str:
    """Write a text in HTML, line by line.

    >>> html_lines("1 < 2")
    '<p>1 &lt; 2</p>'
    """
    return f"<p>{'<br>'.join(map(_escaped, text.splitlines()))}</p>" if text else ""


def _row(cells: Sequence[str], kind: str) -> str:
    # dir="auto": each cell keeps its own writing direction, and any marks for it, to itself.
    return "<tr>" + "".join(f'<{kind} dir="auto">{_escaped(c)}</{kind}>' for c in cells) + "</tr>"


def _escaped(text: str) -> str:
    short = text if len(text) <= _MAX_HTML_CELL else text[: _MAX_HTML_CELL - 1] + "…"
    # A folder's name may hold bytes that are no text; they are spelt out.
    return escape(short.encode("utf-8", "backslashreplace").decode())
