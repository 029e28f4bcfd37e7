"""The report in a real browser: silent, searchable, usable by keyboard, the same on paper."""

import math
import re
import shlex
from dataclasses import replace

import pytest

import unbraid
from pages import LONG
from unbraid.finding.pairs import Pair
from unbraid.measuring.before_after import BeforeAfter, ClassChange, Confusion
from unbraid.reporting import report as report_module
from unbraid.reporting.before_after import before_after_page
from unbraid.reporting.words import ABSENT

# Also what is off the screen.
LAY_OUT = "document.querySelectorAll('article').forEach(a => a.style.contentVisibility = 'visible')"


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    """One with a channel that is only listed and hostile names."""
    path = tmp_path_factory.mktemp("browser") / "a <b> & 'c'" / "hostile.html"
    nowhere = Pair(77, 0, 1, math.nan, 0.9, 0.9, math.nan, math.nan, math.nan, math.nan)
    concepts = {**run.found.concepts, 77: ((0,), (1,))}
    found = replace(run.found, concepts=concepts, pairs=(*run.found.pairs, nowhere))
    run.report(path, found=replace(found, class_names=(*run.found.class_names[:3], LONG)))
    return path


def load(context, file, anchor=""):
    """Open a file, and note what it says on the console or asks of a network: it should not."""
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))

    def refuse(route):
        asked.append(route.request.url)
        route.abort()

    page.route(lambda url: not url.startswith(file.as_uri()), refuse)
    page.goto(file.as_uri() + anchor)
    return page, said, asked


@pytest.fixture
def open_page(browser, report):
    """Open the report, and see that it stays silent."""
    opened = []

    def open_one(anchor="", width=1100, **how):
        context = browser.new_context(viewport={"width": width, "height": 800}, **how)
        page, said, asked = load(context, report, anchor)
        opened.append((context, said, asked))
        return page

    yield open_one
    for context, said, asked in opened:
        assert (said, asked) == ([], [])
        context.close()


@pytest.fixture
def page(open_page):
    return open_page()


def channels(page, selector="table.overview tr[data-channel]"):
    """The channels in a table, or of the sections, as they are seen."""
    seen = "selector => [...document.querySelectorAll(selector)].filter(e => e.offsetHeight)"
    name = "e.dataset.channel ?? e.id.replace('channel-', '')"
    return page.evaluate(f"{seen}.map(e => {name})", selector)


def wait_for_focus(page, name):
    focus = "document.activeElement.dataset.channel ?? document.activeElement.id"
    page.wait_for_function(f"name => ({focus}) === name", arg=name)


def test_the_policy_stops_what_would_get_in_and_the_log_sees_it(browser, report, tmp_path):
    harmed, bare = tmp_path / "harmed.html", tmp_path / "bare.html"
    harm = "<img src='https://a.b/x.png' onerror='console.log(1)'><script>console.log(2)</script>"
    harmed.write_text(report.read_text(encoding="utf-8").replace("</main>", harm + "</main>"))
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
    for words in (shown[1], f"Channel #{shown[1]}"):
        page.fill("#search", words)
        assert channels(page) == matching
    assert channels(page, "article") == [c for c in matching if c in shown]
    pairs = channels(page, "table.pairs tr[data-channel]")
    assert pairs == [str(p.channel) for p in run.found.pairs if str(p.channel) in matching]
    page.fill("#search", "<SCRIPT>")
    named = {str(channel) for channel, groups in run.found.concepts.items() if 0 in sum(groups, ())}
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
        assert errors == sorted(errors, key=float, reverse=order == "descending")
        assert channels(page, "article") == channels(page)[:-1]


def test_a_link_opens_its_channel_also_when_the_search_hides_it(open_page):
    first, second = channels(open_page(), "article")[:2]
    page = open_page(anchor=f"#channel-{second}")
    wait_for_focus(page, f"channel-{second}")
    at_top = "id => Math.abs(document.getElementById(id).getBoundingClientRect().top) < 120"
    page.wait_for_function(at_top, arg=f"channel-{second}")
    page.fill("#search", "77")
    assert channels(page, "article") == []
    for channel, focused in ((first, f"channel-{first}"), ("77", "77"), ("123456", "77")):
        page.evaluate("channel => { location.hash = `#channel-${channel}` }", channel)
        wait_for_focus(page, focused)
    assert first in channels(page, "article")


