"""Tables: a result gives its rows once, to be read on a terminal, in a notebook or as CSV."""

from __future__ import annotations

import csv
import io
import math
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.cells import cell_len, set_cell_size

from unbraid.base.arguments import as_path
from unbraid.base.errors import UnbraidError

if TYPE_CHECKING:
    import pandas as pd

_MAX_CELL = 300  # characters of a cell
_LEAST_TEXT = 8  # characters that a text is cut to
_MAX_ROWS = 60  # of a table in HTML
MAX_LINES = 40  # of a table in text whose rows are elsewhere too
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_BREAKS = ("\t", "\r", "\n")  # after which some spreadsheets begin a new cell
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # noqa: RUF001


@dataclass(frozen=True)
class Table:
    """Rows of cells, with a title above them and notes below.

    >>> print(Table([["n"], *([str(n)] for n in range(1000))], all_in="n.csv has all"))
    ... # doctest: +ELLIPSIS
    n
    0
    1
    ...
    39
    And 960 more rows; n.csv has all.
    """

    rows: Sequence[Sequence[str]]  # the first are heads
    title: str = ""
    note: str = ""
    n_heads: int = 1
    caption: str = ""  # a title in HTML alone
    all_in: str = ""  # what has all rows, so that of a long table the first are printed
    n_feet: int = 0  # rows at the end that stay

    def kept_in(self, file: Path | None) -> Table:
        """The same, whose rows are all in a file, or would be in that of --out."""
        words = "--out FILE writes all" if file is None else f"{one_line(str(file))} has all"
        return replace(self, all_in=words)

    def _cut(self, most: int) -> tuple[Sequence[Sequence[str]], int]:
        """The first rows and those at the end, and how many are left out."""
        end = len(self.rows) - self.n_feet
        kept = min(end, self.n_heads + most)
        return [*self.rows[:kept], *self.rows[end:]], end - kept

    def _printed(self) -> tuple[Sequence[Sequence[str]], str]:
        """The rows to print, and what there is to say of the others."""
        if not self.all_in:
            return self.rows, ""
        rows, n_more = self._cut(MAX_LINES)
        return rows, f"And {count(n_more, 'more row')}; {self.all_in}." if n_more else ""

    def __str__(self) -> str:
        """Line up the cells in columns."""
        rows, more = self._printed()
        return "\n".join(part for part in (self.title, align(rows), more, self.note) if part)

    def fitted(self, width: int) -> str:
        """Write text that fits a width if it can be: long texts are cut, words around wrapped."""
        kept, left_out = self._printed()
        title, more, note = (
            "\n".join(textwrap.fill(line, width) for line in words.splitlines())
            for words in (one_line(self.title), left_out, self.note)
        )
        rows = "\n\n".join(map(align, fit(kept, width))) if kept else ""
        return "\n".join(part for part in (title, rows, more, note) if part)

    def html(self) -> str:
        """Write HTML: every text escaped, and of a long table the beginning."""
        note = f"<p>{'<br>'.join(map(_escaped, self.note.splitlines()))}</p>" if self.note else ""
        if not self.rows:
            return note
        kept, n_more = self._cut(_MAX_ROWS)
        heads, body = kept[: self.n_heads], kept[self.n_heads :]
        lines = ["<table>"]
        if title := self.title or self.caption:
            lines.append(f'<caption style="text-align:left">{_escaped(title)}</caption>')
        lines.append("<thead>" + "".join(_html_row(row, "th") for row in heads) + "</thead>")
        lines += ["<tbody>", *(_html_row(row, "td") for row in body)]
        if n_more:
            lines.append(f'<tr><td colspan="{len(heads[0])}">and {n_more:,} more</td></tr>')
        return "\n".join([*lines, "</tbody>", "</table>"]) + note


class Tabular:
    """A result that is printed, and shown in notebooks, as a table."""

    def table(self) -> Table:
        """Return the rows to be read by people."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Show the result as a table."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()

    def _repr_mimebundle_(self, **_asked: Any) -> dict[str, str]:
        # Not _repr_pretty_, to which IPython prefers the __repr__ of a dataclass.
        return {"text/plain": str(self), "text/html": self._repr_html_()}


class Exported:
    """A result whose figures go to other programs."""

    columns: ClassVar[tuple[str, ...]]

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Give the rows, in the order of the columns."""
        raise NotImplementedError

    def to_csv(self, path: str | Path) -> None:
        """Write the rows to a CSV file (docs/format.md); what is not known is left empty."""
        from unbraid.base.files import write_whole  # which imports torch, and help is to be instant

        write_whole(as_path("path", path), csv_text(self.columns, self.rows()).encode())

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a DataFrame with the columns of the CSV file.

        Raises:
            UnbraidError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise UnbraidError("pandas is not installed; pip install pandas.") from None
        return pd.DataFrame(list(self.rows()), columns=list(self.columns))


