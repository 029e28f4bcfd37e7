"""Small networks of several shapes, trained on Fashion-MNIST, where one network is not enough.

Trained as `benchmarks/train_demo.py` trains, for fewer epochs: accuracy is no matter.
Needs Fashion-MNIST as IDX files (Debian: `dataset-fashion-mnist`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from train_demo import BATCH_SIZE, DROPOUT, LEARNING_RATE, WEIGHT_DECAY
from unbraid.base.files import read_tensors, write_tensors

EPOCHS = 5
LAYER = "mix"  # of every network
N_CLASSES = 10
JOB_WEIGHT = 10.0  # in the network of kind "jobs", of teaching channels a job each


def look(*widths: int) -> nn.Sequential:
    """Stack 3x3 convolutions with batch norms; the picture is halved behind the first two."""
    parts: list[nn.Module] = []
    for depth, (n_in, n_out) in enumerate(zip((1, *widths), widths, strict=False)):
        convolution = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        parts += [convolution, nn.BatchNorm2d(n_out), nn.ReLU()]
        parts += [nn.MaxPool2d(2)] if depth < 2 else []
    return nn.Sequential(*parts)


class FashionNet(nn.Module):
    """Layers that look, to maps (N, C, 7, 7); the layer `mix` that is analysed; a classifier.

    A fully connected `mix` works on 2 x 2 averages of these maps.
    """

    def __init__(self, look: nn.Module, mix: nn.Module, n_mixed: int) -> None:
        """Put the layers together."""
        super().__init__()
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.look = nn.Sequential(look, pooled) if isinstance(mix, nn.Linear) else look
        self.mix = mix
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(DROPOUT)
        self.classify = nn.Linear(n_mixed, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Classify pictures, (N, 1, 28, 28) to (N, 10)."""
        mixed = self.relu(self.mix(self.look(images)))
        pooled = mixed if mixed.dim() == 2 else mixed.flatten(2).mean(2)
        return self.classify(self.dropout(pooled))


def build(kind: str) -> FashionNet:
    """Make an untrained network of one of `KINDS`."""
    if kind in ("1x1", "jobs"):  # the demo's shape with another seed
        return FashionNet(look(16, 32, 96), nn.Conv2d(96, 24, 1), 24)
    if kind == "3x3":
        return FashionNet(look(16, 32, 48), nn.Conv2d(48, 24, 3, padding=1), 24)
    if kind == "wide":
        return FashionNet(look(16, 32, 64, 192), nn.Conv2d(192, 48, 1), 48)
    return FashionNet(look(16, 32, 64), nn.Linear(256, 32), 32)


KINDS = ("1x1", "3x3", "wide", "linear", "jobs")


def train(kind: str, images: Tensor, labels: Tensor, seed: int) -> FashionNet:
    """Train a network of a kind on images (N, 1, 28, 28), normalised, and labels (N,)."""
    torch.manual_seed(seed)
    network = build(kind).to(memory_format=torch.channels_last)
    optimiser = AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    n_steps = len(images) // BATCH_SIZE
    schedule = OneCycleLR(optimiser, LEARNING_RATE, total_steps=EPOCHS * n_steps)
    mixed: list[Tensor] = []
    if kind == "jobs":
        handle = network.mix.register_forward_hook(lambda _, args, output: mixed.append(output))
    for epoch in range(EPOCHS):
        network.train()
        total = 0.0
        order = torch.randperm(len(images))
        for batch in order[: n_steps * BATCH_SIZE].split(BATCH_SIZE):
            optimiser.zero_grad()
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            if kind == "jobs":
                loss = loss + JOB_WEIGHT * job_error(mixed.pop(), labels[batch])
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        print(f"  {kind}, epoch {epoch + 1} of {EPOCHS}: loss {total / n_steps:.3f}", flush=True)
    if kind == "jobs":
        handle.remove()
    return network.eval()


def job_error(mixed: Tensor, labels: Tensor) -> Tensor:
    """How far the first ten channels are from answering to one class each and to nothing else."""
    wanted = F.one_hot(labels, N_CLASSES).to(mixed)
    return F.mse_loss(mixed.mean((2, 3))[:, :N_CLASSES], wanted)


def load_or_train(
    kind: str, cache: Path, images: Tensor, labels: Tensor, seed: int = 1
) -> FashionNet:
    """Read a network's weights from the cache, or train it and put them there."""
    path = cache / f"fashion-{kind}-{seed}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        network = train(kind, images, labels, seed)
        write_tensors(path, network.state_dict(), {"epochs": str(EPOCHS)})
    network = build(kind)
    network.load_state_dict(read_tensors(path)[0])
    return network.eval()