def test_keyboard(page):
    order = [f"channel-{channel}" for channel in channels(page, "article")]
    keys = (("j", 0), ("ArrowRight", 1), ("k", 0), ("ArrowLeft", 0))  # none is before the first
    for key, n in keys:
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
    page.click("label[for=look-source]")
    page.keyboard.press("ArrowLeft")  # chooses, and does not leave for another channel
    assert page.is_checked("#look-answer")
    wait_for_focus(page, "look-answer")
    stopped = """shiftKey => !document.body.dispatchEvent(new KeyboardEvent("keydown",
        { key: "ArrowRight", shiftKey, bubbles: true, cancelable: true }))"""
    assert [page.evaluate(stopped, shift) for shift in (True, False)] == [False, True]


def test_a_number_finds_its_own_channel_first_and_the_order_comes_back(page):
    before, shown = channels(page), channels(page, "article")
    page.evaluate(
        """channels => channels.forEach(([old, number]) => {
            document.querySelector(`.overview tr[data-channel='${old}']`).dataset.channel = number;
            document.getElementById(`channel-${old}`).id = `channel-${number}`;
        })""",
        [[shown[0], "12"], [shown[1], "1"]],
    )
    page.fill("#search", "1")
    assert channels(page)[:2] == channels(page, "article")[:2] == ["1", "12"]
    page.fill("#search", "")
    assert channels(page) == ["12", "1", *before[2:]]
    assert channels(page, "article") == ["12", "1", *shown[2:]]


def test_pictures_are_shown_whole_or_where_and_all_on_paper(page):
    page.wait_for_load_state("load")
    pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert {*pictures} == {True}
    page.evaluate(LAY_OUT)
    for look in ("whole", "source", "answer"):
        page.click(f"label[for=look-{look}]")
        for kind in ("answer", "source"):
            assert page.locator(f".veil.{kind}").first.is_visible() == (look == kind)
    image, veil = (page.locator(one).first.bounding_box() for one in (".frame img", ".veil.answer"))
    assert image == veil


def test_a_picture_opens_larger_by_mouse_and_keyboard_and_closes_again(page):
    frame = page.locator("article .frame").first
    small = frame.bounding_box()["width"]
    for act in (frame.click, lambda: frame.press("Enter")):
        act()
        shown = page.locator("dialog[open] .frame")
        assert shown.bounding_box()["width"] > 2 * small
        assert page.locator("dialog[open] p").inner_text().strip().startswith("Close")
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 0


def test_a_folded_channel_opens_when_it_is_gone_to(browser, run, tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "_FEW", 1)
    monkeypatch.setattr(report_module, "N_UNFOLDED", 1)
    run.report(tmp_path / "r.html")
    page, said, _ = load(browser.new_context(), tmp_path / "r.html")
    assert page.locator("details.whole-channel[open]").count() == 0
    for channel in channels(page, "article")[:2]:
        page.keyboard.press("j")
        wait_for_focus(page, f"channel-{channel}")
    assert page.locator("details.whole-channel[open]").count() == 1
    assert said == []


def test_print_folds_nothing_but_what_is_said_once_more_and_hides_the_tools(open_page):
    page = open_page(width=680)  # A4 without margins
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open], .aside)").count() == 0
    assert page.locator("details.aside[open]").count() == 0
    page.emulate_media(media="print")
    assert page.locator(".words dt").first.is_visible()
    assert not page.locator("#tools").is_visible()
    assert not page.locator("details.aside summary").first.is_visible()
    widest = """() => Math.max(...[...document.querySelectorAll('table')]
        .map(t => t.getBoundingClientRect().right))"""
    assert page.evaluate(widest) <= 681
    page.evaluate("document.querySelector('.effects td').style.paddingLeft = '700px'")
    assert page.evaluate(widest) > 681
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0


def test_without_script_all_is_there(page, open_page):
    bare = open_page(java_script_enabled=False)
    assert not bare.locator("#search").is_visible()
    articles = bare.locator("article")
    assert articles.count() == page.locator("article").count() > 1
    assert all(articles.nth(n).is_visible() for n in range(articles.count()))
    articles.locator("details summary").first.click()  # folds open without script
    assert articles.locator("details[open]").count() == 1


def empty_report(run, path):
    """A page of a run in which nothing is found, with candidates."""
    found = unbraid.find(run.train_scan, p=0.99, gamma=-0.99)
    assert not found.concepts
    assert found.nearest
    command = "unbraid run --data 'a <b> & c' --gamma -0.99"
    how = {"found": found, "split": None, "evaluation": None, "command": command}
    run.report(path, **how)
    return path, found.nearest[0].options(found)


