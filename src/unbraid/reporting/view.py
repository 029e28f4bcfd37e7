"""What the whole page shows, as plain data: no image is read and no markup is written here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from unbraid.base.errors import UsageError
from unbraid.base.tables import count
from unbraid.finding.arv import class_sums
from unbraid.finding.findings import ConceptKind, Findings, Pair
from unbraid.finding.thresholds import Cell
from unbraid.measuring.evaluate import gather_responses, intervals
from unbraid.measuring.reference_images import ALIKE, reference_images
from unbraid.measuring.results import Evaluation, Responses
from unbraid.networks.spec import LayerSpec
from unbraid.reporting.channel import (
    ChannelView,
    ConceptView,
    bars,
    by_class,
    concept_views,
    densities,
    effects,
    first_images,
    masks,
    missing,
    reference_rows,
    ridges,
    scatter,
)
from unbraid.reporting.charts import svg, text, units
from unbraid.reporting.material import Material
from unbraid.reporting.words import ABSENT, bounded, isolate, number, percent, shorten, significant
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import ChannelSplit

# The list of pairs, and how sure each cosine is.


MAX_LISTED = 1000  # lines of each list; a real layer can have a hundred thousand pairs


@dataclass(frozen=True)
class Chance:
    """How far chance could have moved a cosine."""

    low: float | None  # 95 % interval, None where nothing can be said
    high: float | None
    uncertain: bool  # whether it could have moved it across gamma


@dataclass(frozen=True)
class PairRow:
    """One line of the list of pairs."""

    channel: int
    names: tuple[str, str]
    cosine: float
    chance: Chance | None
    uses: tuple[float, float]
    halves: tuple[float, float]  # nan for a single image
    shown: bool  # whether the channel has a section


def chance(found: Findings, pair: Pair | None) -> Chance | None:
    """Say how sure a pair's cosine is; None if there is no pair, or it is one of clusters."""
    if pair is None or pair.class1 in found.clusters:
        return None
    if math.isnan(pair.low):
        return Chance(None, None, found.uncertain(pair))
    return Chance(pair.low, pair.high, found.uncertain(pair))


def pair_rows(found: Findings, shown: Set[int]) -> tuple[PairRow, ...]:
    """List the pairs with the lowest cosines, `MAX_LISTED` at most, lowest first.

    Args:
        found: what they were found by.
        shown: channels that have a section.
    """
    return tuple(
        PairRow(
            channel=pair.channel,
            names=(bounded(found.name(pair.class1)), bounded(found.name(pair.class2))),
            cosine=pair.cosine,
            chance=chance(found, pair),
            uses=(pair.use1, pair.use2),
            halves=(pair.half1, pair.half2),
            shown=pair.channel in shown,
        )
        for pair in sorted(found.pairs, key=_last_if_unknown)[:MAX_LISTED]
    )


def _last_if_unknown(pair: Pair) -> float:
    return math.inf if math.isnan(pair.cosine) else pair.cosine


# Maps of what each choice of thresholds finds: one per p, a row per tau, a column per gamma.


_LEFT, _TOP = 54.0, 40.0  # room for the thresholds' values
_WIDE, _HIGH, _GAP = 53.0, 33.0, 2.0  # from one cell to the next, and between them
_PALEST, _STRONGEST = 0.1, 0.5  # shades on which the text's colour can still be read


@dataclass(frozen=True)
class Tile:
    """One choice of thresholds."""

    cell: Cell
    shade: float  # 0 where nothing is found, else more for more channels, on a log scale
    chosen: bool

    @property
    def words(self) -> str:
        """What it finds."""
        channels = count(self.cell.n_channels, "channel")
        return f"{channels}, {count(self.cell.n_pairs, 'pair')}"


@dataclass(frozen=True)
class Map:
    """All choices with one p; rows by tau, columns by gamma."""

    p: float
    rows: tuple[tuple[Tile, ...], ...]

    @property
    def has_chosen(self) -> bool:
        """Whether the page's own choice is in it."""
        return any(tile.chosen for tiles in self.rows for tile in tiles)


