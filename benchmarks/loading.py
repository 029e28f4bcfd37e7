"""What a scan costs end to end, JPEG files included, beside plain inference over the same loader.

    python benchmarks/loading.py [--workers 1] [--network resnet18] [--profile]

JPEG pictures of 500 x 375 pixels and about 110 kB, as ImageNet's are on average, are drawn and kept
in a folder. Reading alone, plain inference and a scan take turns, round by round, with the same
data set, preprocessing, batch size and number of workers. Ratios of images per second are taken
within a round and their medians reported, of wall time and of processor time, workers included.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import unbraid
from machine import describe_machine
from unbraid.images.listing import ListedImages
from unbraid.images.open import open_images
from unbraid.networks.models import imagenet_transform

LAYERS = {"resnet18": "layer4.1.conv2", "resnet50": "layer4.2.conv3"}
BATCH = 32
GRAIN = 25  # of 255; with it files are as large as those of ImageNet


def draw_pictures(folder: Path, n_images: int) -> None:
    """Draw JPEG pictures with something to decode: smooth colours and some grain."""
    random = np.random.default_rng(0)
    for n in range(n_images):
        coarse = random.integers(0, 255, (9, 9, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC))
        grain = random.normal(0, GRAIN, smooth.shape)
        path = folder / str(n % 10) / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def reading(images: ListedImages, workers: int) -> None:
    """Read and preprocess, and nothing else."""
    for _ in DataLoader(images, batch_size=BATCH, num_workers=workers):
        pass


def plain(model: nn.Module, images: ListedImages, workers: int) -> None:
    """Inference and nothing else."""
    with torch.inference_mode():
        for batch, _ in DataLoader(images, batch_size=BATCH, num_workers=workers):
            model(batch)


def scan(model: nn.Module, images: ListedImages, workers: int, layer: str) -> None:
    """A whole scan."""
    with tempfile.TemporaryDirectory() as out:
        unbraid.scan(model, layer, images, out, batch_size=BATCH, workers=workers)


def seconds(way: Callable[[], None]) -> tuple[float, float]:
    """Time one way once: wall time, and processor time, with that of workers."""
    start, before = time.perf_counter(), os.times()
    way()
    elapsed, after = time.perf_counter() - start, os.times()
    return elapsed, sum(after[:4]) - sum(before[:4])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=LAYERS, default="resnet18")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="say where a scan's time goes")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.network).eval()
    layer = LAYERS[options.network]
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder), options.images)
        images = open_images(folder, imagenet_transform())
        if options.profile:
            with cProfile.Profile() as profile:
                scan(model, images, options.workers, layer)
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)
            return
        mean = sum(path.stat().st_size for path in Path(folder).rglob("*.jpg")) / options.images
        ways = {
            "reading": lambda: reading(images, options.workers),
            "plain inference": lambda: plain(model, images, options.workers),
            "scan": lambda: scan(model, images, options.workers, layer),
        }
        for way in ways.values():  # warm up
            way()
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(options.rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                taken[way].append(seconds(ways[way]))
            line = ", ".join(f"{way} {times[-1][0]:.2f} s" for way, times in taken.items())
            print(f"round {number + 1}: {line}", flush=True)
    print(f"\nMachine: {describe_machine()}")
    print(f"{options.network}, {options.images} JPEG files of {mean / 1e3:.0f} kB, ", end="")
    print(f"{options.workers} workers, {options.rounds} rounds\n")
    print("| way | images/s | speed to plain's, wall | speed to plain's, processor |")
    print("| --- | --- | --- | --- |")
    base = taken["plain inference"]
    for way, times in taken.items():
        rate = options.images / statistics.median(wall for wall, _ in times)
        speeds = [
            [b[kind] / t[kind] for t, b in zip(times, base, strict=True)] for kind in range(2)
        ]
        cells = " | ".join(
            f"{statistics.median(speed):.3f} ({min(speed):.3f} to {max(speed):.3f})"
            for speed in speeds
        )
        print(f"| {way} | {rate:.1f} | {cells} |")


if __name__ == "__main__":
    main()
