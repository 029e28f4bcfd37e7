"""The same images from every source: the same records, labels, names and ids."""

import errno
import pickle
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import sources
import torch
from sources import MEMBERS, SOURCES, opened, rows, scanned, to_tensor
from torch import nn

import unbraid
from unbraid.base.errors import DataError, ModelError, OutOfReach, UsageError
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import groups_of, labels_of
from unbraid.images.identity import ids_of
from unbraid.images.labels import GUESSED
from unbraid.images.open import absolute, images_for, images_like, labelled, open_images
from unbraid.images.sources import part_of
from unbraid.images.which import name_of
from unbraid.networks.class_names import imagenet_classes
from unbraid.networks.models import LoadedModel

IMAGENET = tuple(imagenet_classes().values())
DATA = {  # classes, names of outputs, their number, and labels
    "numbers": (["2", "10", "0"], (), 12, [2, 10, 0]),
    "names": (["great_white_shark", "Tench"], IMAGENET, 1000, [2, 0]),
    "ids": (["n15075141", "n01440764"], (), 1000, [999, 0]),
    "ids of other outputs": (["n15075141", "n01440764"], ("tench", "toilet_tissue"), 2, [1, 0]),
}
pytestmark = pytest.mark.usefixtures("_caches")


@pytest.mark.parametrize("kind", SOURCES)
def test_open_images_any_source_gives_the_same_records(kind, folder, tmp_path):
    expected = scanned(open_images(folder, to_tensor), tmp_path / "expected")
    images = opened(kind, folder, outputs=["ant", "bee"])
    ids = SOURCES[kind][1] or ids_of(images)
    scan = scanned(images, tmp_path / "scan")
    for name in ("index", "label", "prediction", "pooled", "share_start", "share_value"):
        for ours, theirs in zip(scan.columns(name), expected.columns(name), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.numpy().tobytes() == theirs.numpy().tobytes(), name
    assert [one for records in scan.shards() for one in records.ids] == ids
    assert labels_of(images) == [place for *_, place in rows(MEMBERS)]
    assert name_of(images, 6) == (str(folder / "bee/1.png") if kind == "folders" else ids[6])
    assert groups_of(images) == ([0] * 8 if kind == "odd csv" else None)
    again = pickle.loads(pickle.dumps(images))  # as worker processes get it
    assert torch.equal(again[7][0], images[7][0])
    assert images.picture(7).mode == "RGB"


def network(n_outputs):
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(126, n_outputs).double()).eval()


def loaded(n_outputs=4, *names):
    return LoadedModel(network(n_outputs), to_tensor, names, {})


@pytest.mark.parametrize(
    ("kind", "data"),
    [*((kind, "numbers") for kind in SOURCES), *(("folders", data) for data in DATA)],
)
def test_open_images_any_source_gives_the_same_labels(kind, data, tmp_path):
    classes, names, n, labels = DATA[data]
    members = dict.fromkeys(classes, 2)
    source = SOURCES[kind][0](sources.write(tmp_path / "data", members), members)
    open_it = unbraid.from_hugging_face if kind == "rows" else unbraid.open_images
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for outputs in [list(names) or n, *([] if names else [network(n)])]:
            found.append(open_it(source, transform=to_tensor, outputs=outputs))
        if kind != "rows":
            images, note = images_for(loaded(n, *names), str(source))
            assert note == ""
            found += [images, images_like(images, str(source))]
    for images in found:
        colours = [images.picture(k).getpixel((0, 0))[0] for k in range(len(images))]
        assert set(zip(colours, images.targets, strict=True)) == set(enumerate(labels))
        if data == "ids" or names:
            assert images.classes == list(names or IMAGENET)


def test_images_for_classes_stand_for_outputs_by_one_rule(folder):
    path = str(sources.as_csv(folder, MEMBERS))
    images, note = images_for(loaded(4, "bee", "cat", "ant", "dog"), path)
    assert (labels_of(images), note) == ([2] * 5 + [0] * 3, "")
    assert images.classes == ["bee", "cat", "ant", "dog"]
    assert "taken in order" in images_for(loaded(), path)[1]
    with pytest.warns(UserWarning, match="taken in order") as told:
        assert open_images(path, outputs=4).reading == GUESSED
    assert told[0].filename == __file__
    Path(path).write_text("path,label\nant/0.png,1\nant/1.png,2\n")
    with pytest.raises(DataError, match="a class of number 2, but the network's outputs go"):
        images_for(loaded(2), path)
    with pytest.raises(ModelError, match=r"has 3 outputs but 2 names for them.*--names"):
        images_for(loaded(3, "ant", "bee"), str(folder))


