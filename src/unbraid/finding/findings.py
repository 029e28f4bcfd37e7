"""What `find` returns: polysemantic channels, their pairs of classes and their concepts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from unbraid.base.arguments import as_path, whole_number
from unbraid.base.errors import UsageError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.base.modes import in_plain_modes
from unbraid.base.schema import build, check_schema, in_range, unread
from unbraid.base.tables import MAX_LINES, Exported, Table, Tabular, count, figure, percent
from unbraid.finding.membership import (
    Cluster,
    ClusterEntry,
    Clusters,
    Members,
    find_images,
    first_free,
    name_of,
    pack,
    put_together,
    require_scan,
    sort_anew,
    unpack,
)
from unbraid.finding.pairs import Pair, interval_in_words, is_sure, pairs_of
from unbraid.scanning.manifest import MAX_CLASSES
from unbraid.scanning.records import Scan

Concept = tuple[int, ...]  # the classes, or clusters, that share one cause
ConceptKind = Literal["classes", "clusters", "whole"]
Kind = Literal["classes", "clusters", "whole", "groups"]  # groups put together by hand

SCHEMA = 1
COLUMNS = (
    *("channel", "class1", "class2", "cosine", "use1", "use2", "name1", "name2"),
    *("low", "high", "half1", "half2", "uncertain"),
)
_SIDE = ("used in", "halves")
_CLASS_HEADS = ("channel", "cosine", "interval", "class 1", *_SIDE, "class 2", *_SIDE)
_CLASS_LEGEND = (
    "interval: 95 % confidence interval of the cosine that unlimited images would give; "
    "halves: cosine between two halves of the images of one class (- for a single image)."
)
_NEAREST_HEADS = ("channel", "cosine", "interval", "class 1", "images", "class 2", "images", "with")
_NEAREST_LEGEND = (
    "What comes nearest, best first. with: what finds it, added to the same command or passed to "
    "find; images: those of the class that excite the channel most, by index among the training "
    "images, from 0."
)
_CLUSTER_HEADS = ("channel", "cosine", "cluster 1", "top images", "cluster 2", "top images")
_GROUP_HEADS = ("channel", "cosine", "group 1", "images", "group 2", "images")
_GROUP_LEGEND = "images: the group's part of the images in all groups of the channel."
_CLUSTER_LEGEND = "top images: the cluster's part of the images that the channel answers to most."


@dataclass(frozen=True)
class Candidate:
    """A pair that was not found, and the thresholds that find it."""

    pair: Pair
    tau: float
    gamma: float
    images: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # indices of each class's strongest

    def options(self, found: Findings) -> str:
        """The options of `unbraid run` and `unbraid find` that take it, where other than asked."""
        # With another gamma a tau that is chosen by rule would be another one too.
        tau = "auto" if found.auto else found.tau
        asked = {"tau": (self.tau, tau), "gamma": (self.gamma, found.gamma)}
        # As repr, so that a number can be read back.
        return " ".join(f"--{name} {own!r}" for name, (own, was) in asked.items() if own != was)


def sure_in_words(n_sure: int, n: int, what: str) -> str:
    """Count things, those that are sure first and apart from those that are not."""
    if n_sure == n:
        return count(n, what)
    return f"{n_sure:,} sure, {count(n - n_sure, f'uncertain {what}')}"


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


def found_by_hand(scan: Scan, channel: int, groups: Sequence[Sequence[int]], first: int) -> Found:
    """Groups of images, by index, as a channel's concepts, with numbers from the first on."""
    made = put_together(scan, channel, groups, first)
    numbers, sizes = list(made.clusters), [len(group) for group in groups]
    part = [size / sum(sizes) for size in sizes]
    every = torch.ones_like(made.cosines, dtype=torch.bool)
    return Found(
        pairs=pairs_of(channel, numbers, made.cosines, every, part),
        concepts={channel: tuple((number,) for number in numbers)},
        clusters=made.clusters,
        names=made.names,
    )