def maps(material: Material) -> tuple[Map, ...]:
    """Arrange what other thresholds find; nothing if it was not counted."""
    counted, found = material.sensitivity, material.found
    if counted is None:
        return ()
    chosen = (found.tau, found.p, found.gamma)
    largest = max(cell.n_channels for cell in counted.cells)

    def tile(tau: float, p: float, gamma: float) -> Tile:
        cell = counted.at(tau, p, gamma)
        shade = math.log1p(cell.n_channels) / math.log1p(max(1, largest))
        return Tile(cell, shade, (tau, p, gamma) == chosen)

    return tuple(
        Map(
            p, tuple(tuple(tile(tau, p, gamma) for gamma in counted.gammas) for tau in counted.taus)
        )
        for p in counted.ps
    )


def draw(data: Map) -> Markup:
    """Draw a map: the number of channels as shade and figure, of pairs as a small figure."""
    n_columns = len(data.rows[0])
    width = _LEFT + n_columns * _WIDE
    parts = [text("label", _LEFT + n_columns * _WIDE / 2, 13, "gamma", "middle")]
    parts.append(text("label", _LEFT - 8, 31, "tau", "end"))
    for column, tile in enumerate(data.rows[0]):
        middle = _LEFT + (column + 0.5) * _WIDE
        parts.append(text("value", middle, 31, f"{tile.cell.gamma:g}", "middle"))
    for row, tiles in enumerate(data.rows):
        y = _TOP + row * _HIGH
        parts.append(text("value", _LEFT - 8, y + 20, f"{tiles[0].cell.tau:g}", "end"))
        parts += [_tile(tile, _LEFT + column * _WIDE, y) for column, tile in enumerate(tiles)]
    numbers = [tile.cell.n_channels for tiles in data.rows for tile in tiles]
    title = (
        f"Polysemantic channels by tau and gamma at p {data.p:g}, from {min(numbers):,} to "
        f"{max(numbers):,}; the table below has all numbers"
    )
    return svg(title, _TOP + len(data.rows) * _HIGH, parts, width)


def _tile(tile: Tile, x: float, y: float) -> Markup:
    """Draw one cell, with its numbers in words for those who point at it."""
    cell = tile.cell
    middle, wide, high = x + _WIDE / 2, _WIDE - _GAP, _HIGH - _GAP
    kind = f"tile{' some' if cell.n_channels else ''}{' chosen' if tile.chosen else ''}"
    opacity = _PALEST + (_STRONGEST - _PALEST) * tile.shade if cell.n_channels else 1.0
    parts = [
        Markup(
            '<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="3" fill-opacity="{:.2f}"/>'
        ).format(kind, units(x + _GAP / 2), units(y + _GAP / 2), units(wide), units(high), opacity),
        text(
            "count" if cell.n_channels else "count none",
            middle,
            y + (15 if cell.n_channels else 20),
            f"{cell.n_channels:,}",
            "middle",
        ),
    ]
    if cell.n_pairs:
        parts.append(text("value", middle, y + 27, _short(cell.n_pairs), "middle"))
    words = f"tau {cell.tau:g}, p {cell.p:g}, gamma {cell.gamma:g}: {tile.words}"
    return Markup("<g><title>{}</title>{}</g>").format(words, Markup("").join(parts))


def _short(number: int) -> str:
    """Write a number in the room of a cell.

    >>> _short(2841), _short(220_153), _short(499_500_000)
    ('2,841', '220k', '500M')
    """
    if number < 100_000:
        return f"{number:,}"
    return f"{number / 1e3:.0f}k" if number < 10_000_000 else f"{number / 1e6:.0f}M"


# The page's figures at the top and its list of settings, in words.


_LONGEST = 2000  # characters of a setting, such as a preprocessing with many steps


@dataclass(frozen=True)
class Fact:
    """One figure at the top of the page."""

    value: str
    label: str
    note: str


