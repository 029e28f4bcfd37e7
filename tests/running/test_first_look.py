"""A first look at some images, and the run over all of them that goes on from its records."""

import shutil
import warnings

import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.transforms.functional import to_tensor

import unbraid
from running.test_run import LOOSE, content, die_until_done, network
from tiny_networks import SyntheticImages
from unbraid.base.errors import DataError, UsageError
from unbraid.images import sample
from unbraid.images.open import open_images
from unbraid.running import finished, first_look
from unbraid.running.check import check
from unbraid.running.finished import Run
from unbraid.running.folders import first_look_in_words
from unbraid.running.told import told as told_of
from unbraid.scanning import scan as scanning
from unbraid.scanning import shards
from unbraid.scanning.many import open_scan
from unbraid.scanning.scan import scan_into
from unbraid.scanning.scan_options import Loading

N_TRAIN, N_VAL = 80, 30
TRAIN, VAL = SyntheticImages(N_TRAIN, seed=48), SyntheticImages(N_VAL, seed=24)


class Broken(SyntheticImages):
    """Images of which one cannot be read."""

    def __init__(self, n_images, broken, **options):
        super().__init__(n_images, **options)
        self.broken = broken

    def __getitem__(self, index):
        if index == self.broken:
            raise ValueError("no picture")
        return super().__getitem__(index)


def small(patch):
    """Shards of 16 images; a first look at 32 and 16; runs are large from 60 images on."""
    patch.setattr(scanning, "images_per_shard", lambda positions: 16)
    patch.setitem(sample.SIZES, "train", 32)
    patch.setitem(sample.SIZES, "val", 16)
    patch.setattr(first_look, "LARGE", 60)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small(monkeypatch)


