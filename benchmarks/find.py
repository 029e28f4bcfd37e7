"""How long `find` and `sensitivity` take on a layer of ResNet-50's size with a thousand classes.

    python benchmarks/find.py

A synthetic scan: 2048 channels, 512 inputs, 1000 classes, 20 images of each; every class uses 30
channels, so that every channel is shared by about 15 classes. Records are read from disk. With
gamma 0.5 nothing is found; with 0.9 nearly all is, and every pair gets its interval.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

import unbraid
from machine import describe_machine
from unbraid.base.files import write_tensors, write_whole
from unbraid.finding.thresholds import choose_tau
from unbraid.networks.spec import LayerSpec
from unbraid.scanning.manifest import Manifest
from unbraid.scanning.records import Records, write_shard

N_CHANNELS, N_INPUTS, N_CLASSES, N_IMAGES, N_USED, SHARD = 2048, 512, 1000, 20_480, 30, 1024


def write_scan(
    folder: Path, n_images: int = N_IMAGES, n_used: int = N_USED, in_order: bool = False
) -> None:
    """Write a scan whose classes have causes of their own.

    Args:
        folder: for it.
        n_images: images, as many of each class.
        n_used: channels that a class uses.
        in_order: whether images are sorted by class, as in folders.
    """
    generator = torch.Generator().manual_seed(1)
    one, none = (1, 1), ((0, 0), (0, 0))
    layer = LayerSpec(
        "layer", "Conv2d", N_CHANNELS, N_INPUTS, one, one, none, one, 1, "zeros", False
    )
    manifest = Manifest(
        weights="synthetic",
        layer=layer,
        data="synthetic",
        n_images=n_images,
        class_names=tuple(map(str, range(N_CLASSES))),
        preprocessing="",
        dtype="float32",
        min_share=0.005,
        classes=None,
        positions=False,
        shard_size=SHARD,
        batch_size=64,
        skip_broken=False,
        source={},
        versions={},
    )
    # Causes and uses are the same for every scan written, images are not.
    weight = torch.randn(N_CHANNELS, N_INPUTS, generator=generator)
    write_tensors(
        folder / "layer.safetensors", {"weight": weight, "bias": torch.zeros(N_CHANNELS)}, {}
    )
    causes = torch.rand(N_CLASSES, 1, N_INPUTS, generator=generator)
    used = torch.stack(
        [torch.randperm(N_CHANNELS, generator=generator)[:n_used].sort().values for _ in causes]
    )
    for shard in range(manifest.n_shards):
        size = manifest.images_in(shard)
        index = torch.arange(shard * SHARD, shard * SHARD + size)
        label = index * N_CLASSES // n_images if in_order else index % N_CLASSES
        records = Records(
            index=index,
            label=label,
            prediction=label.clone(),
            n_positions=torch.full_like(index, 49),
            pooled=causes[label] * (0.75 + 0.5 * torch.rand(size, 1, N_INPUTS)),
            share_start=torch.arange(size + 1) * n_used,
            share_channel=used[label].flatten().int(),
            share_value=torch.linspace(1.68, 0.32, n_used).div(n_used).repeat(size),
            broken=torch.zeros(0, dtype=torch.int64),
        )
        write_shard(folder, shard, records)
    write_whole(folder / "manifest.json", manifest.to_json().encode())


def print_peak() -> None:
    """Print how much memory was held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory so far {peak:.2f} GiB")


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        write_scan(Path(name))
        scan = unbraid.open_scan(name)
        print(f"Machine: {describe_machine()}")
        for _ in range(3):
            start = time.perf_counter()
            tau, _ = choose_tau(scan)
            middle = time.perf_counter()
            counted = unbraid.sensitivity(scan)
            elapsed = time.perf_counter() - middle
            print(f"tau {tau:g} (auto): {middle - start:.1f} s")
            print(f"sensitivity, {len(counted.cells)} choices: {elapsed:.1f} s")
        print_peak()
        for gamma in (0.5, 0.9, 0.5, 0.9):
            start = time.perf_counter()
            found = unbraid.find(scan, tau=0.01, gamma=gamma)
            elapsed = time.perf_counter() - start
            counts = f"{len(found)} pairs in {len(found.concepts)} channels"
            print(f"gamma {gamma}: {elapsed:.1f} s, {counts}")
        print_peak()


if __name__ == "__main__":
    main()
