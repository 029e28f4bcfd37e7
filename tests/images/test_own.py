"""A data set of one's own, by FILE.py:FUNCTION: listed, divided, and never run from a folder."""

import pytest
import torch

from unbraid.base.errors import DataError, UsageError
from unbraid.images import own
from unbraid.images.dataset import holder_of, picture_of
from unbraid.images.open import absolute, images_like, open_images, part_of
from unbraid.reporting.drawing import bands_of

CODE = """
import torch
from torch.utils.data import Dataset

class Waves(Dataset):
    bands = (2, 1, 0)
    def __init__(self, n, labelled=True):
        self.n = n
        if labelled:
            self.targets, self.classes = [k % 3 for k in range(n)], ["low", "mid", "high"]
    def __len__(self):
        return self.n
    def __getitem__(self, k):
        return torch.full((4, 50), float(k)), k % 3

def both():
    return Waves(9), Waves(6)
def one():
    return Waves(30)
def bare():
    return Waves(6, labelled=False)
def three():
    return 1, 2, 3
def fails():
    raise ValueError("no disk")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "waves.py"
    path.write_text(CODE)
    return path


def test_tensors_come_as_they_are_with_labels_and_parts(file):
    train = open_images(part_of(f"{file}:both", "train"), transform=lambda _: 1 / 0)
    val = images_like(train, part_of(f"{file}:both", "val"))
    assert (len(train), len(val)) == (9, 6)
    image, label = val[4]
    assert (image.shape, float(image[0, 0]), label) == (torch.Size([4, 50]), 4.0, val.targets[4])
    named = [val.classes[label] for label in val.targets]
    assert named == ["low", "mid", "high"] * 2
    assert holder_of(val, 0, "picture") is None
    assert picture_of(val, 0) is None
    assert bands_of(val, 1) == (2, 1, 0)
    parts = [open_images(part_of(f"{file}:one", part)) for part in ("train", "val")]
    numbers = [{int(part[k][0][0, 0]) for k in range(len(part))} for part in parts]
    assert numbers[0] | numbers[1] == set(range(30))
    assert not numbers[0] & numbers[1]
    assert open_images(f"{file}:bare").targets == [0, 1, 2, 0, 1, 2]
    assert absolute(f"{file.parent}/../{file.parent.name}/waves.py:one") == f"{file}:one"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("waves.py:both", r"returns training and validation images; name .*both/train"),
        ("waves.py:three", r"must return a data set or \(training, validation\)"),
        ("waves.py:fails", "fails .*no disk"),
        ("waves.py:bot", "no function 'bot'.* both"),
        ("wave.py:both", "There is no file"),
    ],
)
def test_what_is_no_data_set_is_told(file, source, sentence):
    with pytest.raises(UsageError, match=sentence):
        open_images(f"{file.parent}/{source}")


def test_code_that_only_a_folder_names_is_not_run(file, monkeypatch):
    monkeypatch.setattr(own, "_named", set())
    with pytest.raises(DataError, match="run only where you name it"):
        own.refuse_own(f"{file}:one")
    open_images(f"{file}:one")
    own.refuse_own(f"{file}:one")
    own.refuse_own(str(file.parent))
