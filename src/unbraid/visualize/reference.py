"""Reference images: those that excite a channel, and each of its concept channels, most."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbraid.clusters import concept_of
from unbraid.errors import UsageError
from unbraid.records import Scan
from unbraid.splits import Split

ALIKE = 0.998  # cosine of two images' pooled inputs; docs/report.md tells why
_POOL = 4  # images among which to look for those that differ, for each that is shown


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


def reference_images(
    scan: Scan, split: Split, *, n: int = 8, alike: float | None = None
) -> dict[int, ReferenceImages]:
    """Find the images that excite every split channel and its concept channels most.

    Reads the records shard by shard and keeps the best n of each channel.

    Args:
        scan: of the images to choose from, from the network that was split.
        split: whose channels to look at.
        n: images per channel; fewer are given where the scan holds fewer.
        alike: leave out an image whose pooled inputs have a cosine above this with those of a
            stronger one that is given, or that belongs to the same group of images; fewer than n
            are given where the 4 n strongest hold fewer that differ. None gives all.

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
    if alike is None:
        return _rank(scan, split, n)
    ranked = _rank(scan, split, _POOL * n)
    looks = _looks(scan, ranked)
    return {
        channel: ReferenceImages(
            _different(images.original, looks, n, alike),
            tuple(_different(concept, looks, n, alike) for concept in images.concepts),
        )
        for channel, images in ranked.items()
    }


def _rank(scan: Scan, split: Split, n: int) -> dict[int, ReferenceImages]:
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


@dataclass(frozen=True, eq=False)
class _Looks:
    """How the layer sees some images."""

    place: dict[int, int]  # rows by place in the data set
    direction: Tensor  # (M, G J), pooled inputs of length 1
    group: Tensor | None  # (M,), which images belong together


def _looks(scan: Scan, ranked: dict[int, ReferenceImages]) -> _Looks:
    """Look up how the layer sees the images that were ranked; each is kept once."""
    wanted = torch.cat(
        [top.index for images in ranked.values() for top in (images.original, *images.concepts)]
    ).unique()
    found = []
    for records in scan.shards():
        here = torch.isin(records.index, wanted)
        group = None if records.group is None else records.group[here]
        found.append((records.index[here], records.pooled[here].flatten(1).float(), group))
    indices, pooled, groups = zip(*found, strict=True)
    known = [group for group in groups if group is not None]
    return _Looks(
        {index: n for n, index in enumerate(torch.cat(indices).tolist())},
        torch.nn.functional.normalize(torch.cat(pooled), dim=1),
        torch.cat(known) if known else None,
    )


def _different(images: TopImages, looks: _Looks, n: int, alike: float) -> TopImages:
    """Choose the n strongest images none of which repeats a stronger one."""
    rows = torch.tensor([looks.place[index] for index in images.index.tolist()])
    cosine = looks.direction[rows] @ looks.direction[rows].T
    repeats = cosine > alike
    if looks.group is not None:
        group = looks.group[rows]
        repeats |= group[:, None] == group
    chosen: list[int] = []
    for place in range(len(rows)):
        if len(chosen) < n and not repeats[place, chosen].any():
            chosen.append(place)
    return _take(images, torch.tensor(chosen, dtype=torch.int64))


def _join(known: TopImages, fresh: TopImages) -> TopImages:
    return TopImages(
        torch.cat([known.index, fresh.index]),
        torch.cat([known.label, fresh.label]),
        torch.cat([known.concept, fresh.concept]),
        torch.cat([known.activation, fresh.activation]),
    )


def _strongest(images: TopImages, n: int) -> TopImages:
    # A stable sort, not topk: which of two equal images is shown must not depend on the shards.
    return _take(images, images.activation.sort(descending=True, stable=True).indices[:n])


def _take(images: TopImages, order: Tensor) -> TopImages:
    columns = (images.index, images.label, images.concept, images.activation)
    return TopImages(*(column[order] for column in columns))
