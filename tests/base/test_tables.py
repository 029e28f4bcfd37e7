"""Results in notebooks: tables of the figures themselves, harmless whatever names hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from unbraid import Ablation, Circuit, Evaluation, Findings, Split
from unbraid.base.tables import Table, one_line
from unbraid.finding.findings import Pair
from unbraid.measuring.circuit import Source
from unbraid.measuring.results import (
    ChannelAblation,
    ChannelEvaluation,
    ChannelSemantics,
    ClassDrops,
    ClassOutput,
    ConceptAblation,
    ConceptEvaluation,
    Drop,
    Likeness,
    Semantics,
)
from unbraid.networks.spec import LayerSpec
from unbraid.splitting.splits import ChannelSplit

SCRIPT, QUOTES, REVERSED = "<script>alert(1)</script>", "\"'><img src=x>&amp;", "\u202egnirts"
NAMES = (SCRIPT, QUOTES, REVERSED, "bad \udcff", "x" * 100_000)
ALLOWED = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "br"}


class Tables(HTMLParser):
    """Reads rows of cells, and refuses what a table has no need of."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[list[str]] = []
        self.rows: list[list[str]] = []
        self.around = ""  # caption and notes
        self._row: list[str] = []
        self._head = self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ALLOWED, tag
        assert {name for name, _ in attrs} <= {"dir", "colspan", "style"}, attrs
        if tag == "tr":
            self._row = []
        if tag in ("td", "th"):
            assert self._in_cell is False
            self._in_cell, self._head = True, tag == "th"
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False
        if tag == "tr":
            (self.heads if self._head else self.rows).append(self._row)

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self._row[-1] += data
        else:
            self.around += data


def read(html: str) -> Tables:
    html.encode()  # a notebook is a file of UTF-8
    tables = Tables()
    tables.feed(html)
    tables.close()
    return tables


def as_shown(name: str) -> str:
    """A name in a cell: all of it, unless it is endless or no text."""
    text = name if len(name) <= 300 else name[:299] + "…"
    return text.replace("\udcff", "\\udcff")


def assert_table(html: str, expected: Sequence[Sequence[str]]) -> None:
    """The table's body holds exactly these cells."""
    assert read(html).rows == [[as_shown(cell) for cell in row] for row in expected]


def findings(n: int = 3) -> Findings:
    pairs = tuple(
        Pair(o, 0, 1 + o % 4, 0.1 + 0.001 * o, 0.9, 0.8, 0.05, 0.2, 0.99, 0.98) for o in range(n)
    )
    return Findings(
        tau=0.03,
        p=0.75,
        gamma=0.5,
        pairs=pairs,
        concepts={pair.channel: ((0,), (pair.class2,)) for pair in pairs},
        class_names=NAMES,
        hint="Nearest: tau <0.01>.",
        layer="mix",
        weights="",
    )


def expected_findings(found: Findings) -> list[list[str]]:
    rows = []
    for pair in found.pairs:
        figures = [f"{pair.cosine:.4f}", f"{pair.low:.3f} to {pair.high:.3f}"]
        sides = [
            [NAMES[label], f"{100 * use:.0f}%", f"{half:.3f}"]
            for label, use, half in (
                (pair.class1, pair.use1, pair.half1),
                (pair.class2, pair.use2, pair.half2),
            )
        ]
        rows.append([str(pair.channel), *figures, *sides[0], *sides[1]])
    return rows


def test_findings_show_every_pair_and_hostile_names_as_text() -> None:
    found = findings()
    assert_table(found._repr_html_(), expected_findings(found))
    shown = read(found._repr_html_())
    assert len(shown.heads) == 1
    assert len(shown.heads[0]) == len(shown.rows[0])
    assert "3 pairs" in shown.around


def test_the_table_checker_notices_a_wrong_figure_a_lost_row_and_markup() -> None:
    found = findings()
    html = found._repr_html_()
    for corrupted in (
        html.replace("0.1010", "0.1011"),
        _without_last_row(html),
        html.replace("&lt;script&gt;", "<script>"),
        html.replace("<table>", '<table onclick="x">'),
        html.replace("<tbody>", '<tbody><img src="http://a">'),
    ):
        assert corrupted != html
        with pytest.raises(AssertionError):
            assert_table(corrupted, expected_findings(found))


def _without_last_row(html: str) -> str:
    start = html.rindex("<tr>")
    return html[:start] + html[html.index("</tr>", start) + len("</tr>") :]


def test_long_tables_are_cut_and_say_by_how_much() -> None:
    found = findings(1000)
    rows = read(found._repr_html_()).rows
    assert rows[:-1] == [[as_shown(c) for c in r] for r in expected_findings(found)[:60]]
    assert rows[-1] == ["and 940 more"]
    assert Table([("a",), *[("1",)] * 60]).html().count("<td") == 60  # not a row too early


def test_nothing_found_is_said_in_words() -> None:
    html = replace(findings(), pairs=(), concepts={})._repr_html_()
    shown = read(html)
    assert not shown.rows
    assert "Nearest: tau <0.01>." in shown.around


