"""How time and memory grow: scans of ever more images and channels, and an ImageNet-sized Scan.

    python benchmarks/growth.py scan          # 1k, 10k, 100k small images; 64 to 2048 channels
    python benchmarks/growth.py imagenet DIR  # find, split, evaluate on 1.28 million records

Each measurement runs in a process of its own, which tells its seconds, wall and processor, and the
most memory it held. Small scans are set beside plain inference over the same images, since tensors
that no cache holds slow down the network itself. The ImageNet-sized Scan is synthetic, as large as
ResNet-50's last bottleneck would leave: 512 inputs, 2048 channels, 1000 classes with causes of
their own, in the order of ImageNet's folders. It takes 3 GB in DIR and is made where it is not
there yet.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import unbraid
from find import write_scan
from machine import describe_machine

SIZE, BATCH = 16, 256
N_TRAIN, N_VAL, N_USED = 1_281_167, 50_000, 3
GAMMA = 0.8  # causes are drawn evenly between 0 and 1, so that cosines are about 0.75


class Noise(Dataset[tuple[Tensor, int]]):
    """Small pictures made on the fly."""

    def __init__(self, n_images: int) -> None:
        """Have so many."""
        self.targets = [n % 10 for n in range(n_images)]

    def __len__(self) -> int:
        """Count them."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Make one."""
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, SIZE, SIZE, generator=generator), self.targets[index]


def small_network(n_channels: int) -> nn.Module:
    """A network whose layer has so many channels."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=4),
        nn.ReLU(),
        nn.Conv2d(64, n_channels, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(n_channels, 10),
    ).eval()


def scan(n_images: int, n_channels: int) -> None:
    """Scan so many images at a layer of so many channels."""
    with tempfile.TemporaryDirectory() as folder:
        unbraid.scan(small_network(n_channels), "2", Noise(n_images), folder, batch_size=BATCH)


def infer(n_images: int, n_channels: int) -> None:
    """Plain inference on the same."""
    network = small_network(n_channels)
    with torch.inference_mode():
        for images, _ in DataLoader(Noise(n_images), batch_size=BATCH):
            network(images)


def find(folder: Path) -> None:
    """Find channels in the large Scan."""
    found = unbraid.find(unbraid.open_scan(folder / "train"), gamma=GAMMA)
    print(f"{len(found)} pairs in {len(found.concepts)} channels", file=sys.stderr)


def split(folder: Path) -> None:
    """Find and split."""
    opened = unbraid.open_scan(folder / "train")
    divided = unbraid.split(opened, unbraid.find(opened, gamma=GAMMA))
    divided.save(folder / "split.safetensors")


def evaluate(folder: Path) -> None:
    """Evaluate on as many images as ImageNet has for validation."""
    divided = unbraid.Split.load(folder / "split.safetensors")
    result = unbraid.evaluate(divided, unbraid.open_scan(folder / "val"))
    print(result.summary, file=sys.stderr)


STEPS: dict[str, Callable[[Path], None]] = {"find": find, "split": split, "evaluate": evaluate}


SMALL: dict[str, Callable[[int, int], None]] = {"scan": scan, "infer": infer}


def measure(*arguments: str) -> tuple[float, float, float]:
    """Run this file for one measurement: seconds of wall and processor, and GiB at most."""
    command = [sys.executable, __file__, "one", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall, cpu, memory = json.loads(output)
    return wall, cpu, memory


def one(arguments: list[str]) -> None:
    """Take one measurement, in this process."""
    start, start_cpu = time.perf_counter(), time.process_time()
    what, *rest = arguments
    if what in SMALL:
        SMALL[what](int(rest[0]), int(rest[1]))
    else:
        STEPS[what](Path(rest[0]))
    taken = time.perf_counter() - start, time.process_time() - start_cpu
    status = Path("/proc/self/status").read_text()
    print(json.dumps([*taken, int(status.split("VmHWM:")[1].split()[0]) / 2**20]))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("scan", "imagenet", "one"))
    parser.add_argument("rest", nargs="*", help="for imagenet: the folder of the Scan")
    options = parser.parse_args()
    if options.what == "one":
        one(options.rest)
        return
    print(f"Machine: {describe_machine()}\n")
    if options.what == "scan":
        print(
            "| images | channels | s | processor s | plain inference, processor s | peak memory |"
        )
        print("| --- | --- | --- | --- | --- | --- |")
        sizes = [(n, 64) for n in (1_000, 10_000, 100_000)]
        sizes += [(10_000, channels) for channels in (256, 1024, 2048)]
        for n_images, n_channels in sizes:
            wall, cpu, memory = measure("scan", str(n_images), str(n_channels))
            _, plain, _ = measure("infer", str(n_images), str(n_channels))
            line = f"| {n_images} | {n_channels} | {wall:.1f} | {cpu:.1f} | {plain:.1f}"
            print(f"{line} | {memory:.2f} GiB |", flush=True)
        return
    folder = Path(options.rest[0])
    for name, n_images in (("train", N_TRAIN), ("val", N_VAL)):
        if not (folder / name / "manifest.json").exists():
            write_scan(folder / name, n_images, N_USED, in_order=True)
    print("| step | s | processor s | peak memory |")
    print("| --- | --- | --- | --- |")
    for name in STEPS:
        wall, cpu, memory = measure(name, str(folder))
        print(f"| {name} | {wall:.0f} | {cpu:.0f} | {memory:.2f} GiB |", flush=True)


if __name__ == "__main__":
    main()
