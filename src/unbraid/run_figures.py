"""Figures of a finished run, made from its folder without the network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from unbraid.again import validation_images
from unbraid.errors import RunError
from unbraid.figures import density_figure, source_figure, teaser_figure
from unbraid.pipeline import as_labelled
from unbraid.records import open_scan
from unbraid.run_folders import home_of
from unbraid.settings import read_settings
from unbraid.splits import Split
from unbraid.visualize.run import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FigureKind = Literal["teaser", "densities", "sources"]


def figure_of_run(out: Path, channel: int, kind: FigureKind = "teaser") -> Figure:
    """Draw a figure of one channel of a finished run.

    Args:
        out: the run's folder.
        channel: one that the run split.
        kind: "teaser" as `unbraid.teaser_figure` draws it, with feature visualisations where the
            run made them; "densities" and "sources" as `unbraid.density_figure` and
            `unbraid.source_figure` do.

    Raises:
        RunError: the folder holds no finished run, or the run split no channel.
        DataError: the run's images are gone.
        UsageError: the run did not split this channel.
        UnbraidError: matplotlib is not installed.
    """
    settings = read_settings(out)
    if settings is None:
        raise RunError(f"{out} holds no finished run; make one with `unbraid run`.")
    divided = out / "split.safetensors"
    if not divided.exists():
        finished = (out / "report.html").exists()
        rest = "see its report.html" if finished else "start the run again to finish it"
        raise RunError(f"{out} holds no split, so there is nothing to draw; {rest}.")
    split, scan = Split.load(divided), open_scan(home_of(out) / "scan-val")
    if kind == "densities":
        return density_figure(split, scan, channel)
    if kind == "sources":
        return source_figure(split, scan, channel)
    images = as_labelled(validation_images(settings["source"], scan), scan)
    return teaser_figure(split, scan, channel, dataset=images, features=read_run(out))
