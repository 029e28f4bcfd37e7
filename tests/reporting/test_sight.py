"""What part of a picture a network sees, told from the transform alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

from unbraid.networks.models import imagenet_transform
from unbraid.reporting.pictures import Sight, measure_sight, sight_of

TENSOR = v2.PILToTensor()
FLOAT = v2.ToDtype(torch.float32, scale=True)
NORMAL = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

SEEN = {
    "ImageNet's": imagenet_transform(),
    "a square in the middle": v2.Compose([TENSOR, v2.Resize(64), v2.CenterCrop(40), FLOAT]),
    "squeezed": v2.Compose([TENSOR, v2.Resize((48, 96)), FLOAT, NORMAL]),
    "as it is": v2.Compose([TENSOR, FLOAT]),
    "smaller": v2.Compose([TENSOR, v2.Resize(50)]),
    "grey": v2.Compose([v2.Grayscale(), TENSOR, v2.Resize((28, 28))]),
    "a wide part": v2.Compose([TENSOR, v2.Resize(100), v2.CenterCrop((60, 90))]),
    "a picture": lambda picture: picture.resize((30, 30)),
}
UNSEEN = {
    "random": v2.Compose([TENSOR, v2.RandomResizedCrop(64)]),
    "turned": v2.Compose([TENSOR, v2.RandomRotation((30, 30))]),
    "mirrored": v2.Compose([TENSOR, v2.RandomHorizontalFlip(1.0)]),
    "a corner": lambda picture: picture.crop((0, 0, 100, 100)),
    "black": lambda picture: torch.zeros(3, 8, 8),
    "fails": lambda picture: 1 / 0,
}


def place_picture(width: int, height: int) -> Image.Image:
    """A picture whose pixels tell where they are."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((255 * np.stack([x, y, 0 * x], 2)).round().astype(np.uint8))


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("size", [(320, 200), (210, 300), (256, 256)])
def test_the_part_cut_out_is_what_the_transform_shows(name: str, size: tuple[int, int]) -> None:
    transform = SEEN[name]
    sight = measure_sight(transform)
    assert sight is not None
    picture = place_picture(*size)
    seen = sight(picture)
    made = transform(picture)
    shape = made.size[::-1] if isinstance(made, Image.Image) else tuple(made.shape[-2:])
    assert seen.width / seen.height == pytest.approx(shape[1] / shape[0], rel=0.03)
    if name in ("grey", "ImageNet's", "squeezed"):
        return  # their values are not places
    values = np.asarray(made, dtype=np.float64)
    values = values if isinstance(made, Image.Image) else values.transpose(1, 2, 0)
    values = values / (255 if values.max() > 1 else 1)
    mine = np.asarray(seen.resize(shape[::-1]), dtype=np.float64) / 255
    assert np.abs(values - mine)[2:-2, 2:-2].max() < 0.03


@pytest.mark.parametrize("name", UNSEEN)
def test_of_anything_else_nothing_is_said(name: str) -> None:
    assert measure_sight(UNSEEN[name]) is None


def test_another_part_would_be_seen() -> None:
    cut, whole = (measure_sight(SEEN[name]) for name in ("a square in the middle", "grey"))
    assert cut is not None
    assert cut.width == pytest.approx(40 / 64, abs=0.01)
    assert whole == Sight(ratio=1.0)


class Folder(Dataset[Any]):
    def __init__(self, transform: Any, size: tuple[int, int] = (8, 8)) -> None:
        self.transform, self.size = transform, size

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3, 8, 8), 0

    def picture(self, index: int) -> Image.Image:
        return Image.new("RGB", self.size)


def test_of_data_sets() -> None:
    class Tensors(Dataset[Any]):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.zeros(3, 8, 8), 0

    assert sight_of(Tensors()) == Sight()  # what is shown is what the network is given
    assert sight_of(Folder(None)) == Sight()
    assert sight_of(Folder(None, size=(9, 8))) is None
    known = Sight(0.875, 0.875, 1.0)
    assert sight_of(Subset(Folder(known), [1])) == known
    assert Sight(**known.to_dict()) == known
    assert sight_of(Folder(imagenet_transform())) == measure_sight(imagenet_transform())
