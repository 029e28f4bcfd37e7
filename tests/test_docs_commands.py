"""Every command of the documents, in blocks and in the text, is run, or parsed, with a reason."""

import re
import shlex
import shutil
import tomllib

import pytest
import timm
import torch

from command_place import LEFT_OUT, Place
from documents import PAGES, ROOT, Command, commands
from unbraid import cli

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
RUN = "run"
NOWHERE = "unbraid demo --out nowhere"


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


def check_options(words):
    """A command that ends only when it is stopped; its own tests run it."""
    assert {word for word in words[2:] if word.startswith("--")} <= options_of(words[1])


def check_layer(words):
    """A run of a network of timm that takes too long: its options, and that the layer is there."""
    check_options(words)
    name = words[words.index("--model") + 1].removeprefix("timm:")
    with torch.device("meta"):
        network = timm.create_model(name)
    network.get_submodule(words[words.index("--layer") + 1])


def check_names(words):
    """A command that the text only mentions is there, and so are its options."""
    if words[0] == "unbraid":
        assert set(words[2:]) <= options_of(words[1])
    else:
        names = [name for name in cli.app if not name.startswith("-")]
        assert words[0] in set().union(*map(options_of, names))


# What is looked at in place of a run, by how commands begin.
LOOKED_AT = {
    "pip install ": check_requirements,  # takes minutes; `.ci/run` does it
    "python -m pytest ": check_files,  # is what runs this test
    "pytest ": check_files,
    "unbraid explore ": check_options,
    "unbraid run --model timm:vit_small_patch14_reg4_dinov2 ": check_layer,  # minutes, a download
    "python benchmarks/": check_files,  # takes minutes to hours and gigabytes
    "python tools/ranges.py ": check_files,  # downloads gigabytes
    "python examples/": check_files,  # test_walkthrough.py and test_steering.py run them
}


def action_of(command):
    """RUN, or what is looked at in place of a run; None where nothing is done with a command."""
    for start, check in LOOKED_AT.items():
        if f"{command.text} ".startswith(start):
            return check
    first, *rest = shlex.split(command.text)
    asks_nothing = not rest and first.startswith("--")  # commands ask for more than that
    bare = first == "unbraid" and all(word.startswith("--") for word in rest[1:])
    if command.inline and command.text not in LEFT_OUT and (asks_nothing or bare):
        return check_names
    return RUN if first in ("unbraid", "torchrun") or command.text in LEFT_OUT else None


FOUND = [command for page in PAGES for command in commands(page.read_text())]
# Many processes first: a run alone goes on from what they made.
FOUND = sorted(dict.fromkeys(FOUND), key=lambda c: not c.text.startswith("torchrun"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    yield Place(folder)
    shutil.rmtree(folder)  # half a gigabyte


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("command", FOUND, ids=lambda command: command.text)
def test_a_command_is_run_or_looked_at(command, place):
    action = action_of(command)
    if action == RUN:
        place.run(command)
    else:
        action(shlex.split(command.text))


@pytest.mark.parametrize(
    "text",
    [
        "```sh\npip install . && python tools/new.py\n```\n",
        "```sh\nunbraid demo --out x | tee log\n```\n",
        "With `--encoder timm:resnet18` it differs.\n",
    ],
)
def test_a_new_command_that_nothing_is_done_with_is_told(text):
    assert None in map(action_of, commands(text))


@pytest.mark.parametrize("text", ["unbraid layers torchvision:resnet51", NOWHERE])
def test_a_command_that_fails_or_leaves_nothing_is_told(text, place):
    place.done[NOWHERE] = (0, "Report: nowhere")
    with pytest.raises(AssertionError):
        place.run(Command(text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("unbraid runs", KeyError),
        ("unbraid demo --model", AssertionError),
        ("unbraid explore RUN --ports 1", AssertionError),
        ("--outs", AssertionError),
        ("pip install '.[onyx]'", AssertionError),
        ("pytest tests/fault", AssertionError),
    ],
)
def test_a_command_that_would_not_be_understood_is_told(text, told):
    with pytest.raises(told):
        action_of(Command(text, inline=True))(shlex.split(text))
