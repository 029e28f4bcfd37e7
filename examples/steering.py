"""Take away what makes a network see a bag where there is an ankle boot, and little else.

    python examples/steering.py

The demo's network takes an ankle boot in front of a faint bag for a bag. Split channels hold the
concepts that bags belong to; this switches them off, and compares with switching the same channels
off as a whole. What was split was learned from training images; all figures are of test images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import unbraid
from unbraid.demo.network import CLASSES, LAYER, DemoImages, load_images, load_network, normalise

BOOT, BAG = CLASSES.index("Ankle boot"), CLASSES.index("Bag")
FAINT = 0.5  # of the bag's grey values


@dataclass(frozen=True)
class Figures:
    """Fractions of test images."""

    boot: float  # of boots before a bag: called an ankle boot
    bag: float  # of boots before a bag: called a bag
    clean_pair: float  # of clean ankle boots and bags: called what they are
    clean_rest: float  # of all other clean images: called what they are


def boots_before_bags(images: DemoImages) -> Tensor:
    """Every ankle boot, each before a bag drawn at random, (N, 1, 28, 28)."""
    labels = np.array(images.targets)
    boots, bags = (images.pictures[labels == label] for label in (BOOT, BAG))
    behind = bags[np.random.default_rng(0).integers(len(bags), size=len(boots))]
    return normalise(np.maximum(boots, (FAINT * behind).astype(np.uint8)))


def measure(
    model2: nn.Module, images: DemoImages, off: Sequence[tuple[int, int]] = ()
) -> tuple[Figures, Figures]:
    """Figures with concept channels off for all images; and for boots before bags alone."""
    mixed, labels = boots_before_bags(images), torch.tensor(images.targets)
    clean = torch.stack([images[n][0] for n in range(len(images))])
    batch = torch.cat([mixed, clean])
    pair = (labels == BOOT) | (labels == BAG)
    only_mixed = torch.cat([torch.zeros(len(mixed)), torch.ones(len(clean))])  # (N,), a gate each
    found = []
    for value in (0.0, only_mixed):
        with ExitStack() as moves, torch.no_grad():
            for channel, concept in off:
                moves.enter_context(unbraid.gate(model2, LAYER, channel, concept, value))
            answers = model2(batch).argmax(1)
        of_mixed, right = answers[: len(mixed)], answers[len(mixed) :] == labels
        parts = (of_mixed == BOOT, of_mixed == BAG, right[pair], right[~pair])
        found.append(Figures(*(part.float().mean().item() for part in parts)))
    return found[0], found[1]


def steer(folder: str | Path) -> dict[str, Figures]:
    """Split the demo's network, with a scan in a folder, and measure all ways of steering it."""
    network = load_network()
    scan = unbraid.scan(network, LAYER, load_images("train"), folder)
    split = unbraid.split(scan, unbraid.find(scan, tau=0.03, p=0.75, gamma=0.5))
    model2, images = unbraid.apply(network, split), load_images("test")
    with_bags = [
        (part.channel, k)
        for part in split.channels
        for k, classes in enumerate(part.concepts)
        if BAG in classes
    ]
    whole = [(o, k) for o, _ in with_bags for k in range(len(split[o].concepts))]
    concepts, concepts_in_mixed = measure(model2, images, with_bags)
    return {
        "nothing off": measure(model2, images)[0],
        "concepts with bags off": concepts,
        "the same, in boots before bags alone": concepts_in_mixed,
        "the whole channels off": measure(model2, images, whole)[0],
    }


def main() -> None:
    """Print a table."""
    print("| | boot before bag: boot | called a bag | clean boots and bags | the other classes |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, f in steer(folder).items():
            print(
                f"| {name} | {f.boot:.1%} | {f.bag:.1%} | {f.clean_pair:.1%} | {f.clean_rest:.1%} |"
            )


if __name__ == "__main__":
    main()
