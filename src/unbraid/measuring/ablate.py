"""Switch concept channels off, one at a time, and measure what the network loses by it.

Shapes: N images of a batch, T outputs, K concepts of a channel, R = 3 + K runs for a channel:
nothing off, the whole channel off, each of its concept channels off, its rest channel off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.arguments import as_kind, chosen_indices, flag, loading, whole_numbers
from unbraid.base.errors import DataError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members, name_of
from unbraid.images.batches import Batch, image_progress, in_batches, read_images
from unbraid.images.dataset import class_names_of, size_of
from unbraid.images.which import images_named
from unbraid.measuring.replay import Replay, replaying
from unbraid.measuring.results import (
    Ablation,
    ChannelAblation,
    ClassDrops,
    ClassOutput,
    ConceptAblation,
    Drop,
    RestAblation,
)
from unbraid.networks.copying import unwrap
from unbraid.networks.outputs import logits_of
from unbraid.networks.preflight import refuse_unsteady
from unbraid.networks.relevance import undisturbed
from unbraid.scanning.records import Scan
from unbraid.scanning.targets import LABEL, GivenTarget, Scalar, read_target
from unbraid.surgery.split_layer import SplitLayer, split_layer_of

Concepts = dict[int, tuple[Concept, ...]]  # by channel


@in_plain_modes
def ablate(
    model2: nn.Module,
    dataset: Dataset[Any],
    *,
    indices: Sequence[int] | None = None,
    layer: str | None = None,
    channels: Sequence[int] | None = None,
    scan: Scan | None = None,
    target: GivenTarget | Scalar = LABEL,
    batch_size: int = 64,
    workers: int = 0,
    skip_broken: bool = False,
    progress: bool = False,
) -> Ablation:
    """Switch off each concept channel, rest and whole channel, and measure what is lost.

    Lost is the logit of an image's own label, and top-1 accuracy; or, with another target, that
    number alone. A concept channel or the rest of
    a channel is off when its gate is 0, a whole channel when its pre-activation is 0. The network
    is used in eval mode, on its device, and left exactly as it was; gates and clamps do not count
    meanwhile.

    Args:
        model2: a split network, from `unbraid.apply` in the exact form.
        dataset: map-style, of (image tensor, label).
        indices: of the images to run on, in the data set; by default all.
        layer: name of the split layer, needed where several are split.
        channels: its split channels to switch off; by default all.
        scan: of the same images, needed where concepts are clusters of images.
        target: the number of each image that is lost, as `unbraid.scan` takes it.
        batch_size: images per forward pass.
        workers: processes that load images.
        skip_broken: leave out images that cannot be read.
        progress: show a progress bar on standard error.

    Returns:
        An Ablation: what each class loses, in units of the logit (or target) and of accuracy.

    Raises:
        UsageError: there is no such layer or channel, the scan does not fit, or there is no
            target.
        DataError: an image cannot be read, or its label names no output.
        ModelError: the network computes NaN or infinite numbers, or cannot run.
        LayerError: the split layer does not run exactly once.

    Source:
        "Evaluate" in docs/method.md, causal effect.
    """
    model2 = unwrap(model2)
    batch_size, workers = loading(batch_size, workers)
    skip_broken = flag("skip_broken", skip_broken)
    n_images = size_of(dataset)
    chosen = chosen_indices(indices, n_images)
    with (
        images_named(dataset),
        undisturbed(model2),
        torch.inference_mode(False),  # where torch would not count what is written into
        torch.no_grad(),
        ablating(model2, n_images, layer, channels, scan, read_target(target)) as ablation,
        image_progress("Switching channels off", len(chosen), show=progress) as advance,
    ):
        for batch in read_images(
            dataset,
            in_batches(chosen, batch_size),
            workers=workers,
            skip_broken=skip_broken,
            advance=advance,
        ):
            ablation.run(batch)
    return ablation.result(class_names_of(dataset))


class Ablating:
    """An ablation under way, batch by batch."""

    def __init__(
        self,
        replay: Replay,
        model2: nn.Module,
        layer: SplitLayer,
        concepts: Concepts,
        members: Callable[[int, Tensor, Tensor], Tensor],
        target: Scalar,
    ) -> None:
        """Start without an image."""
        self._replay, self._model2, self._layer = replay, model2, layer
        self._concepts, self._members, self._target = concepts, members, target
        self._sums: dict[int, _AblationSums] = {}

    def run(self, batch: Batch) -> Tensor:
        """Run a batch as it is, whose logits are returned, and with each thing switched off."""
        index, images, labels = batch
        if not self._sums:
            refuse_unsteady(self._model2, images.to(self._layer.rows.device))
        asked = (self._layer, self._concepts, self._target)
        logits, outcomes = _run_batch(self._replay, *asked, batch)
        n_classes = logits.shape[1] if self._target.of_class else 0
        for channel, outcome in outcomes.items():
            if channel not in self._sums:
                self._sums[channel] = _AblationSums(self._concepts[channel], n_classes)
            self._sums[channel].add(labels, self._members(channel, index, labels), outcome)
        return logits

    def result(self, names: Sequence[str]) -> Ablation:
        """Sum up, with names of classes; DataError if there was no image."""
        if not self._sums:
            raise DataError(
                "No image could be read, so there is nothing to switch channels off for."
            )
        name = partial(name_of, names)
        return Ablation(
            layer=self._layer.spec.name,
            classes=next(iter(self._sums.values())).class_outputs(name),
            channels=tuple(own.result(channel, name) for channel, own in self._sums.items()),
            target=self._target.name,
        )


@contextmanager
def ablating(
    model2: nn.Module,
    n_images: int,
    layer: str | None = None,
    channels: Sequence[int] | None = None,
    scan: Scan | None = None,
    target: Scalar | None = None,
) -> Iterator[Ablating]:
    """Make a split network ready to be run with channels switched off, and put all back.

    It must be in eval mode, without gradients; `n_images` are those of the data set.
    """
    target = target or read_target(LABEL)
    if target.value is None:
        raise UsageError(
            "Without a target there is no number that an image could lose; name one that you want "
            "to see, such as 'segmentation:CLASS', or a function."
        )
    split_layers = {name: m for name, m in model2.named_modules() if isinstance(m, SplitLayer)}
    measured = split_layer_of(model2, layer, "switch off")
    concepts = _concepts_of(measured, channels)
    members = _members(measured, concepts, scan, n_images)
    with _all_on(split_layers.values()), replaying(model2, measured) as replay:
        yield Ablating(replay, model2, measured, concepts, members, target)


def _concepts_of(layer: SplitLayer, channels: Sequence[int] | None) -> Concepts:
    """Concepts of the channels asked for."""
    if channels is None:
        return layer.divided
    wanted = whole_numbers("channels", channels)
    unknown = [channel for channel in wanted if channel not in layer.divided]
    if unknown or not wanted:
        problem = f"names {unknown[0]}, which is not split" if unknown else "is empty"
        known = shorten(", ".join(map(str, layer.divided)), 100, placeholder=" ...")
        raise UsageError(f"channels {problem}; the split channels are {known}.")
    return {channel: layer.divided[channel] for channel in wanted}


def _members(
    layer: SplitLayer, concepts: Concepts, scan: Scan | None, n_images: int
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Make a function of a channel, indices and labels (N,): which concept (N,), K for none."""

    def by_label(channel: int, _: Tensor, labels: Tensor) -> Tensor:
        concept = torch.full_like(labels, len(concepts[channel]))
        for k, classes in enumerate(concepts[channel]):
            concept[torch.isin(labels, torch.tensor(classes, dtype=torch.int64))] = k
        return concept

    if any(own.places for own in layer.clusters.values()) or (scan and scan.manifest.places_of):
        raise UsageError(
            "Channels are switched off in whole images, so ablate takes no split and no scan of "
            "places; find and split with a scan of images, or measure this split with evaluate."
        )
    if scan is None:
        if layer.clusters:
            raise UsageError(
                "Concepts of the split are clusters of images, which labels do not tell; pass "
                "scan=, a scan of the same images."
            )
        return by_label
    as_kind("scan", scan, Scan)
    if scan.layer != layer.spec or scan.manifest.n_images != n_images:
        raise UsageError(
            "The scan is of other images or another layer than are switched off; pass one of all "
            "these images and the split layer."
        )
    known = Members(scan, layer.clusters)
    members = {
        o: torch.full((n_images,), len(groups), dtype=torch.int64) for o, groups in concepts.items()
    }
    for records in scan.shards():
        for channel, groups in concepts.items():
            concept = known.concept_of(records, groups)
            members[channel][records.index] = torch.where(concept < 0, len(groups), concept)
    return lambda channel, index, _: members[channel][index]


