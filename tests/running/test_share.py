"""`unbraid share`: a folder that others can load, without pictures, paths or markup of others."""

import copy
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

import unbraid
from pages import HOSTILE, assert_harmless
from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.demo.network import CLASSES, SPLIT, load_images, load_network
from unbraid.running import run as running
from unbraid.running import share
from unbraid.running.finished import Run
from unbraid.running.folders import Thresholds
from unbraid.running.share import CARD, MEASURES, PAGE, share_run
from unbraid.scanning.scan_options import Loading
from unbraid.splitting.location import FILE
from unbraid.splitting.splits import Split

NAMES = (*HOSTILE, "| a | b\n# c", "[x](javascript:y) `z` **w**", *CLASSES[5:])
WHERE = "/some/body/at/home"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A demo run on some of its images, of classes with hostile names, from a hidden place."""
    images = load_images("train"), load_images("test")
    for one in images:
        one.pictures, one.targets, one.classes = one.pictures[::5], one.targets[::5], list(NAMES)
    options = {"thresholds": Thresholds(tau=0.03), "loading": Loading(), "features": False}
    source = {"model": f"{WHERE}/net.py:build", "weights": f"{WHERE}/w.pt", "data": WHERE}
    source |= {"command": f"unbraid run --data {WHERE}", "divided": f"{WHERE} was divided"}
    options |= {"source": source, "say": lambda _: None, "title": f"{WHERE}/net.py:build"}
    out = tmp_path_factory.mktemp("run") / "run"
    return running.run(load_network(), "mix", *images, out, **options)


@pytest.fixture(scope="module")
def shared(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("shared") / "a" / "b"
    files = share_run(run, out, data_name="<b>ten</b> | kinds", license_name='mit"\n- x: y')
    assert sorted(files) == sorted(out.iterdir())
    return out


def test_the_folder_loads_into_the_network_and_has_the_runs_measures(run, shared):
    network, images = load_network(), torch.randn(3, 1, 28, 28)
    model2 = unbraid.load_split(network, shared)
    assert torch.equal(model2(images), network(images))
    for one, other in zip(Split.load(shared / FILE).channels, run.split.channels, strict=True):
        assert torch.equal(one.masks, other.masks)
        assert one.concepts == other.concepts
    before = json.loads((run.folder / "evaluation.json").read_text())
    assert json.loads((shared / MEASURES).read_text()) == before


def test_no_picture_and_no_path_leaves_the_machine(run, shared):
    assert not re.search(r"data:image/(png|jpeg|webp)", (shared / PAGE).read_text())
    for file in shared.iterdir():
        assert WHERE.encode() not in file.read_bytes(), file
        assert str(run.folder).encode() not in file.read_bytes(), file
    assert "net.py:build, weights w.pt" in (shared / CARD).read_text()


def test_pictures_are_there_where_they_are_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "images", load_images("test"))
    share_run(run, tmp_path / "out", pictures=True)
    assert "data:image/" in (tmp_path / "out" / PAGE).read_text()


def test_hostile_names_are_text_on_card_and_page(shared):
    assert_harmless((shared / PAGE).read_text(encoding="utf-8"))
    text = (shared / CARD).read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["library_name"] == "unbraid"
    assert about["license"] == 'mit" - x: y'
    assert "x: y" not in about
    assert "<" not in body
    assert "[x]" not in body
    rows = [line for line in body.splitlines() if line.startswith("|")]
    columns = {row.count("|") - 1 for row in rows}
    assert columns == {2, 4}


def test_a_card_in_a_reader_of_markdown_shows_names_as_they_are(shared):
    markdown = pytest.importorskip("markdown_it")
    page = markdown.MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(
        (shared / CARD).read_text(encoding="utf-8").split("---\n", 2)[2]
    )
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>" not in page
    assert "<strong>" not in page
    assert "href" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "&lt;b&gt;ten&lt;/b&gt; | kinds" in page


def test_a_card_lists_so_many_channels_and_how_many_more_there_are(run, tmp_path, monkeypatch):
    n_channels = len(run.split.channels)
    monkeypatch.setattr(share, "_MOST", 2)
    share_run(run, tmp_path / "a", data_name="x", license_name="mit")
    card = (tmp_path / "a" / CARD).read_text()
    table = card.partition("| channel |")[2].partition("\n\n")[0]
    assert len(table.splitlines()) == 2 + 2  # under the head and its line
    assert f"And {n_channels - 2} more channels, in `measures.json`." in card


def test_mistakes_are_told_and_nothing_is_written(run, tmp_path):
    with pytest.raises(UsageError, match="holds a run or scan"):
        share_run(run, run.folder)
    (tmp_path / CARD).write_text("mine")
    with pytest.raises(UsageError, match=rf"holds a {CARD} of something else"):
        share_run(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CARD]
    for name in (FILE, MEASURES, PAGE):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / name).write_text("mine")
        with pytest.raises(UsageError, match=rf"holds a {name} of something else"):
            share_run(run, other)
        assert [(path.name, path.read_text()) for path in other.iterdir()] == [(name, "mine")]
    bare = Run(shutil.copytree(run.folder, tmp_path / "bare"))
    bare.found = replace(run.found, concepts={}, pairs=())
    with pytest.raises(RunError, match="found nothing to split"):
        share_run(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_fails_on_the_way_changes_nothing(run, shared, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise DataError("The images are gone.")

    before = {path: path.read_bytes() for path in shared.iterdir()}
    monkeypatch.setattr(Run, "images", property(fail))
    for out in (shared, tmp_path / "new"):
        with pytest.raises(DataError, match="are gone"):
            share_run(run, out, pictures=True, license_name="other")
    assert {path: path.read_bytes() for path in shared.iterdir()} == before
    assert not (tmp_path / "new").exists()
    write = share.write_whole

    def write_some(path, content):
        if path == tmp_path / "new" / CARD:
            fail()
        write(path, content)

    monkeypatch.setattr(share, "write_whole", write_some)
    with pytest.raises(DataError, match="are gone"):
        share_run(run, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_an_unusual_target_is_on_the_card_and_paths_in_texts_are_not(run, shared, tmp_path):
    assert "| target |" not in (shared / CARD).read_text()
    other = copy.copy(run)
    target = f"functools.partial(<near>, PosixPath('{WHERE}/text.npy')) [code 12]"
    told = {"target": target, "preprocessing": f"Mean(path=PosixPath('{WHERE}/mean.npy'))"}
    for name in ("train_scan", "val_scan", "searched", "measured"):
        scan = getattr(run, name)
        manifest = replace(scan.manifest, **told)
        vars(manifest)["scan_id"] = scan.manifest.scan_id
        setattr(other, name, replace(scan, manifest=manifest))
    measured = run.evaluation
    other.evaluation = replace(measured, ablation=replace(measured.ablation, target=target))
    share_run(other, tmp_path / "out")
    card, page, measures = ((tmp_path / "out" / n).read_text() for n in (CARD, PAGE, MEASURES))
    for text in (card, page, measures):
        assert WHERE not in text
        assert "text.npy" in text
    for text in (card, page):
        assert "mean.npy" in text
    assert "functools.partial" in json.loads(measures)["ablation"]["target"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (r"Mean('C:\\Users\\me\\mean.npy', 1/255)", "Mean('mean.npy', 1/255)"),
        (r"Mean('\\\\host\\me\\mean.npy')", "Mean('mean.npy')"),
        ("""Mean("/home/o'me/mean.npy")""", 'Mean("mean.npy")'),
        ("mean: file:///home/me/mean.npy; ~/me/other.npy", "mean: mean.npy; other.npy"),
        ("x / 2 / y, in/folder/x, https://host/a/b, '/'", None),
    ],
)
def test_of_a_path_in_a_text_the_last_part_is_left(text, left):
    assert share._without_folders(text) == (text if left is None else left)


def test_a_folder_is_shared_again_in_place(run, shared):
    share_run(run, shared, license_name="mit")
    assert yaml.safe_load((shared / CARD).read_text().split("---\n")[1])["license"] == "mit"


def test_the_shipped_example_is_what_sharing_the_demo_gives(run):
    assert {path.name for path in SPLIT.iterdir()} >= {CARD, FILE, MEASURES}
    split = Split.load(SPLIT / FILE)
    assert split.weights == run.split.weights
    assert split.class_names == CLASSES
