"""Sources that are not divided: which images are for validation, by a formula of its own."""

import shutil
import unicodedata
import warnings

import numpy as np
import pytest
import sources
from sources import SOURCES, fraction, to_tensor

from unbraid.base.errors import DataError
from unbraid.images.broken import UNLABELLED
from unbraid.images.division import for_validation
from unbraid.images.identity import hash_of
from unbraid.images.open import open_images
from unbraid.images.sources import part_of

MEMBERS = {"ant": 30, "bee": 20, "cow": 2, "doe": 1}
FIFTH = 0.2


def test_hash_of_is_what_sha256sum_says_whatever_the_form_of_unicode():
    for name in ("ant/1.png", "tree/\xe9l\xe8ve.png", "", "a" * 300):
        for form in ("NFC", "NFD"):
            own = unicodedata.normalize(form, name)
            assert hash_of(own) / 2**64 == fraction(unicodedata.normalize("NFC", name))
    assert hash_of("\udcff.png") != hash_of("\udcfe.png")  # bytes that are no text


def opened(source, part, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_images(f"{source}/{part}", to_tensor, **options)


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind not in ("rows", "odd csv")])
def test_open_images_divides_any_source_by_its_ids(kind, tmp_path):
    folder = sources.write(tmp_path / "images", MEMBERS)
    if kind == "folder of tars":
        source = sources.write_shards(folder, MEMBERS, 20, 33)
        for number in range(2):
            (source / f"train-{number:03d}.tar").rename(source / f"{number}.tar")
    else:
        source = SOURCES[kind][0](folder, MEMBERS)
    whole = open_images(source, to_tensor)
    with pytest.warns(
        UserWarning,
        match=f"{str(source).removeprefix('hf:')} has no train and val, so .* about a fifth",
    ):
        train = open_images(f"{source}/train", to_tensor)
    val = opened(source, "val")
    assert train.labels == val.labels == whole.labels
    index = {one: k for k, one in enumerate(whole.ids)}
    assert sorted(index[one] for one in train.ids + val.ids) == list(range(len(whole)))
    for images in (train, val):
        for (picture, label), place in zip(images, (index[one] for one in images.ids), strict=True):
            assert label == whole.targets[place]
            assert picture.equal(whole[place][0])
    drawn = {one for one in whole.ids if fraction(one) < FIFTH}
    small = whole.labels["cow"], whole.labels["doe"]
    moved = {whole.targets[index[one]] for one in drawn.symmetric_difference(val.ids)}
    assert moved <= set(small)  # only small classes are helped
    assert [train.targets.count(k) for k in small] == [1, 1]
    assert [val.targets.count(k) for k in small] == [1, 0]


def test_division_is_the_same_wherever_the_folder_lies_and_with_classes_or_without(tmp_path):
    folder = sources.write(tmp_path / "a", MEMBERS)
    held_out = opened(folder, "val").ids
    moved = shutil.move(folder, tmp_path / "elsewhere")
    (moved / "ant/.hidden.png").touch()
    assert opened(moved, "val").ids == held_out == opened(moved, "val", labels={}).ids
    for path in list(moved.glob("*/*.png")):
        path.rename(moved / f"{path.parent.name}-{path.name}")
    for name in MEMBERS:
        shutil.rmtree(moved / name)
    plain = opened(moved, "val")
    assert set(plain.targets) == {UNLABELLED}
    assert plain.ids == [
        one for one in opened(moved, "train").ids + plain.ids if fraction(one) < FIFTH
    ]


def test_for_validation_keeps_groups_together_and_helps_small_classes():
    groups = [f"photo {k // 4}" for k in range(400)]
    held_out = for_validation(groups, np.arange(400) % 2)
    assert held_out.tolist() == [fraction(group) < FIFTH for group in groups]
    low = [f"{k}" for k in range(99) if fraction(f"{k}") < FIFTH]
    high = [f"{k}" for k in range(99) if fraction(f"{k}") >= FIFTH]
    for names, expected in (
        (low[:3], set(low[:3]) - {max(low[:3], key=fraction)}),  # all were for validation
        (high[:3], {min(high[:3], key=fraction)}),  # none was
        (low[:1], set()),  # alone
        (high[:1], set()),
    ):
        for order in (names, names[::-1]):
            got = for_validation(order, np.zeros(len(order)))
            assert {name for name, own in zip(order, got, strict=True) if own} == expected
    assert not for_validation(low[:1] * 2, np.arange(2)).any()  # a group of two classes


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["train/ant/0.png"], "holds train but no val; add that, or name"),
        (["val2017/0.png", "train2017/0.png"], "holds train2017 but no (train|val)"),
        (["shards/validation-0001.tar", "shards/x.tar"], "holds validation-0001.tar but no"),
        (["ant/0.png", "bee/0.png"], "a class needs two images, and"),
        (["ant/0.png", "1.png"], "not plain whether the folders are classes"),
    ],
)
def test_source_that_cannot_be_divided_is_told(names, told, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    root = tmp_path / "shards" if "shards" in names[0] else tmp_path
    for part in ("val", "train") if "train/" not in names[0] else ("val",):
        with pytest.raises(DataError, match=told):
            opened(root, part)


def test_part_of_names_what_is_divided(tmp_path, monkeypatch):
    sources.write(tmp_path, MEMBERS)
    monkeypatch.chdir(tmp_path)
    assert part_of(".", "val") == "./val"
    assert len(opened(".", "val")) == len(opened(tmp_path, "val"))
    assert part_of("https://host/a.tar", "val") == "https://host/a.tar/val"
    assert part_of("list.csv", "train") == "list.csv/train"
    with pytest.raises(DataError, match="There is no folder train"):
        open_images("train")  # in a folder that is not named