def with_names(scan: Scan, names: Mapping[int, str]) -> tuple[str, ...]:
    """Names of classes and, behind them, of clusters, by number."""
    every = dict(enumerate(scan.class_names)) | dict(names)
    return tuple(every.get(n, "") for n in range(max(every, default=-1) + 1))


@dataclass(frozen=True)
class Findings(Tabular, Exported):
    """The polysemantic channels of a layer: concepts by channel, pairs by lowest cosine first.

    Attributes:
        tau: smallest share that matters.
        p: fraction of a class's images.
        gamma: cosine below which two classes have different reasons.
        pairs: two classes that use a channel for different reasons, each with its cosine, the 95 %
            interval of that (`low`, `high`) and the cosines of halves of one class.
        concepts: by channel, its concepts; each is a tuple of classes, or of clusters, which are
            numbered behind the last class.
        class_names: by number.
        hint: if nothing was found, which thresholds come nearest.
        layer: name of the layer that the channels belong to.
        weights: hash of the network's weights.
        clusters: by number, where they stand for classes.
        agreement: by channel, adjusted Rand index of clusters' concepts and classes' concepts.
        kind: what concepts are made of.
        auto: whether tau was chosen by rule.
        note: what to know of the tau chosen, and of what was left out.
        nearest: if nothing was found, what comes nearest, best first.
        scan: id of the scan that it was found in; empty where earlier versions noted none.
    """

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
    agreement: Mapping[int, float] = field(default_factory=dict)  # Rand index, by channel
    kind: Kind = "classes"  # what concepts are made of
    auto: bool = False  # whether tau was chosen by rule
    note: str = ""  # what to know of the tau chosen, and of what was left out
    nearest: tuple[Candidate, ...] = ()  # if nothing was found, what comes nearest, best first
    scan: str = ""  # `scan_id` of what it was found in; empty where earlier versions noted none

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
    def sides(self) -> str:
        """What the pairs are of."""
        return self.kind if self.kind in ("clusters", "groups") else "classes"

    @property
    def tau_in_words(self) -> str:
        """Tau as people read it, and whether it was chosen for them."""
        return f"{self.tau:g} (auto)" if self.auto else f"{self.tau:g}"

    def members_in(self, scan: Scan) -> Members:
        """Say which images of a scan of this layer belong to which class or cluster."""
        sizes = {c.centres.shape[1] for c in self.clusters.values()}
        channels = (*self.channels, *(c.channel for c in self.clusters.values()))
        if max(channels, default=0) >= scan.layer.n_out or sizes - {scan.layer.n_in_per_group}:
            raise UsageError("The findings are of a layer of another size than the scan's.")
        return Members(scan, self.clusters)

    def correct(
        self,
        scan: Scan,
        channel: int,
        *,
        groups: Sequence[Sequence[int | str]] | None = None,
        join: Sequence[Sequence[int]] = (),
        move: Mapping[int | str, int | None] | None = None,
        part: Mapping[int, Sequence[Sequence[int | str]]] | None = None,
    ) -> Findings:
        """Sort the images of one channel again by hand; all its concepts become groups of images.

        Concepts count from 0 as in `concepts[channel]`; images go by index or id.

        Args:
            scan: that the findings are of.
            channel: one that was found, or with `groups` any.
            groups: its images, a list for each concept, in place of what was found.
            join: concepts that are one, such as `[[0, 2]]`.
            move: the concept that an image belongs to, such as `{7: 1}`; None for no concept.
            part: examples of each part of a concept, such as `{0: [[3, 5], [8]]}`; its other
                images follow the nearest centre.

        Returns:
            New findings, for `unbraid.split`.

        Raises:
            UsageError: a concept or image is not there, or named twice, or less than two concepts
                are left, or one without images.
        """
        require_scan(scan, self.weights, self.layer, self.scan)
        channel = whole_number("the channel", channel, 0, scan.layer.n_out - 1)
        if groups is not None and (join or move or part):
            raise UsageError("Pass groups, or what to join, move and part, not both.")
        if groups is None:
            if channel not in self.concepts:
                raise UsageError(f"Channel {channel} was not found, so give its groups whole.")
            before = [self.members_in(scan).indices(own) for own in self.concepts[channel]]
            sorted_anew = sort_anew(scan, channel, before, join, move or {}, part or {})
        else:
            sorted_anew = find_images(scan, channel, groups)
        kept = {n: c for n, c in self.clusters.items() if c.channel != channel}
        new = found_by_hand(scan, channel, sorted_anew, first_free(scan, kept))
        concepts = {o: own for o, own in self.concepts.items() if o != channel} | new.concepts
        pairs = [pair for pair in self.pairs if pair.channel != channel] + new.pairs
        clusters = kept | new.clusters
        by_hand = all(c.images is not None for c in clusters.values())
        only = all(n in clusters for own in concepts.values() for group in own for n in group)
        return replace(
            self,
            pairs=tuple(sorted(pairs, key=lambda pair: (pair.cosine, pair.channel))),
            concepts=concepts,
            clusters=clusters,
            class_names=with_names(scan, {n: self.name(n) for n in kept} | new.names),
            agreement={o: a for o, a in self.agreement.items() if o != channel},
            kind="groups" if by_hand and only else self.kind,
            hint="",
            nearest=(),
        )

    @in_plain_modes
    def save(self, path: str | Path) -> None:
        """Write the findings to one safetensors file (docs/format.md).

        Raises:
            RunError: the disk is full or may not be written.
        """
        tensors, clusters = pack(self.clusters)
        own = {name: _plain(value) for name, value in vars(self).items() if name != "clusters"}
        write_tensors(
            as_path("path", path), tensors, {"schema": SCHEMA, **own, "clusters": clusters}
        )

    @classmethod
    @in_plain_modes
    def load(cls, path: str | Path) -> Findings:
        """Read findings from their file.

        Raises:
            RunError: the file is missing, damaged or holds no findings.
        """
        tensors, about = read_tensors(as_path("path", path))
        try:
            check_schema(about, SCHEMA)
            entries = vars(build(_About, about, null_figures=True))
            own = {name: entries[name] for name in cls.__dataclass_fields__ if name != "clusters"}
            _check_numbers(entries)
            return cls(**own, clusters=unpack(entries["clusters"], tensors))
        except (KeyError, ValueError) as error:
            raise unread(error, f"{path} holds no findings that can be read ({error}).") from None

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def table(self) -> Table:
        """Show the pairs, or say what comes nearest to a finding."""
        of_classes = self.sides == "classes"
        asked = f"tau {self.tau_in_words}, p {self.p:g}, " if of_classes else ""
        asked = f"({asked}gamma {self.gamma:g})"
        note = f"\nNote: {self.note}" if self.note else ""
        if not self.pairs:
            head = f"No polysemantic channel {asked}. {self.hint}".rstrip()
            if not self.nearest:
                return Table((), note=head + note)
            rows = [_NEAREST_HEADS, *map(self._nearest_cells, self.nearest)]
            return Table(rows, head, _NEAREST_LEGEND + note)
        head = f"{self.pairs_in_words} of {self.sides} in {self.channels_in_words} {asked}"
        kinds = {"classes": _CLASS_HEADS, "clusters": _CLUSTER_HEADS, "groups": _GROUP_HEADS}
        rows = [kinds[self.sides], *(self._cells(pair, of_classes) for pair in self.pairs)]
        legend, all_in = self._legend(of_classes) + note, "Findings.to_csv writes all"
        return Table(rows, head, legend, all_in=all_in)

    def _cells(self, pair: Pair, of_classes: bool) -> list[str]:
        cells = [str(pair.channel), f"{pair.cosine:.4f}"]
        if of_classes:
            cells.append(interval_in_words(pair) + " *" * self.uncertain(pair))
        sides = (pair.class1, pair.use1, pair.half1), (pair.class2, pair.use2, pair.half2)
        for number, use, half in sides:
            cells += [self.name(number), percent(use), *([figure(half)] if of_classes else [])]
        return cells

    def _nearest_cells(self, candidate: Candidate) -> list[str]:
        pair = candidate.pair
        cells = [str(pair.channel), f"{pair.cosine:.4f}", interval_in_words(pair)]
        for number, images in zip((pair.class1, pair.class2), candidate.images, strict=True):
            cells += [self.name(number), " ".join(map(str, images))]
        return [*cells, candidate.options(self)]

    def _legend(self, of_classes: bool) -> str:
        if of_classes:
            legend = _CLASS_LEGEND
            if n_uncertain := sum(map(self.uncertain, self.pairs)):
                legend += (
                    f"\n* {n_uncertain} of {count(len(self.pairs), 'pair')} uncertain: with other "
                    "images of the same classes the cosine could lie on the other side of gamma."
                )
            return "\n".join([legend, *self._concepts_with_clusters()])
        if self.kind == "groups":
            return _GROUP_LEGEND
        legend, known = _CLUSTER_LEGEND, self.known_agreement
        if known:
            legend += (
                f"\nMean agreement with what classes make of them: {sum(known) / len(known):.3f} "
                "(adjusted Rand index: 1 the same, 0 chance)."
            )
        return legend

    def _concepts_with_clusters(self) -> Iterator[str]:
        """A line per channel, where clusters of what else excites it stand beside classes."""
        if self.clusters:
            yield "Concepts, with clusters of what else excites the channel:"
            for channel in self.channels[:MAX_LINES]:
                names = (", ".join(map(self.name, concept)) for concept in self.concepts[channel])
                yield f"  channel {channel}: {'; '.join(names)}"
            if (n_more := len(self.concepts) - MAX_LINES) > 0:
                yield f"  and {count(n_more, 'more channel')}, all of them in Findings.concepts"

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


