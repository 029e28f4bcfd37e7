"""Networks of every kind, each beside what it is with concept channels."""

from functools import cached_property, partial

import torch
import ways
from torch import nn

import oracle
import structures
import unbraid
from checks import assert_close
from tiny_networks import KINDS, CallsByKeyword, SyntheticImages, build, layer_input
from unbraid.networks.copying import unwrap
from unbraid.networks.layers import bias_of, describe, resolve_layer, weight_rows
from unbraid.networks.weights import hash_weights
from unbraid.splitting.splits import ChannelSplit, Split

TWO = {1: [[0], [1]], 0: [[2, 0], [3]], 3: [[3], [1, 2]]}  # two concepts each
THREE = {2: [[0], [1, 3], [2]], 0: [[3], [0]]}  # three in one channel, two in another
VALUES = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0], dtype=torch.float64)  # one per image
CONCEPTS = [(channel, k) for channel, concepts in TWO.items() for k in range(len(concepts))]
NETWORKS = {
    **{kind: partial(build, kind) for kind in KINDS},
    **{f"built in: {kind}": partial(structures.build, kind) for kind in structures.STRUCTURES},
    **{f"reached: {way}": partial(ways.reaching, way) for way in ways.WAYS},
    "by keyword": lambda: CallsByKeyword(build("3x3")),
    "tokens by keyword": lambda: CallsByKeyword(build("tokens")),
}


def images(n_images=5, dtype=torch.float64):
    return SyntheticImages(n_images, seed=7, dtype=dtype).images


def make_split(network, channels=TWO, layer="layer"):
    """A split with masks of all sizes between 0 and 1, since outputs must not depend on them."""
    network = unwrap(network)
    name, module = resolve_layer(network, layer)
    rows, bias = weight_rows(module).detach(), bias_of(module)
    generator = torch.Generator().manual_seed(3)

    def divide(channel, concepts):
        masks = 1.5 * torch.rand(len(concepts), rows.shape[1], generator=generator) - 0.25
        named = tuple(tuple(sorted(concept)) for concept in concepts)
        masks = masks.clamp(0, 1).to(rows)
        return ChannelSplit(channel, named, masks, rows[channel], float(bias[channel]), info={})

    return Split(
        layer=describe(name, module),
        weights=hash_weights(network),
        method="published",
        settings={"tau": 0.03, "p": 0.75, "gamma": 0.5},
        class_names=tuple(f"class {n}" for n in range(4)),
        channels=tuple(divide(channel, channels[channel]) for channel in sorted(channels)),
    )


def split_network(network, **options):
    return unbraid.apply(network, make_split(network, **options))


def layer_output(network, x, layer="layer"):
    """What leaves the layer, copied before the next module can write into it."""
    seen = []
    module = network.get_submodule(layer)
    with module.register_forward_hook(lambda _m, _a, output: seen.append(output.detach().clone())):
        network(x)
    return seen[0]


class Pair:
    def __init__(self, kind, channels=TWO, dtype=torch.float64, channels_last=False):
        self.network, self.dtype = build(kind, dtype), dtype
        if channels_last and any(isinstance(one, nn.Conv2d) for one in self.network.modules()):
            self.network.to(memory_format=torch.channels_last)
        self.split = make_split(self.network, channels)
        self.changed = unbraid.apply(self.network, self.split)

    @cached_property
    def plain(self):
        return unbraid.apply(self.network, self.split, form="plain")

    @property
    def dim(self):
        """Where the channels are in the layer's output."""
        return -1 if isinstance(self.network.layer, nn.Linear) else 1

    def images(self):
        return images(dtype=self.dtype)

    def concept_map(self, channel, concept):
        """z_k of every image by the oracle, (N, P); of the rest, what they lack to the whole."""
        part, inputs = self.split[channel], layer_input(self.network, self.images())

        def channel_map(row):
            maps = [oracle.channel_map(self.network.layer, channel, row, one) for one in inputs]
            return torch.stack(maps).double()

        if concept == "rest":
            return channel_map(part.weight) - sum(map(channel_map, part.rows))
        return channel_map(part.rows[concept])

    def change(self):
        """What differs in the layer's output, (C_out, N, P)."""
        x = self.images()
        change = layer_output(self.changed, x) - layer_output(self.network, x)
        return change.movedim(self.dim, 0).unsqueeze(2).flatten(2)


def assert_moved(pair, channel, concept, wanted):
    """The concept channel answers as wanted, (N, P), and no other channel is touched."""
    z_k = pair.concept_map(channel, concept)
    assert not torch.allclose(wanted, z_k)  # else the test could not tell
    change = pair.change()
    assert_close(change[channel], wanted - z_k)
    for o in range(len(change)):
        if o not in TWO:
            assert not change[o].any()
        elif o != channel:
            assert float(change[o].abs().max()) <= 1e-12
