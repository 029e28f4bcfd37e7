"""What concept channels should do in images of no concept: share the original's answer evenly.

Without a word on these images, masks that fit the concepts' own can answer wildly to all others, up
and down, as long as it cancels. Where a channel was made by adding up channels with jobs of their
own, this term is what brings the jobs back (docs/splitting.md). Shapes: N images, J taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.clusters import concept_of
from unbraid.findings import Concept
from unbraid.moments import augment
from unbraid.records import Records, Scan
from unbraid.shard_parts import join_records

WEIGHT = 0.1  # beside 1 for each concept; docs/splitting.md tells what other weights gave
_N_IMAGES = 400  # of the whole scan, spread evenly


@dataclass(frozen=True)
class Term:
    """A squared error: |rows m|^2 - 2 linear.m + constant, for every mask m of a channel."""

    rows: Tensor  # (N, J)
    linear: Tensor  # (J,)
    constant: float


def sample_images(scan: Scan) -> Records:
    """Take records of some images, spread evenly over the scan."""
    sizes = [len(labels) for labels in scan.columns("label")]
    step = max(1, sum(sizes) // _N_IMAGES)
    parts, start = [], 0
    for records in scan.shards():
        first = min(-start % step, len(records))  # a shard may hold none
        places = torch.arange(first, len(records), step, dtype=torch.int64)
        parts.append(_choose(records, places))
        start += len(records)
    return join_records(parts)


def background_of(scan: Scan, sample: Records, channel: int, concepts: Sequence[Concept]) -> Tensor:
    """Augmented pooled inputs of the sampled images that belong to no concept, (N, J + 1)."""
    outside = concept_of(scan, sample, concepts) < 0
    pooled = sample.pooled[outside, scan.layer.group_of(channel)]
    return augment(pooled, sample.n_positions[outside])


def background_term(background: Tensor, row: Tensor, n_concepts: int) -> Term | None:
    """Mean squared distance from an even share, relative to the original's, times its weight.

    Args:
        background: (N, J + 1), of images of no concept.
        row: (J + 1,), the channel's weights and bias.
        n_concepts: that share the answer.

    Returns:
        None without such an image, or if the channel answers to none.
    """
    answers = background @ row
    if not answers.any():
        return None
    weight = WEIGHT / answers.square().sum()
    wanted = answers / n_concepts - background[:, -1] * row[-1]  # no mask can change the bias
    reach = background[:, :-1] * row[:-1]
    return Term(
        rows=weight.sqrt() * reach,
        linear=weight * (wanted @ reach),
        constant=float(weight * wanted.square().sum()),
    )


def _choose(records: Records, places: Tensor) -> Records:
    """Records of some places, without shares and input maps."""
    empty = records.share_start.new_zeros(len(places) + 1)
    return Records(
        index=records.index[places],
        label=records.label[places],
        prediction=records.prediction[places],
        n_positions=records.n_positions[places],
        pooled=records.pooled[places],
        share_start=empty,
        share_channel=records.share_channel[:0],
        share_value=records.share_value[:0],
        broken=records.broken[:0],
        group=None if records.group is None else records.group[places],
    )
