"""Switch concept channels off, one at a time, and measure what the network loses by it.

Shapes: N images of a batch, T outputs, R runs of the batch: nothing off, then per channel the whole
channel off and each of its concept channels off.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.arguments import as_kind, flag, loading, whole_numbers
from unbraid.base.errors import DataError, LayerError, ModelError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.progress import image_progress
from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members
from unbraid.images.batches import in_order, load
from unbraid.images.broken import Loaded, sort_out
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
from unbraid.networks.outputs import check_labels, refuse_broken_values, run_network, stack_images
from unbraid.networks.preflight import refuse_unsteady
from unbraid.networks.relevance import undisturbed
from unbraid.scanning.records import Scan
from unbraid.surgery.apply import NOT_IN_FORCE
from unbraid.surgery.split_layer import SplitLayer

# Run a network again and again with other outputs of one layer, and only what that changes.


class Replay:
    """A network whose layer can be given other outputs; made by `replaying`."""

    def __init__(self, model: nn.Module) -> None:
        """Keep nothing yet."""
        self.shortened = False  # whether passes after the first leave out what lies before
        self._model = model
        self._kept: defaultdict[nn.Module, list[_Kept | None]] = defaultdict(list)  # call by call
        self._turn: Counter[nn.Module] = Counter()  # calls in this pass
        self._output: Tensor | None = None  # of the layer, in the first pass
        self._given: Tensor | None = None  # what the layer is to put out, None in the first pass
        self._n_reached = 0  # how often the layer ran in this pass
        self._within = False  # inside a module whose output will be kept

    def first(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network on a batch as it is.

        A network may pass values past its modules, in place or by way of attributes. So whether a
        shortened pass computes the same logits, to the last bit, is tried at once; if it does not,
        later passes run in full.

        Returns:
            The logits, (N, T), and the layer's output.

        Raises:
            LayerError: the layer does not run exactly once.
            ModelError: the network cannot run on such images.
        """
        self._kept.clear()
        self._given = self._output = None
        logits = self._run(images)
        if self._n_reached == 0:
            raise LayerError(f"The layer runs 0 times in a forward pass, so {NOT_IN_FORCE}.")
        if self._n_reached != 1 or self._output is None:
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
        for kept in self._all_kept():
            kept.end_trial()
        return logits, self._output

    def again(self, images: Tensor, output: Tensor) -> Tensor:
        """Run the network on the images of `first` with another output of the layer.

        Args:
            images: the same.
            output: of the layer's shape; what follows may write into it.
        """
        self._given = output
        logits = self._run(images)
        # This pass is sound, the next would not be.
        self.shortened = self.shortened and not any(kept.spoilt for kept in self._all_kept())
        return logits

    def _run(self, images: Tensor) -> Tensor:
        self._turn.clear()
        self._n_reached, self._within = 0, False
        return run_network(self._model, images)

    def _all_kept(self) -> Iterator[_Kept]:
        return (kept for calls in self._kept.values() for kept in calls if kept is not None)

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
            if self._given is None:
                return self._keep(module, lambda: compute(*args, **named))
            turn, calls = self._turn[module], self._kept[module]
            self._turn[module] += 1
            kept = calls[turn] if self.shortened and turn < len(calls) else None
            return compute(*args, **named) if kept is None else kept.hand_out()

        return forward

    def _keep(self, module: nn.Module, compute: Callable[[], Any]) -> Any:
        """Compute a module's output and keep a copy, since what follows may write into it."""
        self._within = True
        try:
            output = compute()
        finally:
            self._within = False
        if not self._n_reached:
            try:
                self._kept[module].append(_Kept(output))
            except Exception:  # an output of anyone's own kind, which cannot be copied
                self._kept[module].append(None)
        return output


class _Kept:
    """A module's output in the first pass.

    On trial it is handed out as a copy; a tensor that nothing wrote into is then lent as it is,
    which spares later passes the copying.
    """

    def __init__(self, output: Any) -> None:
        self._value = copy.deepcopy(output)
        self._tried: Tensor | None = None
        self._on_trial, self._lent = True, False
        self._version = 0  # torch counts how often a tensor was written into

    def hand_out(self) -> Any:
        if self._lent:
            return self._value
        made = copy.deepcopy(self._value)
        if self._on_trial and isinstance(made, Tensor):
            self._tried, self._version = made, made._version
        return made

    def end_trial(self) -> None:
        self._lent = self._tried is not None and self._tried._version == self._version
        self._tried, self._on_trial = None, False
        if self._lent:
            self._version = self._value._version

    @property
    def spoilt(self) -> bool:
        """Whether it was written into after all."""
        return self._lent and self._value._version != self._version


@contextmanager
def replaying(model: nn.Module, layer: nn.Module) -> Iterator[Replay]:
    """Make it possible to replay a network from a layer on; put everything back afterwards.

    Args:
        model: gives the same logits for the same images, so in eval mode.
        layer: one of its modules, which gives one tensor.
    """
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
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


# Sum up over images what is lost with things off, by class and by concept.


def members_by_label(concepts: Sequence[Concept], labels: Tensor) -> Tensor:
    """Say which of a channel's concepts, groups of classes, each image belongs to.

    Args:
        concepts: K groups of classes.
        labels: (N,), classes of the images.

    Returns:
        (N,), 0 to K - 1, and K for images of no concept.

    >>> members_by_label([(3,), (0, 1)], torch.tensor([0, 3, 2])).tolist()
    [1, 0, 2]
    """
    concept = torch.full_like(labels, len(concepts))
    for k, classes in enumerate(concepts):
        concept[torch.isin(labels, torch.tensor(classes, dtype=torch.int64))] = k
    return concept


