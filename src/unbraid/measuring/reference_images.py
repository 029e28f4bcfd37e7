"""Reference images: those that excite a channel, and each of its concept channels, most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbraid.base.arguments import whole_number
from unbraid.measuring.results import join
from unbraid.scanning.fields import Records, choose_records
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import Split

# Cosines of two images' pooled inputs, less their mean over the scan; docs/report.md tells why.
ALIKE, COPY = 0.95, 0.99
_STEPS = 5  # from the one to the other
_POOL = 4  # images among which to look for those that differ, for each that is shown


@dataclass(frozen=True, eq=False)
class TopImages:
    """The images that excite one channel most, strongest first."""

    index: Tensor  # (n,), in the data set
    label: Tensor  # (n,)
    concept: Tensor  # (n,), of the split channel that it belongs to, -1 for none
    activation: Tensor  # (n,), pooled pre-activation, float64
    group: Tensor | None = None  # (n,), of images of which only the strongest was to be kept

    def take(self, order: Tensor) -> TopImages:
        """Choose some images, in another order."""
        columns: list[Any] = [None if c is None else c[order] for c in vars(self).values()]
        return TopImages(*columns)


@dataclass(frozen=True, eq=False)
class ReferenceImages:
    """Top images of a split channel and of each of its concept channels."""

    original: TopImages
    concepts: tuple[TopImages, ...]


def reference_images(
    scan: Scan,
    split: Split,
    *,
    n: int = 8,
    alike: float | None = None,
    indices: Sequence[int] | None = None,
) -> dict[int, ReferenceImages]:
    """Find the images that excite every split channel and its concept channels most.

    Args:
        scan: of the images to choose from, from the network that was split.
        split: whose channels to look at.
        n: images per channel; fewer are given where the scan holds fewer.
        alike: leave out all images of a group but the strongest, where the data set groups them,
            and what a stronger image shows already: whose pooled inputs, less their mean, have a
            cosine above this with its own, or above up to 0.99 if that is needed to give n.
        indices: of the images to choose from, in the data set; by default all of the scan.

    Returns:
        By channel. Of equally exciting images the earlier one comes first.

    Raises:
        UsageError: n is below 1, or the scan is of another network or layer.
    """
    n = whole_number("n", n, 1)
    split.require(scan)
    if alike is None:
        found = _rank(scan, split, n, indices, by_group=False)
    else:
        found = _rank(scan, split, _POOL * n, indices, by_group=True)
        rows, directions = _directions(scan, found)
        for tops in found.values():
            for k, top in enumerate(tops):
                own = directions[[rows[index] for index in top.index.tolist()]]
                tops[k] = top.take(_different(own @ own.T, n, alike))
    return {o: ReferenceImages(own, tuple(concepts)) for o, (own, *concepts) in found.items()}


def shards_of(scan: Scan, indices: Sequence[int] | None) -> Iterator[Records]:
    """Read the records of some images, or all, shard by shard."""
    wanted = None if indices is None else torch.tensor(indices, dtype=torch.int64)
    for records in scan.shards():
        yield (
            records
            if wanted is None
            else choose_records(records, torch.isin(records.index, wanted))
        )


def _rank(
    scan: Scan, split: Split, n: int, indices: Sequence[int] | None, by_group: bool
) -> dict[int, list[TopImages]]:
    """Find by channel the n strongest images of the original and of each concept channel."""
    best: dict[int, list[TopImages]] = {}
    members = split.members_in(scan)
    for records in shards_of(scan, indices):
        group = records.group if by_group else None
        for part in split.channels:
            pooled = records.pooled[:, scan.layer.group_of(part.channel)]
            responses = part.pooled_responses(pooled, records.n_positions)[:, :-1].T
            concept = members.concept_of(records, part.concepts)
            tops = [TopImages(records.index, records.label, concept, z, group) for z in responses]
            if part.channel in best:
                pairs = zip(best[part.channel], tops, strict=True)
                tops = [join(pair) for pair in pairs]
            best[part.channel] = [strongest(top, n) for top in tops]
    return best


def strongest(top: TopImages, n: int) -> TopImages:
    """Take the n strongest images, of each group only one."""
    # A stable sort, not topk: which of two equal images is shown must not depend on the shards.
    order = top.activation.sort(descending=True, stable=True).indices
    if top.group is not None:
        first = np.unique(top.group[order].numpy(), return_index=True)[1]
        order = order[torch.from_numpy(np.sort(first))]
    return top.take(order[:n])


def _directions(scan: Scan, ranked: dict[int, list[TopImages]]) -> tuple[dict[int, int], Tensor]:
    """The row of each ranked image, and rows (M, G J): pooled inputs less the mean, at length 1."""
    wanted = torch.cat([top.index for tops in ranked.values() for top in tops]).unique()
    indices, pooled = [], []
    total, n_images = torch.zeros((), dtype=torch.float64), 0
    for records in scan.shards():
        inputs, here = records.pooled.flatten(1), torch.isin(records.index, wanted)
        indices += records.index[here].tolist()
        pooled.append(inputs[here].float())
        total = total + inputs.sum(0, dtype=torch.float64)
        n_images += len(records)
    centred = torch.cat(pooled) - (total / n_images).float()
    rows = {index: row for row, index in enumerate(indices)}
    return rows, torch.nn.functional.normalize(centred, dim=1)


def _different(cosine: Tensor, n: int, alike: float) -> Tensor:
    """Choose n images in order, none with a cosine (m, m) above a limit, which rises as needed."""
    chosen: list[int] = []
    for limit in np.linspace(alike, max(alike, COPY), _STEPS):
        repeats = cosine > float(limit)
        chosen = []
        for image in range(len(cosine)):
            if len(chosen) < n and not repeats[image, chosen].any():
                chosen.append(image)
        if len(chosen) == n:
            break
    return torch.tensor(chosen, dtype=torch.int64)
