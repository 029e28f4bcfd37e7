"""Where a source lies: what is refused before anything is loaded."""

import pytest

from unbraid.base.errors import DataError, UsageError
from unbraid.images.sources import refuse_absent, refuse_source


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Folders with parts, of classes and of images, a list, a file of code, and links."""
    for folder in ("parts/train/ant", "parts/val/ant", "classes/ant", "classes/bee", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").touch()
    for file in ("flat/a.png", "lists/train.csv", "lists/val.csv", "lists/a.png", "own.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "linked").symlink_to("parts")
    (tmp_path / "classes/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "parts/.hidden").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


AMONG = [  # source, out, whether its parts are listed
    ("parts", "parts/train", True),
    ("parts", "parts/val/runs/a", True),
    ("parts", "linked/val/runs", True),
    ("linked", "parts/train/ant", True),
    ("parts", "parts/train/ant/../runs", True),
    ("classes", "classes", True),
    ("classes", "classes/runs", True),
    ("classes", "elsewhere/runs", True),
    ("flat", "flat", True),
    ("flat", "flat/runs", True),
    ("flat", "flat", False),
    ("classes/train", "classes/runs", False),
    ("parts/train", "parts/train/runs", False),
    ("parts", "parts/runs", False),
]
BESIDE = [
    ("parts", "parts", True),
    ("parts", "parts/runs", True),
    ("parts", "runs", True),
    ("parts", ".", True),
    ("parts", "parts/train/.runs/a", True),
    ("parts", "parts/training", True),
    ("classes", "flat", True),
    ("lists", "lists", True),
    ("lists/train.csv", "lists/runs", False),
    ("parts/train", "parts", False),
    ("parts/train", "parts/val/runs", False),
    ("own.py:build", "own", True),
    ("https://host/a.tar", "runs", True),
]


@pytest.mark.parametrize(("source", "out", "in_parts"), AMONG)
def test_results_among_the_images_are_refused(source, out, in_parts, place):
    for one in (out, place / out):
        with pytest.raises(UsageError, match=r"lies among the images of .*; name another folder"):
            refuse_source(source, one, in_parts=in_parts)


@pytest.mark.parametrize(("source", "out", "in_parts"), BESIDE)
def test_results_beside_the_images_are_not(source, out, in_parts, place):
    refuse_source(source, place / out, in_parts=in_parts)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("nowhere", "nowhere"),
        ("nowhere.csv", "nowhere.csv"),
        ("nowhere/train", "nowhere/train"),
        ("parts/runs", "parts/runs"),
        ("hf:nowhere", "nowhere"),
        ("nowhere.py:build", "nowhere.py"),
    ],
)
def test_an_absent_source_is_told(source, what, place):
    with pytest.raises(DataError, match=rf"^There is nothing at {what}; name "):
        refuse_absent(source)


@pytest.mark.parametrize(
    "source", ["parts", "flat/train", "own.py:build", "https://host/a.tar", "s-{0..3}.tar", "*.tar"]
)
def test_what_is_there_or_cannot_be_looked_up_is_not_called_absent(source, place):
    refuse_absent(source)


def test_a_missing_part_is_told(place):
    (place / "parts/val").rename(place / "parts/other")
    with pytest.raises(DataError, match="parts holds train but no val"):
        refuse_source("parts", place / "runs", in_parts=True)
