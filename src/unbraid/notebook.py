"""How results look in a notebook: HTML tables, every text escaped, nothing asked of a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_MAX_ROWS = 60
_MAX_CELL = 300  # characters


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
    short = text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + "…"
    # A folder's name may hold bytes that are no text; they are spelt out.
    return escape(short.encode("utf-8", "backslashreplace").decode())
