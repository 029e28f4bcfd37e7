"""Two pictures side by side, one of each concept: how much of a concept channel is on its own.

    python benchmarks/explain.py                                  # the demo's network and pictures
    python benchmarks/explain.py --photographs DIR --scans FOLDER # EfficientNet-Lite0

For every split channel and every two of its concepts, a picture of each is drawn, the two are put
side by side, and it is measured which part of the positive mass of a concept channel's map and of
its heatmap lies on the half of its own concept; beside it the same for the whole channel, for
which half is to be expected. Pictures are of the test set, which nothing was fitted to. DIR holds
train/ and val/ with class folders; a scan of train/ in FOLDER is used again. The demo needs nothing
but unbraid, photographs what `benchmarks/lite0.py` says. Prints Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import unbraid
from timing import print_head, print_row
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.measuring.explain import heatmap
from unbraid.splitting.splits import ChannelSplit
from unbraid.surgery.split_layer import SplitLayer

WAYS = ("map", "heatmap")
Parts = dict[tuple[str, bool], list[float]]  # by way, and whether of the concept channel alone


def part_on(values: Tensor, left: bool) -> float:
    """Part of the positive mass of values, (..., width), that is on the left or the right half."""
    positive = values.clamp(min=0)
    middle = positive.shape[-1] // 2
    own = positive[..., :middle] if left else positive[..., -middle:]
    both = positive[..., :middle].sum() + positive[..., -middle:].sum()
    return float(own.sum() / both) if both > 0 else float("nan")


def measure(
    model2: nn.Module, layer: SplitLayer, part: ChannelSplit, image: Tensor, concepts: list[int]
) -> Iterator[tuple[int, bool, str, float]]:
    """Concept, whether of it alone, way and part on its half, of an image (1, C, H, 2 W)."""
    leaf, seen = image.clone().requires_grad_(), []
    with (
        layer.concepts.register_forward_hook(lambda *args: seen.append(args[-1])),
        layer.register_forward_hook(lambda *args: seen.append(args[-1].clone())),
    ):
        model2(leaf)
    whole = seen[1][:, part.channel]
    of_whole = {"map": whole.detach(), "heatmap": heatmap([whole], leaf)}
    for place, concept in enumerate(concepts):
        own = seen[0][:, layer.names.index(f"{part.channel}.{concept}")]
        of_concept = {"map": own.detach(), "heatmap": heatmap([own], leaf)}
        for way in WAYS:
            for alone, values in ((True, of_concept), (False, of_whole)):
                yield concept, alone, way, part_on(values[way], left=place == 0)


def measure_all(
    model: nn.Module, split: unbraid.Split, images: Dataset[Any], n_pairs: int
) -> dict[str, Parts]:
    """Measure all channels; by concept channel, the parts of every pair."""
    model2 = unbraid.apply(model, split).requires_grad_(False)
    layer = model2.get_submodule(split.layer.name)
    labels = torch.tensor(images.targets)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Parts] = {}

    def draw(concept: tuple[int, ...]) -> Tensor:
        own = torch.isin(labels, torch.tensor(concept)).nonzero()[:, 0]
        chosen = int(own[torch.randint(len(own), (), generator=generator)])
        return images[chosen][0]

    for part in split.channels:
        for concepts in itertools.permutations(range(len(part.concepts)), 2):
            for _ in range(n_pairs):
                image = torch.cat([draw(part.concepts[k]) for k in concepts], -1)[None]
                for k, alone, way, value in measure(model2, layer, part, image, list(concepts)):
                    own = found.setdefault(f"{part.channel}.{k}", {})
                    own.setdefault((way, alone), []).append(value)
        print(f"channel {part.channel}", end="\r", flush=True)
    return found


def known(values: list[float]) -> list[float]:
    """Leave out what was not measured."""
    return [value for value in values if value == value]


def mean(values: list[float]) -> float:
    """Mean of what was measured."""
    return sum(known(values)) / max(1, len(known(values)))


def summarise(found: dict[str, Parts], way: str) -> list[str]:
    """Cells of a row: means over all, range of concept channels' means, how many are above."""
    alone, whole = (
        [value for own in found.values() for value in own[way, kind]] for kind in (True, False)
    )
    by_channel = sorted(mean(own[way, True]) for own in found.values())
    above = sum(value >= 0.8 for value in by_channel)
    return [
        f"{mean(alone):.1%}",
        f"{mean(whole):.1%}",
        f"{by_channel[0]:.1%} to {by_channel[-1]:.1%}",
        f"{above} of {len(by_channel)}",
        f"{len(alone) - len(known(alone))} of {len(alone)}",
    ]


def load(folder: Path | None, scans: Path) -> tuple[nn.Module, unbraid.Split, Dataset[Any]]:
    """A network, its split by training images, and test images."""
    if folder is None:
        model, layer, tau = load_network(), LAYER, 0.03
        train, test = load_images("train"), load_images("test")
    else:
        from torchvision.transforms import v2

        from lite0 import LAYER as LITE0_LAYER
        from lite0 import load_lite0

        model, layer, tau = load_lite0(), LITE0_LAYER, "auto"
        bicubic = v2.InterpolationMode.BICUBIC
        steps = [v2.PILToTensor(), v2.Resize((224, 224), interpolation=bicubic, antialias=True)]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.498] * 3, [0.502] * 3)]
        preprocess = v2.Compose(steps)
        train = unbraid.open_images(folder / "train", preprocess, outputs=1000)
        test = unbraid.open_images(folder / "val", preprocess, outputs=1000)
    if (scans / "manifest.json").exists():
        scan = unbraid.open_scan(scans)
    else:
        scan = unbraid.scan(model, layer, train, scans, progress=True)
    return model, unbraid.split(scan, unbraid.find(scan, tau=tau)), test


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, help="folder with train/ and val/")
    parser.add_argument("--scans", type=Path, help="a scan of train/ that is there, or is to be")
    parser.add_argument(
        "--pairs", type=int, default=16, help="of every two concepts, each way round"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, split, images = load(options.photographs, options.scans or Path(folder))
    found = measure_all(model, split, images, options.pairs)
    n_channels = len(split.channels)
    print(f"{split.layer.name}: {n_channels} channels, {len(found)} concept channels.\n")
    heads = ["", "concept channel on its own half", "whole channel on the same half"]
    heads += ["concept channels", "with 80 % or more", "without positive mass"]
    print_head(*heads)
    for way in WAYS:
        print_row(way, *summarise(found, way))


if __name__ == "__main__":
    main()
