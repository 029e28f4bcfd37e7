"""Which networks benchmarks/zoo.py tries, and on what.

Needs `pip install timm`.
"""

from __future__ import annotations

import re

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset

SIZES = (64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 384, 448, 512)
SIZE_WORDS = (
    *("zepto", "atto", "femto", "pico", "nano", "xxt", "xxs", "xt", "ti", "tiny", "t", "xs"),
    *("mini", "micro", "small", "lite", "s", "m", "medium", "base", "b", "l", "large", "h", "xl"),
    *("huge", "giant", "gigantic", "enormous", "so"),
)  # smallest first
MORE = {  # whose layers pad and standardise on their own
    "efficientnet, TensorFlow's": "tf_efficientnet_lite0",
    "nfnet, DeepMind's": "dm_nfnet_f0",
    "resnetv2, standardised": "resnetv2_50x1_bit",
    "vision_transformer_hybrid, standardised": "vit_tiny_r_s16_p8_224",
}


class Pictures(Dataset[tuple[Tensor, int]]):
    """Random pictures of three classes."""

    def __init__(self, size: int, n_images: int) -> None:
        """Draw them, each class around a pattern of its own."""
        generator = torch.Generator().manual_seed(size)
        patterns = torch.randn(3, 3, size, size, generator=generator)
        own = torch.randn(n_images, 3, size, size, generator=generator)
        self.targets = [n % 3 for n in range(n_images)]
        self.images = patterns[self.targets] + own

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image with its label."""
        return self.images[index], self.targets[index]


def families(library: str) -> dict[str, list[str]]:
    """Names of networks by the file that they are written in."""
    if library == "timm":
        by_module = {home: timm.list_models(module=home) for home in timm.list_modules()}
        return by_module | {family: [name] for family, name in MORE.items()}
    found: dict[str, list[str]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        home = torchvision.models.get_model_builder(name).__module__.rsplit(".", 1)[-1]
        found.setdefault(home, []).append(name)
    return found


def size_of(name: str) -> tuple[int, int, int]:
    """What a network's name says of its size: the largest word for a size, and its number."""
    parts = [part.rstrip("0123456789") for part in name.split("_")[1:]]
    ranks = [SIZE_WORDS.index(p) for p in parts if p in SIZE_WORDS] or [SIZE_WORDS.index("s")]
    return max(ranks), int((re.findall(r"[0-9]+", name) or ["0"])[0]), len(name)


def build(library: str, name: str) -> nn.Module:
    """Build a network with random weights."""
    if library == "timm":
        return timm.create_model(name, pretrained=False).eval()
    return torchvision.models.get_model(name, weights=None).eval()


def randomise(model: nn.Module) -> None:
    """Give norms something to do, and whatever is constant at the start some variety."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))


def smallest_size(model: nn.Module) -> int:
    """Find the smallest images that a network takes."""
    error = None
    for size in SIZES:
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
            return size
        except Exception as caught:
            error = caught
    raise RuntimeError(f"runs on images of no size ({one_line(error)})")


def one_line(error: Exception | None) -> str:
    """Say what went wrong, in one cell of a table."""
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}".replace("|", "/")
