"""A data set of one's own, by FILE.py:FUNCTION: listed, divided, and never run from a folder."""

import pytest
import torch

from unbraid.base.errors import DataError, UsageError
from unbraid.images import own
from unbraid.images.dataset import picture_of
from unbraid.images.identity import fingerprint
from unbraid.images.open import absolute, images_like, open_images
from unbraid.images.sources import part_of
from unbraid.images.which import holder_of
from unbraid.reporting.drawing import bands_of

CODE = """
import torch
from torch.utils.data import Dataset
import unbraid

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
def grouped(labelled=True):
    waves = Waves(60, labelled)
    waves.groups = [f"person {k // 3}" for k in range(60)]
    waves.sizes = [50 + k for k in range(60)]
    return waves
def bare_groups():
    return grouped(labelled=False)
def several():
    waves = Waves(60, labelled=False)
    waves.targets = [[k % 3, (k + 1) % 3] for k in range(60)]
    return unbraid.one_per_label(waves)
def unnamed():
    waves = Waves(6)
    waves.targets = [0, 1, 2, 3, 0, 1]
    return waves
def far():
    waves = Waves(6)
    waves.targets = [0, 1, 2, 9, 0, 1]
    return waves
def below():
    waves = Waves(6)
    waves.targets = [0, 1, 2, -2, 0, 1]
    return waves
def some():
    waves = Waves(6)
    waves.targets = [0, 1, 2, -1, 0, 1]
    return waves
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
        ("waves.py:one/foo", "asks for a part 'foo', and there are train and val"),
        ("waves.py:one/train/train", "asks for a part 'train/train'"),
        ("waves.py:both/foo/val", r"name .*waves.py:both or one of these"),
    ],
)
def test_what_is_no_data_set_is_told(file, source, sentence):
    with pytest.raises(UsageError, match=sentence):
        open_images(f"{file.parent}/{source}")


@pytest.mark.parametrize("function", ["grouped", "bare_groups"])
def test_a_group_is_for_training_or_for_validation(file, function):
    train, val = (open_images(f"{file}:{function}/{part}") for part in ("train", "val"))
    assert len(train) + len(val) == 60
    assert set(val.groups)
    assert not set(train.groups) & set(val.groups)
    assert list(val.sizes) == [50 + int(image[0, 0]) for image, _ in val]
    assert "hash of their groups" in val.divided


def test_items_of_an_image_of_several_labels_stay_together(file):
    parts = [open_images(f"{file}:several/{part}") for part in ("train", "val")]
    shown = [{int(image[0, 0]) for image, _ in part} for part in parts]
    assert len(shown[0]) + len(shown[1]) == 60
    assert not shown[0] & shown[1]


def test_images_count_for_the_fingerprint_beside_their_sizes(file):
    def hashed():
        images = open_images(f"{file}:grouped")
        return fingerprint(images, images.targets)

    before = hashed()
    file.write_text(CODE.replace("float(k)", "float(k) / 2"))
    assert hashed() != before


@pytest.mark.parametrize(("function", "label"), [("unnamed", "3"), ("far", "9"), ("below", "-2")])
def test_a_label_without_a_name_is_refused(file, function, label):
    with pytest.raises(DataError, match=f"has 3 class names but the label {label};"):
        open_images(f"{file}:{function}")
    assert open_images(f"{file}:some").targets == [0, 1, 2, -1, 0, 1]


def test_code_that_only_a_folder_names_is_not_run(file, monkeypatch):
    monkeypatch.setattr(own, "_named", set())
    with pytest.raises(DataError, match="runs only if you name it"):
        own.refuse_own(f"{file}:one")
    open_images(f"{file}:one")
    own.refuse_own(f"{file}:one")
    own.refuse_own(str(file.parent))
