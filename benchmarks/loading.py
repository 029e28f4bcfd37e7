"""What a scan costs end to end, JPEG files included, beside plain inference over the same loader.

    python benchmarks/loading.py [--workers 1] [--network resnet18] [--profile]

JPEG pictures of 256 x 256 pixels are drawn and kept in a folder; both ways read them with the same
data set, the same preprocessing, batch size and number of workers, in turn, round by round. The
ratio of images per second is taken within a round; its median is reported.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import unbraid
from machine import describe_machine
from unbraid.folders import ImageFolder
from unbraid.models import imagenet_transform

LAYERS = {"resnet18": "layer4.1.conv2", "resnet50": "layer4.2.conv3"}
BATCH = 32


def draw_pictures(folder: Path, n_images: int) -> None:
    """Draw JPEG pictures with something to decode: smooth colours and some grain."""
    random = np.random.default_rng(0)
    for n in range(n_images):
        coarse = random.integers(0, 255, (9, 9, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC))
        grain = random.normal(0, 12, smooth.shape)
        path = folder / str(n % 10) / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def plain(model: nn.Module, images: ImageFolder, workers: int) -> None:
    """Inference and nothing else."""
    with torch.inference_mode():
        for batch, _ in DataLoader(images, batch_size=BATCH, num_workers=workers):
            model(batch)


def scan(model: nn.Module, images: ImageFolder, workers: int, layer: str) -> None:
    """A whole scan."""
    with tempfile.TemporaryDirectory() as out:
        unbraid.scan(model, layer, images, out, batch_size=BATCH, workers=workers)


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
        images = ImageFolder(folder, imagenet_transform())
        if options.profile:
            with cProfile.Profile() as profile:
                scan(model, images, options.workers, layer)
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)
            return
        ratios, rates = [], []
        for number in range(options.rounds):
            ways = {
                "plain": lambda: plain(model, images, options.workers),
                "scan": lambda: scan(model, images, options.workers, layer),
            }
            taken = {}
            for way in sorted(ways, reverse=number % 2 == 1):
                start = time.perf_counter()
                ways[way]()
                taken[way] = time.perf_counter() - start
            ratios.append(taken["plain"] / taken["scan"])
            rates.append(options.images / taken["scan"])
            print(f"round {number + 1}: {taken}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"\nMachine: {describe_machine()}")
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    print(f"{options.network}, {options.images} JPEG files, {options.workers} workers:")
    print(f"scan {statistics.median(rates):.1f} images/s, {spread} of plain inference's")


if __name__ == "__main__":
    main()
