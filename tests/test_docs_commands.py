"""Every command of the documents, in blocks and in the text, is run, or parsed, with a reason."""

from __future__ import annotations

import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from command_place import LEFT_OUT, Place
from documents import PAGES, ROOT, Command, commands
from parsed_only import PARSED
from unbraid import cli


def how(command: Command) -> str:
    """Say what is done with a command: "run", "named", how it begins if parsed only, "nothing".

    Named is what the text only mentions, such as `unbraid run` or `--data`, with nothing to run.
    """
    words = shlex.split(command.text)
    for start in PARSED:
        if f"{command.text} ".startswith(start):
            return start
    if command.inline and command.text not in LEFT_OUT:
        if len(words) == 1 and words[0].startswith("--"):
            return "named"
        if words[0] == "unbraid" and all(word.startswith("--") for word in words[2:]):
            return "named"  # every command asks for more than that
    known = words[0] in ("unbraid", "torchrun") or command.text in LEFT_OUT
    return "run" if known else "nothing"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    yield Place(folder)
    shutil.rmtree(folder)  # half a gigabyte


def options_of(name: str) -> set[str]:
    """The options that a command of unbraid takes."""
    return {n for argument in cli.app[name].assemble_argument_collection() for n in argument.names}


def assert_named_rightly(command: Command) -> None:
    """A command that is only named is there, and so are its options."""
    words = shlex.split(command.text)
    if words[0] == "unbraid":
        assert set(words[2:]) <= options_of(words[1])
    else:
        names = [name for name in cli.app if not name.startswith("-")]
        assert words[0] in set().union(*map(options_of, names))


def all_commands() -> list[Command]:
    found = [command for page in PAGES for command in commands(page.read_text())]
    # Many processes first: a run alone goes on from what they made.
    return sorted(dict.fromkeys(found), key=lambda c: not c.text.startswith("torchrun"))


def those(kind: Callable[[str], bool]) -> list[Command]:
    return [command for command in all_commands() if kind(how(command))]


# --- the tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", all_commands(), ids=str)
def test_something_is_done_with_every_command(command):
    assert how(command) != "nothing"


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("command", those(lambda kind: kind == "run"), ids=str)
def test_a_command_runs(command, place):
    place.run(command)


@pytest.mark.parametrize("command", those(lambda kind: kind == "named"), ids=str)
def test_a_command_that_is_named_is_there(command):
    assert_named_rightly(command)


@pytest.mark.parametrize("command", those(PARSED.__contains__), ids=str)
def test_a_command_that_is_not_run_is_understood(command):
    _why, check = PARSED[how(command)]
    check(shlex.split(command.text))


def scripts() -> list[Path]:
    """Benchmarks that are run, not only imported."""
    found = sorted((ROOT / "benchmarks").glob("*.py"))
    return [path for path in found if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.name)
def test_every_benchmark_has_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert not stopped.value.code
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")


def test_every_benchmark_is_in_the_docs():
    page = (ROOT / "docs/benchmarks.md").read_text()
    names = [path.name for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    assert [name for name in names if f"benchmarks/{name}" not in page] == []


def test_the_tables_hold_nothing_that_the_docs_do_not():
    texts = [command.text for command in all_commands()]
    assert [text for text in LEFT_OUT if text not in texts] == []
    assert [
        start for start in PARSED if not any(f"{text} ".startswith(start) for text in texts)
    ] == []


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nmake docs\n```\n",
        "```sh\npip install . && python tools/new.py\n```\n",
        "```sh\nunbraid demo --out x | tee log\n```\n",
        "Start `python tools/new.py` first.\n",
        "With `--encoder timm:resnet18` it differs.\n",
    ],
)
def test_a_new_command_that_nothing_is_done_with_is_told(text):
    assert "nothing" in [how(command) for command in commands(text)]


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nunbraid layers torchvision:resnet51\n```\n",
        "```sh\nunbraid demo --onto x\n```\n",
        "Say `unbraid layers clothes.py:builds`.\n",
    ],
)
def test_a_command_that_fails_is_told(text, place):
    (command,) = commands(text)
    assert how(command) == "run"
    with pytest.raises(AssertionError):
        place.run(command)


def test_a_command_that_leaves_nothing_is_told(place):
    place.done["unbraid demo --out nowhere"] = (0, "Report: nowhere")
    with pytest.raises(AssertionError):
        place.run(Command("unbraid demo --out nowhere"))


@pytest.mark.parametrize("text", ["unbraid runs", "unbraid demo --layer", "--outs"])
def test_a_name_that_is_not_there_is_told(text):
    with pytest.raises((AssertionError, KeyError)):
        assert_named_rightly(Command(text, inline=True))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pip install '.[onyx]'", AssertionError),
        ("pip install 'unbraid[onnx]'", AssertionError),
        ("pytest -m slowly", AssertionError),
        ("pytest tests/fault", AssertionError),
        ("python benchmarks/scan.py --round 3 --color", SystemExit),
        ("python benchmarks/find.py 3", SystemExit),
        ("python benchmarks/scans.py", FileNotFoundError),
        ("python examples/steering.py --fast", AssertionError),
    ],
)
def test_a_command_that_would_not_be_understood_is_told(text, told):
    _why, check = PARSED[how(Command(text))]
    with pytest.raises(told):
        check(shlex.split(text))
