"""Feature visualisation as a step of a run: kept in its folder, within bounds of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from unbraid.errors import RunError, UnbraidError
from unbraid.files import set_aside
from unbraid.tables import count
from unbraid.visualize import visualize
from unbraid.visualize.features import INDEX, Features
from unbraid.weights import hash_weights

SECONDS = 120.0  # after which no more channels are begun
_FOLDER = "features"


def visualize_run(
    model: nn.Module,
    layer: str,
    images: Dataset[Any],
    channels: Sequence[int],
    out: Path,
    say: Callable[[str], None],
    *,
    make: bool = True,
) -> Features | None:
    """Visualise a run's split channels, unless that is done; write them to its folder.

    Args:
        model: the split network.
        layer: its name.
        images: training images, which tell what images are like.
        channels: the split ones, the most telling first, as time may not be enough for all.
        out: the run's folder.
        say: told of each step, and of what is left out.
        make: make them, instead of only returning those that are there.

    Returns:
        The visualisations; None where the network or its images do not allow any.
    """
    with suppress(RunError):  # those that cannot be read are made anew
        before = read_run(out)
        if before is not None and before.weights == hash_weights(model):
            return before
    if (out / _FOLDER / INDEX).exists():  # else nobody finished them
        set_aside(out / _FOLDER, ".replaced")
    if not make:
        return None
    say("Visualising channels and concept channels.")
    try:
        made = visualize(model, layer, images, channels, seconds=SECONDS, progress=True)
    except UnbraidError as error:  # a page without them is better than none
        say(f"Feature visualisations are left out: {error}")
        return None
    if made.left_out:
        say(f"Visualised only the {count(len(made.channels), 'channel')} with the lowest cosines.")
    made.save(out / _FOLDER)
    return made


def read_run(out: Path) -> Features | None:
    """Read a run's visualisations; None if it has none.

    Raises:
        RunError: they are damaged.
    """
    folder = out / _FOLDER
    return Features.load(folder) if folder.exists() else None
