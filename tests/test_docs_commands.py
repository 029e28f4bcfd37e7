"""Every command of the documents, in blocks and in the text, is run, or parsed, with a reason."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator

import pytest

from command_place import LEFT_OUT, Place
from documents import PAGES, ROOT, Command, commands
from unbraid import cli

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MARKS = [mark.split(":")[0] for mark in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]


NOWHERE = "unbraid demo --out nowhere"


def check_requirements(words: list[str]) -> None:
    """`pip install` of the clone, with extras that it has; an index may not have the name."""
    for word in words[2:]:
        match = re.fullmatch(r"-e|\.(?:\[(\w+)\])?", word)
        assert match, word
        assert match[1] is None or match[1] in PROJECT["project"]["optional-dependencies"], word


def check_tests(words: list[str]) -> None:
    """`pytest` of files that are there, with marks that are known."""
    rest = iter(words[words.index("pytest") + 1 :])
    for word in rest:
        assert next(rest) in MARKS if word == "-m" else (ROOT / word).exists(), word


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


# What is looked at in place of a run, by how commands begin.
PARSED: dict[str, Callable[[list[str]], None]] = {
    "pip install ": check_requirements,  # takes minutes; `.ci/run` does it
    "python -m pytest ": check_tests,  # is what runs this test
    "pytest ": check_tests,
    "python benchmarks/": check_script,  # takes minutes to hours and gigabytes
    "python examples/execute.py ": check_file,  # test_walkthrough.py runs it on a copy
    "python examples/steering.py ": check_file,  # test_steering.py runs it
}


def how(command: Command) -> str:
    """Say what is done with a command: "run", "nothing", or how it begins if it is only parsed.

    "named" is what the text only mentions, such as `unbraid run` or `--data`.
    """
    words = shlex.split(command.text)
    for start in PARSED:
        if f"{command.text} ".startswith(start):
            return start
    if command.inline and command.text not in LEFT_OUT:
        alone = len(words) == 1 and words[0].startswith("--")
        bare = words[0] == "unbraid" and all(word.startswith("--") for word in words[2:])
        if alone or bare:  # every command asks for more than that
            return "named"
    known = words[0] in ("unbraid", "torchrun") or command.text in LEFT_OUT
    return "run" if known else "nothing"


def options_of(name: str) -> set[str]:
    """The options that a command of unbraid takes."""
    return {n for argument in cli.app[name].assemble_argument_collection() for n in argument.names}


def assert_named_rightly(words: list[str]) -> None:
    """A command that is only named is there, and so are its options."""
    if words[0] == "unbraid":
        assert set(words[2:]) <= options_of(words[1])
    else:
        names = [name for name in cli.app if not name.startswith("-")]
        assert words[0] in set().union(*map(options_of, names))


def all_commands() -> list[Command]:
    found = [command for page in PAGES for command in commands(page.read_text())]
    # Many processes first: a run alone goes on from what they made.
    return sorted(dict.fromkeys(found), key=lambda c: not c.text.startswith("torchrun"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    yield Place(folder)
    shutil.rmtree(folder)  # half a gigabyte


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("command", all_commands(), ids=str)
def test_a_command_is_run_parsed_or_named(command: Command, place: Place) -> None:
    kind = how(command)
    assert kind != "nothing"
    if kind == "run":
        place.run(command)
    else:
        PARSED.get(kind, assert_named_rightly)(shlex.split(command.text))


def test_every_benchmark_is_in_the_docs_and_has_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        assert f"benchmarks/{script.name}" in page
        if "__main__" in script.read_text():
            monkeypatch.setattr(sys, "argv", [script.name, "--help"])
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(str(script), run_name="__main__")
            assert not stopped.value.code
            assert capsys.readouterr().out.startswith(f"usage: {script.name}")


def test_the_tables_hold_nothing_that_the_docs_do_not() -> None:
    texts = [command.text for command in all_commands()]
    assert [text for text in LEFT_OUT if text not in texts] == []
    unused = [start for start in PARSED if not any(f"{t} ".startswith(start) for t in texts)]
    assert unused == []


@pytest.mark.parametrize(
    "text",
    [
        "```sh\npip install . && python tools/new.py\n```\n",
        "```sh\nunbraid demo --out x | tee log\n```\n",
        "With `--encoder timm:resnet18` it differs.\n",
    ],
)
def test_a_new_command_that_nothing_is_done_with_is_told(text: str) -> None:
    assert "nothing" in [how(command) for command in commands(text)]


@pytest.mark.parametrize(
    "text", ["unbraid layers torchvision:resnet51", "unbraid demo --onto x", NOWHERE]
)
def test_a_command_that_fails_or_leaves_nothing_is_told(text: str, place: Place) -> None:
    place.done[NOWHERE] = (0, "Report: nowhere")
    assert how(Command(text)) == "run"
    with pytest.raises(AssertionError):
        place.run(Command(text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("unbraid runs", KeyError),
        ("unbraid demo --layer", AssertionError),
        ("--outs", AssertionError),
        ("pip install '.[onyx]'", AssertionError),
        ("pip install 'unbraid[onnx]'", AssertionError),
        ("pytest -m slowly", AssertionError),
        ("pytest tests/fault", AssertionError),
        ("python benchmarks/scan.py --round 3 --color", SystemExit),
        ("python benchmarks/scans.py", FileNotFoundError),
        ("python examples/steering.py --fast", AssertionError),
    ],
)
def test_a_command_that_would_not_be_understood_is_told(
    text: str, told: type[BaseException]
) -> None:
    command = Command(text, inline=True)
    with pytest.raises(told):
        PARSED.get(how(command), assert_named_rightly)(shlex.split(text))
