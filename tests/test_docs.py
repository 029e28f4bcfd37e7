"""What the documents say is run: marked blocks, and what they print."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"<!-- run -->\n```python\n(?P<code>.*?)```\n(?:<!-- prints -->\n```text\n(?P<text>.*?)```)?",
    re.DOTALL,
)


def run(text: str) -> None:
    """Run a document's marked blocks one after the other; what is printed must be as shown."""
    names: dict[str, object] = {}
    for block in BLOCK.finditer(text):
        out = StringIO()
        with redirect_stdout(out):
            exec(block["code"], names)
        if block["text"] is not None:
            assert out.getvalue() == block["text"]


def documents() -> list[Path]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in pages if "<!-- run -->" in page.read_text()]


@pytest.mark.parametrize("page", documents(), ids=lambda page: page.name)
def test_what_a_document_shows_is_what_happens(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    assert len(BLOCK.findall(text)) == text.count("<!-- run -->")
    assert text.count("<!-- prints -->") == len([m for m in BLOCK.finditer(text) if m["text"]])
    run(text)


def test_a_document_that_shows_something_else_is_told():
    with pytest.raises(AssertionError):
        run("<!-- run -->\n```python\nprint(1)\n```\n<!-- prints -->\n```text\n2\n```\n")


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
def test_links_between_documents_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link
