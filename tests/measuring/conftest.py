"""A network of each kind, a split of it, and a scan of other images; each made once."""

import functools
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from torch import nn

import oracle
import unbraid
from checks import truth_of
from tiny_networks import SyntheticImages, build
from unbraid import Scan, Split


@dataclass(eq=False)
class Case:
    network: nn.Module
    split: Split  # with masks of all sizes between 0 and 1, as least squares gives
    scan: Scan  # of other images than the split was made from
    images: SyntheticImages
    layer: str

    @cached_property
    def truth(self):
        return truth_of(self.network, self.images, self.layer)

    @cached_property
    def logits(self):
        return [oracle.layer_io(self.network, self.layer, x)[2] for x in self.images.images]

    @functools.cache  # noqa: B019
    def logits_without(self, channel, k):
        """The oracle's logits of each image with a concept channel or the rest off, or all."""
        part = self.split[channel]
        row = None if k is None else part.weight - part.rows.sum(0) if k == "rest" else part.rows[k]
        n_biases = len(part.rows) if k == "rest" else 0
        return [
            oracle.ablated_logits(self.network, self.layer, image, channel, row, n_biases)
            for image in self.images.images
        ]


def make_case(kind, folder, *, layer="layer", n_images=13, **scan):
    network = build(kind) if isinstance(kind, str) else kind
    train = unbraid.scan(network, layer, SyntheticImages(12), folder / "train")
    n_out = train.layer.n_out
    channels = {1: [[0], [1]], n_out - 2: [[2, 0], [3]], n_out - 1: [[3], [0, 1], [2]]}
    found = unbraid.find(train, channels=channels)
    split = unbraid.split(train, found, method="published", rho=0.8)
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(part.masks.shape, generator=generator).double() for part in split.channels]
    parts = [replace(part, masks=m) for part, m in zip(split.channels, masks, strict=True)]
    images = SyntheticImages(n_images, seed=1)
    options = {"positions": True, "batch_size": 6, **scan}
    val = unbraid.scan(network, layer, images, folder / "val", **options)
    return Case(network, replace(split, channels=tuple(parts)), val, images, layer)


@pytest.fixture(scope="session")
def case_of(tmp_path_factory):
    """The case of a kind of tiny network or of a network; the same one each time it is asked."""

    @functools.cache
    def case(kind, **options):
        return make_case(kind, tmp_path_factory.mktemp("case"), **options)

    return case


@pytest.fixture(scope="session")
def case(case_of):
    return case_of("reflect")


@pytest.fixture(scope="session")
def other_weights(case_of):
    """As `case`, of a network with other weights."""
    return case_of(build("reflect", seed=1))