@contextmanager
def _all_on(layers: Iterable[SplitLayer]) -> Iterator[None]:
    """Take back all moves for a while."""
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(setattr, layer, "moves", layer.moves)
            layer.moves = []
        yield


def _run_batch(
    replay: Replay, layer: SplitLayer, concepts: Concepts, target: Scalar, batch: Batch
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits; by channel (2, R, N), the targets, and 1 where the own label is the top one.

    The latter is NaN where there are no classes to be right about.
    """
    index, images, labels = batch
    images = images.to(layer.rows.device)
    concepts_seen, residuals_seen = [], []
    with (
        layer.concepts.register_forward_hook(lambda *args: concepts_seen.append(args[-1].clone())),
        layer.residuals.register_forward_hook(lambda *a: residuals_seen.append(a[-1].clone())),
    ):
        logits, output = replay.first(images)
    own = labels.to(layer.rows.device)

    def outcome() -> Tensor:
        value = target.of(replay.raw, own, index).double()
        hit = torch.full_like(value, math.nan)
        if target.name == LABEL:
            hit = (logits_of(replay.raw, len(own)).argmax(1) == own).double()
        return torch.stack([value, hit])

    outcomes, intact = {}, outcome()
    dim = -1 if layer.spec.channels_last else 1
    for channel, groups in concepts.items():
        runs, whole = [intact], output.select(dim, channel)
        rows = (layer.names.index(f"{channel}.{k}") for k in range(len(groups)))
        left = [whole - concepts_seen[0].select(dim, row) for row in rows]
        # The rest is the residual with its sign turned, so what is left without it is their sum.
        left.append(whole + residuals_seen[0].select(dim, list(layer.divided).index(channel)))
        for values in (torch.zeros_like(whole), *left):
            changed = output.clone()
            changed.select(dim, channel).copy_(values)
            replay.again(images, changed)
            runs.append(outcome())
        outcomes[channel] = torch.stack(runs, 1).cpu()
    return logits, outcomes


class _AblationSums:
    """Logits and hits of a channel's runs, summed by T classes, K concepts, and of no concept."""

    def __init__(self, concepts: tuple[Concept, ...], n_classes: int) -> None:
        self._concepts, self._n_classes = concepts, n_classes
        n_groups = n_classes + len(concepts) + 1
        self._n_images = torch.zeros(n_groups, dtype=torch.float64)
        self._sums = torch.zeros(2, 3 + len(concepts), n_groups, dtype=torch.float64)
        self._squares = torch.zeros_like(self._sums)  # of what is lost

    def add(self, labels: Tensor, concept: Tensor, outcomes: Tensor) -> None:
        """Add outcomes (2, R, N) of a batch; concept (N,) is K for images of none."""
        self._make_room(int(labels.max()) + 1)
        labelled = labels >= 0
        for group, chosen in ((labels, labelled), (self._n_classes + concept, labelled | True)):
            group, own = group[chosen], outcomes[..., chosen]
            self._n_images.index_add_(0, group, torch.ones(len(group), dtype=torch.float64))
            self._sums.index_add_(2, group, own)
            self._squares.index_add_(2, group, (own[:, :1] - own).square())

    def _make_room(self, n_classes: int) -> None:
        """Take in classes that were not known of before, where labels name no outputs."""
        n_new = n_classes - self._n_classes
        if n_new <= 0:
            return

        def widened(sums: Tensor) -> Tensor:
            room = sums.new_zeros(*sums.shape[:-1], n_new)
            return torch.cat([sums[..., : self._n_classes], room, sums[..., self._n_classes :]], -1)

        self._n_images, self._sums = widened(self._n_images), widened(self._sums)
        self._squares, self._n_classes = widened(self._squares), n_classes

    def class_outputs(self, name: Callable[[int], str]) -> tuple[ClassOutput, ...]:
        seen = self._seen()
        means = (self._sums[:, 0, seen] / self._n_images[seen]).T.tolist()
        return tuple(
            ClassOutput(label, name(label), int(self._n_images[label]), *mean)
            for label, mean in zip(seen, means, strict=True)
        )

    def result(self, channel: int, name: Callable[[int], str]) -> ChannelAblation:
        seen = self._seen()
        lost = self._sums[:, :1] - self._sums

        def by_class(run: int) -> ClassDrops:
            n = self._n_images[seen]
            mean = lost[:, run, seen] / n
            spread = (self._squares[:, run, seen] / n - mean.square()).clamp(min=0)
            errors = torch.where(n > 1, (spread / (n - 1)).sqrt(), torch.nan)
            return ClassDrops(*map(tuple, torch.cat([mean, errors]).tolist()))

        def drop(run: int, groups: list[int]) -> Drop:
            n_images = int(self._n_images[groups].sum())
            if n_images == 0:
                return Drop(0, math.nan, math.nan, math.nan, math.nan)
            sums = [values[groups].sum() for values in (*lost[:, run], *lost[:, 1])]
            return Drop(n_images, *(float(value) / n_images for value in sums))

        *groups, others = range(self._n_classes, len(self._n_images))
        concepts = tuple(
            ConceptAblation(
                classes=classes,
                name=", ".join(map(name, classes)),
                own=drop(2 + k, [groups[k]]),
                others=drop(2 + k, [*groups[:k], *groups[k + 1 :]]),
                rest=drop(2 + k, [others]),
                by_class=by_class(2 + k),
            )
            for k, classes in enumerate(self._concepts)
        )
        last = 2 + len(concepts)
        rest = RestAblation(drop(last, groups), drop(last, [others]), by_class(last))
        return ChannelAblation(channel, by_class(1), concepts, rest)

    def _seen(self) -> list[int]:
        return [int(label) for label in self._n_images[: self._n_classes].nonzero()]
