"""Data sets inside data sets: what is seen through them, and what is not claimed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError, RunError
from unbraid.images.dataset import (
    Relabelled,
    class_names_of,
    groups_of,
    labels_of,
    name_of,
    picture_of,
)
from unbraid.images.identity import as_recorded, fingerprint, ids_of, preprocessing_of
from unbraid.networks.models import imagenet_transform
from unbraid.reporting.pictures import Sight, sight_of
from unbraid.scanning.records import AsScanned

NAMES = ("ant", "bee", "cat", "dog")
TO_FLOAT = v2.ToDtype(torch.float32, scale=True)


class Wrapped(Dataset):
    """As people write them: a part of a data set, with a transform of its own."""

    def __init__(self, subset: Any, transform: Any = None) -> None:
        self.subset, self.transform = subset, transform

    def __len__(self) -> int:
        return len(self.subset)

    def __getitem__(self, index: int) -> Any:
        image, label = self.subset[index]
        return (image if self.transform is None else self.transform(image)), label


class OddlyNamed(Wrapped):
    def __init__(self, base: Any, how: Any) -> None:
        super().__init__(base)
        self.how = how

    def __getitem__(self, index: int) -> Any:
        image, label = self.subset[index]
        return self.how(image), label


class SubsetWith(Subset):
    def __init__(self, dataset: Any, indices: Any, transform: Any) -> None:
        super().__init__(dataset, indices)
        self.transform = transform

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return self.transform(image), label

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Delegating(Wrapped):
    """Passes on whatever it does not have."""

    def __getattr__(self, name: str) -> Any:
        if name == "subset":
            raise AttributeError(name)
        return getattr(self.subset, name)


class Reversed(Delegating):
    def __getitem__(self, index: int) -> Any:
        return self.subset[len(self) - 1 - index]


class Brighter(Delegating):
    def __init__(self, subset: Any, by: float) -> None:
        super().__init__(subset)
        self.by = by

    def __getitem__(self, index: int) -> Any:
        image, label = self.subset[index]
        return image + self.by, label


class Coarse(Wrapped):
    def __getitem__(self, index: int) -> Any:
        image, label = self.subset[index]
        return image, label // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), NAMES)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("more"), NAMES)


def make_folder(root: Path, names: tuple[str, ...]) -> Path:
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir()
        for k in range(6):
            pixels = generator.integers(0, 256, (7, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root


def transform(other: bool) -> v2.Compose:
    return v2.Compose([v2.ToImage(), TO_FLOAT, *([v2.RandomInvert(1.0)] if other else [])])


def invert(other: bool) -> v2.Compose:
    return v2.Compose([TO_FLOAT, *([v2.RandomInvert(1.0)] if other else [])])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def listed(root: Path, other: bool) -> Dataset:
    return ImageFolder(root, transform(other))


def raw(root: Path) -> Dataset:
    return ImageFolder(root, v2.ToImage())


# From two folders, and whether the preprocessing is another one.
NESTED: dict[str, Callable[[Path, Path, bool], Dataset]] = {
    "none": lambda a, _, o: listed(a, o),
    "part": lambda a, _, o: Subset(listed(a, o), range(20)),
    "part of a part": lambda a, _, o: Subset(Subset(listed(a, o), range(20)), range(3, 18)),
    "three deep": lambda a, _, o: Subset(
        Subset(Subset(listed(a, o), range(22)), torch.arange(20)), np.arange(18)
    ),
    "split of a split": lambda a, _, o: random_split(
        random_split(listed(a, o), [20, 4], seeded())[0], [15, 5], seeded()
    )[0],
    "two": lambda a, b, o: ConcatDataset([listed(a, o), listed(b, o)]),
    "two parts": lambda a, b, o: ConcatDataset(
        [Subset(listed(a, o), range(9)), Subset(listed(b, o), range(5, 20))]
    ),
    "part of two": lambda a, b, o: Subset(
        ConcatDataset([listed(a, o), listed(b, o)]), range(9, 40)
    ),
    "two of which one differs": lambda a, b, o: ConcatDataset([listed(a, False), listed(b, o)]),
    "two in two": lambda a, b, o: ConcatDataset(
        [ConcatDataset([listed(a, o), listed(b, o)]), Subset(listed(a, o), range(5))]
    ),
    "wrapper": lambda a, _, o: Wrapped(Subset(raw(a), range(20)), invert(o)),
    "wrapper without a transform": lambda a, _, o: Wrapped(Subset(listed(a, o), range(20))),
    "part of a wrapper": lambda a, _, o: Subset(Wrapped(raw(a), invert(o)), range(1, 20)),
    "wrappers in two": lambda a, b, o: ConcatDataset(
        [Wrapped(raw(a), invert(o)), Wrapped(raw(b), invert(o))]
    ),
    "another name": lambda a, _, o: OddlyNamed(Subset(raw(a), range(20)), invert(o)),
    "part with a transform": lambda a, _, o: SubsetWith(raw(a), range(20), invert(o)),
    "delegating": lambda a, _, o: Brighter(listed(a, False), 0.5 * o),
    "reversed": lambda a, _, o: Reversed(listed(a, o)),
}


@pytest.mark.parametrize("kind", NESTED)
def test_a_scan_sees_labels_names_and_preprocessing_at_any_depth(kind, folder, second, tmp_path):
    network, make = build("1x1", torch.float32), NESTED[kind]
    dataset = make(folder, second, False)
    labels = [dataset[k][1] for k in range(len(dataset))]
    assert labels_of(dataset) == labels
    scan = unbraid.scan(network, "layer", dataset, tmp_path, threads=1)
    assert scan.manifest.class_names == NAMES
    assert [int(n) for records in scan.shards() for n in records.label] == labels
    unbraid.scan(network, "layer", make(folder, second, False), tmp_path, threads=1)
    with pytest.raises(RunError, match="scan of something else"):
        unbraid.scan(network, "layer", make(folder, second, True), tmp_path, threads=1)
    if kind != "delegating":  # whose images tell, but no transform
        assert preprocessing_of(dataset) != preprocessing_of(make(folder, second, True))


@pytest.mark.parametrize("kind", NESTED)
def test_what_is_claimed_of_an_image_is_true_of_it(kind, folder, second):
    dataset = NESTED[kind](folder, second, False)
    ids = ids_of(dataset)
    assert ids is None or len(set(ids)) == len(dataset)
    for index in (0, len(dataset) // 2, len(dataset) - 1):
        name, picture = name_of(dataset, index), picture_of(dataset, index)
        assert picture is None
        if name != f"image {index}":
            shown = transform(False)(Image.open(name))
            assert torch.equal(dataset[index][0], shown)
            assert ids is not None
            assert ids[index].lstrip("01/").endswith(f"{Path(name).parent.name}/{Path(name).name}")
        else:
            assert ids is None


def test_ids_of_one_source_stay_and_those_of_two_are_told_apart(folder, second):
    one, other = listed(folder, False), listed(second, False)
    assert ids_of(Subset(Subset(one, range(9)), [8, 0])) == ["bee/2.png", "ant/0.png"]
    both = ids_of(ConcatDataset([one, other]))
    assert both == [f"{k}/{name}" for k in (0, 1) for name in ids_of(one)]
    parts = ConcatDataset([Subset(one, [0]), Subset(other, [5])])
    assert ids_of(parts) == ["ant/0.png", "ant/5.png"]
    assert ids_of(Wrapped(one)) is ids_of(Reversed(one)) is None


def test_names_that_contradict_each_other_are_refused(folder, tmp_path):
    others = make_folder(tmp_path, ("ant", "cow"))
    both = ConcatDataset([listed(folder, False), listed(others, False)])
    with pytest.raises(DataError, match="label 1 'bee' and 'cow'"):
        class_names_of(Subset(both, range(3)))
    assert class_names_of(Coarse(listed(folder, False))) == ()  # which has labels of its own
    assert class_names_of(ConcatDataset([SyntheticImages(4), SyntheticImages(5)])) == (
        *(f"class {t}" for t in range(4)),
    )


class Kept(Wrapped):
    """Keeps what it read."""

    def __init__(self, subset: Any, by: int = 1) -> None:
        super().__init__(subset)
        self.cache: dict[int, Any] = {}
        self.by = by

    def __getitem__(self, index: int) -> Any:
        if index not in self.cache:
            image, label = self.subset[index]
            self.cache[index] = image, label // self.by
        return self.cache[index]


@pytest.mark.parametrize(("by", "names"), [(1, NAMES), (2, ())])
def test_names_are_seen_through_what_keeps_images_however_often_it_was_read(by, names, folder):
    kept = Kept(listed(folder, False), by)
    assert [class_names_of(kept) for _ in range(3)] == [names] * 3
    _ = [kept[k] for k in range(len(kept))]
    assert class_names_of(Subset(kept, range(9))) == names


def test_labels_that_torchvision_changes_are_those_of_the_images(folder, tmp_path):
    outputs = [207, 3, 3, 4]  # of classes by place: two of them mean one output
    dataset = ImageFolder(folder, transform(False), target_transform=lambda k: outputs[k])
    assert labels_of(dataset) == [dataset[k][1] for k in range(len(dataset))]
    names = class_names_of(Subset(dataset, [0, 23]))
    assert (len(names), names[207], names[3], names[4]) == (208, NAMES[0], "", NAMES[3])


def test_a_part_without_images_is_passed_over(folder, second):
    some, none = listed(folder, False), Subset(listed(second, False), [])
    both = ConcatDataset([none, some, none])
    assert (labels_of(both), class_names_of(both)) == (some.targets, NAMES)
    assert ids_of(both) == ids_of(some)
    some.groups = [0] * 12 + [1] * 12
    assert groups_of(both) == some.groups
    assert preprocessing_of(both) == preprocessing_of(some)


class OfTable(Wrapped):
    """Keeps what it makes labels of, as in many notebooks."""

    def __init__(self, subset: Any, labels: Any) -> None:
        super().__init__(subset)
        self.labels = labels


@pytest.mark.parametrize(
    "labels",
    [
        np.array(NAMES).repeat(6),
        np.eye(4, dtype=np.float32).repeat(6, 0),
        [name for name in NAMES for _ in range(6)],
    ],
)
def test_labels_are_read_where_only_what_makes_them_is_listed(labels, folder):
    dataset = OfTable(listed(folder, False), labels)
    assert labels_of(dataset) == labels_of(Subset(dataset, range(24))) == dataset.subset.targets


@pytest.mark.parametrize("inside", [True, False])
def test_groups_of_parts_are_joined_by_text_and_told_apart_by_number(inside):
    parts = [SyntheticImages(3), SyntheticImages(3), SyntheticImages(2)]
    parts[0].groups, parts[1].groups = ["x", "y", "x"], ["y", "z", "z"]
    both: Dataset = ConcatDataset(parts)
    if inside:
        both = Subset(both, range(8))
    assert groups_of(both) == [0, 1, 0, 1, 2, 2, 3, 4]
    parts[0].groups, parts[1].groups = [7, 8, 7], torch.tensor([7, 7, 9])
    assert groups_of(both) == [0, 1, 0, 2, 2, 3, 4, 5]
    assert groups_of(ConcatDataset([SyntheticImages(2)])) is None


def test_our_own_wrappers_are_seen_through(folder):
    images = Subset(unbraid.open_images(str(folder), transform=transform(False)), range(20))
    relabelled = Relabelled(images, {0: 3})
    assert labels_of(relabelled)[:2] == [3, 0]
    assert ids_of(relabelled) == ids_of(images)
    moved = AsScanned(images, {0: 5, 1: 4}, {0: "ant/5.png", 1: "ant/4.png", 2: "gone"})
    for dataset in (images, relabelled, moved):
        assert class_names_of(dataset) == NAMES
        assert preprocessing_of(dataset) == repr(transform(False))
        assert sight_of(dataset) == Sight()
    assert picture_of(moved, 0).tobytes() == picture_of(images, 5).tobytes()
    assert (name_of(moved, 1), name_of(moved, 2)) == ("ant/4.png", "gone")


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
    "lambda": lambda o: {"transform": (lambda x: Times(1)(x)) if o else (lambda x: Times(2)(x))},
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


def test_a_change_of_what_a_function_refers_to_is_seen(folder, monkeypatch):
    dataset = ImageFolder(folder, lambda image: times(image, FACTOR))
    before = preprocessing_of(dataset)
    monkeypatch.setitem(globals(), "FACTOR", 4.0)
    assert preprocessing_of(dataset) != before


@pytest.mark.parametrize(
    "usual",
    [
        imagenet_transform(),
        v1.Compose([v1.Resize(8), v1.ToTensor(), v1.Normalize([0.5] * 3, torch.tensor([0.5] * 3))]),
        v2.Compose([v2.ToImage(), v2.RandAugment(), TO_FLOAT, v2.Normalize([0.5] * 3, [0.5] * 3)]),
        v1.Compose([v1.RandomResizedCrop(8), v1.ColorJitter(0.1), v1.ToTensor()]),
        nn.AvgPool2d(2),
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
