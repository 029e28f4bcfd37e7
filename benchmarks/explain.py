"""Two pictures side by side, one of each concept: how much of a concept channel is on its own.

    python benchmarks/explain.py                                  # the demo's network and pictures
    python benchmarks/explain.py --photographs DIR --scans FOLDER # EfficientNet-Lite0
    python benchmarks/explain.py --others                         # other ways to make heatmaps too

For every split channel and every two of its concepts, a picture of each is drawn, the two are put
side by side, and it is measured which part of the positive mass of a concept channel's map and of
its heatmap lies on the half of its own concept; beside it the same for the whole channel, for
which half is to be expected. Pictures are of the test set, which nothing was fitted to. DIR holds
train/ and val/ with class folders; a scan of train/ in FOLDER is used again. The demo needs nothing
but unbraid, photographs what `benchmarks/lite0.py` says, other ways zennit: gradients of summed
responses, not weighted by them; gradients averaged over noisy copies (SmoothGrad); layer-wise
relevance propagation (EpsilonPlusFlat), on the plain form. Prints Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.functional import gaussian_blur

import unbraid
from timing import print_head, print_row
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.measuring.heatmap import heatmap

N_COPIES, NOISE = 8, 0.3  # of noisy copies, and how noisy they are
Parts = dict[tuple[str, bool], list[float]]  # by way, and whether of the concept channel alone


def part_on(values: Tensor, left: bool) -> float:
    """Part of the positive mass of values, (..., width), that is on the left or the right half."""
    positive = values.clamp(min=0)
    middle = positive.shape[-1] // 2
    own = positive[..., :middle] if left else positive[..., -middle:]
    both = positive[..., :middle].sum() + positive[..., -middle:].sum()
    return float(own.sum() / both) if both > 0 else float("nan")


Heatmaps = Callable[[nn.Module, str, Tensor, "Row"], dict[str, Tensor]]


@dataclass(frozen=True)
class Row:
    """A channel, or one of its concept channels."""

    channel: int
    concept: int | None  # None: the whole channel

    @property
    def name(self) -> str:
        """As layers name it."""
        return str(self.channel) if self.concept is None else f"{self.channel}.{self.concept}"


def responses(model2: nn.Module, name: str, images: Tensor, row: Row) -> Tensor:
    """Pre-activations of a row, (N, h, w)."""
    layer, seen = model2.get_submodule(name), []
    module = layer if row.concept is None else layer.concepts
    with module.register_forward_hook(lambda *args: seen.append(args[-1].clone())):
        model2(images)
    return seen[0][:, row.channel if row.concept is None else layer.names.index(row.name)]


def own_ways(model2: nn.Module, name: str, image: Tensor, row: Row) -> dict[str, Tensor]:
    """Map and heatmap as `unbraid.explain` makes them, of an image (1, C, H, W)."""
    leaf = image.clone().requires_grad_()
    values = responses(model2, name, leaf, row)
    return {"map": values.detach(), "heatmap": heatmap([values], leaf)}


def other_ways(model2: nn.Module, name: str, image: Tensor, row: Row) -> dict[str, Tensor]:
    """Heatmaps in other ways, smoothed alike."""
    leaf = image.clone().requires_grad_()
    (summed,) = torch.autograd.grad(responses(model2, name, leaf, row).sum(), leaf)
    copies = (image + NOISE * torch.randn(N_COPIES, *image.shape[1:])).requires_grad_()
    strength = responses(model2, name, copies, row).clamp(min=0).square().sum() / 2
    (noisy,) = torch.autograd.grad(strength, copies)
    spread = min(image.shape[2:]) / 28
    smooth = partial(gaussian_blur, kernel_size=2 * math.ceil(3 * spread) + 1, sigma=spread)
    return {
        "summed responses": smooth((image * summed).sum(1)),
        "noisy copies": smooth((image * noisy.mean(0)).sum(1)),
    }


def propagate(plain: nn.Module, name: str, image: Tensor, row: Row) -> dict[str, Tensor]:
    """Layer-wise relevance propagation from the positive responses of a row of the plain form."""
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import EpsilonPlusFlat

    layer, leaf, seen = plain.get_submodule(name), image.clone().requires_grad_(), []
    module = layer.merge if row.concept is None else layer.wide
    place = row.channel if row.concept is None else layer.names.index(row.name)
    composite = EpsilonPlusFlat(canonizers=[SequentialMergeBatchNorm()], zero_params="bias")
    with composite.context(plain) as ruled:
        with module.register_forward_hook(lambda *args: seen.append(args[-1])):
            ruled(leaf)
        start = torch.zeros_like(seen[0])
        start[:, place] = seen[0][:, place].detach().clamp(min=0)
        (relevance,) = torch.autograd.grad(seen[0], leaf, start)
    return {"zennit": relevance.detach().sum(1)}


def measure_all(
    split: unbraid.Split,
    images: Dataset[Any],
    n_pairs: int,
    ways: Sequence[tuple[Heatmaps, nn.Module]],
) -> dict[str, Parts]:
    """Measure all channels; by concept channel, the parts of every pair."""
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
                for way, network in ways:
                    whole = way(network, split.layer.name, image, Row(part.channel, None))
                    for place, k in enumerate(concepts):
                        row = Row(part.channel, k)
                        alone = way(network, split.layer.name, image, row)
                        own = found.setdefault(row.name, {})
                        for name in alone:
                            for kind, values in ((True, alone[name]), (False, whole[name])):
                                value = part_on(values, left=place == 0)
                                own.setdefault((name, kind), []).append(value)
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
    parser.add_argument("--others", action="store_true", help="other ways to make heatmaps too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, split, images = load(options.photographs, options.scans or Path(folder))
    model2 = unbraid.apply(model, split).requires_grad_(False)
    ways: list[tuple[Heatmaps, nn.Module]] = [(own_ways, model2)]
    if options.others:
        torch.manual_seed(0)
        plain = unbraid.apply(model, split, form="plain").requires_grad_(False)
        ways += [(other_ways, model2), (propagate, plain)]
    found = measure_all(split, images, options.pairs, ways)
    n_channels = len(split.channels)
    print(f"{split.layer.name}: {n_channels} channels, {len(found)} concept channels.\n")
    heads = ["", "concept channel on its own half", "whole channel on the same half"]
    heads += ["concept channels", "with 80 % or more", "without positive mass"]
    print_head(*heads)
    for way in dict.fromkeys(name for own in found.values() for name, _ in own):
        print_row(way, *summarise(found, way))


if __name__ == "__main__":
    main()
