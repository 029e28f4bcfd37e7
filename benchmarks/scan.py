"""What a scan costs beside bare inference and the published per-image step.

    python benchmarks/scan.py

ResNet-50 with random weights, layer4.2.conv3, random images. The three run in turn, round by round,
over the same images, so that a drift of the machine's speed hits all; the ratios are taken within a
round and the median is reported. Peak memory is measured in a process of its own for each.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import unbraid
from machine import describe_machine
from published import published_image_step

LAYER = "layer4.2.conv3"
BATCH = 32


class RandomImages(Dataset[tuple[Tensor, int]]):
    """Images kept in memory, so that loading costs nothing in any of the three."""

    def __init__(self, n_images: int) -> None:
        """Draw the images."""
        self.images = torch.randn(n_images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        self.targets = [n % 1000 for n in range(n_images)]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image with its label."""
        return self.images[index], self.targets[index]


def network() -> nn.Module:
    """Build the network that all three run."""
    torch.manual_seed(0)
    return torchvision.models.resnet50().eval()


def bare(model: nn.Module, images: RandomImages, _: Path) -> None:
    """Plain inference over the images."""
    with torch.inference_mode():
        for batch, _labels in DataLoader(images, batch_size=BATCH):
            model(batch)


def scan(model: nn.Module, images: RandomImages, folder: Path) -> None:
    """The whole of unbraid's pass: hashing, reading back and writing included."""
    unbraid.scan(model, LAYER, images, folder / "scan", batch_size=BATCH)


def published(model: nn.Module, images: RandomImages, _: Path) -> None:
    """The published step: the graph goes all the way down to the image."""
    layer = model.get_submodule(LAYER)
    for batch, labels in DataLoader(images, batch_size=BATCH):
        published_image_step(model, layer, batch, labels)


WAYS = {"bare": bare, "scan": scan, "published": published}


def seconds(way: str, model: nn.Module, images: RandomImages) -> tuple[float, int]:
    """Time one way once; also the bytes that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        WAYS[way](model, images, Path(folder))
        elapsed = time.perf_counter() - start
        return elapsed, sum(f.stat().st_size for f in Path(folder).rglob("shard-*"))


def peak_memory(way: str) -> float:
    """Peak resident memory of a process that does one way over two batches, in GiB."""
    command = [sys.executable, __file__, "--only", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = network()
    if options.only:
        seconds(options.only, model, RandomImages(2 * BATCH))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    images = RandomImages(options.images)
    seconds("bare", model, images)  # warm up
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    n_bytes = 0
    for number in range(options.rounds):
        order = list(WAYS) if number % 2 == 0 else list(reversed(WAYS))
        for way in order:
            elapsed, written = seconds(way, model, images)
            times[way].append(elapsed)
            n_bytes = max(n_bytes, written)
        print(f"round {number + 1}: " + ", ".join(f"{w} {t[-1]:.2f} s" for w, t in times.items()))
    print(f"\nMachine: {describe_machine()}")
    print(f"{options.images} images, batches of {BATCH}, {options.rounds} rounds\n")
    print("| way | s per batch, median | ratio to bare, median (min to max) | peak memory |")
    print("| --- | --- | --- | --- |")
    for way, taken in times.items():
        ratios = [t / b for t, b in zip(taken, times["bare"], strict=True)]
        per_batch = statistics.median(taken) * BATCH / options.images
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {way} | {per_batch:.2f} | {spread} | {peak_memory(way):.2f} GiB |")
    print(f"\nBytes written per image by the scan: {n_bytes / options.images:.0f}")


if __name__ == "__main__":
    main()
