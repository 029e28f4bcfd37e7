"""What the measures return: ablation and evaluation; printed, and kept in JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeVar

import torch
from torch import Tensor

from unbraid.base.arguments import as_path
from unbraid.base.files import write_whole
from unbraid.base.schema import build, read_json, unread
from unbraid.base.tables import Table, Tabular, figure, percent
from unbraid.finding.findings import Concept
from unbraid.measuring.compare import OutputComparison
from unbraid.measuring.likeness import ChannelSemantics, Semantics

Columns = TypeVar("Columns")

# Measures of channels, of concepts over all images and of channels likewise, and their heads.
_ERRORS = {"separation_error": "error", "separation_error_rectified": "rectified"}
_OVER_ALL = {"r_precision": "R-precision", "auroc_all": "auroc all", "off": "off"}
_OF_CHANNEL = {
    "coverage": "coverage",
    "top_coverage": "of top 1 %",
    "explained_share": "explained",
}
_MEANS = {**_ERRORS, "mimic_error": "mimic", **_OVER_ALL, **_OF_CHANNEL}
_NOT_OVER_ALL = (
    "R-precision, coverage and all else over all images is left out: the scan is of some images "
    "only; pass a scan of all."
)


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
    # Standard errors of both; of a single image NaN; older files have none.
    logit_error: tuple[float, ...] = ()
    accuracy_error: tuple[float, ...] = ()


@dataclass(frozen=True)
class Drop:
    """What some images lose on average; a gain is negative, without images it is NaN."""

    n_images: int
    logit: float  # with the concept channel, or the rest channel, off
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
class RestAblation:
    """What is lost with the rest channel off, which no concept names."""

    concepts: Drop  # over the images of the channel's concepts
    others: Drop  # over all other images
    by_class: ClassDrops


@dataclass(frozen=True)
class ChannelAblation:
    """What is lost with one channel off, whole or a concept channel or the rest at a time."""

    channel: int
    whole: ClassDrops
    concepts: tuple[ConceptAblation, ...]
    rest_channel: RestAblation | None = None  # older files have none

    @property
    def runs(self) -> tuple[ClassDrops, ...]:
        """With the whole channel off, each concept channel, and, where measured, the rest."""
        rest = () if self.rest_channel is None else (self.rest_channel.by_class,)
        return (self.whole, *(concept.by_class for concept in self.concepts), *rest)


@dataclass(frozen=True)
class Ablation(Tabular):
    """Causal effect of the concept channels of one layer; see "Evaluate" in docs/method.md.

    Attributes:
        layer: name of the split layer.
        classes: of each class, the number of images, mean logit and accuracy with nothing off.
        channels: of each channel and class, what is lost with the whole channel, each concept
            channel and the rest off: of the logit, and of the accuracy (a fraction, 0 to 1). A
            gain is negative.
        target: what is lost, where it is no logit; accuracies are then NaN.
    """

    layer: str
    classes: tuple[ClassOutput, ...]
    channels: tuple[ChannelAblation, ...]
    target: str = "label"  # what is lost, where other than logits; accuracies are then NaN

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, each drop with its part of the whole channel's."""
        content = asdict(self)
        for channel, entry in zip(self.channels, content["channels"], strict=True):
            parts = zip(channel.concepts, entry["concepts"], strict=True)
            for one, values in (*parts, (channel.rest_channel, entry["rest_channel"])):
                for name, drop in vars(one).items() if one else ():
                    if isinstance(drop, Drop):
                        values[name]["part"] = drop.part
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Ablation:
        """Build an Ablation from what `to_dict` gave; raise ValueError where that is damaged."""
        ablation = build(cls, _without_parts(content), null_figures=True)
        drops = [one for channel in ablation.channels for one in channel.runs]
        lengths = {len(losses) for drop in drops for losses in (drop.logit, drop.accuracy)}
        if not lengths <= {len(ablation.classes)}:
            raise ValueError("losses by class are not one for each class")
        return ablation

    def table(self) -> Table:
        """Show the drops in target logit and own accuracy, a row per concept channel and rest.

        With another target than the class, "logit" stands for it, and there is no accuracy.
        """
        figures = ("logit" if self.target == "label" else "target", "whole", "part")
        rows: list[tuple[str, ...]] = [
            ("", "", "own classes", "", "", "", "other concepts", "", "", "all others"),
            ("channel", "concept", *figures, "top-1", *figures, figures[0]),
        ]
        for channel in self.channels:
            for k, concept in enumerate(channel.concepts):
                own, others = map(_shown, (concept.own, concept.others))
                accuracy, rest = percent(concept.own.accuracy, 1), figure(concept.rest.logit)
                number = "" if k else str(channel.channel)
                rows.append((number, concept.name, *own, accuracy, *others, rest))
            if channel.rest_channel is not None:
                off, own = channel.rest_channel, _shown(channel.rest_channel.concepts)
                accuracy = percent(off.concepts.accuracy, 1)
                rows.append(("", "the rest", *own, accuracy, *[""] * 3, figure(off.others.logit)))
        caption, all_in = f"Channels of {self.layer} switched off", "Ablation.to_dict gives all"
        return Table(rows, caption=caption, n_heads=2, all_in=all_in)


