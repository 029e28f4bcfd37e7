"""What is wrong with a CSV or Parquet list is told; paths in any Unicode form."""

from __future__ import annotations

import errno
import os
import unicodedata
from typing import Any

import pytest
from sources import (
    fail_at,
    write,
)

from unbraid.base.errors import DataError, OutOfReach
from unbraid.images.open import open_images

NFC, NFD = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))


GOOD = "path,label\nant/0.png,ant\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no column 'path'"),
        ("file,label\nant/0.png,ant", "no column 'path'"),
        ("path\nant/0.png", "no column 'label'"),
        ("path,label,path\na,b,c", "two columns 'path'"),
        ("path,label\n", "holds no image"),
        (GOOD + "ant/1.png\n", "Line 3 .* has 1 cells for 2"),
        (GOOD + "ant/1.png,a,b\n", "Line 3 .* has 3 cells for 2"),
        (GOOD + ",ant\n", "Line 3 .* has no text under 'path'"),
        (GOOD + "ant/1.png, \n", "Line 3 .* has the label ' '"),
        (GOOD + "ant/1.png,-1\n", "Line 3 .* has the label '-1'"),
        (GOOD + "bee/../ant/0.png,ant\n", "a second time"),
        (GOOD + "ant/none.png,ant\nant,ant", "2 of 3 files .* are not there, the first is"),
        (GOOD + "ant/\0.png,ant\n", "no text|line contains NUL"),
        (GOOD + "a" * 5000 + ",ant\n", "1 of 2 files"),
        (GOOD + '"ant/1.png,ant\n', "can be read"),
        (GOOD + f"ant/1.png,{'n' * 256}\n", "a label of 256 characters"),
        ("path,label\nant/0.png,99999999\n", "number 99999999"),
        ("path,label,group\nant/0.png,ant,\n", "no text under 'group'"),
        (b"path,label\nant/\xff.png,ant\n", "write UTF-8"),
        ("x" * (1 << 20), "a line without an end"),
        (GOOD + "pipe.png,ant\n", "1 of 2 files"),  # which is not waited for
        (GOOD + "ant/0,ant\n", r"; add the ending \.png to the names\."),
        (GOOD + "ant\\1.png,ant\n", r"; write paths with / in place of \\\."),
        (GOOD + "ant/1.png ,ant\n", r"; remove the blanks around paths\."),
        (GOOD + "https://a.org/1.png,ant\n", r"; give paths of files on this machine\."),
        (GOOD + "ant/x.png,ant\n", r"; paths are relative to the list's folder\."),
    ],
)
def test_list_table_what_is_wrong_with_csv_is_told(folder, content, told):
    os.mkfifo(folder / "pipe.png")
    (folder / "list.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=told) as error:
        open_images(folder / "list.csv")
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def odd_labels() -> dict[str, Any]:
    """Python's own dates end long before those of Parquet."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs .[parquet]")
    return {
        "date": pyarrow.array([2**31 - 1], pyarrow.int32()).cast(pyarrow.date32()),
        "timestamp": pyarrow.array([2**62], pyarrow.timestamp("us")),
        "duration": pyarrow.array([2**62], pyarrow.duration("s")),
        "decimal": pyarrow.array([1], pyarrow.decimal128(9, 0)),
        "list": pyarrow.array([[1]]),
        "binary": pyarrow.array([b"ant"]),
    }


ONE = ["ant/0.png"]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"path": ONE}, "no column 'label'"),
        ({"path": ONE, "label": [0.5]}, "Row 1 .* has the label 0.5"),
        ({"path": ONE, "label": [True]}, "has the label True"),
        ({"path": [*ONE, None], "label": [0, 0]}, "Row 2 .* has no text under 'path'"),
        ({"path": ONE, "label": [None]}, "has the label None"),
        ({"path": ONE, "label": [-1]}, "has the label -1"),
        ({"path": [3], "label": [0]}, "no text under 'path'"),
        ({"path": ONE * 2, "label": [0, 0]}, "a second time"),
        ({"path": ONE, "label": [0], "group": [None]}, "no text under 'group'"),
        *(({"path": ONE, "label": kind}, "") for kind in odd_labels()),
    ],
)
def test_list_table_what_is_wrong_with_parquet_is_told(folder, columns, told):
    pyarrow = pytest.importorskip("pyarrow", reason="needs .[parquet]")
    from pyarrow import parquet

    odd = odd_labels()
    labels = columns.get("label")
    columns = {**columns, "label": odd[labels]} if isinstance(labels, str) else columns
    parquet.write_table(pyarrow.table(columns), folder / "list.parquet")
    with pytest.raises(DataError, match=told or r"has the label|no list that can be read") as error:
        open_images(folder / "list.parquet")
    assert "\n" not in str(error.value)


def test_list_table_parquet_that_is_junk_is_told(folder):
    (folder / "list.parquet").write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")
    with pytest.raises(DataError, match="no list that can be read"):
        open_images(folder / "list.parquet")


@pytest.mark.parametrize("written", [NFC, NFD])
def test_list_table_path_is_found_in_any_unicode_form(written, tmp_path):
    (other,) = {NFC, NFD} - {written}
    write(tmp_path / f"of {written}", {written: 2, "tea": 1})
    (tmp_path / "list.csv").write_text(
        f"path,label\nof {other}/{other}/0.png,{other}\nof {other}/{written}/1.png,{written}\n"
    )
    images = open_images(tmp_path / "list.csv")
    assert images.targets == [0, 0]
    assert images.ids == [f"of {written}/{written}/{k}.png" for k in range(2)]
    assert images.picture(1).size == (6, 7)
    (tmp_path / "list.csv").write_text(
        f"path,label\nof {other}/{other}/0.png,a\nof {written}/{written}/0.png,a\n"
    )
    with pytest.raises(DataError, match="a second time; name each image once"):
        open_images(tmp_path / "list.csv")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_list_table_files_that_cannot_be_looked_at_are_not_missing(number, folder, monkeypatch):
    (folder / "list.csv").write_text(GOOD + "gone.png,ant\nant/1.png,ant\n")
    fail_at(monkeypatch, "ant/1.png", number)
    told = rf"ant/1\.png, which .*list\.csv names, cannot be reached \({os.strerror(number)}\);"
    with pytest.raises(OutOfReach, match=told):
        open_images(folder / "list.csv")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG])
def test_list_table_files_that_are_missing_are_not_out_of_reach(number, folder, monkeypatch):
    (folder / "list.csv").write_text(GOOD + "gone/gone.png,ant\nant/1.png,ant\n")
    fail_at(monkeypatch, "ant/1.png", number)
    with pytest.raises(DataError, match=r"2 of 3 files .* are not there, the first is") as error:
        open_images(folder / "list.csv")
    assert not isinstance(error.value, OutOfReach)
