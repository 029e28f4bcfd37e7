"""What README and the docs hold: blocks of code, code in the text, commands."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "llms.txt", *sorted((ROOT / "docs").glob("*.md"))]

# Programs that a command in the text may begin with; those that no test runs are noticed.
PROGRAMS = (
    *("unbraid", "python", "python3", "pip", "pytest", "torchrun", "ruff", "mypy", "lint-imports"),
    *("uv", "conda", "apt", "apt-get", "git", "make", "docker", "bash", "sh", "curl", "wget"),
    *("cd", "export", "cp", "mv", "rm", "tar"),
)

_FENCE = re.compile(
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```\n"
    r"(?:<!-- prints -->\n```text\n(?P<prints>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


class Command(NamedTuple):
    """A command, its words as a shell would have them; `inline` where it stands in the text."""

    text: str
    inline: bool = False


def blocks(text):
    """List a page's blocks, each with its "language", "code" and what it "prints", if said.

    AssertionError for one that this would miss, or a hidden command.
    """
    text = text.rstrip("\n") + "\n"
    found = list(_FENCE.finditer(text))
    printing = sum(block["prints"] is not None for block in found)
    assert text.count("```") + text.count("~~~") == 2 * (len(found) + printing)
    assert text.count("<!-- prints -->") == printing
    assert {block["language"] for block in found} <= {"python", "sh", "text"}
    shown = [block["code"] for block in found if block["language"] == "text"]
    shown += re.findall(r"^ {4,}[^ ].*$", _FENCE.sub("", text), re.MULTILINE)
    for line in "\n".join(shown).splitlines():
        first, *more = line.strip(" $").split() or [""]
        assert not (first in PROGRAMS and more), line
    return found


def spans(text):
    """List the pieces of code that stand in the text itself."""
    return _SPAN.findall(_FENCE.sub("", text.rstrip("\n") + "\n"))


def commands(text):
    """List every command of a page, those of its text and options alone included, each once."""
    scripts = [block["code"] for block in blocks(text) if block["language"] == "sh"]
    lines = "\n".join(scripts).replace("\\\n", " ")
    found = [Command(_words(part)) for part in re.split(r"&&|\|\||[;|\n]", lines)]
    for span in spans(text):
        first, *more = span.split()
        if (first in PROGRAMS and more) or span.startswith("--"):
            found.append(Command(_words(span), inline=True))
    return [command for command in dict.fromkeys(found) if command.text]


def _words(line):
    return shlex.join(shlex.split(line, comments=True))
