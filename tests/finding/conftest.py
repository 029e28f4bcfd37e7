"""Networks of several kinds, scanned, with what the oracle says of them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import unbraid
from checks import truth_of
from tiny_networks import SyntheticImages, build


@pytest.fixture(scope="session", params=["3x3", "groups", "batch norm behind", "tokens"])
def case(request, tmp_path_factory):
    network, images = build(request.param), SyntheticImages(42, n_classes=6)
    network.head = nn.Linear(network.head.in_features, 6).double()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        network.head.weight.copy_(torch.randn(network.head.weight.shape, generator=generator))
        network.head.bias.zero_()
    folder = tmp_path_factory.mktemp("scan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbraid.scanning.scan.images_per_shard", lambda _: 16)  # so, three shards
        scan = unbraid.scan(network, "layer", images, folder, batch_size=16)
    assert scan.manifest.n_shards == 3
    truth = truth_of(network, images)
    return SimpleNamespace(network=network, images=images, scan=scan, truth=truth)
