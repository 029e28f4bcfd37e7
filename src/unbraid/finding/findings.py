"""What `find` returns: polysemantic channels, their pairs of classes and their concepts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from unbraid.base.tables import Exported, Table, Tabular, count, figure
from unbraid.finding.membership import Cluster, Clusters, Members, name_of
from unbraid.scanning.records import Scan

Concept = tuple[int, ...]  # the classes, or clusters, that share one cause
ConceptKind = Literal["classes", "clusters"]

COLUMNS = (
    *("channel", "class1", "class2", "cosine", "use1", "use2", "name1", "name2"),
    *("low", "high", "half1", "half2", "uncertain"),
)
_SIDE = ("used in", "halves")
_CLASS_HEADS = ("channel", "cosine", "interval", "class 1", *_SIDE, "class 2", *_SIDE)
_CLASS_LEGEND = (
    "interval: where, with 95 % confidence, the cosine lies that unlimited images would give; "
    "halves: cosine between two halves of the images of one class (- for a single image)."
)
_NEAREST_HEADS = ("channel", "cosine", "interval", "class 1", "images", "class 2", "images", "with")
_NEAREST_LEGEND = (
    "What comes nearest, best first. with: options, or arguments of find, that take it; images: of "
    "the class, those that excite the channel most, by their places in the training images."
)
_CLUSTER_HEADS = ("channel", "cosine", "cluster 1", "top images", "cluster 2", "top images")
_CLUSTER_LEGEND = "top images: the cluster's part of the images that the channel answers to most."


@dataclass(frozen=True)
class Pair:
    """Two classes that use one channel for different reasons; or two clusters of images."""

    channel: int
    class1: int
    class2: int
    cosine: float  # of their averaged relevance vectors
    # Fraction of the images of class1 in which the channel matters; of a cluster, its part of the
    # channel's top images.
    use1: float
    use2: float
    # How sure the cosine is; nan for a class of a single image, and for clusters of images.
    low: float = math.nan  # 95 % interval of the cosine that unlimited images would give
    high: float = math.nan
    half1: float = math.nan  # cosine between two random halves of the images of class1
    half2: float = math.nan


@dataclass(frozen=True)
class Candidate:
    """A pair that was not found, and the thresholds that find it."""

    pair: Pair
    tau: float
    gamma: float
    # Of each class, those that excite the channel most, by their places in the data set.
    images: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def options(self, found: Findings) -> str:
        """The options of `unbraid run` and `unbraid find` that take it, where other than asked."""
        asked = {"tau": (self.tau, found.tau), "gamma": (self.gamma, found.gamma)}
        # As repr, so that a number can be read back.
        return " ".join(f"--{name} {own!r}" for name, (own, was) in asked.items() if own != was)


def interval_in_words(pair: Pair) -> str:
    """Write the interval of a pair's cosine, "-" where it is not known."""
    return "-" if math.isnan(pair.low) else f"{pair.low:.3f} to {pair.high:.3f}"


def sure_in_words(n_sure: int, n: int, what: str) -> str:
    """Count things, those that are sure first and apart from those that are not."""
    if n_sure == n:
        return count(n, what)
    return f"{n_sure:,} sure, {count(n - n_sure, f'uncertain {what}')}"


def is_sure(pair: Pair, gamma: float) -> bool:
    """Whether a pair's cosine and its whole interval lie on one side of gamma."""
    return pair.high < gamma if pair.cosine < gamma else pair.low >= gamma


def pairs_of(
    channel: int, numbers: Sequence[int], cosines: Tensor, wanted: Tensor, use: Sequence[float]
) -> list[Pair]:
    """The wanted pairs of some classes or clusters; cosines and wanted are square."""
    return [
        Pair(channel, numbers[i], numbers[j], float(cosines[i, j]), use[i], use[j])
        for i, j in wanted.triu(1).nonzero().tolist()
    ]


@dataclass
class Found:
    """What a search gathers, a channel after the other."""

    pairs: list[Pair] = field(default_factory=list)
    concepts: dict[int, tuple[Concept, ...]] = field(default_factory=dict)
    clusters: dict[int, Cluster] = field(default_factory=dict)  # by number
    names: dict[int, str] = field(default_factory=dict)  # of clusters
    agreement: dict[int, float] = field(default_factory=dict)  # per channel
    hint: str = ""  # if nothing was found, what comes nearest
    nearest: tuple[Candidate, ...] = ()  # likewise, best first


