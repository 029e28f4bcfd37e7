"""Commands of the documents that no test runs: why not, and what is looked at instead."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
import tomllib
from collections.abc import Callable

import pytest

from documents import ROOT


def check_requirements(words: list[str]) -> None:
    """`pip install` of the clone, with extras that it has; an index may not have the name."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        match = re.fullmatch(r"-e|\.(?:\[(\w+)\])?", word)
        assert match, word
        assert match[1] is None or match[1] in known["optional-dependencies"], word


def check_tests(words: list[str]) -> None:
    """`pytest` of files that are there, with marks that are known."""
    rest = words[words.index("pytest") + 1 :]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    marks = [mark.split(":")[0] for mark in settings["ini_options"]["markers"]]
    while rest:
        word = rest.pop(0)
        if word == "-m":
            assert rest.pop(0) in marks
        else:
            assert (ROOT / word).exists(), word


class Parsed(Exception):
    """A script has understood its arguments."""


def check_script(words: list[str]) -> None:
    """`python SCRIPT ...` with arguments that the script's own parser takes; it does no more."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser) -> None:
        raise Parsed(parse(parser))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", words[1:])
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")


def check_file(words: list[str]) -> None:
    assert len(words) == 2
    assert (ROOT / words[1]).is_file()


# By how they begin: why they are not run here, and what is looked at instead.
PARSED: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "pip install ": (
        "takes a network and minutes; `.ci/run` installs into a new environment",
        check_requirements,
    ),
    "python -m pytest ": ("is what runs this test", check_tests),
    "pytest ": ("is part of what runs this test, or takes many minutes", check_tests),
    "python benchmarks/": ("takes minutes to hours and gigabytes", check_script),
    "python examples/execute.py ": (
        "writes over the notebook; test_walkthrough.py runs it on a copy",
        check_file,
    ),
    "python examples/steering.py ": (
        "test_steering.py runs it, and asks that it says what the page does",
        check_file,
    ),
}