def align(rows: Sequence[Sequence[str]]) -> str:
    """Line up rows of cells in columns, each cell on one line."""
    flat = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*flat, strict=True)]
    return "\n".join(
        "  ".join(
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in flat
    )


def fit(rows: Sequence[Sequence[str]], width: int) -> list[list[list[str]]]:
    """Make rows fit a width: cut the longest texts, then put columns below one another in blocks.

    >>> rows = [("channel", "concept", "error", "mimic"), ("7", "a long name", "0.25", "0.125")]
    >>> [len(block[0]) for block in fit(rows, 40)], fit(rows, 31)[0][1][1], len(fit(rows, 25))
    ([4], 'a long …', 2)
    """
    flat = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*flat, strict=True)]
    bodies = list(zip(*flat[1:], strict=True)) or [()] * len(widths)
    texts = [n for n, cells in enumerate(bodies) if any(_is_text(cell) for cell in cells)]
    least = {n: min(widths[n], max(_LEAST_TEXT, cell_len(flat[0][n]))) for n in texts}
    over = sum(widths) + 2 * (len(widths) - 1) - width
    while over > 0 and any(widths[n] > least[n] for n in texts):
        longest = max((n for n in texts if widths[n] > least[n]), key=lambda n: widths[n])
        widths[longest] -= 1
        over -= 1
    cut = [[_cut_to(cell, width) for cell, width in zip(row, widths, strict=True)] for row in flat]
    heads = [n for n in range(min(2, len(widths))) if n == 0 or n in texts]
    blocks, used = [list(heads)], sum(widths[n] + 2 for n in heads)
    for n in range(len(heads), len(widths)):
        if used + widths[n] > width and len(blocks[-1]) > len(heads):
            blocks.append(list(heads))
            used = sum(widths[n] + 2 for n in heads)
        blocks[-1].append(n)
        used += widths[n] + 2
    return [[[row[n] for n in block] for row in cut] for block in blocks]


def _cut_to(cell: str, width: int) -> str:
    return cell if cell_len(cell) <= width else f"{set_cell_size(cell, width - 1)}…"


def _is_text(cell: str) -> bool:
    """Whether a cell is neither empty nor a figure, a percentage or a range of them."""
    return any(c.isalpha() for c in cell.replace(" to ", "").replace("nan", ""))


def one_line(text: str) -> str:
    """Make a text fit for a line on a terminal: no control characters, and an end."""
    line = _cut(" ".join(text[: 4 * _MAX_CELL].split()))
    # What sets a colour or turns the writing direction would also act on what stands behind.
    return "".join("�" if unicodedata.category(c) == "Cc" or c in _TURNS else c for c in line)


def count(n: int, one: str, many: str = "") -> str:
    """Write a number of things: "1 pair", "2,048 channels"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def figure(value: float, form: str = ".3f") -> str:
    """Write a number, "-" where it is not known."""
    return "-" if math.isnan(value) else format(value, form)


def percent(value: float, digits: int = 0) -> str:
    """Write a fraction as a percentage, rounding towards 100 only what is 1.

    >>> percent(0.756), percent(0.9999), percent(1.0), percent(0.76130, 1), percent(-0.001)
    ('76%', '99%', '100%', '76.1%', '0%')
    """
    if math.isnan(value):
        return "-"
    text = f"{100 * value:z.{digits}f}"
    if value < 1 and float(text) >= 100:
        text = f"{100 - 10.0**-digits:.{digits}f}"
    return f"{text}%"


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table in CSV, numbers to the last digit, nan as an empty cell.

    A text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_csv_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, str) and (value[:1] in _BREAKS or value.lstrip().startswith(_FORMULA)):
        return f"'{value}"
    return "" if isinstance(value, float) and math.isnan(value) else value


def _html_row(cells: Sequence[str], kind: str) -> str:
    # dir="auto": each cell keeps its own writing direction, and any marks for it, to itself.
    return "<tr>" + "".join(f'<{kind} dir="auto">{_escaped(c)}</{kind}>' for c in cells) + "</tr>"


def _escaped(text: str) -> str:
    # A folder's name may hold bytes that are no text; they are spelt out.
    return escape(_cut(text).encode("utf-8", "backslashreplace").decode())


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + "…"