def facts(material: Material) -> tuple[Fact, ...]:
    """Choose the figures at the top: what was found, what was made of it, how well."""
    scan, found = material.scan, material.found
    split, evaluation = material.split, material.evaluation
    n_channels = f"of {count(scan.layer.n_out, 'channel')}{_at_thresholds(material)}"
    what = "chosen channel" if material.chosen else "polysemantic channel"
    what += "" if len(found.concepts) == 1 else "s"
    facts = [Fact(f"{len(found.concepts):,}", what, n_channels)]
    if not found.concepts:
        return tuple(facts)
    note = f"lowest cosine {number(min(material.lowest.values(), default=None))}"
    agreement = found.known_agreement
    if agreement:
        note += f"; agreement with classes {number(sum(agreement) / len(agreement))}"
    facts.append(Fact(f"{len(found.pairs):,}", f"pairs of {found.kind}", note))
    if split is not None:
        n_concepts = sum(len(part.concepts) for part in split.channels)
        facts.append(
            Fact(f"{n_concepts:,}", "concept channels", f"method: {_in_words(split.method)}")
        )
    if evaluation is None:
        return tuple(facts)
    output = output_figures(evaluation)
    if output:
        note = f"top-1 {output['before']} before, {output['after']} after"
        if output["before"] == ABSENT:
            note = f"same first choice in {output['agreement']} of the images"
        facts.append(Fact(output["difference"], "largest logit difference", note))
    errors = evaluation.summary[evaluation.method]
    note = "ideal 0; halving a channel gives 0.5"
    if evaluation.baseline is not None:
        before = evaluation.baseline.summary[evaluation.baseline.method]["separation_error"]
        note = f"{_in_words(evaluation.baseline.method)} rule: {number(before)}; ideal 0"
    facts.append(Fact(number(errors["separation_error"]), "mean separation error", note))
    return tuple(facts)


def _in_words(method: str) -> str:
    return bounded(method.replace("_", " "))


def _at_thresholds(material: Material) -> str:
    """Name what decided; concepts that the user named took no threshold."""
    found = material.found
    if material.chosen:
        return ""
    if found.kind == "clusters":
        return f" at gamma {found.gamma:g}"
    return f" at tau {found.tau_in_words}, p {found.p:g}, gamma {found.gamma:g}"


def output_figures(evaluation: Evaluation | None) -> dict[str, str] | None:
    """Write the output check's figures, None if there was none."""
    if evaluation is None or evaluation.output is None:
        return None
    output = evaluation.output
    return {
        "difference": significant(output.max_abs_logit_diff, 2),
        "agreement": percent(output.top1_agreement, 1),
        "before": percent(output.top1_before, 1),
        "after": percent(output.top1_after, 1),
    }


def settings(material: Material) -> tuple[tuple[str, str], ...]:
    """List thresholds, network, data and versions, all that it takes to do it again."""
    scan, found, split = material.scan, material.found, material.split
    manifest = scan.manifest
    rows: dict[str, str] = {"concepts": found.kind}
    if found.kind == "classes":
        rows |= {"tau": found.tau_in_words, "p": f"{found.p:g}"}
    rows["gamma"] = f"{found.gamma:g}"
    if split is not None:
        rows["method"] = split.method
    rows["labels"] = manifest.labels
    network = manifest.source.get("model")
    if isinstance(network, str):
        rows["network"] = network
    rows["layer"] = _describe(scan.layer)
    rows["weights hash"] = manifest.weights
    rows["number format"] = manifest.dtype
    scans = (
        ("validation", scan, material.broken),
        ("training", material.train_scan, material.train_broken),
    )
    for name, one, broken in scans:
        if one is not None:
            rows[f"{name} images"] = _images(one, broken)
            rows[f"{name} data fingerprint"] = one.manifest.data
    rows["preprocessing"] = manifest.preprocessing or "unknown"
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in manifest.versions.items())
    return tuple((key, bounded(value, _LONGEST)) for key, value in rows.items())


def _images(scan: Scan, broken: list[int]) -> str:
    manifest = scan.manifest
    text = f"{manifest.n_images - len(broken):,}"
    if manifest.classes is not None:
        text += f" of {count(len(manifest.classes), 'class', 'classes')}"
    if broken:
        left_out = count(len(broken), "broken image")
        places = ", ".join(map(str, broken[:10])) + (" …" if len(broken) > 10 else "")
        text += f"; {left_out} left out (places {places})"
    return text


def _describe(layer: LayerSpec) -> str:
    shape = f"{layer.name}: {layer.kind}, {layer.n_in:,} → {layer.n_out:,} channels"
    if layer.channels_last:
        return shape
    kernel = " x ".join(map(str, layer.kernel))
    groups = f", {layer.groups} groups" if layer.groups > 1 else ""
    return f"{shape}, kernel {kernel}{groups}"


def how_divided(info: Mapping[str, Any]) -> dict[str, str]:
    """Tell how a channel's masks were chosen, without what only says that the solver is done."""
    return {
        bounded(key): bounded(f"{value:.4g}" if isinstance(value, float) else str(value))
        for key, value in info.items()
        if key != "kkt_residual"
    }


# What the whole page shows, as plain data: no image is read and no markup is written here.


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
        sums = class_sums(train_scan, [], found.clusters)
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
