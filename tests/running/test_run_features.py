"""Feature visualisation as a step of a run: made once, kept in its folder, in bounds of time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from pairs import Pair
from PIL import Image

from tiny_networks import SyntheticImages
from unbraid.running import run as step
from unbraid.visualizing import visualize as making
from unbraid.visualizing.features import Feature, Features

FOUND = SimpleNamespace(
    layer="layer", channels=(0, 1, 3), pairs=[SimpleNamespace(channel=o) for o in (3, 0, 1)]
)


class Step:
    """The step of one run, done again and again; `said` is what it tells."""

    def __init__(self, pair: Pair, folder) -> None:
        self.pair, self.folder, self.said = pair, folder, []

    def __call__(self, images: SyntheticImages | None = None) -> Features | None:
        job = SimpleNamespace(
            train=images or SyntheticImages(8), features=True, say=self.said.append
        )
        made = self._run()
        made.found = FOUND
        return step._visualize(job, made, self.pair.changed)

    def kept(self) -> Features | None:
        return self._run().features

    def _run(self) -> step.Run:
        made = step.Run.__new__(step.Run)  # of which this step needs no settings
        made.folder = self.folder
        return made


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair("3x3")


@pytest.fixture
def visualize(pair, tmp_path) -> Callable[..., Features | None]:
    return Step(pair, tmp_path)


def test_a_run_keeps_its_visualisations_and_makes_them_once(visualize):
    assert visualize.kept() is None
    made = visualize()
    assert [f.channel for f in made.features[::3]] == [3, 0, 1]
    again = visualize()
    assert len(visualize.said) == 1
    pictures = [[f.picture.tobytes() for f in one.features] for one in (made, again)]
    assert pictures[0] == pictures[1]
    assert visualize.kept().weights == made.weights


def test_visualisations_of_another_split_or_damaged_ones_make_room(visualize, tmp_path):
    picture = Image.fromarray(np.zeros((7, 6, 4), dtype=np.uint8))
    other = Features("layer", "abc", (Feature(12, 1, 0, picture, (2.0, 0.0, 2.0)),))
    other.save(tmp_path / "features")
    for _ in range(2):
        assert visualize().channels == (0, 1, 3)
        assert not (tmp_path / "features" / "12.1.png").exists()
        (tmp_path / "features" / "1.0.png").unlink()
    assert len(visualize.said) == 2


def test_a_run_goes_on_without_visualisations(visualize, tmp_path):
    flat = SyntheticImages(8)
    flat.images[:] = 0.5
    assert visualize(flat) is None
    assert "left out: The data set's images are all of one colour" in visualize.said[-1]
    assert not (tmp_path / "features").exists()


def test_a_run_says_which_channels_time_did_not_allow(visualize, monkeypatch):
    monkeypatch.setattr(step, "SECONDS", 0.0)
    monkeypatch.setattr(making, "_PIXELS", 3 * 42)  # a channel at once
    made = visualize()
    assert (made.channels, made.left_out) == ((3,), 2)
    assert visualize.said[-1] == "Visualised only the 1 channel with the lowest cosines."
    assert visualize.kept().left_out == 2
