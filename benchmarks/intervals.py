"""How often intervals of cosines hold the truth, beside plainer kinds of intervals.

    python benchmarks/intervals.py

First on drawn images: pairs of classes whose causes have a known cosine, 64 taps, each image's taps
multiplied by skewed noise. Then on real ones: few of the 500 images of each class of the demo's
training images, the cosines of all 500 taken as the truth. Every kind works on the same images.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import unbraid
from synthetic import pointwise, write_scan
from timing import print_head, print_row
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.finding.arv import class_cosines, class_sums, cosines_of
from unbraid.finding.cosine_intervals import N_REPLICATES
from unbraid.scanning.records import Scan

N_PAIRS, N_TAPS, N_DRAWS = 400, 64, 6
TAILS = torch.tensor([0.025, 0.975])
KINDS = ("percentile", "basic", "unbraid")

Ends = tuple[Tensor, Tensor]


def ours(pooled: Tensor, weight: Tensor, concepts: dict[int, list[list[int]]]) -> dict:
    """Intervals of `find` by channel and classes, of images (n, T, J) at weights (C_out, J)."""
    n, n_classes, n_taps = pooled.shape
    shards = iter(pooled.flatten(0, 1).split(1024))
    labels = torch.arange(n_classes).repeat(n)
    with tempfile.TemporaryDirectory() as name:
        layer = pointwise(len(weight), n_taps)
        scan = write_scan(Path(name), layer, weight, labels, lambda _: next(shards))
        pairs = unbraid.find(scan, channels=concepts).pairs
    return {(p.channel, p.class1, p.class2): (p.low, p.high) for p in pairs}


def plain(arvs: Tensor) -> tuple[Ends, Ends]:
    """Percentile and basic intervals of the bootstrap, from relevance (pairs, 2, n, J)."""
    cosine = cosines_of(arvs.mean(2))[:, 0, 1]
    weights = torch.empty(*arvs.shape[:2], N_REPLICATES, arvs.shape[2]).exponential_()
    replicates = weights @ arvs / weights.sum(3, keepdim=True)  # (pairs, 2, R, J)
    low, high = cosines_of(replicates.transpose(1, 2))[..., 0, 1].quantile(TAILS, dim=1)
    return (low, high), (2 * cosine - high, 2 * cosine - low)


def cells(kinds: tuple[Ends, ...], truth: Tensor | float) -> list[str]:
    """How often each kind of interval holds the truth, in per cent, and our mean width."""
    held = [
        f"{100 * float(((low <= truth) & (truth <= high)).double().mean()):.0f}"
        for low, high in kinds
    ]
    return [*held, f"{float((kinds[-1][1] - kinds[-1][0]).mean()):.2f}"]


def drawn(cosine: float, n: int, noise: float) -> list[str]:
    """Count on drawn images."""
    one, other = torch.randn(2, N_PAIRS, N_TAPS)
    one /= one.norm(dim=1, keepdim=True)
    other -= (one * other).sum(1, keepdim=True) * one
    other = cosine * one + math.sqrt(1 - cosine**2) * other / other.norm(dim=1, keepdim=True)
    causes = torch.stack([one, other], 1).flatten(0, 1)  # (2 * pairs, J)
    spread = math.sqrt(math.log(1 + noise**2))
    pooled = causes * (spread * torch.randn(n, *causes.shape) - spread**2 / 2).exp()
    concepts = {o: [[2 * o], [2 * o + 1]] for o in range(N_PAIRS)}
    low, high = torch.tensor(list(ours(pooled, torch.ones(N_PAIRS, N_TAPS), concepts).values())).T
    arvs = pooled.unflatten(1, (N_PAIRS, 2)).permute(1, 2, 0, 3)
    return cells((*plain(arvs), (low, high)), cosine)


def sampled(scan: Scan, images: Tensor, n: int) -> list[str]:
    """Count on n of the images (500, T, J) of each class, all pairs of classes at all channels."""
    every, n_out = list(range(images.shape[1])), len(scan.weight)
    sums = class_sums(scan, [])
    truth = torch.stack([class_cosines(scan, sums, o, every) for o in range(n_out)])
    keys = [(o, s, t) for o in range(n_out) for s in every for t in every[s + 1 :]]
    concepts = {o: [[c] for c in every] for o in range(n_out)}
    draws: list[list[Tensor]] = []
    for _ in range(N_DRAWS):
        chosen = torch.stack([torch.randperm(len(images))[:n] for _ in every], 1)  # (n, T)
        pooled = images[chosen, torch.arange(len(every))]
        found = ours(pooled, scan.weight, concepts)
        own = torch.tensor([found[key] for key in keys]).T
        arvs = torch.stack([pooled[:, [s, t]] * scan.weight[o] for o, s, t in keys])
        draws.append([torch.stack(ends) for ends in (*plain(arvs.transpose(1, 2)), tuple(own))])
    joined = [torch.cat(kind, 1) for kind in zip(*draws, strict=True)]
    target = torch.stack([truth[key] for key in keys]).repeat(N_DRAWS)
    return cells(tuple((low, high) for low, high in joined), target)


def main() -> None:
    """Count and print two tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(0)
    print_head("cosine", "images", "noise", *KINDS, "width")
    for cosine in (0.45, 0.9, 1.0):
        for n in (2, 5, 20, 100):
            for noise in (0.5, 2.0):
                print_row(f"{cosine:g}", n, f"{noise:g}", *drawn(cosine, n, noise))
    with tempfile.TemporaryDirectory() as name:
        scan = unbraid.scan(load_network(), LAYER, load_images("train"), name, batch_size=250)
        records = list(scan.shards())
        label = torch.cat([r.label for r in records])
        pooled = torch.cat([r.pooled for r in records])[:, 0]
        images = torch.stack([pooled[label == c] for c in label.unique()], 1)
        print_head("images", *KINDS, "width")
        for n in (2, 3, 6, 12, 50):
            print_row(n, *sampled(scan, images, n))


if __name__ == "__main__":
    main()
