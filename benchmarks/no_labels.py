"""Lay a run with labels beside one without a target: channels found, and the two pages.

    python benchmarks/no_labels.py --run RUN --bare BARE --out DIR [--every]

RUN is of `unbraid run` with labels, BARE a scan of the same validation images made with
`--target none`. Clusters need no target, so they are made of RUN's scans, read as without one;
without --every only channels that classes find are clustered. Figures for docs/no-labels.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import unbraid
from clusters import agreement
from unbraid.finding import clusters as clustering
from unbraid.finding.findings import Findings
from unbraid.running.finished import Run, seen_in
from unbraid.scanning.records import Scan

COLUMNS = ("index", "label", "n_positions", "pooled", "spread", "spread_start", "group")


def without_target(scan: Scan) -> Scan:
    """The same scan, read as one without a target."""
    manifest = replace(scan.manifest, target="none")
    vars(manifest)["scan_id"] = scan.manifest.scan_id  # by which its shards are known
    return replace(scan, manifest=manifest)


def are_alike(scan: Scan, bare: Scan) -> bool:
    """Whether two scans of other targets hold the same but for shares, bit for bit."""
    pairs = zip(scan.shards(), bare.shards(), strict=True)
    both = [(getattr(a, n), getattr(b, n)) for a, b in pairs for n in COLUMNS]
    return all(a is b is None or torch.equal(a, b) for a, b in both)


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


def main() -> None:
    """Read the command line, print figures and write the two pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--bare", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--every", action="store_true", help="cluster all channels: minutes")
    asked = parser.parse_args()
    run = Run(asked.run)
    train, val, classes = run.train_scan, run.val_scan, run.found
    if asked.bare is not None:
        same = are_alike(val, unbraid.open_scan(asked.bare))
        print(f"without a target the scan is the same but for shares: {'yes' if same else 'NO'}")
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


if __name__ == "__main__":
    main()
