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


TEXTS = (
    *("h1", "h3", ".lead", ".hint", "figcaption", "td", "th", ".tally", ".info", "summary"),
    *(".uncertain", ".mark", ".facts span", ".looks label", ".activation", ".back a"),
    *("svg text", "svg tspan.letter", "svg text.letter", ".tile", ".tile small"),
)


def test_texts_stand_out_in_light_and_dark_and_the_checker_sees_a_pale_one(
    open_page: Callable[..., Any], reports: list[Path]
) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        seen: dict[str, float] = {}
        for report in reports:
            page = open_page(report, color_scheme=scheme)
            lay_out(page)
            for selector in TEXTS:
                if contrasts := page.evaluate(CONTRASTS, selector):
                    seen[selector] = min(contrasts)
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert set(seen) == set(TEXTS)
        assert min(seen.values()) > 4.5, (scheme, seen)
    assert len(grounds) == 2
    for selector, colour in ((".letter", "#2b8cc4"), (".tile", "#999"), ("figcaption", "#888")):
        page = open_page(reports[1])
        pale = (
            "([s, c]) => { const e = document.querySelector(s); e.style.color = e.style.fill = c }"
        )
        page.evaluate(pale, [selector, colour])
        assert min(page.evaluate(CONTRASTS, selector)) < 4.5


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
def test_charts_are_legible_and_the_checker_sees_what_is_not(
    open_page: Callable[..., Any], reports: list[Path], width: int
) -> None:
    for report in reports:
        page = open_page(report, width=width)
        lay_out(page)
        assert_legible(page)
    for selector, size in ((".tick", 4), ("svg text.letter", 200)):
        page.evaluate(f"document.querySelector('{selector}').style.fontSize = '{size}px'")
        with pytest.raises(AssertionError):
            assert_legible(page)
        page.evaluate(f"document.querySelector('{selector}').style.fontSize = ''")
    page.evaluate(
        """const inner = document.querySelector('svg.chart svg');
        inner.setAttribute('width', 400);
        inner.firstChild.textContent = 'W'.repeat(40)"""
    )
    with pytest.raises(AssertionError):
        assert_legible(page)
