"""What the whole page shows, as plain data: no image is read and no markup is written here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unbraid.errors import UsageError
from unbraid.evaluate import Responses, gather_responses
from unbraid.evaluation import Evaluation
from unbraid.find import class_sums
from unbraid.findings import Findings
from unbraid.layers import LayerSpec
from unbraid.records import Scan
from unbraid.report.channels import (
    ChannelView,
    ConceptView,
    bars,
    concept_views,
    densities,
    reference_rows,
)
from unbraid.report.summary import Fact, facts, output_figures, plain, settings
from unbraid.report.text import count
from unbraid.splits import ChannelSplit, Split
from unbraid.visualize.reference import reference_images

N_IMAGES = 8  # reference images of a channel
MAX_CHANNELS = 100  # channels shown in full
MAX_ROWS = 300  # rows of reference images in all: they are most of the file


@dataclass(frozen=True)
class ChannelRow:
    """One line of the list of channels."""

    number: int
    concepts: tuple[ConceptView, ...]
    cosine: float | None
    error: float | None
    rectified: float | None
    shown: bool  # whether it has a section


@dataclass(frozen=True)
class PairRow:
    """One line of the list of pairs."""

    channel: int
    names: tuple[str, str]
    cosine: float
    uses: tuple[float, float]
    shown: bool


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    title: str
    layer: LayerSpec
    hint: str  # what comes nearest, if nothing was found
    facts: tuple[Fact, ...]
    n_divided: int
    n_concepts: int
    output: dict[str, str] | None
    overview: tuple[ChannelRow, ...]
    pairs: tuple[PairRow, ...]
    channels: tuple[ChannelView, ...]
    left_out: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    n_images: int  # that reference images are chosen from
    tau: float


def build_page(
    scan: Scan,
    found: Findings,
    split: Split | None,
    evaluation: Evaluation | None,
    train_scan: Scan | None,
    *,
    has_images: bool,
    title: str | None,
) -> Page:
    """Work out what the page shows; arguments as in `unbraid.report`."""
    parts = () if split is None else split.channels
    lowest = {o: min(p.cosine for p in found.pairs if p.channel == o) for o in _with_pairs(found)}
    ordered = sorted(parts, key=lambda part: (lowest.get(part.channel, 2.0), part.channel))
    shown = _within_limits(ordered)
    sections: tuple[ChannelView, ...] = ()
    left_out = _left_out(split, evaluation, train_scan, has_images)
    if split is not None:
        sections, more = _sections(scan, found, split, shown, evaluation, train_scan, lowest)
        left_out += more
    if len(shown) < len(parts):
        left_out.append(
            f"Details of {count(len(parts) - len(shown), 'channel')}, to keep the file small: "
            f"the {len(shown)} channels with the lowest cosines are shown in full."
        )
    numbers = {part.channel for part in shown}
    return Page(
        title=title or f"Polysemantic channels of {scan.layer.name or 'the layer'}",
        layer=scan.layer,
        hint=found.hint,
        facts=facts(scan, found, split, evaluation),
        n_divided=len(parts),
        n_concepts=sum(len(part.concepts) for part in parts),
        output=output_figures(evaluation),
        overview=_channel_rows(found, parts, evaluation, lowest, numbers),
        pairs=tuple(
            PairRow(
                pair.channel,
                (found.name(pair.class1), found.name(pair.class2)),
                pair.cosine,
                (pair.use1, pair.use2),
                pair.channel in numbers,
            )
            for pair in found.pairs
        ),
        channels=sections,
        left_out=tuple(left_out),
        settings=settings(scan, found, split, train_scan),
        n_images=scan.manifest.n_images - len(scan.broken()),
        tau=found.tau,
    )


def _with_pairs(found: Findings) -> set[int]:
    return {pair.channel for pair in found.pairs}


def _within_limits(parts: Sequence[ChannelSplit]) -> list[ChannelSplit]:
    shown: list[ChannelSplit] = []
    n_rows = 0
    for part in parts[:MAX_CHANNELS]:
        n_rows += 1 + len(part.concepts)
        if shown and n_rows > MAX_ROWS:
            break
        shown.append(part)
    return shown


def _sections(
    scan: Scan,
    found: Findings,
    split: Split,
    shown: Sequence[ChannelSplit],
    evaluation: Evaluation | None,
    train_scan: Scan | None,
    lowest: dict[int, float],
) -> tuple[tuple[ChannelView, ...], list[str]]:
    """Describe the channels shown in full, and say what had to be left out of them."""
    left_out = []
    part_split = replace(split, channels=tuple(shown))
    top = reference_images(scan, part_split, n=N_IMAGES)
    answers: dict[int, Responses] = {}
    try:
        answers = evaluation.responses if evaluation else gather_responses(part_split, scan)
    except UsageError as error:
        left_out.append(f"Densities: {error}")
    measures = {c.channel: c for c in evaluation.channels} if evaluation else {}
    sums = class_sums(train_scan, []) if train_scan else None
    sections = []
    for part in shown:
        views = concept_views(found, part.concepts)
        answer = answers.get(part.channel)
        sections.append(
            ChannelView(
                number=part.channel,
                concepts=views,
                info={key: plain(value) for key, value in part.info.items()},
                cosine=lowest.get(part.channel),
                rows=reference_rows(found, part, top[part.channel]),
                measures=measures.get(part.channel),
                densities=densities(views, answer) if answer else None,
                bars=bars(views, part, train_scan, sums) if train_scan and sums else None,
            )
        )
    bare = [section.number for section in sections if section.bars is None]
    if train_scan and bare:
        numbers = ", ".join(map(str, bare))
        left_out.append(
            f"Input channels of channel {numbers}: the training scan lacks images of a concept."
        )
    return tuple(sections), left_out


def _left_out(
    split: Split | None, evaluation: Evaluation | None, train_scan: Scan | None, has_images: bool
) -> list[str]:
    if split is None:
        return []
    notes = []
    if evaluation is None:
        notes.append("Measures and the output check: the report was made without an evaluation.")
    elif all(channel.separation_error_rectified is None for channel in evaluation.channels):
        notes.append("Rectified separation errors: they need a validation scan with positions.")
    if evaluation is not None and evaluation.output is None:
        notes.append("The output check: the evaluation holds no comparison of outputs.")
    if train_scan is None:
        notes.append("Input channels: they need the training scan, which was not given.")
    if not has_images:
        notes.append("Pictures: they need the data set, which was not given.")
    return notes


def _channel_rows(
    found: Findings,
    parts: Sequence[ChannelSplit],
    evaluation: Evaluation | None,
    lowest: dict[int, float],
    numbers: set[int],
) -> tuple[ChannelRow, ...]:
    concepts = {**found.concepts, **{part.channel: part.concepts for part in parts}}
    measures = {c.channel: c for c in evaluation.channels} if evaluation else {}
    rows = []
    for channel in sorted(concepts, key=lambda o: (lowest.get(o, 2.0), o)):
        known = measures.get(channel)
        rows.append(
            ChannelRow(
                number=channel,
                concepts=concept_views(found, concepts[channel]),
                cosine=lowest.get(channel),
                error=known.separation_error if known else None,
                rectified=known.separation_error_rectified if known else None,
                shown=channel in numbers,
            )
        )
    return tuple(rows)