def test_images_without_labels_are_unlabelled(folder, tmp_path):
    bare = sources.write_tar(
        tmp_path / "bare.tar", *((p, (folder / p).read_bytes()) for p in sources.PATHS)
    )
    images, note = images_for(loaded(), str(bare))
    assert "images without labels; the network's predictions are taken" in note
    assert set(labels_of(images)) == {UNLABELLED}
    assert not labelled(images)
    assert not labelled(images_like(images, str(sources.as_csv(folder, MEMBERS))))
    assert labelled(open_images(folder))
    with pytest.raises(UsageError, match="no labels"):
        scanned(images, tmp_path / "scan")
    names = ["ant", "bee"]
    for bare in (
        unbraid.from_hugging_face(sources.as_rows(folder, MEMBERS), label=None, outputs=names),
        open_images(folder / "ant", outputs=names),
    ):
        assert (bare.classes, set(labels_of(bare))) == (names, {UNLABELLED})


def test_open_images_leaves_a_network_asked_for_outputs_as_it_was_and_refuses_other_kinds(folder):
    for options, fault in (
        ({"outputs": 0}, "outputs is 0; give the names"),
        ({"outputs": [1, 2]}, r"outputs is \[1, 2\]; give the names"),
        ({"outputs": network(2)}, "give transform too, or outputs as a number"),
        ({"outputs": 2, "labels": {"ant": 0, "bee": 1}}, "labels and outputs both say"),
        ({"outputs": nn.Conv2d(1, 2, 3), "transform": to_tensor}, "cannot run on the first image"),
    ):
        with pytest.raises((UsageError, ModelError), match=fault):
            open_images(folder, **options)
    asked = network(2)
    asked.training = asked[2].training = True
    state = torch.get_rng_state()
    assert open_images(folder, to_tensor, outputs=asked).targets == [0] * 5 + [1] * 3
    assert [module.training for module in asked.modules()] == [True, False, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"torn")
    with pytest.raises(DataError, match="None of the first images can be read"):
        open_images(folder, to_tensor, outputs=asked)


@pytest.mark.parametrize("source", ["list.csv", "list.parquet", "shards.tar"])
def test_list_images_source_that_cannot_be_looked_at_is_not_missing(source, folder, monkeypatch):
    sources.as_parquet(folder, MEMBERS)
    sources.as_csv(folder, MEMBERS)
    sources.as_tar(folder, MEMBERS).rename(folder / "shards.tar")
    assert len(open_images(folder / source)) == 8
    sources.fail_at(monkeypatch, source, errno.EACCES)
    fail = Mock(side_effect=OSError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr("pathlib.Path.open", fail)
    monkeypatch.setattr("pyarrow.parquet.read_schema", fail)
    with pytest.raises(OutOfReach, match=rf"{source} cannot be reached \(Permission denied\); m"):
        open_images(folder / source)


def test_part_of_and_absolute_find_a_runs_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("hf:a") == f"hf:{tmp_path}/a"
    assert absolute("https://host/a-{0..1}.tar") == "https://host/a-{0..1}.tar"
    for part in ("train", "val"):
        (tmp_path / "run" / part).mkdir(parents=True)
    assert part_of(f"{tmp_path}/run", "val") == str(tmp_path / "run/val")
    (tmp_path / "run/val.CSV").touch()
    assert part_of(f"{tmp_path}/run", "val") == str(tmp_path / "run/val.CSV")
    (tmp_path / "run/val.tar").touch()
    with pytest.raises(DataError, match=r"both val\.CSV and val\.tar; keep one"):
        part_of(f"{tmp_path}/run", "val")
    (tmp_path / "run/val").rename(tmp_path / "run/validation")
    assert part_of(f"hf:{tmp_path}/run", "val") == f"hf:{tmp_path}/run/validation"


def test_list_images_no_tar_file_of_a_folder_is_passed_over(folder):
    shards = sources.write_shards(folder, MEMBERS, 3, 5)
    (shards / "train-001.tar").rename(shards / "train-001.TAR")
    assert len(open_images(shards)) == 8
    for name, told in (
        ("more.tar.gz", r"more\.tar\.gz is compressed; unpack it"),
        ("cover.png", r"both tar files, such as train.*, and .* cover\.png"),
    ):
        (shards / name).touch()
        with pytest.raises(DataError, match=told):
            open_images(shards)
        (shards / name).unlink()
    sources.write_tar(folder / "leftover.tar")
    assert open_images(folder).classes == ["ant", "bee"]  # class folders, in spite of a tar file


def test_list_images_what_is_no_source_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow/inside").mkdir(parents=True)
    for source, told in (
        ("nowhere", "There is no folder"),
        ("empty", "no class folders"),
        ("x" * 5000, "cannot be read"),
        ("nowhere.csv", "No such file"),
        ("nowhere.tar", r"There is no shard .*nowhere\.tar"),
        ("hollow", "Folder .*inside holds no image"),
        ("images/ant/0.png", "is no source of images"),
        ("hf:nowhere", "no data set that `save_to_disk` saved|pip install datasets"),
        ("pipe:touch ran", r"Commands \(pipe:\) are not run"),
        ("list.parquet", "pip install pyarrow"),
        ("hf:saved", "pip install datasets"),
        ("http://127.0.0.1:9/a.tar", "pip install webdataset"),
    ):
        if told.startswith("pip install"):
            monkeypatch.setitem(sys.modules, told.split()[-1], None)
        with pytest.raises((DataError, UsageError), match=told):
            open_images(source)
    assert not (tmp_path / "ran").exists()