def _shown(drop: Drop) -> list[str]:
    return [figure(value) for value in (drop.logit, drop.whole_logit, drop.part)]


def _without_parts(content: Any) -> Any:
    """Leave out what `Drop.part` computes again."""
    if isinstance(content, dict):
        return {key: _without_parts(item) for key, item in content.items() if key != "part"}
    if isinstance(content, (list, tuple)):
        return [_without_parts(item) for item in content]
    return content


@dataclass(frozen=True)
class Ratio:
    """Over images, a new channel's pooled pre-activation divided by the original's."""

    mean: float
    median: float


@dataclass(frozen=True)
class ConceptEvaluation:
    """Measures of one concept channel; "Evaluate" in docs/method.md defines them."""

    classes: Concept
    name: str
    n_images: int
    retention: float  # ideal 1
    leakage: float  # mean over the other concepts, ideal 0
    mimic_error: float  # ideal 0
    silence_error: float  # mean over the other concepts, ideal 0
    auroc: float  # ideal 1
    ratios: tuple[Ratio, ...]  # published table: each concept channel, then the residual
    # Over all images; None without a scan of all. Of the whole original channel, as far as told.
    auroc_all: float | None = None  # against every other image, ideal 1
    r_precision: float | None = None  # ideal 1
    off: float | None = None  # part of its positive activity not on its concept, ideal 0
    whole_auroc_all: float | None = None
    whole_r_precision: float | None = None


@dataclass(frozen=True)
class ChannelEvaluation:
    """Measures of one split channel."""

    layer: str
    channel: int
    concepts: tuple[ConceptEvaluation, ...]
    separation_error: float
    separation_error_rectified: float | None  # None without positions
    # Over all images; None without a scan of all.
    coverage: float | None = None  # part of its positive activity on images of any concept
    top_coverage: float | None = None  # part of its top 1 % of images that are of any concept
    explained_share: float | None = (
        None  # of its positive activity by all concept channels, ideal 1
    )


@dataclass(frozen=True, eq=False)
class Responses:
    """Responses of a channel and its concept channels to the images of its concepts."""

    concept: Tensor  # (N,), which concept each image belongs to
    label: Tensor  # (N,)
    share: Tensor  # (N,), of the original channel
    original: Tensor  # (N,), pooled pre-activation
    concepts: Tensor  # (N, K)
    residual: Tensor  # (N,)
    rectified: Tensor | None  # (N, 1 + K), original and concepts, only with positions


