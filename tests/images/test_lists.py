"""What is wrong with a CSV or Parquet list, or with rows of Hugging Face's, is told."""

import errno
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from sources import MEMBERS, PATHS, as_rows, as_saved, fail_at

import unbraid
from unbraid.base.errors import DataError, OutOfReach, UsageError
from unbraid.images.dataset import labels_of
from unbraid.images.identity import ids_of
from unbraid.images.open import open_images

GOOD = "path,label\nant/0.png,ant\n"
ONE = ["ant/0.png"]


def test_list_table_what_is_wrong_is_told(folder):
    os.mkfifo(folder / "pipe.png")  # which is not waited for
    for content, told in (
        ("", "has no columns; its first row must name path, label"),
        ("path,label,path\na,b,c", "has the columns path, label, path; .* group, each once"),
        ("path,label\n", "holds no image"),
        (GOOD + "ant/1.png\n", "Line 3 .* has 1 cell for 2 columns"),
        (GOOD + ",ant\n", "Line 3 .* has no text under 'path'"),
        (GOOD + "ant/1.png, \n", "Line 3 .* has the label ' '"),
        (GOOD + "ant/1.png,-1\n", "Line 3 .* has the label '-1'"),
        (GOOD + f"ant/1.png,{'n' * 256}\n", "a label of 256 characters"),
        (GOOD + "bee/../ant/0.png,ant\n", "a second time"),
        (GOOD + "ant/none.png,ant\nant,ant", "2 of 3 files .* are not there, the first is"),
        (GOOD + "ant/\0.png,ant\n", "no text|line contains NUL"),
        (GOOD + '"ant/1.png,ant\n', "can be read"),
        ("path,label\nant/0.png,99999999\n", "number 99999999"),
        (GOOD + "ant/\udcff.png,ant\n", "CSV in UTF-8"),
        (GOOD + "pipe.png,ant\n", "1 of 2 files .*; give paths from"),
        (b"PAR1" + b"\xff" * 100 + b"PAR1", "no list that can be read"),
        ({"path": ONE}, "must name path, label"),
        ({"path": ONE, "label": [0.5]}, "Row 1 .* has the label 0.5"),
        *(({"path": ONE, "label": [odd]}, "has the label") for odd in (None, -1, [1], b"ant")),
        ({"path": [*ONE, None], "label": [0, 0]}, "Row 2 .* has no text under 'path'"),
        ({"path": ONE, "label": [0], "group": [None]}, "no text under 'group'"),
    ):
        path = folder / ("list.csv" if isinstance(content, str) else "list.parquet")
        if path.suffix == ".parquet":
            pytest.importorskip("pyarrow", reason="needs .[parquet]")
        if isinstance(content, dict):
            from pyarrow import parquet, table

            parquet.write_table(table(content), path)
        elif isinstance(content, str):
            path.write_text(content, errors="surrogateescape")
        else:
            path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{told}[^\n]*\.$"):
            open_images(path)


def test_list_table_files_out_of_reach_are_not_missing(folder, monkeypatch):
    (folder / "list.csv").write_text(GOOD + "gone.png,ant\nant/1.png,ant\n")
    for number, kind, told in (
        (errno.EACCES, OutOfReach, r"ant/1\.png, which .*list\.csv names, cannot be reached \(P"),
        (errno.ENOTDIR, DataError, r"2 of 3 files .* are not there, the first is"),
    ):
        fail_at(monkeypatch, "ant/1.png", number)
        with pytest.raises(DataError, match=told) as error:
            open_images(folder / "list.csv")
        assert type(error.value) is kind


def test_list_rows_class_labels_keep_their_order_also_those_without_images(folder, datasets):
    two = [0] * 4 + [1] * 4
    for names, values, outputs, labels in (
        (["z", "m", "a"], [2] * 3 + [0] * 5, None, [2] * 3 + [0] * 5),
        (["1", "0", "99999999"], two, 2, [1] * 4 + [0] * 4),
        (["n01440764", "n15075141", "n00000001"], two, 2, two),
    ):
        whole = as_rows(folder, MEMBERS, label=(values, datasets.ClassLabel(names=names)))
        images = unbraid.from_hugging_face(whole, outputs=outputs)
        assert labels_of(images) == labels
        assert images.classes == names if outputs is None else len(images.classes) == 2


def test_list_saved_rows_without_paths_are_known_by_file_and_row_wherever_it_lies(
    folder, tmp_path, datasets
):
    content = [{"bytes": (folder / path).read_bytes(), "path": None} for path in PATHS]
    whole = as_rows(folder, MEMBERS, image=(content, datasets.Image()))
    fingerprint = whole._fingerprint
    assert ids_of(unbraid.from_hugging_face(whole)) == [f"{fingerprint}/{k}" for k in range(8)]
    (tmp_path / "here").mkdir()
    whole.select(range(5)).to_parquet(tmp_path / "here/a.parquet")
    whole.select(range(5, 8)).to_parquet(tmp_path / "here/b.PARQUET")
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    names = [f"a.parquet/{k}" for k in range(5)] + [f"b.PARQUET/{k}" for k in range(3)]
    for place in ("here", "there"):
        images = open_images(f"hf:{tmp_path / place}")
        assert ids_of(images) == names
        for k, path in enumerate(PATHS):
            assert images.picture(k).tobytes() == Image.open(folder / path).tobytes()


def test_list_saved_whose_images_end_before_they_begin_is_refused(folder, datasets):
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


def test_list_rows_what_is_wrong_is_told(folder, datasets):
    whole = as_rows(folder, MEMBERS)
    halves = as_rows(folder, MEMBERS, label=([0.5] * 8, datasets.Value("float32")))
    holes = as_rows(folder, MEMBERS, label=([0] * 7 + [None], datasets.Value("int64")))
    for odd, columns, told in (
        (whole, {"image": "img"}, "no column 'img' but image, label"),
        (whole, {"image": "label"}, "Column 'label' .* holds no images"),
        (datasets.DatasetDict(train=whole), {}, "several splits; take one of train"),
        (whole.to_iterable_dataset(), {}, "is an IterableDataset; pass"),
        (halves, {}, "something else than classes"),
        (holes, {}, "something else than classes"),
        (whole.select([]), {}, "holds no image"),
    ):
        with pytest.raises((DataError, UsageError), match=told):
            unbraid.from_hugging_face(odd, **columns)
    os.mkfifo(folder / "pipe.png")
    files = [{"bytes": None, "path": str(folder / name)} for name in ("gone.png", "pipe.png")]
    odd = as_rows(folder, MEMBERS, image=([*files, None, *files, *files, None], datasets.Image()))
    images = unbraid.from_hugging_face(odd)
    for k, match in enumerate(("no such file", "no regular file", "nor a file's path")):
        with pytest.raises(DataError, match=match):
            images[k]
