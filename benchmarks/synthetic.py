"""Images, splits and scans made up for measuring.

Needs nothing but unbraid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import unbraid
from unbraid.base.files import write_tensors, write_whole
from unbraid.networks.layers import bias_of, describe, resolve_layer, weight_rows
from unbraid.networks.spec import LayerSpec
from unbraid.networks.weights import hash_weights
from unbraid.scanning.fields import Records
from unbraid.scanning.manifest import Manifest
from unbraid.scanning.records import Scan, write_shard
from unbraid.splitting.splits import ChannelSplit, Split


class RandomImages(Dataset[tuple[Tensor, int]]):
    """Random images in memory, so that loading costs nothing.

    Args:
        n_images: as many of each class.
        side: in pixels.
        n_classes: labels go around in turn.
        patterns: whether a class's images share a pattern.
    """

    def __init__(
        self, n_images: int, side: int = 224, n_classes: int = 1000, *, patterns: bool = False
    ) -> None:
        """Draw them."""
        generator = torch.Generator().manual_seed(side)
        self.targets = [n % n_classes for n in range(n_images)]
        self.images = torch.randn(n_images, 3, side, side, generator=generator)
        if patterns:
            own = torch.randn(n_classes, 3, side, side, generator=generator)
            self.images += own[self.targets]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image with its label."""
        return self.images[index], self.targets[index]


class FleetingImages(Dataset[tuple[Tensor, int]]):
    """Random images of ten classes that are made as they are asked for, and take no memory."""

    def __init__(self, n_images: int, side: int) -> None:
        """Have so many."""
        self.targets, self.side = [n % 10 for n in range(n_images)], side

    def __len__(self) -> int:
        """Count the images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Make one image."""
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, self.side, self.side, generator=generator), self.targets[index]


def random_split(
    model: nn.Module, layer: str, concepts: Mapping[int, Sequence[Sequence[int]]]
) -> Split:
    """Divide channels among concepts at random, where it does not matter how."""
    _, module = resolve_layer(model, layer)
    weight, bias = weight_rows(module), bias_of(module)
    parts = [
        ChannelSplit(
            o, tuple(map(tuple, own)), torch.rand(len(own), weight.shape[1]).to(weight),
            weight[o], float(bias[o]), {},
        )
        for o, own in concepts.items()
    ]  # fmt: skip
    return Split(describe(layer, module), hash_weights(model), "random", {}, (), tuple(parts))


def pointwise(n_out: int, n_in: int, kernel: int = 1) -> LayerSpec:
    """Describe a convolution that keeps the size of maps."""
    pad, one = (kernel // 2, kernel // 2), (1, 1)
    sizes = ((kernel, kernel), one, (pad, pad), one)
    return LayerSpec("layer", "Conv2d", n_out, n_in, *sizes, 1, "zeros", False)


def write_scan(
    folder: Path,
    layer: LayerSpec,
    weight: Tensor,
    labels: Tensor,
    pooled_of: Callable[[Tensor], Tensor],
    used: Tensor | None = None,
    *,
    varied: bool = False,
) -> Scan:
    """Write a scan of images of 49 positions.

    Args:
        folder: for it.
        layer: the layer.
        weight: (C_out, J).
        labels: (N,), of the images in order.
        pooled_of: gives pooled inputs (n, J) for the next labels (n,).
        used: (T, U), the channels that each class uses, in order; no shares without.
        varied: whether to keep, as scans do, how inputs vary within some images.
    """
    n_classes = int(labels.max()) + 1
    manifest = Manifest(
        weights="synthetic",
        layer=layer,
        data="synthetic",
        n_images=len(labels),
        class_names=tuple(map(str, range(n_classes))),
        preprocessing="",
        dtype="float32",
        min_share=0.005,
        classes=None,
        positions=False,
        shard_size=1024,
        batch_size=64,
        skip_broken=False,
        source={},
        versions={},
    )
    used = torch.zeros(n_classes, 0) if used is None else used
    n_used = used.shape[1]
    write_tensors(
        folder / "layer.safetensors", {"weight": weight, "bias": torch.zeros(len(weight))}, {}
    )
    for shard, label in enumerate(labels.split(manifest.shard_size)):
        records = Records(
            index=torch.arange(len(label)) + shard * manifest.shard_size,
            label=label.clone(),
            prediction=label.clone(),
            n_positions=torch.full_like(label, 49),
            pooled=pooled_of(label)[:, None],
            share_start=torch.arange(len(label) + 1) * n_used,
            share_channel=used[label].flatten().int(),
            share_value=torch.linspace(1.68, 0.32, n_used).div(n_used).repeat(len(label)),
            broken=torch.zeros(0, dtype=torch.int64),
        )
        if varied:
            chosen = torch.isin(records.index, torch.tensor(manifest.sampled))
            inputs = records.pooled[chosen, None] / 49 * 5 * torch.rand(49, 1, layer.n_taps) ** 4
            records.spread = (inputs - inputs.mean(1, keepdim=True)).flatten(0, 1)
            ends = (49 * chosen).cumsum(0)
            records.spread_start = torch.cat([ends.new_zeros(1), ends])
        write_shard(folder, shard, records)
    write_whole(folder / "manifest.json", manifest.to_json().encode())
    return unbraid.open_scan(folder)
