"""Commands that look at a finished run, explain images by it and change its network."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

from cyclopts import Parameter
from cyclopts.validators import Number

import unbraid
from unbraid.base.errors import DataError, RunError, UnbraidError, UsageError
from unbraid.base.tables import Table, one_line
from unbraid.cli.shared import (
    Bands,
    Device,
    Out,
    OwnData,
    RunPath,
    Weights,
    note,
    read_bands,
    refuse_result,
    say,
    show,
    show_table,
)
from unbraid.scanning.scan_options import Loading

_OWN_MODEL = "The run's network, FILE.py:FUNCTION. Needed only if it is code of your own."
_CLASSES = "Classes to explain besides the predicted one, by name or output number."
OwnModel = Annotated[str | None, Parameter(help=_OWN_MODEL)]
Classes = Annotated[list[str] | None, Parameter(help=_CLASSES, negative="", consume_multiple=True)]
_OFF = "Concept channel to switch off, such as 900.1. 900.rest is what no concept explains."
_SCALE = "Concept channel and its factor, such as 12.0=0.5."
Off = Annotated[list[str] | None, Parameter(help=_OFF, negative="", consume_multiple=True)]
Scale = Annotated[list[str] | None, Parameter(help=_SCALE, negative="", consume_multiple=True)]
_PORT = "Port to listen on. If it is taken, another one is used."
_OPEN = "Open the page in the browser."
Port = Annotated[int, Parameter(help=_PORT, validator=Number(gte=0, lt=65536))]
Opens = Annotated[bool, Parameter(name="--open", help=_OPEN, negative="--no-open")]
FigureKind = Literal["teaser", "densities", "sources"]


def report(run: RunPath, *, data: OwnData = None, bands: Bands = None) -> None:
    """Write a run's report again, for instance after an update of unbraid."""
    from unbraid.base.progress import waiting
    from unbraid.running.finished import Run

    ran = Run(run, data, read_bands(bands))
    with waiting("Measuring and writing the page"):
        page = ran.report()
    show(f"Report: {page}")


def figure(
    run: RunPath,
    *,
    channel: int,
    out: Path,
    kind: FigureKind = "teaser",
    data: OwnData = None,
    bands: Bands = None,
) -> None:
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
    save_figure(Run(run, data, read_bands(bands)).figure(channel, kind), out)
    show(f"Figure: {out}")


def circuit(
    run: RunPath,
    *,
    channel: int,
    concept: int | None = None,
    n: int = 4,
    out: Path | None = None,
    model: OwnModel = None,
    weights: Weights = None,
    device: Device = None,
    data: OwnData = None,
    bands: Bands = None,
) -> None:
    """Show what feeds a channel's concept channels, with images that excite each source most.

    Writes a picture (NAME.png, NAME.svg) and all numbers (NAME.json). If the run split several
    layers, another circuit goes through the nearest split layer before this one. Only that circuit
    runs the network.

    Args:
        channel: A channel that the run split.
        concept: One of its concepts, counted from 0. By default all.
        n: Sources to show for each concept channel.
        out: Folder to write into. By default RUN/circuits.
    """
    from unbraid.reporting.circuits import circuit_figure, layer_before
    from unbraid.reporting.figures import save_figure
    from unbraid.running.circuits import circuits_of
    from unbraid.running.finished import Run
    from unbraid.running.folders import refuse_folder
    from unbraid.running.network import load_again

    refuse_folder(out)
    ran = Run(run, data, read_bands(bands))
    unbraid.keep_memory()
    load = partial(load_again, ran.settings.source, model, weights, device)
    graphs = circuits_of(ran, channel, concept, n=n, network=load, say=note)
    name = f"{channel}" if concept is None else f"{channel}.{concept}"
    files, can_draw = [], find_spec("matplotlib") is not None
    images = None
    if can_draw:
        try:
            images = ran.images
        except (DataError, RunError) as error:
            note(f"{error} Circuits are drawn without images.")
    for graph in graphs:
        show_table(graph)
        show()
        before = layer_before(graph)
        stem = f"{name}-{quote(before, safe='')}" if before else name
        files.append((out or ran.folder / "circuits") / f"{stem}.json")
        graph.save(files[-1])
        if can_draw:
            drawn = circuit_figure(graph, dataset=images)
            for ending in ("png", "svg"):
                files.append(files[0].with_name(f"{stem}.{ending}"))
                save_figure(drawn, files[-1])
    if not can_draw:
        note("Pictures are left out, as matplotlib is not installed; pip install matplotlib.")
    show(f"Circuits: {', '.join(map(str, files))}")


