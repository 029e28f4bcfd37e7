"""What switching channels off costs beside bare inference, and beside gates and full passes.

    python benchmarks/ablate.py

ResNet-50 with random weights, random images, 10 channels of two concepts each, so 30 things to
switch off: in a late layer, and in one with a third of the network behind it. A gate is moved for
one concept only, and its time is scaled, since each takes a full pass. Processor time, which
neighbours on the machine disturb less.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import unbraid
from machine import describe_machine
from unbraid.networks.layers import describe, weight_rows
from unbraid.networks.weights import hash_weights
from unbraid.splitting.splits import ChannelSplit, Split

LAYERS = ("layer4.2.conv3", "layer3.2.conv2")
BATCH = 32
N_CHANNELS = 10
N_OFF = 3 * N_CHANNELS  # every channel has two concepts, and is switched off as a whole besides


class RandomImages(Dataset[tuple[Tensor, int]]):
    """Images kept in memory, of as many classes as concepts take."""

    def __init__(self, n_images: int) -> None:
        """Draw the images."""
        self.images = torch.randn(n_images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        self.targets = [n % 4 for n in range(n_images)]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image with its label."""
        return self.images[index], self.targets[index]


def random_split(model: nn.Module, layer: str) -> Split:
    """Divide the first channels at random; what a split is does not matter here."""
    spec = describe(layer, model.get_submodule(layer))
    rows = weight_rows(model.get_submodule(layer))
    generator = torch.Generator().manual_seed(1)
    parts = [
        ChannelSplit(
            o, ((0,), (1,)), torch.rand(2, spec.n_taps, generator=generator), rows[o], 0.0, {}
        )
        for o in range(N_CHANNELS)
    ]
    return Split(spec, hash_weights(model), "random", {}, (), tuple(parts))


def seconds(run: Callable[[], object]) -> float:
    """Measure a call's processor time."""
    start = time.process_time()
    run()
    return time.process_time() - start


def bare(model: nn.Module, images: RandomImages) -> None:
    """Plain inference over the images."""
    with torch.inference_mode():
        for batch, _ in DataLoader(images, batch_size=BATCH):
            model(batch)


def by_gate(model2: nn.Module, layer: str, images: RandomImages) -> None:
    """A full pass over the images with one gate moved."""
    with unbraid.gate(model2, layer, 0, 0, 0.0):
        bare(model2, images)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, images = torchvision.models.resnet50().eval(), RandomImages(options.images)
    print(describe_machine())
    print("| layer | bare, s per batch | `unbraid.ablate` to bare | gates to bare |")
    print("| --- | --- | --- | --- |")
    for layer in LAYERS:
        model2 = unbraid.apply(model, random_split(model, layer))
        bare(model, images)
        rounds = []
        for _ in range(options.rounds):
            plain = seconds(lambda: bare(model, images))
            ours = seconds(lambda m=model2: unbraid.ablate(m, images, batch_size=BATCH))
            gate = seconds(lambda m=model2, name=layer: by_gate(m, name, images))
            rounds.append((plain, ours / plain, gate / plain * N_OFF))
        middle = [sorted(column)[len(rounds) // 2] for column in zip(*rounds, strict=True)]
        per_batch = middle[0] / (options.images / BATCH)
        print(f"| `{layer}` | {per_batch:.2f} | {middle[1]:.2f} | {middle[2]:.1f} |")


if __name__ == "__main__":
    main()
