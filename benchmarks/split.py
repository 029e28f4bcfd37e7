"""How well concepts are separated: least squares against the published rule, and truth tests.

    python benchmarks/split.py                      # all networks (the first time trains some)
    python benchmarks/split.py --networks demo 3x3  # some

Per network, both rules divide the same channels among the same concepts, found and fitted on
training images, and are measured on the same test images; the published rule chooses its own rho
on the training images. Then, on the same scans, truth tests: random
halves of a class, shuffled labels, and planted channels. Prints Markdown.

With --scans FOLDER scans are kept and used again, also by `benchmarks/purity.py`.

The demo needs nothing but unbraid. Other networks are trained on Fashion-MNIST as IDX files
(--data; Debian: `dataset-fashion-mnist`) and kept in --cache; `lite0` needs what
`benchmarks/lite0.py` says.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

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


def load_setting(name: str, data: Path, cache: Path) -> Setting:
    """The network and images of one name."""
    return (
        setting_of(name, data) if name in ("demo", "lite0") else fashion_setting(name, data, cache)
    )


def scans_of(setting: Setting, folder: Path) -> list[Scan]:
    """Scan training and held-out images with positions, or open what is there already."""
    scans = []
    for name, images in (("train", setting.train), ("val", setting.val)):
        if not (folder / name / "manifest.json").exists():
            options: dict[str, Any] = {"positions": True, "batch_size": setting.batch_size}
            unbraid.scan(setting.model, setting.layer, images, folder / name, **options)
        scans.append(unbraid.open_scan(folder / name))
    return scans


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


def separation_row(name: str, train: Scan, val: Scan, found: Findings) -> list[str]:
    """Compare both rules on one network, as a row of the table."""
    ours, theirs = (
        unbraid.evaluate(unbraid.split(train, found, method=m), val)
        for m in ("least_squares", "published")
    )
    means, worse = [], []
    for measure, error in (
        ("pooled", "separation_error"),
        ("rectified", "separation_error_rectified"),
    ):
        mine, other = (e.summary[e.method][error] for e in (ours, theirs))
        means += [f"{other:.3f}", f"{mine:.3f}", f"**{other / mine:.1f}**"]
        channels = worse_by_more_than_noise(ours, theirs, measure)
        worse += [f"{measure}: {', '.join(map(str, channels))}"] if channels else []
    n_concepts = sum(len(groups) for groups in found.concepts.values())
    spec = train.layer
    shape = f"{spec.kind} {'x'.join(map(str, spec.kernel))}, {spec.n_in} to {spec.n_out}"
    counts = f"{len(found.concepts)} ({n_concepts})"
    return [name, shape, counts, *means, "; ".join(worse) or "none"]


def truth_rows(setting: Setting, train: Scan, folder: Path) -> list[list[str]]:
    """Run the truth tests on one network, as rows of a table."""
    gamma = setting.thresholds["gamma"]
    apart, n_halves = halves_told_apart(train, gamma, folder / "halves")
    shuffled = shuffled_findings(train, setting.thresholds, folder / "shuffled")
    rows = [
        ["halves of a class told apart", f"{apart} of {n_halves}"],
        ["pairs found with shuffled labels", str(shuffled)],
    ]
    for n_concepts in (2, 3, 5):
        for kind, figures in planted(train, n_concepts).items():
            rows.append([f"{n_concepts} planted channels, {kind}", figures])
    return [[setting.name, *row] for row in rows]


def main() -> None:
    """Run what was asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["demo", *KINDS, "lite0"])
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER)
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
    parser.add_argument("--scans", type=Path, help="folder that keeps scans, by network")
    asked = parser.parse_args()
    truth = []
    figures = [
        f"{rule}, {measure}" if rule else "factor"
        for measure in ("pooled", "rectified")
        for rule in ("published", "least squares", "")
    ]
    print_head("network", "layer", "channels (concepts)", *figures, "worse by more than noise")
    for name in asked.networks:
        setting = load_setting(name, asked.data, asked.cache)
        with tempfile.TemporaryDirectory() as folder:
            train, val = scans_of(setting, (asked.scans or Path(folder)) / name)
            found = unbraid.find(train, **setting.thresholds)
            if found.concepts:
                print_row(*separation_row(name, train, val, found))
            truth += truth_rows(setting, train, Path(folder))
    print_head("network", "truth test", "result")
    for row in truth:
        print_row(*row)


if __name__ == "__main__":
    main()
