"""Image encoders: any callable, a network of timm's, or the analysed network's own last features.

An encoder takes a batch of images as a data set gives them, (N, C, H, W), and gives embeddings,
(N, D).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unbraid.errors import ModelError, UsageError
from unbraid.models import RANDOM, Transform, load_timm
from unbraid.running import run_network

Encoder = Callable[[Tensor], Tensor]


class Penultimate(nn.Module):
    """A network's own features: what enters the layer whose output is the logits.

    That layer is looked for among the fully connected layers and 1x1 convolutions: the last one
    called whose output equals the logits. Its input is averaged over positions if it has any.

    This is the network's own view of the images, perhaps with the analysed channel in it; another
    network is the more independent judge.

    Args:
        model: gives logits (N, T) for a batch of images; it stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        """Keep the network."""
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Compute embeddings, (N, D).

        Raises:
            ModelError: no layer gives the logits, or the network cannot run.
        """
        calls: list[tuple[Tensor, Tensor]] = []

        def keep(
            _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
        ) -> None:
            # One number a channel, as logits are; so what is kept is small.
            if output.dim() > 1 and output[0].numel() == output.shape[1]:
                x = (args[0] if args else named["input"]).detach()
                # What follows may overwrite either.
                calls.append((x.flatten(2).mean(2) if x.dim() > 2 else x.clone(), output.clone()))

        with ExitStack() as hooks:
            for module in self.model.modules():
                if _may_classify(module):
                    handle = module.register_forward_hook(keep, with_kwargs=True)
                    hooks.callback(handle.remove)
            logits = run_network(self.model, images)
        for features, output in reversed(calls):
            if torch.equal(output.flatten(1).to(logits), logits):
                return features
        raise ModelError(
            "No fully connected layer or 1x1 convolution of the network gives its logits, so it "
            "has no penultimate layer to embed images with; pass another encoder, such as "
            "timm:NAME."
        )

    def __str__(self) -> str:
        """Name the encoder, for people."""
        return "the network's own penultimate layer"


def _may_classify(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return set(module.kernel_size) == {1}
    return isinstance(module, nn.Linear)


class TimmEncoder(nn.Module):
    """A network of timm's without its classifier, and with its own preprocessing.

    Where the data set offers `picture(index)`, pictures go through the preprocessing. Images of
    another kind are taken as they are, only brought to the network's size and number of channels.

    Args:
        network: gives pooled features (N, D).
        transform: from a picture to what the network takes.
        size: (C, H, W) that the network takes.
        name: as timm knows it.
    """

    def __init__(
        self, network: nn.Module, transform: Transform, size: torch.Size, name: str
    ) -> None:
        """Keep network and preprocessing."""
        super().__init__()
        self.network, self.transform, self.size, self.name = network, transform, size, name

    def forward(self, images: Tensor) -> Tensor:
        """Compute embeddings, (N, D)."""
        if images.shape[1] != self.size[0]:  # grey, or of many bands
            images = images.mean(1, keepdim=True).expand(-1, self.size[0], -1, -1)
        if images.shape[2:] != self.size[1:]:
            images = F.interpolate(images, self.size[1:], mode="bilinear", antialias=True)
        embeddings: Tensor = self.network(images)
        return embeddings

    def __str__(self) -> str:
        """Name the encoder, for people."""
        return f"timm:{self.name}"


def load_encoder(spec: str, *, pretrained: bool = True, device: str | None = None) -> TimmEncoder:
    """Load an image encoder by its name.

    Args:
        spec: `timm:NAME`, the name perhaps with a tag of its weights behind a dot.
        pretrained: False for random weights.
        device: for the network; by default an accelerator if there is one.

    Raises:
        UsageError: no such encoder, or timm is not installed.
        ModelError: the weights cannot be had.
    """
    kind, _, name = spec.partition(":")
    if kind != "timm":
        raise UsageError(
            f"{spec!r} names no encoder; write timm:NAME, or pass a function from images to "
            "embeddings."
        )
    hint = "connect to the internet once, or use the network's own penultimate layer"
    network: Any
    network, transform = load_timm(name, None if pretrained else RANDOM, hint)
    network.reset_classifier(0)  # pooled features remain
    size = transform(Image.new("RGB", (64, 64))).shape
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return TimmEncoder(network.to(device).eval(), transform, size, name)


def name_of_encoder(encoder: Encoder) -> str:
    """Name an encoder for people."""
    if isinstance(encoder, (Penultimate, TimmEncoder)):
        return str(encoder)
    return getattr(encoder, "__qualname__", type(encoder).__name__)