def run(out, quick=None, train=TRAIN, val=VAL, model=None, layers=("2",), **options):
    """The runs that were made, the first look's before that over all images."""
    usual = {"source": {}, "title": "x", "features": False, "say": lambda _: None}
    usual |= {"thresholds": LOOSE, "loading": Loading(batch_size=8), "labels": "given"}
    asked = (model or network(), layers, train, val, out)
    return list(first_look.run_in_turn(*asked, quick=quick, command="COMMAND", **usual | options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run over all images leaves that had no first look."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        assert len(run(folder, quick=False)) == 1
    return content(folder)


def assert_same(out, whole):
    """But for what a first look left, a folder holds the same bytes."""
    own = {name: text for name, text in content(out).items() if not name.startswith("quick/")}
    assert own.keys() == whole.keys()
    assert [name for name in whole if own[name] != whole[name]] == []


def chosen(images, n):
    return sample.sample_of(images, n, by_class=True)


def test_first_look_then_all_images_is_the_same_as_all_at_once(tmp_path, whole, monkeypatch):
    out, scanned, scan_batch = tmp_path / "run", [], shards.scan_batch
    [look] = run(out, quick=True)
    result = look.runs["2"]
    assert result.folder == out / "quick"
    assert [result.train_scan.manifest.n_images, result.val_scan.manifest.n_images] == [32, 16]
    assert check(out).whole
    before = content(out / "quick")

    def count(model, places, items, **options):
        scanned.append(0 if options["positions"] else len(items))
        return scan_batch(model, places, items, **options)

    monkeypatch.setattr(shards, "scan_batch", count)
    [done] = run(out)
    assert done.runs["2"].folder == out
    assert sum(scanned) == N_TRAIN - 32 + N_VAL - 16
    assert_same(out, whole)
    assert content(out / "quick") == before
    for name, images, n in (("scan-train", TRAIN, 32), ("scan-val", VAL, 16)):
        scan, first = open_scan(out / name), chosen(images, n)
        index = torch.cat(list(scan.columns("index"))).tolist()
        assert index == first + [k for k in range(len(images)) if k not in first]
        assert [images.targets[k] for k in first].count(0) == n / 4
        assert max(scan.manifest.sampled) < n


def test_large_run_looks_first_by_itself_and_then_only_if_nothing_of_all_was_scanned(
    tmp_path, whole, monkeypatch
):
    said = []
    look, done = run(tmp_path, say=said.append)
    assert [look.runs["2"].folder, done.runs["2"].folder] == [tmp_path / "quick", tmp_path]
    assert_same(tmp_path, whole)
    assert any("32 of 80 training and 16 of 30 validation images" in text for text in said)
    assert len(run(tmp_path)) == 1
    monkeypatch.setattr(first_look, "LARGE", 81)
    assert len(run(tmp_path / "small")) == 1
    assert not (tmp_path / "small/quick").exists()


def test_what_all_images_would_be_refused_for_is_told_before_the_first_look(tmp_path, monkeypatch):
    names = [f"{k}.png" for k in range(40)]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    lines = ["path,label", *(f"{name},0" for name in names), "39.png,1"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    images = open_images(tmp_path / "list.csv", to_tensor)
    monkeypatch.setattr(first_look, "sample_of", lambda _, n, by_class: list(range(n)))
    with pytest.raises(UsageError, match=r"^39.png as .: images have several labels; use"):
        run(tmp_path / "run", quick=True, train=images)
    assert not (tmp_path / "run").exists()


def test_first_look_says_how_sure_it_is_and_what_goes_on(tmp_path):
    [look] = run(tmp_path, quick=True)
    result = look.runs["2"]
    n_sure = len(result.found.sure_channels)
    told = (
        "First look at 32 of 80 training and 16 of 30 validation images: "
        f"{n_sure} sure, {len(result.found.concepts) - n_sure} uncertain polysemantic channels. "
        "The full run: COMMAND"
    )
    assert told in told_of(result)
    assert told in result.page.read_text()
    assert "First look" not in str(told_of(run(tmp_path, quick=False)[0].runs["2"]))
    assert first_look_in_words({"first_look": {"images": 3}}, result.found) == ""  # not of ours


def test_first_look_that_is_killed_goes_on_and_so_does_the_run_after_it(tmp_path, whole):
    _, n_kills = die_until_done(lambda: run(tmp_path), lambda: None, shards, "_write")
    assert n_kills >= 5  # shards of the first look, taken over, and of the rest
    assert_same(tmp_path, whole)
    assert (tmp_path / "quick/report.html").exists()


DIFFERENCES = {  # once for each of the two scans, unless only training images are others
    "weights": ["the network's weights"] * 2,
    "batch size": ["the batch size"] * 2,
    "labels": ["the images or labels"],
    "image": ["the images or labels"],
}


@pytest.mark.parametrize(
    "change", ["weights", "batch size", "labels", "damaged", "gone", "incomplete", "image"]
)
def test_records_of_another_first_look_are_not_taken(change, tmp_path, whole, recwarn):
    images, options, model = TRAIN, {}, network()
    if change == "weights":
        model = network(seed=1)
    if change == "labels":
        images = SyntheticImages(N_TRAIN, seed=48)
        images.targets = images.targets[1:] + images.targets[:1]
    if change == "image":
        images = SyntheticImages(N_TRAIN, seed=49)
    if change == "batch size":
        options = {"loading": Loading(batch_size=4)}
    run(tmp_path, quick=True, train=images, model=model, **options)
    scan = tmp_path / "quick/scan-train"
    if change == "damaged":
        (scan / "shard-000000.safetensors").write_bytes(b"no shard")
    if change == "gone":
        (scan / "manifest.json").write_text("{")
    if change == "incomplete":
        (scan / "shard-000001.safetensors").unlink()
    warnings.simplefilter("always")
    recwarn.clear()
    run(tmp_path, quick=False)
    assert_same(tmp_path, whole)
    told = [str(one.message) for one in recwarn if "are made again" in str(one.message)]
    assert told == [
        f"The records of the first look are made again, with a difference in {words}."
        for words in DIFFERENCES.get(change, [])
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_only_a_first_look_at_the_same_network_decides_how_the_rest_is_scanned(seed, tmp_path):
    usual = {"batch_size": 3, "channels_last": True, "threads": 2, "labels": "given"}
    images = Subset(TRAIN, chosen(TRAIN, 32))
    unbraid.scan(network(seed=seed), "2", images, tmp_path / "look", **usual)
    looks = {"2": tmp_path / "look"}
    scans = scan_into(network(), {"2": tmp_path / "scan"}, TRAIN, n_first=32, looks=looks)
    made = scans["2"].manifest
    taken = (made.batch_size, made.channels_last, made.threads) == (3, True, 2)
    assert taken == (seed == 0)


def test_image_of_the_sample_that_is_broken_is_told_or_left_out(tmp_path):
    broken = chosen(TRAIN, 32)[20]
    images = Broken(N_TRAIN, broken, seed=48)
    with pytest.raises(DataError, match="cannot be read"):
        run(tmp_path / "told", quick=True, train=images)
    skip = {"loading": Loading(batch_size=8, skip_broken=True), "train": images}
    [look] = run(tmp_path / "a", quick=True, **skip)
    assert look.runs["2"].train_scan.broken() == [20]
    shutil.copytree(tmp_path / "a", tmp_path / "told-later")
    with pytest.raises(DataError, match="cannot be read"):  # though the first look left it out
        run(tmp_path / "told-later", quick=False, train=images)
    [done] = run(tmp_path / "a", **skip)
    assert done.runs["2"].train_scan.broken() == [broken]
    run(tmp_path / "b", quick=False, **skip)
    assert_same(tmp_path / "a", content(tmp_path / "b"))


def test_scan_that_was_begun_in_another_order_goes_on_in_it(tmp_path):
    usual = {"batch_size": 8, "labels": "given"}
    for name, images in (("scan-train", TRAIN), ("scan-val", VAL)):
        unbraid.scan(network(), "2", images, tmp_path / name, **usual)
    before = content(tmp_path)
    assert len(run(tmp_path)) == 1  # no first look, as all was scanned
    run(tmp_path, quick=True)
    run(tmp_path)
    assert before.items() <= content(tmp_path).items()
    # And a scan alone goes on in the order of a run.
    run(tmp_path / "other", quick=False)
    own = content(tmp_path / "other/scan-train")
    (tmp_path / "other/scan-train/shard-000003.safetensors").unlink()
    unbraid.scan(network(), "2", TRAIN, tmp_path / "other/scan-train", **usual)
    assert content(tmp_path / "other/scan-train") == own


def test_first_look_at_no_fewer_images_is_the_whole_run(tmp_path):
    said, few = [], {"train": Subset(TRAIN, range(32)), "val": Subset(VAL, range(16))}
    [done] = run(tmp_path, quick=True, say=said.append, **few)
    assert done.runs["2"].folder == tmp_path
    assert said[0] == (
        "A first look is at no fewer than these 32 training and 16 validation images, so this is "
        "the full run."
    )
    assert open_scan(tmp_path / "scan-train").manifest.n_first == 0


def test_first_look_at_layers_has_a_folder_for_each(tmp_path):
    together, apart = (
        run(tmp_path / "a", layers=["0", "2"]),
        run(tmp_path / "b", layers=["0", "2"], quick=False),
    )
    assert [own.folder for own in together[0].runs.values()] == [
        tmp_path / "a/quick/0",
        tmp_path / "a/quick/2",
    ]
    assert len(together) == 2
    assert len(apart) == 1
    assert_same(tmp_path / "a", content(tmp_path / "b"))
    assert check(tmp_path / "a").whole
    told = "First look at 32 of 80 training and 16 of 30 validation images. The full run: COMMAND"
    for look in (together[0], *run(tmp_path / "c", layers=["all"], quick=True)):
        assert look.layers.notes[0] == told
        assert told in look.index.read_text()
    assert not any("First look" in note for note in together[1].layers.notes)


def test_first_look_without_labels_and_its_report_again(tmp_path, monkeypatch):
    [look] = run(tmp_path, quick=True, labels="predicted")
    result = look.runs["2"]
    assert result.train_scan.manifest.labels == "predicted"
    assert list(result.images.targets) != []
    page = result.page.read_bytes()
    monkeypatch.setattr(
        finished,
        "validation_images",
        lambda *_: Subset(VAL, sample.sample_of(VAL, 16, by_class=False)),
    )
    assert Run(tmp_path / "quick").report().read_bytes() == page


def test_semantic_measures_of_a_run_are_of_the_right_images_though_some_come_first(tmp_path):
    model = network()
    made = run(tmp_path / "run", quick=False, model=model, everything=True)[0].runs["2"]
    first = next(made.val_scan.columns("index")).tolist()
    assert first != list(range(len(first)))  # else the orders would be the same
    asked = (made.split, made.val_scan, VAL, unbraid.Penultimate(model))
    assert str(made.evaluation.semantics) == str(unbraid.measure_semantics(*asked))
