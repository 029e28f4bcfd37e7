"""The report in a real browser: silent, searchable, usable by keyboard, legible everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import QUOTES, SCRIPT, Run, run  # noqa: F401  # a fixture

from browser import launch, lay_out, load
from pages import LONG, hostile
from unbraid.reporting.words import ABSENT


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launch() as started:
        yield started


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    yield context
    context.close()


@pytest.fixture(scope="module")
def file(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A report with one channel that is only listed, without figures."""
    path = tmp_path_factory.mktemp("browser") / "a <b> & 'c'" / "report.html"
    hostile(run, path)
    return path


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


def test_the_page_is_silent(context: Any, file: Path) -> None:
    page, log = load(context, file)
    page.wait_for_load_state("load")
    pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert pictures
    assert all(pictures)
    assert log.silent, (log.said, log.asked)


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
    context: Any, file: Path, tmp_path: Path, harm: str
) -> None:
    harmed = tmp_path / "harmed.html"
    harmed.write_text(file.read_text(encoding="utf-8").replace("</main>", harm + "</main>"))
    _, log = load(context, harmed)
    assert not log.silent
    assert not log.asked  # the policy refuses before anything is asked
    assert all("Content Security Policy" in words for words in log.said)


def test_a_request_would_be_seen(context: Any, tmp_path: Path) -> None:
    file = tmp_path / "open.html"
    file.write_text("<img src='https://example.org/x.png'>")
    _, log = load(context, file)
    assert log.asked == ["https://example.org/x.png"]


def test_search_by_number_and_by_class(context: Any, file: Path, run: Run) -> None:  # noqa: F811
    page, log = load(context, file)
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

    page.fill("#search", "nothing is called so")
    assert channels(page) == channels(page, "article") == []
    page.press("#search", "Escape")
    assert channels(page) == everything
    assert log.silent


def test_sort_by_click_and_keyboard(context: Any, file: Path) -> None:
    page, log = load(context, file)
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
    assert log.silent


def test_a_link_opens_its_channel_also_when_the_search_hides_it(context: Any, file: Path) -> None:
    page, log = load(context, file)
    first, second = channels(page, "article")[:2]
    page.close()
    page, log = load(context, file, f"#channel-{second}")
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
    assert log.silent


def test_keyboard(context: Any, file: Path) -> None:
    page, log = load(context, file)
    order = [f"channel-{channel}" for channel in channels(page, "article")]
    page.keyboard.press("j")
    page.wait_for_function("id => document.activeElement.id === id", arg=order[0])
    page.keyboard.press("ArrowRight")
    page.wait_for_function("id => document.activeElement.id === id", arg=order[1])
    page.keyboard.press("k")
    page.wait_for_function("id => document.activeElement.id === id", arg=order[0])
    page.keyboard.press("ArrowLeft")  # there is none before
    assert focused(page) == order[0]
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
    assert log.silent


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_nothing_is_wider_than_the_screen(browser: Any, file: Path, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 740}, has_touch=width < 500)
    page, log = load(context, file)
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
    assert log.silent
    context.close()


def test_pictures_are_shown_whole_or_where(context: Any, file: Path) -> None:
    page, log = load(context, file)
    lay_out(page)
    assert page.is_checked("#look-whole")
    seen = {}
    for look in ("whole", "answer", "source"):
        page.click(f"label[for=look-{look}]")
        seen[look] = [
            page.locator(f".veil.{kind}").first.is_visible() for kind in ("answer", "source")
        ]
    assert seen == {"whole": [False, False], "answer": [True, False], "source": [False, True]}
    page.focus("#look-source")
    page.keyboard.press("ArrowLeft")  # chooses, and does not leave for another channel
    assert page.is_checked("#look-answer")
    assert focused(page) == "look-answer"
    frame, image, veil = (
        page.locator(selector).first.bounding_box()
        for selector in (".frame", ".frame img", ".veil.answer")
    )
    assert image == veil
    assert frame["width"] == image["width"]
    assert log.silent


def test_hostile_names_show_as_text(context: Any, file: Path) -> None:
    page, log = load(context, file)
    text = page.evaluate("document.body.textContent")
    for name in (SCRIPT, QUOTES, LONG[:199] + "…"):
        assert name in text
    assert LONG[:200] not in page.content()
    assert page.locator("script").count() == 1
    assert page.evaluate("document.querySelectorAll('[src=x]').length") == 0
    assert log.silent


def test_print_folds_nothing_and_hides_the_tools(context: Any, file: Path) -> None:
    page, log = load(context, file)
    assert page.locator("details[open]").count() == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open], .aside)").count() == 0
    assert page.locator("details.aside[open]").count() == 0
    page.emulate_media(media="print")
    assert not page.locator("#tools").is_visible()
    assert not page.locator("details.aside summary").first.is_visible()
    assert page.locator(".words dt").first.is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert log.silent


def sheets(page: Any) -> int:
    """Pages of paper, as counted in a PDF file."""
    return len(re.findall(rb"/Type\s*/Page\b", page.pdf()))


def test_every_channel_has_its_paper(context: Any, file: Path) -> None:
    page, log = load(context, file)
    everything, n = sheets(page), page.locator("article").count()
    page.evaluate("document.querySelectorAll('article').forEach(a => a.replaceChildren('short'))")
    assert everything >= sheets(page) >= n  # each but the first begins a new one
    short = sheets(page)
    page.evaluate("document.querySelector('article').remove()")
    assert sheets(page) == short - 1
    page.evaluate("document.querySelectorAll('article').forEach(a => a.remove())")
    assert sheets(page) <= short - (n - 2)
    assert log.silent


def test_no_table_is_wider_than_paper(browser: Any, file: Path) -> None:
    context = browser.new_context(viewport={"width": 680, "height": 960})  # A4 without margins
    page, log = load(context, file)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    widest = """() => Math.max(...[...document.querySelectorAll('table')]
        .map(t => t.getBoundingClientRect().right))"""
    assert page.evaluate(widest) <= 681
    page.evaluate("document.querySelector('.effects td').style.paddingLeft = '700px'")
    assert page.evaluate(widest) > 681
    assert log.silent
    context.close()


def test_without_script_all_is_there(browser: Any, file: Path) -> None:
    with_script, without = (
        browser.new_context(java_script_enabled=enabled) for enabled in (True, False)
    )
    page, _ = load(with_script, file)
    bare, _ = load(without, file)
    assert not bare.locator("#search").is_visible()
    assert page.locator("#search").is_visible()
    articles = bare.locator("article")
    assert articles.count() == page.locator("article").count() > 1
    assert all(articles.nth(n).is_visible() for n in range(articles.count()))
    summary = bare.locator("article details summary").first
    summary.click()  # folds open without script
    assert bare.locator("article details[open]").count() == 1
    with_script.close()
    without.close()
