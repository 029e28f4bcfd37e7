"""Small networks that are no classifiers, each with a "layer", and what can be asked of them."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from tiny_networks import SyntheticImages


class Body(nn.Module):
    """A stem and the layer, on which a head works; what comes out is a head's affair."""

    def __init__(self, put_out, n_out=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.layer = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Conv2d(8, n_out, 1)
        self.put_out = put_out

    def forward(self, x):
        return self.put_out(self.head(self.layer(self.stem(x)).relu()))


def mean(maps):
    return maps.flatten(2).mean(2)


@dataclass
class Encoded:
    pooler_output: torch.Tensor
    last_hidden_state: torch.Tensor


def boxes(maps):
    """Some boxes for each image, of another number in each: those with a positive first logit."""
    found = []
    for own in maps:
        rows = own.flatten(1).T
        rows = rows[rows[:, 0] > rows[:, 0].median()][: 1 + int(own.detach().sum().abs() * 7) % 5]
        scores = rows.softmax(1)
        found.append({"boxes": rows[:, :4], "labels": scores.argmax(1), "scores": scores.amax(1)})
    return found


def as_tuple(maps):
    return mean(maps), {"inner": [maps, maps.argmax(1)]}


OUTPUTS = {
    "map": lambda maps: maps,
    "dictionary": lambda maps: OrderedDict(out=maps, aux=maps * 2),
    "boxes": boxes,
    "embedding": mean,
    "encoder": lambda maps: Encoded(mean(maps), maps.flatten(2)),
    "pose": lambda maps: mean(maps)[:, :4].unflatten(1, (2, 2)),
    "one number": lambda maps: mean(maps)[:, 0],
    "tuple": as_tuple,
}


def build(kind, seed=1):
    torch.manual_seed(seed)
    return Body(OUTPUTS[kind]).double().eval()


def images(n=9, **options):
    return SyntheticImages(n, size=(3, 8, 8), **options)


# By kind of network, a target by name and what it must be of one image's output, (1, ...).
def _won(maps, c):
    return (maps[:, c] * (maps.argmax(1) == c)).sum()


def _scores(found, c):
    return found[0]["scores"][found[0]["labels"] == c].sum()


NAMED = {
    "map": ("segmentation:1", lambda out: _won(out, 1)),
    "dictionary": ("segmentation:3", lambda out: _won(out["out"], 3)),
    "boxes": ("detection:2", lambda out: _scores(out, 2)),
    "pose": ("regression:2", lambda out: out[0, 1, 0]),
    "one number": ("regression:0", lambda out: out[0]),
    "tuple": (lambda out: out[1]["inner"][0].square().mean((1, 2, 3)), None),
}
