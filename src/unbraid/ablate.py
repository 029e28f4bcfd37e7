"""Switch concept channels off, one at a time, and measure what the network loses by it.

Shapes: N images of a batch, T outputs, R runs of the batch: nothing off, then per channel the whole
channel off and each of its concept channels off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.ablation import Ablation
from unbraid.data import GoodItem, class_names_of, size_of, sort_out
from unbraid.doors import in_plain_modes
from unbraid.errors import DataError, UsageError
from unbraid.findings import Concept
from unbraid.first_look import refuse_unsteady
from unbraid.given import as_kind, flag, loading, whole_numbers
from unbraid.loading import in_order, load
from unbraid.networks import unwrap
from unbraid.progress import image_progress
from unbraid.records import Scan
from unbraid.relevance import undisturbed
from unbraid.replay import Replay, replaying
from unbraid.running import check_labels, refuse_broken_values, stack_images
from unbraid.split_layer import SplitLayer
from unbraid.tally import Tally, members_by_place


@in_plain_modes
def ablate(
    model2: nn.Module,
    dataset: Dataset[Any],
    *,
    layer: str | None = None,
    channels: Sequence[int] | None = None,
    scan: Scan | None = None,
    batch_size: int = 64,
    workers: int = 0,
    skip_broken: bool = False,
    progress: bool = False,
) -> Ablation:
    """Switch off each concept channel, and each whole channel, and measure what is lost.

    Lost is the logit of an image's own label, and top-1 accuracy, beside the network with nothing
    off. A concept channel is off when its gate is 0; a whole channel is off when its
    pre-activation is 0. The network is used in eval mode, on the device that it is on, and left
    exactly as it was; gates and clamps do not count while this measures.

    What lies before the split layer runs once a batch, what lies behind it once for everything
    switched off, so the time goes with the number of channels.

    Args:
        model2: a split network, from `unbraid.apply` in the exact form.
        dataset: map-style, of (image tensor, label).
        layer: name of the split layer, needed where several are split.
        channels: its split channels to switch off; by default all.
        scan: of the same images, which tells those of concepts that are clusters of images;
            concepts that are classes need none.
        batch_size: images per forward pass.
        workers: processes that load images.
        skip_broken: leave out images that cannot be read.
        progress: show a progress bar on standard error.

    Raises:
        UsageError: the network has no concept channels, or lacks the layer or a channel; or the
            scan is missing or of other images or another layer.
        DataError: an image cannot be read, or its label names no output.
        ModelError: the network computes NaN or infinite numbers, or cannot run.
        LayerError: the split layer does not run exactly once.

    Source:
        METHOD.md section 6, causal effect.
    """
    model2 = unwrap(model2)
    split_layers = _split_layers(model2)
    measured = _layer_of(split_layers, layer)
    chosen = _chosen(measured, channels)
    batch_size, workers = loading(batch_size, workers)
    skip_broken = flag("skip_broken", skip_broken)
    n_images = size_of(dataset)
    names = class_names_of(dataset)
    members = _members(measured, chosen, scan, n_images)
    tally: Tally | None = None
    with (
        undisturbed(model2),
        torch.inference_mode(False),  # where torch would not count what is written into
        torch.no_grad(),
        _all_on(split_layers.values()),
        replaying(model2, measured) as replay,
        image_progress("Switching channels off", n_images, show=progress) as advance,
    ):
        for items in load(dataset, in_order(n_images, batch_size), workers=workers):
            advance(len(items))
            good, _ = sort_out(items, skip_broken)
            if good:
                if tally is None:
                    refuse_unsteady(model2, _images_of(good).to(measured.rows.device))
                index, label, logit, hit, n_outputs = _run_batch(replay, measured, chosen, good)
                tally = tally or Tally(chosen, n_outputs, members)
                tally.add(index, label, logit, hit)
    if tally is None:
        raise DataError("No image could be read, so there is nothing to switch channels off for.")
    return tally.result(measured.spec.name, names)


def _split_layers(model2: nn.Module) -> dict[str, SplitLayer]:
    layers = {name: m for name, m in model2.named_modules() if isinstance(m, SplitLayer)}
    if not layers:
        raise UsageError(
            "The network has no concept channels to switch off; pass one from unbraid.apply in its "
            "exact form."
        )
    return layers


def _layer_of(layers: dict[str, SplitLayer], name: str | None) -> SplitLayer:
    if name is None and len(layers) == 1:
        return next(iter(layers.values()))
    if name is None or name not in layers:
        problem = "Several layers are split" if name is None else f"Layer {name!r} is not split"
        raise UsageError(f"{problem}; name one of {', '.join(map(repr, layers))} in layer.")
    return layers[name]


def _chosen(layer: SplitLayer, channels: Sequence[int] | None) -> dict[int, tuple[Concept, ...]]:
    """Concepts of the channels asked for."""
    if channels is None:
        return layer.divided
    wanted = whole_numbers("channels", channels)
    unknown = [channel for channel in wanted if channel not in layer.divided]
    if unknown or not wanted:
        known = [str(channel) for channel in layer.divided]
        raise UsageError(
            f"channels {'is empty' if not unknown else f'names {unknown[0]}, which is not split'}; "
            f"the split channels are {', '.join(known[:20])}{' ...' if len(known) > 20 else ''}."
        )
    return {channel: layer.divided[channel] for channel in dict.fromkeys(wanted)}


def _members(
    layer: SplitLayer, chosen: dict[int, tuple[Concept, ...]], scan: Scan | None, n_images: int
) -> dict[int, Tensor] | None:
    """Concepts of all images by channel, None where labels tell."""
    if scan is None:
        if layer.clusters:
            raise UsageError(
                "Concepts of the split are clusters of images, which labels do not tell; pass "
                "scan=, a scan of the same images."
            )
        return None
    as_kind("scan", scan, Scan)
    if scan.layer != layer.spec or scan.manifest.n_images != n_images:
        raise UsageError(
            "The scan is of other images or another layer than are switched off; pass one of all "
            "these images and the split layer."
        )
    return members_by_place(chosen, replace(scan, clusters=layer.clusters), n_images)


@contextmanager
def _all_on(layers: Iterable[SplitLayer]) -> Iterator[None]:
    """Take back all moves for a while."""
    before = [(layer, layer.moves) for layer in layers]
    try:
        for layer, _ in before:
            layer.moves = []
        yield
    finally:
        for layer, moves in before:
            layer.moves = moves


def _run_batch(
    replay: Replay,
    layer: SplitLayer,
    chosen: dict[int, tuple[Concept, ...]],
    items: Sequence[GoodItem],
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Places and labels (N,), target logits (R, N), whether these are the top ones (R, N), T."""
    index = torch.tensor([item[0] for item in items], dtype=torch.int64)
    label = torch.tensor([item[2] for item in items], dtype=torch.int64)
    images = _images_of(items).to(layer.rows.device)
    responses: list[Tensor] = []
    handle = layer.concepts.register_forward_hook(
        lambda _module, _args, output: responses.append(output.clone())
    )
    try:
        logits, output = replay.first(images)
    finally:
        handle.remove()
    check_labels(label, index, logits)
    there = label.to(logits.device)
    targets, hits = [], []

    def take(logits: Tensor) -> None:
        refuse_broken_values(logits, index)
        targets.append(logits.gather(1, there[:, None])[:, 0].double())
        hits.append(logits.argmax(1) == there)

    take(logits)
    for changed in _switched_off(layer, chosen, output, responses[0]):
        take(replay.again(images, changed))
    logit, hit = torch.stack(targets).cpu(), torch.stack(hits).double().cpu()
    return index, label, logit, hit, logits.shape[1]


def _images_of(items: Sequence[GoodItem]) -> Tensor:
    index = torch.tensor([item[0] for item in items], dtype=torch.int64)
    return stack_images([item[1] for item in items], index)


def _switched_off(
    layer: SplitLayer, chosen: dict[int, tuple[Concept, ...]], output: Tensor, responses: Tensor
) -> Iterator[Tensor]:
    """Outputs of the layer with one thing off.

    Args:
        layer: the split layer.
        chosen: the concepts of each channel to switch off.
        output: of the layer with nothing off.
        responses: of all concept channels, in the order of `layer.names`.
    """
    dim = -1 if layer.spec.channels_last else 1
    for channel, concepts in chosen.items():
        whole = output.clone()
        whole.select(dim, channel).zero_()
        yield whole
        for k in range(len(concepts)):
            rest = output.clone()
            response = responses.select(dim, layer.names.index(f"{channel}.{k}"))
            rest.select(dim, channel).sub_(response)
            yield rest
