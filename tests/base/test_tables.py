"""Results as tables: every figure, harmless whatever names hold."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from rich.cells import cell_len
from torch import nn

from pages import read
from unbraid import Ablation, Circuit, Evaluation, Findings, Split
from unbraid.base.tables import Table, csv_text, fit, one_line
from unbraid.finding.pairs import Pair
from unbraid.measuring import likeness, results
from unbraid.measuring.circuit import Source
from unbraid.networks.layers import describe
from unbraid.splitting.splits import ChannelSplit

SCRIPT, QUOTES, REVERSED = "<script>alert(1)</script>", "\"'><img src=x>&amp;", "\u202egnirts"
NAMES = (SCRIPT, QUOTES, REVERSED, "bad \udcff", "\x1b]0;x\x07" + "x" * 100_000)
ALLOWED = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "br"}


def shown(html):
    """The elements of a table in HTML, which has nothing that it has no need of."""
    html.encode()  # a notebook is a file of UTF-8
    root = read(html)
    for element in [one for one in root.walk() if one is not root]:
        assert element.tag in ALLOWED, element.tag
        assert set(element.attributes) <= {"dir", "colspan", "style"}, element.attributes
    return root


def assert_table(html, expected, n_heads=1):
    (head,), rows = shown(html).all("thead"), shown(html).rows("td")
    assert len(head.all("tr")) == n_heads
    assert rows == [[as_shown(cell) for cell in row] for row in expected]


def as_shown(name):
    """A name in a cell: all of it, unless it is endless or no text."""
    text = name if len(name) <= 300 else name[:299] + "…"
    return text.replace("\udcff", "\\udcff")


def findings(n=3, **changes):
    same = (0.9, 0.8, 0.05, 0.2, 0.99, 0.98)
    pairs = tuple(Pair(o, 0, 1 + o % 4, 0.1 + 0.001 * o, *same) for o in range(n))
    concepts = {pair.channel: ((0,), (pair.class2,)) for pair in pairs}
    found = Findings(0.03, 0.75, 0.5, pairs, concepts, NAMES, "Nearest: tau <0.01>.", "mix", "")
    return replace(found, **changes)


def expected_findings(found):
    sides = [(NAMES[0], "90%", "0.990"), ("80%", "0.980")]
    return [
        [str(p.channel), f"{p.cosine:.4f}", "0.050 to 0.200", *sides[0], NAMES[p.class2], *sides[1]]
        for p in found.pairs
    ]


def evaluated(name, x):
    return results.ConceptEvaluation((0,), name, 7, x, x + 1, x + 2, x + 3, x + 4, ())


BOTH = (evaluated(SCRIPT, 0.1), evaluated(QUOTES, 0.2))
EVALUATED = (
    results.ChannelEvaluation("mix", 4, BOTH, 0.25, None),
    results.ChannelEvaluation("mix", 9, (evaluated(REVERSED, 0.3),), math.nan, None),
)
CLASS, NO_DROPS = results.ClassOutput(0, SCRIPT, 4, 1.0, 1.0), results.ClassDrops((0.0,), (0.0,))
DROPS = [results.Drop(4, x, x / 10, 2 * x, x / 5) for x in (1.0, 0.5, 0.25)]
ABLATED = results.ConceptAblation((0,), SCRIPT, *DROPS, NO_DROPS)
REST = results.RestAblation(DROPS[1], DROPS[2], NO_DROPS)
OLDER = results.ChannelAblation(5, NO_DROPS, (ABLATED,))
NEWER = results.ChannelAblation(6, NO_DROPS, (ABLATED,), REST)
LIKE, *PARTS = [likeness.Likeness(x, y) for x, y in ((0.1, 0.2), (0.3, 0.4), (0.5, math.nan))]
ALIKE = likeness.ChannelSemantics("pixels", 9, 3, True, True, LIKE, tuple(PARTS), 0.25, 0.75)
SPEC = describe("mix", nn.Conv2d(4, 8, 1))
MASKS = torch.tensor([[1.0, 0, 0.5, 0], [0, 1, 0.5, 0]])
PART = ChannelSplit(5, ((0,), (1, 2)), MASKS, torch.tensor([1.0, -2, 4, 1]), 0.0, {})
SILENT = replace(PART, channel=6, weight=torch.zeros(4))
SOURCES = (Source(3, 2.0, 0.5, 0.9), Source(1, -1.0, 0.0, 0.25))
RESULTS = {
    "findings": (findings(5, note="a <b>"), "a <b>", expected_findings(findings(5))),
    "evaluation": (
        Evaluation("published", "mix", EVALUATED, 0.03, {}),
        "published split of mix",
        [
            ["4", SCRIPT, "0.100", "1.100", "2.100", "3.100", "4.100", "0.250"],
            ["", QUOTES, "0.200", "1.200", "2.200", "3.200", "4.200", ""],
            ["9", REVERSED, "0.300", "1.300", "2.300", "3.300", "4.300", "-"],
        ],
    ),
    "split": (  # of |1| + |-2| + |4| + |1| = 8 the first keeps 1 + 2, the second 2 + 2
        Split(SPEC, "", "least_squares", {}, NAMES, (PART, SILENT)),
        "least_squares split of 2 channels of mix",
        [
            [channel, concept, name, kept]
            for channel, kept_by in (("5", ("38%", "50%")), ("6", ("0%", "0%")))
            for concept, name, kept in (
                ("0", SCRIPT, kept_by[0]),
                ("1", f"{QUOTES}, {REVERSED}", kept_by[1]),
            )
        ],
    ),
    "clusters": (
        findings(kind="clusters", note="beware of <b>"),
        "beware of <b>",
        [
            [str(p.channel), f"{p.cosine:.4f}", NAMES[0], "90%", NAMES[p.class2], "80%"]
            for p in findings().pairs
        ],
    ),
    "circuit": (
        Circuit("mix", 5, 1, (0,), SCRIPT, SOURCES),
        f"mix, concept 1 of channel 5 ({SCRIPT})",
        [["3", "50.0%", "90.0%"], ["1", "0.0%", "25.0%"]],
    ),
    "semantics": (
        likeness.Semantics({5: ALIKE}),
        "How alike the images are",
        [
            ["5", "original", "0.100", "0.200", "0.250", "0.750"],
            ["", "concept 0", "0.300", "0.400", "", ""],
            ["", "concept 1", "0.500", "nan", "", ""],
        ],
    ),
    "ablation": (
        Ablation("mix", (CLASS,), (OLDER, NEWER)),
        "Channels of mix switched off",
        [
            ["5", SCRIPT, "1.000", "2.000", "0.500", "10.0%", "0.500", "1.000", "0.500", "0.250"],
            ["6", SCRIPT, "1.000", "2.000", "0.500", "10.0%", "0.500", "1.000", "0.500", "0.250"],
            ["", "the rest", "0.500", "1.000", "0.500", "5.0%", "", "", "", "0.250"],
        ],
    ),
}


@pytest.mark.parametrize(("result", "around", "rows"), RESULTS.values(), ids=RESULTS)
def test_result_is_shown_with_every_figure_in_html_and_in_plain_text(result, around, rows):
    formats, _ = InteractiveShell.instance().display_formatter.format(result)
    text, html = formats.pop("text/plain"), formats.pop("text/html")
    assert not formats
    assert_table(html, rows, 2 if isinstance(result, Ablation) else 1)
    assert around in shown(html).text
    assert text == str(result)
    assert all(one_line(cell) in text for row in rows for cell in row)
    assert not {"\x1b", "\u202e"} & set(text)
    assert max(len(cell.strip()) for line in text.splitlines() for cell in line.split("  ")) <= 300


def test_the_table_checker_notices_a_wrong_figure_a_lost_row_and_markup():
    found = findings()
    html = found._repr_html_()
    for old, new in (
        ("0.1010", "0.1011"),
        (html[html.rindex("<tr>") : html.rindex("</tbody>")], ""),
        ("&lt;script&gt;", "<script>"),
        ("<table>", '<table onclick="x">'),
    ):
        assert old in html
        with pytest.raises((AssertionError, ValueError)):
            assert_table(html.replace(old, new), expected_findings(found))


def test_html_of_long_tables_is_cut_and_says_by_how_much():
    found = findings(1000)
    assert_table(found._repr_html_(), [*expected_findings(found)[:60], ["and 940 more"]])
    assert Table([("a",), *[("1",)] * 60]).html().count("<td") == 60  # not a row too early
    nothing = shown(findings(pairs=(), concepts={})._repr_html_())
    assert not nothing.all("tr")
    assert "Nearest: tau <0.01>." in nothing.text


def test_printed_tables_have_no_more_than_forty_rows_and_say_what_has_the_others():
    many, few = findings(1000), findings(40)
    assert all(f"{pair.cosine:.4f}" in str(few) for pair in few.pairs)
    assert "more" not in str(few)
    text = str(many)
    assert "1,000 sure" in text or "1,000 pairs" in text
    assert len(text.splitlines()) < 50
    assert all(f"{p.cosine:.4f}" in text for p in many.pairs[:40])
    assert "And 960 more rows; Findings.to_csv writes all." in text.splitlines()
    one = ("And 1 more row; a b.csv has all.", str(findings(41).table().kept_in(Path("a b.csv"))))
    assert one[0] in one[1].splitlines()
    assert one[0] in findings(41).table().kept_in(Path("a b.csv")).fitted(200).splitlines()
    assert "And 960 more rows; --out FILE writes all." in str(many.table().kept_in(None))
    evaluation = Evaluation("published", "mix", EVALUATED * 30, 0.03, {})
    assert "And 50 more rows; Evaluation.save writes all." in str(evaluation).splitlines()
    ablation = str(Ablation("mix", (CLASS,), (OLDER,) * 50))
    assert "And 10 more rows; Ablation.to_dict gives all." in ablation.splitlines()
    asked = Table([("n",), *((str(n),) for n in range(100))])  # such as by --n 100
    assert len(str(asked).splitlines()) == 101


def test_rows_at_the_end_of_a_long_table_stay():
    rows = [("class",), *((f"c{n}",) for n in range(1000)), ("all",)]
    table = Table(rows, all_in="nothing has more", n_feet=1)
    last = ["c39", "all", "And 960 more rows; nothing has more."]
    assert str(table).splitlines()[-3:] == last
    assert table.fitted(80).splitlines()[-3:] == last
    assert [row[0] for row in shown(table.html()).rows("td")][-3:] == ["c59", "all", "and 940 more"]


def test_concepts_beside_clusters_are_listed_of_no_more_than_forty_channels():
    found = findings(1000, clusters=dict.fromkeys([1000]), kind="whole")
    lines = str(found).splitlines()
    assert sum(line.startswith("  channel ") for line in lines) == 40
    assert "  and 960 more channels, all of them in Findings.concepts" in lines


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r", " =", "＝", "＠"])  # noqa: RUF001
def test_csv_text_gives_spreadsheets_no_formula(start):
    cell = f"{start}cmd|' /C calc'!A0"
    text = csv_text(("name", "figure"), [(cell, -1.5), ("clock-face", 2)])
    assert f"'{cell}" in text.replace('"', "")
    assert ",-1.5\n" in text
    assert "\nclock-face,2\n" in text


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_a_table_fits_a_width_and_keeps_every_figure(width):
    heads = ("channel", "concept", *(f"figure {n}" for n in range(12)))
    names = ("a name that is rather long, and more", "short")
    figures = [f"{n / 7:.3f}" for n in range(24)]
    rows = [heads, *((str(k), name, *figures[12 * k :][:12]) for k, name in enumerate(names))]
    text = Table(rows).fitted(width)
    assert max(map(len, text.splitlines())) <= max(width, len("channel  concept   figure 10"))
    assert all(figure in text for figure in figures)
    assert text.count("short") == len(fit(rows, width))
    assert (names[0] in text) == (width >= 200)
    if width == 200:
        assert text == str(Table(rows))


def test_fitted_text_is_no_wider_than_asked_and_only_rows_are_cut():
    rows = [("name", "what"), ("a", "short"), ("b", "画" * 30), ("c", "x" * 100)]
    table = Table(rows, "a title " * 9, "a note " * 20)
    lines = table.fitted(40).splitlines()
    assert max(map(cell_len, lines)) <= 40
    shown = [line for line in lines if line.startswith(("a  ", "b  ", "c  "))]
    assert [line.endswith("…") for line in shown] == [False, True, True]
    words = " ".join(lines).split()
    assert (words.count("title"), words.count("note")) == (9, 20)
    words = {name: getattr(table, name).strip() for name in ("title", "note")}
    assert table.fitted(1000) == str(replace(table, **words))
