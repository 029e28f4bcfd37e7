"""Networks (float32) that do more than to compute logits of images: what a first look tells."""

import random

import numpy as np
import torch
import torch.ao.quantization
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_networks import N_CLASSES


class Small(nn.Module):
    def __init__(self, change=None, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layer = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, N_CLASSES)
        self.change = change
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def features(self, x):
        return self.layer(self.stem(x).relu()).relu().mean((2, 3))

    def forward(self, x):
        features = self.features(x)
        return self.head(features if self.change is None else self.change(self, features))


class Ends(Small):  # by changing the logits
    def forward(self, x):
        return self.change(self, self.head(self.features(x)))


class Begins(Small):  # by changing the images
    def forward(self, x):
        return self.head(self.features(self.change(self, x)))


class Loses(Small):  # the batch dimension of a single image
    def features(self, x):
        return self.layer(self.stem(x).relu().squeeze(0)).relu().mean((-2, -1))


def _normed(net, x):
    return net.norm(x)


def _cached(net, x):
    """As a transformer keeps keys: of the same images again they change nothing."""
    before, net.last = net.last, x.detach()
    return x if before is None or before.shape != x.shape else (x + before) / 2


def _banked(net, x):
    net.bank.append(x.detach().mean(0))
    return x - len(net.bank) * net.bank[0]


def _logged(net, x):
    net.log.append(x.mean().item())
    net.kept["x"] = x
    return x


def _lone_refused(_, x):
    if len(x) == 1:
        raise ValueError("give two or more")
    return x


def _in_half(net, x):
    return F.linear(x.half(), net.head.weight[:8, :8].half().repeat(2, 1)).float()


def _drawn(net, x):
    torch.rand(1), random.random(), np.random.rand()
    net.n.add_(1)
    return x


def _fails(net, x):
    net.mean.add_(1)
    raise RuntimeError("no")


def quantised():
    return torch.ao.quantization.quantize_dynamic(Small().eval(), {nn.Linear})


def frozen():
    network = Small()
    part = torch.jit.script(nn.Sequential(network.stem, nn.BatchNorm2d(6)).eval())
    network.stem = torch.jit.freeze(part)
    return network


def of_inference_mode():
    with torch.inference_mode():
        return Small(_normed, norm=nn.BatchNorm1d(8))


RANDOM = {
    "noise": lambda: Small(lambda _, x: x + 1e-4 * torch.randn_like(x)),
    "own": lambda: Small(lambda net, x: x + torch.randn(8, generator=net.g), g=torch.Generator()),
    "python": lambda: Small(lambda _, x: x * (1 + (random.random() < 0.4))),
    "numpy": lambda: Small(lambda _, x: x * (1 + np.random.rand())),
}
FOLLOWING = {
    "slow": lambda: Small(
        lambda net, x: x - net.mean.mul_(0.9999).add_(1e-4 * x.detach().mean(0)),
        mean=torch.zeros(8),
    ),
    "cache": lambda: Small(_cached, last=None),
    "list": lambda: Small(_banked, bank=[]),
}
MIXING = {
    "norm": lambda: Small(_normed, norm=nn.BatchNorm1d(8, track_running_stats=False)),
    "mean": lambda: Small(lambda _, x: x - x.mean(0)),
    "range": lambda: Begins(lambda _, x: (x - x.min()) / (x.max() - x.min())),
}
SOUND = {
    "half": lambda: Small(_in_half),
    "draws and counts": lambda: Small(_drawn, n=torch.zeros((), dtype=torch.int64)),
    "list": lambda: Ends(lambda _, x: [x]),
    "squeezed": lambda: Small(lambda _, x: x.squeeze()),
    "squeezed logits": lambda: Ends(lambda _, x: x.squeeze()),
    "logs": lambda: Small(_logged, log=[], kept={}),
    "writes": lambda: Begins(lambda _, x: x.sub_(0.5).mul_(2)),
    "unused": lambda: Small(
        lazy=nn.LazyLinear(3),
        meta=nn.Linear(3, 3, device="meta"),
        sparse=torch.eye(3).to_sparse(),
        complex=torch.ones(3, dtype=torch.complex64).conj(),
    ),
    "frozen": frozen,
    "inference": of_inference_mode,
}
TOLD = {
    "lone": (lambda: Small(_lone_refused), r"not on one image \(give two or more\)"),
    "quantised": (quantised, "depend on the other images"),  # a scale is taken from the batch
    "detached": (lambda: Small(lambda _, x: x.detach()), "a forward pass that detaches"),
    "another graph": (
        lambda: Small(lambda net, x: x.detach() + net.free, free=torch.ones(8).requires_grad_()),
        "does not reach the logits",
    ),
    "meta stem": (lambda: Small(stem=nn.Conv2d(3, 6, 3, device="meta")), "Conv2d .* meta device"),
    "lazy": (lambda: Small(lambda net, x: net.late(x), late=nn.LazyLinear(8)), "run it once"),
    "lost dimension": (Loses, "meets a single image as"),
    "failing": (lambda: Small(_fails, mean=torch.zeros(8)), r"\(no\)"),
}
REFUSED = {
    f"{kind} {name}": (make, sentence)
    for kind, makers, sentence in (
        ("random", RANDOM, "gives other outputs each time it runs"),
        ("following", FOLLOWING, "depend on the images that it ran on before"),
        ("mixing", MIXING, "depend on the other images of its batch"),
    )
    for name, make in makers.items()
} | TOLD
