"""Measure clusters of images against classes, against clouds of one cause, and for whole channels.

    python benchmarks/clusters.py --train SCAN --val SCAN [--tau 0.01] [--p 0.5] [--clusters]

Scans of one layer, of training and of validation images. Figures for docs/concepts.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean, median

import torch
from torch import Tensor

import unbraid
from purity_ways import shuffled
from unbraid.finding.arv import averaged_relevance
from unbraid.finding.clusters import (
    adjusted_rand_index,
    find_clusters,
    mean_pooled,
    top_images,
)
from unbraid.finding.findings import Concept, Findings
from unbraid.finding.membership import relevance_for_channel
from unbraid.measuring.formulas import (
    auroc,
    explained_share,
    mimic_error,
    off_concept,
    r_precision,
    top_coverage,
)
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import Split

N_DRAWS = 2  # of concepts at random


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


def dealt(scan: Scan, found: Findings, member: dict, seed: int) -> tuple[Findings, dict]:
    """The images of each channel's clusters, dealt to them at random: findings, and who has what.

    Clusters that joined classes stay as they are. Members of the findings are right in this scan.
    """
    draw, clusters, all_dealt = torch.Generator().manual_seed(seed), dict(found.clusters), {}
    index = torch.cat(list(scan.columns("index")))
    for o, groups in found.concepts.items():
        alone = [k for k, group in enumerate(groups) if set(group) <= found.clusters.keys()]
        places = torch.isin(member[o], torch.tensor(alone, dtype=torch.int64)).nonzero()[:, 0]
        concept = member[o].clone()
        concept[places] = member[o][places[torch.randperm(len(places), generator=draw)]]
        all_dealt[o] = concept
        for k in alone:
            images = index[concept == k].sort().values
            for number in groups[k]:
                own = replace(clusters[number], images=images, data=scan.manifest.data)
                clusters[number] = own
    return replace(found, clusters=clusters), all_dealt


Rows = dict[str, list[tuple[float, ...]]]  # by kind of concept, figures of each
FIGURES = ("R-precision", "of the whole channel", "AUROC", "retention", "mimic", "off")


def figures_of(val: Scan, split: Split, found: Findings, member: dict) -> tuple[Rows, float, float]:
    """Figures of concepts by kind, and of channels coverage of the top 1 % and explained share."""
    pooled = torch.cat(list(val.columns("pooled")))
    n_positions = torch.cat(list(val.columns("n_positions")))
    rows: Rows = {}
    covered, explained = [], []
    for part in split.channels:
        concept = member[part.channel]
        new = part.pooled_responses(pooled[:, val.layer.group_of(part.channel)], n_positions)
        z = new[:, 0]
        covered.append(top_coverage(z, concept >= 0))
        explained.append(explained_share(z, new[:, 1:-1]))
        for k, group in enumerate(part.concepts):
            own, z_k = concept == k, new[:, k + 1]
            if own.any():
                n_clusters = len(set(group) & found.clusters.keys())
                kind = "of clusters" if n_clusters == len(group) else "of classes"
                figures = (
                    r_precision(z_k, own),
                    r_precision(z, own),
                    auroc(z_k, own),
                    float(z_k[own].mean() / z[own].mean()),
                    mimic_error(z, z_k, own),
                    off_concept(z_k, own),
                )
                rows.setdefault(kind, []).append(figures)
    return rows, fmean(covered), fmean(explained)


def whole_channels(train: Scan, val: Scan, found: Findings, name: str) -> Split:
    """Coverage, and figures of concepts of classes and of clusters, beside what chance gives."""
    member = concept_of(val, found, found.concepts)
    split = unbraid.split(train, found)
    rows, covered, explained = figures_of(val, split, found, member)
    by_chance: Rows = {}
    own = concept_of(train, found, found.concepts) if found.clusters else {}
    classes = sorted(train.labels_seen())
    for seed in range(N_DRAWS):
        if found.clusters:
            drawn, _ = dealt(train, found, own, seed)
            judged = dealt(val, found, member, seed)[1]
        else:
            drawn = shuffled(found, classes, seed)
            judged = concept_of(val, drawn, drawn.concepts)
        for kind, some in figures_of(val, unbraid.split(train, drawn), drawn, judged)[0].items():
            by_chance.setdefault(kind, []).extend(some)
    print(f"{name}: {covered:.3f} of the top hundredth covered, {explained:.3f} explained")
    for kind, some in rows.items():
        both = zip(FIGURES, zip(*some, strict=True), strict=True)
        means = [median(own) if name == "retention" else fmean(own) for name, own in both]
        told = ", ".join(f"{n} {v:.3f}" for n, v in zip(FIGURES, means, strict=True))
        chance = fmean(row[0] for row in by_chance[kind])
        mixed = kind == "of classes" and found.clusters
        ratio = "" if mixed else f", shuffled {chance:.3f} ({means[0] / chance:.1f} times)"
        print(f"  {len(some)} {kind}: {told}; {means[0] / means[1]:.1f} times the whole{ratio}")
    return split


def on_their_classes(val: Scan, split: Split, classes: Findings) -> None:
    """The same concept channels of classes, judged on images of their classes alone."""
    member = concept_of(val, classes, classes.concepts)
    pooled = torch.cat(list(val.columns("pooled")))
    n_positions = torch.cat(list(val.columns("n_positions")))
    rows = []
    for part in split.channels:
        inputs = pooled[:, val.layer.group_of(part.channel)]
        new = part.pooled_responses(inputs, n_positions)
        for k, group in enumerate(classes.concepts[part.channel]):
            own = member[part.channel] == k
            at = next(i for i, other in enumerate(part.concepts) if set(group) <= set(other))
            if own.any():
                z, z_k = new[:, 0], new[:, at + 1]
                mimic = mimic_error(z, z_k, own)
                rows.append((r_precision(z_k, own), float(z_k[own].mean() / z[own].mean()), mimic))
    precision, retention, mimic = zip(*rows, strict=True)
    print(
        f"  {len(rows)} of classes on images of their classes: R-precision {fmean(precision):.3f},"
        f" retention {median(retention):.3f}, mimic {fmean(mimic):.3f}"
    )


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
    on_their_classes(val, whole_channels(train, val, whole, "whole channel"), classes)
    if arguments.clusters:
        agreement(train, classes, unbraid.find(train, concepts="clusters"))


if __name__ == "__main__":
    main()
