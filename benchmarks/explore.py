"""Time the bench of `unbraid explore`: groups of images by hand, split, measured, shown.

    python benchmarks/explore.py

A synthetic scan of 10,000 images and one of 10,000 others to measure on, of a layer of 2048
channels with 512 inputs each; one channel of 60 is parted anew, by an image moved each time. What
is timed is all that the page waits for, but for the pictures: to lay the images out, and, after
*split*, to correct, refit, measure, and choose reference images. Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

import unbraid
from growth import N_CLASSES, write_mixed
from timing import print_head, print_row, seconds
from unbraid.exploring.explorer import Explorer
from unbraid.exploring.opened import Opened
from unbraid.running.finished import Run

CHANNEL, N_SPLIT = 5, 60


def open_synthetic(folder: Path, n_images: int) -> Explorer:
    """An explorer of a split of some channels, without a network and without pictures."""
    torch.manual_seed(0)
    train, val = (write_mixed(folder / kind, n_images // N_CLASSES, 1, True) for kind in "tv")
    draw = random.Random(0)
    drawn = [draw.sample(range(n_images), 20) for _ in range(N_SPLIT)]
    every = {channel: [own[:10], own[10:]] for channel, own in enumerate(drawn)}
    split = unbraid.split(train, unbraid.find(train, images=every))
    run = cast(Run, SimpleNamespace(folder=folder))
    opened = Opened(run, split, None, None, train, val, None, None, (), ())
    return Explorer(opened, folder / "splits")


def time_bench(explorer: Explorer, n_images: int, n_groups: int, n_in_group: int, n: int) -> None:
    """Part the channel several times, and print the least and the most that it took."""
    drawn = random.Random(1).sample(range(n_images), n_groups * n_in_group)
    groups = [drawn[k::n_groups] for k in range(n_groups)]
    made: list[dict[str, Any]] = [{"split": "run"}]
    laid, parted = [], []
    for _ in range(n):
        name = made[-1]["split"]
        laid.append(seconds(lambda: explorer.bench(name, CHANNEL, 36)))  # noqa: B023
        groups[1].append(groups[0].pop())
        parted.append(
            seconds(lambda: made.append(explorer.part(name, CHANNEL, groups, [])))  # noqa: B023
        )
    cells = [
        f"{pick(own[kind] for own in taken):.2f}"
        for taken in (laid, parted)
        for kind in (0, 1)
        for pick in (min, max)
    ]
    print_row(n_groups, n_in_group, *cells)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    heads = [
        f"{what}, {kind}{most}"
        for what in ("lay out", "split")
        for kind in ("s", "processor s")
        for most in (" (least)", " (most)")
    ]
    print_head("groups", "images each", *heads)
    with tempfile.TemporaryDirectory() as folder:
        explorer = open_synthetic(Path(folder), asked.images)
        for n_groups, n_in_group in ((2, 10), (2, 100), (5, 100)):
            time_bench(explorer, asked.images, n_groups, n_in_group, asked.rounds)


if __name__ == "__main__":
    main()
