"""Runs whose concepts are of places in images: as the steps one by one, once, or refused."""

import re
import shutil
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import unbraid
from tiny_networks import SyntheticImages
from unbraid.base.errors import RunError, UsageError
from unbraid.images import sample
from unbraid.running import run as running
from unbraid.running.check import check
from unbraid.running.circuits import circuits_of
from unbraid.running.finished import Run
from unbraid.running.first_look import run_in_turn
from unbraid.running.folders import Thresholds
from unbraid.running.sample import draw_sample
from unbraid.running.several import run_layers
from unbraid.scanning.scan_options import Loading

CLUSTERS = Thresholds(0.01, 0.5, 0.9, concepts="clusters")
USUAL = {"source": {}, "title": "x", "features": False, "say": lambda _: None}
USUAL |= {"thresholds": CLUSTERS, "loading": Loading(batch_size=16), "places": 60}


class Spots(SyntheticImages):
    """Two of four patterns, of four inputs each, at places of their own in each image."""

    def __init__(self, n_images, seed):
        super().__init__(n_images, size=(16, 5, 5), seed=seed)
        draw = torch.Generator().manual_seed(seed)
        self.images = 0.1 * (0.8 * torch.randn(n_images, 16, 5, 5, generator=draw)).exp().double()
        for n, target in enumerate(self.targets):
            for kind, row in ((target, 1), ((target + 1) % 4, 3)):
                column = int(torch.randint(5, (1,), generator=draw))
                own = torch.rand(4, generator=draw) + 1
                self.images[n, 4 * kind : 4 * kind + 4, row, column] += own


TRAIN, VAL = Spots(160, 1), Spots(120, 2)


def network():
    """Channels that answer to one pattern, to two and to three."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    made.append(nn.Linear(4, 4))
    made = made.double()
    own = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 0, 1]])
    weight = torch.where(own.repeat_interleave(4, 1) > 0, 1.0, 0.1).double()
    made[0].weight.data = weight[:, :, None, None]
    return made


def run(out, **options):
    return running.run(network(), "0", TRAIN, VAL, out, **USUAL | options)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, which tests look at or copy."""
    return run(tmp_path_factory.mktemp("whole"))


def copied(whole, folder, *without):
    """A copy of a run's folder, without some files."""
    ignored = shutil.ignore_patterns(*without)
    return shutil.copytree(whole.folder, folder, ignore=ignored, dirs_exist_ok=True)


def test_a_run_of_places_is_the_steps_one_by_one(whole, tmp_path):
    made = Run(copied(whole, tmp_path))
    train, val = made.train_scan.places, made.val_scan.places
    found = unbraid.find(train, **CLUSTERS.of_find)
    assert made.found.concepts == found.concepts
    assert set(found.channels) == {1, 2, 3}
    split = unbraid.split(train, found)
    split.save(tmp_path / "other.safetensors")
    assert (tmp_path / "other.safetensors").read_bytes() == (
        tmp_path / "split.safetensors"
    ).read_bytes()
    expected = unbraid.evaluate(split, val)
    for done in (whole, made):
        assert done.evaluation.summary == expected.summary
        assert done.evaluation.output.max_abs_logit_diff == 0
        assert done.evaluation.output.n_images == len(VAL)
        assert (done.baseline, done.val_maps, done.evaluation.ablation) == (None, None, None)
        assert done.searched.manifest == train.manifest
        assert done.measured.manifest == val.manifest
    assert not list(tmp_path.glob("positions-*"))
    text = (tmp_path / "report.html").read_text()
    assert f"outputs on {len(VAL)} validation images" in re.sub(r"logits", "outputs", text)
    assert "What this page calls images are places in images" in text
    assert "Rectified errors are left out" not in text
    assert check(tmp_path).whole
    (tmp_path / "evaluation.json").unlink()
    assert "evaluation.json" in str(check(tmp_path))


@pytest.mark.parametrize("step", ["split", "_measure"])
def test_a_run_of_places_goes_on_where_it_stopped(step, whole, tmp_path, monkeypatch):
    results = ("split.safetensors", "evaluation.json", "report.html")
    out = copied(whole, tmp_path / "run", *results[step == "_measure" :])
    with monkeypatch.context() as broken:
        broken.setattr(running, step, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert not (out / "report.html").exists()
    run(out)
    after = content(out)
    assert after == content(whole.folder)
    run(out)
    assert content(out) == after


def test_a_run_of_places_over_all_layers(whole, tmp_path):
    done = run_layers(network(), ["all"], TRAIN, VAL, tmp_path, **USUAL)
    assert "places 60" in done.layers.settings
    assert done.runs["0"].found.concepts
    assert done.runs["0"].evaluation.summary == whole.evaluation.summary


def test_a_sample_holds_the_images_of_places(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("unbraid.running.sample.LEAST", 20)
    made = Run(copied(whole, tmp_path, "evaluation.json"))
    drawn = draw_sample(made.val_scan, made.found, made.measured)
    assert drawn == made.sample == sorted(set(drawn))
    assert len(drawn) == 20
    assert run(tmp_path).evaluation.output.n_images == 20
    members = made.found.members_in(made.measured)
    of_concepts = set()
    for own in made.found.concepts.values():
        for concept in own:
            image = torch.cat(list(made.measured.columns("image")))
            of_concepts |= set(image[members.indices(concept)].tolist())
    assert len(of_concepts & set(drawn)) >= 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"thresholds": replace(CLUSTERS, concepts="classes")}, "Places have no classes"),
        ({"thresholds": replace(CLUSTERS, concepts="whole")}, "Places have no classes"),
        ({"thresholds": replace(CLUSTERS, rho=0.5)}, "rho is of the published rule"),
        ({"encoder": "timm:any"}, "An encoder compares whole images"),
        ({"places": -1}, "places is -1"),
    ],
)
def test_what_places_cannot_do_is_refused_before_a_scan(options, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("places", [0, 50])
def test_scans_with_other_places_are_not_taken(places, whole):
    with pytest.raises(RunError, match="how many places are kept; name another folder"):
        run(whole.folder, places=places)


def test_what_else_reads_a_run_of_places(whole):
    (graph,) = circuits_of(whole, 1)
    assert graph.indices <= set(range(len(VAL)))
    with pytest.raises(UsageError, match="of places, but the scan is of images"):
        whole.split.members_in(whole.val_scan).count(whole.found.classes)


def test_a_first_look_has_places_and_the_run_over_all_goes_on(whole, tmp_path, monkeypatch):
    for part, n in (("train", 64), ("val", 48)):
        monkeypatch.setitem(sample.SIZES, part, n)
    options = USUAL | {"labels": "given", "command": "x"}
    made = run_in_turn(network(), ["0"], TRAIN, VAL, tmp_path, **options, quick=True)
    look = next(made).runs["0"]
    assert look.folder == tmp_path / "quick"
    assert look.searched.manifest.places == 60
    done = run(tmp_path, first_look=tmp_path / "quick")
    assert done.evaluation.output.max_abs_logit_diff == 0
    assert sorted(lists_of(done.searched)) == sorted(lists_of(whole.searched))


def lists_of(scan):
    """Image, position and channel of all that stands in the lists of a scan of places."""
    for records in scan.shards():
        for o in range(scan.layer.n_out):
            own = records.kept_of(o)
            pairs = zip(records.image[own].tolist(), records.position[own].tolist(), strict=True)
            yield from ((o, *pair) for pair in pairs)
