"""The embedded network and its images as a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.running.folders import Thresholds
from unbraid.running.several import LayerRuns, run_layers
from unbraid.scanning.scan_options import Loading


def run_demo(
    out: Path, layers: Sequence[str] | None, *, features: bool, say: Callable[[str], None]
) -> LayerRuns:
    """Do everything for layers of the demo; without, for the one that the docs are about."""
    say("A small network trained on Fashion-MNIST, and a sample of its images.")
    return run_layers(
        load_network(),
        layers or [LAYER],
        load_images("train"),
        load_images("test"),
        out,
        # Without layers those of the docs, and of the published runs.
        thresholds=Thresholds() if layers else Thresholds(tau=0.03),
        loading=Loading(batch_size=250),
        source={"demo": True},
        say=say,
        title="Demo: a small network on Fashion-MNIST",
        everything=True,  # it is quick
        features=features,
    )
