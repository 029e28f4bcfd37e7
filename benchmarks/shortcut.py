"""A planted shortcut: does `unbraid.suggest` put it first? `python benchmarks/shortcut.py`.

Clothes of one class get a white mark in a corner of most training pictures; in validation pictures
the mark stands with every class alike. A network that learns the mark takes marked pictures for
that class. Channels of its layer `mix` are scanned, found, split and switched off as in a run, for
every class in turn, and the suggestions are ranked. Needs Fashion-MNIST as IDX files (Debian:
`dataset-fashion-mnist`).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import train_demo
import unbraid
from train_demo import DEBIAN_FOLDER, accuracy, first_of_each_class, read_split
from unbraid.demo.network import CLASSES, LAYER, DemoImages, DemoNet, Pictures, normalise

MARK = 5  # pixels of a side
IN_TRAINING = 0.9  # of the class's pictures
IN_VALIDATION = 0.25  # of every class's
N_TRAIN, N_VAL = 1500, 250  # of a class
EPOCHS = 4


def marked(pictures: Pictures, chosen: np.ndarray) -> Pictures:
    """Put a white mark into the upper left corner of the chosen pictures."""
    changed = pictures.copy()
    changed[chosen, 1 : 1 + MARK, 1 : 1 + MARK] = 255
    return changed


def images(folder: Path, split: str, n: int) -> DemoImages:
    """The first n images of each class."""
    pictures, labels = read_split(folder, split)
    chosen = first_of_each_class(labels, n)
    return DemoImages(pictures[chosen], labels[chosen])


def planted(folder: Path, label: int) -> tuple[DemoNet, DemoImages, DemoImages, list[float]]:
    """Train with the mark on one class; return the network, images, and what it makes of marks."""
    random = np.random.default_rng(label)
    train, val = images(folder, "train", N_TRAIN), images(folder, "test", N_VAL)
    own = np.array(train.targets) == label
    train.pictures = marked(train.pictures, own & (random.random(len(own)) < IN_TRAINING))
    plain = val.pictures
    with_mark = random.random(len(plain)) < IN_VALIDATION
    val.pictures = marked(plain, with_mark)
    train_demo.EPOCHS = EPOCHS
    network = train_demo.train(normalise(train.pictures), torch.tensor(train.targets), seed=label)
    tried = (plain, marked(plain, np.ones(len(plain), dtype=bool)))
    labels = torch.tensor(val.targets)
    return network, train, val, [accuracy(network, normalise(one), labels) for one in tried]


def suggestions(
    network: DemoNet, train: DemoImages, val: DemoImages, tau: float
) -> unbraid.Suggestions:
    """Do what a run does, and rank."""
    with tempfile.TemporaryDirectory() as folder:
        scanned = unbraid.scan(network, LAYER, train, Path(folder, "train"), batch_size=250)
        found = unbraid.find(scanned, tau=tau, p=0.75, gamma=0.5)
        if not found.concepts:
            return unbraid.Suggestions(LAYER, ())
        model2 = unbraid.apply(network, unbraid.split(scanned, found))
        return unbraid.suggest(unbraid.ablate(model2, val, batch_size=250))


def main() -> None:
    """Print, for every class with the mark, the first suggestions."""
    parser = argparse.ArgumentParser(description="Rank a planted shortcut.")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, metavar="DIR")
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(len(CLASSES))))
    parser.add_argument("--tau", type=float, default=0.03)
    options = parser.parse_args()
    torch.set_num_threads(1)
    n_first = 0
    for label in options.classes:
        network, train, val, tried = planted(options.data, label)
        ranked = suggestions(network, train, val, options.tau)
        helps = [row for row in ranked.rows if row.kind == "helps"]
        first = bool(helps) and CLASSES[label] in helps[0].concept.split(", ")
        n_first += first
        words = f"accuracy {tried[0]:.1%}, all marked {tried[1]:.1%}"
        print(f"mark on {CLASSES[label]}: {words}; planted first: {first}", flush=True)
        for row in helps[:3]:
            print(
                f"  {row.name:8} {row.concept:40} {100 * row.change:+.2f} points"
                f" ({100 * row.low:+.2f} to {100 * row.high:+.2f})",
                flush=True,
            )
    print(f"planted first in {n_first} of {len(options.classes)} networks")


if __name__ == "__main__":
    main()