@dataclass(frozen=True)
class Findings(Tabular, Exported):
    """The polysemantic channels of a layer: concepts by channel, pairs by lowest cosine first."""

    tau: float
    p: float
    gamma: float
    pairs: tuple[Pair, ...]
    concepts: dict[int, tuple[Concept, ...]]
    class_names: tuple[str, ...]
    hint: str  # if nothing was found, which thresholds come nearest
    layer: str  # that the channels belong to
    weights: str  # hash of the network's weights
    clusters: Clusters = field(default_factory=dict)  # by number, where they stand for classes
    # Per channel, adjusted Rand index of clusters' concepts and classes' concepts; see docs.
    agreement: Mapping[int, float] = field(default_factory=dict)
    kind: ConceptKind = "classes"  # what concepts are made of
    auto: bool = False  # whether tau was chosen by rule
    note: str = ""  # what to know of the tau chosen
    nearest: tuple[Candidate, ...] = ()  # if nothing was found, what comes nearest, best first

    columns = COLUMNS

    @property
    def channels(self) -> tuple[int, ...]:
        """The polysemantic channels, in order."""
        return tuple(sorted(self.concepts))

    @property
    def sure_channels(self) -> tuple[int, ...]:
        """The channels with a pair that is not uncertain, in order."""
        return tuple(sorted({pair.channel for pair in self.pairs if not self.uncertain(pair)}))

    @property
    def channels_in_words(self) -> str:
        """Count the channels; those that chance may have decided, apart."""
        return sure_in_words(len(self.sure_channels), len(self.concepts), "polysemantic channel")

    @property
    def n_sure(self) -> int:
        """Number of pairs that are not uncertain."""
        return sum(not self.uncertain(pair) for pair in self.pairs)

    @property
    def pairs_in_words(self) -> str:
        """Count the pairs; those that chance may have decided, apart."""
        return sure_in_words(self.n_sure, len(self.pairs), "pair")

    @property
    def classes(self) -> tuple[int, ...]:
        """All classes of all concepts: those that a scan with positions needs."""
        every = {c for groups in self.concepts.values() for group in groups for c in group}
        return tuple(sorted(every))

    @property
    def tau_in_words(self) -> str:
        """Tau as people read it, and whether it was chosen for them."""
        return f"{self.tau:g} (auto)" if self.auto else f"{self.tau:g}"

    def members_in(self, scan: Scan) -> Members:
        """Say which images of a scan of this layer belong to which class or cluster."""
        return Members(scan, self.clusters)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def table(self) -> Table:
        """Show the pairs, or say what comes nearest to a finding."""
        of_classes = self.kind == "classes"
        asked = f"tau {self.tau_in_words}, p {self.p:g}, " if of_classes else ""
        asked = f"({asked}gamma {self.gamma:g})"
        note = f"\nNote: {self.note}" if self.note else ""
        if not self.pairs:
            head = f"No polysemantic channel {asked}. {self.hint}".rstrip()
            if not self.nearest:
                return Table((), note=head + note)
            rows = [self._nearest_cells(candidate) for candidate in self.nearest]
            return Table([_NEAREST_HEADS, *rows], head, _NEAREST_LEGEND + note)
        head = f"{self.pairs_in_words} of {self.kind} in {self.channels_in_words} {asked}"
        heads = _CLASS_HEADS if of_classes else _CLUSTER_HEADS
        rows = [self._cells(pair, of_classes) for pair in self.pairs]
        return Table([heads, *rows], head, self._legend(of_classes) + note)

    def _cells(self, pair: Pair, of_classes: bool) -> list[str]:
        cells = [str(pair.channel), f"{pair.cosine:.4f}"]
        if of_classes:
            cells.append(interval_in_words(pair) + " *" * self.uncertain(pair))
        sides = (pair.class1, pair.use1, pair.half1), (pair.class2, pair.use2, pair.half2)
        for number, use, half in sides:
            cells += [self.name(number), f"{use:.0%}", *([figure(half)] if of_classes else [])]
        return cells

    def _nearest_cells(self, candidate: Candidate) -> list[str]:
        pair = candidate.pair
        cells = [str(pair.channel), f"{pair.cosine:.4f}", interval_in_words(pair)]
        for number, images in zip((pair.class1, pair.class2), candidate.images, strict=True):
            cells += [self.name(number), " ".join(map(str, images))]
        return [*cells, candidate.options(self)]

    def _legend(self, of_classes: bool) -> str:
        if of_classes:
            legend, n_uncertain = _CLASS_LEGEND, sum(map(self.uncertain, self.pairs))
            if n_uncertain:
                legend += (
                    f"\n* {n_uncertain} of {count(len(self.pairs), 'pair')} uncertain: with other "
                    "images of the same classes the cosine could lie on the other side of gamma."
                )
            return legend
        legend, known = _CLUSTER_LEGEND, self.known_agreement
        if known:
            legend += (
                f"\nMean agreement with what classes make of them: {sum(known) / len(known):.3f} "
                "(adjusted Rand index: 1 the same, 0 chance)."
            )
        return legend

    @property
    def known_agreement(self) -> list[float]:
        """Agreement of clusters with classes, of the channels where it could be measured."""
        return [a for o, a in self.agreement.items() if o in self.concepts and not math.isnan(a)]

    def name(self, label: int) -> str:
        """Return the name of a class, or its number where it has none."""
        return name_of(self.class_names, label)

    def uncertain(self, pair: Pair) -> bool:
        """Whether a pair's interval is unknown or not all on its side of gamma; no cluster's is."""
        if pair.class1 in self.clusters:
            return False
        return not is_sure(pair, self.gamma)

    def rows(self) -> Iterator[tuple[int | float | str, ...]]:
        """Give one row per pair, in the order of the CSV columns."""
        for pair in self.pairs:
            figures = tuple(vars(pair).values())
            names = (self.name(pair.class1), self.name(pair.class2))
            yield (*figures[:6], *names, *figures[6:], self.uncertain(pair))
