"""What number format, memory format and compiling do for plain inference, and for a scan.

    python benchmarks/formats.py

ResNet-50 with random weights, layer4.2.conv3, random images in memory. All ways run in turn, round
by round; ratios to plain inference in float32 are taken within a round, and their medians reported,
of wall time and of processor time. Compiling happens before the first round and its seconds are
told apart.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import unbraid
from machine import describe_machine
from scan import BATCH, LAYER, RandomImages, network, spread

Network = Callable[[Tensor], Tensor]


def infer(model: Network, images: RandomImages, *, autocast: bool = False) -> None:
    """Plain inference."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for batch in images.images.split(BATCH):
            model(batch)


def scan(model: nn.Module, images: RandomImages, **options: bool) -> None:
    """A whole scan."""
    with tempfile.TemporaryDirectory() as out:
        unbraid.scan(model, LAYER, images, out, batch_size=BATCH, **options)


def ways_of(model: nn.Module, images: RandomImages) -> dict[str, Callable[[], None]]:
    """Every way, ready to run."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    # Each in a copy of its own, so that what is compiled for one is not taken for another.
    compiled, compiled_last, compiled_bfloat16 = (
        torch.compile(copy.deepcopy(m), dynamic=False) for m in (model, last, last)
    )
    return {
        "inference": lambda: infer(model, images),
        "inference, channels last": lambda: infer(last, images),
        "inference, bfloat16": lambda: infer(model, images, autocast=True),
        "inference, bfloat16, channels last": lambda: infer(last, images, autocast=True),
        "inference, compiled": lambda: infer(compiled, images),
        "inference, compiled, channels last": lambda: infer(compiled_last, images),
        "inference, compiled, bfloat16, channels last": lambda: infer(
            compiled_bfloat16, images, autocast=True
        ),
        "scan": lambda: scan(model, images),
        "scan, channels last": lambda: scan(model, images, channels_last=True),
        "scan, bfloat16": lambda: scan(model, images, autocast=True),
        "scan, bfloat16, channels last": lambda: scan(
            model, images, autocast=True, channels_last=True
        ),
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    images = RandomImages(options.images)
    ways = ways_of(network(), images)
    for name, way in ways.items():
        start = time.perf_counter()
        way()
        print(f"first, {name}: {time.perf_counter() - start:.1f} s", flush=True)
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds):
        for name in ways if number % 2 == 0 else reversed(ways):
            start, start_cpu = time.perf_counter(), time.process_time()
            ways[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    print(f"\nMachine: {describe_machine()}")
    print(f"{options.images} images, batches of {BATCH}, {options.rounds} rounds\n")
    print("| way | images/s | wall time to inference's | processor time to inference's |")
    print("| --- | --- | --- | --- |")
    for name, taken in wall.items():
        spreads = " | ".join(spread(t[name], t["inference"]) for t in (wall, cpu))
        print(f"| {name} | {options.images / statistics.median(taken):.1f} | {spreads} |")


if __name__ == "__main__":
    main()
