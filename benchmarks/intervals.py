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
from unbraid.base.files import write_tensors, write_whole
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.finding.arv import class_cosines, class_sums, cosines_of
from unbraid.finding.cosine_intervals import N_REPLICATES
from unbraid.networks.spec import LayerSpec
from unbraid.scanning.manifest import Manifest
from unbraid.scanning.records import Records, Scan, open_scan, write_shard

N_PAIRS, N_TAPS, N_DRAWS = 400, 64, 6
TAILS = torch.tensor([0.025, 0.975])

Ends = tuple[Tensor, Tensor]


def write_scan(folder: Path, pooled: Tensor, weight: Tensor) -> Scan:
    """Write a scan of n images of each class, pooled (n, T, J), at weights (C_out, J)."""
    n, n_classes, n_taps = pooled.shape
    one, none = (1,), ((0, 0),)
    manifest = Manifest(
        weights="synthetic",
        layer=LayerSpec("layer", "Linear", len(weight), n_taps, one, one, none, one, 1, "", True),
        data="synthetic",
        n_images=n * n_classes,
        class_names=(),
        preprocessing="",
        dtype="float32",
        min_share=0.005,
        classes=None,
        positions=False,
        shard_size=n * n_classes,
        batch_size=1,
        skip_broken=False,
        source={},
        versions={},
    )
    index = torch.arange(n * n_classes)
    records = Records(
        index=index,
        label=index % n_classes,
        prediction=index % n_classes,
        n_positions=torch.ones_like(index),
        pooled=pooled.flatten(0, 1)[:, None],
        share_start=torch.zeros(len(index) + 1, dtype=torch.int64),
        share_channel=torch.zeros(0, dtype=torch.int32),
        share_value=torch.zeros(0),
        broken=torch.zeros(0, dtype=torch.int64),
    )
    write_shard(folder, 0, records)
    write_tensors(
        folder / "layer.safetensors", {"weight": weight, "bias": torch.zeros(len(weight))}, {}
    )
    write_whole(folder / "manifest.json", manifest.to_json().encode())
    return open_scan(folder)


def ours(pooled: Tensor, weight: Tensor, concepts: dict[int, list[list[int]]]) -> dict:
    """Give the intervals of `find` by channel and classes."""
    with tempfile.TemporaryDirectory() as name:
        pairs = unbraid.find(write_scan(Path(name), pooled, weight), channels=concepts).pairs
    return {(p.channel, p.class1, p.class2): (p.low, p.high) for p in pairs}


def plain(arvs: Tensor) -> tuple[Ends, Ends]:
    """Percentile and basic intervals of the bootstrap, from relevance (pairs, 2, n, J)."""
    cosine = cosines_of(arvs.mean(2))[:, 0, 1]
    weights = torch.empty(*arvs.shape[:2], N_REPLICATES, arvs.shape[2]).exponential_()
    replicates = weights @ arvs / weights.sum(3, keepdim=True)  # (pairs, 2, R, J)
    low, high = cosines_of(replicates.transpose(1, 2))[..., 0, 1].quantile(TAILS, dim=1)
    return (low, high), (2 * cosine - high, 2 * cosine - low)


def held(ends: Ends, truth: Tensor | float) -> str:
    """Write how often intervals hold the truth, as a percentage."""
    low, high = ends
    return f"{100 * float(((low <= truth) & (truth <= high)).double().mean()):.0f}"


def drawn(cosine: float, n: int, noise: float) -> list[str]:
    """Count on drawn images: percentile, basic, ours, and our mean width."""
    one, other = torch.randn(2, N_PAIRS, N_TAPS)
    one /= one.norm(dim=1, keepdim=True)
    other -= (one * other).sum(1, keepdim=True) * one
    other = cosine * one + math.sqrt(1 - cosine**2) * other / other.norm(dim=1, keepdim=True)
    causes = torch.stack([one, other], 1).flatten(0, 1)  # (2 * pairs, J)
    spread = math.sqrt(math.log(1 + noise**2))
    pooled = causes * (spread * torch.randn(n, *causes.shape) - spread**2 / 2).exp()
    percentile, basic = plain(pooled.unflatten(1, (N_PAIRS, 2)).permute(1, 2, 0, 3))
    concepts = {o: [[2 * o], [2 * o + 1]] for o in range(N_PAIRS)}
    ends = torch.tensor(list(ours(pooled, torch.ones(N_PAIRS, N_TAPS), concepts).values())).T
    kinds = [held(kind, cosine) for kind in (percentile, basic, (ends[0], ends[1]))]
    return [*kinds, f"{float((ends[1] - ends[0]).mean()):.2f}"]


def sampled(scan: Scan, images: Tensor, n: int) -> list[str]:
    """Count on n of the images (500, T, J) of each class, all pairs of classes at all channels."""
    n_classes, n_out = images.shape[1], len(scan.weight)
    sums = class_sums(scan, [])
    every = list(range(n_classes))
    truth = torch.stack([class_cosines(scan, sums, o, every) for o in range(n_out)])
    keys = [(o, s, t) for o in range(n_out) for s in every for t in every[s + 1 :]]
    concepts = {o: [[c] for c in every] for o in range(n_out)}
    found: list[list[Ends]] = [[], [], []]
    for _ in range(N_DRAWS):
        chosen = torch.stack([torch.randperm(len(images))[:n] for _ in every], 1)  # (n, T)
        pooled = images[chosen, torch.arange(n_classes)]
        answer = ours(pooled, scan.weight, concepts)
        found[2].append(tuple(torch.tensor([answer[key] for key in keys]).T))
        arvs = torch.stack([pooled[:, [s, t]] * scan.weight[o] for o, s, t in keys])
        for kind, ends in zip(found, plain(arvs.transpose(1, 2)), strict=False):
            kind.append(ends)
    target = torch.stack([truth[key] for key in keys]).repeat(N_DRAWS)
    joined = [(torch.cat([e[0] for e in kind]), torch.cat([e[1] for e in kind])) for kind in found]
    width = float((joined[2][1] - joined[2][0]).mean())
    return [*(held(ends, target) for ends in joined), f"{width:.2f}"]


def main() -> None:
    """Count and print two tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(0)
    print("| cosine | images | noise | percentile | basic | unbraid | width |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for cosine in (0.45, 0.9, 1.0):
        for n in (2, 5, 20, 100):
            for noise in (0.5, 2.0):
                row = [f"{cosine:g}", str(n), f"{noise:g}", *drawn(cosine, n, noise)]
                print(f"| {' | '.join(row)} |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        scan = unbraid.scan(load_network(), LAYER, load_images("train"), name, batch_size=250)
        records = list(scan.shards())
        label = torch.cat([r.label for r in records])
        pooled = torch.cat([r.pooled for r in records])[:, 0]
        images = torch.stack([pooled[label == c] for c in label.unique()], 1)
        print("\n| images | percentile | basic | unbraid | width |")
        print("| --- | --- | --- | --- | --- |")
        for n in (2, 3, 6, 12, 50):
            print(f"| {' | '.join([str(n), *sampled(scan, images, n)])} |", flush=True)


if __name__ == "__main__":
    main()
