"""Measure clusters of images against classes, against clouds of one cause, and for whole channels.

    python benchmarks/clusters.py --train SCAN --val SCAN [--tau 0.01] [--p 0.5] [--clusters]

Scans of one layer, of training and of validation images. Figures for docs/concepts.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

import unbraid
from unbraid.finding.arv import averaged_relevance
from unbraid.finding.clusters import (
    adjusted_rand_index,
    find_clusters,
    mean_pooled,
    top_images,
)
from unbraid.finding.findings import Concept, Findings
from unbraid.finding.membership import mean_responses, relevance_for_channel
from unbraid.scanning.records import Scan


def concept_of(scan: Scan, found: Findings, concepts: dict[int, tuple[Concept, ...]]) -> dict:
    """Which concept of each channel an image belongs to, (N,), -1 for none."""
    members, parts = found.members_in(scan), {o: [] for o in concepts}
    for records in scan.shards():
        for o, groups in concepts.items():
            parts[o].append(members.concept_of(records, groups))
    return {o: torch.cat(own) for o, own in parts.items()}


def one_cause(
    scan: Scan, channel: int, relevance: Tensor, concepts: tuple[Concept, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Clouds (N, C) of a single cause that look like a channel's top images."""
    generator = torch.Generator().manual_seed(channel)
    labels = torch.cat(list(scan.columns("label")))
    pooled = torch.cat(list(scan.columns("pooled")))[:, scan.layer.group_of(channel)]
    every = relevance_for_channel(scan, pooled, channel)
    means = {int(c): every[labels == c].mean(0) for c in labels.unique()}
    residuals = every - torch.stack([means[int(c)] for c in labels])
    for concept in concepts:
        cloud = means[concept[0]] + residuals
        yield "class mean + residuals", cloud[cloud.sum(1).topk(len(relevance)).indices]
        yield "one class", every[labels == concept[0]]
    direction = relevance.mean(0) / relevance.mean(0).norm()
    some = residuals[torch.randint(len(residuals), (len(relevance),), generator=generator)]
    yield "one direction + residuals", (relevance @ direction)[:, None] * direction + some
    orders = torch.rand(relevance.shape, generator=generator).argsort(0)
    yield "inputs shuffled", relevance.gather(0, orders)
    size = (len(relevance), len(relevance))
    mix = torch.randn(size, generator=generator, dtype=torch.float64) / len(relevance) ** 0.5
    yield "normal, same covariance", relevance.mean(0) + mix @ (relevance - relevance.mean(0))


def false_splits(scan: Scan, found: Findings) -> None:
    """Count clouds of one cause that are found polysemantic."""
    outcomes: dict[str, list[bool]] = {}
    everywhere = mean_pooled(scan)
    for channel, top in top_images(scan, found.channels):
        origin = averaged_relevance(scan, channel, everywhere)
        real = find_clusters(top.relevance, origin)[1] < found.gamma
        outcomes.setdefault("real ones", []).append(real)
        for name, cloud in one_cause(scan, channel, top.relevance, found.concepts[channel]):
            outcomes.setdefault(name, []).append(find_clusters(cloud, origin)[1] < found.gamma)
    for name, own in outcomes.items():
        print(f"{name:26} {sum(own)} of {len(own)} polysemantic")


def agreement(scan: Scan, classes: Findings, clusters: Findings) -> None:
    """Recall of channels, and how alike classes and clusters divide the images that both have."""
    both = {o: own for o, own in classes.concepts.items() if o in clusters.concepts}
    mine = concept_of(scan, classes, both)
    theirs = concept_of(scan, clusters, {o: clusters.concepts[o] for o in both})
    scores = []
    for o in both:
        own = (mine[o] >= 0) & (theirs[o] >= 0)
        if len(mine[o][own].unique()) > 1:
            scores.append(adjusted_rand_index(mine[o][own].tolist(), theirs[o][own].tolist()))
    index = torch.tensor(scores, dtype=torch.float64)
    print(
        f"clusters find {len(both)} of {len(classes.concepts)}, {len(clusters.concepts)} in all; "
        f"adjusted Rand index {index.mean():.3f}, median {index.quantile(0.5):.3f} of {len(scores)}"
    )


def hits(score: Tensor, own: Tensor) -> float:
    """R-precision: the part of the images with the largest scores that are of the concept."""
    return float(own[score.topk(int(own.sum())).indices].double().mean())


def whole_channels(train: Scan, val: Scan, found: Findings, name: str) -> None:
    """Coverage, and R-precision of concepts of classes and of clusters, of the whole channel's."""
    split = unbraid.split(train, found)
    member = concept_of(val, found, found.concepts)
    pooled = torch.cat(list(val.columns("pooled")))
    n_positions = torch.cat(list(val.columns("n_positions")))
    covered, rows = [], {"of classes": [], "of clusters": []}
    for part in split.channels:
        o, concept = part.channel, member[part.channel]
        z = mean_responses(val, pooled, n_positions, [o])[:, 0]
        covered.append((concept[z.topk(round(len(z) / 100)).indices] >= 0).double().mean())
        new = part.pooled_responses(pooled[:, val.layer.group_of(o)], n_positions)
        for k, group in enumerate(part.concepts):
            own = concept == k
            if own.any():
                kind = "of clusters" if set(group) <= found.clusters.keys() else "of classes"
                rows[kind].append((hits(new[:, k + 1], own), hits(new[:, 0], own)))
    print(f"{name}: {torch.stack(covered).mean():.3f} of the top hundredth covered")
    for kind, own in rows.items():
        if own:
            one, whole = torch.tensor(own).mean(0).tolist()
            print(f"  {len(own)} {kind}: R-precision {one:.3f}, of the whole channel {whole:.3f}")


def main() -> None:
    """Read the command line and print all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--tau", type=float, default=0.01)
    parser.add_argument("--p", type=float, default=0.5)
    parser.add_argument("--clusters", action="store_true", help="all channels: some minutes")
    arguments = parser.parse_args()
    train, val = unbraid.open_scan(arguments.train), unbraid.open_scan(arguments.val)
    thresholds = {"tau": arguments.tau, "p": arguments.p}
    classes = unbraid.find(train, **thresholds)
    false_splits(train, classes)
    whole_channels(train, val, classes, "classes")
    whole = unbraid.find(train, concepts="whole", **thresholds)
    whole_channels(train, val, whole, "whole channel")
    if arguments.clusters:
        agreement(train, classes, unbraid.find(train, concepts="clusters"))


if __name__ == "__main__":
    main()
