"""Where a concept channel gets its relevance from: its layer's input, or an earlier split layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.arguments import as_kind, loading, whole_number
from unbraid.base.errors import LayerError, ModelError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.tables import Table, Tabular, percent
from unbraid.finding.arv import ClassSums, class_sums, concept_mean
from unbraid.finding.findings import Concept
from unbraid.images.batches import image_progress, in_batches, read_images
from unbraid.images.dataset import labels_of
from unbraid.images.identity import fingerprint
from unbraid.networks.copying import device_of, unwrap
from unbraid.networks.layers import resolve_layer
from unbraid.networks.outputs import run_network
from unbraid.networks.relevance import (
    Cut,
    cut_at,
    gradients_at,
    input_relevance,
    shares,
    undisturbed,
)
from unbraid.networks.spec import LayerSpec, channels_first, respond
from unbraid.networks.weights import hash_weights
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import ChannelSplit, Split

Part = int | Literal["residual"]  # of a split channel: a concept, or what is subtracted


@dataclass(frozen=True)
class Source:
    """A channel that feeds a concept channel."""

    channel: int  # of the layer's input, or of an earlier layer
    relevance: float  # for the concept channel, mean over the concept's images
    share: float  # of the sum of positive relevances for the concept channel; 0 without any
    kept: float  # part of its relevance for the whole channel that the concept channel keeps
    part: Part | None = None  # of the source, if it was split itself
    # Of an input channel, its pooled input, mean over the concept's images and over the taps.
    mean: float = 0.0

    @property
    def name(self) -> str:
        """The channel, or "7.0" for concept 0 of channel 7, "7.residual" for its residual."""
        return str(self.channel) if self.part is None else f"{self.channel}.{self.part}"


@dataclass(frozen=True)
class Circuit(Tabular):
    """A concept channel and its strongest sources, strongest first.

    Attributes:
        layer: name of the split layer.
        channel: the split channel.
        concept: number of its concept, 0 to K - 1.
        classes: of the concept, by number.
        name: of the concept, by its classes.
        sources: input channels, or concept channels of the layer before, each with its relevance
            (in units of the pre-activation summed over positions) and its share of the positive
            one.
        before: name of the layer that the sources belong to; empty for the layer's own input.
    """

    layer: str
    channel: int
    concept: int
    classes: Concept
    name: str  # of the concept, by its classes
    sources: tuple[Source, ...]
    before: str = ""  # the layer that the sources belong to; empty for the layer's own input

    def table(self) -> Table:
        """Show the sources."""
        head = f"source in {self.before}" if self.before else "source"
        rows = [(s.name, percent(s.share, 1), percent(s.kept, 1)) for s in self.sources]
        title = f"{self.layer}, concept {self.concept} of channel {self.channel} ({self.name})"
        return Table([(head, "share", "kept"), *rows], title)


@in_plain_modes
def circuit(split: Split, scan: Scan, channel: int, concept: int, n: int = 10) -> Circuit:
    """Say which input channels feed a concept channel most, on images of its concept.

    Relevance of an input channel is input x gradient of the concept channel's summed
    pre-activation, mean over the images of the concept: the ARV, by the concept channel's row.

    Args:
        split: from `unbraid.split`.
        scan: of images that hold the concept, such as the training images.
        channel: a split channel.
        concept: 0 to K - 1.
        n: how many sources to give; those without any relevance are left out.

    Returns:
        A Circuit: sources with their relevance, in units of the summed pre-activation, and share.

    Raises:
        UsageError: there is no such concept channel, n is not positive, or the scan is of another
            network or layer or has no image of the concept.

    Source:
        "One layer" in docs/method.md.
    """
    as_kind("split", split, Split)
    as_kind("scan", scan, Scan)
    part, concept, n = _check(split, channel, concept, n)
    split.require(scan)
    return circuit_of(split, class_sums(scan, (), split.clusters), part, concept, n)


def circuit_of(split: Split, sums: ClassSums, part: ChannelSplit, concept: int, n: int) -> Circuit:
    """Say the same as `unbraid.circuit`, of the sums of a scan."""
    seen = tuple(number for number in part.concepts[concept] if number < len(sums.n_images))
    if not sums.n_images[list(seen)].sum():
        raise _no_image(split, part.channel, concept)
    spec = split.layer
    group = spec.group_of(part.channel)
    pooled = concept_mean(sums, seen)[group]  # (J,)
    rows = torch.stack([part.rows[concept], part.weight]).double()
    own, whole = input_relevance(rows, pooled, spec.taps_per_input)  # (C_in / G,) each
    means = pooled.unflatten(0, (-1, spec.taps_per_input)).mean(1)
    first = group * spec.n_in_per_group
    names: list[tuple[int, Part | None]] = [(first + i, None) for i in range(len(own))]
    return _circuit(split, part, concept, names, own, whole, n, means=means)


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
    n_images: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> Circuit:
    """Say which channels of an earlier layer feed a concept channel, concept by concept.

    As `unbraid.circuit`, but sources are the channels of a layer before, and of those that were
    split the concept channels, and the residual channels with a minus. Relevance is gradient x
    activation there. It runs the network on the concept's images once.

    Args:
        before: the split of the earlier layer.
        split: the split that the concept channel belongs to.
        scan: of images that hold the concept, of the layer that `split` divides.
        model: the network that both were made for, before they are applied.
        dataset: that was scanned.
        channel: a channel that `split` divides.
        concept: 0 to K - 1.
        n: how many sources to give; those without any relevance are left out.
        n_images: of the concept's images at most so many, spread evenly; by default all.
        batch_size: images per forward pass.
        workers: processes that load images.
        progress: show a progress bar on standard error.

    Returns:
        A Circuit, whose sources are channels and concept channels of the earlier layer.

    Raises:
        UsageError: as `unbraid.circuit`, or the data set is another one.
        ModelError: the splits were made for another network.
        LayerError: the earlier layer does not feed the later one.
        DataError: an image cannot be read.

    Source:
        "One layer" in docs/method.md.
    """
    part, concept, n = _check(split, channel, concept, n)
    batch_size, workers = loading(batch_size, workers)
    most = None if n_images is None else whole_number("n_images", n_images, 1)
    split.require(scan)
    made = scan.manifest
    needed = made.labels == "given" or made.classes is not None
    if made.data != fingerprint(dataset, labels_of(dataset, needed)):
        raise UsageError("The data set is not the one that was scanned; pass that one.")
    through = Through(before, split, scan, unwrap(model), dataset, most, batch_size, workers)
    (found,) = through.follow([(part, concept)], n, progress=progress)
    return found


@dataclass(frozen=True, eq=False)
class Through:
    """A way through a network, from an earlier split layer to a later one."""

    before: Split
    split: Split
    scan: Scan  # of the later layer
    model: nn.Module
    dataset: Dataset[Any]  # that was scanned
    n_images: int | None  # of a concept, at most
    batch_size: int
    workers: int = 0

    def follow(
        self, wanted: Sequence[tuple[ChannelSplit, int]], n: int, *, progress: bool = False
    ) -> list[Circuit]:
        """Find the n strongest sources of each concept channel; errors as of `circuit_from`."""
        if {self.before.weights, self.split.weights} != {hash_weights(self.model)}:
            raise ModelError(
                "The splits were made for a network with other weights; pass the one they were "
                "made for, before they are applied."
            )
        members, layer = self.split.members_in(self.scan), self.before.layer
        chosen = []
        for part, concept in wanted:
            indices = members.indices(part.concepts[concept])
            if not indices:
                raise _no_image(self.split, part.channel, concept)
            chosen.append(indices[:: -(-len(indices) // (self.n_images or len(indices)))])
        names: list[tuple[int, Part | None]] = [(o, None) for o in range(layer.n_out)]
        for one in self.before.channels:
            names += [(one.channel, k) for k in (*range(len(one.concepts)), "residual")]
        circuits, total = [], sum(map(len, chosen))
        with (
            undisturbed(self.model),
            torch.inference_mode(False),
            torch.enable_grad(),
            image_progress("Following the circuit", total, show=progress) as advance,
        ):
            for (part, concept), indices in zip(wanted, chosen, strict=True):
                rows = torch.stack([part.rows[concept], part.weight])
                own, whole = self._sources(part.channel, rows, indices, advance) / len(indices)
                about = (self.split, part, concept, names, own, whole, n, layer.name)
                circuits.append(_circuit(*about))
        return circuits

    def _sources(
        self, channel: int, rows: Tensor, indices: Sequence[int], advance: Callable[[int], None]
    ) -> Tensor:
        """Relevance of all S sources for two rows, summed over images, (2, S)."""
        found, batches = torch.zeros((), dtype=torch.float64), in_batches(indices, self.batch_size)
        read = read_images(self.dataset, batches, workers=self.workers, advance=advance)
        for _, images, _ in read:
            spec = self.split.layer
            found = found + _relevance(self.model, self.before, spec, channel, rows, images)
        return found


def _check(split: Split, channel: int, concept: int, n: int) -> tuple[ChannelSplit, int, int]:
    """Find the division that a concept channel belongs to; return it and plain numbers."""
    channel, concept = whole_number("channel", channel), whole_number("concept", concept)
    n = whole_number("n", n, 1)
    parts = {part.channel: part for part in split.channels}
    if channel not in parts or concept not in range(len(parts[channel].concepts)):
        known = ", ".join(f"{o} (0 to {len(part.concepts) - 1})" for o, part in parts.items())
        raise UsageError(
            f"The split has no concept {concept} of channel {channel}; its channels and their "
            f"concepts are {shorten(known, 200, placeholder=' ...')}."
        )
    return parts[channel], concept, n


def _no_image(split: Split, channel: int, concept: int) -> UsageError:
    return UsageError(
        f"The scan has no image of {split.name(split[channel].concepts[concept])}, concept "
        f"{concept} of channel {channel}; pass a scan of images that hold it."
    )


def _circuit(
    split: Split,
    part: ChannelSplit,
    concept: int,
    names: Sequence[tuple[int, Part | None]],
    own: Tensor,
    whole: Tensor,
    n: int,
    before: str = "",
    means: Tensor | None = None,
) -> Circuit:
    """Choose the n strongest of S sources by their relevance for the concept channel, own (S,)."""
    share = shares(own[None])[0]
    means = torch.zeros_like(own) if means is None else means
    order = own.abs().argsort(descending=True, stable=True)[:n].tolist()
    sources = tuple(
        Source(
            channel=names[i][0],
            relevance=float(own[i]),
            share=float(share[i]),
            kept=float(own[i] / whole[i]),
            part=names[i][1],
            mean=float(means[i]),
        )
        for i in order
        if own[i] != 0
    )
    classes = part.concepts[concept]
    name, layer = split.name(classes), split.layer.name
    return Circuit(layer, part.channel, concept, classes, name, sources, before)


def _relevance(
    model: nn.Module, before: Split, spec: LayerSpec, channel: int, rows: Tensor, images: Tensor
) -> Tensor:
    """Relevance of the sources for two rows of the later layer, summed over images, (2, S)."""
    _, source = resolve_layer(model, before.layer.name)
    _, target = resolve_layer(model, spec.name)
    sums: list[Tensor] = []  # of what the rows respond in the channel's place, call by call

    def respond_too(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = channels_first(spec, args[0] if args else next(iter(named.values())))
        z = respond(spec, x, rows.to(x), rows.new_zeros(2).to(x), [channel] * 2)
        wide = torch.promote_types(z.dtype, torch.float32)
        sums.append(z.transpose(0, 1).flatten(1).sum(1, dtype=wide))

    with (
        cut_at(source, torch.Tensor.clone) as cut,
        target.register_forward_pre_hook(respond_too, with_kwargs=True),
    ):
        run_network(model, images.to(device_of(source)))
        cut.recording = False
        if not any(one.requires_grad for one in sums):
            raise LayerError(
                f"Layer {before.layer.name!r} does not feed layer {spec.name!r}; pass the split of "
                "a layer before it."
            )
        by_row = [gradients_at(cut.outputs, value) for value in torch.stack(sums).sum(0)]
    return torch.stack([_of_sources(before, cut, gradients) for gradients in by_row])


def _of_sources(before: Split, cut: Cut[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Gradient x activation of every source, summed over calls, images and positions, (S,)."""
    spec = before.layer
    n_parts = sum(len(part.concepts) + 1 for part in before.channels)
    total = torch.zeros(spec.n_out + n_parts, dtype=torch.float64)
    for x, output, gradient in zip(cut.inputs, cut.outputs, gradients, strict=True):
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
        whole[[part.channel for part in before.channels]] = 0  # its parts stand for it
        total += torch.cat([whole, *parts])
    return total
