"""Lay a run with labels beside one without a target: channels found, measures, and the two pages.

    python benchmarks/no_labels.py --run RUN --none NONE
    python benchmarks/no_labels.py --run RUN --bare BARE --out DIR [--every]

RUN is of `unbraid run` with labels, NONE of `unbraid run --target none` on the same images: what
both found and measured is set side by side, over all channels that each found, and over those that
both did. Where there is no such run, BARE is a scan of the same validation images made with
`--target none`. Clusters need no target, so they are made of RUN's scans, read as without one;
without --every only channels that classes find are clustered. Figures for docs/no-labels.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

import unbraid
from clusters import agreement
from unbraid.base.tables import Table, figure
from unbraid.finding import clusters as clustering
from unbraid.finding.findings import Findings
from unbraid.running.finished import Run, seen_in
from unbraid.scanning.records import Scan

COLUMNS = ("index", "n_positions", "pooled")
OF_CONCEPTS = {
    "r_precision": "R-precision",
    "whole_r_precision": "of the whole",
    "auroc_all": "AUROC",
    "whole_auroc_all": "of the whole",
    "mimic_error": "mimic",
    "off": "off",
}
OF_CHANNELS = {
    "separation_error": "separation",
    "top_coverage": "of top 1 %",
    "explained_share": "explained",
}


def without_target(scan: Scan) -> Scan:
    """The same scan, read as one without a target."""
    manifest = replace(scan.manifest, target="none")
    vars(manifest)["scan_id"] = scan.manifest.scan_id  # by which its shards are known
    return replace(scan, manifest=manifest)


def by_index(scan: Scan) -> tuple[Tensor, ...]:
    """What feeds the layer in each image, and where, in the order of the data set.

    A run begins with a first look, whose images it chooses by class where there are classes.
    """
    index, *columns = (torch.cat(list(scan.columns(name))) for name in COLUMNS)
    return tuple(column[index.argsort()] for column in (index, *columns))


def are_alike(scan: Scan, bare: Scan) -> bool:
    """Whether two scans of other targets have the same images, positions and pooled inputs."""
    pairs = zip(by_index(scan), by_index(bare), strict=True)
    return scan.ids() == bare.ids() and all(torch.equal(a, b) for a, b in pairs)


def of_channels(found: Findings, channels: set[int]) -> Findings:
    """What was found in some channels."""
    concepts = {o: own for o, own in found.concepts.items() if o in channels}
    used = {number for groups in concepts.values() for group in groups for number in group}
    return replace(
        found,
        concepts=concepts,
        pairs=tuple(pair for pair in found.pairs if pair.channel in channels),
        clusters={number: own for number, own in found.clusters.items() if number in used},
    )


def measured(folder: Path) -> dict[int, dict[str, Any]]:
    """What a finished run measured of each channel."""
    content = json.loads((folder / "evaluation.json").read_text())
    return {channel["channel"]: channel for channel in content["channels"]}


def row_of(name: str, channels: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    """Means over concepts or channels, but the median separation error, which few can move."""
    own = list(channels)
    concepts = [concept for channel in own for concept in channel["concepts"]]
    figures = [fmean(concept[key] for concept in concepts) for key in OF_CONCEPTS]
    figures.append(median(channel["separation_error"] for channel in own))
    figures += [fmean(channel[key] for channel in own) for key in list(OF_CHANNELS)[1:]]
    return (name, str(len(own)), str(len(concepts)), *map(figure, figures))


def side_by_side(labelled: Path, bare: Path) -> Table:
    """Two finished runs: all channels that each found, those that both did, and the others."""
    mine, theirs = measured(labelled), measured(bare)
    both = sorted(mine.keys() & theirs.keys())
    sets = {
        "labels": list(mine),
        "no target": list(theirs),
        "labels, found by both": both,
        "no target, found by both": both,
        "labels, not without": sorted(mine.keys() - theirs.keys()),
        "no target, not with labels": sorted(theirs.keys() - mine.keys()),
    }
    rows: list[tuple[str, ...]] = [
        ("run", "channels", "concepts", *OF_CONCEPTS.values(), *OF_CHANNELS.values())
    ]
    for name, channels in sets.items():
        own = mine if name.startswith("labels") else theirs
        if channels:
            rows.append(row_of(name, [own[o] for o in channels]))
    return Table(rows)


def clustered(asked: argparse.Namespace, run: Run) -> None:
    """Cluster the labelled run's own scans, print figures and write the two pages."""
    train, val, classes = run.train_scan, run.val_scan, run.found
    if not asked.every:
        usual = clustering.top_images
        clustering.top_images = partial(usual, channels=sorted(classes.concepts))
    clusters = unbraid.find(without_target(train), concepts="clusters", progress=True)
    agreement(train, classes, clusters)
    both = set(classes.concepts) & set(clusters.concepts)
    for name, found, own in (
        ("classes", classes, lambda scan: scan),
        ("clusters", clusters, without_target),
    ):
        found = seen_in(own(val), of_channels(found, both))
        split = unbraid.split(own(train), found, progress=True)
        evaluation = unbraid.evaluate(split, own(val))
        print(f"{name}: {len(found.concepts)} channels\n{evaluation.summary_table()}")
        page = unbraid.report(
            asked.out / f"{name}.html",
            **{"scan": own(val), "train_scan": own(train), "dataset": run.images},
            **{"found": found, "split": split, "evaluation": evaluation},
        )
        print(page)


def main() -> None:
    """Read the command line, print figures and write the two pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--none", type=Path, help="a finished run without a target")
    parser.add_argument("--bare", type=Path, help="a validation scan without a target")
    parser.add_argument("--out", type=Path, help="where the two pages go")
    parser.add_argument("--every", action="store_true", help="cluster all channels: minutes")
    asked = parser.parse_args()
    run = Run(asked.run)
    bare = asked.none / "scan-val" if asked.none else asked.bare
    if bare is not None:
        same = "yes" if are_alike(run.val_scan, unbraid.open_scan(bare)) else "NO"
        print(f"without a target the images, positions and pooled inputs are the same: {same}")
    if asked.none is not None:
        print(side_by_side(asked.run, asked.none))
    if asked.out is not None:
        clustered(asked, run)


if __name__ == "__main__":
    main()
