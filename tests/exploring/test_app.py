"""The app in a real browser: pictures, gates, the bench, hostile names, two users at once."""

from dataclasses import replace

import pytest

import unbraid
from explored import HOSTILE, NAMES, TITLE, logits_by_hand
from unbraid.exploring.bench import findings_of
from unbraid.scanning.targets import read_target

READY = """() => {
    const view = document.querySelector("#view:not([aria-busy])");
    return view && view.children.length;
}"""


@pytest.fixture
def visit(browser, served):
    """Open the app as one more user; see that it asks nothing of any other place, and is silent."""
    opened = []

    def visit_once(hash="", width=1280):
        context = browser.new_context(viewport={"width": width, "height": 900})
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        context.on("request", lambda request: asked.append(request.url))
        page.goto(served.address + hash)
        page.wait_for_function(READY)
        opened.append((context, page, said, asked))
        page.expected = []  # what the console may say, such as of a request that was refused
        return page

    yield visit_once
    for context, page, said, asked in opened:
        assert [words for words in said if words not in page.expected] == []
        assert page.evaluate("window.harmed === undefined")
        assert asked
        strange = [url for url in asked if not url.startswith((served.address, "data:", "blob:"))]
        assert strange == []
        context.close()


def a_picture(served, tmp_path, index=7, name="a <img src=x onerror='harmed=1'> \U0001f45c.png"):
    path = tmp_path / name
    served.explorer.seen(f"val/{index}").picture.save(path)
    return path


def drop_on(page, path):
    """Drop a file on the page, as from a folder's window."""
    content = list(path.read_bytes())
    page.evaluate(
        """([content, name]) => {
            const held = new DataTransfer();
            held.items.add(new File([new Uint8Array(content)], name, {type: "image/png"}));
            for (const kind of ["dragenter", "dragover", "drop"]) {
                document.body.dispatchEvent(
                    new DragEvent(kind, {dataTransfer: held, bubbles: true, cancelable: true}));
            }
        }""",
        [content, path.name],
    )
    page.wait_for_selector(".concepts li")


def set_gate(page, name, value):
    page.evaluate(
        """([name, value]) => {
            const input = document.querySelector(`.gate input[data-gate="${name}"]`);
            input.value = value;
            input.dispatchEvent(new Event("input", {bubbles: true}));
        }""",
        [name, value],
    )


def logits(page):
    rows = page.locator(".logits > div")
    return {
        row.locator("bdi").text_content(): float(row.get_attribute("data-logit"))
        for row in rows.all()
    }


def wait_for_logits(page, served, gates):
    """Wait until the page shows the logits that the library computes."""
    expected = logits_by_hand(
        served.explorer,
        page.evaluate("new URLSearchParams(location.hash.split('?')[1]).get('picture')"),
        gates,
    )
    expected = {name: float(expected[label]) for label, name in enumerate(NAMES)}
    page.wait_for_function(
        """expected => [...document.querySelectorAll(".logits > div")].every(
            row => Number(row.dataset.logit) === expected[row.querySelector("bdi").textContent])""",
        arg=expected,
    )
    return logits(page)


def test_a_dropped_picture_is_explained_and_a_gate_moves_its_logits(visit, served, tmp_path):
    page = visit()
    path = a_picture(served, tmp_path)
    drop_on(page, path)
    assert page.locator(".seen figcaption").inner_text() == path.name
    assert page.locator(".concepts li").count() == 8
    assert page.locator(".concepts li").first.locator(".where img").count() == 2
    before = wait_for_logits(page, served, {})
    name = page.locator(".gate input").first.get_attribute("data-gate")
    set_gate(page, name, 0)
    off = wait_for_logits(page, served, {name: 0.0})
    assert max(abs(off[one] - before[one]) for one in before) > 1e-3
    set_gate(page, name, 1.5)
    wait_for_logits(page, served, {name: 1.5})
    page.get_by_role("button", name="All gates back to 1").click()
    assert wait_for_logits(page, served, {}) == before
    page.locator(f".gate input[data-gate='{name}']").focus()
    page.keyboard.press("ArrowLeft")
    assert wait_for_logits(page, served, {name: 0.95}) != before


