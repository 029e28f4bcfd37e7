"""Runs over images of different sizes: as in batches of one, without what asks for one size."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import unbraid
from tiny_networks import SyntheticImages
from unbraid.base.errors import OutputChangedError, RunError
from unbraid.running import run as running
from unbraid.running.check import check
from unbraid.running.finished import Run
from unbraid.running.folders import NO_POSITIONS, Thresholds
from unbraid.scanning.scan_options import Loading

LOOSE = Thresholds(0.01, 0.5, 0.99)
USUAL = {"source": {}, "title": "x", "features": False}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)),
    ).double()


def of_sizes(n, seed, sizes):
    """Neighbours of one size, one to three of them."""
    images = SyntheticImages(n, seed=seed)
    images.images = [
        image[:, : sizes[k // 3 % 2][0], : sizes[k // 3 % 2][1]]
        for k, image in enumerate(images.images)
    ]
    return images


def run(out, sizes, **options):
    said = []
    usual = {**USUAL, "say": said.append, "thresholds": LOOSE, "loading": Loading(batch_size=16)}
    sets = of_sizes(48, 48, sizes), of_sizes(24, 24, sizes)
    return running.run(network(), "2", *sets, out, **usual | options), " ".join(said)


SIZES = [((7, 6), (6, 5)), ((7, 5), (5, 7))]  # the second of as many positions


@pytest.mark.parametrize("sizes", SIZES)
def test_a_run_leaves_out_what_asks_for_positions_and_is_whole(sizes, tmp_path):
    made, said = run(tmp_path / "a", sizes)
    assert "different sizes, so rectified errors are left out, and the published rule too" in said
    assert "Resize to one size" in said
    assert (made.baseline, made.val_maps) == (None, None)
    assert made.evaluation.output.max_abs_logit_diff == 0
    assert made.evaluation.ablation is not None
    assert not list((tmp_path / "a").glob("positions-*"))
    again = Run(tmp_path / "a")
    assert again.is_finished(features=False)
    assert (again.baseline, again.val_maps) == (None, None)
    assert str(again.evaluation) == str(made.evaluation)
    assert not check(tmp_path / "a").missing
    one, _ = run(tmp_path / "b", sizes, loading=Loading(batch_size=1))
    for own, other in zip(made.split.channels, one.split.channels, strict=True):
        assert torch.allclose(own.masks, other.masks, atol=1e-5)
    (tmp_path / "a" / NO_POSITIONS).unlink()  # the twin: nothing tells why they are not there
    with pytest.raises(RunError, match="is gone, which the page shows; start the run again"):
        _ = Run(tmp_path / "a").val_maps
    assert check(tmp_path / "a").missing


def test_with_rho_the_published_rule_stays_and_a_run_of_one_size_keeps_all(tmp_path):
    rho = replace(LOOSE, rho=0.5)
    made, said = run(tmp_path / "a", SIZES[0], thresholds=rho)
    assert said.count("so rectified errors are left out.") == 1
    assert made.baseline is not None
    assert Run(tmp_path / "a").baseline is not None
    assert Run(tmp_path / "a").is_finished(features=False)
    made, said = run(tmp_path / "b", ((7, 6), (7, 6)))
    assert "left out" not in said
    assert made.val_maps is not None
    assert made.baseline is not None
    assert not (tmp_path / "b" / NO_POSITIONS).exists()


def test_a_segmenter_gets_its_measures_and_circuits(tmp_path):
    torch.manual_seed(0)
    head = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.ReLU())
    segmenter = nn.Sequential(*head, nn.Conv2d(10, 2, 1)).double()
    sets = of_sizes(48, 48, SIZES[0]), of_sizes(24, 24, SIZES[0])
    options = {**USUAL, "say": lambda _: None, "thresholds": LOOSE}
    options |= {"loading": Loading(batch_size=16), "target": "segmentation:1"}
    made = running.run(segmenter, "2", *sets, tmp_path, **options)
    output = made.evaluation.output
    assert (output.max_abs_logit_diff, output.n_images) == (0, 24)
    assert made.evaluation.ablation is not None
    split2 = unbraid.apply(segmenter, made.split)
    moved = unbraid.gate(split2, "2", made.split.channels[0].channel, 0, 0.5)
    with moved, pytest.raises(OutputChangedError):  # the twin: a gate is moved
        unbraid.compare_outputs(segmenter, split2, sets[1], target="segmentation:1")
    found = unbraid.explain(split2, sets[1], target="segmentation:1")
    assert len(found) == 24