def members_by_place(
    concepts: dict[int, tuple[Concept, ...]], members: Members, n_images: int
) -> dict[int, Tensor]:
    """Say the same of all images of a data set, for concepts of clusters too.

    Args:
        concepts: of each channel, groups of classes or of clusters.
        members: of a scan of the data set.
        n_images: of the data set.

    Returns:
        By channel, (n_images,) as of `members_by_label`, in the order of the data set.
    """
    found = {
        o: torch.full((n_images,), len(groups), dtype=torch.int64) for o, groups in concepts.items()
    }
    for records in members.scan.shards():
        for channel, groups in concepts.items():
            concept = members.concept_of(records, groups)
            found[channel][records.index] = torch.where(concept < 0, len(groups), concept)
    return found


class Tally:
    """Target logits and hits of all images, added up as batches come."""

    def __init__(
        self,
        concepts: dict[int, tuple[Concept, ...]],
        n_classes: int,
        members: dict[int, Tensor] | None,
    ) -> None:
        """Start at zero.

        Args:
            concepts: of the channels that are switched off, in order.
            n_classes: how many there are.
            members: from `members_by_place`; None if labels tell.
        """
        self._concepts, self._members = concepts, members
        n_runs = 1 + sum(1 + len(groups) for groups in concepts.values())
        self._by_class = _Sums(n_runs, n_classes)
        self._by_concept = {o: _Sums(2 + len(k), 1 + len(k)) for o, k in concepts.items()}

    def add(self, index: Tensor, labels: Tensor, logit: Tensor, hit: Tensor) -> None:
        """Add a batch.

        Args:
            index: (N,), places in the data set.
            labels: (N,).
            logit: (R, N), of the labels.
            hit: (R, N), 1 where the label's logit is the largest.
        """
        self._by_class.add(labels, logit, hit)
        whole = 1
        for channel, concepts in self._concepts.items():
            runs = [0, *range(whole, whole + 1 + len(concepts))]
            if self._members is None:
                group = members_by_label(concepts, labels)
            else:
                group = self._members[channel][index]
            self._by_concept[channel].add(group, logit[runs], hit[runs])
            whole += 1 + len(concepts)

    def result(self, layer: str, class_names: Sequence[str]) -> Ablation:
        """Divide the sums by the numbers of images."""
        sums = self._by_class
        seen = sums.n_images.nonzero()[:, 0].tolist()

        def name(label: int) -> str:
            return (label < len(class_names) and class_names[label]) or str(label)

        channels, whole = [], 1
        for channel, concepts in self._concepts.items():
            groups, n_concepts = self._by_concept[channel], len(concepts)
            parts = []
            for k, classes in enumerate(concepts):
                others = [other for other in range(n_concepts) if other != k]
                parts.append(
                    ConceptAblation(
                        classes=classes,
                        name=", ".join(map(name, classes)),
                        own=groups.drop([k], 2 + k),
                        others=groups.drop(others, 2 + k),
                        rest=groups.drop([n_concepts], 2 + k),
                        by_class=sums.class_drops(seen, whole + 1 + k),
                    )
                )
            channels.append(ChannelAblation(channel, sums.class_drops(seen, whole), tuple(parts)))
            whole += 1 + n_concepts
        return Ablation(
            layer=layer,
            classes=tuple(
                ClassOutput(
                    label=label,
                    name=name(label),
                    n_images=int(sums.n_images[label]),
                    logit=sums.mean(sums.logit[0], [label]),
                    accuracy=sums.mean(sums.hits[0], [label]),
                )
                for label in seen
            ),
            channels=tuple(channels),
        )


class _Sums:
    """Sums over the images of each group."""

    def __init__(self, n_runs: int, n_groups: int) -> None:
        self.n_images = torch.zeros(n_groups, dtype=torch.float64)
        self.logit = torch.zeros(n_runs, n_groups, dtype=torch.float64)
        self.hits = torch.zeros_like(self.logit)

    def add(self, group: Tensor, logit: Tensor, hit: Tensor) -> None:
        self.n_images.index_add_(0, group, torch.ones(len(group), dtype=torch.float64))
        self.logit.index_add_(1, group, logit)
        self.hits.index_add_(1, group, hit)

    def mean(self, sums: Tensor, groups: list[int]) -> float:
        """Mean over the images of some groups, NaN if they have none."""
        n_images = float(self.n_images[groups].sum())
        return float(sums[groups].sum()) / n_images if n_images else math.nan

    def drop(self, groups: list[int], off: int) -> Drop:
        """What the images of some groups lose in one run, beside run 1, without the channel."""
        lost_logit, lost_hits = self.logit[0] - self.logit, self.hits[0] - self.hits
        return Drop(
            n_images=int(self.n_images[groups].sum()),
            logit=self.mean(lost_logit[off], groups),
            accuracy=self.mean(lost_hits[off], groups),
            whole_logit=self.mean(lost_logit[1], groups),
            whole_accuracy=self.mean(lost_hits[1], groups),
        )

    def class_drops(self, groups: list[int], off: int) -> ClassDrops:
        """What each group loses in one run; every one has images."""
        n_images = self.n_images[groups]
        return ClassDrops(
            logit=tuple(((self.logit[0] - self.logit[off])[groups] / n_images).tolist()),
            accuracy=tuple(((self.hits[0] - self.hits[off])[groups] / n_images).tolist()),
        )


# Switch concept channels off, one at a time, and measure what the network loses by it.


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
    return members_by_place(chosen, Members(scan, layer.clusters), n_images)


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
    items: Sequence[Loaded],
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


def _images_of(items: Sequence[Loaded]) -> Tensor:
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
