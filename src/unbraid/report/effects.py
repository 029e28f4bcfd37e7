"""What the page shows of a channel that was switched off.

Nothing here writes markup. Shapes: K concepts of a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unbraid.ablation import Ablation, ChannelAblation, ConceptAblation
from unbraid.report.channels import ConceptView
from unbraid.report.text import bounded

N_OTHERS = 12  # classes of no concept that are listed


@dataclass(frozen=True)
class ClassEffect:
    """What one class loses."""

    name: str
    concept: ConceptView | None  # that it belongs to
    n_images: int
    losses: tuple[tuple[float, float], ...]  # logit and accuracy: whole channel, each concept


@dataclass(frozen=True)
class Effects:
    """What is lost with a channel off, whole or a concept at a time."""

    concepts: tuple[tuple[ConceptView, ConceptAblation], ...]
    classes: tuple[ClassEffect, ...]
    n_left_out: int  # classes that are not listed


def effects(ablation: Ablation, channel: ChannelAblation, views: Sequence[ConceptView]) -> Effects:
    """List what is lost, by concept, and by class: the concepts' own and those hit hardest."""
    runs = [channel.whole, *(concept.by_class for concept in channel.concepts)]
    owner = {
        label: view
        for view, concept in zip(views, channel.concepts, strict=True)
        for label in concept.classes
    }
    everyone = [
        ClassEffect(
            name=bounded(output.name),
            concept=owner.get(output.label),
            n_images=output.n_images,
            losses=tuple((run.logit[n], run.accuracy[n]) for run in runs),
        )
        for n, output in enumerate(ablation.classes)
    ]
    others = [row for row in everyone if row.concept is None]
    others.sort(key=lambda row: -max(abs(logit) for logit, _ in row.losses))
    own = [row for view in views for row in everyone if row.concept is view]
    return Effects(
        concepts=tuple(zip(views, channel.concepts, strict=True)),
        classes=(*own, *others[:N_OTHERS]),
        n_left_out=max(0, len(others) - N_OTHERS),
    )
