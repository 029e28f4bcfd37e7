"""Which image a message means: its file, or its id and of what, never an index within a part."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

import unbraid
from tiny_networks import SyntheticImages, WithBroken, build
from unbraid.base.errors import DataError, ModelError, UsageError
from unbraid.images.open import open_images
from unbraid.images.which import image_named, images_named, which_image

CODE = """
import torch
from torch.utils.data import Dataset

class Images(Dataset):
    def __init__(self, bad=()):
        self.bad, self.targets = set(bad), [k % 4 for k in range(40)]
    def __len__(self):
        return 40
    def __getitem__(self, k):
        if k in self.bad:
            return torch.full((3, 7, 6), torch.nan, dtype=torch.float64), k % 4
        return torch.rand(3, 7, 6, dtype=torch.float64), k % 4

def one():
    return Images(range(20, 40))
def two():
    return Images(), Images([5])
def pictures():
    own = Images()
    own.__class__ = type("Pictures", (Images,), {"__getitem__": lambda self, k: ("text", 0)})
    return own
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(CODE)
    return path


def first_told(images, tmp_path, error=ModelError):
    """What a scan says of the first image that is wrong."""
    with pytest.raises(error) as told:
        unbraid.scan(build("3x3"), "layer", images, tmp_path / "scan", batch_size=3)
    return str(told.value)


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_of_a_divided_data_set_has_the_number_that_it_has_in_the_whole(
    part, file, tmp_path
):
    images = open_images(f"{file}:one/{part}")
    index, wrong = next((k, one) for k, one in enumerate(images.ids) if int(one) >= 20)
    assert index != int(wrong)
    assert which_image(images, index) == f"image {wrong} of {file}:one"
    told = first_told(images, tmp_path)
    assert told.startswith(f"Image {wrong} of {file}:one drives the network to NaN")


def test_an_image_of_one_of_two_data_sets_is_told_with_its_part(file, tmp_path):
    told = first_told(open_images(f"{file}:two/val"), tmp_path)
    assert told.startswith(f"Image 5 of {file}:two/val drives the network to NaN")


def test_faults_of_reading_name_the_image_likewise(file, tmp_path):
    images = open_images(f"{file}:pictures/train")
    told = first_told(images, tmp_path, DataError)
    assert told.startswith(f"Image {images.ids[0]} of {file}:pictures is a str, not a tensor")


def save(folder, n=4):
    for k in range(n):
        path = folder / "ant" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 7, 3), 9 * k, np.uint8)).save(path)


def test_an_image_of_a_folder_is_told_by_its_file(tmp_path):
    save(tmp_path / "data")

    def nan_of_two(picture):
        value = np.asarray(picture).flat[0]
        return torch.full((3, 7, 6), math.nan if value == 18 else 0.1 * value).double()

    images = open_images(tmp_path / "data", nan_of_two)
    told = first_told(Subset(images, [3, 1, 2]), tmp_path)
    assert told.startswith(f"Image {tmp_path}/data/ant/2.png drives the network to NaN")


@pytest.mark.parametrize(
    ("preprocessing", "what"),
    [(lambda picture: picture, "an Image"), (np.asarray, "a ndarray"), (lambda _: None, "a None")],
)
def test_a_preprocessing_that_gives_no_tensor_is_to_blame(preprocessing, what, tmp_path):
    save(tmp_path / "data")
    images = open_images(tmp_path / "data", preprocessing)
    with pytest.raises(DataError) as told:
        unbraid.scan(build("3x3"), "layer", images, tmp_path / "scan", skip_broken=True)
    assert str(told.value).startswith(f"The preprocessing returned {what}")
    assert "where a tensor is wanted" in str(told.value)
    assert str(told.value).endswith("ant/0.png; let it return a tensor.")


def test_without_a_preprocessing_the_data_set_is_to_get_one(tmp_path):
    save(tmp_path / "data")
    images = open_images(tmp_path / "data")
    assert "not a tensor; give the data set a transform." in first_told(images, tmp_path, DataError)


def test_what_has_no_name_is_told_by_its_index():
    bare = SyntheticImages(8)
    assert which_image(bare, 3) == "image 3"
    assert which_image(ConcatDataset([bare, Subset(WithBroken(8), [5])]), 8) == "image 8"


class Hostile(SyntheticImages):
    @property
    def ids(self):
        raise ZeroDivisionError


def test_a_data_set_that_fails_to_name_its_images_hides_no_error():
    with pytest.raises(DataError, match=r"^Image 2 is wrong\.$"), images_named(Hostile(4)):
        raise DataError.of_image("", 2, "is wrong.")


def test_errors_without_an_index_and_other_errors_stay_as_they_are():
    for error in (UsageError("tau is 3."), KeyError(3)):
        with pytest.raises(type(error)) as told, images_named(SyntheticImages(4)):
            raise error
        assert told.value is error


def test_the_image_at_hand_is_told_by_its_name():
    for name, told in (("a.png", "of image a.png are"), ("image 7", "of image 7 are")):
        with pytest.raises(DataError, match=told), image_named(name):
            raise DataError.of_image("Logits of", 0, "are nan.")
