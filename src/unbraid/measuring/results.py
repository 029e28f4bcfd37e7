"""What `evaluate` returns: measures per channel and concept, for people and for JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unbraid.base.arguments import as_path
from unbraid.base.errors import RunError
from unbraid.base.files import write_whole
from unbraid.base.schema import build, read_json, unread
from unbraid.base.tables import Shown, align, html_table
from unbraid.finding.findings import Concept
from unbraid.measuring.compare import OutputComparison

# What `ablate` returns: what is lost when a concept channel or a whole channel is off.


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


# What `measure_semantics` returns: how alike the images are that channels answer to.


@dataclass(frozen=True)
class Likeness:
    """How alike the images are that one channel answers to; METHOD.md section 6 defines it."""

    monosemanticity: float  # mean cosine of pairs of images, weighted by what it answers to both
    clarity: float  # mean cosine of pairs of its top images


@dataclass(frozen=True)
class ChannelSemantics:
    """One split channel beside its concept channels, as an image encoder sees their images.

    A figure that cannot be computed is NaN.
    """

    encoder: str  # its name
    n_images: int
    n_top: int  # top images of each channel, for clarity and PURE's distances
    positions: bool  # whether answers were rectified position by position
    crops: bool  # whether distances are of the parts of images where concept channels answer
    original: Likeness
    concepts: tuple[Likeness, ...]
    within: float  # PURE's mean distance of top images of the same concept channel
    between: float  # and of different ones, both in the encoder's unit

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChannelSemantics:
        """Read what evaluation.json holds.

        Raises:
            ValueError: an entry is missing or of another kind.
        """
        return build(cls, values, null_figures=True)


@dataclass(frozen=True)
class Semantics:
    """Semantic measures of all split channels, by channel."""

    channels: dict[int, ChannelSemantics]

    def __str__(self) -> str:
        """Show the measures as a table, a row per channel and concept channel."""
        head = ("channel", "", "monosemanticity", "clarity", "within", "between")
        rows: list[tuple[str, ...]] = [head]
        for channel, one in self.channels.items():
            distances = (f"{one.within:.3f}", f"{one.between:.3f}")
            for k, like in enumerate([one.original, *one.concepts]):
                rows.append(
                    (
                        "" if k else str(channel),
                        f"concept {k - 1}" if k else "original",
                        f"{like.monosemanticity:.3f}",
                        f"{like.clarity:.3f}",
                        *(("", "") if k else distances),
                    )
                )
        return align(rows)


# What `evaluate` returns: measures per channel and concept, for people and for JSON.


@dataclass(frozen=True)
class Ratio:
    """Over images, a new channel's pooled pre-activation divided by the original's."""

    mean: float
    median: float


@dataclass(frozen=True)
class ConceptEvaluation:
    """Measures of one concept channel; METHOD.md section 6 defines them."""

    classes: Concept
    name: str
    n_images: int
    retention: float  # ideal 1
    leakage: float  # mean over the other concepts, ideal 0
    mimic_error: float  # ideal 0
    silence_error: float  # mean over the other concepts, ideal 0
    auroc: float  # ideal 1
    ratios: tuple[Ratio, ...]  # published table: each concept channel, then the residual


@dataclass(frozen=True)
class ChannelEvaluation:
    """Measures of one split channel."""

    layer: str
    channel: int
    concepts: tuple[ConceptEvaluation, ...]
    separation_error: float
    separation_error_rectified: float | None  # None without positions


_MEASURES = tuple(ChannelEvaluation.__dataclass_fields__)  # an entry has more beside them


@dataclass
class Responses:
    """What a channel and its concept channels answer to the images of its concepts."""

    concept: Tensor  # (N,), which concept each image belongs to
    label: Tensor  # (N,)
    share: Tensor  # (N,), of the original channel
    original: Tensor  # (N,), pooled pre-activation
    concepts: Tensor  # (N, K)
    residual: Tensor  # (N,)
    rectified: Tensor | None  # (N, 1 + K), original and concepts, only with positions


@dataclass(frozen=True)
class Evaluation(Shown):
    """Measures of all split channels, and of the network's output."""

    method: str
    layer: str
    channels: tuple[ChannelEvaluation, ...]
    tau: float  # smallest share for an image to count in the published table
    responses: dict[int, Responses] = field(repr=False)
    output: OutputComparison | None = None
    ablation: Ablation | None = None
    semantics: Semantics | None = None
    baseline: Evaluation | None = None  # of another method on the same channels

    @property
    def summary(self) -> dict[str, dict[str, float | None]]:
        """Per method, the mean errors over the channels."""
        rectified = [channel.separation_error_rectified for channel in self.channels]
        own: dict[str, float | None] = {
            "separation_error": _mean([channel.separation_error for channel in self.channels]),
            "separation_error_rectified": _mean(rectified),
        }
        return {self.method: own, **(self.baseline.summary if self.baseline else {})}

    def to_dict(self) -> dict[str, Any]:
        """Return what evaluation.json holds; what could not be computed is None."""
        content: dict[str, Any] = {
            "output": None if self.output is None else asdict(self.output),
            "channels": [asdict(channel) for channel in self.channels],
            "summary": self.summary,
            "ablation": None,
        }
        ablations: dict[int, dict[str, Any]] = {}
        if self.ablation is not None:
            content["ablation"] = self.ablation.to_dict()
            ablations = {entry["channel"]: entry for entry in content["ablation"].pop("channels")}
        for entry in content["channels"]:
            entry["ablation"] = ablations.get(entry["channel"])
            known = self.semantics and self.semantics.channels.get(entry["channel"])
            entry["semantics"] = asdict(known) if known else None
        return _finite(content)  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> None:
        """Write evaluation.json."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        write_whole(as_path("path", path), (text + "\n").encode())

    def __str__(self) -> str:
        """Show the measures as a table, a row per concept channel."""
        return align(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows(), title=f"{self.method} split of {self.layer}")

    def _rows(self) -> list[tuple[str, ...]]:
        head = ("channel", "concept", "retention", "leakage", "mimic", "silence", "auroc", "error")
        rows: list[tuple[str, ...]] = [head]
        for channel in self.channels:
            for k, concept in enumerate(channel.concepts):
                values = (
                    concept.retention,
                    concept.leakage,
                    concept.mimic_error,
                    concept.silence_error,
                    concept.auroc,
                )
                rows.append(
                    (
                        "" if k else str(channel.channel),
                        concept.name,
                        *(f"{value:.3f}" for value in values),
                        "" if k else f"{channel.separation_error:.3f}",
                    )
                )
        return rows


def read_output(path: Path) -> OutputComparison | None:
    """Read the output figures from evaluation.json, None if they were not measured.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        output = read_json(path)["output"]
        return None if output is None else build(OutputComparison, output)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unread(path, error) from None


