"""Files of tensors: read whatever the case of their names, damaged ones told, no code run."""

import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tensor_folders import CLASSES, save, write
from torch.utils.data import Subset

import unbraid
from unbraid.base.errors import DataError, OutOfReach, UnfitPicture, UsageError
from unbraid.images.dataset import picture_of
from unbraid.images.identity import fingerprint, preprocessing_of
from unbraid.images.open import images_for, images_like
from unbraid.images.tensors import hold_tensors, read_tensor, read_tensor_file
from unbraid.networks.models import LoadedModel
from unbraid.reporting.drawing import tell_bands
from unbraid.reporting.pictures import Sight, sight_of, sight_of_files

ONE = torch.arange(24.0).reshape(2, 3, 4)


def with_header(path, header):
    """A .npy file of that header, with no numbers behind it."""
    text = header.encode().ljust(118 - 1) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


def test_endings_in_capitals_are_read(tmp_path):
    np.save(tmp_path / "one.npy", ONE.numpy())
    (tmp_path / "one.npy").rename(tmp_path / "one.NPY")
    save_file({"one": ONE}, tmp_path / "one.SAFETENSORS")
    torch.save(ONE, tmp_path / "one.PT")
    assert torch.equal(read_tensor_file(tmp_path / "one.NPY"), ONE)
    assert torch.equal(read_tensor_file(tmp_path / "one.SAFETENSORS")["one"], ONE)
    assert torch.equal(read_tensor_file(tmp_path / "one.PT"), ONE)
    for path in tmp_path.iterdir():
        assert torch.equal(read_tensor(str(path)), ONE)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    begin = "{'descr': '<f4', 'fortran_order': False, 'shape': ("
    with_header(tmp_path / "huge.npy", f"{begin}{10**16},)}}")
    with_header(tmp_path / "open.npy", f"{begin}2,")
    (tmp_path / "cut.npy").write_bytes(b"PK\x03\x04 and no more")
    torch.save(ONE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pt").read_bytes()
    for at in range(0, len(content), 7):
        (tmp_path / f"{at}.pt").write_bytes(content[:at])
    (tmp_path / "old.pt").unlink()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UsageError, match=rf"{path.name} cannot be read \(it is damaged or "):
            read_tensor_file(path)
        with pytest.raises(DataError, match=rf"^Image .*{path.name} cannot be read \(") as caught:
            read_tensor(str(path))
        assert type(caught.value) is DataError  # which may be left out


def test_what_holds_more_than_tensors_is_not_said_to_be_trusted(tmp_path):
    torch.save({"one": ONE, "more": pytest.raises}, tmp_path / "more.pt")
    np.save(tmp_path / "more.npy", np.array([{}]), allow_pickle=True)
    for name in ("more.pt", "more.npy"):
        with pytest.raises(UsageError, match="holds more than tensors") as caught:
            read_tensor_file(tmp_path / name)
        assert "weights_only" not in str(caught.value)
        assert "allow_pickle" not in str(caught.value)


