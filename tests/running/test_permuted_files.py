"""Runs over tensors that a network's preprocessing lays out in another order than their files."""

import numpy as np
import pytest

from unbraid.cli import app
from unbraid.reporting.drawing import bands_of
from unbraid.running.finished import Run
from unbraid.running.folders import validation_images

CODE = """
import torch
from torch import nn

def prepare(tensor):
    return tensor.permute(2, 0, 1)  # (H, W, C) as a file has it

def build():
    torch.manual_seed(0)
    layers = (nn.Conv2d(9, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return model.eval(), prepare
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "net.py").write_text(CODE)
    random = np.random.default_rng(0)
    for part, n in (("train", 10), ("val", 4)):
        for name in "abc":
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for k in range(n):
                np.save(folder / f"{k}.npy", random.random((4, 5, 9), dtype="f4"))
    words = f"run --model {tmp_path}/net.py:build --data {tmp_path}/data --layer 2 --no-features"
    words += f" --out {tmp_path}/run --tau 0.01 --p 0.1 --gamma 0.9999 --bands 8,1,0"
    app(words.split(), exit_on_error=False, result_action="return_value")
    return Run(tmp_path / "run")


def test_bands_of_what_the_network_was_given_choose_no_rows_of_a_file(run):
    page = run.report().read_text()
    assert "--bands is not followed here" in page
    assert "left out: the run was asked to leave them out, or could not make them." in page
    for bands in ([8, 1, 0], [2, 1, 0]):  # a file has 4 rows, so the first would be refused
        images = validation_images(
            run.settings.source | {"bands": bands}, run.val_scan, run.settings.sight
        )
        assert images.unprepared
        assert bands_of(images, 0) is None