def read_ablation(path: Path) -> Ablation | None:
    """Read what was lost with channels off from evaluation.json, None if it was not measured.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        content = read_json(path)
        if content.get("ablation") is None:
            return None
        channels = [entry["ablation"] for entry in content["channels"]]
        known = [entry for entry in channels if entry is not None]
        return Ablation.from_dict({**content["ablation"], "channels": known})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unread(path, error) from None


def read_semantics(path: Path) -> Semantics | None:
    """Read semantic measures from evaluation.json, None if they were not measured.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        entries = read_json(path)["channels"]
        known = {
            build(int, entry["channel"]): ChannelSemantics.from_dict(entry["semantics"])
            for entry in entries
            if entry.get("semantics") is not None
        }
        return Semantics(known) if known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unread(path, error) from None


def read_channels(path: Path) -> list[ChannelEvaluation]:
    """Read the measures of all channels from evaluation.json.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        entries = read_json(path)["channels"]
        own = [{name: entry[name] for name in _MEASURES} for entry in entries]
        return [build(ChannelEvaluation, entry, null_figures=True) for entry in own]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unread(path, error) from None


def _unread(path: Path, error: Exception) -> RunError:
    return unread(error, f"{path} cannot be read ({error}); start the run again.")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _finite(value: Any) -> Any:
    """JSON has no NaN; a figure that could not be computed is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
