"""What a run asks of both networks, in one pass over some images.

The original runs once on each batch: its logits are compared, its features are the embeddings. The
split network runs once: its logits are compared, and what lies before the layer is kept while
channels are switched off. `compare_outputs`, `ablate` and `measure_semantics`, one after the other,
would run the two networks four times and read each image three times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.errors import ModelError
from unbraid.images.batches import image_progress, in_batches, read_images
from unbraid.images.dataset import class_names_of, size_of
from unbraid.images.which import images_named
from unbraid.measuring.ablate import Ablating, ablating
from unbraid.measuring.compare import OutputComparison, OutputSums
from unbraid.measuring.encoders import NO_FEATURES, Penultimate, ready
from unbraid.measuring.results import Ablation
from unbraid.networks.copying import device_of, unwrap
from unbraid.networks.outputs import run_network
from unbraid.networks.relevance import undisturbed
from unbraid.scanning.records import Scan
from unbraid.scanning.targets import LABEL, Scalar, read_target
from unbraid.surgery.apply import in_force


@dataclass(frozen=True)
class Passed:
    """What one pass of both networks tells."""

    output: OutputComparison
    ablation: Ablation | None  # None without a target
    index: list[int]  # of the images that could be read
    embeddings: list[Tensor]  # of these, (D,) each; none unless asked for
    fault: str = ""  # why there are none though they were


def pass_once(
    model: nn.Module,
    model2: nn.Module,
    dataset: Dataset[Any],
    indices: Sequence[int],
    *,
    encoder: Penultimate | None,
    channels: Sequence[int],
    scan: Scan | None,
    labels: Mapping[int, int] | None,
    target: Scalar | None = None,
    batch_size: int,
    workers: int,
    skip_broken: bool,
    progress: bool,
) -> Passed:
    """Compare outputs bit for bit, switch channels off and, with an encoder, embed images.

    `scan`, of all images, tells the members of clusters; `labels`, by index, which output is an
    image's own where that is not its label. Without a target nothing is switched off. Errors are
    those of `compare_outputs` and `ablate`.
    """
    model, model2, target = unwrap(model), unwrap(model2), target or read_target(LABEL)
    device, sums = device_of(model), OutputSums(model, 0.0, target)
    read: list[int] = []
    embeddings: list[Tensor] = []
    fault, logits = "", torch.empty(0)

    def see(images: Tensor) -> Tensor:
        nonlocal logits
        assert encoder is not None
        features, logits = encoder.see(images)
        if features is None:
            raise ModelError(NO_FEATURES)
        return features

    off: AbstractContextManager[Ablating | None] = nullcontext()
    title = "Comparing outputs"
    if target.value is not None:
        off = ablating(model2, size_of(dataset), None, channels, scan, target)
        title = "Comparing outputs, switching channels off"
    with (
        images_named(dataset),
        undisturbed(model),
        undisturbed(model2),
        in_force(model2),
        torch.inference_mode(False),
        torch.no_grad(),
        ready(see) as embed,
        off as ablation,
        image_progress(title, len(indices), show=progress) as advance,
    ):
        for index, images, given in read_images(
            dataset,
            in_batches(indices, batch_size),
            workers=workers,
            skip_broken=skip_broken,
            advance=advance,
        ):
            batch = index, images.to(device), given
            own = None
            if encoder is not None and not fault:
                try:
                    with images_named(dataset):
                        embeddings += embed(batch).unbind()
                    own = logits
                except ModelError as error:  # a network may have no features of its own
                    fault, embeddings = str(error), []
            read += index.tolist()
            own = run_network(model, batch[1]) if own is None else own
            if labels is not None:
                pairs = zip(index.tolist(), given.tolist(), strict=True)
                taken = [labels.get(n, label) for n, label in pairs]
                given = torch.tensor(taken, dtype=torch.int64)
            if ablation is None:
                sums.add(batch, own, run_network(model2, batch[1]))
            else:
                sums.add(batch, own, ablation.run((index, batch[1], given)))
    lost = None if ablation is None else ablation.result(class_names_of(dataset))
    return Passed(sums.result(), lost, read, embeddings, fault)
