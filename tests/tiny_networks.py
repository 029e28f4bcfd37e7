"""Tiny float64 networks with a "layer" of every kind that can be split, and images for them."""

import zlib
from collections import OrderedDict

import torch
from torch import nn
from torch.utils.data import Dataset

from unbraid.images.broken import UNLABELLED

N_CLASSES = 4
IMAGE_SIZE = (3, 7, 6)  # not square, so that swapped dimensions show


class SyntheticImages(Dataset):
    """A fixed pattern per class, and noise; labels go round, so any part has all classes."""

    def __init__(
        self, n_images=16, *, n_classes=N_CLASSES, size=IMAGE_SIZE, seed=0, dtype=torch.float64
    ):
        patterns = torch.randn(n_classes, *size, generator=torch.Generator().manual_seed(99))
        own = torch.randn(n_images, *size, generator=torch.Generator().manual_seed(seed))
        self.targets = [n % n_classes for n in range(n_images)]
        self.classes = [f"class {t}" for t in range(n_classes)]
        self.transform = None
        self.images = (patterns[self.targets] + 0.7 * own).to(dtype)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


class CountingNetwork(nn.Module):
    """Counts the images that a network is run on."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.n_images = 0

    def forward(self, x):
        self.n_images += len(x)
        return self.network(x)


class Tokens(nn.Module):
    """(N, C, H, W) to a row of tokens, (N, H * W, C), or to a grid of them, (N, H, W, C)."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def forward(self, x):
        x = x.movedim(1, -1)
        return x if self.grid else x.flatten(1, 2)


class MeanToken(nn.Module):
    """Average over tokens, (N, ..., F) to (N, F)."""

    def forward(self, x):
        return x.flatten(1, -2).mean(1)


class PooledFeatures(nn.Module):
    """Average over all positions, (N, C, ...) to (N, C)."""

    def forward(self, x):
        return x.flatten(2).mean(2)


