"""Reference images: how often a page shows the same picture twice.

    python benchmarks/duplicates.py                  # the demo's network
    python benchmarks/duplicates.py demo lite0       # also EfficientNet-Lite0, ImageNet weights

Of the rows of eight reference images of every split channel and concept channel, from images that
were not split by: pairs of pictures that look the same, judged without the network, by the
correlation of their thumbnails (grey, 16 pixels a side, the best of a few shifts and of both ways
around). Then copies planted on purpose: how many the layer sees more alike than the two limits.
The crops of `lite0` are shown with and without a word on which photograph each is of. The demo
needs nothing but unbraid, `lite0` what `benchmarks/visualize.py` says. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import unbraid
from report import Crops, lite0
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.measuring.reference_images import (
    ALIKE,
    COPY,
    ReferenceImages,
    TopImages,
    reference_images,
)
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import Split

SIDE, REACH = 16, 2  # pixels of a thumbnail, and of its shifts
N_COPIED = 200  # images
LIKE = (0.9, 0.95)  # correlations of thumbnails from which on pictures look the same

Setting = tuple[nn.Module, str, Dataset[Any], Dataset[Any]]  # layer, images to split by, to show


def demo_setting() -> Setting:
    """The demo's network and its test images."""
    return load_network(), LAYER, load_images("train"), load_images("test")


def lite0_setting() -> Setting:
    """Crops of photographs."""
    model, train, val = lite0()
    return model, "_conv_head", train, val


def changes() -> dict[str, Callable[[Tensor], Tensor]]:
    """What is done to images, (N, C, H, W) from 0 to 1; steps are parts of the side."""

    def cut(part: float) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            side = round(part * x.shape[-1])
            first = (x.shape[-1] - side) // 2
            inner = x[..., first : first + side, first : first + side]
            return F.interpolate(inner, x.shape[-2:], mode="bilinear", antialias=True)

        return change

    return {
        "noise of 1 %": lambda x: x + 0.01 * torch.randn_like(x),
        "10 % brighter": lambda x: 1.1 * x,
        "moved by 1/28": lambda x: x.roll(x.shape[-1] // 28, -1),
        "inner 96 %": cut(0.96),
        "mirrored": lambda x: x.flip(-1),
    }


def thumbnails(images: Tensor) -> Tensor:
    """Small grey pictures, (N, SIDE, SIDE), of (N, C, H, W)."""
    grey = images.mean(1, keepdim=True)
    return F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0]


def correlations(small: Tensor) -> Tensor:
    """Correlation of each two thumbnails where they overlap, the best of shifts, (N, N)."""
    best = torch.full((len(small), len(small)), -1.0)
    for other in (small, small.flip(-1)):
        for down in range(-REACH, REACH + 1):
            for right in range(-REACH, REACH + 1):
                a, b = _part(small, down, right), _part(other, -down, -right)
                best = torch.maximum(best, a @ b.T)
    return torch.maximum(best, best.T)


def _part(small: Tensor, down: int, right: int) -> Tensor:
    rows = slice(max(0, down), SIDE + min(0, down))
    columns = slice(max(0, right), SIDE + min(0, right))
    values = small[:, rows, columns].flatten(1)
    return F.normalize(values - values.mean(1, keepdim=True), dim=1)


def rows_of(found: dict[int, ReferenceImages]) -> list[TopImages]:
    """All rows of pictures."""
    return [images for top in found.values() for images in (top.original, *top.concepts)]


def describe(name: str, rows: Sequence[TopImages], every: Sequence[TopImages], x: Tensor) -> str:
    """A line of the first table."""
    same, n_pairs, strength = [0] * len(LIKE), 0, []
    for images, strongest in zip(rows, every, strict=True):
        pairs = torch.ones(len(images.index), len(images.index)).triu(1).bool()
        found = correlations(thumbnails(x[images.index]))[pairs]
        n_pairs += len(found)
        same = [n + int((found > limit).sum()) for n, limit in zip(same, LIKE, strict=True)]
        strength.append(float(images.activation.mean() / strongest.activation.mean()))
    shown = [len(images.index) for images in rows]
    return (
        f"| {name} | {sum(shown) / len(shown):.1f} (least {min(shown)}) | {same[0]} | {same[1]} | "
        f"{n_pairs} | {100 * sum(strength) / len(strength):.0f} % |"
    )


def copies(model: nn.Module, layer: str, x: Tensor, mean: Tensor) -> list[str]:
    """Lines of the second table: how alike the layer sees images and their copies."""

    def directions(images: Tensor) -> Tensor:
        kept: list[Tensor] = []
        hook = model.get_submodule(layer).register_forward_pre_hook(
            lambda _, inputs: kept.append(inputs[0].flatten(2).sum(2))
        )
        with torch.no_grad():
            for some in images.split(24):
                model(some)
        hook.remove()
        return F.normalize(torch.cat(kept) - mean, dim=1)

    torch.manual_seed(0)
    x = x[torch.randperm(len(x))[:N_COPIED]]
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    original, lines = directions(x), []
    for name, change in changes().items():
        changed = change((x - low) / (high - low)).clamp(0, 1) * (high - low) + low
        cosine = (directions(changed) * original).sum(1)
        parts = [100 * float((cosine > limit).float().mean()) for limit in (ALIKE, COPY)]
        lines.append(f"{name} | {float(cosine.median()):.3f} | {parts[0]:.0f} % | {parts[1]:.0f} %")
    return lines


def measure(name: str, setting: Setting, folder: Path) -> tuple[list[str], list[str]]:
    """Lines of both tables; both layers have kernel 1."""
    model, layer, train, shown = setting
    fitted = unbraid.scan(model, layer, train, folder / "a", batch_size=24)
    split: Split = unbraid.split(
        fitted, unbraid.find(fitted, tau=0.03 if name == "demo" else "auto")
    )
    scan = unbraid.scan(model, layer, shown, folder / "b", batch_size=24)
    x = torch.stack([shown[place][0] for place in range(len(shown))])
    every = rows_of(reference_images(scan, split))
    lines = [describe(f"{name} | the strongest", every, every, x)]
    if isinstance(shown, Crops):
        shown.groups = None
        apart: Scan = unbraid.scan(model, layer, shown, folder / "c", batch_size=24)
        rows = rows_of(reference_images(apart, split, alike=ALIKE))
        lines.append(describe(f"{name} | that differ", rows, every, x))
    rows = rows_of(reference_images(scan, split, alike=ALIKE))
    known = ", a photograph once" if isinstance(shown, Crops) else ""
    lines.append(describe(f"{name} | that differ{known}", rows, every, x))
    mean = torch.cat([records.pooled.flatten(1) for records in scan.shards()]).mean(0)
    return lines, [f"| {name} | {line} |" for line in copies(model, layer, x, mean)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    settings: dict[str, Callable[[], Setting]] = {"demo": demo_setting, "lite0": lite0_setting}
    parser.add_argument("networks", nargs="*", choices=settings, default=["demo"])
    first, second = [], []
    for name in parser.parse_args().networks:
        with tempfile.TemporaryDirectory() as folder:
            lines, more = measure(name, settings[name](), Path(folder))
        first, second = first + lines, second + more
    print(
        f"| network | images | a row | pairs alike ({LIKE[0]}) | alike ({LIKE[1]}) | of pairs | "
        "excite the channel |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    print("\n".join(first))
    print(
        f"\n| network | copy | cosine, median | above {ALIKE} | above {COPY} |\n"
        "| --- | --- | --- | --- | --- |"
    )
    print("\n".join(second))


if __name__ == "__main__":
    main()
