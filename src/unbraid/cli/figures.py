"""The command that draws figures for papers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from unbraid.cli.output import out_console


def figure(
    run: Annotated[Path, Parameter(help="Folder of a finished run.")],
    *,
    channel: Annotated[int, Parameter(help="A channel that the run split.")],
    out: Annotated[Path, Parameter(help="File to write or replace: .pdf, .png or .svg.")],
    kind: Annotated[
        Literal["teaser", "densities", "sources"],
        Parameter(help="Pictures and densities, densities alone, or what feeds the concepts."),
    ] = "teaser",
) -> None:
    """Draw one channel of a finished run as a figure for a paper."""
    from unbraid.figures import check_suffix, save_figure
    from unbraid.run_figures import figure_of_run
    from unbraid.run_folders import refuse_result

    check_suffix(out)
    refuse_result(out)
    save_figure(figure_of_run(run, channel, kind), out)
    out_console.print(f"Figure: {out}")
