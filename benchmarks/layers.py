"""What a scan of all layers costs, beside a scan of one and plain inference: time and memory.

Random images through EfficientNet-Lite0 or ResNet-50, each way in a process of its own, in turns;
processor seconds (not wall time, so that other work on the machine does not count), smallest of
several. `python benchmarks/layers.py --network lite0 --images 96`
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision import models

import unbraid

LAST = {"lite0": "_conv_head", "resnet50": "layer4.2.conv3"}
WAYS = ("plain", "one", "all")


class Noise(Dataset[tuple[torch.Tensor, int]]):
    """Images made when asked for, the same each time."""

    def __init__(self, n: int) -> None:
        """Label them in turns."""
        self.targets = [i % 10 for i in range(n)]

    def __len__(self) -> int:
        """How many."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """An image and its label."""
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 224, 224, generator=generator), self.targets[index]


def load(network: str) -> nn.Module:
    """Weights do not matter here, so ResNet-50 has random ones."""
    if network == "resnet50":
        torch.manual_seed(0)
        return models.resnet50().eval()
    from lite0 import load_lite0

    return load_lite0()


def measure(network: str, way: str, n: int) -> dict[str, float]:
    """Run one way, once; the first pass, over few images, warms up."""
    torch.set_num_threads(1)
    model, images = load(network), Noise(n)
    layer = {"one": [LAST[network]], "all": "all"}.get(way)
    for data in (Noise(4), images):
        begun = time.process_time()
        if layer is None:
            with torch.no_grad():
                for first in range(0, len(data), 8):
                    batch = range(first, min(first + 8, len(data)))
                    model(torch.stack([data[i][0] for i in batch]))
        else:
            with tempfile.TemporaryDirectory() as folder:
                unbraid.scan(model, layer, data, folder, labels="predicted", batch_size=8)
        seconds = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "GiB": peak}


def main() -> None:
    """Measure all ways in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=LAST, default="lite0")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="measure one way and print JSON")
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(measure(asked.network, asked.way, asked.images)))
        return
    seen: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(asked.rounds):
        for way, results in seen.items():
            words = [sys.executable, __file__, "--network", asked.network, "--way", way]
            words += ["--images", str(asked.images)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    least = {way: min(one["seconds"] for one in results) for way, results in seen.items()}
    for way, results in seen.items():
        peak = max(one["GiB"] for one in results)
        ratio = least[way] / least["plain"]
        print(f"{way:6} {least[way]:7.2f} s  {ratio:5.2f} x plain  {peak:.2f} GiB")


if __name__ == "__main__":
    main()
