"""The demo's network and images, trained on Fashion-MNIST by `benchmarks/train_demo.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.errors import UsageError
from unbraid.base.files import read_tensors

Pictures = npt.NDArray[np.uint8]

DATA = Path(__file__).parent
WEIGHTS = DATA / "network.safetensors"
IMAGES = DATA / "images.npz"
SPLIT = DATA / "split"  # a folder as `unbraid share` writes it

LAYER = "mix"  # the 1x1 convolution whose channels the demo takes apart
SPLITS = ("train", "test")
CLASSES: tuple[str, ...] = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat")
CLASSES += ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

MEAN, SPREAD = 0.2860, 0.3530  # of the pixels of Fashion-MNIST's training images, on 0 to 1


class DemoNet(nn.Module):
    """Three 3x3 convolutions that look and a 1x1 convolution that mixes what they saw."""

    def __init__(self, dropout: float = 0.0) -> None:
        """Set up the layers; `dropout` is the share of pooled channels dropped in training."""
        super().__init__()
        self.look = nn.Sequential(
            *_convolve(1, 16),
            nn.MaxPool2d(2),  # 28 to 14 pixels
            *_convolve(16, 32),
            nn.MaxPool2d(2),  # 14 to 7 pixels
            *_convolve(32, 96),
        )
        self.mix = nn.Conv2d(96, 24, kernel_size=1, dtype=torch.float32)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(24, len(CLASSES), dtype=torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (N, 10), of images, (N, 1, 28, 28), as `normalise` gives them."""
        mixed = self.relu(self.mix(self.look(images)))  # (N, 24, 7, 7)
        logits: Tensor = self.classify(self.dropout(self.pool(mixed).flatten(1)))
        return logits


def _convolve(n_in: int, n_out: int) -> tuple[nn.Module, ...]:
    single = torch.float32
    convolution = nn.Conv2d(n_in, n_out, kernel_size=3, padding=1, bias=False, dtype=single)
    return convolution, nn.BatchNorm2d(n_out, dtype=single), nn.ReLU()


class DemoImages(Dataset[tuple[Tensor, int]]):
    """Grey pictures with labels, held in memory."""

    def __init__(self, pictures: Pictures, labels: Pictures) -> None:
        """Keep pictures, (N, 28, 28), grey values 0 to 255, and class indices, (N,)."""
        self.pictures = pictures
        self.targets: list[int] = labels.tolist()
        self.classes = list(CLASSES)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image, normalised, (1, 28, 28), and its label."""
        return normalise(self.pictures[index]), self.targets[index]

    def picture(self, index: int) -> Image.Image:
        """Return one image as a grey picture of 28 x 28 pixels, before normalising."""
        return Image.fromarray(self.pictures[index])


def normalise(pictures: Pictures) -> Tensor:
    """Turn grey pictures, (..., 28, 28), 0 to 255, into the network's (..., 1, 28, 28), float32."""
    grey = torch.from_numpy(pictures.astype(np.float32) / 255)
    return ((grey - MEAN) / SPREAD).unsqueeze(-3)


def preprocess(picture: Image.Image) -> Tensor:
    """Turn any picture into what the network takes, (1, 28, 28); it knows clothes on black."""
    return normalise(np.asarray(picture.convert("L").resize((28, 28)), dtype=np.uint8))


def load_network() -> DemoNet:
    """Load the trained network, in eval mode, on the CPU."""
    network = DemoNet()
    network.load_state_dict(read_tensors(WEIGHTS)[0])
    return network.eval()


def load_images(split: str) -> DemoImages:
    """Load the embedded images of one split, "train" or "test", as many of each class."""
    if split not in SPLITS:
        raise UsageError(f"There is no split {split!r}; name one of {', '.join(SPLITS)}.")
    with np.load(IMAGES, allow_pickle=False) as arrays:
        return DemoImages(arrays[f"{split}_images"], arrays[f"{split}_labels"])
