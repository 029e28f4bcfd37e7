"""The report in a real browser: silent, searchable, usable by keyboard, the same on paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser import lay_out, load
from pages import Run
from unbraid.reporting.words import ABSENT

Open = Callable[..., Any]


@pytest.fixture
def page(open_page: Open) -> Any:
    return open_page()


def channels(page: Any, selector: str = "table.overview tr[data-channel]") -> list[str]:
    """The channels in a table, or of the sections, as they are seen."""
    return page.evaluate(
        """selector => [...document.querySelectorAll(selector)].filter(e => e.offsetHeight)
            .map(e => e.dataset.channel ?? e.id.replace('channel-', ''))""",
        selector,
    )


def wait_for_focus(page: Any, name: str) -> None:
    page.wait_for_function(
        "name => (document.activeElement.dataset.channel ?? document.activeElement.id) === name",
        arg=name,
    )


@pytest.mark.parametrize(
    "harm",
    ["<script>console.log(1)</script>", "<img src='https://a.b/x.png' onerror='console.log(1)'>"],
)
def test_the_policy_stops_what_would_get_in_and_the_log_sees_it(
    browser: Any, reports: list[Path], tmp_path: Path, harm: str
) -> None:
    harmed, bare = tmp_path / "harmed.html", tmp_path / "bare.html"
    harmed.write_text(reports[0].read_text(encoding="utf-8").replace("</main>", harm + "</main>"))
    _, log = load(browser.new_context(), harmed)
    assert log.said
    assert all("Content Security Policy" in words for words in log.said)
    assert not log.asked  # the policy refuses before anything is asked
    bare.write_text("<img src='https://a.b/x.png'>")  # without a policy it is seen
    assert load(browser.new_context(), bare)[1].asked == ["https://a.b/x.png"]


def test_search_by_number_and_by_class(page: Any, run: Run) -> None:
    everything, shown = channels(page), channels(page, "article")
    assert everything == [*shown, "77"]
    matching = [channel for channel in everything if channel.startswith(shown[1])]
    for words in ("{}", "channel {}", "#{}", "Channel #{}", "# {}"):
        page.fill("#search", words.format(shown[1]))
        assert channels(page) == matching
    assert channels(page, "article") == [c for c in matching if c in shown]
    assert page.text_content("#count") == f"{len(matching)} of {len(everything)}"
    pairs = channels(page, "table.pairs tr[data-channel]")
    assert pairs == [str(p.channel) for p in run.found.pairs if str(p.channel) in matching]
    page.fill("#search", "<SCRIPT>")
    concepts = run.found.concepts.items()
    named = {str(channel) for channel, groups in concepts if any(0 in group for group in groups)}
    assert set(channels(page)) == {*named, "77"}
    page.fill("#search", "nothing is called so")
    assert channels(page) == channels(page, "article") == []
    assert page.text_content("#count") == "No channel matches; Esc clears"
    page.press("#search", "Escape")
    assert channels(page) == everything


def test_sort_by_click_and_keyboard(page: Any) -> None:
    heads = page.locator("[aria-sort]").all_text_contents()
    assert [text.split()[0] for text in heads] == ["Lowest", "Cosine"]
    head = page.locator("table.overview thead th", has_text="Separation error")
    for act, order in (
        (lambda: head.locator("button").click(), "ascending"),
        (lambda: page.keyboard.press("Enter"), "descending"),  # the button has kept the focus
    ):
        act()
        assert head.get_attribute("aria-sort") == order
        cells = page.locator("table.overview tbody tr > :nth-child(4)").all_text_contents()
        *errors, last = (cell.strip() for cell in cells)
        assert last == ABSENT
        down = order == "descending"
        assert [*map(float, errors)] == sorted(map(float, errors), reverse=down)
        assert channels(page, "article") == channels(page)[:-1]
    number = page.locator("table.overview thead th", has_text="Channel")
    number.locator("button").focus()
    page.keyboard.press("Space")
    assert number.get_attribute("aria-sort") == "ascending"
    assert head.get_attribute("aria-sort") is None
    assert channels(page) == sorted(channels(page), key=int)


def test_a_link_opens_its_channel_also_when_the_search_hides_it(open_page: Open) -> None:
    first, second = channels(open_page(), "article")[:2]
    page = open_page(anchor=f"#channel-{second}")
    wait_for_focus(page, f"channel-{second}")
    page.wait_for_function(
        "id => Math.abs(document.getElementById(id).getBoundingClientRect().top) < 120",
        arg=f"channel-{second}",
    )
    page.fill("#search", "77")
    assert channels(page, "article") == []
    for channel, focused in ((first, f"channel-{first}"), ("77", "77"), ("123456", "77")):
        page.evaluate("channel => { location.hash = `#channel-${channel}` }", channel)
        wait_for_focus(page, focused)
    assert first in channels(page, "article")


def test_keyboard(page: Any) -> None:
    order = [f"channel-{channel}" for channel in channels(page, "article")]
    for key, n in (("j", 0), ("j", 1), ("k", 0), ("k", 0)):  # there is none before the first
        page.keyboard.press(key)
        wait_for_focus(page, order[n])
    page.keyboard.press("/")
    wait_for_focus(page, "search")
    page.keyboard.type("j/k7")
    assert page.input_value("#search") == "j/k7"
    page.keyboard.press("Escape")
    assert page.input_value("#search") == ""
    page.keyboard.type(order[1].removeprefix("channel-"))
    page.keyboard.press("Enter")
    wait_for_focus(page, order[1])
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    wait_for_focus(page, "channels")
    page.click(".keys summary")
    for key in ("/", "j", "k", "Esc"):
        assert page.locator(".keys kbd", has_text=key).first.is_visible()


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_nothing_is_wider_than_the_screen_nor_too_small_to_tap(open_page: Open, width: int) -> None:
    page = open_page(width=width, has_touch=width < 500)
    lay_out(page)
    small = """selector => [...document.querySelectorAll(selector)].filter(e => {
        const { width, height } = e.getBoundingClientRect();
        return width && (width < 23.9 || height < 23.9);
    }).map(e => e.outerHTML)"""
    assert page.evaluate(small, "td a, th a, thead button, .back a, summary, #tools button") == []
    assert page.evaluate(small, ".mark")  # the checker sees what is smaller
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    too_wide = page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter(e =>
            !e.closest('.scroll, .skip, label, svg') &&
            e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
        ).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert not too_wide
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_pictures_are_shown_whole_or_where_and_all_on_paper(page: Any) -> None:
    page.wait_for_load_state("load")
    pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert pictures
    assert all(pictures)
    lay_out(page)
    for look in ("whole", "answer"):
        assert page.is_checked("#look-whole")
        page.click(f"label[for=look-{look}]")
        assert page.locator(".veil").first.is_visible() == (look == "answer")
    frame, image, veil = (
        page.locator(one).first.bounding_box() for one in (".frame", ".frame img", ".veil")
    )
    assert image == veil
    assert frame["width"] == image["width"]
    terms = page.locator(".words dt").first
    assert not terms.is_visible()
    page.emulate_media(media="print")
    assert terms.is_visible()
    assert not page.locator("#tools").is_visible()


def test_without_script_all_is_there(page: Any, open_page: Open) -> None:
    bare = open_page(java_script_enabled=False)
    assert not bare.locator("#search").is_visible()
    assert page.locator("#search").is_visible()
    articles = bare.locator("article")
    assert articles.count() == page.locator("article").count() > 1
    assert all(articles.nth(n).is_visible() for n in range(articles.count()))
    articles.locator("details summary").first.click()  # folds open without script
    assert articles.locator("details[open]").count() == 1


@pytest.mark.parametrize("width", [1280, 360])
def test_the_bar_neither_moves_nor_covers_what_was_scrolled_to(open_page: Open, width: int) -> None:
    page = open_page(width=width)
    top = "id => Math.round(document.getElementById(id).getBoundingClientRect().top)"
    for channel in channels(page, "article")[:2]:
        article = f"channel-{channel}"
        page.evaluate("id => { location.hash = `#${id}` }", article)
        wait_for_focus(page, article)
        page.wait_for_timeout(100)  # what is off the screen is laid out as it comes near
        before = page.evaluate(top, article)
        page.click("label[for=look-answer]")
        page.click("label[for=look-whole]")
        page.keyboard.press("/")
        page.wait_for_timeout(100)
        assert page.evaluate(top, article) == before
        page.evaluate("id => document.getElementById(id).scrollIntoView()", article)
        bar = page.evaluate("document.getElementById('tools').getBoundingClientRect().bottom")
        assert page.evaluate(top, article) >= bar - 1
