"""What a run's folder gives to look at; what is missing is told in a sentence, not refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch.utils.data import Dataset

from unbraid.base.errors import RunError, UnbraidError
from unbraid.measuring.explain import untold
from unbraid.measuring.results import ChannelEvaluation, read_channels
from unbraid.networks.models import LoadedModel
from unbraid.reporting.crops import Crops
from unbraid.running.finished import Run
from unbraid.running.network import changes_tensors, load_again, prepared_otherwise
from unbraid.scanning.records import Scan
from unbraid.scanning.targets import Scalar, read_target
from unbraid.splitting.splits import Split

Part = TypeVar("Part")
WHOLE = "whole"  # of pictures, where others are what lies around places


@dataclass(frozen=True, eq=False)
class Opened:
    """A finished run with all that could be opened; None for what could not."""

    run: Run
    split: Split | None
    network: LoadedModel | None
    target: Scalar | None  # that pictures are explained by
    train_scan: Scan | None
    val_scan: Scan | None
    train_images: Dataset[Any] | None
    val_images: Dataset[Any] | None
    measured: Sequence[ChannelEvaluation]  # by the run, as far as it can be read
    missing: tuple[str, ...]  # what is not there, what that costs, and why

    @property
    def of_places(self) -> bool:
        """Whether scans and images are of places, so that pictures are crops."""
        return bool(self.run.settings.places)

    def scan(self, kind: str) -> Scan | None:
        """The scan of "train" or "val"; None of anything else."""
        return {"train": self.train_scan, "val": self.val_scan}.get(kind)

    def images(self, kind: str) -> Dataset[Any] | None:
        """The images of "train" or "val", of places those around them; None of anything else.

        Whole images of places are "train/whole" and "val/whole".
        """
        kind, slash, which = kind.partition("/")
        images = {"train": self.train_images, "val": self.val_images}.get(kind)
        if not slash:
            return images
        return images.dataset if which == WHOLE and isinstance(images, Crops) else None


def open_run(
    folder: Path,
    model: str | None = None,
    weights: str | None = None,
    device: str | None = None,
    data: str | None = None,
    bands: Sequence[int] | None = None,
) -> Opened:
    """Open a run's split, scans, network and images, each if it can be.

    Args:
        folder: of a finished run.
        model: the network, where it is code of one's own, as in `load_again`.
        weights: likewise.
        device: likewise.
        data: its images, where they are code of one's own or lie elsewhere now.
        bands: of these, those that are drawn.

    Raises:
        RunError: there is no run in the folder, or neither a split nor a scan.
        UnbraidError: the network cannot be had as `model`, `weights` and `device` name it.
    """
    run, missing = Run(folder, data, bands), []

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
    train_scan = attempt(lambda: run.searched, "No channel can be parted by hand")
    shown = "no reference images" if train_scan is None else "training images stand for reference"
    val_scan = attempt(lambda: run.measured, f"There are no measures, and {shown}")
    if split is None and train_scan is None:
        raise RunError(f"{folder} holds neither a split nor a scan; start the run again.")
    unexplained = "No picture can be explained"
    load = partial(load_again, run.settings.source, model, weights, device)
    # What is named now and cannot be had is a mistake; what the run names may be gone.
    named = model or weights or device
    network = load() if named else attempt(load, unexplained)
    target = attempt(lambda: target_of(run), unexplained)

    def of_part(part: Literal["train", "val"], scan: Scan) -> Dataset[Any]:
        if changes_tensors(run, network):
            return _around(run.images_of(part, network), scan)
        return _around(run.train_images if part == "train" else run.images, scan)

    otherwise = prepared_otherwise(run.settings.source)
    if otherwise and network is not None and target is not None:
        missing.append(otherwise)
    return Opened(
        run,
        split,
        network,
        target,
        train_scan,
        val_scan,
        attempt(lambda: of_part("train", train_scan), "Training images stay without pictures")
        if train_scan
        else None,
        attempt(lambda: of_part("val", val_scan), "Reference images stay without pictures")
        if val_scan
        else None,
        attempt(lambda: measured_in(run), "Channels are measured again") or () if val_scan else (),
        tuple(missing),
    )


def _around(images: Dataset[Any], scan: Scan) -> Dataset[Any]:
    """What a scan's items look like: its images, or what lies around its places."""
    return Crops(images, scan) if scan.manifest.places_of else images


def measured_in(run: Run) -> Sequence[ChannelEvaluation]:
    """Read what the run measured; nothing if it did not come to that."""
    path = run.folder / "evaluation.json"
    return read_channels(path) if path.exists() else ()


def target_of(run: Run) -> Scalar:
    """Say which target pictures are explained by; RunError if they cannot be by the run's."""
    target = read_target(run.target)
    why = untold(target)
    if why:
        raise RunError(
            f"With the run's target {target.name!r} there is {why}; make a run with another one, "
            "such as regression:INDEX."
        )
    return target
