"""Labels, groups and names of any data set: what is seen inside others, what is not claimed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sources import scanned, write
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import unbraid
from tiny_networks import SyntheticImages
from unbraid.base.errors import DataError
from unbraid.images.dataset import class_names_of, groups_of, labels_of, picture_of
from unbraid.images.identity import fingerprint, ids_of, preprocessing_of
from unbraid.images.which import name_of
from unbraid.scanning.as_scanned import AsScanned

NAMES = ("ant", "bee", "cat", "dog")
TO_FLOAT = v2.ToDtype(torch.float32, scale=True)


class Wrapped(Dataset):
    def __init__(self, subset, transform=None):
        self.subset, self.how = subset, transform  # under whatever name

    def __len__(self):
        return len(self.subset)

    def __getitem__(self, index):
        image, label = self.subset[index]
        return (image if self.how is None else self.how(image)), label


class SubsetWith(Subset):
    def __init__(self, dataset, indices, transform):
        super().__init__(dataset, indices)
        self.transform = transform

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return self.transform(image), label

    __getitems__ = None  # which torch asks for


class Delegating(Dataset):
    def __init__(self, inner, by=0.0):
        self.inner, self.by = inner, by

    def __getattr__(self, name):
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        image, label = self.inner[index]
        return image + self.by, label


class Reversed(Delegating):
    def __getitem__(self, index):
        return self.inner[len(self) - 1 - index]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return [write(root / part, dict.fromkeys(NAMES, 6)) for part in ("one", "two")]


def transform(other):
    return v2.Compose([v2.ToImage(), TO_FLOAT, *([v2.RandomInvert(1.0)] if other else [])])


def listed(root, other=False):
    return ImageFolder(root, transform(other))


def joined(*folders, other=False):
    return ConcatDataset([listed(folder, other) for folder in folders])


# From two folders, and whether the preprocessing is another one.
NESTED = {
    "none": lambda a, _, o: listed(a, o),
    "split of a split": lambda a, _, o: Subset(Subset(listed(a, o), range(22)), [19, 3, 8, 0, 15]),
    "part of two": lambda a, b, o: Subset(joined(a, b, other=o), range(9, 40)),
    "two of which one differs": lambda a, b, o: ConcatDataset([listed(a), listed(b, o)]),
    "two in two": lambda a, b, o: ConcatDataset([joined(a, b, other=o), listed(a, o)]),
    "wrapper": lambda a, _, o: Wrapped(Subset(ImageFolder(a), range(20)), transform(o)),
    "part with a transform": lambda a, _, o: SubsetWith(ImageFolder(a), range(20), transform(o)),
    "delegating": lambda a, _, o: Delegating(listed(a), 0.5 * o),
    "reversed": lambda a, _, o: Reversed(listed(a, o)),
}


@pytest.mark.parametrize("kind", NESTED)
def test_what_is_claimed_of_images_at_any_depth_is_true_of_them(kind, folders):
    dataset, same, other = (NESTED[kind](*folders, o) for o in (False, False, True))
    labels = [dataset[k][1] for k in range(len(dataset))]
    assert labels_of(dataset) == labels
    assert class_names_of(dataset) == (() if "reversed" in kind else NAMES)
    prints = [(fingerprint(one, labels), preprocessing_of(one)) for one in (dataset, same, other)]
    assert prints[0] == prints[1] != prints[2]
    if kind != "delegating":  # whose images alone tell
        assert prints[0][1] != prints[2][1]
    ids = ids_of(dataset)
    assert ids is None or len(set(ids)) == len(dataset)
    for index in (0, len(dataset) // 2, len(dataset) - 1):
        name = name_of(dataset, index)
        assert picture_of(dataset, index) is None
        assert (name == f"image {index}") == (ids is None)
        if ids is not None:
            assert torch.equal(dataset[index][0], transform(False)(Image.open(name)))
            assert ids[index].endswith("/".join(Path(name).parts[-2:]))


def test_ids_of_one_source_stay_those_of_two_are_told_apart_and_empty_parts_passed_over(folders):
    one, other = map(listed, folders)
    assert ids_of(Subset(Subset(one, range(9)), [8, 0])) == ["bee/2.png", "ant/0.png"]
    assert ids_of(Subset(one, [6, 6])) is None  # one image twice has no id of its own
    both = ids_of(ConcatDataset([one, other]))
    assert both == [f"{k}/{name}" for k in (0, 1) for name in ids_of(one)]
    parts = ConcatDataset([Subset(one, [0]), Subset(other, [5])])
    assert ids_of(parts) == ["ant/0.png", "ant/5.png"]
    assert ids_of(Wrapped(one)) is ids_of(Reversed(one)) is ids_of(SyntheticImages(4)) is None
    some, none = listed(folders[0]), Subset(listed(folders[1]), [])
    both = ConcatDataset([none, some, none])
    assert (labels_of(both), class_names_of(both)) == (some.targets, NAMES)
    assert ids_of(both) == ids_of(some)
    some.groups = [0] * 12 + [1] * 12
    assert groups_of(both) == some.groups
    assert preprocessing_of(both) == preprocessing_of(some)


def test_class_names_that_contradict_each_other_are_refused(folders, tmp_path):
    both = ConcatDataset([listed(folders[0]), listed(write(tmp_path, {"ant": 6, "cow": 6}))])
    with pytest.raises(DataError, match="label 1 'bee' and 'cow'"):
        class_names_of(Subset(both, range(3)))
    assert class_names_of(ConcatDataset([SyntheticImages(4), SyntheticImages(5)])) == tuple(
        f"class {t}" for t in range(4)
    )


@pytest.mark.parametrize("labels", [np.array(NAMES), np.eye(4, dtype=np.float32)])
def test_labels_are_read_where_only_what_makes_them_is_listed(labels, folders):
    dataset = Wrapped(listed(folders[0]))
    dataset.labels = labels.repeat(6, 0)
    assert labels_of(dataset) == labels_of(Subset(dataset, range(24))) == dataset.subset.targets


def test_groups_of_parts_are_joined_by_text_and_told_apart_by_number():
    parts = [SyntheticImages(3), SyntheticImages(3), SyntheticImages(2)]
    both = ConcatDataset(parts)
    for texts, numbers, groups in (
        (["x", "y", "x"], ["y", "z", "z"], [0, 1, 0, 1, 2, 2, 3, 4]),
        ([7, 8, 7], torch.tensor([7, 7, 9]), [0, 1, 0, 2, 2, 3, 4, 5]),
    ):
        parts[0].groups, parts[1].groups = texts, numbers
        assert groups_of(both) == groups_of(Subset(both, range(8))) == groups
    assert groups_of(ConcatDataset([SyntheticImages(2)])) is None


def test_our_own_wrappers_are_seen_through(folders):
    images = Subset(unbraid.open_images(str(folders[0]), transform=transform(False)), range(20))
    relabelled = unbraid.images.dataset.Relabelled(images, {0: 3, 19: 1})
    labels = [3, *labels_of(images)[1:19], 1]
    assert labels_of(relabelled) == relabelled.targets == labels
    assert [relabelled[k][1] for k in range(len(relabelled))] == labels
    assert torch.equal(relabelled[19][0], images[19][0])
    assert ids_of(relabelled) == ids_of(images)
    moved = AsScanned(images, {0: 5, 1: 4}, {0: "ant/5.png", 1: "ant/4.png", 2: "gone"})
    for dataset in (images, relabelled, moved):
        assert class_names_of(dataset) == NAMES
        assert preprocessing_of(dataset) == repr(transform(False))
    assert picture_of(moved, 0).tobytes() == picture_of(images, 5).tobytes()
    assert (name_of(moved, 1), name_of(moved, 2)) == ("ant/4.png", "gone")


def ten(**told):
    dataset = Wrapped(SyntheticImages(10))
    vars(dataset).update(told)
    return dataset


def test_lists_that_fit_are_taken_and_those_that_do_not_are_refused(tmp_path):
    for told, match in (
        ({"targets": [0, 1, 2]}, "targets are 3 for 10 images"),
        ({"targets": None, "labels": [0] * 3}, "labels are 3 for 10 images"),
        *(({"targets": [*range(9), odd]}, "image 9") for odd in (None, "cat", 0.5, 2**70)),
        ({"ids": [*range(10)], "sizes": [1] * 4}, "sizes are 4 for 10 images"),
        ({"root": "/", "samples": [("/a", 0)]}, "samples are 1 for 10 images"),
        ({"groups": [[1]] * 10}, r"groups cannot be compared \(unhashable"),
        ({"groups": 7}, "groups are a int; give a list"),
        ({"ids": [f"\ud800{k}" for k in range(10)]}, "cannot be written as UTF-8"),
        ({"ids": [*"abcdefghi", None]}, "NoneType"),
        ({"ids": ["1", 1, *range(2, 10)]}, "Two images have the id '1'"),
    ):
        dataset = ten(**told)
        with pytest.raises(DataError, match=match):
            scanned(dataset, tmp_path / "scan")
        assert not (tmp_path / "scan").exists()
        if "targets" in told:
            with pytest.raises(DataError, match=match):
                labels_of(Subset(dataset, [0, 1]))
    ids = ["\udc80"] + [f"é{k}" for k in range(9)]
    dataset = ten(groups=["a", "b"] * 5, ids=ids, sizes=[1] * 10)
    assert labels_of(dataset) == [k % 4 for k in range(10)]
    assert groups_of(dataset) == [0, 1] * 5
    assert ids_of(dataset) == ids
    assert ids_of(ten(ids=torch.arange(10))) == [str(k) for k in range(10)]
    assert fingerprint(dataset, labels_of(dataset)) != fingerprint(ten(), labels_of(dataset))
