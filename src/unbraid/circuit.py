"""Where a concept channel gets its relevance from: the input channels that feed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unbraid.arvs import class_sums, concept_mean
from unbraid.doors import in_plain_modes
from unbraid.errors import UsageError
from unbraid.findings import Concept
from unbraid.given import as_kind, whole_number
from unbraid.notebook import Shown, html_table
from unbraid.records import Scan
from unbraid.relevance import input_relevance, shares
from unbraid.splits import ChannelSplit, Split
from unbraid.tables import align

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
    sums = class_sums(replace(scan, clusters=split.clusters), ())
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
