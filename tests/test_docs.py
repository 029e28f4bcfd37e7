"""What the documents say is run: marked blocks, and what they print."""

from __future__ import annotations

import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from cyclopts import CycloptsError

from unbraid import cli
from unbraid.demo.network import LAYER, load_images, load_network

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    return [page for page in PAGES if "<!-- run -->" in page.read_text()]


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


def commands(text: str) -> list[list[str]]:
    """The calls of unbraid in a text's shell blocks, as words."""
    calls = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if "unbraid" in words and words[0] != "pip":
                    calls.append(words[words.index("unbraid") + 1 :])
    return calls


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_such_as_the_command_line_takes(page):
    for words in commands(page.read_text()):
        cli.app.parse_args(words, exit_on_error=False, print_error=False)


def test_a_command_that_the_command_line_does_not_take_is_told():
    (words,) = commands("```sh\npip install . && unbraid demo --onto DIR\n```")
    with pytest.raises(CycloptsError):
        cli.app.parse_args(words, exit_on_error=False, print_error=False)


def test_the_readmes_commands_are_there_to_be_tested():
    assert [words[0] for words in commands((ROOT / "README.md").read_text())] == [
        "demo",
        "layers",
        "run",
    ]


def test_the_readmes_lines_of_python_run(tmp_path, monkeypatch):
    """On the demo's network, whose names stand in for those of ResNet-50."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    train = load_images("train")
    names = {
        "model": load_network(),
        "train_set": train,
        "val_set": load_images("test"),
        "images": torch.stack([train[n][0] for n in range(8)]),
    }
    out = StringIO()
    with redirect_stdout(out):
        exec(code.replace("layer4.2.conv3", LAYER).replace("1660", "0"), names)
    assert "max_abs_logit_diff=0.0" in out.getvalue()
    assert "concept 0 of channel 0" in out.getvalue()
    assert names["logits"].shape == (8, 10)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_documents_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link
