"""Where a concept channel gets its relevance from: the input channels that feed it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from unbraid.arvs import class_sums, concept_mean
from unbraid.errors import UsageError
from unbraid.findings import Concept
from unbraid.records import Scan
from unbraid.relevance import input_relevance, shares
from unbraid.splits import ChannelSplit, Split


@dataclass(frozen=True)
class Source:
    """An input channel of the layer that feeds a concept channel."""

    channel: int  # of the layer's input
    relevance: float  # for the concept channel, mean over the concept's images
    share: float  # of the sum of positive relevances for the concept channel; 0 without any
    kept: float  # part of its relevance for the whole channel that the concept channel keeps


@dataclass(frozen=True)
class Circuit:
    """A concept channel and its strongest sources, strongest first."""

    layer: str
    channel: int
    concept: int
    classes: Concept
    name: str  # of the concept, by its classes
    sources: tuple[Source, ...]

    def __str__(self) -> str:
        """Show the sources as a table."""
        lines = [
            f"{self.layer}, concept {self.concept} of channel {self.channel} ({self.name})",
            "  source    share   kept",
        ]
        lines += [f"  {s.channel:6d}  {s.share:6.1%} {s.kept:6.1%}" for s in self.sources]
        return "\n".join(lines)


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
    part = _find(split, channel, concept)
    if n < 1:
        raise UsageError(f"n is {n}; ask for one source or more.")
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
    share = shares(own[None])[0]
    strongest = own.abs().argsort(descending=True, stable=True)[:n].tolist()
    first = group * spec.n_in_per_group
    sources = tuple(
        Source(first + i, float(own[i]), float(share[i]), float(own[i] / whole[i]))
        for i in strongest
        if own[i] != 0
    )
    return Circuit(spec.name, channel, concept, classes, name, sources)


def _find(split: Split, channel: int, concept: int) -> ChannelSplit:
    parts = {part.channel: part for part in split.channels}
    if channel not in parts or concept not in range(len(parts[channel].concepts)):
        known = [f"{part.channel} (0 to {len(part.concepts) - 1})" for part in split.channels]
        raise UsageError(
            f"The split has no concept {concept} of channel {channel}; its channels and their "
            f"concepts are {', '.join(known[:20])}{' ...' if len(known) > 20 else ''}."
        )
    return parts[channel]