def check(run: Path) -> int:
    """List what a folder holds, and set damaged files aside so that they are made again.

    What cannot be read is named and stays. The exit code is 0 if everything is whole, else 1.

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
    bands: Bands = None,
) -> None:
    """Show which concept channels your images use, how much and where.

    Writes two files per image: a picture that shows where its concept channels respond (NAME.png),
    and all numbers (NAME.json).

    Args:
        images: Picture files; or tensors as the network takes them, of one image or several, as
            .npy, .pt or .safetensors; or files like those of a run over tensors.
        n: Concept channels to show per image, those with the largest shares.
        out: Folder to write into. By default RUN/explained.
    """
    from unbraid.running.finished import Run
    from unbraid.running.folders import refuse_folder
    from unbraid.running.network import (
        is_tensor_file,
        load_again,
        open_pictures,
        prepared_otherwise,
    )

    refuse_folder(out)
    ran = Run(run)
    split, target = ran.split, ran.target
    unbraid.keep_memory()
    loaded = load_again(ran.settings.source, model, weights, device)
    source = ran.settings.source
    if any(not is_tensor_file(path) for path in images):
        note(loaded.note)
        note(prepared_otherwise(source))
    model2 = unbraid.apply(loaded.model, split)
    as_in_files = bool(source.get("tensors"))
    pictures = open_pictures(images, loaded, read_bands(bands), as_in_files=as_in_files)
    explained = unbraid.explain(model2, pictures, classes=classes or [], n=n, target=target)
    tables = [own.table() for own in explained.images]
    shown = [replace(table, note="") for table in tables]
    shown += [Table([], note=note) for note in dict.fromkeys(table.note for table in tables)]
    for table in shown:
        show_table(table)
        show()
    files = [str(file) for file in explained.save(out or ran.folder / "explained")]
    each = [", ".join(pair) for pair in zip(files[::2], files[1::2], strict=True)]
    if len(each) == 1:
        show(f"Pictures and figures: {each[0]}")
        return
    show("Pictures and figures:")
    for own, written in zip(explained.images, each, strict=True):
        show(f"  {one_line(own.image)}: {written}")


def explore(
    run: RunPath,
    *,
    port: Port = 8017,
    opens: Opens = True,
    out: Path | None = None,
    model: OwnModel = None,
    weights: Weights = None,
    device: Device = None,
    data: OwnData = None,
    bands: Bands = None,
) -> None:
    """Explore a run in the browser: try pictures, move gates, split channels by hand.

    Serves a page to this machine only, until ctrl-C. Nothing is loaded from the internet.

    Args:
        out: Folder to save splits into. By default RUN/splits.
    """
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise UnbraidError(
            "unbraid explore needs starlette and uvicorn; pip install 'unbraid[explore]'."
        )
    from unbraid.exploring.explorer import open_explorer
    from unbraid.exploring.opened import open_run
    from unbraid.exploring.server import serve

    unbraid.keep_memory()
    opened = open_run(run, model, weights, device, data, read_bands(bands))
    note("" if opened.network is None else opened.network.note)
    for words in opened.missing:
        note(words)
    serve(open_explorer(opened, out), port, opens=opens, tell=show)


def edit(
    run: RunPath,
    *,
    off: Off = None,
    scale: Scale = None,
    out: Out,
    model: OwnModel = None,
    weights: Weights = None,
    device: Device = None,
    data: OwnData = None,
    everything: Annotated[bool, Parameter("--all")] = False,
    loading: Loading = Loading(),
) -> None:
    """Make a network with concept channels switched off or scaled, and show what changed.

    Writes the network as state dict, torch.export program and ONNX file. A page compares accuracy
    per class, confusions and images before and after. The change is in the layer's own weights, so
    the network runs as fast as before.

    Args:
        everything: Compare on all validation images instead of 5,000.
    """
    from unbraid.running.edit import FIGURES, edit_run
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
    ran = Run(run, data)
    network = load_again(ran.settings.source, model, weights, device)
    made = edit_run(
        ran, scales, out, loading=loading, everything=everything, network=network, say=say
    )
    show_table(made.changes.table().kept_in(out / FIGURES))
    show(f"Network: {', '.join(map(str, made.files))}")
    show(f"Page: {made.page}")


def suggest(run: RunPath, *, n: int = 10) -> None:
    """Rank concept channels worth a look: those that do harm, and those that matter elsewhere.

    First come channels whose removal helps, as a shortcut's would. Then come channels that a class
    depends on although it is not in their concept. Reads the run's numbers, runs no network.

    Args:
        n: Channels of each kind, at most.
    """
    from unbraid.base.progress import waiting
    from unbraid.running.finished import Run

    with waiting("Measuring"):
        evaluation = Run(run).evaluation
    if evaluation is None or evaluation.ablation is None:
        why = "" if Run(run).settings.target != "none" else ", as it has no target"
        raise RunError(
            f"The run in {run} switched nothing off{why}, so there is nothing to suggest."
        )
    found = unbraid.suggest(evaluation.ablation, n)
    show_table(found)
    helps = [row for row in found.rows if row.kind == "helps"]
    if helps and helps[0].sure:
        show(f"Try: unbraid edit {shlex.quote(str(run))} --off {helps[0].name} --out DIR")
    elif helps:
        show("None of these is sure to help; more validation images would tell.")


def share(
    run: RunPath,
    *,
    out: Out,
    data_name: str = "",
    license_name: Annotated[str, Parameter("--license")] = "",
    pictures: bool = False,
    data: OwnData = None,
    bands: Bands = None,
) -> None:
    """Write a run's split into a folder that others can load, with a card, measures and page.

    `unbraid.load_split(model, FOLDER)` puts the split into the network that it was made for. The
    folder names your classes. It holds no path, and none of your images without --pictures.

    Args:
        data_name: What the images are, in words, for the card.
        license_name: Licence of what you share, such as mit, for the card.
        pictures: Show your images on the page.
    """
    from unbraid.base.progress import waiting
    from unbraid.running.finished import Run
    from unbraid.running.share import share_run

    if bands is not None and not pictures:
        raise UsageError(
            "--bands say how pictures are drawn, and none are shared; add --pictures, or leave it "
            "out."
        )
    words = {"data_name": data_name, "license_name": license_name}
    ran = Run(run, data, read_bands(bands))
    with waiting("Measuring and writing the page"):
        files = share_run(ran, out, **words, pictures=pictures)
    show(f"Shared: {', '.join(map(str, files))}")
