"""What an edit changes: accuracy by class, confusions, and the images that go to another class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from unbraid.base.arguments import flag, loading, whole_numbers
from unbraid.base.errors import DataError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.tables import Table, Tabular, percent
from unbraid.finding.membership import name_of
from unbraid.images.batches import image_progress, in_batches, read_images
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import class_names_of, size_of
from unbraid.images.which import images_named
from unbraid.networks.copying import device_of, unwrap
from unbraid.networks.outputs import check_labels, run_network
from unbraid.networks.relevance import undisturbed


@dataclass(frozen=True)
class ClassChange:
    """How many images of a class are right."""

    label: int
    name: str
    n_images: int
    before: int
    after: int


@dataclass(frozen=True)
class Confusion:
    """How many images of a class are taken for another."""

    name: str
    taken_for: str
    before: int
    after: int


@dataclass(frozen=True)
class Flip:
    """An image that is taken for another class than before."""

    index: int  # in the data set
    label: int  # -1 where there is none
    name: str  # of the label, empty where there is none
    before: str
    after: str
    margin: float  # logit of the class after less that of the class before, after the edit


@dataclass(frozen=True)
class BeforeAfter(Tabular):
    """Two networks on the same images, one the edited form of the other."""

    n_images: int
    n_labelled: int
    right_before: int  # among the labelled
    right_after: int
    classes: tuple[ClassChange, ...]  # those that changed most first
    confusions: tuple[Confusion, ...]  # that changed, those that changed most first
    flips: tuple[Flip, ...]  # the surest first

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers."""
        return asdict(self)

    def table(self) -> Table:
        """Show the classes whose accuracy changed, and all of them in one row."""
        rows: list[tuple[str, ...]] = [("class", "images", "before", "after", "change")]
        changed = [own for own in self.classes if own.before != own.after]
        all_ = ClassChange(-1, "all", self.n_labelled, self.right_before, self.right_after)
        for own in [*changed, all_] if self.n_labelled else []:
            before, after = own.before / own.n_images, own.after / own.n_images
            figures = (percent(before, 1), percent(after, 1), f"{100 * (after - before):+.1f}")
            rows.append((own.name, f"{own.n_images:,}", *figures))
        n_flips = len(self.flips)
        note = f"{n_flips:,} of {self.n_images:,} images are taken for another class than before."
        caption, n_feet = "Accuracy before and after, change in points", len(rows) > 1
        all_in = "BeforeAfter.classes has all"
        return Table(rows, note=note, caption=caption, all_in=all_in, n_feet=int(n_feet))


class _Seen(NamedTuple):
    """One image."""

    image: int
    label: int
    before: int  # class
    after: int
    margin: float


@in_plain_modes
def compare_before_after(
    model: nn.Module,
    edited: nn.Module,
    dataset: Dataset[Any],
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    skip_broken: bool = False,
    progress: bool = False,
) -> BeforeAfter:
    """Run a network and its edited form on images, and tell what changed.

    Args:
        model: the original.
        edited: from `unbraid.edit`, on the same device.
        dataset: map-style, of (image tensor, label); a label of -1 is none.
        indices: of the images to run on, by default all.
        batch_size: images per forward pass.
        workers: processes that load images.
        skip_broken: leave out images that cannot be read.
        progress: show a progress bar on standard error.

    Raises:
        DataError: an image cannot be read, or a label names no output.
        UsageError: an index, batch_size or workers is out of range.
    """
    batch_size, workers = loading(batch_size, workers)
    skip_broken, n_images = flag("skip_broken", skip_broken), size_of(dataset)
    chosen = range(n_images) if indices is None else whole_numbers("indices", indices)
    if not chosen or min(chosen) < 0 or max(chosen) >= n_images:
        raise UsageError(f"indices must be some of 0 to {n_images - 1}.")
    model, edited = unwrap(model), unwrap(edited)
    device = device_of(model)
    seen: list[_Seen] = []
    with (
        images_named(dataset),
        undisturbed(model),
        undisturbed(edited),
        torch.no_grad(),
        image_progress("Before and after", len(chosen), show=progress) as advance,
    ):
        batches = in_batches(chosen, batch_size)
        for index, images, labels in read_images(
            dataset, batches, workers=workers, skip_broken=skip_broken, advance=advance
        ):
            images = images.to(device)
            before, after = run_network(model, images), run_network(edited, images)
            check_labels(labels[labels != UNLABELLED], index[labels != UNLABELLED], before)
            top, top_after = before.argmax(1, keepdim=True), after.argmax(1, keepdim=True)
            margin = (after.gather(1, top_after) - after.gather(1, top))[:, 0].cpu()
            tops = (top[:, 0].cpu(), top_after[:, 0].cpu())
            columns = (index, labels, *tops, margin)
            seen += map(_Seen, *(column.tolist() for column in columns))
    if not seen:
        raise DataError("No image could be read, so there is nothing to compare.")
    return _tell(seen, class_names_of(dataset))


def _tell(seen: Sequence[_Seen], class_names: Sequence[str]) -> BeforeAfter:
    """Sum up images."""
    name = partial(name_of, class_names)
    labelled = [one for one in seen if one.label != UNLABELLED]
    images = Counter(one.label for one in labelled)
    right = Counter(one.label for one in labelled if one.before == one.label)
    right_after = Counter(one.label for one in labelled if one.after == one.label)
    wrong = Counter((one.label, one.before) for one in labelled if one.before != one.label)
    wrong_after = Counter((one.label, one.after) for one in labelled if one.after != one.label)
    classes = [
        ClassChange(label, name(label), images[label], right[label], right_after[label])
        for label in sorted(images)
    ]
    confusions = [
        Confusion(name(pair[0]), name(pair[1]), wrong[pair], wrong_after[pair])
        for pair in sorted(wrong.keys() | wrong_after.keys())
        if wrong[pair] != wrong_after[pair]
    ]
    flips = [
        Flip(
            one.image,
            one.label,
            "" if one.label == UNLABELLED else name(one.label),
            name(one.before),
            name(one.after),
            one.margin,
        )
        for one in seen
        if one.before != one.after
    ]
    return BeforeAfter(
        len(seen),
        len(labelled),
        right.total(),
        right_after.total(),
        tuple(sorted(classes, key=lambda own: -abs(own.after - own.before) / own.n_images)),
        tuple(sorted(confusions, key=lambda own: -abs(own.after - own.before))),
        tuple(sorted(flips, key=lambda flip: -flip.margin)),
    )
