"""A scan in a process of its own, to be killed: `python scanning.py FOLDER [how to die]`.

With POOLED in the environment it keeps no positions, but deviations within images; with PLACES
places besides; with TARGET another target than the label.

It says `ready RANK PID` before it begins. Five shards of two layers; a batch takes a few
milliseconds, so that a kill at random finds it anywhere.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import unbraid
import unbraid.scanning.scan as scanning

LAYERS = ["1", "3"]
SHARD = 128  # with positions, and here without
N_IMAGES = 4 * SHARD + 40


class Slow(nn.Sequential):
    def forward(self, x):
        time.sleep(0.003)
        return super().forward(x)


class Images(TensorDataset):
    def __init__(self):
        pixels = torch.randn(N_IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.targets = [n % 3 for n in range(N_IMAGES)]
        super().__init__(pixels, torch.tensor(self.targets))


def several():
    """As many items as there are images else: one label for every other image, two for the rest."""
    images = Images()
    images.targets = [[n % 3, (n + 1) % 3][: 1 + n % 2] for n in images.targets]
    some = unbraid.one_per_label(images)
    return Subset(some, range(N_IMAGES))


def network(maps=False):
    torch.manual_seed(0)
    slow1, slow2 = (Slow(nn.Softplus(), nn.ReLU()) for _ in range(2))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    head = nn.Conv2d(6, 3, 1) if maps else head
    return nn.Sequential(slow1, nn.Conv2d(3, 6, 3), slow2, nn.Conv2d(6, 6, 1), head)


def die_at(moment):
    """Arrange for the end: `rename 3` just before the third file gets its name, `named 3` after."""
    kind, number = moment.split()
    replace, calls = Path.replace, []

    def replace_and_die(self, target):
        calls.append(target)
        last = len(calls) == int(number)
        if last and kind == "rename":
            os.kill(os.getpid(), signal.SIGKILL)
        replaced = replace(self, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return replaced

    Path.replace = replace_and_die  # type: ignore[method-assign]


def main():
    out = Path(sys.argv[1])
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    rank = os.environ.get("RANK", "0")
    how = sys.argv[2] if len(sys.argv) > 2 else ""
    if how and rank == "0" and first_start:
        die_at(how)
    os.write(1, f"ready {rank} {os.getpid()}\n".encode())  # at once, as other ranks write too
    scanning.images_per_shard = lambda _: SHARD  # type: ignore[assignment]
    options = {"positions": "POOLED" not in os.environ, "batch_size": 16, "threads": 1}
    if "PLACES" in os.environ:
        options |= {"positions": False, "places": int(os.environ["PLACES"])}
    target = os.environ.get("TARGET", "label")
    if target != "label":
        labels = "none" if target == "none" else "given"
        options |= {"positions": False, "target": target, "labels": labels}
    images = several() if target == "multilabel" else Images()
    unbraid.scan(network(target.startswith("segmentation")), LAYERS, images, out, **options)


if __name__ == "__main__":
    main()
