"""Reference images: those that excite a channel, and each of its concept channels, most."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbraid.clusters import concept_of
from unbraid.errors import UsageError
from unbraid.records import Scan
from unbraid.splits import Split


@dataclass(frozen=True, eq=False)
class TopImages:
    """The images that excite one channel most, strongest first."""

    index: Tensor  # (n,), place in the data set
    label: Tensor  # (n,)
    concept: Tensor  # (n,), of the split channel that it belongs to, -1 for none
    activation: Tensor  # (n,), pooled pre-activation, float64


@dataclass(frozen=True, eq=False)
class ReferenceImages:
    """Top images of a split channel and of each of its concept channels."""

    original: TopImages
    concepts: tuple[TopImages, ...]


def reference_images(scan: Scan, split: Split, *, n: int = 8) -> dict[int, ReferenceImages]:
    """Find the images that excite every split channel and its concept channels most.

    Reads the records once, shard by shard, and keeps the best n of each channel.

    Args:
        scan: of the images to choose from, from the network that was split.
        split: whose channels to look at.
        n: images per channel; fewer are given where the scan holds fewer.

    Returns:
        By channel. Of equally exciting images the earlier one comes first.

    Raises:
        UsageError: n is below 1, or the scan is of another network or layer.
    """
    if n < 1:
        raise UsageError(f"n is {n}; ask for 1 reference image or more.")
    if scan.manifest.weights != split.weights or scan.layer != split.layer:
        raise UsageError(
            "The scan is of another network or layer than the split; scan the images with the "
            "network and layer that were split."
        )
    scan = replace(scan, clusters=split.clusters)
    best: dict[int, list[TopImages]] = {}
    for records in scan.shards():
        for part in split.channels:
            pooled = records.pooled[:, scan.layer.group_of(part.channel)]
            original_and_concepts = part.pooled_responses(pooled, records.n_positions)[:, :-1].T
            concept = concept_of(scan, records, part.concepts)
            fresh = [
                TopImages(records.index, records.label, concept, z) for z in original_and_concepts
            ]
            known = best.get(part.channel)
            joined = fresh if known is None else list(map(_join, known, fresh))
            best[part.channel] = [_strongest(images, n) for images in joined]
    return {
        channel: ReferenceImages(original, tuple(concepts))
        for channel, (original, *concepts) in best.items()
    }


def _join(known: TopImages, fresh: TopImages) -> TopImages:
    return TopImages(
        torch.cat([known.index, fresh.index]),
        torch.cat([known.label, fresh.label]),
        torch.cat([known.concept, fresh.concept]),
        torch.cat([known.activation, fresh.activation]),
    )


def _strongest(images: TopImages, n: int) -> TopImages:
    # A stable sort, not topk: which of two equal images is shown must not depend on the shards.
    order = images.activation.sort(descending=True, stable=True).indices[:n]
    columns = (images.index, images.label, images.concept, images.activation)
    return TopImages(*(column[order] for column in columns))
