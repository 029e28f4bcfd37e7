"""Compare what two networks compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.arguments import chosen_indices, flag, loading, real_number
from unbraid.base.errors import DataError, OutputChangedError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.images.batches import Batch, image_progress, in_batches, read_images
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import size_of
from unbraid.images.which import images_named
from unbraid.networks.copying import device_of, unwrap
from unbraid.networks.outputs import alike_wide, as_rows, holds_logits, run_network, run_raw
from unbraid.networks.preflight import refuse_unsteady
from unbraid.networks.relevance import undisturbed
from unbraid.scanning.targets import LABEL, GivenTarget, Scalar, read_target
from unbraid.surgery.apply import in_force


@dataclass(frozen=True)
class OutputComparison:
    """How far a network's outputs are from the original's."""

    max_abs_logit_diff: float  # of all that the network puts out, where that is no logits
    top1_agreement: float | None  # fraction of the images; None where there are no classes
    top1_before: float | None  # accuracy of the original; None for images without labels
    top1_after: float | None
    # Compared; older files do not say.
    n_images: int | None = field(default=None, repr=False)


class OutputSums:
    """What outputs differ by, batch by batch."""

    def __init__(self, model: nn.Module, tolerance: float, target: Scalar | None = None) -> None:
        """Start without an image, with the original network; classes ask for a target of them."""
        self._model, self._tolerance = model, tolerance
        self.of_classes = target is None or target.name == LABEL
        self._worst = 0.0
        # Read, labelled, of the same top class, right before and after.
        self._counts = torch.zeros(5, dtype=torch.int64)

    def add(self, batch: Batch, logits: Tensor, logits2: Tensor) -> None:
        """Add what both networks say of a batch; OutputChangedError if they differ."""
        index, images, labels = batch
        if logits.shape != logits2.shape:  # as of other boxes
            self._worst = math.inf
            logits, logits2 = alike_wide(logits, logits2)
        difference = float((logits - logits2).abs().max())
        self._worst = difference if math.isnan(difference) else max(self._worst, difference)
        if not self._worst <= self._tolerance:  # a NaN is no pass
            _refuse_broken_original(logits, index)
            refuse_unsteady(self._model, images)
            raise OutputChangedError(
                f"The split network's logits differ from the original's by {self._worst:.3g}, more "
                f"than the tolerance {self._tolerance:g}; do not use it, or raise the tolerance."
            )
        labels, top, top2 = labels.to(logits.device), logits.argmax(1), logits2.argmax(1)
        found = (top >= 0, labels != UNLABELLED, top == top2, top == labels, top2 == labels)
        self._counts += torch.stack(found).sum(1).cpu()

    def result(self) -> OutputComparison:
        """Sum up; DataError if there was no image."""
        n_read, n_labelled, n_same, n_before, n_after = self._counts.tolist()
        if n_read == 0:
            raise DataError("No image could be read, so there is nothing to compare outputs on.")
        if not self.of_classes:
            return OutputComparison(self._worst, None, None, None, n_read)
        before, after = (n / n_labelled if n_labelled else None for n in (n_before, n_after))
        return OutputComparison(self._worst, n_same / n_read, before, after, n_read)


@in_plain_modes
def compare_outputs(
    model: nn.Module,
    model2: nn.Module,
    dataset: Dataset[Any],
    *,
    indices: Sequence[int] | None = None,
    tolerance: float = 1e-4,
    target: GivenTarget | Scalar = LABEL,
    batch_size: int = 64,
    workers: int = 0,
    skip_broken: bool = False,
    progress: bool = False,
) -> OutputComparison:
    """Measure how far two networks' outputs differ, and raise if they do.

    These are logits, or, of a network that gives none, all numbers of its output, of any structure.

    Args:
        model: the original.
        model2: the split network, on the same device.
        dataset: map-style, of (image tensor, label).
        indices: of the images to compare on, in the data set; by default all.
        tolerance: the largest absolute logit difference that passes; 0 for the exact form.
        target: that of the scan; with another than "label" there are no classes to compare.
        batch_size: images per forward pass.
        workers: processes that load images.
        skip_broken: leave out images that cannot be read.
        progress: show a progress bar on standard error.

    Returns:
        The largest difference, in units of the output; the fraction of images with the same
        predicted class; and the accuracy of both, from 0 to 1.

    Raises:
        OutputChangedError: a logit differs by more than the tolerance, or is not a number.
        ModelError: the original gives other logits each time, or a split layer never runs.
        DataError: an image cannot be read.
        UsageError: tolerance, batch_size or workers is out of range.
    """
    batch_size, workers = loading(batch_size, workers)
    skip_broken = flag("skip_broken", skip_broken)
    tolerance = real_number("tolerance", tolerance)
    if not tolerance >= 0:
        raise UsageError(f"tolerance is {tolerance:g}; it must be 0 or more.")
    chosen = chosen_indices(indices, size_of(dataset))
    model, model2 = unwrap(model), unwrap(model2)
    device, sums = device_of(model), OutputSums(model, tolerance, read_target(target))
    with (
        images_named(dataset),
        undisturbed(model),
        undisturbed(model2),
        in_force(model2),
        torch.no_grad(),
        image_progress("Comparing outputs", len(chosen), show=progress) as advance,
    ):
        for index, images, labels in read_images(
            dataset,
            in_batches(chosen, batch_size),
            workers=workers,
            skip_broken=skip_broken,
            advance=advance,
        ):
            images = images.to(device)
            output, logits2 = run_raw(model, images), run_network(model2, images)
            sums.of_classes &= holds_logits(output, len(images))  # else none is right or wrong
            logits = as_rows(output, len(images))
            sums.add((index, images, labels), logits, logits2)
    return sums.result()


def _refuse_broken_original(logits: Tensor, index: Tensor) -> None:
    """Raise if it is the original that gives no numbers, so that the split is not blamed for it."""
    wrong = ~logits.isfinite().all(1).cpu()
    if wrong.any():
        raise OutputChangedError.of_image(
            "The original network's own logits of",
            int(index[wrong][0]),
            "are nan or infinite, so nothing can be compared with them; check the image and the "
            "weights.",
        )
