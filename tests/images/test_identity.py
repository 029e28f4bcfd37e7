"""What identifies images: ids, fingerprints, and preprocessing as text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.transforms as v1
from PIL import Image
from sources import MEMBERS, as_csv, as_tar, rows, to_tensor
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError, RunError
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import labels_of, name_of
from unbraid.images.identity import as_recorded, fingerprint, ids_of, preprocessing_of
from unbraid.images.open import open_images
from unbraid.networks.models import imagenet_transform
from unbraid.scanning.records import Scan
from unbraid.scanning.scan import as_scanned

PATHS = [path for path, *_ in rows(MEMBERS)]
TO_FLOAT = v2.ToDtype(torch.float32, scale=True)


def scanned(images: Any, out: Path, **options: Any) -> Scan:
    return unbraid.scan(build("3x3"), "layer", images, out, batch_size=3, **options)


def from_csv(folder: Path) -> Any:
    return open_images(as_csv(folder, MEMBERS), to_tensor)


def transform(other: bool) -> v2.Compose:
    return v2.Compose([v2.ToImage(), TO_FLOAT, *([v2.RandomInvert(1.0)] if other else [])])


class WithIds(SyntheticImages):
    def __init__(self, ids: Any) -> None:
        super().__init__(4)
        self.ids = ids


def test_ids_are_those_of_the_source(folder):
    images = open_images(folder)
    assert ids_of(images) == PATHS
    assert ids_of(Subset(images, [6, 0])) == ["bee/1.png", "ant/0.png"]
    assert ids_of(Subset(images, [6, 6])) is None  # one image twice has no id of its own
    assert ids_of(SyntheticImages(4)) is None
    assert ids_of(WithIds(torch.arange(4))) == ["0", "1", "2", "3"]
    assert name_of(Subset(images, [6]), 0) == str(folder / "bee/1.png")


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (["a", "b", "a", "c"], "Two images have the id 'a'"),
        (["a", "b"], "ids are 2 for 4 images"),
        (["a", "b", "c", None], "NoneType"),
        (["1", 1, "2", "3"], "Two images have the id '1'"),
    ],
)
def test_ids_that_name_no_image_or_two_are_told_before_anything_is_written(ids, told, tmp_path):
    with pytest.raises(DataError, match=told):
        scanned(WithIds(ids), tmp_path / "scan")
    assert not (tmp_path / "scan").exists()


def test_the_fingerprint_knows_ids_and_sizes(folder, tmp_path):
    images = open_images(as_tar(folder, MEMBERS), to_tensor)
    before = fingerprint(images, images.targets)
    assert fingerprint(open_images(as_tar(folder, MEMBERS), to_tensor), images.targets) == before
    images.ids[0], images.ids[1] = images.ids[1], images.ids[0]
    assert fingerprint(images, images.targets) != before
    images = open_images(as_tar(folder, MEMBERS), to_tensor)
    images.sizes[3] += 1
    assert fingerprint(images, images.targets) != before
    scanned(from_csv(folder), tmp_path / "scan")
    (folder / "bee/2.png").write_bytes((folder / "bee/2.png").read_bytes() + b"more")
    with pytest.raises(RunError, match="the images or labels"):
        scanned(from_csv(folder), tmp_path / "scan")


class Picked(Dataset[Any]):
    """Some of a source's images, in another order."""

    def __init__(self, inner: Any, places: list[int]) -> None:
        self.inner, self.places = inner, places
        self.ids = [inner.ids[k] for k in places]
        self.targets = [inner.targets[k] for k in places]
        self.classes = inner.classes

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.inner[self.places[index]]

    def picture(self, index: int) -> Image.Image:
        return self.inner.picture(self.places[index])


def test_images_are_found_again_by_id_where_their_order_changed(folder, tmp_path):
    images = from_csv(folder)
    scan = scanned(images, tmp_path / "scan")
    assert as_scanned(images, scan) is images
    moved = as_scanned(Picked(images, [7, 3, 5, 0, 1, 6]), scan)  # 2 and 4 are gone
    assert len(moved) == 8
    for k in (0, 1, 3, 5, 6, 7):
        assert torch.equal(moved[k][0], images[k][0])
        assert moved[k][1] == images.targets[k] == labels_of(moved)[k]
        assert moved.picture(k).tobytes() == images.picture(k).tobytes()
    for read in (moved.__getitem__, moved.picture):
        with pytest.raises(DataError, match=r"Image ant/2\.png is gone"):
            read(2)
    assert name_of(moved, 4) == "ant/4.png"
    assert moved.classes == list(MEMBERS)
    assert labels_of(moved)[4] == UNLABELLED
    strangers = open_images(as_tar(folder, MEMBERS), to_tensor)
    assert as_scanned(strangers, scan) is strangers  # no id is known: places must do