class Runs:
    """Makes a folder where it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_no_code_in_a_file_is_run(tmp_path):
    bad = tmp_path / "made"
    torch.save(Runs(bad), tmp_path / "new.pt")
    torch.save(Runs(bad), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Runs(bad)))
    np.save(tmp_path / "array.npy", np.array([Runs(bad)]), allow_pickle=True)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(DataError, match="holds Python objects, which are never loaded"):
            read_tensor(str(path))
        assert not bad.exists()
    pickle.loads((tmp_path / "bare.pt").read_bytes())  # as it would have been
    assert bad.exists()


CUT = ("npy", "pt", "safetensors")


@pytest.mark.parametrize("kind", CUT)
def test_a_file_cut_off_anywhere_is_broken(kind, tmp_path):
    whole = tmp_path / f"whole.{kind}"
    save(whole, ONE)
    content = whole.read_bytes()
    for at in (*range(0, len(content), 97), len(content) - 1):
        whole.write_bytes(content[:at])
        with pytest.raises(DataError, match="cannot be read") as caught:
            read_tensor(str(whole))
        assert type(caught.value) is DataError
    whole.write_bytes(content)
    assert torch.equal(read_tensor(str(whole)), ONE)


def test_what_is_no_tensor_of_real_numbers_is_told(tmp_path):
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "fields.npy", np.zeros(2, [("a", "f4"), ("b", "f4")]))
    np.save(tmp_path / "complex.npy", np.zeros((2, 3), complex))
    np.save(tmp_path / "number.npy", np.float32(1))
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    torch.save(ONE.to_sparse(), tmp_path / "sparse.pt")
    torch.save([ONE, ONE], tmp_path / "two.pt")
    torch.save(torch.zeros(1).expand(4, 100_000, 100_000), tmp_path / "expanded.pt")
    save_file({"one": ONE, "other": ONE.clone()}, tmp_path / "two.safetensors")
    told = {
        **{"text": "holds <U1, not numbers", "fields": "not numbers", "sparse": "sparse_coo"},
        **{"complex": "complex128, not real", "number": r"shape \(\)", "none": r"shape \(0, 3\)"},
        "two": "holds 2 tensors, and an image is one",
        "expanded": r"fewer numbers than its shape \(4, 100000, 100000\)",
    }
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match=told[path.stem]):
            read_tensor(str(path))
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(DataError, match="no regular file"):
        read_tensor(str(tmp_path / "pipe.npy"))
    with pytest.raises(OutOfReach, match=r"folder .*gone is gone or empty"):
        read_tensor(str(tmp_path / "gone/1.npy"))


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">u2", "<u4", "<i8", ">f4", "<f8", "<f2", "?"])
def test_numbers_of_any_type_go_in_as_float32_and_are_not_scaled(dtype, tmp_path):
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a/0.npy", np.asfortranarray(values))
    image, label = unbraid.open_images(tmp_path)[0]
    assert image.dtype == torch.float32
    assert np.array_equal(image.numpy(), values.astype("f4"))
    assert label == 0
    given = unbraid.open_images(tmp_path, transform=lambda tensor: tensor)[0][0]
    assert np.array_equal(given.numpy(), values)
    assert given.numpy().dtype == values.dtype.newbyteorder("=")


@pytest.mark.parametrize("kind", CUT)
def test_folders_lists_and_parts_of_tensors_are_as_those_of_pictures(kind, tmp_path):
    root = write(tmp_path / "all", kind, 6)
    images = unbraid.open_images(root)
    assert images.ids[:2] == [f"ant/0.{kind}", f"ant/1.{kind}"]
    assert (images.classes, images.targets) == (["ant", "bee", "cow"], [0] * 6 + [1] * 6 + [2] * 6)
    assert picture_of(images, 0) is None
    assert preprocessing_of(images) == "tensors as they lie in their files, as float32"
    rows = [f"{one},{one[:3]}" for one in images.ids]
    (root / "list.csv").write_text("\n".join(["path,label", *rows]))
    sources = {"memory": images, "list": unbraid.open_images(root / "list.csv")}
    sources["file"] = unbraid.open_images(root, listed=tmp_path / "out/list.safetensors")
    for other in sources.values():
        assert other.of_tensors
        assert list(other.ids) == images.ids
        assert torch.equal(other[7][0], images[7][0])
        assert fingerprint(other, other.targets) == fingerprint(images, images.targets)
    train, val = (unbraid.open_images(f"{root}/{part}") for part in ("train", "val"))
    assert len(train) + len(val) == 18
    assert torch.equal(val[0][0], images[images.ids.index(val.ids[0])][0])
    flat = unbraid.open_images(root / "ant")
    assert (flat.targets, flat.of_tensors) == ([-1] * 6, True)
    before = fingerprint(images, images.targets)
    (root / "ant" / f"0.{kind}").write_bytes(b"")
    assert fingerprint(unbraid.open_images(root), images.targets) != before


def test_tensors_in_a_folder_of_pictures_are_passed_over_in_one_line(tmp_path):
    root = write(tmp_path / "all", "npy", 2)
    for name in CLASSES:
        Image.new("RGB", (4, 4)).save(root / name / "a.png")
    torch.save(ONE, root / "features.pt")
    listed = tmp_path / "list.safetensors"
    words = r"all holds pictures, so .* passed over: 6 files, such as .*ant/0\.npy\.$"
    for options in ({}, {"listed": listed}):
        with pytest.warns(UserWarning, match=words) as said:
            images = unbraid.open_images(root, **options)
        assert len(said) == 1
        assert list(images.ids) == [f"{name}/a.png" for name in CLASSES]
        assert not images.of_tensors
    with pytest.warns(UserWarning, match="passed over: 2 files, such as"):
        assert unbraid.open_images(root / "bee").ids == ["a.png"]
    (root / "cow/a.png").unlink()
    with pytest.raises(DataError, match=r"cow holds no image \(\.jpg, [^)]*\.pnm\); fill"):
        unbraid.open_images(root)


def test_stray_tensors_beside_class_folders_of_pictures_are_no_images(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.TIF")
    np.save(tmp_path / "features.npy", ONE.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(unbraid.open_images(tmp_path)) == 3
    (tmp_path / "linked").mkdir()
    for name in CLASSES:
        (tmp_path / "linked" / name).symlink_to(tmp_path / name)
    np.save(tmp_path / "linked/features.npy", ONE.numpy())
    assert len(unbraid.open_images(tmp_path / "linked")) == 3


def test_tensors_where_they_cannot_be_told_are_refused(tmp_path):
    root = write(tmp_path / "all", "npy", 2)
    Image.new("RGB", (4, 4)).save(root / "bee/a.png")
    (root / "list.csv").write_text("path,label\nbee/a.png,1\nbee/0.npy,1\n")
    with pytest.raises(DataError, match=r"list\.csv holds both tensors"):
        unbraid.open_images(root / "list.csv")
    (root / "bee/a.png").unlink()
    np.save(root / "features.npy", ONE.numpy())
    with pytest.raises(DataError, match=r"of its own, such as features\.npy, and 6 in folders"):
        unbraid.open_images(root)
    (root / "ant/train-000.tar").touch()
    with pytest.raises(DataError, match=r"both tar files, such as train-000\.tar, and images"):
        unbraid.open_images(root / "ant")


def test_validation_pictures_of_training_tensors_are_refused(tmp_path):
    train = unbraid.open_images(write(tmp_path / "train", "npy", 2))
    (tmp_path / "val/ant").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "val/ant/a.png")
    with pytest.raises(DataError, match=r"training images are tensors, and .* holds pictures"):
        images_like(train, str(tmp_path / "val"))


def test_a_picture_among_tensors_by_a_list_of_tiffs_is_told(tmp_path):
    with pytest.raises(UnfitPicture, match=r"a\.png is a picture, and the first"):
        read_tensor(str(tmp_path / "a.png"))


def test_a_tensor_unlike_the_first_is_broken(tmp_path):
    root = write(tmp_path / "all", "npy", 3)
    np.save(root / "bee/1.npy", np.zeros((3, 64), "f4"))
    np.save(root / "bee/2.npy", np.zeros((1, 2, 64), "f4"))
    np.save(root / "cow/0.npy", np.full((2, 64), np.nan, "f4"))
    np.save(root / "cow/1.npy", np.full((2, 64), 1e300))
    images = unbraid.open_images(root)
    for index, words in (
        (4, r"bee/1.npy is of shape \(3, 64\), and .*ant/0.npy of shape \(2, 64\); give all"),
        (5, r"bee/2.npy is of shape \(1, 2, 64\)"),
        (6, r"cow/0.npy cannot be read \(it holds NaN or infinite numbers\)"),
        (7, r"cow/1.npy cannot be read \(it holds NaN or infinite numbers\)"),
    ):
        with pytest.raises(DataError, match=words):
            images[index]
    assert images[8][0].shape == (2, 64)
    mended = unbraid.open_images(root, transform=lambda tensor: tensor.nan_to_num().sum()[None])
    assert all(mended[k][0].shape == (1,) for k in range(9))


def test_good_tensors_after_any_number_of_broken_ones_are_read(tmp_path):
    for k in range(25):
        (tmp_path / f"{k:02}.npy").write_bytes(b"")
    np.save(tmp_path / "25.npy", ONE.numpy())
    np.save(tmp_path / "26.npy", ONE.numpy()[:1])
    images = unbraid.open_images(tmp_path)
    assert torch.equal(images[25][0], ONE)
    with pytest.raises(DataError, match=r"26\.npy is of shape \(1, 3, 4\), and .*25\.npy of"):
        images[26]


def test_preprocessing_that_fails_on_a_tensor_is_told_with_its_shape(tmp_path):
    images = unbraid.open_images(write(tmp_path / "a", "npy", 2), transform=lambda one: one.resize)
    assert callable(images[0][0])
    images.transform = lambda tensor: tensor.convert("RGB")
    with pytest.raises(DataError, match=r"ant/0.npy, of shape \(2, 64\) and torch.float32, cannot"):
        images[0]


def test_what_is_done_with_tensors_is_said(tmp_path):
    root = str(write(tmp_path / "all", "npy", 2))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(128, 3))
    loaded = LoadedModel(network, lambda picture: 1 / 0, (), {}, note="ImageNet's is assumed.")
    images, note = images_for(loaded, root)
    assert note.startswith("The files hold tensors; each goes into the network as it is, as float3")
    assert images[0][0].shape == (2, 64)
    own = LoadedModel(network, lambda picture: 1 / 0, (), {}, tensor_transform=lambda one: one * 2)
    doubled, note = images_for(own, root)
    assert "goes through the preprocessing that your function returns" in note
    assert torch.equal(doubled[3][0], 2 * images[3][0])
    for path in (tmp_path / "all").glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"ant/0\.npy cannot be read .* Mend or remove it"):
        images_for(loaded, root)


def test_the_first_name_says_what_files_hold():
    assert hold_tensors(["a/0.NPY", "a/1.png"])
    assert not hold_tensors(["a/0.png", "a/1.npy"])
    assert not hold_tensors(["a/none.tif", "a/0.png"])
    assert not hold_tensors([])


def test_what_is_drawn_without_the_preprocessing_is_said(tmp_path):
    for k in range(2):
        np.save(tmp_path / f"{k}.npy", np.zeros((6, 8, 7), "f4"))
    (tmp_path / "0.npy").write_bytes(b"")
    scaled = unbraid.open_images(tmp_path, transform=lambda tensor: tensor * 2)
    volumes = unbraid.open_images(tmp_path, transform=lambda tensor: tensor[None])
    assert sight_of(scaled) == sight_of(volumes) == sight_of_files(scaled) == Sight()
    assert sight_of_files(volumes) is None
    assert tell_bands(scaled, 1).startswith("Pictures show the mean of 6 bands; --bands")
    assert tell_bands(volumes, 1) == ""
    again = unbraid.open_images(tmp_path)
    again.unprepared = True
    assert sight_of(again) is None
    assert sight_of(Subset(again, [1])) is None
    assert tell_bands(again, 1).startswith("Pictures show tensors as they lie in their files")
