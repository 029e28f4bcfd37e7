"""The report's bar in a real browser: it moves nothing, and finds what is looked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_browser import channels, file  # noqa: F401  # a fixture
from test_report import run  # noqa: F401  # a fixture

from browser import launch, load


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launch() as started:
        yield started


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:  # noqa: F811
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page, log = load(context, file)
    yield page
    assert log.silent
    context.close()


TOP = "id => Math.round(document.getElementById(id).getBoundingClientRect().top)"


def moves(page: Any, article: str) -> list[int]:
    """How far each control of the bar moves an article that was scrolled to."""
    page.evaluate("id => { location.hash = '#channels'; location.hash = `#${id}` }", article)
    page.wait_for_function("id => document.activeElement.id === id", arg=article)
    tops = []
    for act in (
        lambda: page.click("label[for=look-answer]"),
        lambda: page.click("label[for=look-whole]"),
        lambda: page.keyboard.press("ArrowRight"),
        lambda: page.keyboard.press("/"),
        lambda: page.mouse.wheel(0, 300),
        lambda: page.click("label[for=look-whole]"),
    ):
        page.wait_for_timeout(100)  # what is off the screen is laid out as it comes near
        before = page.evaluate(TOP, article)
        act()
        page.wait_for_timeout(100)
        tops.append(page.evaluate(TOP, article) - before)
    return tops


@pytest.mark.parametrize("size", [(1280, 800), (700, 900), (360, 740)])
def test_the_bar_does_not_move_the_page(
    browser: Any,
    file: Path,  # noqa: F811
    size: tuple[int, int],
) -> None:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    page, log = load(context, file)
    for channel in channels(page, "article")[:2]:
        moved = moves(page, f"channel-{channel}")
        assert moved[4] == -300  # a wheel is seen to move it
        assert moved[:4] == [0, 0, 0, 0]
        assert moved[5] == 0
        below = page.evaluate(
            "() => document.getElementById('tools').getBoundingClientRect().bottom"
        )
        page.evaluate("id => document.getElementById(id).scrollIntoView()", f"channel-{channel}")
        assert page.evaluate(TOP, f"channel-{channel}") >= below - 1
    page.evaluate("document.documentElement.style.scrollPaddingTop = '6.5rem'")
    assert moves(page, f"channel-{channel}")[:4] != [0, 0, 0, 0]
    assert log.silent
    context.close()


def test_a_search_from_deep_in_the_page_shows_what_it_finds(page: Any) -> None:
    first, second = channels(page, "article")[:2]
    page.evaluate("id => { location.hash = `#channel-${id}` }", second)
    page.wait_for_function("id => document.activeElement.id === `channel-${id}`", arg=second)
    page.keyboard.press("/")
    page.keyboard.type(first)
    row = page.locator(f"table.overview tr[data-channel='{first}']").bounding_box()
    bar = page.locator("#tools").bounding_box()
    assert bar["y"] + bar["height"] <= row["y"] <= 800
    page.keyboard.type("no such")
    assert page.text_content("#count") == "No channel matches; Esc clears"
    page.keyboard.press("Escape")
    assert len(channels(page)) > 1


@pytest.mark.parametrize("words", ["channel {}", "#{}", "Channel #{}", "channels {}", "# {}"])
def test_channel_and_sharp_are_no_words_to_look_for(page: Any, words: str) -> None:
    number = channels(page)[1]
    page.fill("#search", number)
    found = channels(page)
    assert number in found
    page.fill("#search", words.format(number))
    assert channels(page) == found
    page.fill("#search", "channel")
    assert len(channels(page)) >= len(found)


def test_a_number_finds_its_own_channel_first(page: Any) -> None:
    before = channels(page)
    shown = channels(page, "article")
    page.evaluate(
        """([first, second]) => {
            for (const [old, number] of [[first, '12'], [second, '1']]) {
                document.querySelector(`table.overview tr[data-channel='${old}']`).dataset.channel
                    = number;
                document.getElementById(`channel-${old}`).id = `channel-${number}`;
            }
        }""",
        shown[:2],
    )
    page.fill("#search", "1")
    assert channels(page)[0] == channels(page, "article")[0] == "1"
    assert "12" in channels(page)
    page.fill("#search", "")
    assert channels(page) == ["12", "1", *before[2:]]
    assert channels(page, "article") == ["12", "1", *shown[2:]]


def test_an_arrow_with_shift_is_left_to_the_browser(page: Any) -> None:
    stopped = """shiftKey => !document.body.dispatchEvent(new KeyboardEvent("keydown",
        { key: "ArrowRight", shiftKey, bubbles: true, cancelable: true }))"""
    assert page.evaluate(stopped, True) is False
    assert page.evaluate(stopped, False) is True


def test_the_first_order_is_told(page: Any) -> None:
    heads = page.locator("[aria-sort]")
    assert [text.split()[0] for text in heads.all_text_contents()] == ["Lowest", "Cosine"]
    assert heads.first.get_attribute("aria-sort") == "ascending"
    heads.first.locator("button").click()
    assert heads.first.get_attribute("aria-sort") == "descending"


EDGES = """() => [...document.querySelectorAll('table.sortable')].flatMap(table => {
    const edge = e => {
        const range = document.createRange();
        range.selectNodeContents(e);
        return range.getBoundingClientRect().right;
    };
    const row = table.tBodies[0].rows[0];
    return [...table.tHead.rows[0].cells].filter(h => h.matches('.figure'))
        .map(h => edge(h.querySelector('button')) - edge(row.cells[h.cellIndex]));
})"""


def test_heads_end_where_their_figures_end(page: Any) -> None:
    edges = page.evaluate(EDGES)
    assert len(edges) > 6
    assert max(map(abs, edges)) <= 1.5, edges
    page.evaluate("document.querySelector('.overview .figure button').style.width = 'auto'")
    page.evaluate("document.querySelector('.overview .figure').style.width = '20rem'")
    assert max(map(abs, page.evaluate(EDGES))) > 1.5


SMALL = """selector => [...document.querySelectorAll(selector)].filter(e => {
    const { width, height } = e.getBoundingClientRect();
    return width && (width < 23.9 || height < 23.9);
}).map(e => e.outerHTML)"""


def test_what_is_tapped_has_room_for_a_finger(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate(SMALL, "td a, th a, thead button, .back a, summary, #tools button") == []
    assert page.evaluate(SMALL, ".mark")  # the checker sees what is smaller


def test_colours_that_tell_concepts_stay_when_others_are_forced(page: Any) -> None:
    page.emulate_media(forced_colors="active")
    for selector, side in ((".mark", "backgroundColor"), (".frame", "borderBottomColor")):
        seen = page.evaluate(
            """([selector, side]) => [...document.querySelectorAll(`article .k0 ${selector},
                article ${selector}.k0, article .k1 ${selector}, article ${selector}.k1`)]
                .map(e => getComputedStyle(e)[side])""",
            [selector, side],
        )
        assert len(set(seen)) == 2, seen
