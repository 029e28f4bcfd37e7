"""The index page of several layers: its picture says what its data say, in shapes and in words."""

import csv
import json
import math
import re
from dataclasses import replace

import pytest
from test_browser import load

from pages import HOSTILE, LONG, read
from unbraid.base.errors import RunError
from unbraid.reporting.layers import LayerRow, Layers, read_layers
from unbraid.reporting.layers_page import describe_layers, draw_layers, render, write_index

MEASURED = {"n_measured": 4, "coverage": 0.25, "top_coverage": 0.5}
MEASURED |= {"r_precision": 0.75, "whole_r_precision": 0.5}
ABSENT = dict.fromkeys(MEASURED, math.nan) | {"n_measured": 0}


def row(depth, name, n_channels, n_sure=0, n_uncertain=0, page="", **measures):
    about = {"kind": "Conv2d", "n_in": 8, "tau": 0.03, "n_pairs": n_sure, "scans": ("a", "b")}
    cosine = 0.3 if n_sure else math.nan
    counts = {"n_channels": n_channels, "n_sure": n_sure, "n_uncertain": n_uncertain}
    return LayerRow(name, depth, page=page, lowest_cosine=cosine, **about, **counts, **measures)


def layers(*rows, n_layers=12, notes=()):
    return Layers("a network", "tau auto", n_layers, rows, notes)


SOME = layers(
    row(1, "stem", 16, **ABSENT),
    row(3, "a/b", 64, 4, 2, "a%2Fb/report.html", **MEASURED),
    row(7, "conv", 32, 8, 0, "", **MEASURED),
    row(12, "head", 10, 0, 1, "", **ABSENT),
    notes=("left out: <b>",),
)


def assert_bars_agree(picture, expected):
    """Heights of bars are in proportion to parts of channels, and bars stand at their depths."""
    bars = [
        (kind, float(x), float(high))
        for kind, x, high in re.findall(
            r'"(kept|maybe) k0" x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="([\d.]+)"',
            picture,
        )
    ]
    parts = []
    for own in expected.layers:
        parts += [("kept", own.depth, own.n_sure / own.n_channels)] * (own.n_sure > 0)
        parts += [("maybe", own.depth, own.n_uncertain / own.n_channels)] * (own.n_uncertain > 0)
    assert [kind for kind, *_ in bars] == [kind for kind, *_ in parts]
    heights = [high / part for (*_, high), (*_, part) in zip(bars, parts, strict=True)]
    assert max(heights, default=1) == pytest.approx(min(heights, default=1), rel=1e-2)
    if len({depth for _, depth, _ in parts}) > 1:
        (_, x1, _), (_, x2, _) = bars[0], bars[-1]
        pitch = (x2 - x1) / (parts[-1][1] - parts[0][1])
        for (_, x, _), (_, depth, _) in zip(bars, parts, strict=True):
            assert x - x1 == pytest.approx(pitch * (depth - parts[0][1]), abs=0.2)


def test_draw_layers_shows_every_layer_as_its_data_say():
    picture = str(draw_layers(SOME))
    assert_bars_agree(picture, SOME)
    for own in SOME.layers:
        assert f"{own.n_sure:,} of {own.n_channels:,} channels" in picture
    assert picture.count("<title>") == len(SOME.layers)


@pytest.mark.parametrize(
    "changed", [{"n_sure": 6}, {"n_uncertain": 9}, {"depth": 4}, {"n_sure": 0}]
)
def test_a_picture_of_other_data_is_told(changed):
    first, second, *rest = SOME.layers
    other = layers(first, replace(second, **changed), *rest)
    with pytest.raises(AssertionError):
        assert_bars_agree(str(draw_layers(SOME)), other)


def test_describe_layers_tells_the_most_polysemantic_first():
    told = describe_layers(SOME)
    assert re.search(r"4 layers .*Most in layer 7, .*8 of 32 channels \(25\.0%\); layer 3, ", told)
    assert "Surely none in any layer" in describe_layers(layers(row(1, "x", 3, 0, 1, **ABSENT)))
    many = [row(n, f"l{n}", 100, n, **ABSENT) for n in range(1, 9)]
    assert "; and 3 layers with fewer" in describe_layers(layers(*many))


