"""Reports that are hard to show: hostile and endless names, many concepts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from test_report import Run

import unbraid
from unbraid.finding.findings import Pair

LONG = "long" * 25_000
NAMES = (
    "German short-haired pointer, Deutsch Kurzhaar",
    "wheelbarrow and a digital clock",
    24 * "W",
    "T-shirt, of any colour",
)
CONCEPTS = {
    0: [[0], [1], [2, 3]],
    1: [[0, 1], [2, 3]],
    2: [[0], [1], [2], [3]],
}


def hostile(run: Run, path: Path) -> None:
    """Write one with a channel that is only listed, without figures, and an endless name."""
    concepts = {**run.found.concepts, 77: ((0,), (1,))}
    nowhere = Pair(77, 0, 1, math.nan, 0.9, 0.9, math.nan, math.nan, math.nan, math.nan)
    names = (*run.found.class_names[:3], LONG)
    found = replace(
        run.found, concepts=concepts, pairs=(*run.found.pairs, nowhere), class_names=names
    )
    run.report(path, found=found)


def crowded(run: Run, path: Path) -> None:
    """Write one with three and four concepts a channel, long names and a map of thresholds."""
    train_scan, scan = (
        replace(s, manifest=replace(s.manifest, class_names=NAMES))
        for s in (run.train_scan, run.scan)
    )
    found = unbraid.find(train_scan, channels=CONCEPTS)
    split = unbraid.split(train_scan, found, method="published", rho=0.7)
    evaluation = unbraid.evaluate(split, scan)
    sensitivity = unbraid.sensitivity(train_scan, found=found)
    run.report(
        path,
        scan=scan,
        train_scan=train_scan,
        found=found,
        split=split,
        evaluation=evaluation,
        sensitivity=sensitivity,
    )
