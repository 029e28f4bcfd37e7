"""Tiny float64 networks of every way in which "layer" can be built in, and what is true of them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import oracle
from tiny_networks import N_CLASSES, SyntheticImages


class Around(nn.Module):
    """A stem, a body with the layer, and a head on what is averaged over positions."""

    def __init__(self, layer=None, n_logits=N_CLASSES, n_features=6):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layer = nn.Conv2d(6, 6, 3, padding=1) if layer is None else layer
        self.head = nn.Linear(n_features, n_logits)

    def body(self, x):
        return self.layer(x).relu_()

    def forward(self, x):
        return self.head(self.body(self.stem(x)).flatten(2).mean(2))


def _body(body, n_features=6):
    """A network with a body of its own."""
    return lambda: type("Own", (Around,), {"body": body})(n_features=n_features)


def _overwriting(self, x):
    """A residual block that adds what the layer computes to the layer's own input."""
    x += self.layer(x)
    return x.relu_()


def _on_two_sizes(self, x):
    """Both runs lead to the head, one on a smaller map."""
    small = self.layer(F.avg_pool2d(x, 2)).relu_()
    return self.layer(x).relu_() + small.mean((2, 3), keepdim=True)


def _in_frames(self, x):
    halves = x.unflatten(3, (2, 3)).movedim(3, 1)  # (N, 2, C, H, 3)
    return self.layer(halves.flatten(0, 1)).relu_().unflatten(0, (-1, 2)).sum(1)


class Tokens(Around):
    """A block of a transformer, on tokens in the shape that `shape` gives them."""

    def __init__(self, shape):
        super().__init__(nn.Linear(6, 10))
        self.shape, self.norm, self.back = shape, nn.LayerNorm(6), nn.Linear(10, 6)

    def body(self, x):
        tokens = x.flatten(2).mT
        mixed = tokens + F.scaled_dot_product_attention(tokens, tokens, tokens)
        mlp = self.back(F.gelu(self.layer(self.shape(self.norm(mixed)))))
        return (mixed + mlp.reshape(mixed.shape)).mT


class Checkpointed(Around):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def block(self, x):
        return (self.layer(x).sigmoid() * 2).sin()

    def body(self, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return checkpoint(self.block, x, use_reentrant=self.reentrant)


class Standardised(nn.Conv2d):
    def forward(self, x):
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / std, self.bias)


def _standardised(layer):
    return torch.stack([(row - row.mean()) / row.std() for row in layer.weight])


def _new_norm(layer):
    made = layer.parametrizations.weight
    rows = zip(made.original0, made.original1, strict=True)
    return torch.stack([g * v / v.square().sum().sqrt() for g, v in rows])


def _new_spectral(layer):
    made = layer.parametrizations.weight
    return made.original / (made[0]._u @ made.original.flatten(1) @ made[0]._v)


def _old_spectral(layer):
    return layer.weight_orig / (layer.weight_u @ layer.weight_orig.flatten(1) @ layer.weight_v)


def _normed(norm):
    return lambda: Around(norm(nn.Conv2d(6, 6, 3, padding=1)))


@dataclass
class Structured:
    build: Callable[[], nn.Module]
    weight: Callable[[nn.Module], Tensor] | None = None  # how the layer computes its weights
    once: bool = True  # the layer runs once on each image, on a whole
    differentiable: bool = True  # torch can take gradients by the image


STRUCTURES = {
    "plain": Structured(Around),
    "in place": Structured(_body(_overwriting), differentiable=False),
    "concatenated": Structured(_body(lambda net, x: torch.cat([x, net.layer(x)], 1).relu_(), 12)),
    "added": Structured(_body(lambda self, x: (x + self.layer(x)).relu())),
    "runs again": Structured(
        _body(lambda net, x: net.layer(net.layer(x).relu_()).relu_()), once=False
    ),
    "two sizes": Structured(_body(_on_two_sizes), once=False),
    "frames": Structured(_body(_in_frames), once=False),
    "tokens": Structured(lambda: Tokens(lambda x: x)),
    "windows": Structured(lambda: Tokens(lambda x: x.reshape(len(x) * 6, 7, 6))),
    "flat tokens": Structured(lambda: Tokens(lambda x: x.flatten(0, 1))),
    "grid of windows": Structured(lambda: Tokens(lambda x: x.reshape(len(x), 2, 3, 7, 6))),
    "checkpointed": Structured(lambda: Checkpointed(False)),
    "checkpointed, reentrant": Structured(lambda: Checkpointed(True), differentiable=False),
    "standardised": Structured(lambda: Around(Standardised(6, 6, 3)), _standardised),
    "weight norm": Structured(_normed(parametrizations.weight_norm), _new_norm),
    "spectral norm": Structured(_normed(parametrizations.spectral_norm), _new_spectral),
    "old spectral norm": Structured(_normed(nn.utils.spectral_norm), _old_spectral),
}


def build(kind):
    """A network of a kind with random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return STRUCTURES[kind].build().double().eval()


def trace(kind, image, label):
    """Add up pooled input (G, J), relevance (C_out,) and n_positions over all runs on an image."""
    network = build(kind)
    layer = bare_layer(kind, network)
    calls = []

    def keep(_module, args, output):
        calls.append((args[0].detach().clone(), output))
        return output.clone()

    if isinstance(network, Checkpointed):
        network.body = network.block
    with network.layer.register_forward_hook(keep):
        logit = network(image[None])[0, label]
    gradients = torch.autograd.grad(logit, [z for _, z in calls])
    pooled, relevance, n_positions = 0.0, 0.0, 0
    for (x, z), gradient in zip(calls, gradients, strict=True):
        for part, own, slope in zip(x, z.detach(), gradient, strict=True):
            pooled = pooled + oracle.pooled_input(layer, part)
            relevance = relevance + oracle._by_channel(layer, own * slope).sum(1)
            n_positions += oracle._by_channel(layer, own).shape[1]
    return pooled, relevance, n_positions


def bare_layer(kind, network):
    """The layer with its computed weights written down."""
    made, old = STRUCTURES[kind].weight, network.layer
    if made is None:
        return old
    layer = nn.Conv2d(6, 6, 3, padding=old.padding).double().eval()
    with torch.no_grad():
        layer.weight.copy_(made(old))
        layer.bias.copy_(old.bias)
    return layer


def images(n_images=8):
    return SyntheticImages(n_images)