def join(parts: Sequence[Columns]) -> Columns:
    """Join what was measured of several images, one dataclass of tensors after the other."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return type(parts[0])(*(None if one[0] is None else torch.cat(one) for one in columns))


@dataclass(frozen=True)
class Evaluation(Tabular):
    """Measures of all split channels, and of the network's output.

    Attributes:
        method: of the split that was measured, such as "least_squares".
        layer: name of the split layer.
        channels: measures of each channel and of its concept channels; errors are relative to the
            whole channel, fractions lie between 0 and 1, None where images or positions lack.
        tau: smallest share for an image to count in the published table.
        responses: by channel, pooled pre-activations of the whole channel and of its concept
            channels on each image.
        output: from `unbraid.compare_outputs`, if given.
        ablation: from `unbraid.ablate`, if given.
        semantics: from `unbraid.measure_semantics`, if given.
        baseline: measures of another method on the same channels, if given.
    """

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
        """Per method, means over the channels or concepts, and the median retention."""
        concepts = [concept for channel in self.channels for concept in channel.concepts]
        own: dict[str, float | None] = {}
        for name in _MEANS:
            parts = self.channels if name in {**_ERRORS, **_OF_CHANNEL} else concepts
            own[name] = _of_known(parts, name, mean)
        own["median_retention"] = _of_known(concepts, "retention", median)
        return {self.method: own, **(self.baseline.summary if self.baseline else {})}

    def summary_table(self) -> Table:
        """Show the summary, a row per method; what no method knows is left out."""
        summary = self.summary
        words = {**_MEANS, "median_retention": "median retention"}
        known = {
            name: told
            for name, told in words.items()
            if any(figures[name] is not None for figures in summary.values())
        }
        rows = [("means", *known.values())]
        for method, figures in summary.items():
            values = [figures[name] for name in known]
            cells = [figure(math.nan if value is None else value) for value in values]
            rows.append((method.replace("_", " "), *cells))
        return Table(rows)

    def to_dict(self) -> dict[str, Any]:
        """Return what evaluation.json holds; what could not be computed is None."""
        ablation = None if self.ablation is None else self.ablation.to_dict()
        ablated = [] if ablation is None else ablation.pop("channels")
        ablations = {entry["channel"]: entry for entry in ablated}
        seen = {} if self.semantics is None else asdict(self.semantics)["channels"]
        channels = [
            {
                **asdict(channel),
                "ablation": ablations.get(channel.channel),
                "semantics": seen.get(channel.channel),
            }
            for channel in self.channels
        ]
        output = None if self.output is None else asdict(self.output)
        content = {"output": output, "channels": channels}
        content |= {"summary": self.summary, "ablation": ablation}
        return _finite(content)  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> None:
        """Write evaluation.json."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        write_whole(as_path("path", path), (text + "\n").encode())

    def table(self) -> Table:
        """Show the measures, a row per concept channel."""
        measures = ("retention", "leakage", "mimic_error", "silence_error", "auroc")
        heads = ["channel", "concept", "retention", "leakage", "mimic", "silence", "auroc"]
        known = all(channel.coverage is not None for channel in self.channels)
        over_all, of_channel = (_OVER_ALL, _OF_CHANNEL) if known else ({}, {})
        heads += [*over_all.values(), "error", *of_channel.values()]
        rows = [tuple(heads)]
        for channel in self.channels:
            own = [figure(getattr(channel, name)) for name in ("separation_error", *of_channel)]
            for k, concept in enumerate(channel.concepts):
                figures = [figure(getattr(concept, name)) for name in (*measures, *over_all)]
                number = "" if k else str(channel.channel)
                rows.append((number, concept.name, *figures, *([""] * len(own) if k else own)))
        note, caption = "" if known else _NOT_OVER_ALL, f"{self.method} split of {self.layer}"
        return Table(rows, note=note, caption=caption, all_in="Evaluation.save writes all")


def _of_known(
    parts: Sequence[object], name: str, by: Callable[[Sequence[float]], float]
) -> float | None:
    """A mean or so of the figures of a name that are known."""
    figures = [getattr(part, name) for part in parts]
    known = [value for value in figures if value is not None and math.isfinite(value)]
    return by(known) if known else None


def _finite(value: Any) -> Any:
    """JSON has no NaN; a figure that could not be computed is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


# What evaluation.json holds, read back; None for what was not measured.


@contextmanager
def _evaluation_json(path: Path) -> Iterator[Any]:
    try:
        yield read_json(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unread(error, f"{path} cannot be read ({error}); start the run again.") from None


def read_output(path: Path) -> OutputComparison | None:
    """Read the output figures from evaluation.json."""
    with _evaluation_json(path) as content:
        output = content["output"]
        return None if output is None else build(OutputComparison, output)


def read_ablation(path: Path) -> Ablation | None:
    """Read what was lost with channels off from evaluation.json."""
    with _evaluation_json(path) as content:
        if content.get("ablation") is None:
            return None
        channels = [entry["ablation"] for entry in content["channels"]]
        known = [entry for entry in channels if entry is not None]
        return Ablation.from_dict({**content["ablation"], "channels": known})


def read_semantics(path: Path) -> Semantics | None:
    """Read semantic measures from evaluation.json."""
    with _evaluation_json(path) as content:
        seen = {
            build(int, entry["channel"]): entry.get("semantics") for entry in content["channels"]
        }
        known = {
            channel: build(ChannelSemantics, one, null_figures=True)
            for channel, one in seen.items()
            if one is not None
        }
        return Semantics(known) if known else None


def read_channels(path: Path) -> list[ChannelEvaluation]:
    """Read the measures of all channels from evaluation.json."""
    measures = ChannelEvaluation.__dataclass_fields__  # an entry has more beside them
    with _evaluation_json(path) as content:
        entries = [
            {name: entry[name] for name in measures if name in entry}  # older files have fewer
            for entry in content["channels"]
        ]
        return [build(ChannelEvaluation, entry, null_figures=True) for entry in entries]
