"""Sum up over images what is lost with things off, by class and by concept.

Shapes: N images of a batch, K concepts of a channel, R runs of the batch: nothing off, then per
channel the whole channel off and each of its concept channels off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unbraid.ablation import (
    Ablation,
    ChannelAblation,
    ClassDrops,
    ClassOutput,
    ConceptAblation,
    Drop,
)
from unbraid.clusters import concept_of
from unbraid.findings import Concept
from unbraid.records import Scan


def members_by_label(concepts: Sequence[Concept], labels: Tensor) -> Tensor:
    """Say which of a channel's concepts, groups of classes, each image belongs to.

    Args:
        concepts: K groups of classes.
        labels: (N,), classes of the images.

    Returns:
        (N,), 0 to K - 1, and K for images of no concept.

    >>> members_by_label([(3,), (0, 1)], torch.tensor([0, 3, 2])).tolist()
    [1, 0, 2]
    """
    concept = torch.full_like(labels, len(concepts))
    for k, classes in enumerate(concepts):
        concept[torch.isin(labels, torch.tensor(classes, dtype=torch.int64))] = k
    return concept


def members_by_place(
    concepts: dict[int, tuple[Concept, ...]], scan: Scan, n_images: int
) -> dict[int, Tensor]:
    """Say the same of all images of a data set, for concepts of clusters too.

    Args:
        concepts: of each channel, groups of classes or of clusters.
        scan: of the data set, with its clusters.
        n_images: of the data set.

    Returns:
        By channel, (n_images,) as of `members_by_label`, in the order of the data set.
    """
    found = {
        o: torch.full((n_images,), len(groups), dtype=torch.int64) for o, groups in concepts.items()
    }
    for records in scan.shards():
        for channel, groups in concepts.items():
            concept = concept_of(scan, records, groups)
            found[channel][records.index] = torch.where(concept < 0, len(groups), concept)
    return found


class Tally:
    """Target logits and hits of all images, added up as batches come."""

    def __init__(
        self,
        concepts: dict[int, tuple[Concept, ...]],
        n_classes: int,
        members: dict[int, Tensor] | None,
    ) -> None:
        """Start at zero.

        Args:
            concepts: of the channels that are switched off, in order.
            n_classes: how many there are.
            members: from `members_by_place`; None if labels tell.
        """
        self._concepts, self._members = concepts, members
        n_runs = 1 + sum(1 + len(groups) for groups in concepts.values())
        self._by_class = _Sums(n_runs, n_classes)
        self._by_concept = {o: _Sums(2 + len(k), 1 + len(k)) for o, k in concepts.items()}

    def add(self, index: Tensor, labels: Tensor, logit: Tensor, hit: Tensor) -> None:
        """Add a batch.

        Args:
            index: (N,), places in the data set.
            labels: (N,).
            logit: (R, N), of the labels.
            hit: (R, N), 1 where the label's logit is the largest.
        """
        self._by_class.add(labels, logit, hit)
        whole = 1
        for channel, concepts in self._concepts.items():
            runs = [0, *range(whole, whole + 1 + len(concepts))]
            if self._members is None:
                group = members_by_label(concepts, labels)
            else:
                group = self._members[channel][index]
            self._by_concept[channel].add(group, logit[runs], hit[runs])
            whole += 1 + len(concepts)

    def result(self, layer: str, class_names: Sequence[str]) -> Ablation:
        """Divide the sums by the numbers of images."""
        sums = self._by_class
        seen = sums.n_images.nonzero()[:, 0].tolist()

        def name(label: int) -> str:
            return (label < len(class_names) and class_names[label]) or str(label)

        channels, whole = [], 1
        for channel, concepts in self._concepts.items():
            groups, n_concepts = self._by_concept[channel], len(concepts)
            parts = []
            for k, classes in enumerate(concepts):
                others = [other for other in range(n_concepts) if other != k]
                parts.append(
                    ConceptAblation(
                        classes=classes,
                        name=", ".join(map(name, classes)),
                        own=groups.drop([k], 2 + k),
                        others=groups.drop(others, 2 + k),
                        rest=groups.drop([n_concepts], 2 + k),
                        by_class=sums.class_drops(seen, whole + 1 + k),
                    )
                )
            channels.append(ChannelAblation(channel, sums.class_drops(seen, whole), tuple(parts)))
            whole += 1 + n_concepts
        return Ablation(
            layer=layer,
            classes=tuple(
                ClassOutput(
                    label=label,
                    name=name(label),
                    n_images=int(sums.n_images[label]),
                    logit=sums.mean(sums.logit[0], [label]),
                    accuracy=sums.mean(sums.hits[0], [label]),
                )
                for label in seen
            ),
            channels=tuple(channels),
        )


class _Sums:
    """Sums over the images of each group."""

    def __init__(self, n_runs: int, n_groups: int) -> None:
        self.n_images = torch.zeros(n_groups, dtype=torch.float64)
        self.logit = torch.zeros(n_runs, n_groups, dtype=torch.float64)
        self.hits = torch.zeros_like(self.logit)

    def add(self, group: Tensor, logit: Tensor, hit: Tensor) -> None:
        self.n_images.index_add_(0, group, torch.ones(len(group), dtype=torch.float64))
        self.logit.index_add_(1, group, logit)
        self.hits.index_add_(1, group, hit)

    def mean(self, sums: Tensor, groups: list[int]) -> float:
        """Mean over the images of some groups, NaN if they have none."""
        n_images = float(self.n_images[groups].sum())
        return float(sums[groups].sum()) / n_images if n_images else math.nan

    def drop(self, groups: list[int], off: int) -> Drop:
        """What the images of some groups lose in one run, beside run 1, without the channel."""
        lost_logit, lost_hits = self.logit[0] - self.logit, self.hits[0] - self.hits
        return Drop(
            n_images=int(self.n_images[groups].sum()),
            logit=self.mean(lost_logit[off], groups),
            accuracy=self.mean(lost_hits[off], groups),
            whole_logit=self.mean(lost_logit[1], groups),
            whole_accuracy=self.mean(lost_hits[1], groups),
        )

    def class_drops(self, groups: list[int], off: int) -> ClassDrops:
        """What each group loses in one run; every one has images."""
        n_images = self.n_images[groups]
        return ClassDrops(
            logit=tuple(((self.logit[0] - self.logit[off])[groups] / n_images).tolist()),
            accuracy=tuple(((self.hits[0] - self.hits[off])[groups] / n_images).tolist()),
        )
