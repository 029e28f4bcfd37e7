"""Feature visualisation as a step of a run: made once, kept in its folder, bounded in time."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from test_apply import Pair, Splits

from tiny_networks import SyntheticImages
from unbraid.running import run as step
from unbraid.visualizing import visualize as making
from unbraid.visualizing.features import Feature, Features


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return Pair("3x3", Splits(tmp_path_factory.mktemp)("3x3"))


def some_features() -> Features:
    picture = Image.fromarray(np.zeros((7, 6, 4), dtype=np.uint8))
    return Features("layer", "abc", (Feature(12, 1, 0, picture, (2.0, 0.0, 2.0)),))


def test_a_run_keeps_its_visualisations_and_makes_them_once(pair, tmp_path):
    said: list[str] = []
    dataset = SyntheticImages(8)
    made = step.visualize_run(pair.changed, "layer", dataset, [3, 0, 1], tmp_path, said.append)
    assert len(said) == 1
    assert [f.channel for f in made.features[::3]] == [3, 0, 1]
    again = step.visualize_run(pair.changed, "layer", dataset, [3, 0, 1], tmp_path, said.append)
    assert len(said) == 1
    assert [f.picture.tobytes() for f in again.features] == [
        f.picture.tobytes() for f in made.features
    ]
    assert step.read_run(tmp_path).weights == made.weights
    assert step.read_run(tmp_path / "elsewhere") is None


def test_visualisations_of_another_split_or_damaged_ones_make_room(pair, tmp_path):
    some_features().save(tmp_path / "features")
    said: list[str] = []
    for _ in range(2):
        made = step.visualize_run(
            pair.changed, "layer", SyntheticImages(8), [0, 1], tmp_path, said.append
        )
        assert made.channels == (0, 1)
        assert not (tmp_path / "features" / "12.1.png").exists()
        (tmp_path / "features" / "1.0.png").unlink()
    assert len(said) == 2


def test_a_run_goes_on_without_visualisations(pair, tmp_path):
    said: list[str] = []
    flat = SyntheticImages(8)
    flat.images[:] = 0.5
    assert step.visualize_run(pair.changed, "layer", flat, [0], tmp_path, said.append) is None
    assert "left out: The data set's images are all of one colour" in said[-1]
    assert not (tmp_path / "features").exists()


def test_a_run_says_which_channels_time_did_not_allow(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "SECONDS", 0.0)
    monkeypatch.setattr(making, "_PIXELS", 3 * 42)  # a channel at once
    said: list[str] = []
    made = step.visualize_run(
        pair.changed, "layer", SyntheticImages(8), [3, 0, 1], tmp_path, said.append
    )
    assert (made.channels, made.left_out) == ((3,), 2)
    assert said[-1] == "Visualised only the 1 channel with the lowest cosines."
    assert step.read_run(tmp_path).left_out == 2
