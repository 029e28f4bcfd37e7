"""The command that explains images by the concept channels of a run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import unbraid
from unbraid.base.errors import RunError, UsageError
from unbraid.base.tables import Table
from unbraid.cli import Device, RunPath, Weights, app, note, show

_MODEL = "The run's network, needed where it is code of your own: FILE.py:FUNCTION."
_CLASSES = "More classes to explain, by name or output's number; the predicted one always is."
Model = Annotated[str | None, Parameter(help=_MODEL)]
Classes = Annotated[list[str] | None, Parameter(help=_CLASSES, negative="", consume_multiple=True)]


def explain(
    run: RunPath,
    images: Annotated[list[Path], Parameter(negative="")],
    /,
    *,
    classes: Classes = None,
    n: int = 8,
    out: Path | None = None,
    model: Model = None,
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
    from unbraid.running.network import load_again, open_pictures
    from unbraid.running.run import Run

    if any((out / name).exists() for name in ("settings.json", "manifest.json") if out):
        raise UsageError(f"{out} holds a run or scan; name another folder.")
    ran = Run(run)
    if not (ran.folder / "split.safetensors").exists():
        raise RunError(
            f"{run} holds no split, so there are no concept channels; start the run again unless "
            "its report says that nothing was found."
        )
    split = ran.split
    loaded = load_again(ran.settings.source, model, weights, device)
    note(loaded.note)
    model2 = unbraid.apply(loaded.model, split)
    explained = unbraid.explain(model2, open_pictures(images, loaded), classes=classes or [], n=n)
    tables = [own.table() for own in explained.images]
    shown = [replace(table, note="") for table in tables]
    shown += [Table([], note=note) for note in dict.fromkeys(table.note for table in tables)]
    width = shutil.get_terminal_size((0, 0)).columns  # 0 where it goes elsewhere
    show("\n\n".join(table.fitted(width) if width else str(table) for table in shown))
    files = explained.save(out or ran.folder / "explained")
    show(f"\nPictures and figures: {', '.join(map(str, files))}")


app.command(explain, sort_key=110)
