"""Labels, groups and names of any data set: what is seen inside others, what is not claimed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sources import write
from torch.utils.data import ConcatDataset, Dataset, Subset, random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import unbraid
from tiny_networks import SyntheticImages, Unlabelled, build
from unbraid.base.errors import DataError, RunError
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import (
    Relabelled,
    class_names_of,
    groups_of,
    labels_of,
    name_of,
    picture_of,
)
from unbraid.images.identity import fingerprint, ids_of, preprocessing_of
from unbraid.scanning.scan import AsScanned

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
    return write(tmp_path_factory.mktemp("images"), dict.fromkeys(NAMES, 6))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("more"), dict.fromkeys(NAMES, 6))


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
    "split of a split": lambda a, _, o: random_split(
        random_split(listed(a, o), [20, 4], seeded())[0], [15, 5], seeded()
    )[0],
    "two": lambda a, b, o: ConcatDataset([listed(a, o), listed(b, o)]),
    "part of two": lambda a, b, o: Subset(
        ConcatDataset([listed(a, o), listed(b, o)]), range(9, 40)
    ),
    "two of which one differs": lambda a, b, o: ConcatDataset([listed(a, False), listed(b, o)]),
    "two in two": lambda a, b, o: ConcatDataset(
        [ConcatDataset([listed(a, o), listed(b, o)]), Subset(listed(a, o), range(5))]
    ),
    "wrapper": lambda a, _, o: Wrapped(Subset(raw(a), range(20)), invert(o)),
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
    assert scan.manifest.class_names == (NAMES if kind != "reversed" else ())
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
    others = write(tmp_path, {"ant": 6, "cow": 6})
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
    assert picture_of(moved, 0).tobytes() == picture_of(images, 5).tobytes()
    assert (name_of(moved, 1), name_of(moved, 2)) == ("ant/4.png", "gone")


# --- other labels for the same images -------------------------------------------------------------


def predictions(kind: str, dataset: Dataset[Any]) -> list[int]:
    with torch.no_grad():
        logits = [build(kind)(dataset[n][0][None])[0] for n in range(len(dataset))]
    return [int(row.argmax()) for row in logits]


def test_a_relabelled_data_set_is_the_data_set_but_for_labels():
    inner = SyntheticImages(6)
    other = Relabelled(inner, {0: 3, 5: 2})
    assert len(other) == 6
    assert labels_of(other) == other.targets == [3, 1, 2, 3, 0, 2]
    assert [label for _, label in (other[n] for n in range(6))] == other.targets
    assert all(torch.equal(other[n][0], inner[n][0]) for n in range(6))
    assert other.classes == inner.classes
    assert inner.targets == [0, 1, 2, 3, 0, 1]
    assert labels_of(Relabelled(Subset(inner, [4, 5]), {1: 7})) == [0, 7]


def test_accuracy_is_unknown_without_labels_and_counts_only_images_that_have_one():
    network = build("3x3")
    none = unbraid.compare_outputs(network, network, Unlabelled(6))
    assert (none.top1_agreement, none.top1_before, none.top1_after) == (1.0, None, None)
    some = SyntheticImages(6)
    right = predictions("3x3", some)
    some.targets = [right[0], (right[1] + 1) % 4, *[UNLABELLED] * 4]
    compared = unbraid.compare_outputs(network, network, some)
    assert (compared.top1_before, compared.top1_after) == (0.5, 0.5)


@pytest.mark.parametrize("label", [None, "cat", torch.tensor([0, 1]), 0.5, float("inf"), 2**70])
def test_a_listed_label_that_is_no_number_is_told(label):
    listed = SyntheticImages(3)
    listed.targets = [0, 1, label]
    with pytest.raises(DataError, match="image 2"):
        labels_of(listed)


# --- lists that do not fit ------------------------------------------------------------------------


class Ten(SyntheticImages):
    """Ten images, whatever is told of them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(10)
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], index % 4


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"targets": [0, 1, 2]}, "targets are 3 for 10 images"),
        ({"targets": None, "labels": [0] * 3}, "labels are 3 for 10 images"),
        ({"ids": [*range(10)], "sizes": [1] * 4}, "sizes are 4 for 10 images"),
        ({"root": "/", "samples": [("/a", 0)]}, "samples are 1 for 10 images"),
        ({"groups": [[1]] * 10}, r"groups cannot be compared \(unhashable"),
        ({"ids": [f"\ud800{k}" for k in range(10)]}, "cannot be written as UTF-8"),
    ],
)
def test_lists_that_do_not_fit_the_images_are_refused(told, match, tmp_path):
    dataset = Ten(**told)
    with pytest.raises(DataError, match=match):
        unbraid.scan(build("3x3"), "layer", dataset, tmp_path / "scan")
    assert not (tmp_path / "scan").exists()
    if "labels" not in match and "targets" not in match:
        return
    with pytest.raises(DataError, match=match):
        labels_of(Subset(dataset, [0, 1]))


def test_lists_that_fit_are_taken():
    dataset = Ten(
        groups=["a", "b"] * 5, ids=["\udc80"] + [f"é{k}" for k in range(9)], sizes=[1] * 10
    )
    assert labels_of(dataset) == [k % 4 for k in range(10)]
    assert groups_of(dataset) == [0, 1] * 5
    assert ids_of(dataset) == dataset.ids
    assert fingerprint(dataset, labels_of(dataset)) != fingerprint(Ten(), labels_of(dataset))