def test_a_command_is_copied_by_click_and_keyboard_or_shown_where_that_is_refused(
    browser, run, tmp_path
):
    path, options = empty_report(run, tmp_path / "empty.html")
    whole = f"unbraid run --data 'a <b> & c' {options}"
    for can, said in ((True, "Copied"), (False, "Chosen; press Ctrl+C")):
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        page, logged, _ = load(context, path)
        if not can:
            page.evaluate(
                """() => {
                    navigator.clipboard.writeText = () => Promise.reject(new Error("no"));
                    document.execCommand = () => false;
                }"""
            )
        button = page.locator("table.nearest button.copy").first
        assert button.get_attribute("aria-label") == f"Copy: {whole}"
        button.focus()
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('.told').textContent")
        assert page.locator(".told").first.text_content() == said
        if can:
            assert page.evaluate("navigator.clipboard.readText()") == whole
        else:
            assert page.evaluate("getSelection().toString()") == whole
        assert logged == []
        context.close()


def test_the_page_tells_the_command_that_opens_its_run_wherever_it_lies(browser, run, tmp_path):
    folder = tmp_path / "it's <here>"
    run.report(folder / "report.html", command="")
    page, _, _ = load(browser.new_context(), folder / "report.html")
    code = page.locator(".explore code").text_content()
    assert shlex.split(code) == ["unbraid", "explore", str(folder)]
    bare, _, _ = load(browser.new_context(java_script_enabled=False), folder / "report.html")
    assert "unbraid explore . in this page\u2019s folder" in bare.locator(".explore").inner_text()
    assert bare.locator("button.copy").count() == 0
    run.report(folder / "report.html")
    assert load(browser.new_context(), folder / "report.html")[0].locator(".explore").count() == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_circuits_stay_within_the_page_and_their_lines_meet_the_nodes(open_page, width):
    page = open_page(width=width)
    page.evaluate(LAY_OUT)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    off = """() => {
        const graph = document.querySelector('.circuit .graph');
        const [left, between, right] = graph.children;
        const box = between.getBoundingClientRect();
        const at = (e) => e.getBoundingClientRect();
        const middle = (e) => (at(e).top + at(e).bottom) / 2;
        const ends = [...graph.querySelectorAll('path')].map(p => {
            const numbers = p.getAttribute('d').match(/[\\d.]+/g);
            return [numbers[1], numbers[7]].map(y => box.top + y / 100 * box.height);
        });
        const nodes = [left, right].map(list => [...list.children].map(middle));
        return Math.max(...ends.flatMap(pair => pair.map((y, side) =>
            Math.min(...nodes[side].map(m => Math.abs(m - y))))));
    }"""
    assert page.evaluate(off) < 2


def test_a_card_names_a_concept_in_three_lines_and_whole_to_a_pointer(open_page, run, report):
    for width in (1100, 390):
        captions = open_page(width=width).locator(".examples figcaption")
        assert captions.count() > 2
        for caption in captions.all():
            said = caption.locator(".said")
            lines = said.evaluate(
                "e => e.offsetHeight / parseFloat(getComputedStyle(e).lineHeight)"
            )
            assert lines < 3.5
            # The mark, a letter, stands before the names.
            whole = "".join(said.evaluate("e => e.textContent").split()[1:])
            told = re.sub("[\u2066-\u2069]", "", caption.get_attribute("title"))
            assert "".join(told.split()) == whole


BROKEN = """() => [...document.querySelectorAll(".changed .name bdi")].flatMap(bdi => {
  const node = bdi.firstChild, words = [...node.data.matchAll(/\\S+/g)]
  return words.filter(word => {
    const range = document.createRange()
    range.setStart(node, word.index)
    range.setEnd(node, word.index + word[0].length)
    return range.getClientRects().length > 1
  }).map(word => word[0])
})"""


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_before_and_after_breaks_no_name_within_a_word(browser, run, tmp_path, width):
    names = ("standard poodle", "American alligator", "Staffordshire bullterrier")
    classes = tuple(ClassChange(k, name, 8, 7, 5) for k, name in enumerate(names))
    confusions = tuple(Confusion(name, names[0], 1, 3) for name in names[1:])
    changes = BeforeAfter(24, 24, 21, 15, classes, confusions, ())
    about = {"title": "net", "edits": [], "dataset": run.images, "sight": None}
    path = tmp_path / "before_after.html"
    path.write_text(before_after_page(changes, **about, predicted=False, files=[]))
    context = browser.new_context(viewport={"width": width, "height": 800})
    page, *_ = load(context, path)
    assert page.evaluate(BROKEN) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate(
        "for (const e of document.querySelectorAll('.name bdi')) e.style.wordBreak = 'break-all'"
    )
    assert width > 390 or page.evaluate(BROKEN)  # what it would see
    context.close()
