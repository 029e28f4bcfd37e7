"""How far clusters depend on the order of images, and on which images there are.

    python benchmarks/cluster_stability.py --train SCAN --val SCAN [--step 20]

Every so many channels are clustered: of all training images, of these in another order, of nine
tenths of them, and of two halves that share none. Two clusterings are compared by the concepts that
they put images into: of the training images where only the order differs, else of validation
images, which none has seen. Figures for docs/evidence-concepts.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import unbraid
from clusters import concept_of
from unbraid.base.tables import Table
from unbraid.finding import clusters as clustering
from unbraid.finding.findings import Findings
from unbraid.scanning.fields import Records
from unbraid.scanning.records import Scan

USUAL = clustering.top_images


@dataclass(frozen=True)
class Part(Scan):
    """Some images of a scan, in an order of their own, in memory."""

    records: Records | None = None

    @property
    def n_shards(self) -> int:
        """All in one."""
        return 1

    def shard(self, number: int) -> Records:
        """Give the images."""
        assert self.records is not None
        return self.records

    light_shard = shard

    def columns(self, name: str) -> Iterator[Tensor]:
        """Give one column."""
        yield getattr(self.records, name)


def part_of(scan: Scan, chosen: Tensor) -> Part:
    """Images of a scan by place, numbered anew in the order in which they are named."""
    names = ("label", "prediction", "n_positions", "pooled")
    columns = {name: torch.cat(list(scan.columns(name)))[chosen] for name in names}
    empty = vars(scan.light_shard(0))
    columns["index"] = torch.arange(len(chosen))
    columns["share_start"] = torch.zeros(len(chosen) + 1, dtype=torch.int64)
    records = Records(**{**empty, **columns, "group": None, "drawn": None})
    manifest = replace(scan.manifest, n_images=len(chosen))
    return Part(scan.path, manifest, scan.weight, scan.bias, records)


def find(scan: Scan, channels: list[int]) -> Findings:
    """Cluster some channels."""
    clustering.top_images = partial(USUAL, channels=channels)
    return unbraid.find(scan, concepts="clusters")


def together(one: Tensor, other: Tensor) -> float:
    """Of pairs of images that either puts into one concept, how many both do (F-measure)."""
    pairs = [(own[:, None] == own) & (own >= 0) for own in (one, other)]
    for own in pairs:
        own.fill_diagonal_(False)
    n_pairs = int(pairs[0].sum() + pairs[1].sum())
    return 2 * int((pairs[0] & pairs[1]).sum()) / n_pairs if n_pairs else float("nan")


def compare(name: str, on: Scan, one: Findings, other: Findings) -> tuple[str, ...]:
    """Channels that two clusterings found, and how alike they divide images."""
    both = set(one.concepts) & set(other.concepts)
    either = set(one.concepts) | set(other.concepts)
    of_one, of_other = (concept_of(on, f, {o: f.concepts[o] for o in both}) for f in (one, other))
    rand, pairs = [], []
    for o in both:
        mine, theirs = of_one[o], of_other[o]
        pairs.append(together(mine, theirs))
        own = (mine >= 0) & (theirs >= 0)
        if own.any():
            lists = mine[own].tolist(), theirs[own].tolist()
            rand.append(clustering.adjusted_rand_index(*lists))
    means = [f"{fmean(own):.3f}" if own else "-" for own in (rand, pairs)]
    return (name, f"{len(both)} of {len(either)}", *means)


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--val", required=True, type=Path)
    parser.add_argument("--step", type=int, default=20)
    asked = parser.parse_args()
    train, val = unbraid.open_scan(asked.train), unbraid.open_scan(asked.val)
    channels = list(range(5, train.layer.n_out, asked.step))
    n = sum(len(column) for column in train.columns("index"))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    everything = find(train, channels)
    halves = [find(part_of(train, own.sort().values), channels) for own in order.chunk(2)]
    most = find(part_of(train, order[: n * 9 // 10].sort().values), channels)
    rows: list[tuple[str, ...]] = [("clustered", "both found", "Rand index", "pairs kept")]
    again = find(part_of(train, order), channels)
    rows.append(compare("in another order", train, everything, again))
    rows.append(compare("nine tenths of the images", val, everything, most))
    rows.append(compare("one half and the other", val, *halves))
    n_concepts = [len(own) for own in everything.concepts.values()]
    print(f"{len(n_concepts)} of {len(channels)} channels, {fmean(n_concepts):.2f} concepts each")
    print(Table(rows))


if __name__ == "__main__":
    main()
