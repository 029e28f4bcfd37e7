"""Words of the glossary are links to it where they first stand on a page."""

import re

import pytest

from documents import ROOT

pytest.importorskip("mkdocs", reason="needs .[docs]")
import runpy

HOOK = runpy.run_path(str(ROOT / "tools/glossary_links.py"))
linked = HOOK["linked"]


def link(anchor, word):
    return f'<a class="term" href="g/#{anchor}">{word}</a>'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<p>Masks, masks</p>", f"<p>{link('mask', 'Masks')}, masks</p>"),
        ("<p>concept channels</p>", f"<p>{link('concept-channel', 'concept channels')}</p>"),
        ("<p>explained share</p>", f"<p>{link('explained-share', 'explained share')}</p>"),
        ("<h2>Masks</h2><code>masks</code><a href=x>mask</a>", None),
        ("<p>--tau, tau=0.3, p.tau, unmasked</p>", None),
        ('<a href="g/#mask">that</a><p>mask</p>', None),
        ('<img alt="a mask">', None),
    ],
)
def test_the_first_word_in_the_text_is_linked(before, after):
    assert linked(before, "g/") == (after or before)


def test_every_word_has_its_heading():
    glossary = (ROOT / "docs/glossary.md").read_text()
    heads = re.findall(r"^### (.*)$", glossary, re.MULTILINE)
    anchors = {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", head.lower())) for head in heads}
    assert set(HOOK["WORDS"]) <= anchors
