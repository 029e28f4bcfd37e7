"""Which output each class stands for: one rule, whatever the source, in Python and beside it."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import unbraid
from unbraid.base.errors import DataError, ModelError, UsageError
from unbraid.images.broken import UNLABELLED
from unbraid.images.labels import (
    BY_ID,
    BY_NAME,
    BY_NUMBER,
    GUESSED,
    IN_ORDER,
    Classes,
    Outputs,
    read_classes,
)
from unbraid.images.open import images_for, images_like
from unbraid.networks.class_names import imagenet_classes
from unbraid.networks.models import LoadedModel

NFC, NFD = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
IMAGENET = tuple(imagenet_classes().values())
FROM_ONE = [str(k) for k in range(1, 13)]


def test_the_classes_of_imagenet_are_those_of_timm_and_torchvision():
    timm_data = pytest.importorskip("timm.data", reason="needs .[timm]")
    from torchvision.models import ResNet50_Weights

    assert list(imagenet_classes()) == timm_data.ImageNetInfo("imagenet-1k").label_names()
    assert list(IMAGENET) == ResNet50_Weights.DEFAULT.meta["categories"]


# --- the rule -------------------------------------------------------------------------------------


def read(
    classes: Sequence[str], names: Sequence[str] = (), n: int | None = None, **how: Any
) -> Any:
    outputs = Outputs(tuple(names), n or len(names) or None)
    return read_classes(Classes(classes, "The list", classes, **how), outputs)


@pytest.mark.parametrize(
    ("classes", "names", "n", "labels", "how"),
    [
        (["10", "9"], (), None, [10, 9], BY_NUMBER),
        (["010", "2.0", "3."], (), 12, [10, 2, 3], BY_NUMBER),
        (["0", "9"], list("0123456789"), 10, [0, 9], BY_NUMBER),
        (["3"], ["zero", "one", "two", "three"], 4, [3], BY_NUMBER),
        (FROM_ONE, FROM_ONE, 12, list(range(12)), BY_NAME),
        (["1.0", "2"], ["2", "01"], 2, [1, 0], BY_NAME),
        (["7", "dog"], ["dog", "7"], 2, [1, 0], BY_NAME),
        (["Dog", "CAT "], ["cat", "dog"], 2, [1, 0], BY_NAME),
        (["great-White_shark"], IMAGENET, 1000, [2], BY_NAME),
        (["Cardigan", "cardigan"], IMAGENET, 1000, [264, 474], BY_NAME),
        (["jack_o_lantern"], IMAGENET, 1000, [607], BY_NAME),
        (["Tinca_tinca", "goldfish"], ["goldfish", "tench, Tinca tinca"], 2, [1, 0], BY_NAME),
        (["tench, Tinca tinca"], ["goldfish", "tench"], 2, [1], BY_NAME),
        (["tench"], ["n15075141", "n01440764"], 2, [1], BY_NAME),
        (["n01440764"], ["n15075141 toilet tissue", "n01440764 tench, Tinca"], 2, [1], BY_NAME),
        ([NFD, "tea"], ["tea", NFC], 2, [1, 0], BY_NAME),
        (["ﬁsh", "STRASSE"], ["straße", "fish"], 2, [1, 0], BY_NAME),
        (["n01440764", "n15075141_tissue"], ["toilet tissue", "tench"], 2, [1, 0], BY_NAME),
        (["n02012849_crane"], ["crane", "crane bird"], 2, [1], BY_NAME),
        (["tench"], ["n01440764 tench, Tench"], 1, [0], BY_NAME),
        (["n00000001-dog", "n00000002-cat"], ["cat", "dog"], 2, [1, 0], BY_NAME),
        (["n15075141", "n01440764"], ["n15075141", "n01440764"], 2, [0, 1], BY_NAME),
        (["n01440764", "n15075141"], (), 1000, [0, 999], BY_ID),
        (["n01440764-tench", "N15075141_x"], IMAGENET, 1000, [0, 999], BY_ID),
        (["n01440764", "n15075141"], (), 2, [0, 1], IN_ORDER),
        ([f"n0000{k:04d}" for k in range(1000)], (), 1000, list(range(1000)), IN_ORDER),
        (["ant", "bee"], (), 2, [0, 1], IN_ORDER),
        (["ant", "bee"], (), None, [0, 1], IN_ORDER),
        (["1 ant", "2 bee"], (), None, [0, 1], IN_ORDER),
    ],
)
def test_read_classes_finds_the_output_of_each_without_a_word(classes, names, n, labels, how):
    reading = read(classes, names, n)
    assert [reading.labels[name] for name in classes] == labels
    assert (reading.how, reading.note) == (how, "")


@pytest.mark.parametrize(
    ("classes", "names", "n", "labels", "note"),
    [
        (["ant", "bee"], (), 5, [0, 1], "2 classes for 5 outputs; taken in order"),
        (["ant", "bee"], ["cat", "dog"], 2, [0, 1], "none by an output's name; taken in order"),
        (["n01440764", "n15075141"], (), 9, [0, 1], "2 classes for 9 outputs"),
        (["n01440764", "n15075141"], (), None, [0, 1], "2 WordNet ids .*give outputs=1000"),
        (["1", "2", "ant"], (), 3, [0, 1, 2], "numbers for names and others"),
        (["c1", "c10", "c2"], (), 3, [0, 1, 2], "as texts, such as 'c10' as output 1"),
        (["Ant", "ant"], (), None, [0, 1], "'Ant' and 'ant', taken for two"),
        (["CARDIGAN"], IMAGENET, 1000, [264], "fits the outputs 264, 474; the first is taken"),
        (["crane"], ["x", "crane", "crane"], 3, [1], "fits the outputs 1, 2"),
    ],
)
def test_read_classes_tells_what_is_guessed(classes, names, n, labels, note):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reading = read(classes, names, n)
    assert [reading.labels[name] for name in classes] == labels
    assert_matches(reading.note, note)
    assert reading.how in (GUESSED, BY_NAME)


def assert_matches(text: str, pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        raise DataError(text)


@pytest.mark.parametrize(
    ("classes", "names", "n", "fault"),
    [
        (
            FROM_ONE,
            (),
            12,
            "number 12, but .* from 0 to 11; number classes as outputs, so count from 0",
        ),
        (["1", "2"], FROM_ONE, 12, "'1', which is output 1 by number but output 0 by name"),
        (["99999999"], (), None, "number 99999999; number classes from 0 on"),
        (["dog", "catt"], ["dog", "cat"], 2, "'catt', which is no output's name.* mean cat"),
        (["n01440764", "n00000001"], (), 1000, "n00000001 is no class of ImageNet-1k"),
        (["a", "b", "c"], (), 2, "3 classes but the network has 2 outputs"),
        (["a", "b", "c"], ["x", "y"], 2, "3 classes but the network has 2 outputs"),
        *[
            ([odd, "1"], (), n, "which is no number of an output")
            for odd in ("1.5", "nan", "inf", "-1", "0x10", "1e3", "None", "<NA>", "1_0", "9" * 300)
            for n in (None, 2)
        ],
    ],
)
def test_read_classes_refuses_what_contradicts_itself(classes, names, n, fault):
    with pytest.raises(DataError, match=fault) as error:
        read(classes, names, n)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("folders", "names", "fault"),
    [
        (["1", "01"], (), "two folders for one class, '1' and '01'"),
        ([NFC, NFD], (), r"two folders for one class, 'Caf\\xe9' and 'Cafe\\u0301'"),
        (["n01440764", "n01440764_tench"], IMAGENET, "two folders for one class"),
        (["Dog", "dog"], ["dog", "cat"], "'Dog' and 'dog', which both mean the output 'dog'"),
    ],
)
def test_two_folders_of_one_class_are_refused(folders, names, fault):
    with pytest.raises(DataError, match=fault):
        read(folders, names, distinct=True)


# --- the same images from every source ------------------------------------------------------------


class Network(nn.Module):
    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n_outputs, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return self.bias.expand(len(x), -1)


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.full((3, 4, 4), picture.getpixel((0, 0))[0] / 255.0, dtype=torch.float32)


def loaded(n_outputs: int, names: Sequence[str] = ()) -> LoadedModel:
    return LoadedModel(Network(n_outputs).eval(), to_tensor, tuple(names), {})


def write_folders(root: Path, classes: Sequence[str], n: int = 2) -> Path:
    for place, name in enumerate(classes):
        for k in range(n):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (place, k, 0)).save(root / name / f"{k}.png")
    return root


def as_csv(root: Path, classes: Sequence[str], text: Callable[[str], Any] = str) -> str:
    path = root / "list.csv"
    with path.open("w", newline="") as file:
        rows = [(f"{c}/{k}.png", text(c)) for c in classes for k in range(2)]
        csv.writer(file).writerows([("path", "label"), *rows])
    return str(path)


def as_floats(root: Path, classes: Sequence[str]) -> str:
    return as_csv(root, classes, lambda name: f"{name}.0" if name.isdecimal() else name.upper())


def as_parquet(root: Path, classes: Sequence[str]) -> str:
    import pyarrow
    from pyarrow import parquet

    labels = [float(c) if c.isdecimal() else c for c in classes for _ in range(2)]
    paths = [f"{c}/{k}.png" for c in classes for k in range(2)]
    parquet.write_table(pyarrow.table({"path": paths, "label": labels}), root / "list.parquet")
    return str(root / "list.parquet")


def as_tar(root: Path, classes: Sequence[str]) -> str:
    path = root.with_name("all.tar")
    with tarfile.open(path, "w") as tar:
        for name in classes:
            for k in range(2):
                files = {"png": (root / name / f"{k}.png").read_bytes()}
                if name.isdecimal():
                    files["cls"] = name.encode()
                else:
                    files["json"] = json.dumps({"label": name}).encode()
                for ending, content in files.items():
                    member = tarfile.TarInfo(f"{name}/{k}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(path)


def as_rows(root: Path, classes: Sequence[str]) -> Any:
    """With class labels, whose numbers are of their own order."""
    import datasets

    order = sorted(classes, reverse=True)
    content = {
        "image": [str(root / c / f"{k}.png") for c in classes for k in range(2)],
        "label": [order.index(c) for c in classes for _ in range(2)],
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=order)}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def as_saved(root: Path, classes: Sequence[str]) -> str:
    as_rows(root, classes).save_to_disk(root.with_name("saved"))
    return f"hf:{root.with_name('saved')}"


SOURCES = {
    "folders": lambda root, classes: str(root),
    "csv": as_csv,
    "csv of floats": as_floats,
    "parquet": as_parquet,
    "tar": as_tar,
    "saved": as_saved,
    "rows": as_rows,
}
DATA = {
    "numbers": (["2", "10", "0"], (), 12, [2, 10, 0]),
    "names": (["great_white_shark", "Tench"], IMAGENET, 1000, [2, 0]),
    "ids": (["n15075141", "n01440764"], (), 1000, [999, 0]),
    "ids of other outputs": (["n15075141", "n01440764"], ("tench", "toilet_tissue"), 2, [1, 0]),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs .[datasets]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def shown(images: Any) -> list[tuple[int, int]]:
    """What each picture shows, by its colour, and its label."""
    places = [images.picture(k).getpixel((0, 0))[0] for k in range(len(images))]
    return sorted(set(zip(places, images.targets, strict=True)))


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("data", DATA)
def test_the_same_data_gets_the_same_labels_from_every_source(kind, data, tmp_path):
    classes, names, n, labels = DATA[data]
    source = SOURCES[kind](write_folders(tmp_path / "data", classes), classes)
    ways: list[Any] = [list(names) or n]
    if not names:
        ways.append(Network(n))
    opened = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for outputs in ways:
            opener = unbraid.from_hugging_face if kind == "rows" else unbraid.open_images
            opened.append(opener(source, transform=to_tensor, outputs=outputs))
        if kind != "rows":
            images, note = images_for(loaded(n, names), source)
            assert note == ""
            opened += [images, images_like(images, source)]
    for images in opened:
        assert shown(images) == list(enumerate(labels))
    if data == "ids":
        assert all(images.classes == list(IMAGENET) for images in opened)
    if names:
        assert all(images.classes == list(names) for images in opened)


def test_a_list_with_one_other_label_is_seen_to_differ(tmp_path):
    classes, _, n, labels = DATA["numbers"]
    path = Path(as_csv(write_folders(tmp_path / "data", classes), classes))
    path.write_text(path.read_text().replace("2/1.png,2", "2/1.png,3"))
    assert shown(unbraid.open_images(path, outputs=n)) != list(enumerate(labels))


@pytest.mark.parametrize(
    ("classes", "labels"), [(["0", "1", "10"], [0, 1, 10]), (["b", "a"], [1, 0])]
)
@pytest.mark.parametrize("kind", SOURCES)
def test_without_outputs_numbers_are_numbers_from_every_source(kind, classes, labels, tmp_path):
    source = SOURCES[kind](write_folders(tmp_path / "data", classes), classes)
    opener = unbraid.from_hugging_face if kind == "rows" else unbraid.open_images
    images = opener(source)
    if kind in ("rows", "saved") and classes == ["b", "a"]:
        labels = [0, 1]  # class labels have an order of their own
    assert shown(images) == list(enumerate(labels))


def test_ids_in_order_are_told_in_python(tmp_path):
    source = write_folders(tmp_path / "data", ["n01440764", "n15075141"])
    with pytest.warns(UserWarning, match="2 WordNet ids .* give outputs=1000") as told:
        images = unbraid.open_images(source)
    assert told[0].filename == __file__
    assert (images.classes, images.reading) == (["tench", "toilet tissue"], GUESSED)
    with pytest.warns(UserWarning, match="2 WordNet ids"):
        unbraid.from_hugging_face(as_rows(source, ["n01440764", "n15075141"]))


def test_validation_images_get_labels_of_training_in_whatever_form(tmp_path):
    train = write_folders(tmp_path / "train", ["Great_White", NFC, "7", "n01440764"])
    labels = {"Great_White": 3, NFC: 0, "7": 7, "n01440764": 5}
    images = unbraid.open_images(train, to_tensor, labels)
    val = write_folders(tmp_path / "val", ["great white", NFD, "007", "n01440764-tench"])
    assert shown(images_like(images, str(val))) == [(0, 3), (1, 0), (2, 7), (3, 5)]
    (val / "list.csv").write_text("path,label\ngreat white/0.png,GREAT WHITE\n007/0.png,7.0\n")
    assert images_like(images, str(val / "list.csv")).targets == [3, 7]
    (val / "list.csv").write_text("path,label\n007/0.png,8\n")
    with pytest.raises(DataError, match="a class '8' that the training images have not"):
        images_like(images, str(val / "list.csv"))


@pytest.mark.parametrize("written", [NFC, NFD])
def test_a_listed_path_is_found_in_any_unicode_form(written, tmp_path):
    (other,) = {NFC, NFD} - {written}
    write_folders(tmp_path / f"of {written}", [written, "tea"])
    (tmp_path / "list.csv").write_text(
        f"path,label\nof {other}/{other}/0.png,{other}\nof {other}/{written}/1.png,{written}\n"
    )
    images = unbraid.open_images(tmp_path / "list.csv")
    assert images.targets == [0, 0]
    assert images.ids == [f"of {written}/{written}/{k}.png" for k in range(2)]
    assert images.picture(1).size == (4, 4)
    (tmp_path / "list.csv").write_text(
        f"path,label\nof {other}/{other}/0.png,a\nof {written}/{written}/0.png,a\n"
    )
    with pytest.raises(DataError, match="a second time; name each image once"):
        unbraid.open_images(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"outputs": 0}, "outputs is 0; give the names"),
        ({"outputs": True}, "outputs is True; give the names"),
        ({"outputs": "dog"}, "outputs is 'dog'; give the names"),
        ({"outputs": []}, r"outputs is \[\]; give the names"),
        ({"outputs": [1, 2]}, r"outputs is \[1, 2\]; give the names"),
        ({"outputs": {"ant", "bee"}}, "outputs is {'"),
        ({"outputs": 2.5}, "outputs is 2.5; give the names"),
        ({"outputs": Network(2)}, "give transform too, or outputs as a number"),
        ({"outputs": 2, "labels": {"ant": 0, "bee": 1}}, "labels and outputs both say"),
        ({"outputs": nn.Conv2d(1, 2, 3), "transform": to_tensor}, "cannot run on the first image"),
    ],
)
def test_outputs_of_another_kind_are_refused(options, fault, tmp_path):
    source = write_folders(tmp_path / "data", ["ant", "bee"])
    with pytest.raises((UsageError, ModelError), match=fault):
        unbraid.open_images(source, **options)


def test_a_network_that_is_asked_for_its_outputs_is_left_as_it_was(tmp_path):
    source = write_folders(tmp_path / "data", ["ant", "bee"])
    network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(48, 2, dtype=torch.float32))
    network[1].eval()
    state = torch.get_rng_state()
    assert unbraid.open_images(source, to_tensor, outputs=network).targets == [0, 0, 1, 1]
    assert [module.training for module in network] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DataError, match=r"not a tensor; give the data set a transform"):
        unbraid.open_images(source, lambda picture: picture, outputs=network)
    for path in source.rglob("*.png"):
        path.write_bytes(b"torn")
    with pytest.raises(DataError, match="None of the first images can be read"):
        unbraid.open_images(source, to_tensor, outputs=network)


def test_images_without_labels_take_the_names_of_outputs(tmp_path):
    source = write_folders(tmp_path / "data", ["."])
    assert unbraid.open_images(source, outputs=["ant", "bee"]).classes == ["ant", "bee"]
    rows = as_rows(write_folders(tmp_path / "rows", ["a"]), ["a"])
    images = unbraid.from_hugging_face(rows, label=None, outputs=["ant", "bee"])
    assert (images.classes, set(images.targets)) == (["ant", "bee"], {UNLABELLED})


def test_classes_without_images_do_not_matter(tmp_path):
    import datasets

    rows = as_rows(write_folders(tmp_path / "data", ["0", "1"]), ["0", "1"])
    for names, labels in (
        (["1", "0", "99999999"], [1, 0]),
        (["dog", "cat", "wolf"], [0, 1]),
        (["n01440764", "n15075141", "n00000001"], [0, 1]),
    ):
        feature = datasets.ClassLabel(names=names)
        images = unbraid.from_hugging_face(
            datasets.Dataset.from_dict(
                {"image": rows["image"], "label": [0, 0, 1, 1]},
                features=datasets.Features({"image": datasets.Image(), "label": feature}),
            ),
            outputs=["dog", "cat"] if "dog" in names else 2,
        )
        assert images.targets == [label for label in labels for _ in range(2)]
        assert len(images.classes) == 2


def test_outputs_with_more_or_fewer_names_are_refused(tmp_path):
    source = write_folders(tmp_path / "data", ["ant", "bee"])
    with pytest.raises(ModelError, match=r"has 3 outputs but 2 names for them.*--names"):
        images_for(loaded(3, ["ant", "bee"]), str(source))


def test_names_of_timms_networks_are_known():
    timm = pytest.importorskip("timm", reason="needs .[timm]")
    from unbraid.networks.class_names import output_names

    assert output_names(timm.create_model("resnet18")) == IMAGENET
    assert output_names(timm.create_model("resnet18", num_classes=10)) == ()
    named = timm.create_model("resnet18", num_classes=2)
    named.pretrained_cfg = {**named.pretrained_cfg, "label_names": ["cat", "dog"]}
    assert output_names(named) == ("cat", "dog")


# --- images beside class folders ------------------------------------------------------------------


def test_images_beside_class_folders_are_told_and_left_out(tmp_path):
    source = write_folders(tmp_path / "data", ["a", "b", "c"])
    for k in range(5):
        Image.new("RGB", (4, 4)).save(source / f"cover{k}.png")
    said = r"5 images beside the class folders .*\(cover0\.png, cover1\.png, cover2\.png, \.\.\.\)"
    with pytest.warns(UserWarning, match=said):
        images = unbraid.open_images(source)
    assert shown(images) == [(0, 0), (1, 1), (2, 2)]
    assert len(images) == 6
    images, note = images_for(loaded(3), str(source))
    assert_matches(note, said)
    with pytest.warns(UserWarning, match=said):
        assert len(images_like(images, str(source))) == 6
    with pytest.warns(UserWarning, match=said):
        unbraid.open_images(source, labels={"a": 0, "b": 1, "c": 2})
    assert unbraid.open_images(source, labels={}).targets == [UNLABELLED] * 11
    Image.new("RGB", (4, 4)).save(source / "cover5.png")
    for opener in (unbraid.open_images, lambda where: images_for(loaded(3), str(where))):
        with pytest.raises(DataError, match="6 images of its own and 6 in folders, so it is not"):
            opener(source)


def test_an_image_beside_tar_files_is_told(tmp_path):
    source = write_folders(tmp_path / "data", ["a", "b"])
    (tmp_path / "shards").mkdir()
    Path(as_tar(source, ["a", "b"])).rename(tmp_path / "shards/all.tar")
    (source / "a/0.png").rename(tmp_path / "shards/cover.png")
    with pytest.raises(DataError, match=r"both tar files, such as all\.tar, and .* cover\.png"):
        unbraid.open_images(tmp_path / "shards")


def test_images_beside_folders_without_any_are_unlabelled(tmp_path):
    source = write_folders(tmp_path / "data", [".", "notes"])
    for path in (source / "notes").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert unbraid.open_images(source).targets == [UNLABELLED] * 2


@pytest.mark.parametrize(
    "name",
    [
        ".hidden.png",
        "._a.png",
        "a/._0.png",
        ".ipynb_checkpoints/a-checkpoint.png",
        "a/.ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/a/._0.png",
        "@eaDir/a/thumb.jpg",
        "a/@eaDir/thumb.jpg",
        ".git/logo.png",
        ".Trash/a/0.png",
    ],
)
def test_hidden_files_and_those_of_programs_are_passed_over(name, tmp_path):
    source = write_folders(tmp_path / "data", ["a", "b"])
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_bytes(b"no picture")
    flat = write_folders(tmp_path / "flat", ["."])
    (flat / name).parent.mkdir(parents=True, exist_ok=True)
    (flat / name).write_bytes(b"no picture")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shown(unbraid.open_images(source)) == [(0, 0), (1, 1)]
        assert images_for(loaded(2), str(source))[1] == ""
        assert len(unbraid.open_images(flat)) == 2
    as_tar(source, ["a", "b"])
    with tarfile.open(tmp_path / "all.tar", "a") as tar:
        tar.add(source / name, f"{name}")
    assert len(unbraid.open_images(tmp_path / "all.tar")) == 4
    shards = tmp_path / "shards"
    (shards / name).parent.mkdir(parents=True, exist_ok=True)
    (shards / name).write_bytes(b"no picture")
    (tmp_path / "all.tar").rename(shards / "all.tar")
    if "a" not in [part for part in Path(name).parts[:1]]:
        assert len(unbraid.open_images(shards)) == 4


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (
            ["Ant", "ant", "bee"],
            r"3 classes .* 2 outputs; join those of one name, such as 'Ant' an",
        ),
        (
            ["ant", "bee", "cow"],
            r"remove those that it does not know \(of 'ant', 'bee', 'cow'\)\.$",
        ),
    ],
)
def test_read_classes_says_which_are_too_many(classes, words):
    with pytest.raises(DataError, match=words):
        read_classes(Classes(classes, "It", classes), Outputs((), 2))


def test_read_classes_notes_parts_of_a_data_set():
    assert "look like parts of a data set" in read(["train", "val"], n=2).note
    assert read(["plane", "train"], n=2).note == ""


def test_class_folders_that_are_links_are_followed_where_outputs_are_counted(tmp_path):
    write_folders(tmp_path / "data", ["ant", "bee"])
    (tmp_path / "linked").mkdir()
    for name in ("ant", "bee"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "data" / name)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, dtype=torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = unbraid.open_images(tmp_path / "linked", to_tensor, outputs=network)
    assert images.targets == [0, 0, 1, 1]
    for way in (str(tmp_path / "linked"), str(tmp_path / "data")):
        opened, note = images_for(LoadedModel(network, to_tensor, (), {}), way)
        assert (opened.targets, note) == ([0, 0, 1, 1], "")