def test_clusters_show_their_own_columns() -> None:
    found = replace(findings(), kind="clusters", note="beware of <b>")
    expected = [
        [str(p.channel), f"{p.cosine:.4f}", NAMES[p.class1], "90%", NAMES[p.class2], "80%"]
        for p in found.pairs
    ]
    assert_table(found._repr_html_(), expected)
    assert "beware of <b>" in read(found._repr_html_()).around


def concept(name: str, value: float) -> ConceptEvaluation:
    return ConceptEvaluation((0,), name, 7, value, value + 1, value + 2, value + 3, value + 4, ())


def evaluation() -> Evaluation:
    channels = (
        ChannelEvaluation("mix", 4, (concept(SCRIPT, 0.1), concept(QUOTES, 0.2)), 0.25, None),
        ChannelEvaluation("mix", 9, (concept(REVERSED, 0.3), concept("b", 0.4)), math.nan, None),
    )
    return Evaluation("published", "mix", channels, 0.03, {})


def split() -> Split:
    spec = LayerSpec(
        "mix", "Conv2d", 8, 4, (1, 1), (1, 1), ((0, 0),) * 2, (1, 1), 1, "zeros", False
    )
    masks = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 0.5, 0.0]])
    part = ChannelSplit(5, ((0,), (1, 2)), masks, torch.tensor([1.0, -2.0, 4.0, 1.0]), 0.0, {})
    silent = replace(part, channel=6, weight=torch.zeros(4))
    return Split(spec, "", "least_squares", {}, NAMES, (part, silent))


def circuit() -> Circuit:
    sources = (Source(3, 2.0, 0.5, 0.9), Source(1, -1.0, 0.0, 0.25))
    return Circuit("mix", 5, 1, (0,), SCRIPT, sources)


def ablation() -> Ablation:
    own, others, rest = (Drop(4, x, x / 10, 2 * x, x / 5) for x in (1.0, 0.5, 0.25))
    drops = ClassDrops((0.0,), (0.0,))
    channel = ChannelAblation(5, drops, (ConceptAblation((0,), SCRIPT, own, others, rest, drops),))
    return Ablation("mix", (ClassOutput(0, SCRIPT, 4, 1.0, 1.0),), (channel,))


def semantics() -> Semantics:
    likes = Likeness(0.1, 0.2), (Likeness(0.3, 0.4), Likeness(0.5, math.nan))
    return Semantics({5: ChannelSemantics("pixels", 9, 3, True, True, *likes, 0.25, 0.75)})


RESULTS = {
    "evaluation": (
        evaluation(),
        "published split of mix",
        [
            ["4", SCRIPT, "0.100", "1.100", "2.100", "3.100", "4.100", "0.250"],
            ["", QUOTES, "0.200", "1.200", "2.200", "3.200", "4.200", ""],
            ["9", REVERSED, "0.300", "1.300", "2.300", "3.300", "4.300", "nan"],
            ["", "b", "0.400", "1.400", "2.400", "3.400", "4.400", ""],
        ],
    ),
    "split": (  # of |1| + |-2| + |4| + |1| = 8 the first keeps 1 + 2, the second 2 + 2
        split(),
        "least_squares split of 2 channels of mix",
        [
            ["5", "0", SCRIPT, "38%"],
            ["5", "1", f"{QUOTES}, {REVERSED}", "50%"],
            ["6", "0", SCRIPT, "0%"],
            ["6", "1", f"{QUOTES}, {REVERSED}", "0%"],
        ],
    ),
    "circuit": (
        circuit(),
        f"mix, concept 1 of channel 5 ({SCRIPT})",
        [["3", "50.0%", "90.0%"], ["1", "0.0%", "25.0%"]],
    ),
    "ablation": (
        ablation(),
        "Channels of mix switched off",
        [["5", SCRIPT, "1.000", "2.000", "0.500", "10.0%", "0.500", "1.000", "0.500", "0.250"]],
    ),
    "semantics": (
        semantics(),
        "How alike the images are",
        [
            ["5", "original", "0.100", "0.200", "0.250", "0.750"],
            ["", "concept 0", "0.300", "0.400", "", ""],
            ["", "concept 1", "0.500", "nan", "", ""],
        ],
    ),
}


@pytest.mark.parametrize(("result", "around", "rows"), RESULTS.values(), ids=RESULTS)
def test_html_of_a_result_has_every_figure(result, around, rows) -> None:
    shown = read(result._repr_html_())
    assert_table(result._repr_html_(), rows)
    assert around in shown.around
    assert len(shown.heads) == (2 if isinstance(result, Ablation) else 1)
    assert all(one_line(cell) in str(result) for row in rows for cell in row)


@pytest.mark.parametrize("result", [findings(), split(), semantics()])
def test_ipython_shows_the_table_in_html_and_in_plain_text(result) -> None:
    formats, _ = InteractiveShell.instance().display_formatter.format(result)
    assert formats == {"text/plain": str(result), "text/html": result._repr_html_()}
