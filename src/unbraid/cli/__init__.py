"""The command line: each command is the thin twin of a function.

torch is imported inside the commands, so that help is instant.
"""

from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

from cyclopts import App, CycloptsError

from unbraid.cli import figures, jobs, steps
from unbraid.cli.output import err_console
from unbraid.errors import UnbraidError

app = App(
    name="unbraid",
    help="Find the polysemantic channels of a vision network and split each into one per concept.",
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
_COMMANDS: tuple[Callable[..., int | None], ...] = (
    jobs.demo,
    jobs.run,
    steps.layers,
    steps.scan,
    steps.find,
    steps.sensitivity,
    steps.split,
    steps.evaluate,
    jobs.report,
    figures.figure,
    jobs.check,
    jobs.reproduce,
)
for place, command in enumerate(_COMMANDS):
    app.command(command, sort_key=place)


class Terminated(KeyboardInterrupt):
    """Asked to end by SIGTERM, which ends as cleanly as ctrl-C."""


def _terminate(_signal: int, _frame: object) -> None:
    raise Terminated


def _empty(arguments: Sequence[str]) -> str | None:
    """Name what has no value, which as a path would be the folder at hand; None if all have one."""
    for before, given in pairwise(arguments):
        if not given:
            return before
        if given.startswith("--") and given.endswith("="):
            return given[:-1]
    return None


def _notes() -> Callable[..., None]:
    """Show what the library warns of, each thing once, without the line of code it came from."""
    shown: set[str] = set()

    def show(message: Warning | str, *_about: object, **_more: object) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            err_console.print(f"Note: {message}", style="yellow")

    return show


def main() -> None:
    """Run the command line: exit code 2 for a wrong call, 1 for a failure, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of any script, on a terminal of any kind
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _notes()
    empty = _empty(sys.argv)
    if empty is not None:
        text = f"unbraid: {empty} is empty, perhaps a variable without a value; give it one."
        err_console.print(text, style="bold red")
        sys.exit(2)
    try:
        code = app(
            sys.argv[1:], exit_on_error=False, print_error=True, result_action="return_value"
        )
    except CycloptsError:
        sys.exit(2)
    except UnbraidError as error:
        err_console.print(f"unbraid: {error}", style="bold red")
        sys.exit(error.exit_code)
    except OSError as error:  # a path that may not be read, is too long, and so on
        err_console.print(f"unbraid: {error}; name another path.", style="bold red")
        sys.exit(1)
    except KeyboardInterrupt as stop:
        err_console.print("\nStopped; start the same command again and it goes on where it was.")
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    sys.exit(code or 0)