def test_two_users_at_once_do_not_disturb_each_other(visit, served, tmp_path):
    pages = [visit(), visit()]
    for number, page in enumerate(pages):
        drop_on(page, a_picture(served, tmp_path, index=5 + 60 * number, name=f"{number}.png"))
    names = [page.locator(".gate input").first.get_attribute("data-gate") for page in pages]
    for value in (0.1, 0.6, 1.9, 0.0):
        for page, name in zip(pages, names, strict=True):
            set_gate(page, name, value)
        set_gate(pages[1], names[1], 0.3)
    wait_for_logits(pages[0], served, {names[0]: 0.0})
    wait_for_logits(pages[1], served, {names[1]: 0.3})
    channel = served.explorer.opened.split.channels[0].channel
    for page in pages:
        page.goto(f"{served.address}#bench?channel={channel}")
        page.wait_for_selector(".tile")
    pages[0].get_by_role("button", name="Clear all").click()
    assert pages[0].locator(".tile.k0, .tile.k1").count() == 0
    assert pages[1].locator(".tile.k0").count() > 0
    assert pages[1].locator(".tile.k1").count() > 0
    pages[1].get_by_role("button", name="Split", exact=True).click()
    pages[1].wait_for_selector(".results h2")
    assert pages[0].locator(".results h2").count() == 0
    assert served.explorer.split("run") is served.explorer.opened.split


def put_by_hand(page, n=4):
    """Put the first images into two groups, by keys, by click and by drag: the groups."""
    page.get_by_role("button", name="Clear all").click()
    tiles = page.locator(".tile")
    tiles.first.focus()
    for place in range(2 * n):
        page.keyboard.press(str(place % 2 + 1))
        page.keyboard.press("ArrowRight")
    at = 2 * n
    page.locator(".pick").nth(1).click()
    tiles.nth(at).click()
    tiles.nth(at + 1).drag_to(page.locator(".group").first)
    indices = [int(tile.get_attribute("data-index")) for tile in tiles.all()[: at + 2]]
    groups = [[*indices[0:at:2], indices[at + 1]], [*indices[1:at:2], indices[at]]]
    for k, group in enumerate(groups):
        shown = page.locator(f".tile.k{k}").all()
        assert sorted(int(tile.get_attribute("data-index")) for tile in shown) == sorted(group)
    return groups


def test_a_channel_is_parted_by_hand_saved_and_loaded_again(visit, served, tmp_path):
    channel = served.explorer.opened.split.channels[0].channel
    page = visit(f"#bench?channel={channel}")
    page.wait_for_selector(".tile")
    groups = put_by_hand(page)
    odd = "<img src=x onerror='harmed=1'>"
    page.locator(".group input").first.fill(odd)
    page.locator(".tile").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".results h2")
    heads = page.locator(".results h3 bdi").all_text_contents()
    assert heads[0] == odd
    assert heads[1].startswith("group 2")
    assert page.locator(".results .shots img").count() >= 10
    page.fill("#save-name", "mine \U0001f45c <b>")
    page.get_by_role("button", name="Save").click()
    page.wait_for_selector(".results code")
    (path,) = served.folder.glob("*.safetensors")
    assert path.name == "mine \U0001f45c <b>.safetensors"
    split = unbraid.Split.load(path)
    unbraid.apply(served.explorer.opened.network.model, split)
    concepts = split[channel].concepts
    members = [split.clusters[number].images.tolist() for (number,) in concepts]
    assert members == [sorted(group) for group in groups]
    page.get_by_role("button", name="Save").click()  # the name is taken now
    page.wait_for_selector("#wrong:not([hidden])")
    assert "give another name" in page.locator("#wrong").inner_text()
    page.expected = [
        "Failed to load resource: the server responded with a status of 400 (Bad Request)"
    ]

    later = visit()
    later.select_option("#split", label="mine \U0001f45c <b>")
    later.wait_for_selector("#channels small")
    later.goto(f"{served.address}#bench?channel={channel}&split=saved:mine \U0001f45c <b>")
    later.wait_for_selector(".tile")
    for k, group in enumerate(groups):
        shown = later.locator(f".tile.k{k}").all()
        assert sorted(int(tile.get_attribute("data-index")) for tile in shown) == sorted(group)
    later.reload()
    later.wait_for_selector(".tile")
    assert later.locator("#split").input_value() == "saved:mine \U0001f45c <b>"


def test_hostile_names_are_shown_as_text(visit, served):
    page = visit()
    assert (
        page.locator("#title").text_content() == TITLE.replace("\n", " ")
        or page.locator("#title").text_content() == TITLE
    )
    text = page.locator("#channels").text_content()
    shown = {name for name in HOSTILE.values() if name[:40] in text}
    assert len(shown) >= 2
    for part in served.explorer.opened.split.channels[:4]:
        page.goto(f"{served.address}#channel?channel={part.channel}")
        page.wait_for_function(READY)
        page.wait_for_function(
            f"document.querySelector('#view h2')?.textContent === 'Channel {part.channel}'"
        )
        page.wait_for_selector(".shots img")
    assert (
        page.locator("#view img[src=x], #channels img[src=x], #view b > b, #view script").count()
        == 0
    )
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_broken_picture_and_a_gone_split_are_told_in_a_sentence(visit, served, tmp_path):
    page = visit()
    page.expected = [
        "Failed to load resource: the server responded with a status of 400 (Bad Request)"
    ]
    (tmp_path / "broken.png").write_bytes(b"junk")
    page.set_input_files("#file", tmp_path / "broken.png")
    page.wait_for_selector("#wrong:not([hidden])")
    assert page.locator("#wrong").inner_text().startswith("Image broken.png cannot be read")
    page.set_input_files("#file", a_picture(served, tmp_path))
    page.wait_for_selector(".concepts li")
    assert page.locator("#wrong").is_hidden()
    page.goto(f"{served.address}#channel?split=hand:0")
    page.wait_for_selector("#wrong:not([hidden])")
    assert "gone from memory" in page.locator("#wrong").inner_text()
    page.wait_for_selector(".shots img")  # and the run's own is shown


