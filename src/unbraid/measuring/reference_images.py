"""Reference images: those that excite a channel, and each of its concept channels, most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unbraid.base.arguments import whole_number
from unbraid.base.errors import UsageError
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import Split

# Cosines of two images' pooled inputs, less their mean over the scan; docs/report.md tells why.
ALIKE, COPY = 0.95, 0.99
_STEPS = 5  # from the one to the other
_POOL = 4  # images among which to look for those that differ, for each that is shown


@dataclass(frozen=True, eq=False)
class TopImages:
    """The images that excite one channel most, strongest first."""

    index: Tensor  # (n,), place in the data set
    label: Tensor  # (n,)
    concept: Tensor  # (n,), of the split channel that it belongs to, -1 for none
    activation: Tensor  # (n,), pooled pre-activation, float64
    group: Tensor | None = None  # (n,), of images of which only the strongest was to be kept


@dataclass(frozen=True, eq=False)
class ReferenceImages:
    """Top images of a split channel and of each of its concept channels."""

    original: TopImages
    concepts: tuple[TopImages, ...]


def reference_images(
    scan: Scan, split: Split, *, n: int = 8, alike: float | None = None
) -> dict[int, ReferenceImages]:
    """Find the images that excite every split channel and its concept channels most.

    Reads the records shard by shard and keeps the best n of each channel.

    Args:
        scan: of the images to choose from, from the network that was split.
        split: whose channels to look at.
        n: images per channel; fewer are given where the scan holds fewer.
        alike: leave out what a stronger one shows already: all images of its group but the
            strongest, where the data set groups them, and those among the 4 n strongest whose
            pooled inputs, less their mean over the scan, have a cosine above this with its own.
            Where fewer than n are left, the cosine may be higher, as little as gives n, up to
            0.99; if that is not enough, fewer are given. None leaves out nothing.

    Returns:
        By channel. Of equally exciting images the earlier one comes first.

    Raises:
        UsageError: n is below 1, or the scan is of another network or layer.
    """
    n = whole_number("n", n, 1)
    if scan.manifest.weights != split.weights or scan.layer != split.layer:
        raise UsageError(
            "The scan is of another network or layer than the split; scan the images with the "
            "network and layer that were split."
        )
    if alike is None:
        return _rank(scan, split, n, by_group=False)
    ranked = _rank(scan, split, _POOL * n, by_group=True)
    looks = _looks(scan, ranked)
    return {
        channel: ReferenceImages(
            _different(images.original, looks, n, alike),
            tuple(_different(concept, looks, n, alike) for concept in images.concepts),
        )
        for channel, images in ranked.items()
    }


def _rank(scan: Scan, split: Split, n: int, by_group: bool) -> dict[int, ReferenceImages]:
    best: dict[int, list[TopImages]] = {}
    members = split.members_in(scan)
    for records in scan.shards():
        group = records.group if by_group else None
        for part in split.channels:
            pooled = records.pooled[:, scan.layer.group_of(part.channel)]
            original_and_concepts = part.pooled_responses(pooled, records.n_positions)[:, :-1].T
            concept = members.concept_of(records, part.concepts)
            fresh = [
                TopImages(records.index, records.label, concept, z, group)
                for z in original_and_concepts
            ]
            known = best.get(part.channel)
            joined = fresh if known is None else list(map(_join, known, fresh))
            best[part.channel] = [_strongest(images, n) for images in joined]
    return {
        channel: ReferenceImages(original, tuple(concepts))
        for channel, (original, *concepts) in best.items()
    }


@dataclass(frozen=True, eq=False)
class _Looks:
    """How the layer sees some images."""

    place: dict[int, int]  # rows by place in the data set
    direction: Tensor  # (M, G J), pooled inputs less those of a mean image, of length 1


def _looks(scan: Scan, ranked: dict[int, ReferenceImages]) -> _Looks:
    """Look up how the layer sees the images that were ranked; each is kept once."""
    wanted = torch.cat(
        [top.index for images in ranked.values() for top in (images.original, *images.concepts)]
    ).unique()
    indices, pooled = [], []
    total, n_images = torch.zeros((), dtype=torch.float64), 0
    for records in scan.shards():
        inputs, here = records.pooled.flatten(1), torch.isin(records.index, wanted)
        indices.append(records.index[here])
        pooled.append(inputs[here].float())
        total = total + inputs.sum(0, dtype=torch.float64)
        n_images += len(records)
    centred = torch.cat(pooled) - (total / n_images).float()
    return _Looks(
        {index: n for n, index in enumerate(torch.cat(indices).tolist())},
        torch.nn.functional.normalize(centred, dim=1),
    )


def _different(images: TopImages, looks: _Looks, n: int, alike: float) -> TopImages:
    """Choose the n strongest images none of which repeats a stronger one."""
    rows = torch.tensor([looks.place[index] for index in images.index.tolist()], dtype=torch.int64)
    cosine = looks.direction[rows] @ looks.direction[rows].T
    chosen: list[int] = []
    for limit in np.linspace(alike, max(alike, COPY), _STEPS):
        chosen = _apart(cosine, n, float(limit))
        if len(chosen) == n:
            break
    return _take(images, torch.tensor(chosen, dtype=torch.int64))


def _apart(cosine: Tensor, n: int, limit: float) -> list[int]:
    """Choose the first n, no two of which have a cosine above a limit."""
    repeats = cosine > limit
    chosen: list[int] = []
    for place in range(len(cosine)):
        if len(chosen) < n and not repeats[place, chosen].any():
            chosen.append(place)
    return chosen


def _join(known: TopImages, fresh: TopImages) -> TopImages:
    groups = [images.group for images in (known, fresh) if images.group is not None]
    return TopImages(
        torch.cat([known.index, fresh.index]),
        torch.cat([known.label, fresh.label]),
        torch.cat([known.concept, fresh.concept]),
        torch.cat([known.activation, fresh.activation]),
        torch.cat(groups) if groups else None,
    )


def _strongest(images: TopImages, n: int) -> TopImages:
    """Take the n strongest images, of each group only one."""
    # A stable sort, not topk: which of two equal images is shown must not depend on the shards.
    order = images.activation.sort(descending=True, stable=True).indices
    if images.group is not None:
        first = np.unique(images.group[order].numpy(), return_index=True)[1]
        order = order[torch.from_numpy(np.sort(first))]
    return _take(images, order[:n])


def _take(images: TopImages, order: Tensor) -> TopImages:
    return TopImages(
        images.index[order],
        images.label[order],
        images.concept[order],
        images.activation[order],
        None if images.group is None else images.group[order],
    )
