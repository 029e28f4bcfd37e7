"""The report in a real browser can be read: colours, letters in charts, captions on a phone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser import lay_out

CONTRASTS = """selector => {
    const colour = text => {
        const parts = text.match(/[0-9.]+/g).map(Number);
        return parts.length < 4 ? [...parts, 1] : parts;
    };
    const over = ([r, g, b, a], below) => [r, g, b].map((c, n) => a * c + (1 - a) * below[n]);
    const ground = e => {
        const below = () => e.parentElement ? ground(e.parentElement) : [255, 255, 255];
        const own = colour(getComputedStyle(e).backgroundColor);
        return own[3] < 1 ? over(own, below()) : own.slice(0, 3);
    };
    const luminance = rgb => {
        const [r, g, b] = rgb.map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    return [...document.querySelectorAll(selector)].filter(e => e.textContent.trim()).map(e => {
        const style = getComputedStyle(e), drawn = e.closest('svg');
        const below = ground(drawn ? drawn.parentElement : e);
        const ink = luminance(colour(drawn ? style.fill : style.color).slice(0, 3));
        const [low, high] = [ink, luminance(below)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    });
}"""


def contrast(page: Any, selector: str) -> float:
    """The lowest contrast of elements' texts with what they stand on, as WCAG defines it."""
    return float(min(page.evaluate(CONTRASTS, selector)))


TEXTS = (
    *("h1", "h3", ".lead", ".hint", "figcaption", "td", "th", ".tally", ".info", "summary"),
    *(".uncertain", ".mark", ".facts span", ".looks label", ".activation", ".back a"),
    *("svg text", "svg tspan.letter", "svg text.letter", ".tile", ".tile small"),
)


def test_light_and_dark(open_page: Callable[..., Any], reports: list[Path]) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        seen = set()
        for report in reports:
            page = open_page(report, color_scheme=scheme)
            lay_out(page)
            for selector in TEXTS:
                if page.locator(selector).count():
                    seen.add(selector)
                    assert contrast(page, selector) > 4.5, (scheme, selector)
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert seen == set(TEXTS)
    assert len(grounds) == 2


@pytest.mark.parametrize(
    ("selector", "colour"),
    [
        (".mark", "#d55e00"),
        (".letter", "#2b8cc4"),
        (".tile", "#999"),
        ("figcaption", "#888"),
    ],
)
def test_the_checker_sees_a_pale_colour(
    open_page: Callable[..., Any], reports: list[Path], selector: str, colour: str
) -> None:
    page = open_page(reports[1])
    assert contrast(page, selector) > 4.5
    page.evaluate(
        """([selector, colour]) => {
            const e = document.querySelector(selector);
            for (const name of ['--c', 'fill', 'color']) {
                if (name !== 'color' || !e.matches('.mark')) e.style.setProperty(name, colour);
            }
        }""",
        [selector, colour],
    )
    assert contrast(page, selector) < 4.5


# --- letters in charts ----------------------------------------------------------------------------

LETTERS = """() => [...document.querySelectorAll('svg.chart')].map(chart => ({
    words: [...chart.querySelectorAll('text')].map(e => {
        const { a, b, c, d } = e.getScreenCTM();
        const parts = [e, ...e.querySelectorAll('tspan')].filter(p => p.getClientRects().length);
        const sizes = parts.map(p => parseFloat(getComputedStyle(p).fontSize));
        const box = e.getBoundingClientRect(), frame = e.ownerSVGElement.getBoundingClientRect();
        const clipped = e.ownerSVGElement !== chart;
        return {
            text: e.textContent,
            name: clipped,
            size: Math.min(...sizes) * Math.sqrt(Math.abs(a * d - b * c)),
            left: box.left, top: box.top, bottom: box.bottom,
            right: clipped ? Math.min(box.right, frame.right) : box.right,
            upright: b !== 0,
        };
    }).filter(w => w.right > w.left),
    curves: [...chart.querySelectorAll('.curve, .outline')]
        .map(e => e.getBoundingClientRect().left),
}))"""


def assert_legible(page: Any) -> None:
    """Letters in charts are large enough, and no words lie on others or on curves."""
    charts = page.evaluate(LETTERS)
    assert len(charts) >= 12
    names = 0
    for chart in charts:
        words = chart["words"]
        for n, one in enumerate(words):
            assert one["size"] >= 11, one
            if one["name"]:
                names += 1
                assert one["right"] <= min(chart["curves"]), one
            for other in words[:n]:
                assert not collide(one, other), (one, other)
    assert names


def collide(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the letters of two texts touch; their boxes have a line's height, or a third more."""

    def ink(box: dict[str, Any]) -> tuple[float, float, float, float]:
        air = 0.2 * (box["right"] - box["left"] if box["upright"] else box["bottom"] - box["top"])
        x, y = (air, 0) if box["upright"] else (0, air)
        return box["left"] + x, box["top"] + y, box["right"] - x, box["bottom"] - y

    (l1, t1, r1, b1), (l2, t2, r2, b2) = ink(one), ink(other)
    return min(r1, r2) - max(l1, l2) > 0.5 and min(b1, b2) - max(t1, t2) > 0.5


@pytest.mark.parametrize("width", [360, 600, 1100, 1600])
def test_charts_are_legible(open_page: Callable[..., Any], reports: list[Path], width: int) -> None:
    for report in reports:
        page = open_page(report, width=width)
        lay_out(page)
        assert_legible(page)


@pytest.mark.parametrize(
    "harm",
    [
        "document.querySelector('.tick').style.fontSize = '14px'",
        "document.querySelector('svg.chart').style.width = '60%'",
        "document.querySelector('svg text.letter').style.fontSize = '200px'",
        "document.querySelector('svg.chart svg text').style.fontSize = '12px'",
        "document.querySelector('svg.chart svg').setAttribute('width', 400);"
        "document.querySelector('svg.chart svg text').textContent = 'W'.repeat(40)",
    ],
)
def test_the_checker_sees_what_cannot_be_read(
    open_page: Callable[..., Any], reports: list[Path], harm: str
) -> None:
    page = open_page(reports[1], width=360)
    lay_out(page)
    page.evaluate(harm)
    with pytest.raises(AssertionError):
        assert_legible(page)
