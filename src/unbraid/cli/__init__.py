"""Commands, thin twins of functions; what needs torch is imported inside, so help is instant."""

from __future__ import annotations

from collections.abc import Callable

from cyclopts import App, CycloptsError, CycloptsPanel, MissingArgumentError, Parameter
from rich.panel import Panel

from unbraid.cli import look, make
from unbraid.cli.shared import note, say, show

__all__ = ["app", "note", "say", "show"]


def _in_box(error: CycloptsError) -> Panel:
    """Show a wrong call; of what is missing, cyclopts says that it requires an argument."""
    own = error.argument
    if isinstance(error, MissingArgumentError) and own and not (error.keyword or own.tokens):
        command = " ".join(["unbraid", *(error.command_chain or ())])
        return CycloptsPanel(f"{own.name} is missing; {command} --help says what it is.")
    return CycloptsPanel(error)


app = App(
    name="unbraid",
    help="Find polysemantic channels of a vision network; split each into one channel per concept.",
    help_format="markdown",
    suppress_keyboard_interrupt=False,
    error_formatter=_in_box,
    default_parameter=Parameter(negative_bool=(), negative_iterable=()),
)
_COMMANDS: list[Callable[..., int | None]] = [make.demo, make.run, make.layers, make.scan]
_COMMANDS += [make.find, make.sensitivity, make.split, make.evaluate, look.report, look.figure]
_COMMANDS += [look.explain, look.circuit, look.explore, look.edit, look.suggest, look.share]
_COMMANDS += [look.check, make.reproduce]
for n, command in enumerate(_COMMANDS):
    app.command(command, sort_key=n)
