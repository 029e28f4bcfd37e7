"""Which output each class stands for: one rule, whatever the source, in Python and beside it."""

import re
import unicodedata

import pytest
from sources import to_tensor, write
from torchvision.models import ResNet50_Weights

from unbraid.base.errors import DataError
from unbraid.images import labels as of
from unbraid.images.labels import BY_ID, BY_NAME, BY_NUMBER, GUESSED, IN_ORDER
from unbraid.images.open import images_like, open_images
from unbraid.networks.class_names import imagenet_classes, output_names

NFC, NFD = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
IMAGENET = tuple(imagenet_classes().values())
FROM_ONE = [str(k) for k in range(1, 13)]


def test_names_of_imagenet_and_of_timms_networks_are_those_of_their_libraries():
    timm = pytest.importorskip("timm", reason="needs .[timm]")
    assert list(imagenet_classes()) == timm.data.ImageNetInfo("imagenet-1k").label_names()
    assert list(IMAGENET) == ResNet50_Weights.DEFAULT.meta["categories"]
    network = timm.create_model("lcnet_035")
    assert output_names(network) == IMAGENET
    names = ["cat", "dog"] * 500
    network.pretrained_cfg = {**network.pretrained_cfg, "label_names": names}
    assert output_names(network) == tuple(names)
    assert output_names(timm.create_model("lcnet_035", num_classes=10)) == ()


def read(classes, names=(), n=None, **how):
    outputs = of.Outputs(tuple(names), n or len(names) or None)
    return of.read_classes(of.Classes(classes, "The list", classes, **how), outputs)


def test_read_classes_finds_outputs_notes_guesses_and_refuses_what_contradicts_itself():
    for classes, names, n, labels, how, note in (
        (["10", "9"], (), None, [10, 9], BY_NUMBER, ""),
        (["010", "2.0", "3."], (), 12, [10, 2, 3], BY_NUMBER, ""),
        (FROM_ONE, FROM_ONE, 12, list(range(12)), BY_NAME, ""),
        (["great-White_shark"], IMAGENET, 1000, [2], BY_NAME, ""),
        (["Cardigan", "cardigan"], IMAGENET, 1000, [264, 474], BY_NAME, ""),
        (["Tinca_tinca", "goldfish"], ["goldfish", "tench, Tinca tinca"], 2, [1, 0], BY_NAME, ""),
        (["n01440764"], ["n15075141 toilet tissue", "n01440764 tench, Tinca"], 2, [1], BY_NAME, ""),
        ([NFD, "tea"], ["tea", NFC], 2, [1, 0], BY_NAME, ""),
        (["ﬁsh", "STRASSE"], ["straße", "fish"], 2, [1, 0], BY_NAME, ""),
        (["n02012849_crane"], ["crane", "crane bird"], 2, [1], BY_NAME, ""),
        (["n01440764", "n15075141"], (), 1000, [0, 999], BY_ID, ""),
        (["n01440764-tench", "N15075141_x"], IMAGENET, 1000, [0, 999], BY_ID, ""),
        ([f"n0000{k:04d}" for k in range(1000)], (), 1000, list(range(1000)), IN_ORDER, ""),
        (["ant", "bee"], (), 2, [0, 1], IN_ORDER, ""),
        (["ant", "bee"], (), 5, [0, 1], GUESSED, "2 classes for 5 outputs; taken in order"),
        (["ant", "bee"], ["cat", "dog"], 2, [0, 1], GUESSED, "none by an output's name; taken"),
        (["n01440764", "n15075141"], (), None, [0, 1], GUESSED, "2 WordNet ids .*outputs=1000"),
        (["1", "2", "ant"], (), 3, [0, 1, 2], GUESSED, "as texts, such as '1' as output 0"),
        (["Ant", "ant"], (), None, [0, 1], GUESSED, "'Ant' and 'ant', taken for two"),
        (["train", "val"], (), 2, [0, 1], GUESSED, "look like parts of a data set"),
        (["plane", "train"], (), 2, [0, 1], IN_ORDER, ""),
        (["CARDIGAN"], IMAGENET, 1000, [264], BY_NAME, "fits the outputs 264, 474; the first is"),
    ):
        reading = read(classes, names, n)
        assert [reading.labels[name] for name in classes] == labels
        assert reading.how == how
        assert re.search(note, reading.note)
        assert bool(reading.note) == bool(note)
    for classes, names, n, fault in (
        (FROM_ONE, (), 12, "number 12, but .* from 0 to 11; number classes as .* count from 0"),
        (["1", "2"], FROM_ONE, 12, "'1', which is output 1 by number but output 0 by name"),
        (["99999999"], (), None, "number 99999999; number classes from 0 on"),
        (["dog", "catt"], ["dog", "cat"], 2, "'catt', which is no output's name.* mean cat"),
        (["n01440764", "n00000001"], (), 1000, "n00000001 is no class of ImageNet-1k"),
        (["Ant", "ant", "bee"], (), 2, "3 classes .* 2 outputs; .* such as 'Ant', 'ant'"),
        (["a", "b", "c"], ["x", "y"], 2, "3 classes but the network has 2 outputs"),
        *(([odd, "1"], (), 2, "no number of an output") for odd in ("1.5", "0x10", "9" * 300)),
    ):
        with pytest.raises(DataError, match=fault) as error:
            read(classes, names, n)
        assert len(str(error.value)) < 250


def test_read_classes_two_folders_for_one_output_are_refused(tmp_path):
    for folders, names in (
        (["1", "01"], ()),
        (["n01440764", "n01440764_tench"], IMAGENET),
        (["Dog", "dog"], ["cat", "dog"]),
        ([NFC, NFD], ["tea", NFC]),
    ):
        with pytest.raises(DataError, match=r"'.*' and '.*', which both stand for output .; join"):
            read(folders, names, of_folders=True)
        assert len({read(folders, names).labels[name] for name in folders}) == 1  # as in lists
        root = write(tmp_path / folders[0], dict.fromkeys(folders, 1))
        assert open_images(root, labels=dict.fromkeys(folders, 1)).targets == [1, 1]


def test_images_like_takes_labels_of_training_in_whatever_form(tmp_path):
    labels = {"Great_White": 3, NFC: 0, "7": 7, "n01440764": 5}
    train = write(tmp_path / "train", dict.fromkeys(labels, 1))
    images = open_images(train, to_tensor, labels)
    forms = ("great white", NFD, "007", "n01440764-tench")
    val = write(tmp_path / "val", dict.fromkeys(forms, 1))
    like = images_like(images, str(val))
    places = [like.picture(k).getpixel((0, 0))[0] for k in range(4)]
    assert sorted(zip(places, like.targets, strict=True)) == [(0, 3), (1, 0), (2, 7), (3, 5)]
    (val / "list.csv").write_text("path,label\ngreat white/0.png,GREAT WHITE\n007/0.png,7.0\n")
    assert images_like(images, str(val / "list.csv")).targets == [3, 7]
    (val / "list.csv").write_text("path,label\n007/0.png,8\n")
    with pytest.raises(DataError, match="a class '8' that the training images have not"):
        images_like(images, str(val / "list.csv"))
