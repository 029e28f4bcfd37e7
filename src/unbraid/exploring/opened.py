"""What a run's folder gives to look at; what is missing is told in a sentence, not refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import Dataset

from unbraid.base.errors import RunError, UnbraidError
from unbraid.networks.models import LoadedModel
from unbraid.running.finished import Run
from unbraid.running.network import load_again
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import Split

Part = TypeVar("Part")


@dataclass(frozen=True, eq=False)
class Opened:
    """A finished run with all that could be opened; None for what could not."""

    run: Run
    split: Split | None
    network: LoadedModel | None
    train_scan: Scan | None
    val_scan: Scan | None
    train_images: Dataset[Any] | None
    val_images: Dataset[Any] | None
    missing: tuple[str, ...]  # what is not there, what that costs, and why

    def scan(self, kind: str) -> Scan | None:
        """The scan of "train" or "val"; None of anything else."""
        return {"train": self.train_scan, "val": self.val_scan}.get(kind)

    def images(self, kind: str) -> Dataset[Any] | None:
        """The images of "train" or "val"; None of anything else."""
        return {"train": self.train_images, "val": self.val_images}.get(kind)


def open_run(
    folder: Path,
    model: str | None = None,
    weights: str | None = None,
    device: str | None = None,
) -> Opened:
    """Open a run's split, scans, network and images, each if it can be.

    Args:
        folder: of a finished run.
        model: the network, where it is code of one's own, as in `load_again`.
        weights: likewise.
        device: likewise.

    Raises:
        RunError: there is no run in the folder, or neither a split nor a scan.
    """
    run, missing = Run(folder), []

    def attempt(get: Callable[[], Part], cost: str) -> Part | None:
        try:
            return get()
        except (UnbraidError, OSError) as error:
            missing.append(f"{cost}: {error}")
            return None

    has_split = (folder / "split.safetensors").exists()
    split = attempt(lambda: run.split, "No channel is divided yet") if has_split else None
    if not has_split:
        missing.append(
            "The run left no split; a channel can be named by its number and parted by hand."
        )
    val_scan = attempt(lambda: run.val_scan, "There are no measures and no reference images")
    train_scan = attempt(lambda: run.train_scan, "No channel can be parted by hand")
    if split is None and train_scan is None:
        raise RunError(f"{folder} holds neither a split nor a scan; start the run again.")
    return Opened(
        run,
        split,
        attempt(
            lambda: load_again(run.settings.source, model, weights, device),
            "No picture can be explained",
        ),
        train_scan,
        val_scan,
        attempt(lambda: run.train_images, "Training images stay without pictures")
        if train_scan
        else None,
        attempt(lambda: run.images, "Reference images stay without pictures") if val_scan else None,
        tuple(missing),
    )
