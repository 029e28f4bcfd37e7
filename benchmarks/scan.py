"""What a scan costs beside bare inference and the published per-image step.

    python benchmarks/scan.py

ResNet-50 with random weights, layer4.2.conv3, also with two earlier layers, random images. All run
in turn, round by round, over the same images, so that a drift of the machine's speed hits all; the
ratios are taken within a round and the median is reported, of wall time and of processor time,
which neighbours disturb less. Peak memory is measured in a process of its own for each.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
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
LAYERS = ["layer4.0.conv3", "layer4.1.conv3", LAYER]
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


def three_layers(model: nn.Module, images: RandomImages, folder: Path) -> None:
    """The same for three layers at once."""
    unbraid.scan(model, LAYERS, images, folder / "scan", batch_size=BATCH)


def published(model: nn.Module, images: RandomImages, _: Path) -> None:
    """The published step: the graph goes all the way down to the image."""
    layer = model.get_submodule(LAYER)
    for batch, labels in DataLoader(images, batch_size=BATCH):
        published_image_step(model, layer, batch, labels)


WAYS = {"bare": bare, "scan": scan, "three layers": three_layers, "published": published}


def seconds(way: str, model: nn.Module, images: RandomImages) -> tuple[float, float, int]:
    """Time one way once: wall time, processor time, and the bytes that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        start, start_cpu = time.perf_counter(), time.process_time()
        WAYS[way](model, images, Path(folder))
        elapsed, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        return elapsed, cpu, sum(f.stat().st_size for f in Path(folder).rglob("shard-*"))


def spread(taken: list[float], base: list[float]) -> str:
    """Ratios round by round: median, and from least to most."""
    ratios = [t / b for t, b in zip(taken, base, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def peak_memory(way: str) -> float:
    """Peak resident memory of a process that does one way over two batches, in GiB (Linux)."""
    command = [sys.executable, __file__, "--only", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = network()
    if options.only:
        seconds(options.only, model, RandomImages(2 * BATCH))
        status = Path("/proc/self/status").read_text()  # getrusage would count the parent's too
        print(int(status.split("VmHWM:")[1].split()[0]) / 2**20)
        return
    images = RandomImages(options.images)
    seconds("bare", model, images)  # warm up
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu_times: dict[str, list[float]] = {way: [] for way in WAYS}
    n_bytes = 0
    for number in range(options.rounds):
        order = list(WAYS) if number % 2 == 0 else list(reversed(WAYS))
        for way in order:
            elapsed, cpu, written = seconds(way, model, images)
            times[way].append(elapsed)
            cpu_times[way].append(cpu)
            n_bytes = written if way == "scan" else n_bytes
        line = ", ".join(f"{way} {taken[-1]:.2f} s" for way, taken in times.items())
        print(f"round {number + 1}: {line}", flush=True)
    print(f"\nMachine: {describe_machine()}")
    print(f"{options.images} images, batches of {BATCH}, {options.rounds} rounds\n")
    print("| way | s per batch | wall time to bare's | processor time to bare's | peak memory |")
    print("| --- | --- | --- | --- | --- |")
    for way, taken in times.items():
        per_batch = statistics.median(taken) * BATCH / options.images
        spreads = " | ".join(spread(t[way], t["bare"]) for t in (times, cpu_times))
        print(f"| {way} | {per_batch:.2f} | {spreads} | {peak_memory(way):.2f} GiB |")
    print(f"\nBytes written per image by the scan: {n_bytes / options.images:.0f}")


if __name__ == "__main__":
    main()
