"""Lists whose images have several labels: a line for each, and an item."""

import pytest
import torch
from sources import to_tensor
from torch.utils.data import ConcatDataset, Subset

import unbraid
from tiny_networks import build
from unbraid.base.errors import DataError, UsageError
from unbraid.images.open import images_like, open_images
from unbraid.images.several_labels import refuse_several, repeats
from unbraid.images.sources import part_of

LINES = ["ant/0.png,a", "ant/1.png,b", "ant/0.png,b", "bee/0.png,a", "./ant/1.png,c", "bee/1.png,c"]
ITEMS = [
    *(("ant/0.png as a", 0), ("ant/0.png as b", 1), ("ant/1.png as b", 1), ("ant/1.png as c", 2)),
    *(("bee/0.png", 0), ("bee/1.png", 2)),
]
SHOWN = [0, 0, 1, 1, 2, 3]


def write(folder, lines, header="path,label", name="list.csv"):
    (folder / name).write_text("\n".join([header, *lines]))
    return folder / name


@pytest.mark.parametrize("kept", [False, True])
def test_an_image_on_several_lines_is_an_item_for_each_of_its_labels(folder, kept, tmp_path):
    listed = tmp_path / "kept.safetensors" if kept else None
    images = open_images(write(folder, LINES), to_tensor, listed=listed)
    assert list(zip(images.ids, images.targets, strict=True)) == ITEMS
    assert images.classes == ["a", "b", "c"]
    assert repeats(images, range(6)) == {1, 3}
    assert repeats(images, [5, 3, 2]) == {2}
    for n, k in enumerate(SHOWN):
        assert images.groups[n] == ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"][k]
        assert torch.equal(images[n][0], images[SHOWN.index(k)][0])
    scan = unbraid.scan(build("3x3"), "layer", images, tmp_path / "a", target="multilabel")
    (records,) = scan.shards()
    assert torch.equal(
        records.group[:, None] == records.group, torch.tensor(SHOWN)[:, None] == torch.tensor(SHOWN)
    )
    places = unbraid.scan(
        build("3x3"), "layer", images, tmp_path / "b", target="multilabel", places=100
    ).places
    assert {int(n) for own in places.shards() for n in own.image.unique()} == {0, 2, 4, 5}


def test_a_division_keeps_the_items_of_an_image_together(folder):
    lines = [
        f"{own}/{k}.png,{t}" for own, n in (("ant", 5), ("bee", 3)) for k in range(n) for t in "xy"
    ]
    where = str(write(folder, lines))
    train = open_images(part_of(where, "train"), to_tensor)
    val = images_like(train, part_of(where, "val"))
    assert len(train) + len(val) == 16
    assert not set(train.groups) & set(val.groups)
    assert val.labels == train.labels


def test_groups_of_a_list_go_on_and_lists_without_repeats_are_as_ever(folder):
    grouped = [f"{line},{'g' if 'ant' in line else 'h'}" for line in LINES]
    images = open_images(write(folder, grouped, "path,label,group"))
    assert list(images.groups[:4]) == ["g"] * 4
    assert repeats(images, range(6)) == {1, 3}
    plain = open_images(write(folder, LINES[:2]))
    assert (list(plain.ids), plain.groups) == (["ant/0.png", "ant/1.png"], None)
    assert repeats(plain, range(2)) == frozenset()


REFUSED = {
    "one label twice": (["ant/0.png,a", "ant/0.png,a"], {}, "names ant/0.png a second time; name"),
    "one number twice": (["ant/0.png,1", "ant/0.png,01", "ant/1.png,0"], {}, "are one class; name"),
    "a classifier": (LINES, {"target": "label"}, "several labels; use target='multilabel' for"),
    "predicted": (LINES, {"labels": "predicted"}, "for each label, and labels='given', or name"),
    "none": (LINES, {"target": None, "labels": "none"}, "and labels='given', or name each"),
    "two groups": (["ant/0.png,a,1", "ant/0.png,b,2"], {}, "has ant/0.png in several groups; give"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_several_labels_that_do_not_go_together_are_told(case, folder, tmp_path):
    lines, options, words = REFUSED[case]
    file = write(folder, lines, "path,label,group" if case == "two groups" else "path,label")

    def scan(part):
        asked = {"target": "multilabel", **options}
        images = part(open_images(file, to_tensor))
        unbraid.scan(build("3x3"), "layer", images, tmp_path / "scan", **asked)

    for part in (lambda x: x, lambda x: Subset(x, range(len(x))), lambda x: ConcatDataset([x])):
        with pytest.raises((DataError, UsageError)) as error:
            scan(part)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "scan").exists()


def test_a_part_with_one_label_for_each_image_is_refused_nowhere(folder):
    images = open_images(write(folder, LINES), to_tensor)
    refuse_several(Subset(images, [0, 2, 4, 5, 5]), given=True, of_label=True)
