"""A finished run's report, written again from its folder without the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from unbraid.as_scanned import as_scanned
from unbraid.errors import DataError, RunError
from unbraid.evaluate import evaluate
from unbraid.evaluation import read_ablation, read_output, read_semantics
from unbraid.find import find
from unbraid.labels import Outputs
from unbraid.pipeline import as_labelled, concerned_in, seen_in
from unbraid.records import Scan, open_scan
from unbraid.report import report
from unbraid.run_folders import home_of, positions_folder
from unbraid.sensitivity import sensitivity
from unbraid.settings import Thresholds, read_settings
from unbraid.sight import Sight
from unbraid.sources import (
    classes_of,
    has_labels,
    list_images,
    open_listed,
    part_of,
    read_labels,
)
from unbraid.sources.listing import Listing
from unbraid.splits import Split
from unbraid.visualize.run import read_run


def report_again(out: Path) -> Path:
    """Write a finished run's report again from its folder.

    Raises:
        RunError: the folder holds no finished run.
    """
    settings = read_settings(out)
    if settings is None:
        raise RunError(f"{out} holds no finished run; make one with `unbraid run`.")
    thresholds = Thresholds(**settings["thresholds"])
    source, title = settings["source"], settings["title"]
    home = home_of(out)
    train_scan, val_scan = open_scan(home / "scan-train"), open_scan(home / "scan-val")
    found = seen_in(val_scan, find(train_scan, **thresholds.of_find))
    counted = divided = evaluation = val_maps = features = None
    if thresholds.concepts == "classes":
        counted = sensitivity(train_scan, found=found)
    if found.concepts:
        if not (out / "evaluation.json").exists():
            raise RunError(f"{out} holds an unfinished run; start it again, it goes on there.")
        divided = Split.load(out / "split.safetensors")
        measured = out / "evaluation.json"
        baseline = Split.load(out / "split-published.safetensors")
        maps = positions_folder(out, "val", val_scan, **concerned_in(val_scan, found))
        if not maps.exists():
            raise RunError(f"{maps} is gone, which the page shows; start the run again.")
        val_maps = open_scan(maps)
        features = read_run(out)
        evaluation = evaluate(
            divided,
            val_maps,
            baseline=baseline,
            output=read_output(measured),
            ablation=read_ablation(measured),
            semantics=read_semantics(measured),
        )
    return report(
        out / "report.html",
        scan=val_scan,
        train_scan=train_scan,
        found=found,
        sensitivity=counted,
        split=divided,
        evaluation=evaluation,
        maps=val_maps,
        features=features,
        dataset=as_labelled(validation_images(source, val_scan, settings.get("sight")), val_scan),
        title=title,
    )


def validation_images(
    source: dict[str, Any], scan: Scan, sight: dict[str, Any] | None = None
) -> Dataset[Any]:
    """Open a run's validation images again, for looking at.

    Args:
        source: how the run found its images.
        scan: of them.
        sight: the part of a picture that the network saw, from `Sight.to_dict`; None if unknown.

    Raises:
        DataError: they are gone; a new page would lack the pictures that the old one has.
    """
    if "demo" in source:
        from unbraid.demo.network import load_images

        return load_images("test")
    if "data" not in source:
        raise RunError("The run does not say where its images are; make it anew.")
    seen = None if sight is None else Sight(**sight)
    listed = list_images(part_of(source["data"], "val"))
    labels = _labels(listed, scan) if source.get("class_folders", True) else {}
    return as_scanned(open_listed(listed, seen, labels, scan.class_names), scan)


def _labels(listed: Listing | Path, scan: Scan) -> dict[str, int]:
    """Tell classes apart as the scan did; without the network their numbers may be others."""
    if not has_labels(listed):
        return {}
    try:
        return read_labels(listed, Outputs(scan.class_names, len(scan.class_names))).labels
    except DataError:  # other names were given for them
        return {name: place for place, name in enumerate(classes_of(listed))}
