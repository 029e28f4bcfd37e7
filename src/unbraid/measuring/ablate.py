"""Switch concept channels off, one at a time, and measure what the network loses by it.

Shapes: N images of a batch, T outputs, K concepts of a channel, R = 2 + K runs for a channel:
nothing off, the whole channel off, each of its concept channels off.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.arguments import as_kind, flag, loading, whole_numbers
from unbraid.base.errors import DataError, LayerError, ModelError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members
from unbraid.images.batches import Batch, image_progress, in_batches, read_images
from unbraid.images.dataset import class_names_of, size_of
from unbraid.measuring.results import (
    Ablation,
    ChannelAblation,
    ClassDrops,
    ClassOutput,
    ConceptAblation,
    Drop,
)
from unbraid.networks.copying import unwrap
from unbraid.networks.outputs import check_labels, refuse_broken_values, run_network
from unbraid.networks.preflight import refuse_unsteady
from unbraid.networks.relevance import undisturbed
from unbraid.scanning.records import Scan
from unbraid.surgery.apply import NOT_IN_FORCE
from unbraid.surgery.split_layer import SplitLayer

Concepts = dict[int, tuple[Concept, ...]]  # by channel


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

    Lost is the logit of an image's own label, and top-1 accuracy. A concept channel is off when
    its gate is 0; a whole channel is off when its pre-activation is 0. The network is used in eval
    mode, on its device, and left exactly as it was; gates and clamps do not count meanwhile.

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
        "Evaluate" in docs/method.md, causal effect.
    """
    model2 = unwrap(model2)
    split_layers = {name: m for name, m in model2.named_modules() if isinstance(m, SplitLayer)}
    measured = _layer_of(split_layers, layer)
    concepts = _concepts_of(measured, channels)
    batch_size, workers = loading(batch_size, workers)
    skip_broken = flag("skip_broken", skip_broken)
    n_images = size_of(dataset)
    names = class_names_of(dataset)
    members = _members(measured, concepts, scan, n_images)
    sums: dict[int, AblationSums] = {}
    with (
        undisturbed(model2),
        torch.inference_mode(False),  # where torch would not count what is written into
        torch.no_grad(),
        _all_on(split_layers.values()),
        replaying(model2, measured) as replay,
        image_progress("Switching channels off", n_images, show=progress) as advance,
    ):
        batches = in_batches(range(n_images), batch_size)
        for batch in read_images(
            dataset, batches, workers=workers, skip_broken=skip_broken, advance=advance
        ):
            index, images, labels = batch
            if not sums:
                refuse_unsteady(model2, images.to(measured.rows.device))
            n_outputs, outcomes = _run_batch(replay, measured, concepts, batch)
            for channel, outcome in outcomes.items():
                if channel not in sums:
                    sums[channel] = AblationSums(concepts[channel], n_outputs)
                sums[channel].add(labels, members(channel, index, labels), outcome)
    if not sums:
        raise DataError("No image could be read, so there is nothing to switch channels off for.")

    def name(label: int) -> str:
        return (label < len(names) and names[label]) or str(label)

    return Ablation(
        layer=measured.spec.name,
        classes=next(iter(sums.values())).class_outputs(name),
        channels=tuple(own.result(channel, name) for channel, own in sums.items()),
    )


def _layer_of(layers: dict[str, SplitLayer], name: str | None) -> SplitLayer:
    if not layers:
        raise UsageError(
            "The network has no concept channels to switch off; pass one from unbraid.apply in its "
            "exact form."
        )
    if name is None and len(layers) == 1:
        return next(iter(layers.values()))
    if name is None or name not in layers:
        problem = "Several layers are split" if name is None else f"Layer {name!r} is not split"
        raise UsageError(f"{problem}; name one of {', '.join(map(repr, layers))} in layer.")
    return layers[name]