def randomise_batch_norms(network):
    """Give batch norms something to do: fresh ones are the identity."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value in (module.weight.data, module.running_var):
                value.uniform_(0.5, 1.5)
            for value in (module.bias.data, module.running_mean):
                value.uniform_(-0.2, 0.2)


def stack(*parts):
    return nn.Sequential(OrderedDict(parts))


def around(layer, *behind):
    """A network around a convolution of 6 input channels; by default an in-place ReLU behind it."""
    stem_kind, norm_kind, reshape = {
        1: (nn.Conv1d, nn.BatchNorm1d, nn.Flatten(2)),
        2: (nn.Conv2d, nn.BatchNorm2d, nn.Identity()),
        3: (nn.Conv3d, nn.BatchNorm3d, nn.Unflatten(3, (3, IMAGE_SIZE[2] // 3))),
    }[layer.weight.dim() - 2]
    return stack(
        ("reshape", reshape),
        ("stem", stem_kind(3, 6, 3, padding=1)),
        ("stem_norm", norm_kind(6)),
        ("stem_act", nn.ReLU(inplace=True)),
        ("layer", layer),
        ("behind", nn.Sequential(*behind) if behind else nn.ReLU(inplace=True)),
        ("pool", PooledFeatures()),
        ("head", nn.Linear(layer.out_channels, N_CLASSES)),
    )


def _linear_on_tokens(grid):
    parts = {
        **{"patches": nn.Conv2d(3, 6, 2), "tokens": Tokens(grid), "norm": nn.LayerNorm(6)},
        **{"layer": nn.Linear(6, 8), "act": nn.GELU()},
        **{"mean": MeanToken(), "head": nn.Linear(8, N_CLASSES)},
    }
    return stack(*parts.items())


def _linear_on_pooled(layer_is_head):
    stem, act, pool = nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), PooledFeatures()
    parts = [("stem", stem), ("stem_act", act), ("pool", pool)]
    if layer_is_head:
        return stack(*parts, ("layer", nn.Linear(6, N_CLASSES)))
    act, head = nn.ReLU(inplace=True), nn.Linear(8, N_CLASSES)
    return stack(*parts, ("layer", nn.Linear(6, 8, bias=False)), ("act", act), ("head", head))


class CallsByKeyword(nn.Module):
    """A network of the kind "1x1", "tokens" or alike that hands the layer its input by keyword."""

    def __init__(self, network):
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)

    def forward(self, x):
        for name, part in self.named_children():
            x = part(input=x) if name == "layer" else part(x)
        return x


class PadsSame(nn.Conv2d):
    """Pads on its own, with as many zeros as the size of the input asks for; never dilated."""

    def forward(self, x):
        pads = []
        for size, stride, n_taps in zip(x.shape[2:], self.stride, self.kernel_size, strict=True):
            n_positions = -(-size // stride)
            missing = max((n_positions - 1) * stride + n_taps - size, 0)
            pads = [missing // 2, missing - missing // 2, *pads]
        return super().forward(nn.functional.pad(x, pads))


KINDS = {
    "1x1": lambda: around(nn.Conv2d(6, 8, 1)),
    "3x3": lambda: around(nn.Conv2d(6, 8, 3)),
    "no bias": lambda: around(nn.Conv2d(6, 8, 1, bias=False)),
    "stride": lambda: around(nn.Conv2d(6, 8, 3, stride=2, bias=False)),
    "uneven": lambda: around(nn.Conv2d(6, 8, (3, 2), stride=(2, 3), padding=(2, 1))),
    "same": lambda: around(nn.Conv2d(6, 8, (4, 3), padding="same", dilation=(1, 2))),
    "dilation": lambda: around(nn.Conv2d(6, 8, 3, padding=1, dilation=(2, 1))),
    "reflect": lambda: around(nn.Conv2d(6, 8, 3, padding=(2, 1), padding_mode="reflect")),
    "circular": lambda: around(nn.Conv2d(6, 8, 3, 2, (1, 2), padding_mode="circular")),
    "replicate": lambda: around(nn.Conv2d(6, 8, 3, padding=2, padding_mode="replicate")),
    "groups": lambda: around(nn.Conv2d(6, 8, 3, padding=1, groups=2)),
    "batch norm behind": lambda: around(
        nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
    ),
    "one dimension": lambda: around(nn.Conv1d(6, 8, 5, stride=3, padding=2)),
    "three dimensions": lambda: around(nn.Conv3d(6, 8, (1, 3, 2), padding=(0, 1, 0), groups=2)),
    "transposed": lambda: around(nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, bias=False)),
    "transposed, uneven": lambda: around(
        nn.ConvTranspose2d(6, 8, (3, 2), (2, 3), (2, 0), (1, 2), groups=2, dilation=(2, 1))
    ),
    "transposed, one dimension": lambda: around(nn.ConvTranspose1d(6, 8, 4, 2, 1, dilation=3)),
    "transposed, three dimensions": lambda: around(
        nn.ConvTranspose3d(6, 8, (1, 3, 2), (1, 2, 1), (0, 2, 1), groups=2)
    ),
    "pooled features": lambda: _linear_on_pooled(layer_is_head=False),
    "head": lambda: _linear_on_pooled(layer_is_head=True),
    "tokens": lambda: _linear_on_tokens(grid=False),
    "grid of tokens": lambda: _linear_on_tokens(grid=True),
    "pads by size": lambda: around(PadsSame(6, 8, (3, 5), stride=(2, 3), groups=2)),
}


def build(kind, dtype=torch.float64, seed=0):
    """A network of a kind with random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * seed + zlib.crc32(kind.encode()) % 1000)
        network = KINDS[kind]()
        randomise_batch_norms(network)
    return network.to(dtype).eval()


def layer_input(network, images):
    """What reaches the layer, (N, ...)."""
    seen = []
    handle = network.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with handle, torch.no_grad():
        network(images)
    return seen[0]


class Unlabelled(Dataset):
    """Images with a stand-in for a label, and no list of labels."""

    def __init__(self, n_images, label=UNLABELLED):
        self.inner, self.label = SyntheticImages(n_images), label

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index][0], self.label


class WithBroken(SyntheticImages):
    broken = (3,)

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("cannot identify picture-3.jpg")
        return super().__getitem__(index)
