"""What `ablate` returns: what is lost when a concept channel or a whole channel is off."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from unbraid.findings import Concept
from unbraid.notebook import Shown, html_table
from unbraid.strict import build
from unbraid.tables import align


@dataclass(frozen=True)
class ClassOutput:
    """What the network makes of one class's images with nothing off."""

    label: int
    name: str
    n_images: int
    logit: float  # mean over the images, of their own label
    accuracy: float  # top-1, a fraction of the images


@dataclass(frozen=True)
class ClassDrops:
    """What each class loses, in the order of `Ablation.classes`; a gain is negative."""

    logit: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Drop:
    """What some images lose on average; a gain is negative, without images it is NaN."""

    n_images: int
    logit: float  # with the concept channel off
    accuracy: float
    whole_logit: float  # with the whole original channel off
    whole_accuracy: float

    @property
    def part(self) -> float:
        """Part of the whole channel's drop in logit that is the concept channel's."""
        return self.logit / self.whole_logit if self.whole_logit else math.nan


@dataclass(frozen=True)
class ConceptAblation:
    """What is lost with one concept channel off."""

    classes: Concept
    name: str
    own: Drop  # over the concept's own images
    others: Drop  # over those of the channel's other concepts
    rest: Drop  # over all other images
    by_class: ClassDrops


@dataclass(frozen=True)
class ChannelAblation:
    """What is lost with one channel off, whole or a concept channel at a time."""

    channel: int
    whole: ClassDrops
    concepts: tuple[ConceptAblation, ...]


@dataclass(frozen=True)
class Ablation(Shown):
    """Causal effect of the concept channels of one layer; METHOD.md section 6."""

    layer: str
    classes: tuple[ClassOutput, ...]
    channels: tuple[ChannelAblation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, each drop with its part of the whole channel's."""
        content = asdict(self)
        for channel, entry in zip(self.channels, content["channels"], strict=True):
            for concept, values in zip(channel.concepts, entry["concepts"], strict=True):
                for name in ("own", "others", "rest"):
                    values[name]["part"] = getattr(concept, name).part
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Ablation:
        """Build an Ablation from what `to_dict` gave, also after a way through JSON.

        Raises:
            ValueError: an entry is missing or of another kind, or classes are not all there.
        """
        ablation = build(cls, _without_parts(content), null_figures=True)
        drops = [channel.whole for channel in ablation.channels]
        drops += [concept.by_class for channel in ablation.channels for concept in channel.concepts]
        n_classes = len(ablation.classes)
        if any((len(drop.logit), len(drop.accuracy)) != (n_classes,) * 2 for drop in drops):
            raise ValueError("losses by class are not one for each class")
        return ablation

    def __str__(self) -> str:
        """Show the drops in target logit and own accuracy as a table, a row per concept channel."""
        return align(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows(), title=f"Channels of {self.layer} switched off", n_heads=2)

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("", "", "own classes", "", "", "", "other concepts", "", "", "all others"),
            ("channel", "concept", *("logit", "whole", "part", "top-1"), *_HEAD, "logit"),
        ]
        for channel in self.channels:
            for k, concept in enumerate(channel.concepts):
                own, others = concept.own, concept.others
                rows.append(
                    (
                        "" if k else str(channel.channel),
                        concept.name,
                        *_figures(own.logit, own.whole_logit, own.part),
                        _points(own.accuracy),
                        *_figures(others.logit, others.whole_logit, others.part),
                        *_figures(concept.rest.logit),
                    )
                )
        return rows


_HEAD = ("logit", "whole", "part")


def _figures(*values: float) -> list[str]:
    return ["-" if math.isnan(value) else f"{value:.3f}" for value in values]


def _points(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _without_parts(content: Any) -> Any:
    """Leave out what `Drop.part` computes anew."""
    if isinstance(content, dict):
        return {key: _without_parts(item) for key, item in content.items() if key != "part"}
    if isinstance(content, (list, tuple)):
        return [_without_parts(item) for item in content]
    return content
