"""The docs site builds without a warning, holds every public name and command, and asks nobody."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import unbraid
from documents import ROOT
from unbraid import cli

pytest.importorskip("mkdocs", reason="needs .[docs]")
CONFIG = (ROOT / "mkdocs.yml").read_text()
# What a browser fetches by itself, which a link is not.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link[^>]*rel=["']?(?:stylesheet|preload|preconnect|icon)[^>]*href=["']?(?:https?:)?//"""
    r"""|@import|url\(["']?(?:https?:)?//""",
)


def build(config, folder):
    # Not quiet: what is not shown is not counted either.
    command = [str(Path(sys.executable).with_name("mkdocs")), "build", "--strict"]
    command += ["--config-file", str(config), "--site-dir", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_navigation(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == {path.parent.name for path in site.glob("*/index.html")} - {"source"}


def test_every_public_name_and_command_is_in_the_reference(site):
    names = "".join(page.read_text() for page in site.glob("api*/index.html"))
    commands = (site / "commands/index.html").read_text()
    for name in unbraid.__all__:
        assert f'id="unbraid.{name}"' in names, name
    for name in cli.app:
        if not name.startswith("-"):
            assert f'href="#unbraid-{name}"' in commands, name
    assert "unbraid demo --out PATH" in commands


def test_no_page_fetches_anything_from_elsewhere(site):
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    assert [page for page in pages if _FETCHED.search(page.read_text())] == []


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<link rel=stylesheet href=https://fonts.example/css>",
        '<img alt="" src="//example/x.png">',
        "body { background: url(https://example/x.png) }",
    ],
)
def test_what_is_fetched_from_elsewhere_would_be_told(text):
    assert _FETCHED.search(text)
    assert not _FETCHED.search('<a href="https://example/">x</a><img src="../images/a.png">')


def test_a_page_that_a_docstring_names_is_led_to_if_it_is_there():
    shown = runpy.run_path(str(ROOT / "tools/site_links.py"))["on_page_content"]
    there = SimpleNamespace(url_relative_to=lambda _: "../a-b/")
    files = SimpleNamespace(get_file_from_path={"a-b.md": there}.get)
    html = shown(
        "See <code>docs/a-b.md</code> or docs/c.md.", page=SimpleNamespace(file=None), files=files
    )
    assert html == 'See <a href="../a-b/">a-b.md</a> or docs/c.md.'


def test_a_broken_link_would_be_told(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("[nowhere](nowhere.md), [no part](#no-part)")
    config = yaml.safe_load(CONFIG)
    few = {"site_name": "x", "nav": ["index.md"], "validation": config["validation"]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({**few, "plugins": []}))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere.md" in done.stdout + done.stderr
    assert "no-part" in done.stdout + done.stderr
