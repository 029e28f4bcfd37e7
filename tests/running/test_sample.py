"""What a run looks at after its scans is bounded, balanced and the same whoever draws it."""

from collections import Counter
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import unbraid
from synthetic import pointwise, write_scan
from tiny_networks import SyntheticImages
from unbraid.running import measures, sample
from unbraid.running.finished import Run
from unbraid.running.folders import Thresholds
from unbraid.running.measures import part_behind
from unbraid.running.run import run
from unbraid.scanning.scan_options import Loading

CONCEPTS = {1: [[0], [1, 2]], 3: [[2], [3]]}
N_IMAGES, N_CLASSES = 3000, 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A scan in which class 3 has few images, and what was found in it by hand."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, N_CLASSES, (N_IMAGES,), generator=generator)
    labels[labels == 3] = 4
    labels[::300] = 3
    weight = torch.rand(4, 5, generator=generator)
    scan = write_scan(
        tmp_path_factory.mktemp("scan"),
        pointwise(4, 5),
        weight,
        labels,
        lambda label: torch.rand(len(label), 5, generator=generator),
    )
    return scan, unbraid.find(scan, channels=CONCEPTS), labels.tolist()


def test_draw_sample_is_half_of_concepts_in_balance_and_depends_on_nothing_else(made, tmp_path):
    scan, found, labels = made
    drawn = sample.draw_sample(scan, found)
    assert len(drawn) == len(set(drawn)) == sample.LEAST
    assert drawn == sorted(drawn) == sample.draw_sample(scan, found)
    counts = Counter(labels[n] for n in sample.in_balance(scan, found, 500))
    assert sum(counts.values()) == 500
    assert counts[3] == 10  # all that there are
    assert counts[0] > 1.3 * counts[1] > 0  # which shares a concept with class 2
    of_drawn = Counter(labels[n] for n in drawn)
    assert all(of_drawn[label] >= counts[label] for label in counts)
    others = [of_drawn[label] for label in range(4, N_CLASSES)]
    assert min(others) > 40  # where 500 images of seven classes are some 70 each
    assert max(torch.tensor(drawn).diff()) < 40  # from everywhere


def test_draw_sample_of_few_images_is_all_and_of_many_is_bounded(made, monkeypatch):
    scan, found, _ = made
    monkeypatch.setattr(sample, "LEAST", N_IMAGES)
    assert sample.draw_sample(scan, found) is None
    for least, most in ((10, 10**6), (10, 20), (1, 2)):
        monkeypatch.setattr(sample, "LEAST", least)
        monkeypatch.setattr(sample, "MOST", most)
        assert len(sample.draw_sample(scan, found)) == min(most, N_IMAGES // sample.PART)


def test_positions_stay_within_bounds_and_begin_with_the_images_shown(made, monkeypatch):
    scan, found, labels = made
    each = sample.bytes_of_positions(scan)
    assert each == 4 * 5 * 49
    split = unbraid.split(scan, found, method="published", rho=0.7)
    which = sample.choose_for_positions(scan, found, split)
    assert len(which["indices"]) <= sample.LEAST
    shown = sample.reference_images(scan, split, alike=sample.ALIKE)
    assert {n for own in shown.values() for n in own.original.index.tolist()} <= set(
        which["indices"]
    )
    for n in (1, 7, 60):
        monkeypatch.setattr(sample, "MAX_BYTES", n * each + each - 1)
        for asked in (split, None):
            assert len(sample.choose_for_positions(scan, found, asked)["indices"]) <= n
    seen = {labels[n] for n in sample.choose_for_positions(scan, found)["indices"]}
    assert seen == {0, 1, 2, 3}  # of concepts alone, and of each
    monkeypatch.setattr(sample, "MAX_BYTES", 2**31)
    monkeypatch.setattr(sample, "LEAST", N_IMAGES)
    assert sample.choose_for_positions(scan, found, split) == {"classes": [0, 1, 2, 3]}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)),
    ).double()


def job(out, model=None, layer="2", **options):
    said, model = [], model or network()
    usual = {"source": {}, "title": "x", "features": False, "say": said.append}
    usual |= {"thresholds": Thresholds(0.01, 0.5, 0.99), "loading": Loading(batch_size=16)}
    train, val = SyntheticImages(48, seed=48), SyntheticImages(24, seed=24)
    return run(model, layer, train, val, out, **usual, **options), " ".join(said), val


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(sample, "LEAST", 12)


