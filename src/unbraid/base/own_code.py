"""Code that a user names as FILE.py:FUNCTION: run it, and say what fails in it and where."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unbraid.base.errors import UsageError, brief, nearest


def call_function(path: str, function: str, option: str) -> Any:
    """Run a file of code and call a function of it; UsageError tells what fails."""
    file = Path(path).resolve()
    if not file.is_file():
        raise UsageError(f"There is no file {path}; {option} FILE.py:FUNCTION names one.")
    found = importlib.util.spec_from_file_location(file.stem, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    # As if it were a script: it may import its neighbours, and its classes can be looked up.
    sys.path.insert(0, str(file.parent))
    sys.modules[file.stem] = module
    with _telling(file.parent, path, "cannot be run ({})"):
        found.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        known = [name for name in vars(module) if not name.startswith("__")]
        raise UsageError(f"{path} has no function {function!r}.{nearest(function, known)}")
    what = f"{path}:{function}"
    with _telling(file.parent, what, "fails ({}); it is called without arguments"):
        return build()


@contextmanager
def _telling(folder: Path, what: str, failing: str) -> Iterator[None]:
    """Raise a UsageError in place of anything that code in a folder raises, or if it ends Python.

    `failing` says what failed, with a place for what was raised.
    """
    try:
        yield
    except SystemExit as error:
        raise UsageError(f"{what} {describe_exit(error, folder)}") from error
    except Exception as error:
        text, kind = brief(error), type(error).__name__
        told = kind if text == kind else f"{kind}: {text}"
        raise UsageError(f"{what} {failing.format(told + _place(error, folder))}.") from error


def describe_exit(error: SystemExit, folder: Path | None = None) -> str:
    """Say that code ended Python, and what to do; `folder` is where it may lie."""
    code = "" if error.code is None else repr(error.code)
    where = _place(error, folder) if folder else ""
    return (
        f"ended Python by sys.exit({code}){where}; let it return, or raise an error that says why."
    )


def _place(error: BaseException, folder: Path) -> str:
    """Say where code raised an error, by its last line in a folder, or else by the last of all."""
    if isinstance(error, SyntaxError):  # which says so itself
        return ""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen ")
    ]
    own = [frame for frame in frames if folder in Path(frame.filename).parents]
    if not frames:
        return ""
    last = (own or frames)[-1]
    name = os.path.relpath(last.filename, folder) if own else last.filename
    return f", raised in {name}, line {last.lineno}"
