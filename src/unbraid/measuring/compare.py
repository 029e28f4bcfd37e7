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
from unbraid.base.progress import image_progress
from unbraid.images.batches import in_order, load
from unbraid.images.broken import UNLABELLED, sort_out
from unbraid.images.dataset import size_of
from unbraid.networks.copying import device_of, unwrap
from unbraid.networks.outputs import run_network, stack_images
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
        ModelError: the original itself gives other logits each time, or the network never runs a
            split layer of `model2`.
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
    worst, seen, labelled, agree, before, after = 0.0, 0, 0, 0, 0, 0
    with (
        undisturbed(model),
        undisturbed(model2),
        in_force(model2),
        torch.no_grad(),
        image_progress("Comparing outputs", n_images, show=progress) as advance,
    ):
        for items in load(dataset, in_order(n_images, batch_size), workers=workers):
            advance(len(items))
            good, _ = sort_out(items, skip_broken)
            if not good:
                continue
            index = torch.tensor([item[0] for item in good], dtype=torch.int64)
            images = stack_images([item[1] for item in good], index).to(device)
            labels = torch.tensor([item[2] for item in good], dtype=torch.int64, device=device)
            logits, logits2 = run_network(model, images), run_network(model2, images)
            difference = float((logits - logits2).abs().max())
            worst = difference if math.isnan(difference) else max(worst, difference)
            if not worst <= tolerance:  # a NaN is no pass
                _refuse_broken_original(logits, index)
                refuse_unsteady(model, images, tolerance)
                raise OutputChangedError(
                    f"The split network's logits differ from the original's by {worst:.3g}, more "
                    f"than the tolerance {tolerance:g}; do not use it, or raise the tolerance."
                )
            seen += len(good)
            labelled += int((labels != UNLABELLED).sum())
            agree += int((logits.argmax(1) == logits2.argmax(1)).sum())
            before += int((logits.argmax(1) == labels).sum())
            after += int((logits2.argmax(1) == labels).sum())
    if seen == 0:
        raise DataError("No image could be read, so there is nothing to compare outputs on.")
    accuracies = (before / labelled, after / labelled) if labelled else (None, None)
    return OutputComparison(worst, agree / seen, *accuracies)


def _refuse_broken_original(logits: Tensor, index: Tensor) -> None:
    """Raise if it is the original that gives no numbers, so that the split is not blamed for it."""
    wrong = ~logits.isfinite().all(1).cpu()
    if wrong.any():
        raise OutputChangedError(
            f"The original network's own logits of image {int(index[wrong][0])} are nan or "
            "infinite, so nothing can be compared with them; check the image and the weights."
        )