def test_run_measures_on_a_sample_and_tells_what_it_left_out(small, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "MAX_ABLATED", 2)
    done, said, val = job(tmp_path)
    evaluation = done.evaluation
    assert "on a sample of 12 of 24 validation images; --all takes all." in said
    assert "Switching off only 2 channels of" in said
    assert "those with the lowest cosines; --all takes all." in said
    assert said.count("with positions, for the published rule; --all takes all of concepts.") == 1
    # Images that are both shown and drawn leave fewer than there might be.
    assert said.count("with positions; --all takes all of concepts.") == 1
    assert (evaluation.output.n_images, evaluation.output.max_abs_logit_diff) == (12, 0)
    assert len(evaluation.ablation.channels) == 2
    assert {one.n_images for one in evaluation.semantics.channels.values()} == {12}
    assert sum(own.n_images for own in evaluation.ablation.classes) == 12
    right = (
        torch.cat(list(done.val_scan.columns("prediction"))) == torch.tensor(val.targets)
    ).sum()
    assert evaluation.output.top1_before == evaluation.output.top1_after == right / 24
    assert done.val_maps.manifest.n_images <= 12
    for part, channel in zip(done.split.channels, evaluation.channels, strict=True):
        n_own = sum(label in own for own in part.concepts for label in val.targets)
        assert sum(concept.n_images for concept in channel.concepts) == n_own  # of all images
    page = done.page.read_text()
    assert "a sample of 12 of 24" in page
    assert "The same command with --all measures all." in page
    assert f"Only 2 of {len(done.split.channels)} channels were switched off" in page


class Counting(nn.Module):
    n_images = 0

    def forward(self, x):
        self.n_images += len(x)
        return x


def test_run_looks_again_at_no_more_images_than_a_sample_once_for_all_measures(small, tmp_path):
    n_seen, n_positions = [], []
    for everything in (False, True):
        model = nn.Sequential(Counting(), *network())
        out = tmp_path / str(everything)
        options = {"everything": everything, "model": model, "layer": "3"}
        job(out, **options)
        n_seen.append(model[0].n_images)  # not by the split network, a copy
        scans = [unbraid.open_scan(out / f"positions-{kind}") for kind in ("train", "val")]
        n_positions.append(sum(scan.manifest.n_images for scan in scans))
    assert n_positions[0] <= 2 * 12 < n_positions[1]
    # All else is the same: scans, and first looks at each.
    assert n_seen[1] - n_seen[0] == n_positions[1] - n_positions[0] + 24 - 12


def test_scans_with_positions_are_made_as_the_scans_of_all_and_found_again(small, tmp_path):
    val, usual = SyntheticImages(24, seed=24), {"batch_size": 16, "channels_last": False}
    model = network().float()  # for which a new scan takes another format
    for kind, images in (("train", SyntheticImages(48, seed=48)), ("val", val)):
        unbraid.scan(model, "2", images, tmp_path / f"scan-{kind}", **usual)
    job(tmp_path, model=model)
    before = sorted(path.name for path in tmp_path.iterdir())
    done, *_ = job(tmp_path, model=model)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not list(tmp_path.glob("positions-*-2"))
    again, page = Run(tmp_path), done.page.read_bytes()
    again.images = val
    assert again.val_maps.path == tmp_path / "positions-val"
    assert again.report().read_bytes() == page


def test_run_embeds_in_a_pass_of_its_own_where_memory_would_grow(small, tmp_path, monkeypatch):
    passes = Mock(wraps=measures.measure_semantics)
    monkeypatch.setattr(measures, "measure_semantics", passes)
    shared = job(tmp_path / "one", everything=True)[0].evaluation.semantics
    assert not passes.called
    monkeypatch.setattr(measures, "MAX_EMBEDDINGS", 23)
    apart = job(tmp_path / "two", everything=True)[0].evaluation.semantics
    assert passes.call_count == 1
    for channel, one in shared.channels.items():
        theirs = apart.channels[channel]
        assert (one.n_images, one.encoder) == (theirs.n_images, theirs.encoder)
        assert one.within == pytest.approx(theirs.within, rel=1e-9)
        assert one.original.clarity == pytest.approx(theirs.original.clarity, rel=1e-9)


def test_run_with_all_measures_all_and_has_a_folder_of_its_own(small, tmp_path):
    sampled, *_ = job(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    done, said, _ = job(tmp_path, everything=True)
    assert done.folder == tmp_path / "settings-2"
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == before
    assert "sample" not in done.page.read_text()
    assert "--all" not in said
    assert done.evaluation.output.n_images == 24
    assert len(done.evaluation.ablation.channels) == len(done.found.channels)
    assert "images measured all" in str(done.settings)
    assert "images measured" not in str(sampled.settings)


def test_switching_off_is_bounded_by_the_part_of_the_network_behind_the_layer(
    small, tmp_path, monkeypatch
):
    done, *_ = job(tmp_path / "one")
    model2 = unbraid.apply(network(), done.split)
    image = SyntheticImages(1).images[0]
    # By hand: 42 positions; 8 x 27 + 8 and 10 + 10 + 10 x 4 behind, the layer itself aside.
    pixels = image[0].numel()
    before, behind = pixels * (8 * 27 + 8), pixels * 10 + 10 + 10 + 4 * 10
    assert part_behind(model2, image) == pytest.approx(behind / (before + behind), rel=0.3)
    most = 4.5 * part_behind(model2, image)
    monkeypatch.setattr(measures, "MAX_PASSES", most)
    few, said, _ = job(tmp_path / "two")
    assert len(few.evaluation.ablation.channels) == 1
    assert "Switching off only 1 channel of" in said
