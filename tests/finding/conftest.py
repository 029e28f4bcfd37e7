"""Networks of several kinds, scanned, with what the oracle says of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import unbraid
from checks import Truth, truth_of
from tiny_networks import SyntheticImages, build


@dataclass
class Case:
    """A network of six classes, whose layer "layer" was scanned."""

    network: nn.Module
    images: SyntheticImages
    scan: unbraid.Scan
    truth: Truth

    def responses(self, channel: int) -> list[float]:
        return [float(z[channel].mean()) for z in self.truth.z]

    def relevance(self, channel: int) -> Tensor:
        return self.truth.input_relevance[:, channel]


@pytest.fixture(scope="session", params=["3x3", "groups", "batch norm behind", "tokens"])
def case(request, tmp_path_factory) -> Case:
    network, images = build(request.param), SyntheticImages(42, n_classes=6)
    network.head = nn.Linear(network.head.in_features, 6).double()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        network.head.weight.copy_(torch.randn(network.head.weight.shape, generator=generator))
        network.head.bias.zero_()
    folder = tmp_path_factory.mktemp("scan")
    scan = unbraid.scan(network, "layer", images, folder, batch_size=16)
    return Case(network, images, scan, truth_of(network, images))
