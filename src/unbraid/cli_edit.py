"""Commands that change a run's network for good, and that say what would be worth changing."""

from __future__ import annotations

import shlex
from typing import Annotated

from cyclopts import Parameter

import unbraid
from unbraid.base.errors import RunError, UsageError
from unbraid.cli import Device, Out, RunPath, Weights, app, say, show, show_table
from unbraid.cli_explain import Model
from unbraid.scanning.scan_options import Loading

_OFF = "A concept channel to switch off, as 900.1, or 900.rest for what no concept names."
_SCALE = "A concept channel and what to multiply it by, as 12.0=0.5."
Off = Annotated[list[str] | None, Parameter(help=_OFF, negative="", consume_multiple=True)]
Scale = Annotated[list[str] | None, Parameter(help=_SCALE, negative="", consume_multiple=True)]


def edit(
    run: RunPath,
    *,
    off: Off = None,
    scale: Scale = None,
    out: Out,
    model: Model = None,
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
    from unbraid.running.network import load_again
    from unbraid.running.run import Run

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
    from unbraid.running.run import Run

    evaluation = Run(run).evaluation
    if evaluation is None or evaluation.ablation is None:
        raise RunError(f"{run} switched nothing off, so there is nothing to suggest.")
    found = unbraid.suggest(evaluation.ablation, n)
    show_table(found)
    if found.rows and found.rows[0].sure:
        show(f"Try: unbraid edit {shlex.quote(str(run))} --off {found.rows[0].name} --out DIR")
    elif found.rows:
        show("None of what helps is sure; more validation images would tell.")


app.command(edit, sort_key=101)
app.command(suggest, sort_key=102)
