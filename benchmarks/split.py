"""How well concepts are separated: least squares against the published rule, and truth tests.

    python benchmarks/split.py                      # all networks (the first time trains some)
    python benchmarks/split.py --networks demo 3x3  # some

Per network, both rules divide the same channels among the same concepts, found and fitted on
training images, and are measured on the same test images; the published rule chooses its own rho
on the training images. Then, on the same scans, truth tests: random
halves of a class, shuffled labels, and planted channels. Prints Markdown.

The demo needs nothing but unbraid. Other networks are trained on Fashion-MNIST as IDX files
(--data; Debian: `dataset-fashion-mnist`) and kept in --cache; `lite0` needs what
`benchmarks/lite0.py` says.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import unbraid
from fashion import KINDS, LAYER, load_or_train
from pipeline import PUBLISHED, Setting, setting_of
from timing import print_head, print_row
from train_demo import DEBIAN_FOLDER, first_of_each_class, read_split
from truth import halves_told_apart, planted, shuffled_findings
from unbraid.demo.network import DemoImages, normalise
from unbraid.finding.findings import Findings
from unbraid.measuring.formulas import separation_error
from unbraid.measuring.results import Evaluation, Responses
from unbraid.scanning.records import Scan

N_IMAGES = {"train": 500, "test": 250}  # of each class of Fashion-MNIST
N_DRAWS = 200  # of test images, for the noise of a channel's errors


@dataclass
class Scans:
    """Pooled scans of a setting, what was found, and scans of its classes with positions."""

    train: Scan
    found: Findings
    train_maps: Scan
    test_maps: Scan


def fashion_setting(kind: str, data: Path, cache: Path) -> Setting:
    """Load or train a network, and load its images."""
    pictures, labels = read_split(data, "train")
    model = load_or_train(kind, cache, normalise(pictures), torch.from_numpy(labels.copy()).long())
    parts = []
    for part, n_images in N_IMAGES.items():
        pictures, labels = read_split(data, part)
        chosen = first_of_each_class(labels, n_images)
        parts.append(DemoImages(pictures[chosen], labels[chosen]))
    return Setting(kind, model, LAYER, *parts, PUBLISHED, 250)


def scan_all(setting: Setting, folder: Path) -> Scans:
    """Scan the training images, find, and scan the classes concerned with positions."""
    scan = partial(unbraid.scan, setting.model, setting.layer, batch_size=setting.batch_size)
    train = scan(setting.train, folder / "train")
    found = unbraid.find(train, **setting.thresholds)
    maps = [
        scan(images, folder / name, classes=found.classes, positions=True)
        for name, images in (("train-maps", setting.train), ("test-maps", setting.val))
        if found.classes
    ]
    return Scans(train, found, *(maps or (train, train)))


def worse_by_more_than_noise(ours: Evaluation, theirs: Evaluation, measure: str) -> list[int]:
    """Channels whose error is higher in 97.5 % of draws of the test images."""
    worse = []
    for channel, mine in ours.responses.items():
        other = theirs.responses[channel]
        draws = [_draw(mine.concept, seed) for seed in range(N_DRAWS)]
        higher = [_error(mine, measure, draw) > _error(other, measure, draw) for draw in draws]
        if sum(higher) > 0.975 * N_DRAWS:
            worse.append(channel)
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


def separation_row(setting: Setting, scans: Scans) -> list[str]:
    """Compare both rules on one network, as a row of the table."""
    ours, theirs = (
        unbraid.evaluate(unbraid.split(scans.train_maps, scans.found, method=m), scans.test_maps)
        for m in ("least_squares", "published")
    )
    means, worse = [], []
    for measure, name in (
        ("pooled", "separation_error"),
        ("rectified", "separation_error_rectified"),
    ):
        mine, other = (e.summary[e.method][name] for e in (ours, theirs))
        means += [f"{other:.3f}", f"{mine:.3f}", f"**{other / mine:.1f}**"]
        channels = worse_by_more_than_noise(ours, theirs, measure)
        worse += [f"{measure}: {', '.join(map(str, channels))}"] if channels else []
    n_concepts = sum(len(groups) for groups in scans.found.concepts.values())
    spec = scans.train.layer
    shape = f"{spec.kind} {'x'.join(map(str, spec.kernel))}, {spec.n_in} to {spec.n_out}"
    counts = f"{len(scans.found.concepts)} ({n_concepts})"
    return [setting.name, shape, counts, *means, "; ".join(worse) or "none"]


def truth_rows(setting: Setting, scans: Scans, folder: Path) -> list[list[str]]:
    """Run the truth tests on one network, as rows of a table."""
    gamma = setting.thresholds["gamma"]
    apart, n_halves = halves_told_apart(scans.train, gamma, folder / "halves")
    shuffled = shuffled_findings(scans.train, setting.thresholds, folder / "shuffled")
    rows = [
        ["halves of a class told apart", f"{apart} of {n_halves}"],
        ["pairs found with shuffled labels", str(shuffled)],
    ]
    for n_concepts in (2, 3, 5):
        for kind, figures in planted(scans.train, n_concepts).items():
            rows.append([f"{n_concepts} planted channels, {kind}", figures])
    return [[setting.name, *row] for row in rows]


def main() -> None:
    """Run what was asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["demo", *KINDS, "lite0"])
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER)
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
    asked = parser.parse_args()
    truth = []
    figures = [
        f"{rule}, {measure}" if rule else "factor"
        for measure in ("pooled", "rectified")
        for rule in ("published", "least squares", "")
    ]
    print_head("network", "layer", "channels (concepts)", *figures, "worse by more than noise")
    for name in asked.networks:
        if name in ("demo", "lite0"):
            setting = setting_of(name, asked.data)
        else:
            setting = fashion_setting(name, asked.data, asked.cache)
        with tempfile.TemporaryDirectory() as folder:
            scans = scan_all(setting, Path(folder))
            if scans.found.concepts:
                print_row(*separation_row(setting, scans))
            truth += truth_rows(setting, scans, Path(folder))
    print_head("network", "truth test", "result")
    for row in truth:
        print_row(*row)


if __name__ == "__main__":
    main()
