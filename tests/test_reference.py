"""The reference says of every public name what it takes and gives, and shows how it is used."""

import inspect
import re
from dataclasses import dataclass, fields, is_dataclass

import pytest

import unbraid
from documents import ROOT, blocks

PAGES = [page.read_text() for page in sorted((ROOT / "docs").glob("api*.md"))]
GIVES_NOTHING = {"save_figure"}  # writes a file
CANNOT_FAIL = {"keep_memory"}
# Results that functions give, and an error that any may raise; examples use what they hold.
GIVEN = {name for name in unbraid.__all__ if inspect.isclass(getattr(unbraid, name))}


def entries(text, section):
    """Names that a section of a docstring explains."""
    found = re.search(rf"^{section}:\n((?: +.*\n|\n)+)", f"{text}\n", re.MULTILINE)
    return set(re.findall(r"^ {4}(\w+):", found[1], re.MULTILINE)) if found else set()


def missing(name, thing):
    """What a docstring leaves out."""
    text = inspect.getdoc(thing) or ""
    if inspect.isclass(thing):
        own = [f.name for f in fields(thing)] if is_dataclass(thing) else []
        return [f for f in own if f not in entries(text, "Attributes")]
    taken = list(inspect.signature(thing).parameters)
    lacks = [p for p in taken if p not in entries(text, "Args")]
    told = {"Returns": name in GIVES_NOTHING, "Raises": name in CANNOT_FAIL}
    return lacks + [section for section, spared in told.items() if not (spared or section in text)]


@pytest.mark.parametrize("name", unbraid.__all__)
def test_a_public_name_is_explained_and_used(name):
    thing = getattr(unbraid, name)
    assert missing(name, thing) == []
    entry = f"::: unbraid.{name}\n"
    (page,) = [page for page in PAGES if entry in page]  # on one page
    code = "".join(block["code"] for block in blocks(page))
    assert f"unbraid.{name}" in code or name in GIVEN
    assert f"[`{name}`](" in (ROOT / "docs/api.md").read_text()


def test_what_a_docstring_leaves_out_is_told():
    @dataclass
    class Result:
        """Some figures.

        Attributes:
            one: a figure.
        """

        one: int
        two: int

    def measure(one, two):
        """Measure.

        Args:
            one: a figure.

        Returns:
            A figure.
        """

    assert missing("Result", Result) == ["two"]
    assert missing("measure", measure) == ["two", "Raises"]
