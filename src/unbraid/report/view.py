"""What the whole page shows, as plain data: no image is read and no markup is written here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unbraid.arvs import class_sums
from unbraid.errors import UsageError
from unbraid.evaluate import gather_responses
from unbraid.evaluation import Responses
from unbraid.findings import ConceptKind
from unbraid.layers import LayerSpec
from unbraid.report.channels import (
    ChannelView,
    ConceptView,
    bars,
    concept_views,
    densities,
    reference_rows,
)
from unbraid.report.effects import effects
from unbraid.report.firsts import first_images, missing
from unbraid.report.intervals import intervals
from unbraid.report.maps import Map, maps
from unbraid.report.masks import masks
from unbraid.report.material import Material
from unbraid.report.pairs import MAX_LISTED, Chance, PairRow, chance, pair_rows
from unbraid.report.spread import by_class, ridges, scatter
from unbraid.report.summary import Fact, facts, how_divided, output_figures, settings
from unbraid.report.text import bounded, isolate, shorten
from unbraid.splits import ChannelSplit
from unbraid.tables import count
from unbraid.visualize.reference import ALIKE, reference_images

N_IMAGES = 8  # reference images of a channel
MAX_CHANNELS = 100  # channels shown in full
_MAX_NOTE = 2000  # characters
_MAX_WORDS = 4000  # characters of names that a channel is found by
_MAX_CHIPS = 26  # concepts of a channel in the list
_MAX_CELLS = 2000  # of the maps of thresholds
MAX_ROWS = 300  # rows of reference images in all: they are most of the file


@dataclass(frozen=True)
class ChannelRow:
    """One line of the list of channels."""

    number: int
    concepts: tuple[ConceptView, ...]  # the first of them
    n_more: int  # concepts
    cosine: float | None  # the lowest of any two of its classes
    chance: Chance | None  # how sure that one is
    agreement: float | None  # of clusters with classes
    error: float | None
    rectified: float | None
    shown: bool  # whether it has a section

    @property
    def words(self) -> str:
        """What it is found by, besides its number: the names of its concepts."""
        names = (isolate(name) for concept in self.concepts for name in concept.names)
        return shorten(" ".join(names), _MAX_WORDS)


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    title: str
    layer: LayerSpec
    hint: str  # what comes nearest, if nothing was found
    facts: tuple[Fact, ...]
    kind: ConceptKind  # what concepts are made of
    predicted: bool  # whether labels are the network's
    chosen: bool  # whether the user named the concepts
    n_found: int  # channels
    n_divided: int
    n_concepts: int
    output: dict[str, str] | None
    overview: tuple[ChannelRow, ...]  # of so many channels as a list has lines at most
    n_pairs: int  # in all
    pairs: tuple[PairRow, ...]  # as many as a list has lines at most
    channels: tuple[ChannelView, ...]
    notes: tuple[str, ...]  # what is left out and why, and what to beware of
    settings: tuple[tuple[str, str], ...]
    table_tau: str  # smallest share for an image to count in the published table
    n_images: int  # that reference images are chosen from
    maps: tuple[Map, ...]  # of what other thresholds find

    @property
    def n_uncertain(self) -> int:
        """How many of the pairs listed are uncertain."""
        return sum(pair.chance is not None and pair.chance.uncertain for pair in self.pairs)


def build_page(material: Material, *, has_images: bool, title: str | None) -> Page:
    """Work out what the page shows.

    Args:
        material: what the report is made from.
        has_images: whether there will be pictures.
        title: the page's heading; None for one that names the layer.
    """
    scan, found, parts = material.scan, material.found, material.parts
    shown = _within_limits(parts)
    numbers = {part.channel for part in shown}
    sections, notes = _sections(material, shown)
    return Page(
        title=bounded(title or _title(scan.layer.name)),
        layer=scan.layer,
        hint=bounded(found.hint, _MAX_NOTE),
        facts=facts(material),
        kind=found.kind,
        predicted=scan.manifest.labels == "predicted",
        chosen=material.chosen,
        n_found=len(found.concepts.keys() | {part.channel for part in parts}),
        n_divided=len(parts),
        n_concepts=sum(len(part.concepts) for part in parts),
        output=output_figures(material.evaluation),
        overview=_channel_rows(material, numbers),
        n_pairs=len(found.pairs),
        pairs=pair_rows(found, numbers),
        channels=sections,
        notes=tuple(bounded(note, _MAX_NOTE) for note in (*_notes(material, has_images), *notes)),
        settings=settings(material),
        table_tau=f"{material.evaluation.tau:g}" if material.evaluation else "",
        n_images=scan.manifest.n_images - len(material.broken),
        maps=() if _too_many_thresholds(material) else maps(material),
    )


def _too_many_thresholds(material: Material) -> bool:
    return material.sensitivity is not None and len(material.sensitivity.cells) > _MAX_CELLS


def _title(layer: str) -> str:
    named = layer if layer.startswith("layer") else f"layer {layer}"
    return f"Polysemantic channels of {named}"


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
    material: Material, shown: Sequence[ChannelSplit]
) -> tuple[tuple[ChannelView, ...], list[str]]:
    """Describe the channels shown in full, and say what had to be left out of them."""
    if material.split is None:
        return (), []
    notes = []
    scan, found, train_scan = material.scan, material.found, material.train_scan
    part_split = replace(material.split, channels=tuple(shown))
    top, ids = reference_images(scan, part_split, n=N_IMAGES, alike=ALIKE), scan.ids()
    absent = {part.channel: missing(top[part.channel], len(part.concepts)) for part in shown}
    firsts = first_images(scan, part_split, {c: gone for c, gone in absent.items() if gone})
    n_images = scan.manifest.n_images - len(material.broken)
    answers: dict[int, Responses] = {}
    try:
        evaluation = material.evaluation
        answers = evaluation.responses if evaluation else gather_responses(part_split, scan)
    except UsageError as error:
        notes.append(f"Densities are left out: {error}")
    measures, ablated = material.measures, material.ablated
    ablation = material.evaluation.ablation if material.evaluation else None
    sums = None
    if train_scan:
        sums = class_sums(replace(train_scan, clusters=found.clusters), [])
    sections = []
    for part in shown:
        views = concept_views(found, part.concepts)
        answer = answers.get(part.channel)
        groups = by_class(answer) if answer else []
        sections.append(
            ChannelView(
                number=part.channel,
                concepts=views,
                info=how_divided(part.info),
                cosine=material.lowest.get(part.channel),
                rows=reference_rows(
                    found,
                    part,
                    top[part.channel],
                    ids,
                    {k: first for (channel, k), first in firsts.items() if channel == part.channel},
                    n_images,
                ),
                measures=measures.get(part.channel),
                intervals=intervals(answer) if answer else None,
                densities=densities(views, answer) if answer else None,
                ridges=ridges(found, views, answer, groups) if answer else None,
                scatter=scatter(found, views, answer, groups) if answer else None,
                bars=bars(views, part, train_scan, sums) if train_scan and sums else None,
                masks=masks(views, part, scan.layer.taps_per_input),
                effects=effects(ablation, ablated[part.channel], views)
                if ablation and part.channel in ablated
                else None,
                semantics=material.semantics.get(part.channel),
            )
        )
    bare = [str(section.number) for section in sections if section.bars is None]
    if train_scan and bare:
        notes.append(
            f"The input channels of channel {', '.join(bare)} are left out: the training scan has "
            "no image of a concept."
        )
    return tuple(sections), notes


def _notes(material: Material, has_images: bool) -> list[str]:
    """Say what is left out and why, and what to beware of."""
    train_scan, evaluation = material.train_scan, material.evaluation
    notes = [material.found.note] if material.found.note else []
    if material.broken:
        images = count(len(material.broken), "validation image")
        notes.append(f"{images} could not be read; all figures are without.")
    if _too_many_thresholds(material):
        notes.append("Other thresholds are left out: there are too many choices for a page.")
    if train_scan is not None and train_scan.manifest.data == material.scan.manifest.data:
        notes.append(
            "Training and validation images are the same, so the measures flatter the split."
        )
    if not material.found.concepts:
        return notes
    if material.split is None:
        return [*notes, "Details of the channels are left out: no split was given."]
    if evaluation is None:
        notes.append("Measures and the output check are left out: no evaluation was given.")
    else:
        if evaluation.output is None:
            notes.append("The output check is left out: the evaluation compared no outputs.")
        if any(channel.separation_error_rectified is None for channel in evaluation.channels):
            notes.append("Rectified errors are left out: they need a scan with positions.")
        if evaluation.ablation is None:
            notes.append("Nothing was switched off: the evaluation holds no ablation.")
        elif len(material.ablated) < len(material.parts):
            notes.append(
                f"Only {len(material.ablated):,} of {count(len(material.parts), 'channel')} were "
                "switched off, those with the lowest cosines unless chosen otherwise."
            )
        if evaluation.semantics is None:
            notes.append("Semantic measures are left out: the evaluation holds none.")
    if train_scan is None:
        notes.append("Input channels are left out: no training scan was given.")
    if not has_images:
        notes.append("Pictures are left out: no data set was given.")
    features = material.features
    if features is None:
        notes.append("Feature visualisations are left out: none were given.")
    else:
        missing = {part.channel for part in material.parts} - set(features.channels)
        if missing:
            why = "for want of time" if features.left_out else "none were given"
            images = count(len(missing), "channel")
            notes.append(f"Feature visualisations of {images} are left out: {why}.")
    if material.positions is None:
        notes.append("Where channels answer is left out: no scan with positions was given.")
    return notes


def _channel_rows(material: Material, shown: set[int]) -> tuple[ChannelRow, ...]:
    concepts = {**material.found.concepts, **{p.channel: p.concepts for p in material.parts}}
    measures = material.measures
    # What has a section is listed in any case.
    first = sorted(concepts, key=lambda channel: (channel not in shown, *material.rank(channel)))
    rows = []
    for channel in sorted(first[:MAX_LISTED], key=material.rank):
        known = measures.get(channel)
        rows.append(
            ChannelRow(
                number=channel,
                concepts=concept_views(material.found, concepts[channel][:_MAX_CHIPS]),
                n_more=max(0, len(concepts[channel]) - _MAX_CHIPS),
                cosine=material.lowest.get(channel),
                chance=chance(material.found, material.clearest.get(channel)),
                agreement=material.found.agreement.get(channel),
                error=known.separation_error if known else None,
                rectified=known.separation_error_rectified if known else None,
                shown=channel in shown,
            )
        )
    return tuple(rows)