def _check_numbers(entries: Mapping[str, Any]) -> None:
    """Raise ValueError where a file names a channel, class, cluster or image that cannot be."""
    concepts, clusters, nearest = (entries[name] for name in ("concepts", "clusters", "nearest"))
    pairs = [*entries["pairs"], *(candidate.pair for candidate in nearest)]
    channels = [*concepts, *entries["agreement"]]
    channels += [own.channel for own in (*pairs, *clusters.values())]
    classes = [number for own in concepts.values() for concept in own for number in concept]
    classes += [*clusters, *(number for pair in pairs for number in (pair.class1, pair.class2))]
    for what, numbers in {"a channel": channels, "a class or cluster": classes}.items():
        for number in numbers:
            in_range(what, number, 0, MAX_CLASSES - 1)
    for candidate in nearest:
        for index in chain.from_iterable(candidate.images):
            in_range("an image", index, 0, 2**62)
    for channel, own in concepts.items():
        numbers = list(chain.from_iterable(own))
        if len(own) < 2 or not all(own) or len(set(numbers)) < len(numbers):
            raise ValueError(f"the concepts of channel {channel} are not two or more groups")
        for number in numbers:
            if number in clusters and clusters[number].channel != channel:
                raise ValueError(f"channel {channel} has cluster {number} of another channel")


def _plain(value: Any) -> Any:
    """As JSON has it, null where a figure is not known."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@dataclass(frozen=True)
class _About:
    schema: int
    tau: float
    p: float
    gamma: float
    pairs: tuple[Pair, ...]
    concepts: dict[int, tuple[Concept, ...]]
    class_names: tuple[str, ...]
    hint: str
    layer: str
    weights: str
    agreement: dict[int, float]
    kind: Kind
    auto: bool
    note: str
    nearest: tuple[Candidate, ...]
    clusters: dict[int, ClusterEntry]
    scan: str = ""
    crc32: dict[str, int] = field(default_factory=dict)
