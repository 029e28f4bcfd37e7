"""Where a concept channel gets its relevance from among the channels of an earlier split layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.arguments import as_kind, loading, whole_number
from unbraid.base.errors import LayerError, ModelError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.progress import image_progress
from unbraid.base.tables import Shown, align, html_table
from unbraid.finding.arv import class_sums, concept_mean
from unbraid.finding.findings import Concept
from unbraid.images.batches import load
from unbraid.images.broken import sort_out
from unbraid.images.dataset import labels_of
from unbraid.images.identity import fingerprint
from unbraid.networks.copying import device_of, unwrap
from unbraid.networks.layers import resolve_layer
from unbraid.networks.outputs import run_network, stack_images
from unbraid.networks.relevance import cut_at, gradients_at, input_relevance, shares, undisturbed
from unbraid.networks.spec import LayerSpec, channels_first, respond
from unbraid.networks.weights import hash_weights
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import ChannelSplit, Split

# Where a concept channel gets its relevance from: the input channels that feed it.


Part = int | Literal["residual"]  # of a split channel: a concept, or what is subtracted


@dataclass(frozen=True)
class Source:
    """A channel that feeds a concept channel."""

    channel: int  # of the layer's input, or of an earlier layer
    relevance: float  # for the concept channel, mean over the concept's images
    share: float  # of the sum of positive relevances for the concept channel; 0 without any
    kept: float  # part of its relevance for the whole channel that the concept channel keeps
    part: Part | None = None  # of the source, if it was split itself

    @property
    def name(self) -> str:
        """The channel, or "7.0" for concept 0 of channel 7, "7.residual" for its residual."""
        return str(self.channel) if self.part is None else f"{self.channel}.{self.part}"


@dataclass(frozen=True)
class Circuit(Shown):
    """A concept channel and its strongest sources, strongest first."""

    layer: str
    channel: int
    concept: int
    classes: Concept
    name: str  # of the concept, by its classes
    sources: tuple[Source, ...]
    before: str = ""  # the layer that the sources belong to; empty for the layer's own input

    def __str__(self) -> str:
        """Show the sources as a table."""
        return f"{self._title}\n{align(self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), title=self._title)

    @property
    def _title(self) -> str:
        return f"{self.layer}, concept {self.concept} of channel {self.channel} ({self.name})"

    def _rows(self) -> list[tuple[str, ...]]:
        head = f"source in {self.before}" if self.before else "source"
        rows: list[tuple[str, ...]] = [(head, "share", "kept")]
        rows += [(s.name, f"{s.share:.1%}", f"{s.kept:.1%}") for s in self.sources]
        return rows


@in_plain_modes
def circuit(split: Split, scan: Scan, channel: int, concept: int, n: int = 10) -> Circuit:
    """Say which input channels feed a concept channel most, on images of its concept.

    Relevance of an input channel for the concept channel is input x gradient of the concept
    channel's summed pre-activation, averaged over the images of the concept: what METHOD.md calls
    the ARV, with the concept channel's row in place of the channel's.

    Args:
        split: from `unbraid.split`.
        scan: of images that hold the concept, such as the training images.
        channel: a split channel.
        concept: 0 to K - 1.
        n: how many sources to give; those without any relevance are left out.

    Raises:
        UsageError: there is no such concept channel, n is not positive, or the scan is of another
            network or layer or has no image of the concept.

    Source:
        METHOD.md section 2.
    """
    as_kind("split", split, Split)
    as_kind("scan", scan, Scan)
    channel, concept = whole_number("channel", channel), whole_number("concept", concept)
    n = whole_number("n", n, 1)
    part = find_concept(split, channel, concept)
    if scan.manifest.weights != split.weights or scan.layer != split.layer:
        raise UsageError(
            "The scan is of another network or layer than the split; pass one of the network and "
            "layer that were split."
        )
    classes, name = part.concepts[concept], split.name(part.concepts[concept])
    sums = class_sums(scan, (), split.clusters)
    there = [number for number in classes if number < len(sums.n_images)]
    if not there or not sums.n_images[there].sum():
        raise UsageError(
            f"The scan has no image of {name}, concept {concept} of channel {channel}; pass a scan "
            "of images that hold it."
        )
    spec = split.layer
    group = spec.group_of(channel)
    pooled = concept_mean(sums, tuple(there))[group]  # (J,)
    rows = torch.stack([part.rows[concept], part.weight]).double()
    own, whole = input_relevance(rows, pooled, spec.taps_per_input)  # (C_in / G,) each
    first = group * spec.n_in_per_group
    names: list[tuple[int, Part | None]] = [(first + i, None) for i in range(len(own))]
    return Circuit(spec.name, channel, concept, classes, name, strongest(names, own, whole, n))


def strongest(
    names: Sequence[tuple[int, Part | None]], own: Tensor, whole: Tensor, n: int
) -> tuple[Source, ...]:
    """Choose the strongest sources, those without relevance left out.

    Args:
        names: channel and part of S sources.
        own: (S,), relevance for the concept channel.
        whole: (S,), relevance for the whole channel.
        n: how many to give.
    """
    share = shares(own[None])[0]
    order = own.abs().argsort(descending=True, stable=True)[:n].tolist()
    return tuple(
        Source(names[i][0], float(own[i]), float(share[i]), float(own[i] / whole[i]), names[i][1])
        for i in order
        if own[i] != 0
    )


def find_concept(split: Split, channel: int, concept: int) -> ChannelSplit:
    """Find the division that a concept channel belongs to.

    Raises:
        UsageError: there is no such concept channel.
    """
    parts = {part.channel: part for part in split.channels}
    if channel not in parts or concept not in range(len(parts[channel].concepts)):
        known = [f"{part.channel} (0 to {len(part.concepts) - 1})" for part in split.channels]
        raise UsageError(
            f"The split has no concept {concept} of channel {channel}; its channels and their "
            f"concepts are {', '.join(known[:20])}{' ...' if len(known) > 20 else ''}."
        )
    return parts[channel]


# Where a concept channel gets its relevance from among the channels of an earlier split layer.


@in_plain_modes
def circuit_from(
    before: Split,
    split: Split,
    scan: Scan,
    model: nn.Module,
    dataset: Dataset[Any],
    channel: int,
    concept: int,
    n: int = 10,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> Circuit:
    """Say which channels of an earlier layer feed a concept channel, concept by concept.

    As `unbraid.circuit`, but sources are the channels of a layer before, and of those that were
    split the concept channels, and the residual channels with a minus. Relevance is gradient x
    activation there, of the concept channel's summed pre-activation; that of a split channel's
    parts adds up to the whole's. It runs the network on the concept's images once.

    Args:
        before: the split of the earlier layer.
        split: the split that the concept channel belongs to.
        scan: of images that hold the concept, of the layer that `split` divides.
        model: the network that both were made for, before they are applied.
        dataset: that was scanned.
        channel: a channel that `split` divides.
        concept: 0 to K - 1.
        n: how many sources to give; those without any relevance are left out.
        batch_size: images per forward pass.
        workers: processes that load images.
        progress: show a progress bar on standard error.

    Raises:
        UsageError: there is no such concept channel, n is not positive, or the scan is of another
            network, layer or data set or has no image of the concept.
        ModelError: the splits were made for another network.
        LayerError: the earlier layer does not feed the later one.
        DataError: an image cannot be read.

    Source:
        METHOD.md section 2.
    """
    channel, concept = whole_number("channel", channel), whole_number("concept", concept)
    n = whole_number("n", n, 1)
    part = find_concept(split, channel, concept)
    batch_size, workers = loading(batch_size, workers)
    model = unwrap(model)
    if {before.weights, split.weights} != {hash_weights(model)}:
        raise ModelError(
            "The splits were made for a network with other weights; pass the one they were made "
            "for, before they are applied."
        )
    if scan.manifest.weights != split.weights or scan.layer != split.layer:
        raise UsageError(
            "The scan is of another network or layer than the split; pass one of the network and "
            "layer that were split."
        )
    told = scan.manifest
    needed = told.labels == "given" or told.classes is not None
    if told.data != fingerprint(dataset, labels_of(dataset, needed)):
        raise UsageError("The data set is not the one that was scanned; pass that one.")
    classes = part.concepts[concept]
    name = split.name(classes)
    places = split.members_in(scan).indices(classes)
    if not places:
        raise UsageError(
            f"The scan has no image of {name}, concept {concept} of channel {channel}; pass a scan "
            "of images that hold it."
        )
    batches = [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
    rows = torch.stack([part.rows[concept], part.weight])
    found = torch.zeros(2, len(_names(before)), dtype=torch.float64)
    with (
        undisturbed(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        image_progress("Following the circuit", len(places), show=progress) as advance,
    ):
        for items in load(dataset, batches, workers=workers):
            good, _ = sort_out(items, skip_broken=False)
            index = torch.tensor([item[0] for item in good], dtype=torch.int64)
            images = stack_images([item[1] for item in good], index)
            found += _relevance(model, before, split.layer, channel, rows, images)
            advance(len(items))
    own, whole = found / len(places)
    sources = strongest(_names(before), own, whole, n)
    return Circuit(split.layer.name, channel, concept, classes, name, sources, before.layer.name)


def _names(before: Split) -> list[tuple[int, Part | None]]:
    """Sources by channel and part: every channel whole, then the parts of those split.

    The whole of a split channel is nothing beside its parts, so its place stays empty.
    """
    names: list[tuple[int, Part | None]] = [(o, None) for o in range(before.layer.n_out)]
    for part in before.channels:
        names += [(part.channel, k) for k in range(len(part.concepts))]
        names.append((part.channel, "residual"))
    return names


def _relevance(
    model: nn.Module, before: Split, spec: LayerSpec, channel: int, rows: Tensor, images: Tensor
) -> Tensor:
    """Relevance of the sources for two rows of the later layer, summed over images, (2, S)."""
    _, source = resolve_layer(model, before.layer.name)
    _, target = resolve_layer(model, spec.name)
    device = device_of(source)
    with (
        cut_at(source, torch.Tensor.clone) as cut,
        _summed_responses(target, spec, channel, rows) as sums,
    ):
        run_network(model, images.to(device))
        cut.recording = False
        if not sums or not any(one.requires_grad for one in sums):
            raise LayerError(
                f"Layer {before.layer.name!r} does not feed layer {spec.name!r}; pass the split of "
                "a layer before it."
            )
        summed = torch.stack(sums).sum(0)  # (2,)
        by_row = [gradients_at(cut.outputs, value) for value in summed]
    return torch.stack([_of_sources(before, cut.inputs, cut.outputs, g) for g in by_row])


@contextmanager
def _summed_responses(
    layer: nn.Module, spec: LayerSpec, channel: int, rows: Tensor
) -> Iterator[list[Tensor]]:
    """Collect, call by call, what rows in a channel's place respond, summed over everything."""
    sums: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = channels_first(spec, args[0] if args else next(iter(named.values())))
        z = respond(spec, x, rows.to(x), rows.new_zeros(2).to(x), [channel] * 2)
        wide = torch.promote_types(z.dtype, torch.float32)
        sums.append(z.transpose(0, 1).flatten(1).sum(1, dtype=wide))

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield sums
    finally:
        handle.remove()


def _of_sources(
    before: Split,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> Tensor:
    """Gradient x activation of every source, summed over calls, images and positions, (S,)."""
    spec = before.layer
    total = torch.zeros(len(_names(before)), dtype=torch.float64)
    for x, output, gradient in zip(inputs, outputs, gradients, strict=True):
        if gradient is None:
            continue
        slope = channels_first(spec, gradient).double().cpu()
        z = channels_first(spec, output.detach()).double().cpu()
        whole = (slope * z).transpose(0, 1).flatten(1).sum(1)  # (C_out,)
        parts = []
        for part in before.channels:
            maps = part.response_maps(spec, channels_first(spec, x).cpu())[:, 1:]
            own = (slope[:, part.channel, None] * maps).transpose(0, 1).flatten(1).sum(1)  # (K,)
            parts += [own, (whole[part.channel] - own.sum())[None]]
        whole[[part.channel for part in before.channels]] = 0
        total += torch.cat([whole, *parts])
    return total
