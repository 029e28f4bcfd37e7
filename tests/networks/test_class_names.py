"""Names for classes from a file, and where people read them."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import MEMBERS, to_tensor, write
from torch import nn

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError
from unbraid.images.labels import AS_GIVEN, Reading, show_names
from unbraid.images.open import images_for
from unbraid.networks.class_names import imagenet_classes, read_names
from unbraid.networks.models import LoadedModel
from unbraid.running.folders import validation_images

INDEX = {"0": ["n02012849", "crane"], "1": ["n03126707", "crane"], "2": ["n01440764", "tench"]}


def loaded(n_outputs, own=(), **options):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 7 * 6, n_outputs)).eval()
    return LoadedModel(network, lambda _: torch.zeros(3, 7, 6), own, {}, **options)


def names_of(tmp_path, name, content):
    """Those read from a file with this content; None is no file."""
    path = tmp_path / name
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, errors="surrogateescape")
    return read_names(path)


def test_read_names_takes_what_is_usual(tmp_path):
    for name, content, by_output, by_class in (
        ("a.csv", 'folder,name\nant,"Ant, red"\nbee,Bee\n', {}, {"ant": "Ant, red", "bee": "Bee"}),
        ("a.csv", "name;note;id\nAnt;x;n00000001\n", {}, {"n00000001": "Ant"}),
        ("a.csv", "\ufeffnumber,name\r\n0,Ant\r\n10,Bee\r\n", {0: "Ant", 10: "Bee"}, {}),
        ("a.csv", "label,id\nAnt,0\nBee,1\n", {0: "Ant", 1: "Bee"}, {}),
        ("a.txt", "n00000001 tench, Tinca tinca\n", {}, {"n00000001": "tench, Tinca tinca"}),
        ("a.txt", "0 Ant\n1 Bee\n", {0: "Ant", 1: "Bee"}, {}),
        ("a.txt", "1: Ant\n2: Bee\n", {0: "Ant", 1: "Bee"}, {}),
        ("a.txt", "/a/abbey 0\n/b/bar 1\n", {0: "/a/abbey", 1: "/b/bar"}, {}),
        ("a.tsv", "ant\tAnt, red\n", {}, {"ant": "Ant, red"}),
        ("a.json", ["Ant", "Bee"], {0: "Ant", 1: "Bee"}, {}),
        ("a.json", {"Ant": "1", "Bee": "0"}, {1: "Ant", 0: "Bee"}, {}),
        ("a.json", {"ant": "Ant", "3": "Bee"}, {3: "Bee"}, {"ant": "Ant"}),
        ("a.json", {"id2label": {"0": "Ant"}, "label2id": {"Ant": 0}}, {0: "Ant"}, {}),
        ("a.txt", "0,Ant\n1,Bee, or wasp\n", {0: "Ant", 1: "Bee, or wasp"}, {}),
        ("a.txt", "{0: 'Ant, red',\n 1: \"Bee's\"}", {0: "Ant, red", 1: "Bee's"}, {}),
        ("a.txt", "['Ant',\n 'Bee',\n]", {0: "Ant", 1: "Bee"}, {}),
        ("a.txt", "n00000001 1 a\nn00000002 2 b\n", {}, {"n00000001": "a", "n00000002": "b"}),
        ("a.json", {"2": ["n01440764", "tench"]}, {2: "tench"}, {"n01440764": "tench"}),
    ):
        names = names_of(tmp_path, name, content)
        assert (names.by_output, names.by_class) == (by_output, by_class)


def test_read_names_of_a_file_without_names_is_told(tmp_path):
    for name, content in (
        ("nowhere.txt", None),
        ("a.txt", "\udcff\udcfe"),  # as bytes
        ("a.txt", "{'Ant', open('x')}"),
        ("a.json", [1, 2]),
        ("a.txt", "['\\d', 1]"),
        ("a.csv", "folder,name\nant,\n"),
        ("a.csv", "folder,name\nant,Ant\nANT,Bee\n"),
        ("a.csv", 'folder,name\nant,"Ant\n'),
        ("a.csv", "number,name\n99999999,Ant\n"),
        ("a.json", {}),
        ("a.json", "[" * 100_000),
        ("a.json", {"0": {"name": "Ant"}}),
        ("a.json", '["\\ud800"]'),
        ("a.txt", "Ant\n\nBee\n"),
    ):
        with pytest.raises(DataError, match=rf"Names .*{name} cannot be read \(.*\); give a CSV"):
            names_of(tmp_path, name, content)


@given(
    st.sampled_from([".csv", ".json", ".txt", ".tsv"]),
    st.binary(max_size=60)
    | st.text("01n,;\"'\n\t[]{}: é-.", max_size=40).map(str.encode)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    ).map(lambda told: json.dumps(told).encode()),
)
@settings(max_examples=300, deadline=None)
def test_read_names_of_any_file_gives_names_or_tells(tmp_path_factory, ending, content):
    path = tmp_path_factory.getbasetemp() / f"names{ending}"
    path.write_bytes(content)
    try:
        names = read_names(path)
    except DataError:
        return
    assert names.by_output or names.by_class
    assert all(text.strip() for text in (*names.by_output.values(), *names.by_class.values()))


def test_names_of_a_file_are_shown_and_matched(tmp_path):
    source, flat = str(write(tmp_path / "data", MEMBERS)), str(tmp_path / "data/ant")
    own = ("Bee", "Ant")
    for content, names, folder, classes in (
        (["Biene", "Ameise"], own, source, ["Biene", "Ameise"]),
        (["bee", "ANT"], (), source, ["bee", "ANT"]),
        ({"ANT": "Ameise"}, own, source, ["Bee", "Ameise"]),
        (["Biene", "Ameise"], own, flat, ["Biene", "Ameise"]),
        (["x", "y"], (), source, ["ant", "bee"]),  # which of them is x is a guess
    ):
        network = loaded(2, names, names=names_of(tmp_path, "a.json", content))
        images, note = images_for(network, folder)
        assert images.classes == classes
        if content == ["x", "y"]:
            assert "none by an output's name" in note
        elif folder == source:
            assert (images.labels, note) == ({"ant": 1, "bee": 0}, "")


def test_names_of_something_else_are_refused(tmp_path):
    source = str(write(tmp_path / "data", MEMBERS))
    for content, fault in (
        (["a", "b", "c"], "names outputs 0 to 2, but the network's go from 0 to 1; give names for"),
        ({"1": "Ant", "2": "Bee"}, r"counts outputs from 1; count from 0\.$"),
        ({"wasp": "Wasp"}, "no name for any class, such as 'ant'; give names for these"),
    ):
        with pytest.raises(DataError, match=fault):
            images_for(loaded(2, names=names_of(tmp_path, "a.json", content)), source)


def test_wordnet_ids_are_shown_with_their_names_and_equal_ones_apart(tmp_path):
    source = str(write(tmp_path / "data", {pair[0]: 1 for pair in INDEX.values()}))
    images, _ = images_for(loaded(1000), source)
    assert images.classes == list(imagenet_classes().values())
    images, _ = images_for(loaded(1000, names=names_of(tmp_path, "a.json", INDEX)), source)
    shown = [images.classes[label] for label in images.labels.values()]
    assert sorted(shown) == ["crane (n02012849)", "crane (n03126707)", "tench"]
    reading = Reading({"x": 0, "n00000001": 1, "n00000002-dog": 3}, AS_GIVEN)
    assert show_names(reading, {}, reading.labels) == ["x", "n00000001", "", "dog"]
    same = Reading({"a": 0, "b": 1}, AS_GIVEN)
    assert show_names(same, {"a": "b", "b": "b"}, ["a", "b"]) == ["b (a)", "b (1)"]


def test_a_scan_that_is_there_takes_other_names_without_running_again(tmp_path):
    images, times = SyntheticImages(6), []
    for classes in ("abcd", "efgh", ""):
        images.classes = list(classes)
        scan = unbraid.scan(build("1x1"), "layer", images, tmp_path)
        assert scan.class_names == tuple(classes or "efgh")
        times.append([path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")])
    assert times == [times[0]] * 3


@pytest.mark.parametrize(
    ("classes", "names"), [("ab", ()), ("Ab", tuple("bacd")), ("03", ()), ("03", ("x",) * 4)]
)
def test_a_report_finds_its_images_again_whatever_they_are_called(classes, names, tmp_path):
    source = str(write(tmp_path / "data/val", dict.fromkeys(classes, 2)))
    network = LoadedModel(build("3x3"), to_tensor, names, {})
    images, _ = images_for(network, source)
    scan = unbraid.scan(network.model, "layer", images, tmp_path / "scan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = validation_images({"data": str(tmp_path / "data")}, scan)
    assert again.classes == images.classes
    known = dict(zip(images.targets, again.targets, strict=True))  # by folder
    assert [known[target] for target in images.targets] == again.targets
    assert len(set(again.targets)) == 2
