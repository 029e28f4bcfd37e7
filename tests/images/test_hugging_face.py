"""Rows of Hugging Face's: labels, ids, and what is wrong with them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sources import (
    MEMBERS,
    as_rows,
    as_saved,
    rows,
)

import unbraid
from tiny_networks import SyntheticImages
from unbraid.base.errors import DataError, UsageError
from unbraid.images.dataset import labels_of
from unbraid.images.identity import ids_of
from unbraid.images.open import open_images

pytestmark = pytest.mark.usefixtures("_caches")
PATHS = [path for path, *_ in rows(MEMBERS)]


def test_list_rows_class_labels_keep_their_order_and_those_without_images_do_not_matter(folder):
    import datasets

    two = [0] * 4 + [1] * 4
    for names, values, outputs, labels in (
        (["z", "m", "a"], [2] * 3 + [0] * 5, None, [2] * 3 + [0] * 5),
        (["1", "0", "99999999"], two, 2, [1] * 4 + [0] * 4),
        (["dog", "cat", "wolf"], two, ["dog", "cat"], two),
        (["n01440764", "n15075141", "n00000001"], two, 2, two),
    ):
        kind = datasets.ClassLabel(names=names)
        images = unbraid.from_hugging_face(
            as_rows(folder, MEMBERS, label=(values, kind)), outputs=outputs
        )
        assert labels_of(images) == labels
        assert images.classes == names if outputs is None else len(images.classes) == 2


def nameless(folder: Path) -> Any:
    import datasets

    content = [{"bytes": (folder / path).read_bytes(), "path": None} for path in PATHS]
    return as_rows(folder, MEMBERS, image=(content, datasets.Image()))


def test_list_saved_rows_of_parquet_are_known_by_file_and_row_wherever_it_lies(folder, tmp_path):
    (tmp_path / "here").mkdir()
    nameless(folder).select(range(5)).to_parquet(tmp_path / "here/a.parquet")
    nameless(folder).select(range(5, 8)).to_parquet(tmp_path / "here/b.PARQUET")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    os.utime(tmp_path / "there/a.parquet", (1, 1))
    for place in ("here", "there"):
        images = open_images(f"hf:{tmp_path / place}")
        names = [f"a.parquet/{k}" for k in range(5)] + [f"b.PARQUET/{k}" for k in range(3)]
        assert ids_of(images) == names
        for k, path in enumerate(PATHS):
            assert images.picture(k).tobytes() == Image.open(folder / path).tobytes()


def test_list_rows_without_paths_are_known_by_fingerprint_and_row(folder):
    rows_of = nameless(folder)
    ids = ids_of(unbraid.from_hugging_face(rows_of))
    assert ids == [f"{rows_of._fingerprint}/{k}" for k in range(8)]
    chosen = as_rows(folder, MEMBERS).select([6, 1])
    assert ids_of(unbraid.from_hugging_face(chosen)) == ["bee/1.png", "ant/1.png"]


def test_list_saved_whose_images_end_before_they_begin_is_refused(folder):
    as_saved(folder, MEMBERS)
    (path,) = (folder.parent / "saved").glob("*.arrow")
    content = path.read_bytes()
    ends = np.cumsum([0, *((folder / image).stat().st_size for image in PATHS)])
    sound = ends.astype("<i4").tobytes()
    ends[3] += 2000
    assert content.count(sound) == 1
    path.write_bytes(content.replace(sound, ends.astype("<i4").tobytes()))
    with pytest.raises(DataError, match="saved is damaged"):
        open_images(f"hf:{folder.parent / 'saved'}")


def test_list_rows_what_is_wrong_is_told(folder):
    import datasets

    def told(rows: Any, match: str, error: type[Exception] = DataError, **columns: Any) -> None:
        with pytest.raises(error, match=match):
            unbraid.from_hugging_face(rows, **columns)

    whole = as_rows(folder, MEMBERS)
    told(whole, "no column 'img' but image, label", image="img")
    told(whole, "no column 'kind'", label="kind")
    told(whole, "Column 'label' .* holds no images", image="label")
    told(datasets.DatasetDict(train=whole), "several splits; take one of train", UsageError)
    told(whole.to_iterable_dataset(), "is a IterableDataset; pass", UsageError)
    told(SyntheticImages(3), "is a SyntheticImages", UsageError)
    for values, kind in (
        ([0.5] * 8, "float32"),
        ([0] * 7 + [-1], "int64"),
        ([0] * 7 + [None], "int64"),
    ):
        odd = as_rows(folder, MEMBERS, label=(values, datasets.Value(kind)))
        told(odd, "something else than classes")
    told(whole.select([]), "holds no image")
    os.mkfifo(folder / "pipe.png")
    files = [{"bytes": None, "path": str(folder / name)} for name in ("gone.png", "pipe.png")]
    odd = as_rows(folder, MEMBERS, image=([*files, None, *files, *files, None], datasets.Image()))
    images = unbraid.from_hugging_face(odd)
    for k, match in enumerate(("no such file", "no regular file", "nor a file's path")):
        with pytest.raises(DataError, match=match):
            images[k]