# --- transforms that hide what they do ------------------------------------------------------------

FACTOR = 3.0


class Times:
    def __init__(self, k: float) -> None:
        self.k = k

    def __call__(self, image: Any) -> Tensor:
        return v2.functional.to_dtype(v2.functional.to_image(image), scale=True) * self.k


class TimesModule(nn.Module):
    def __init__(self, k: float) -> None:
        super().__init__()
        self._k = k

    def forward(self, image: Tensor) -> Tensor:
        return image * self._k


def times(image: Any, k: float) -> Tensor:
    return Times(k)(image)


def closed(k: float) -> Callable[[Any], Tensor]:
    return lambda image: times(image, k)


def grey(path: str) -> Image.Image:
    return Image.open(path).convert("L").convert("RGB")


HIDDEN: dict[str, Callable[[bool], dict[str, Any]]] = {
    "lambda inside": lambda o: {
        "transform": v1.Compose([v1.ToTensor(), v1.Lambda((lambda x: -x) if o else (lambda x: +x))])
    },
    "closure": lambda o: {"transform": closed(1 + o)},
    "partial": lambda o: {"transform": functools.partial(times, k=1 + o)},
    "object": lambda o: {"transform": Times(1 + o)},
    "method": lambda o: {"transform": Times(1 + o).__call__},
    "module inside": lambda o: {
        "transform": v2.Compose([*transform(False).transforms, TimesModule(1 + o)])
    },
    "number format": lambda o: {
        "transform": v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float16 if o else torch.float32, scale=True)]
        )
    },
    "weights": lambda o: {
        "transform": v2.Compose(
            [
                *transform(False).transforms,
                v2.LinearTransformation((1 + o) * torch.eye(126), torch.zeros(126)),
            ]
        )
    },
    "loader": lambda o: {"transform": transform(False), **({"loader": grey} if o else {})},
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_change_that_no_text_of_a_transform_shows_is_seen(kind, folder):
    def text(other: bool) -> str:
        return preprocessing_of(Subset(ImageFolder(folder, **HIDDEN[kind](other)), range(3)))

    assert text(False) == text(False)
    assert text(False) != text(True)


@pytest.mark.parametrize(
    "usual",
    [
        imagenet_transform(),
        v1.Compose([v1.Resize(8), v1.ToTensor(), v1.Normalize([0.5] * 3, torch.tensor([0.5] * 3))]),
        v2.Compose([v2.ToImage(), v2.RandAugment(), TO_FLOAT, v2.Normalize([0.5] * 3, [0.5] * 3)]),
    ],
)
def test_a_usual_transform_is_recorded_as_it_always_was(usual, folder):
    assert preprocessing_of(ImageFolder(folder, usual)) == repr(usual)


def test_a_scan_of_an_earlier_version_goes_on_with_a_warning(folder, tmp_path):
    network, dataset = build("1x1", torch.float32), ImageFolder(folder, Times(2))
    unbraid.scan(network, "layer", dataset, tmp_path, threads=1)
    file = tmp_path / "manifest.json"
    (code,) = {word for word in preprocessing_of(dataset).split() if word.endswith("]")}
    file.write_text(file.read_text().replace(f" [code {code}", ""))
    (tmp_path / "shard-000000.safetensors").unlink()
    with pytest.warns(UserWarning, match="make sure that it is still the same"):
        scan = unbraid.scan(network, "layer", dataset, tmp_path, threads=1)
    assert scan.manifest.preprocessing == "custom"
    assert not as_recorded(preprocessing_of(dataset), "something else")


def test_images_that_are_drawn_anew_each_time_are_the_same_data(folder):
    class Drawn(SyntheticImages):
        def __init__(self, own: bool) -> None:
            super().__init__(20)
            self.generator = torch.Generator() if own else None
            if own:
                self.generator.seed()

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            image, label = super().__getitem__(index)
            return image + torch.randn(image.shape, generator=self.generator), label

    for own in (False, True):
        prints = set()
        for _ in range(3):
            state = torch.get_rng_state()
            prints.add(fingerprint(Drawn(own), Drawn(own).targets))
            assert torch.equal(torch.get_rng_state(), state)
            torch.rand(3)
        assert len(prints) == 1
    assert fingerprint(SyntheticImages(20, seed=1), [0] * 20) != fingerprint(
        SyntheticImages(20, seed=2), [0] * 20
    )