def test_the_page_has_all_figures_and_links_only_to_reports(tmp_path):
    page = write_index(SOME, tmp_path)
    root = read(page.read_text())
    assert [e.attributes["href"] for e in root.all("a") if e.attributes["href"][0] != "#"] == [
        *["a%252Fb/report.html"] * 2
    ]
    cells = [list(map(str.strip, own)) for own in root.rows()]
    assert cells[1][2:5] == ["4", "2", "6.2%"]
    assert cells[1][-3:] == ["0.250", "0.750", "0.500"]
    assert cells[0][-4:] == ["–"] * 4  # noqa: RUF001
    assert "left out: <b>" in root.all("aside")[0].text
    assert "12 of 122 channels in 4 layers are surely polysemantic, 3 more" in root.text
    (picture,) = root.all("svg", "chart")
    assert picture.attributes["aria-label"] == describe_layers(SOME)
    (policy,) = (e.attributes["content"] for e in root.all("meta") if "http-equiv" in e.attributes)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert not root.all("script")


def test_names_and_numbers_of_any_kind_do_no_harm(tmp_path):
    rows = [row(n, name, 5, 1, **MEASURED) for n, name in enumerate([*HOSTILE, LONG, "\udcff"], 1)]
    root = read(render(replace(layers(*rows), title=HOSTILE[0])))
    assert not root.all("script")
    assert not root.all("img")
    assert len(render(layers(*rows))) < 100_000
    for few in (layers(), layers(row(1, "x", 3, **ABSENT), n_layers=1)):
        assert read(render(few)).all("svg", "chart")
    many = layers(*(row(n, f"l{n}", 9, 1, **MEASURED) for n in range(1, 1001)), n_layers=1000)
    assert_bars_agree(str(draw_layers(many)), many)


def test_data_beside_the_page_are_what_it_shows(tmp_path):
    write_index(SOME, tmp_path)
    assert str(read_layers(tmp_path)) == str(SOME)
    assert read_layers(tmp_path / "nowhere") is None
    with (tmp_path / "layers.csv").open(newline="") as file:
        first, second, *_ = csv.DictReader(file)
    assert (first["layer"], first["coverage"]) == ("stem", "")
    assert (second["n_sure"], second["coverage"]) == ("4", "0.25")


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": 2},
        {"schema": None},
        {"layers": None},
        {"n_layers": 0},
        {"more": 1},
        {"layers": [{"layer": "x"}]},
        {"layers": [{"n_sure": 99}]},
        {"layers": [{"n_channels": 0}]},
    ],
)
def test_damaged_data_are_told(damage, tmp_path):
    write_index(SOME, tmp_path)
    path = tmp_path / "layers.json"
    content = json.loads(path.read_text())
    whole = content["layers"][1]
    rows = damage.get("layers")
    if rows and len(rows[0]) == 1 and "layer" not in rows[0]:
        damage = {"layers": [whole | rows[0]]}
    path.write_text(json.dumps(content | damage))
    with pytest.raises(RunError, match=r"layers\.json is no list of layers"):
        read_layers(tmp_path)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_in_a_browser_nothing_is_wider_than_a_phone(width, scheme, browser, tmp_path):
    page_path = write_index(replace(SOME, title=LONG), tmp_path)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, said, asked = load(context, page_path)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    bars = page.locator(".chart .kept")
    assert bars.count() == 2
    paint = "e => getComputedStyle(e).fill"
    seen = {"light": "rgb(0, 114, 178)", "dark": "rgb(86, 180, 233)"}[scheme]
    assert bars.first.evaluate(paint) == seen
    size = page.locator(".chart .tick").first.evaluate(
        "e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a"
    )
    assert size >= 11
    assert (said, asked) == ([], [])
    context.close()
