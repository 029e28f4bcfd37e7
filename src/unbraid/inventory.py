"""What a folder holds, in plain words: each scan and each run, and how far it has come."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from unbraid.errors import RunError
from unbraid.manifest import Manifest, read_manifest
from unbraid.records import shards_there
from unbraid.run_folders import FEATURES
from unbraid.settings import read_settings, tell_settings
from unbraid.tables import count

_PARTS = {
    "split.safetensors": "split",
    "evaluation.json": "evaluation",
    f"{FEATURES}/features.json": "features",
    "report.html": "report",
}


def describe_scans(folders: Iterable[Path]) -> list[str]:
    """Name each scan: its layer, its images, and whether it is finished."""
    return [f"{folder}: {_scan_in_words(folder)}." for folder in folders]


def describe_runs(folders: Iterable[Path]) -> list[str]:
    """Name each run: its settings, what it found, and what of it is there."""
    return [f"{folder}: {_run_in_words(folder)}." for folder in folders]


def _scan_in_words(folder: Path) -> str:
    try:
        manifest = read_manifest(folder)
    except RunError:
        manifest = None
    if manifest is None:
        return "a scan whose manifest cannot be read"
    n_there, n_shards = len(shards_there(folder, manifest)), manifest.n_shards
    done = "finished" if n_there == n_shards else f"{n_there} of {count(n_shards, 'shard')} there"
    return f"a scan of layer {manifest.layer.name}, {_images_in_words(manifest)}, {done}"


def _images_in_words(manifest: Manifest) -> str:
    images = count(manifest.n_images, "image")
    if manifest.classes is not None:
        images += f" of {count(len(manifest.classes), 'class', 'classes')}"
    return f"{images}, with positions" if manifest.positions else images


def _run_in_words(folder: Path) -> str:
    try:
        settings = read_settings(folder)
    except RunError:
        settings = None
    known = "with unknown settings" if settings is None else f"with {tell_settings(settings)}"
    parts = [word for name, word in _PARTS.items() if (folder / name).exists()]
    return f"a run {known}; {_findings_in_words(folder)}; {', '.join(parts) or 'no results'}"


def _findings_in_words(folder: Path) -> str:
    try:
        with (folder / "findings.csv").open(encoding="utf-8", newline="") as file:
            channels = [row["channel"] for row in csv.DictReader(file, strict=True)]
    except (OSError, ValueError, KeyError, csv.Error):
        return "findings not there"
    if not channels:
        return "nothing found"
    return f"{count(len(channels), 'pair')} in {count(len(set(channels)), 'channel')}"
