"""Compare what two networks compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.arguments import flag, loading, real_number
from unbraid.base.errors import DataError, OutputChangedError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.images.batches import image_progress, in_batches, read_images
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import size_of
from unbraid.networks.copying import device_of, unwrap
from unbraid.networks.outputs import run_network
from unbraid.networks.preflight import refuse_unsteady
from unbraid.networks.relevance import undisturbed
from unbraid.surgery.apply import in_force


@dataclass(frozen=True)
class OutputComparison:
    """How far a network's outputs are from the original's."""

    max_abs_logit_diff: float
    top1_agreement: float  # fraction of the images
    top1_before: float | None  # accuracy of the original; None for images without labels
    top1_after: float | None


@in_plain_modes
def compare_outputs(
    model: nn.Module,
    model2: nn.Module,
    dataset: Dataset[Any],
    *,
    tolerance: float = 1e-4,
    batch_size: int = 64,
    workers: int = 0,
    skip_broken: bool = False,
    progress: bool = False,
) -> OutputComparison:
    """Measure how far two networks' logits differ, and raise if they do.

    Args:
        model: the original.
        model2: the split network, on the same device.
        dataset: map-style, of (image tensor, label).
        tolerance: the largest absolute logit difference that passes; 0 for the exact form.
        batch_size: images per forward pass.
        workers: processes that load images.
        skip_broken: leave out images that cannot be read.
        progress: show a progress bar on standard error.

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
    n_images = size_of(dataset)
    model, model2 = unwrap(model), unwrap(model2)
    device = device_of(model)
    worst = 0.0
    counts = torch.zeros(5, dtype=torch.int64)  # read, labelled, same, right before and after
    with (
        undisturbed(model),
        undisturbed(model2),
        in_force(model2),
        torch.no_grad(),
        image_progress("Comparing outputs", n_images, show=progress) as advance,
    ):
        batches = in_batches(range(n_images), batch_size)
        for index, images, labels in read_images(
            dataset, batches, workers=workers, skip_broken=skip_broken, advance=advance
        ):
            images, labels = images.to(device), labels.to(device)
            logits, logits2 = run_network(model, images), run_network(model2, images)
            difference = float((logits - logits2).abs().max())
            worst = difference if math.isnan(difference) else max(worst, difference)
            if not worst <= tolerance:  # a NaN is no pass
                _refuse_broken_original(logits, index)
                refuse_unsteady(model, images)
                raise OutputChangedError(
                    f"The split network's logits differ from the original's by {worst:.3g}, more "
                    f"than the tolerance {tolerance:g}; do not use it, or raise the tolerance."
                )
            top, top2 = logits.argmax(1), logits2.argmax(1)
            found = (top >= 0, labels != UNLABELLED, top == top2, top == labels, top2 == labels)
            counts += torch.stack(found).sum(1).cpu()
    n_read, n_labelled, n_same, n_before, n_after = counts.tolist()
    if n_read == 0:
        raise DataError("No image could be read, so there is nothing to compare outputs on.")
    accuracies = (n_before / n_labelled, n_after / n_labelled) if n_labelled else (None, None)
    return OutputComparison(worst, n_same / n_read, *accuracies)


def _refuse_broken_original(logits: Tensor, index: Tensor) -> None:
    """Raise if it is the original that gives no numbers, so that the split is not blamed for it."""
    wrong = ~logits.isfinite().all(1).cpu()
    if wrong.any():
        raise OutputChangedError(
            f"The original network's own logits of image {int(index[wrong][0])} are nan or "
            "infinite, so nothing can be compared with them; check the image and the weights."
        )
