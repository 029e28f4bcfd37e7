"""Every command of the documents, in blocks and in the text, is parsed or looked at."""

import re
import shlex
import tomllib

import pytest
from cyclopts import CycloptsError

from documents import PAGES, ROOT, Command, commands
from unbraid import cli

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def check_requirements(words):
    """`pip install` of the clone, with extras that it has; an index may not have the name."""
    own = re.compile(rf"-e|\.(\[({'|'.join(EXTRAS)})\])?")
    assert all(map(own.fullmatch, words[2:])), words


def check_files(words):
    """`pytest` or `python` of files that are there."""
    named = [word for word in words if "/" in word or word.endswith(".py")]
    assert all((ROOT / word).exists() for word in named), words


def options_of(name):
    """The options that a command of unbraid takes."""
    return {n for argument in cli.app[name].assemble_argument_collection() for n in argument.names}


def check_names(words):
    """A command that the text only mentions is there, and so are its options."""
    options = {word for word in words if word.startswith("--")}
    if words[0] == "unbraid":
        assert options <= options_of(words[1])
    else:
        names = [name for name in cli.app if not name.startswith("-")]
        assert words[0] in set().union(*map(options_of, names))


def check_unbraid(words):
    """A whole command of unbraid, perhaps of many processes, has what it needs and no more."""
    own = words[words.index("unbraid") + 1 :]
    cli.app.parse_args(own, exit_on_error=False, print_error=False)


# What is looked at, by how commands begin.
LOOKED_AT = {
    "pip install ": check_requirements,  # takes minutes; `.ci/run` does it
    "python -m pytest ": check_files,  # is what runs this test
    "pytest ": check_files,
    "python benchmarks/": check_files,  # takes minutes to hours and gigabytes
    "python examples/": check_files,  # test_walkthrough.py and test_steering.py run them
}


def check_of(command):
    """What to look at a command with; None where nothing is done with it."""
    for start, check in LOOKED_AT.items():
        if f"{command.text} ".startswith(start):
            return check
    first = shlex.split(command.text)[0]
    if command.inline and (first == "unbraid" or first.startswith("--")):
        return check_names
    return check_unbraid if first in ("unbraid", "torchrun") else None


FOUND = list(dict.fromkeys(command for page in PAGES for command in commands(page.read_text())))


@pytest.mark.parametrize("command", FOUND, ids=lambda command: command.text)
def test_a_command_of_the_documents_is_one_that_there_is(command):
    check_of(command)(shlex.split(command.text))


@pytest.mark.parametrize(
    "text",
    [
        "```sh\npip install . && python tools/new.py\n```\n",
        "```sh\nunbraid demo --out x | tee log\n```\n",
    ],
)
def test_a_new_command_that_nothing_is_done_with_is_told(text):
    assert None in map(check_of, commands(text))


@pytest.mark.parametrize(
    ("text", "inline", "told"),
    [
        ("unbraid runs", True, KeyError),
        ("unbraid demo --layer", True, AssertionError),
        ("--outs", True, AssertionError),
        ("pip install '.[onyx]'", False, AssertionError),
        ("pytest tests/fault", False, AssertionError),
        ("unbraid demo", False, CycloptsError),
        ("torchrun -m unbraid find x --tau high", False, CycloptsError),
    ],
)
def test_a_command_that_would_not_be_understood_is_told(text, inline, told):
    with pytest.raises(told):
        check_of(Command(text, inline))(shlex.split(text))