def _concepts_of(layer: SplitLayer, channels: Sequence[int] | None) -> Concepts:
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
    layer: SplitLayer, concepts: Concepts, scan: Scan | None, n_images: int
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Make a function of a channel, indices and labels (N,): which concept (N,), K for none."""
    if scan is None and layer.clusters:
        raise UsageError(
            "Concepts of the split are clusters of images, which labels do not tell; pass scan=, a "
            "scan of the same images."
        )
    if scan is None:

        def by_label(channel: int, _: Tensor, labels: Tensor) -> Tensor:
            concept = torch.full_like(labels, len(concepts[channel]))
            for k, classes in enumerate(concepts[channel]):
                concept[torch.isin(labels, torch.tensor(classes, dtype=torch.int64))] = k
            return concept

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
    before = [(layer, layer.moves) for layer in layers]
    try:
        for layer, _ in before:
            layer.moves = []
        yield
    finally:
        for layer, moves in before:
            layer.moves = moves


def _run_batch(
    replay: Replay, layer: SplitLayer, concepts: Concepts, batch: Batch
) -> tuple[int, dict[int, Tensor]]:
    """T, and by channel (2, R, N): logits of the own labels, and 1 where these are the top ones."""
    index, images, labels = batch
    images = images.to(layer.rows.device)
    responses: list[Tensor] = []
    with layer.concepts.register_forward_hook(lambda *args: responses.append(args[-1].clone())):
        logits, output = replay.first(images)
    check_labels(labels, index, logits)
    own = labels.to(logits.device)

    def outcome(logits: Tensor) -> Tensor:
        refuse_broken_values(logits, index)
        target, hit = logits.gather(1, own[:, None])[:, 0], logits.argmax(1) == own
        return torch.stack([target.double(), hit.double()])

    outcomes, intact = {}, outcome(logits)
    dim = -1 if layer.spec.channels_last else 1
    for channel, groups in concepts.items():
        runs, whole = [intact], output.select(dim, channel)
        rows = (layer.names.index(f"{channel}.{k}") for k in range(len(groups)))
        rests = (whole - responses[0].select(dim, row) for row in rows)
        for rest in (torch.zeros_like(whole), *rests):
            changed = output.clone()
            changed.select(dim, channel).copy_(rest)
            runs.append(outcome(replay.again(images, changed)))
        outcomes[channel] = torch.stack(runs, 1).cpu()
    return logits.shape[1], outcomes


class AblationSums:
    """Logits and hits of a channel's runs, summed by class, by concept, and over all other images.

    The groups stand in this order: T classes, K concepts, one for images of no concept.
    """

    def __init__(self, concepts: tuple[Concept, ...], n_classes: int) -> None:
        """Start at zero."""
        self._concepts, self._n_classes = concepts, n_classes
        n_groups = n_classes + len(concepts) + 1
        self._n_images = torch.zeros(n_groups, dtype=torch.float64)
        self._sums = torch.zeros(2, 2 + len(concepts), n_groups, dtype=torch.float64)

    def add(self, labels: Tensor, concept: Tensor, outcomes: Tensor) -> None:
        """Add a batch, of outcomes (2, R, N); concept (N,) is K for images of none."""
        for group in (labels, self._n_classes + concept):
            self._n_images.index_add_(0, group, torch.ones(len(group), dtype=torch.float64))
            self._sums.index_add_(2, group, outcomes)

    def class_outputs(self, name: Callable[[int], str]) -> tuple[ClassOutput, ...]:
        """Return what the network makes of each class with nothing off."""
        return tuple(
            ClassOutput(label, name(label), int(self._n_images[label]), *self._means(0, [label]))
            for label in self._seen()
        )

    def result(self, channel: int, name: Callable[[int], str]) -> ChannelAblation:
        """Return what is lost, by class and by concept."""
        groups = [self._n_classes + k for k in range(len(self._concepts) + 1)]
        return ChannelAblation(
            channel=channel,
            whole=self._class_drops(1),
            concepts=tuple(
                ConceptAblation(
                    classes=classes,
                    name=", ".join(map(name, classes)),
                    own=self._drop([groups[k]], 2 + k),
                    others=self._drop([*groups[:k], *groups[k + 1 : -1]], 2 + k),
                    rest=self._drop([groups[-1]], 2 + k),
                    by_class=self._class_drops(2 + k),
                )
                for k, classes in enumerate(self._concepts)
            ),
        )

    def _seen(self) -> list[int]:
        return [int(label) for label in self._n_images[: self._n_classes].nonzero()]

    def _means(self, run: int, groups: list[int], *, lost: bool = False) -> tuple[float, float]:
        """Mean logit and hits of some groups in a run, or what it lost; NaN without images."""
        n_images = float(self._n_images[groups].sum())
        sums = self._sums[:, 0] - self._sums[:, run] if lost else self._sums[:, run]
        logit, hits = (float(values[groups].sum()) for values in sums)
        return (logit / n_images, hits / n_images) if n_images else (math.nan, math.nan)

    def _drop(self, groups: list[int], run: int) -> Drop:
        """What the images of some groups lose in one run, and without the whole channel."""
        n_images = int(self._n_images[groups].sum())
        lost = self._means(run, groups, lost=True)
        return Drop(n_images, *lost, *self._means(1, groups, lost=True))

    def _class_drops(self, run: int) -> ClassDrops:
        classes = self._seen()
        lost = (self._sums[:, 0] - self._sums[:, run])[:, classes] / self._n_images[classes]
        return ClassDrops(*map(tuple, lost.tolist()))


class Replay:
    """A network whose layer can be given other outputs; made by `replaying`.

    What modules before the layer put out is kept and handed out again in later passes.
    """

    def __init__(self, model: nn.Module) -> None:
        """Keep nothing yet."""
        self.shortened = False  # whether passes after the first leave out what lies before
        self._model = model
        self._kept: list[_Kept] = []  # in the order of the calls
        self._place = 0  # in it, in this pass
        self._output: Tensor | None = None  # of the layer, in the first pass
        self._given: Tensor | None = None  # what the layer is to put out, None in the first pass
        self._n_reached = 0  # how often the layer ran in this pass
        self._within = False  # inside a module whose output will be kept

    def first(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network on a batch as it is; return the logits and the layer's output.

        A network may pass values past its modules, in place or by way of attributes. So whether a
        shortened pass computes the same logits, to the last bit, is tried at once; if it does not,
        later passes run in full.

        Raises:
            LayerError: the layer does not run exactly once.
        """
        self._kept.clear()
        self._output = None
        logits = self.again(images, None)
        if self._output is None:
            raise LayerError(f"The layer runs 0 times in a forward pass, so {NOT_IN_FORCE}.")
        if self._n_reached > 1:
            raise LayerError(
                f"The layer runs {self._n_reached} times in a forward pass, so its output is not "
                "one thing; choose a layer that runs once."
            )
        self.shortened = True
        try:
            same = torch.equal(self.again(images, self._output.clone()), logits)
        except ModelError:
            same = False
        self.shortened = same
        for kept in self._kept:
            kept.lend_if_untouched()
        return logits, self._output

    def again(self, images: Tensor, output: Tensor | None) -> Tensor:
        """Run the network on the images of `first` with another output of the layer."""
        self._given, self._within = output, False
        self._place = self._n_reached = 0
        logits = run_network(self._model, images)
        # This pass is sound, the next would not be.
        spoilt = any(kept.lent and not kept.untouched for kept in self._kept)
        self.shortened = self.shortened and not spoilt
        return logits

    def _at_layer(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(compute)
        def forward(*args: Any, **named: Any) -> Tensor:
            self._n_reached += 1
            if self._given is not None:
                return self._given
            output = compute(*args, **named)
            self._output = output.clone()
            return output

        return forward

    def _before_layer(self, module: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute)
        def forward(*args: Any, **named: Any) -> Any:
            if self._n_reached or self._within:
                return compute(*args, **named)
            if self.shortened and self._given is not None and self._place < len(self._kept):
                kept = self._kept[self._place]
                if kept.module is module:
                    self._place += 1
                    if kept.has_copy:
                        return kept.hand_out()
            self._within = True
            try:
                output = compute(*args, **named)
            finally:
                self._within = False
            if self._given is None and not self._n_reached:
                self._kept.append(_Kept(module, output))
            return output

        return forward


class _Kept:
    """A module's output in the first pass, handed out as a copy, since it may be written into.

    Once nothing wrote into a copy, that one is lent every time, which spares the copying.
    """

    def __init__(self, module: nn.Module, output: Any) -> None:
        self.module = module
        self.has_copy, self.lent = False, False
        with suppress(Exception):  # an output of anyone's own kind, which cannot be copied
            self._value = copy.deepcopy(output)
            self.has_copy = True
        self._handed_out: Any = None
        self._version = 0  # torch counts how often a tensor was written into

    def hand_out(self) -> Any:
        if not self.lent:
            self._handed_out = copy.deepcopy(self._value)
            self._version = getattr(self._handed_out, "_version", 0)
        return self._handed_out

    @property
    def untouched(self) -> bool:
        """Whether nothing wrote into what was handed out last."""
        out = self._handed_out
        return isinstance(out, Tensor) and out._version == self._version

    def lend_if_untouched(self) -> None:
        if self.untouched:
            self.lent, self._value = True, None


@contextmanager
def replaying(model: nn.Module, layer: nn.Module) -> Iterator[Replay]:
    """Make it possible to replay a network, in eval mode, from a layer on; put all back."""
    replay = Replay(model)
    inside = set(layer.modules())
    forwards: dict[nn.Module, Callable[..., Any]] = {layer: replay._at_layer(layer.forward)}
    for module in model.modules():
        if module not in inside and not any(part is layer for part in module.modules()):
            forwards[module] = replay._before_layer(module, module.forward)
    # A hook cannot leave out a module's computation; a `forward` of the instance's own can.
    own = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield replay
    finally:
        for module, before in own.items():
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before
