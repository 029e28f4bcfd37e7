"""What identifies images: ids, fingerprints, and preprocessing as text."""

import functools
import re

import pytest
import torch
import torchvision.transforms as v1
from PIL import Image
from sources import MEMBERS, as_csv, as_tar, scanned, to_tensor
from torch import nn
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError, RunError
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import labels_of
from unbraid.images.identity import as_recorded, fingerprint, preprocessing_of
from unbraid.images.open import open_images
from unbraid.images.which import name_of
from unbraid.networks.models import imagenet_transform
from unbraid.scanning.as_scanned import as_scanned

TO_FLOAT = v2.ToDtype(torch.float32, scale=True)


def test_the_fingerprint_knows_ids_and_sizes(folder, tmp_path):
    images, *others = (open_images(as_tar(folder, MEMBERS), to_tensor) for _ in range(4))
    others[1].ids = images.ids[::-1]
    others[2].sizes = [images.sizes[0] + 1, *images.sizes[1:]]
    own = fingerprint(images, images.targets)
    same = [fingerprint(other, images.targets) == own for other in others]
    assert same == [True, False, False]
    scanned(open_images(as_csv(folder, MEMBERS), to_tensor), tmp_path / "scan")
    (folder / "bee/2.png").write_bytes((folder / "bee/2.png").read_bytes() + b"more")
    with pytest.raises(RunError, match="the images or labels"):
        scanned(open_images(folder / "list.csv", to_tensor), tmp_path / "scan")


def test_images_are_found_again_by_id_where_their_order_changed(folder, tmp_path, monkeypatch):
    images = open_images(as_csv(folder, MEMBERS), to_tensor)
    scan = scanned(images, tmp_path / "scan")
    monkeypatch.setattr(type(scan), "ids", None)  # in place, no dictionary of all is made
    assert as_scanned(images, scan) is images
    monkeypatch.undo()
    moved = as_scanned(Subset(images, [7, 3, 5, 0, 1, 6]), scan)  # 2 and 4 are gone
    assert len(moved) == 8
    for k in (0, 1, 3, 5, 6, 7):
        assert torch.equal(moved[k][0], images[k][0])
        assert moved[k][1] == images.targets[k] == labels_of(moved)[k]
    with pytest.raises(DataError, match=r"Image ant/2\.png is gone"):
        moved[2]
    assert (name_of(moved, 4), labels_of(moved)[4]) == ("ant/4.png", UNLABELLED)
    strangers = open_images(as_tar(folder, MEMBERS), to_tensor)
    assert as_scanned(strangers, scan) is strangers  # no id is known: places must do


class Drawn(SyntheticImages):
    generator = None

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + torch.randn(image.shape, generator=self.generator), label


def test_fingerprint_knows_images_but_for_what_is_drawn_anew_each_time():
    dataset = Drawn(20)
    for dataset.generator in (None, torch.Generator()):
        state = torch.get_rng_state()
        first = fingerprint(dataset, [0] * 20)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        assert fingerprint(dataset, [0] * 20) == first
    one, other = (fingerprint(SyntheticImages(20, seed=seed), [0] * 20) for seed in (1, 2))
    assert one != other


class Times(nn.Module):
    def __init__(self, k):
        super().__init__()
        self._k = k

    def forward(self, image):
        return TO_FLOAT(v2.functional.pil_to_tensor(image)) * self._k


def holding(k):
    kept = [{k}, v2.Resize(k), v2.functional.resize]
    return lambda image: [kept for _ in image]


# By a number, 1 or 2; the second is another transform.
HIDDEN = {
    "lambda inside": lambda k: v1.Lambda((lambda x: -x) if k > 1 else (lambda x: +x)),
    "closure": lambda k: lambda image: Times(k)(image),
    "partial": lambda k: functools.partial(v2.functional.adjust_gamma, gamma=k),
    "object": Times,
    "method": lambda k: Times(k).forward,
    "module inside": lambda k: v2.Compose([TO_FLOAT, Times(k)]),
    "number format": lambda k: v2.ToDtype((torch.float32, torch.float16)[k - 1]),
    "weights": lambda k: v2.LinearTransformation(k * torch.eye(126), torch.zeros(126)),
    "what is held": holding,
    "constants": lambda k: (lambda x: x in {1, 2}) if k > 1 else (lambda x: x in {1, 3}),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_preprocessing_of_sees_a_change_that_no_text_shows(kind, folder):
    one, again, other = (preprocessing_of(ImageFolder(folder, HIDDEN[kind](k))) for k in (1, 1, 2))
    assert one == again != other


def test_preprocessing_of_a_usual_transform_is_its_text_unless_the_loader_is_another(folder):
    for usual in (
        imagenet_transform(),
        v1.Compose([v1.Resize(8), v1.ToTensor(), v1.Normalize([0.5] * 3, torch.tensor([0.5] * 3))]),
        v2.Compose([v2.ToImage(), v2.RandAugment(), TO_FLOAT, v2.Normalize([0.5] * 3, [0.5] * 3)]),
    ):
        assert preprocessing_of(ImageFolder(folder, usual)) == repr(usual)
        other = ImageFolder(folder, usual, loader=lambda path: Image.open(path).convert("L"))
        assert preprocessing_of(other) != repr(usual)


def test_a_scan_of_an_earlier_version_goes_on_with_a_warning(folder, tmp_path):
    network = unbraid.with_logits(build("1x1", torch.float32), lambda logits: +logits)
    dataset = ImageFolder(folder, Times(2))
    unbraid.scan(network, "layer", dataset, tmp_path, threads=1)
    file = tmp_path / "manifest.json"
    file.write_text(re.sub(r" \[code \w+\]", "", file.read_text()))
    (tmp_path / "shard-000000.safetensors").unlink()
    with pytest.warns(UserWarning, match="make sure that it is still the same") as told:
        scan = unbraid.scan(network, "layer", dataset, tmp_path, threads=1)
    whose = [str(one.message).partition("changes of ")[2].partition(" own")[0] for one in told]
    assert whose == ["a transform's", "with_logits'"]
    assert scan.manifest.preprocessing == "Times()"
    assert scan.manifest.output.endswith("<lambda>")
    assert not as_recorded(preprocessing_of(dataset), "something else")
