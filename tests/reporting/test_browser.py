"""The report in a real browser: silent, searchable, usable by keyboard, the same on paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser import lay_out, load
from pages import Run
from unbraid.reporting.words import ABSENT


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


def channels(page: Any, selector: str = "table.overview tr[data-channel]") -> list[str]:
    """The channels in a table, or of the sections, as they are seen."""
    return page.evaluate(
        """selector => [...document.querySelectorAll(selector)].filter(e => e.offsetHeight)
            .map(e => e.dataset.channel ?? e.id.replace('channel-', ''))""",
        selector,
    )


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.id"))


def column(page: Any, name: str) -> list[str]:
    """What is seen of one column of the list of channels."""
    heads = [t.strip() for t in page.locator("table.overview thead th").all_text_contents()]
    place = next(n for n, head in enumerate(heads) if head.startswith(name))
    cells = page.locator(f"table.overview tbody tr > :nth-child({place + 1})")
    return [cell.strip() for cell in cells.all_text_contents()]


def test_the_page_shows_its_pictures(page: Any) -> None:
    page.wait_for_load_state("load")
    pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert pictures
    assert all(pictures)


@pytest.mark.parametrize(
    "harm",
    [
        "<script>console.log(1)</script>",
        "<img src='https://example.org/x.png'>",
        "<img src='x.png' onerror='console.log(1)'>",
        "<p style='color: red'>x</p>",
        "<iframe src='https://example.org'></iframe>",
        "<link rel=stylesheet href='https://example.org/x.css'>",
    ],
)
def test_the_policy_stops_what_would_get_in_and_the_log_sees_it(
    browser: Any, reports: list[Path], tmp_path: Path, harm: str
) -> None:
    harmed, bare = tmp_path / "harmed.html", tmp_path / "bare.html"
    harmed.write_text(reports[0].read_text(encoding="utf-8").replace("</main>", harm + "</main>"))
    _, log = load(browser.new_context(), harmed)
    assert not log.silent
    assert not log.asked  # the policy refuses before anything is asked
    assert all("Content Security Policy" in words for words in log.said)
    bare.write_text("<img src='https://example.org/x.png'>")  # without a policy it is seen
    assert load(browser.new_context(), bare)[1].asked == ["https://example.org/x.png"]


def test_search_by_number_and_by_class(page: Any, run: Run) -> None:
    everything = channels(page)
    assert everything[-1] == "77"
    shown = channels(page, "article")
    assert shown == everything[:-1]

    page.fill("#search", shown[1])
    matching = [channel for channel in everything if channel.startswith(shown[1])]
    assert channels(page) == matching
    assert channels(page, "article") == [c for c in matching if c in shown]
    assert page.text_content("#count") == f"{len(matching)} of {len(everything)}"
    pairs = channels(page, "table.pairs tr[data-channel]")
    assert pairs == [str(p.channel) for p in run.found.pairs if str(p.channel) in matching]

    page.fill("#search", "<SCRIPT>")
    named = {
        str(channel)
        for channel, groups in run.found.concepts.items()
        if any(0 in group for group in groups)
    } | {"77"}
    assert set(channels(page)) == named

    for words in ("channel {}", "#{}", "Channel #{}", "channels {}", "# {}"):
        page.fill("#search", words.format(shown[1]))
        assert channels(page) == matching

    page.fill("#search", "nothing is called so")
    assert channels(page) == channels(page, "article") == []
    assert page.text_content("#count") == "No channel matches; Esc clears"
    page.press("#search", "Escape")
    assert channels(page) == everything


def test_sort_by_click_and_keyboard(page: Any) -> None:
    heads = page.locator("[aria-sort]")
    assert [text.split()[0] for text in heads.all_text_contents()] == ["Lowest", "Cosine"]
    head = page.locator("table.overview thead th", has_text="Separation error")
    assert head.get_attribute("aria-sort") is None

    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    errors = column(page, "Separation error")
    assert errors[-1] == ABSENT
    assert [float(e) for e in errors[:-1]] == sorted(float(e) for e in errors[:-1])
    assert channels(page, "article") == channels(page)[:-1]

    page.keyboard.press("Enter")  # the button has kept the focus
    assert head.get_attribute("aria-sort") == "descending"
    errors = column(page, "Separation error")
    assert errors[-1] == ABSENT
    assert [float(e) for e in errors[:-1]] == sorted((float(e) for e in errors[:-1]), reverse=True)

    number = page.locator("table.overview thead th", has_text="Channel")
    number.locator("button").focus()
    page.keyboard.press("Space")
    assert number.get_attribute("aria-sort") == "ascending"
    assert head.get_attribute("aria-sort") is None
    assert channels(page) == sorted(channels(page), key=int)


def test_a_link_opens_its_channel_also_when_the_search_hides_it(
    page: Any, open_page: Callable[..., Any]
) -> None:
    first, second = channels(page, "article")[:2]
    page = open_page(anchor=f"#channel-{second}")
    assert focused(page) == f"channel-{second}"
    page.wait_for_function(
        "id => Math.abs(document.getElementById(id).getBoundingClientRect().top) < 120",
        arg=f"channel-{second}",
    )
    page.fill("#search", "77")
    assert channels(page, "article") == []
    page.evaluate("channel => { location.hash = `#channel-${channel}` }", first)
    page.wait_for_function("id => document.activeElement.id === id", arg=f"channel-{first}")
    assert first in channels(page, "article")
    page.evaluate("() => { location.hash = '#channel-77' }")
    page.wait_for_function("document.activeElement.dataset.channel === '77'")
    page.evaluate("() => { location.hash = '#channel-123456' }")  # there is none


def test_keyboard(page: Any) -> None:
    order = [f"channel-{channel}" for channel in channels(page, "article")]
    for key, n in (("j", 0), ("j", 1), ("k", 0), ("k", 0)):  # there is none before the first
        page.keyboard.press(key)
        page.wait_for_function("id => document.activeElement.id === id", arg=order[n])
    page.keyboard.press("/")
    assert focused(page) == "search"
    page.keyboard.type("j/k7")
    assert page.input_value("#search") == "j/k7"
    page.keyboard.press("Escape")
    assert page.input_value("#search") == ""
    page.keyboard.type(order[1].removeprefix("channel-"))
    page.keyboard.press("Enter")
    page.wait_for_function("id => document.activeElement.id === id", arg=order[1])
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.wait_for_function("document.activeElement.id === 'channels'")
    page.click(".keys summary")
    for key in ("/", "j", "k", "Esc"):
        assert page.locator(".keys kbd", has_text=key).first.is_visible()


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_nothing_is_wider_than_the_screen(open_page: Callable[..., Any], width: int) -> None:
    page = open_page(width=width, has_touch=width < 500)
    lay_out(page)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    too_wide = page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter(e =>
            !e.closest('.scroll, .skip, label, svg') &&
            e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
        ).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert not too_wide
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_pictures_are_shown_whole_or_where(page: Any) -> None:
    lay_out(page)
    for look in ("whole", "answer"):
        assert page.is_checked("#look-whole")
        page.click(f"label[for=look-{look}]")
        assert page.locator(".veil").first.is_visible() == (look == "answer")
    frame, image, veil = (
        page.locator(selector).first.bounding_box()
        for selector in (".frame", ".frame img", ".veil")
    )
    assert image == veil
    assert frame["width"] == image["width"]


def test_print_folds_nothing_and_hides_the_tools(page: Any) -> None:
    terms = page.locator(".words dt")
    assert not terms.first.is_visible()
    page.emulate_media(media="print")
    assert terms.first.is_visible()
    assert not page.locator("#tools").is_visible()


def test_without_script_all_is_there(page: Any, open_page: Callable[..., Any]) -> None:
    bare = open_page(java_script_enabled=False)
    assert not bare.locator("#search").is_visible()
    assert page.locator("#search").is_visible()
    articles = bare.locator("article")
    assert articles.count() == page.locator("article").count() > 1
    assert all(articles.nth(n).is_visible() for n in range(articles.count()))
    bare.locator("article details summary").first.click()  # folds open without script
    assert bare.locator("article details[open]").count() == 1


@pytest.mark.parametrize("width", [1280, 360])
def test_the_bar_neither_moves_nor_covers_what_was_scrolled_to(
    open_page: Callable[..., Any], width: int
) -> None:
    page = open_page(width=width)
    top = "id => Math.round(document.getElementById(id).getBoundingClientRect().top)"
    for channel in channels(page, "article")[:2]:
        article = f"channel-{channel}"
        page.evaluate("id => { location.hash = `#${id}` }", article)
        page.wait_for_function("id => document.activeElement.id === id", arg=article)
        page.wait_for_timeout(100)  # what is off the screen is laid out as it comes near
        before = page.evaluate(top, article)
        page.click("label[for=look-answer]")
        page.click("label[for=look-whole]")
        page.keyboard.press("/")
        page.wait_for_timeout(100)
        assert page.evaluate(top, article) == before
        page.mouse.wheel(0, 300)
        page.wait_for_timeout(100)
        assert page.evaluate(top, article) == before - 300
        page.evaluate("id => document.getElementById(id).scrollIntoView()", article)
        bar = page.evaluate("document.getElementById('tools').getBoundingClientRect().bottom")
        assert page.evaluate(top, article) >= bar - 1


SMALL = """selector => [...document.querySelectorAll(selector)].filter(e => {
    const { width, height } = e.getBoundingClientRect();
    return width && (width < 23.9 || height < 23.9);
}).map(e => e.outerHTML)"""


def test_what_is_tapped_has_room_for_a_finger(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate(SMALL, "td a, th a, thead button, .back a, summary, #tools button") == []
    assert page.evaluate(SMALL, ".mark")  # the checker sees what is smaller
