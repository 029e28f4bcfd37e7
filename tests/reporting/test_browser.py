"""The report in a real browser: silent, searchable, usable by keyboard, the same on paper."""

from itertools import combinations
from typing import Any

import pytest

from browser import lay_out, load
from unbraid.reporting.words import ABSENT


@pytest.fixture
def page(open_page) -> Any:
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


def test_the_policy_stops_what_would_get_in_and_the_log_sees_it(browser, reports, tmp_path):
    harmed, bare = tmp_path / "harmed.html", tmp_path / "bare.html"
    harm = "<img src='https://a.b/x.png' onerror='console.log(1)'><script>console.log(2)</script>"
    harmed.write_text(reports[0].read_text(encoding="utf-8").replace("</main>", harm + "</main>"))
    _, said, asked = load(browser.new_context(), harmed)
    assert len(said) == 3
    assert all("Content Security Policy" in words for words in said)
    assert not asked  # the policy refuses before anything is asked
    bare.write_text("<img src='https://a.b/x.png'>")  # without a policy it is seen
    assert load(browser.new_context(), bare)[2] == ["https://a.b/x.png"]


def test_search_by_number_and_by_class(page, run):
    everything, shown = channels(page), channels(page, "article")
    assert everything == [*shown, "77"]
    matching = [channel for channel in everything if channel.startswith(shown[1])]
    for words in ("{}", "Channel #{}"):
        page.fill("#search", words.format(shown[1]))
        assert channels(page) == matching
    assert channels(page, "article") == [c for c in matching if c in shown]
    pairs = channels(page, "table.pairs tr[data-channel]")
    assert pairs == [str(p.channel) for p in run.found.pairs if str(p.channel) in matching]
    page.fill("#search", "<SCRIPT>")
    concepts = run.found.concepts.items()
    named = {str(channel) for channel, groups in concepts if any(0 in group for group in groups)}
    assert set(channels(page)) == {*named, "77"}
    page.press("#search", "Escape")
    assert channels(page) == everything


def test_sort_by_click_and_keyboard(page):
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


def test_a_link_opens_its_channel_also_when_the_search_hides_it(open_page):
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


def test_keyboard(page):
    order = [f"channel-{channel}" for channel in channels(page, "article")]
    for key, n in (("j", 0), ("j", 1), ("k", 0), ("k", 0)):  # there is none before the first
        page.keyboard.press(key)
        wait_for_focus(page, order[n])
    page.keyboard.press("/")
    wait_for_focus(page, "search")
    page.keyboard.type("j/k7")
    assert page.input_value("#search") == "j/k7"
    page.keyboard.press("Escape")
    page.keyboard.type(order[1].removeprefix("channel-"))
    page.keyboard.press("Enter")
    wait_for_focus(page, order[1])


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_is_wider_than_the_screen_nor_too_small_to_tap(open_page, width):
    page = open_page(width=width, has_touch=width < 500)
    lay_out(page)
    small = """selector => [...document.querySelectorAll(selector)].filter(e => {
        const { width, height } = e.getBoundingClientRect();
        return width && (width < 23.9 || height < 23.9);
    }).map(e => e.outerHTML)"""
    assert page.evaluate(small, "td a, th a, thead button, .back a, summary, #tools button") == []
    assert page.evaluate(small, ".mark")  # the checker sees what is smaller
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    too_wide = """() => [...document.querySelectorAll('body *')].filter(e =>
        !e.closest('.scroll, .skip, label, svg') &&
        e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    ).map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(too_wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_pictures_are_shown_whole_or_where_and_all_on_paper(page):
    page.wait_for_load_state("load")
    pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert pictures
    assert all(pictures)
    lay_out(page)
    for look in ("whole", "answer"):
        page.click(f"label[for=look-{look}]")
        assert page.locator(".veil").first.is_visible() == (look == "answer")
    image, veil = (page.locator(one).first.bounding_box() for one in (".frame img", ".veil"))
    assert image == veil
    page.emulate_media(media="print")
    assert page.locator(".words dt").first.is_visible()
    assert not page.locator("#tools").is_visible()


def test_without_script_all_is_there(page, open_page):
    bare = open_page(java_script_enabled=False)
    assert not bare.locator("#search").is_visible()
    articles = bare.locator("article")
    assert articles.count() == page.locator("article").count() > 1
    assert all(articles.nth(n).is_visible() for n in range(articles.count()))
    articles.locator("details summary").first.click()  # folds open without script
    assert articles.locator("details[open]").count() == 1


LETTERS = """() => [...document.querySelectorAll('svg.chart')].map(chart =>
    [...chart.querySelectorAll('text')].map(e => {
        const { a, b, c, d } = e.getScreenCTM();
        const parts = [e, ...e.querySelectorAll('tspan')].filter(p => p.getClientRects().length);
        const sizes = parts.map(p => parseFloat(getComputedStyle(p).fontSize));
        const box = e.getBoundingClientRect(), frame = e.ownerSVGElement.getBoundingClientRect();
        const right = e.ownerSVGElement === chart ? box.right : Math.min(box.right, frame.right);
        const air = 0.2 * (b ? box.width : box.height);  // a line is higher than its letters
        const x = b ? air : 0, y = b ? 0 : air;
        return {
            text: e.textContent,
            size: Math.min(...sizes) * Math.sqrt(Math.abs(a * d - b * c)),
            box: [box.left + x, box.top + y, right - x, box.bottom - y],
        };
    }).filter(w => w.box[2] > w.box[0]))"""


def assert_legible(page: Any) -> None:
    """Letters in charts are large enough, and no words lie on others."""
    charts = page.evaluate(LETTERS)
    assert len(charts) >= 12
    for words in charts:
        assert all(word["size"] >= 11 for word in words), words
        for one, other in combinations(words, 2):
            (l1, t1, r1, b1), (l2, t2, r2, b2) = one["box"], other["box"]
            apart = min(r1, r2) - max(l1, l2) <= 0.5 or min(b1, b2) - max(t1, t2) <= 0.5
            assert apart, (one, other)


@pytest.mark.parametrize("width", [360, 600, 1600])
def test_charts_are_legible_and_the_checker_sees_what_is_not(open_page, reports, width):
    for report in reports:
        page = open_page(report, width=width)
        lay_out(page)
        assert_legible(page)
    for selector, size in ((".tick", 4), ("svg text.letter", 200)):
        page.evaluate(f"document.querySelector('{selector}').style.fontSize = '{size}px'")
        with pytest.raises(AssertionError):
            assert_legible(page)
        page.evaluate(f"document.querySelector('{selector}').style.fontSize = ''")
