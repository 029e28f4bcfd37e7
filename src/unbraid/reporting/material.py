"""What a report is made from, and what is worked out from it once for the whole page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from unbraid.base.errors import UsageError
from unbraid.finding.findings import Findings, Pair
from unbraid.finding.thresholds import Sensitivity
from unbraid.measuring.results import (
    ChannelAblation,
    ChannelEvaluation,
    ChannelSemantics,
    Evaluation,
)
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import ChannelSplit, Split
from unbraid.visualizing.features import Features


@dataclass(frozen=True, eq=False)
class Material:
    """The arguments of `unbraid.report`."""

    scan: Scan
    found: Findings
    split: Split | None
    evaluation: Evaluation | None
    train_scan: Scan | None
    sensitivity: Sensitivity | None = None
    features: Features | None = None
    maps: Scan | None = None

    @property
    def positions(self) -> Scan | None:
        """The validation images scanned with positions, if they were."""
        if self.maps is None and self.scan.positions:
            return self.scan
        return self.maps

    @cached_property
    def broken(self) -> list[int]:
        """Validation images that could not be read."""
        return self.scan.broken()

    @cached_property
    def train_broken(self) -> list[int]:
        """Training images that could not be read."""
        return [] if self.train_scan is None else self.train_scan.broken()

    @cached_property
    def lowest(self) -> dict[int, float]:
        """The lowest cosine of any two classes, by channel."""
        return {channel: pair.cosine for channel, pair in self.clearest.items()}

    @cached_property
    def clearest(self) -> dict[int, Pair]:
        """The pair with the lowest cosine, by channel."""
        return {pair.channel: pair for pair in reversed(self.found.pairs)}

    @property
    def parts(self) -> list[ChannelSplit]:
        """The split channels, clearest case first."""
        parts = () if self.split is None else self.split.channels
        return sorted(parts, key=lambda part: self.rank(part.channel))

    @property
    def chosen(self) -> bool:
        """Whether the user named the concepts: only then can a pair lie above the threshold."""
        return any(pair.cosine >= self.found.gamma for pair in self.found.pairs)

    @property
    def measures(self) -> dict[int, ChannelEvaluation]:
        """Measures by channel."""
        return {c.channel: c for c in self.evaluation.channels} if self.evaluation else {}

    @property
    def ablated(self) -> dict[int, ChannelAblation]:
        """What is lost with a channel off, by channel."""
        ablation = self.evaluation.ablation if self.evaluation else None
        return {c.channel: c for c in ablation.channels} if ablation else {}

    @property
    def semantics(self) -> dict[int, ChannelSemantics]:
        """How alike the images are that channels answer to, by channel."""
        semantics = self.evaluation.semantics if self.evaluation else None
        return semantics.channels if semantics else {}

    def rank(self, channel: int) -> tuple[float, int]:
        """Order channels by how different the causes of their concepts are."""
        return self.lowest.get(channel, 2.0), channel

    def refuse_strangers(self) -> None:
        """Raise if it is not of one network, layer and split.

        Raises:
            UsageError: names what differs.
        """
        here = (self.scan.manifest.weights, self.scan.layer)
        there = {}
        if self.train_scan is not None:
            there["training scan"] = (self.train_scan.manifest.weights, self.train_scan.layer)
        if self.maps is not None:
            there["scan with positions"] = (self.maps.manifest.weights, self.maps.layer)
        if self.split is not None:
            there["split"] = (self.split.weights, self.split.layer)
        for name, identity in there.items():
            if identity != here:
                raise UsageError(
                    f"The {name} is of another network or layer than the validation scan; pass "
                    "those of one run."
                )
        counted = self.sensitivity
        if counted and (counted.weights, counted.layer) != (here[0], here[1].name):
            raise UsageError(
                "The sensitivity is of another network or layer than the validation scan; pass "
                "those of one run."
            )
        if self.features is not None and self.features.layer != here[1].name:
            raise UsageError(
                "The feature visualisations are of another layer than the validation scan; pass "
                "those of one run."
            )
        if self.maps is not None and (
            not self.maps.positions or self.maps.manifest.data != self.scan.manifest.data
        ):
            raise UsageError(
                "`maps` is no scan with positions of the same images as `scan`; pass one, or none."
            )
        if self.evaluation is not None:
            measured = {
                (channel.channel, tuple(concept.classes for concept in channel.concepts))
                for channel in self.evaluation.channels
            }
            if measured != {(part.channel, part.concepts) for part in self.parts}:
                raise UsageError(
                    "The evaluation is not of this split (its channels or concepts differ); pass "
                    "unbraid.evaluate(split, scan)."
                )
