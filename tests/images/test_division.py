"""Sources that are not divided: which images are for validation, by a formula of its own."""

import json
import shutil
import subprocess
import unicodedata
import warnings

import pytest
import sources
from sources import SOURCES, to_tensor

import unbraid
from unbraid.base.errors import DataError
from unbraid.images.broken import UNLABELLED
from unbraid.images.division import for_validation
from unbraid.images.identity import hash_of, ids_of
from unbraid.images.open import open_images, part_of

MEMBERS = {"ant": 30, "bee": 20, "cow": 2, "doe": 1}
FIFTH = 0.2


def fraction(name):
    """As anyone would compute it: the first 16 hexadecimal digits of `printf NAME | sha256sum`."""
    said = subprocess.run(["sha256sum"], input=name.encode(), capture_output=True, check=True)
    return int(said.stdout[:16], 16) / 16**16


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


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "rows"])
def test_open_images_divides_any_source_by_its_ids(kind, tmp_path):
    folder = sources.write(tmp_path / "images", MEMBERS)
    source = SOURCES[kind][0](folder, MEMBERS)
    if kind == "folder of tars":
        (source / "train-000.tar").rename(source / "a.tar")
        for number in (1, 2):
            (source / f"train-{number:03d}.tar").unlink()
    with pytest.warns(UserWarning, match=f"{source} has no train and val, so .* about a fifth"):
        whole = open_images(source, to_tensor), open_images(f"{source}/train", to_tensor)
    parts = [whole[1], opened(source, "val")]
    ids = [ids_of(images) for images in parts]
    assert sorted(ids[0] + ids[1]) == sorted(ids_of(whole[0]))
    if kind == "odd csv":  # all of one group, which stays together
        return
    drawn = {one for one in ids_of(whole[0]) if fraction(one) < FIFTH}
    for images, own in zip(parts, ids, strict=True):
        by_id = {one: whole[0][index] for index, one in enumerate(ids_of(whole[0]))}
        for index, one in enumerate(own):
            assert images[index][1] == by_id[one][1]
            assert (images[index][0] == by_id[one][0]).all()
    wrong = drawn ^ set(ids[1])  # only small classes are helped
    assert {labels_by(whole[0])[one] for one in wrong} <= {2, 3}


def labels_by(images):
    return dict(zip(ids_of(images), images.targets, strict=True))
