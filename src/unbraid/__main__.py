"""Run the command line: exit code 2 for a wrong call, 1 for a failure, no traceback."""

import functools
import io
import signal
import sys
import warnings
from itertools import pairwise

from cyclopts import CycloptsError

from unbraid.base.errors import UnbraidError, UsageError
from unbraid.base.own_code import describe_exit
from unbraid.cli import app, note, say
from unbraid.scanning.scan_options import in_command_words


def _terminate(_signal: int, _frame: object) -> None:
    """End on SIGTERM as cleanly as on ctrl-C, with an exit code of its own."""
    raise KeyboardInterrupt(143)


def _refuse_empty(words: list[str]) -> None:
    """Refuse an empty argument: as a path, nothing would be the folder at hand."""
    for before, value in pairwise(words):
        if not value or (value.startswith("--") and value.endswith("=")):
            what = value[:-1] or (before if before.startswith("-") else f"What follows {before}")
            raise UsageError(f"{what} is empty, perhaps a variable without a value; give it one.")


def main() -> None:
    """Run the command that `sys.argv` names, and end the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of any script, on a terminal of any kind
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    # What the library warns of is shown once, without the line of code it came from.
    note_once = functools.cache(note)
    warnings.showwarning = lambda message, *_about, **_more: note_once(
        in_command_words(str(message))
    )
    try:
        _refuse_empty(sys.argv)
        words = sys.argv[1:]
        code = app(words, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        code = 2
    except UnbraidError as error:
        say(f"unbraid: {in_command_words(str(error))}", style="bold red")
        code = error.exit_code
    except SystemExit as error:  # by a network, a preprocessing or a data set of anyone's own
        say(f"unbraid: Code of your own {describe_exit(error)}", style="bold red")
        code = 1
    except OSError as error:  # a path that may not be read, is too long, and so on
        say(f"unbraid: {error}; name another path.", style="bold red")
        code = 1
    except KeyboardInterrupt as stop:
        say("\nStopped; start the same command again and it goes on where it was.")
        code = 143 if stop.args == (143,) else 130
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
