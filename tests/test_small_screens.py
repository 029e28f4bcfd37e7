"""On small screens pictures can be enlarged, and options and names in tables stay whole."""

import re
import runpy

from documents import ROOT

HOOK = runpy.run_path(str(ROOT / "tools/small_screens.py"))
shown = HOOK["on_page_content"]


def test_a_picture_leads_to_itself():
    picture = '<img alt="a &gt; b" src="../images/a.png">'
    assert shown(f"<p>{picture}</p>") == (
        f'<p><a class="picture" href="../images/a.png">{picture}</a></p>'
    )
    assert shown(f'<p><a href="b">{picture}</a></p>') == f'<p><a href="b">{picture}</a></p>'


def test_long_code_in_a_table_may_break_at_its_joints_alone():
    long = "LAYER.concepts.weight_of_all[0]"
    html = shown(f"<table><tr><td><code>--one-two</code><code>{long}</code></td></tr></table>")
    assert '<code><span class="whole">--one-two</span></code>' in html
    assert '<code class="long">LAYER.<wbr>concepts.<wbr>weight_<wbr>of_<wbr>all[0]</code>' in html
    assert shown(f"<p><code>{long}</code></p>") == f"<p><code>{long}</code></p>"


def test_a_first_column_of_texts_is_wide():
    page = "<table><tr><th>what</th><th>n</th></tr><tr><td>{}</td><td>1</td></tr></table>"
    assert '<th class="wide">what</th><th>n</th>' in shown(page.format("some words " * 3))
    assert shown(page.format("demo")) == page.format("demo")


def test_a_command_s_options_stay_whole_and_its_text_is_the_same():
    space = '<span class="w"> </span>'
    code = (
        f'<code>unbraid{space}run{space}--quick-look{space}-n{space}a-b c{space}<span class="se">'
    )
    page = f'<div class="language-sh highlight"><pre>{code}\\</span>\n</code></pre></div>'
    html = shown(page)
    for whole in ("--quick-look", "-n", "a-b", ' <span class="se">\\</span>'):
        assert f'<span class="whole">{whole}</span>' in html
    assert html.count('"whole"') == 4
    assert re.sub("<[^>]*>", "", html) == re.sub("<[^>]*>", "", page)


def test_an_option_in_the_text_stays_whole():
    html = shown("<p><code>unbraid run --layer all</code></p>")
    assert html == '<p><code>unbraid run <span class="whole">--layer</span> all</code></p>'
    block = "<pre><span></span><code>unbraid run --layer all</code></pre>"
    assert shown(block) == block
