"""What a report is made from, and what follows from it for the whole page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from unbraid.base.errors import UsageError
from unbraid.finding.findings import Findings, Pair
from unbraid.finding.thresholds import Sensitivity
from unbraid.measuring.results import ChannelAblation, ChannelEvaluation, Evaluation
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
        return self.scan if self.maps is None and self.scan.positions else self.maps

    @cached_property
    def broken(self) -> list[int]:
        """Validation images that could not be read."""
        return self.scan.broken()

    @property
    def n_images(self) -> int:
        """Validation images that could be read; reference images are chosen from them."""
        return self.scan.manifest.n_images - len(self.broken)

    @cached_property
    def lowest(self) -> dict[int, Pair]:
        """The pair with the lowest cosine, by channel."""
        return {pair.channel: pair for pair in reversed(self.found.pairs)}

    @cached_property
    def parts(self) -> list[ChannelSplit]:
        """The split channels, lowest cosine first."""
        parts = () if self.split is None else self.split.channels
        return sorted(parts, key=lambda part: self.rank(part.channel))

    @property
    def n_concepts(self) -> int:
        """Concept channels."""
        return sum(len(part.concepts) for part in self.parts)

    @cached_property
    def concepts(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        """The classes of each concept, by channel; a split one has those it was split by."""
        return {**self.found.concepts, **{part.channel: part.concepts for part in self.parts}}

    def rank(self, channel: int) -> tuple[float, int]:
        """Order channels by how different the causes of their concepts are."""
        pair = self.lowest.get(channel)
        return (pair.cosine if pair else 2.0), channel

    @cached_property
    def chosen(self) -> bool:
        """Whether the user named the concepts: only then can a pair lie above the threshold."""
        return any(pair.cosine >= self.found.gamma for pair in self.found.pairs)

    @cached_property
    def measures(self) -> dict[int, ChannelEvaluation]:
        """Measures by channel."""
        return {c.channel: c for c in self.evaluation.channels} if self.evaluation else {}

    @cached_property
    def ablated(self) -> dict[int, ChannelAblation]:
        """What is lost with a channel off, by channel."""
        ablation = self.evaluation.ablation if self.evaluation else None
        return {c.channel: c for c in ablation.channels} if ablation else {}

    def refuse_strangers(self) -> None:
        """Raise a UsageError if it is not of one network, layer and split."""

        def identity(one: Scan | Split) -> tuple[object, ...]:
            weights = one.manifest.weights if isinstance(one, Scan) else one.weights
            return weights, one.layer

        here, name, counted = identity(self.scan), self.scan.layer.name, self.sensitivity
        same = {
            "training scan is": self.train_scan is None or identity(self.train_scan) == here,
            "scan with positions is": self.maps is None or identity(self.maps) == here,
            "split is": self.split is None or identity(self.split) == here,
            "sensitivity is": not counted or (counted.weights, counted.layer) == (here[0], name),
            "feature visualisations are": not self.features or self.features.layer == name,
        }
        for what, fits in same.items():
            if not fits:
                raise UsageError(
                    f"The {what} of another network or layer than the validation scan; pass "
                    "those of one run."
                )
        maps = self.maps
        if maps and not (maps.positions and maps.manifest.data == self.scan.manifest.data):
            raise UsageError(
                "`maps` is no scan with positions of the same images as `scan`; pass one, or none."
            )
        measured = {(c, tuple(k.classes for k in m.concepts)) for c, m in self.measures.items()}
        if self.evaluation and measured != {(part.channel, part.concepts) for part in self.parts}:
            raise UsageError(
                "The evaluation is not of this split (its channels or concepts differ); pass "
                "unbraid.evaluate(split, scan)."
            )
