"""The whole job against a straightforward rendering of the published procedure.

    python benchmarks/pipeline.py                   # the embedded demo network and images
    python benchmarks/pipeline.py --network lite0   # EfficientNet-Lite0, ImageNet weights

Both scan, find, choose rho, split and evaluate the same pairs on the same images, in turn; pairs,
cosines, rho and the published table must come out the same, else it stops. The second needs what
`benchmarks/lite0.py` says, with Fashion-MNIST in --data.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

import published
import unbraid
from lite0 import LAYER as LITE0_LAYER
from lite0 import Clothes, load_lite0
from timing import in_turn, median, print_head, print_row, ratios, spread
from train_demo import DEBIAN_FOLDER
from unbraid.demo.network import LAYER, load_images, load_network

PUBLISHED = {"tau": 0.03, "p": 0.75, "gamma": 0.5}


@dataclass
class Setting:
    """A network with its images and thresholds."""

    name: str
    model: nn.Module
    layer: str
    train: Dataset[Any]
    val: Dataset[Any]
    thresholds: dict[str, float]
    batch_size: int


def setting_of(name: str, data: Path) -> Setting:
    """The demo, or an ImageNet network at thresholds that find something in pictures of clothes."""
    if name == "demo":
        images = load_images("train"), load_images("test")
        return Setting(name, load_network(), LAYER, *images, PUBLISHED, 250)
    clothes = Clothes(data, "train", 40), Clothes(data, "test", 20)
    thresholds = {"tau": 0.01, "p": 0.6, "gamma": 0.75}
    return Setting(name, load_lite0(), LITE0_LAYER, *clothes, thresholds, 32)


def run_unbraid(setting: Setting, n_pairs: int | None, answers: dict[str, Any]) -> None:
    """Do the job with unbraid: every pair on its own, as published."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan_into = partial(unbraid.scan, setting.model, setting.layer)
        size: dict[str, Any] = {"batch_size": setting.batch_size}
        scan = scan_into(setting.train, folder / "train", **size)
        found = unbraid.find(scan, **setting.thresholds)
        pairs = sorted(found.pairs, key=lambda pair: (pair.channel, pair.class1, pair.class2))
        chosen = pairs[:n_pairs]
        size["classes"] = sorted({c for pair in chosen for c in (pair.class1, pair.class2)})
        maps = scan_into(setting.train, folder / "maps", positions=True, **size)
        val_scan = scan_into(setting.val, folder / "val", **size)
        splits = []
        for pair in chosen:
            concepts = {pair.channel: [[pair.class1], [pair.class2]]}
            own = unbraid.find(scan, channels=concepts, **setting.thresholds)
            splits.append(unbraid.split(maps, own, method="published"))
        tables = [unbraid.evaluate(split, val_scan).channels[0] for split in splits]
        n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    rhos = [split.channels[0].info["rho"] for split in splits]
    answers["unbraid"] = {"pairs": pairs, "rhos": rhos, "tables": tables, "bytes_written": n_bytes}


def run_published(
    setting: Setting, n_pairs: int | None, answers: dict[str, Any], *, name: str, save_views: bool
) -> None:
    """Do the job as published."""
    with tempfile.TemporaryDirectory() as folder:
        result = published.run(
            *(setting.model, setting.layer, setting.train, setting.val, folder),
            **setting.thresholds,
            batch_size=setting.batch_size,
            save_views=save_views,
            max_pairs=n_pairs,
        )
    answers[name] = vars(result)


def check_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Stop unless both found, chose and measured the same."""
    mine, other = (
        {(p.channel, p.class1, p.class2): p.cosine for p in answer["pairs"]}
        for answer in (ours, theirs)
    )
    if mine.keys() != other.keys():
        raise SystemExit(f"different pairs: {sorted(mine.keys() ^ other.keys())}")
    worst = max(abs(mine[key] - other[key]) for key in mine)
    if worst > 1e-4 or not all(map(math.isclose, ours["rhos"], theirs["rhos"])):
        raise SystemExit(f"cosines differ by {worst:g}; {ours['rhos']} against {theirs['rhos']}")
    for channel, table in zip(ours["tables"], theirs["tables"], strict=True):
        means = torch.tensor([[r.mean for r in concept.ratios] for concept in channel.concepts])
        torch.testing.assert_close(means, table, rtol=1e-3, atol=1e-3)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=("demo", "lite0"), default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="split and evaluate only so many pairs")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER)
    asked = parser.parse_args()
    answers: dict[str, Any] = {}
    job = (setting_of(asked.network, asked.data), asked.pairs, answers)
    ways = {"unbraid": partial(run_unbraid, *job)}
    for name, save_views in (("published", True), ("published, no views", False)):
        ways[name] = partial(run_published, *job, name=name, save_views=save_views)
    taken = in_turn(ways, asked.rounds, warm=False)
    for name in ("published", "published, no views"):
        check_same(answers["unbraid"], answers[name])
    steps = {step: round(taken, 1) for step, taken in answers["published"]["seconds"].items()}
    print(f"same findings, rho and tables; published, s by step: {steps}")
    print(f"{len(answers['unbraid']['pairs'])} pairs found, {asked.pairs or 'all'} split")
    print_head("way", "s, median", "ratio of time", "MB written", "ratio of bytes")
    for name, times in taken.items():
        ratio = spread(ratios(times, taken["unbraid"], 0))
        size = answers[name]["bytes_written"]
        more = size / answers["unbraid"]["bytes_written"]
        print_row(name, f"{median(times, 0):.1f}", ratio, f"{size / 1e6:.1f}", f"{more:.1f}")


if __name__ == "__main__":
    main()
