"""Which image of a concept excites the original channel most, and how many stand before it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import torch

from unbraid.clusters import concept_of
from unbraid.records import Scan
from unbraid.splits import Split
from unbraid.visualize.reference import ReferenceImages

N_FIRSTS = 4  # images in a row that are not there for their strength


@dataclass(frozen=True)
class First:
    """The image of a concept that excites the original channel most."""

    index: int  # place in the data set
    label: int
    activation: float  # summed pre-activation of the original channel
    rank: int  # among all images, from 1; equally exciting ones share it


def first_images(
    scan: Scan, split: Split, wanted: Mapping[int, Set[int]]
) -> dict[tuple[int, int], First]:
    """Find the first image of some concepts among all images that excite a channel.

    Args:
        scan: of the images.
        split: whose channels to look at.
        wanted: concepts by channel.

    Returns:
        By channel and concept; nothing of a concept without images.
    """
    scan = replace(scan, clusters=split.clusters)
    first: dict[tuple[int, int], First] = {}
    everything: dict[int, list[torch.Tensor]] = {channel: [] for channel in wanted}
    for records in scan.shards() if wanted else ():
        for part in split.channels:
            if part.channel not in wanted:
                continue
            pooled = records.pooled[:, scan.layer.group_of(part.channel)]
            # As reference images have it, to the last bit: ranks must agree with them.
            z = part.pooled_responses(pooled, records.n_positions)[:, 0]
            everything[part.channel].append(z)
            concept = concept_of(scan, records, part.concepts)
            for k in wanted[part.channel]:
                own = (concept == k).nonzero()[:, 0]
                if len(own) == 0:
                    continue
                best = int(own[z[own].argmax()])
                known = first.get((part.channel, k))
                if known is None or float(z[best]) > known.activation:
                    first[part.channel, k] = First(
                        int(records.index[best]), int(records.label[best]), float(z[best]), 0
                    )
    before = {channel: torch.cat(z) for channel, z in everything.items() if z}
    return {
        (channel, k): replace(one, rank=1 + int((before[channel] > one.activation).sum()))
        for (channel, k), one in first.items()
    }


def missing(top: ReferenceImages, n_concepts: int) -> frozenset[int]:
    """Say which concepts have no image in the original's row once room is made for their own."""
    n = len(top.original.concept)
    gone: frozenset[int] = frozenset()
    while True:
        kept = top.original.concept[: max(1, n - min(len(gone), N_FIRSTS))].tolist()
        now = frozenset(range(n_concepts)) - frozenset(kept)
        if now == gone:
            return gone
        gone = now