def test_without_a_picture_some_of_the_run_are_offered(visit):
    page = visit("#picture")
    page.locator("#view .shots a").first.click()
    page.wait_for_selector(".concepts li")
    assert page.locator(".seen figcaption").inner_text().endswith(".png")
    page.locator("#channels a").nth(1).click()  # the picture stays, of that channel alone
    page.wait_for_selector(".choice a:nth-child(2)[aria-current]")
    gates = page.locator(".gate input").evaluate_all("all => all.map(one => one.dataset.gate)")
    channel = page.locator("#channels a").nth(1).get_attribute("data-channel")
    assert gates[0] == f"{channel}.0"
    assert gates[-1] == f"{channel}.rest"


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(visit, served, width):
    channel = served.explorer.opened.split.channels[0].channel
    page = visit(width=width)
    for where in (
        f"#channel?channel={channel}",
        f"#bench?channel={channel}",
        "#picture",
        f"#picture?picture=val/3&channel={channel}",
    ):
        page.goto(served.address + where)
        page.wait_for_function(READY)
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), where


def test_search_leads_to_any_channel(visit, served):
    page = visit()
    divided = {part.channel for part in served.explorer.opened.split.channels}
    channel = next(c for c in range(served.explorer.opened.split.layer.n_out) if c not in divided)
    page.fill("#search", str(channel))
    page.get_by_role("link", name="Part it by hand").first.click()
    page.wait_for_selector(".tile")
    assert page.locator("#view h2").first.text_content() == f"Channel {channel}, parted by hand"
    assert page.locator(".tile").count() == 36
    assert page.get_by_role("button", name="Split", exact=True).is_disabled()
    page.fill("#search", "zzz")
    assert page.locator("#channels li:visible").count() == 0


def test_a_channel_of_many_concepts_is_laid_out_and_split_whole(visit, served):
    explorer = served.explorer
    channel, scan = explorer.opened.split.channels[0].channel, explorer.opened.train_scan
    images = [one["index"] for one in explorer.bench("run", channel, 84)["images"]][:84]
    found = findings_of(explorer.opened.split)
    found = found.correct(scan, channel, groups=[images[k::28] for k in range(28)])
    served.folder.mkdir()
    split = unbraid.split(scan, found, refit=explorer.opened.split)
    split.save(served.folder / "many.safetensors")
    page = visit(f"#bench?channel={channel}&split=saved:many")
    page.wait_for_selector(".tile")
    counts = page.locator(".group .count").all_text_contents()
    assert counts == ["3"] * 28
    marks = page.locator(".group .mark").all_text_contents()
    assert marks[24:] == ["Y", "Z", "AA", "AB"]
    assert "key" in page.locator(".pick").nth(8).get_attribute("title")
    assert "key" not in page.locator(".pick").nth(9).get_attribute("title")
    assert page.get_by_role("button", name="Another group").count() == 0
    page.get_by_role("button", name="Split", exact=True).click()
    page.wait_for_selector(".results h2")
    assert page.locator(".results h2").text_content() == f"Channel {channel} in 28 groups"


def test_another_target_stands_alone_under_its_name(visit, served):
    served.explorer.opened = replace(served.explorer.opened, target=read_target("regression:3"))
    page = visit("#picture?picture=val/7")
    page.wait_for_selector(".concepts li")
    assert page.locator(".said h2").text_content() == "Target"
    assert page.locator(".logits bdi").all_text_contents() == ["regression:3"]
    assert "for the target" in page.locator(".below").text_content()
    before = page.locator(".logits > div").get_attribute("data-logit")
    set_gate(page, page.locator(".gate input").first.get_attribute("data-gate"), 0)
    page.wait_for_function(
        "before => document.querySelector('.logits > div').dataset.logit !== before", arg=before
    )
    assert "→" in page.locator(".logits .numbers").text_content()
    served.explorer.opened = replace(served.explorer.opened, target=None)
    page.goto(served.address + "#picture")
    page.reload()
    page.wait_for_selector(".invite")
    assert "No picture can be explained" in page.locator(".invite").text_content()
