"""Commands that look at a finished run, explain images by it and change its network."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

import unbraid
from unbraid.base.errors import RunError, UsageError
from unbraid.base.tables import Table, one_line
from unbraid.cli.shared import (
    Device,
    Out,
    RunPath,
    Weights,
    note,
    refuse_result,
    say,
    show,
    show_table,
)
from unbraid.scanning.scan_options import Loading

_OWN_MODEL = "The run's network, needed where it is code of your own: FILE.py:FUNCTION."
_CLASSES = "More classes to explain, by name or output's number; the predicted one always is."
OwnModel = Annotated[str | None, Parameter(help=_OWN_MODEL)]
Classes = Annotated[list[str] | None, Parameter(help=_CLASSES, negative="", consume_multiple=True)]
_OFF = "A concept channel to switch off, as 900.1, or 900.rest for what no concept names."
_SCALE = "A concept channel and what to multiply it by, as 12.0=0.5."
Off = Annotated[list[str] | None, Parameter(help=_OFF, negative="", consume_multiple=True)]
Scale = Annotated[list[str] | None, Parameter(help=_SCALE, negative="", consume_multiple=True)]
FigureKind = Literal["teaser", "densities", "sources"]


def report(run: RunPath) -> None:
    """Write a run's report again, for instance after an update of unbraid."""
    from unbraid.running.finished import Run

    show(f"Report: {Run(run).report()}")


def figure(run: RunPath, *, channel: int, out: Path, kind: FigureKind = "teaser") -> None:
    """Draw one channel of a finished run as a figure for a paper.

    Args:
        channel: A channel that the run split.
        out: File to write or replace: .pdf, .png or .svg.
        kind: Pictures and densities, densities alone, or what feeds the concepts.
    """
    from unbraid.reporting.figures import check_suffix, save_figure
    from unbraid.running.finished import Run

    check_suffix(out)
    refuse_result(out)
    save_figure(Run(run).figure(channel, kind), out)
    show(f"Figure: {out}")


def check(run: Path) -> int:
    """List what a folder holds, and set damaged files aside so that they are made anew.

    What cannot be read is told and left. Exit code 0 if everything is whole, else 1.

    Args:
        run: Folder of a run or of a scan.
    """
    from unbraid.running.check import check as check_folder

    found = check_folder(run)
    show("\n".join([*map(one_line, found.holds), str(found)]))
    return 0 if found.whole else 1


def explain(
    run: RunPath,
    images: Annotated[list[Path], Parameter(negative="")],
    /,
    *,
    classes: Classes = None,
    n: int = 8,
    out: Path | None = None,
    model: OwnModel = None,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """Say which concept channels images use, how much and where.

    Writes for each image a picture with what concept channels answer to, NAME.png, and all figures,
    NAME.json.

    Args:
        images: Picture files.
        n: Concept channels to show of each image, those with the largest shares.
        out: Folder to write into; by default RUN/explained.
    """
    from unbraid.running.finished import Run
    from unbraid.running.folders import refuse_folder
    from unbraid.running.network import load_again, open_pictures

    refuse_folder(out)
    ran = Run(run)
    split = ran.split
    unbraid.keep_memory()
    loaded = load_again(ran.settings.source, model, weights, device)
    note(loaded.note)
    model2 = unbraid.apply(loaded.model, split)
    explained = unbraid.explain(model2, open_pictures(images, loaded), classes=classes or [], n=n)
    tables = [own.table() for own in explained.images]
    shown = [replace(table, note="") for table in tables]
    shown += [Table([], note=note) for note in dict.fromkeys(table.note for table in tables)]
    for table in shown:
        show_table(table)
        show()
    files = explained.save(out or ran.folder / "explained")
    show(f"Pictures and figures: {', '.join(map(str, files))}")


def edit(
    run: RunPath,
    *,
    off: Off = None,
    scale: Scale = None,
    out: Out,
    model: OwnModel = None,
    weights: Weights = None,
    device: Device = None,
    loading: Loading = Loading(),
) -> None:
    """Make a network with concept channels switched off or scaled, and show what changed.

    Writes the network as state dict, torch.export program and ONNX, and a page with accuracy by
    class, confusions and images before and after. The change is in the layer's own weights, so the
    network runs as fast as before.
    """
    from unbraid.running.edit import edit_run
    from unbraid.running.finished import Run
    from unbraid.running.network import load_again

    scales = dict.fromkeys(off or (), 0.0)
    for entry in scale or ():
        name, _, value = entry.partition("=")
        if name in scales:
            raise UsageError(f"{name} is named twice; name each concept channel once.")
        try:
            scales[name] = float(value)
        except ValueError:
            raise UsageError(f"--scale {entry} is not as in 12.0=0.5.") from None
    if not scales:
        raise UsageError("Say what to change: --off 900.1, or --scale 12.0=0.5.")
    unbraid.keep_memory()
    ran = Run(run)
    network = load_again(ran.settings.source, model, weights, device)
    made = edit_run(ran, scales, out, loading=loading, network=network, say=say)
    show_table(made.changes)
    show(f"Network: {', '.join(map(str, made.files))}")
    show(f"Page: {made.page}")


def suggest(run: RunPath, *, n: int = 10) -> None:
    """Rank concept channels to look at: those that do harm, and those that matter elsewhere.

    First those whose removal helps, as a shortcut would; then those that a class depends on though
    their concept has no part in it. All comes from the run's figures, nothing is run.

    Args:
        n: Of each kind, at most.
    """
    from unbraid.running.finished import Run

    evaluation = Run(run).evaluation
    if evaluation is None or evaluation.ablation is None:
        raise RunError(f"{run} switched nothing off, so there is nothing to suggest.")
    found = unbraid.suggest(evaluation.ablation, n)
    show_table(found)
    helps = [row for row in found.rows if row.kind == "helps"]
    if helps and helps[0].sure:
        show(f"Try: unbraid edit {shlex.quote(str(run))} --off {helps[0].name} --out DIR")
    elif helps:
        show("None of what helps is sure; more validation images would tell.")
