"""What the whole page shows, as plain data: no image is read and no markup is written here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from unbraid.base.errors import UsageError
from unbraid.base.tables import count
from unbraid.finding.arv import class_sums
from unbraid.finding.findings import Findings, Pair
from unbraid.finding.thresholds import Cell, Sensitivity
from unbraid.measuring.evaluate import gather_responses, intervals
from unbraid.measuring.reference_images import ALIKE, reference_images
from unbraid.measuring.results import ChannelEvaluation, Responses
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
    missing_concepts,
    reference_rows,
    ridges,
    scatter,
)
from unbraid.reporting.material import Material
from unbraid.reporting.words import ABSENT, bounded, isolate, number, percent, shorten, significant
from unbraid.splitting.splits import ChannelSplit

N_IMAGES = 8  # reference images of a channel
MAX_ROWS = 300  # of reference images; with two concepts or more, at most 100 channels
MAX_LISTED = 1000  # lines of each list; a real layer can have a hundred thousand pairs
_MAX_CELLS = 2000  # choices of thresholds
_MAX_TEXT = 2000  # characters of a note or a setting, such as a preprocessing with many steps
_MAX_WORDS = 4000  # characters of names that a channel is found by
_MAX_CHIPS = 26  # concepts of a channel in the list


@dataclass(frozen=True)
class ChannelRow:
    """One line of the list of channels."""

    number: int
    concepts: tuple[ConceptView, ...]  # the first of them
    n_more: int  # concepts
    lowest: Pair | None  # the pair with the lowest cosine
    agreement: float | None  # of clusters with classes
    measures: ChannelEvaluation | None

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
    found: Findings
    hint: str  # what comes nearest, if nothing was found
    facts: tuple[tuple[str, str, str], ...]  # at the top: figure, what it is, a note
    predicted: bool  # whether labels are the network's
    chosen: bool  # whether the user named the concepts
    n_found: int  # channels
    n_split: int
    n_concepts: int
    output: dict[str, str] | None
    overview: tuple[ChannelRow, ...]
    pairs: tuple[Pair, ...]
    channels: tuple[ChannelView, ...]
    notes: tuple[str, ...]  # what is left out and why, and what to beware of
    settings: dict[str, str]
    table_tau: str  # smallest share for an image to count in the published table
    n_images: int  # that reference images are chosen from
    sensitivity: Sensitivity | None  # what other thresholds find


def build_page(material: Material, *, has_images: bool, title: str | None) -> Page:
    """Work out what the page shows; without a title, its heading names the layer."""
    scan, found, parts = material.scan, material.found, material.parts
    shown = _within_limits(parts)
    channels, notes = _channels(material, shown)
    name, counted = scan.layer.name, material.sensitivity
    if counted is not None and len(counted.cells) > _MAX_CELLS:
        notes.insert(0, "Other thresholds are left out: there are too many choices for a page.")
        counted = None
    named = name if name.startswith("layer") else f"layer {name}"
    return Page(
        title=bounded(title or f"Polysemantic channels of {named}"),
        layer=scan.layer,
        found=found,
        hint=bounded(found.hint, _MAX_TEXT),
        facts=_facts(material),
        predicted=scan.manifest.labels == "predicted",
        chosen=material.chosen,
        n_found=len(found.concepts.keys() | {part.channel for part in parts}),
        n_split=len(parts),
        n_concepts=sum(len(part.concepts) for part in parts),
        output=_output(material),
        overview=_overview(material, shown),
        pairs=tuple(sorted(found.pairs, key=_last_if_unknown)[:MAX_LISTED]),
        channels=channels,
        notes=tuple(bounded(note, _MAX_TEXT) for note in (*_notes(material, has_images), *notes)),
        settings={k: bounded(v, _MAX_TEXT) for k, v in _settings(material).items()},
        table_tau=f"{material.evaluation.tau:g}" if material.evaluation else "",
        n_images=scan.manifest.n_images - len(material.broken),
        sensitivity=counted,
    )


def _within_limits(parts: Sequence[ChannelSplit]) -> list[ChannelSplit]:
    n_rows = accumulate(1 + len(part.concepts) for part in parts)
    return [p for p, n in zip(parts, n_rows, strict=True) if n <= MAX_ROWS or p is parts[0]]


def _last_if_unknown(pair: Pair) -> float:
    return math.inf if math.isnan(pair.cosine) else pair.cosine


def _channels(
    material: Material, parts: Sequence[ChannelSplit]
) -> tuple[tuple[ChannelView, ...], list[str]]:
    """Describe the channels shown in full, and say what had to be left out of them."""
    if material.split is None:
        return (), []
    notes = []
    scan, found, train_scan = material.scan, material.found, material.train_scan
    evaluation = material.evaluation
    split = replace(material.split, channels=tuple(parts))
    top, ids = reference_images(scan, split, n=N_IMAGES, alike=ALIKE), scan.ids()
    absent = {channel: missing_concepts(images) for channel, images in top.items()}
    firsts = first_images(scan, split, {c: gone for c, gone in absent.items() if gone})
    responses: dict[int, Responses] = {}
    try:
        responses = evaluation.responses if evaluation else gather_responses(split, scan)
    except UsageError as error:
        notes.append(f"Densities are left out: {error}")
    ablation, semantics = (evaluation.ablation, evaluation.semantics) if evaluation else (None,) * 2
    sums = class_sums(train_scan, [], found.clusters) if train_scan else None
    channels, bare = [], []
    for part in parts:
        channel, views = part.channel, concept_views(found, part.concepts)
        known = responses.get(channel)
        classes = by_class(found, views, known) if known else []
        sources = None
        if train_scan and sums:
            try:
                sources = bars(split, part, train_scan, sums)
            except UsageError:
                bare.append(str(channel))
        first = {k: one for (c, k), one in firsts.items() if c == channel}
        off, lowest = material.ablated.get(channel), material.lowest.get(channel)
        masks = part.masks.double().view(len(views), -1, scan.layer.taps_per_input)
        channels.append(
            ChannelView(
                number=channel,
                concepts=views,
                info=_how_split(part.info),
                cosine=lowest.cosine if lowest else None,
                rows=reference_rows(found, views, top[channel], ids, first),
                measures=material.measures.get(channel),
                intervals=intervals(known) if known else None,
                densities=densities(known) if known else None,
                ridges=ridges(classes, known) if known else None,
                scatter=scatter(classes, known) if known else None,
                bars=sources,
                kept=masks.mean(2).numpy(),
                effects=effects(ablation, off, views) if ablation and off else None,
                semantics=semantics.channels.get(channel) if semantics else None,
            )
        )
    if bare:
        notes.append(
            f"The input channels of channel {', '.join(bare)} are left out: the training scan has "
            "no image of a concept."
        )
    return tuple(channels), notes


def _how_split(info: Mapping[str, Any]) -> dict[str, str]:
    """Tell how a channel's masks were chosen, without what only says that the solver is done."""
    return {
        bounded(key): bounded(f"{value:.4g}" if isinstance(value, float) else str(value))
        for key, value in info.items()
        if key != "kkt_residual"
    }


def _overview(material: Material, shown: Sequence[ChannelSplit]) -> tuple[ChannelRow, ...]:
    """List the channels, those shown in full in any case, lowest cosine first."""
    found = material.found
    concepts = {**found.concepts, **{part.channel: part.concepts for part in material.parts}}
    in_full = {part.channel for part in shown}
    first = sorted(concepts, key=lambda channel: (channel not in in_full, material.rank(channel)))
    return tuple(
        ChannelRow(
            number=channel,
            concepts=concept_views(found, concepts[channel][:_MAX_CHIPS]),
            n_more=max(0, len(concepts[channel]) - _MAX_CHIPS),
            lowest=material.lowest.get(channel),
            agreement=found.agreement.get(channel),
            measures=material.measures.get(channel),
        )
        for channel in sorted(first[:MAX_LISTED], key=material.rank)
    )


def shade_of(counted: Sensitivity, cell: Cell) -> int:
    """How strong the colour of a choice of thresholds is, 0 to 9, by the log of its channels."""
    largest = max(1, *(cell.n_channels for cell in counted.cells))
    return round(9 * math.log1p(cell.n_channels) / math.log1p(largest))


# --- figures at the top, notes and settings, in words ---------------------------------------------


def _facts(material: Material) -> tuple[tuple[str, str, str], ...]:
    """Choose the figures at the top: what was found, what was made of it, how well."""
    found, split, evaluation = material.found, material.split, material.evaluation
    thresholds = f" at tau {found.tau_in_words}, p {found.p:g}, gamma {found.gamma:g}"
    if found.kind == "clusters":
        thresholds = f" at gamma {found.gamma:g}"
    if material.chosen:
        thresholds = ""
    n, n_out = len(found.concepts), material.scan.layer.n_out
    what = "chosen channel" if material.chosen else "polysemantic channel"
    what += "" if n == 1 else "s"
    facts = [(f"{n:,}", what, f"of {count(n_out, 'channel')}{thresholds}")]
    if not found.concepts:
        return tuple(facts)
    note = (
        f"lowest cosine {number(min((p.cosine for p in material.lowest.values()), default=None))}"
    )
    if agreement := found.known_agreement:
        note += f"; agreement with classes {number(sum(agreement) / len(agreement))}"
    facts.append((f"{len(found.pairs):,}", f"pairs of {found.kind}", note))
    if split is not None:
        n_concepts = sum(len(part.concepts) for part in split.channels)
        note = f"method: {_method(split.method)}"
        facts.append((f"{n_concepts:,}", "concept channels", note))
    if evaluation is None:
        return tuple(facts)
    if output := _output(material):
        note = f"top-1 {output['before']} before, {output['after']} after"
        if output["before"] == ABSENT:
            note = f"same first choice in {output['agreement']} of the images"
        facts.append((output["difference"], "largest logit difference", note))
    note, baseline = "ideal 0; halving a channel gives 0.5", evaluation.baseline
    if baseline is not None:
        before = baseline.summary[baseline.method]["separation_error"]
        note = f"{_method(baseline.method)} rule: {number(before)}; ideal 0"
    error = evaluation.summary[evaluation.method]["separation_error"]
    facts.append((number(error), "mean separation error", note))
    return tuple(facts)


def _method(name: str) -> str:
    return bounded(name.replace("_", " "))


def _output(material: Material) -> dict[str, str] | None:
    """Write the output check's figures, None if there was none."""
    output = material.evaluation.output if material.evaluation else None
    if output is None:
        return None
    return {
        "difference": significant(output.max_abs_logit_diff, 2),
        "agreement": percent(output.top1_agreement, 1),
        "before": percent(output.top1_before, 1),
        "after": percent(output.top1_after, 1),
    }


def _notes(material: Material, has_images: bool) -> list[str]:
    """Say what is left out and why, and what to beware of."""
    train_scan, evaluation, features = material.train_scan, material.evaluation, material.features
    notes = [material.found.note] if material.found.note else []
    if material.broken:
        images = count(len(material.broken), "validation image")
        notes.append(f"{images} could not be read; all figures are without.")
    if train_scan is not None and train_scan.manifest.data == material.scan.manifest.data:
        notes.append(
            "Training and validation images are the same, so the measures flatter the split."
        )
    if not material.found.concepts:
        return notes
    if material.split is None:
        return [*notes, "Details of the channels are left out: no split was given."]
    n, n_off, known = len(material.parts), len(material.ablated), evaluation
    missing = {part.channel for part in material.parts} - set(features.channels if features else ())
    why = "for want of time" if features and features.left_out else "none were given"
    left_out = {
        "Measures and the output check are left out: no evaluation was given.": not known,
        "The output check is left out: the evaluation compared no outputs.": (
            known and known.output is None
        ),
        "Rectified errors are left out: they need a scan with positions.": (
            known and any(c.separation_error_rectified is None for c in known.channels)
        ),
        "Nothing was switched off: the evaluation holds no ablation.": (
            known and known.ablation is None
        ),
        f"Only {n_off:,} of {count(n, 'channel')} were switched off, those with the lowest cosines "
        "unless chosen otherwise.": known and known.ablation and n_off < n,
        "Semantic measures are left out: the evaluation holds none.": (
            known and known.semantics is None
        ),
        "Input channels are left out: no training scan was given.": train_scan is None,
        "Pictures are left out: no data set was given.": not has_images,
        "Feature visualisations are left out: none were given.": features is None,
        f"Feature visualisations of {count(len(missing), 'channel')} are left out: {why}.": (
            features is not None and missing
        ),
        "Where channels answer is left out: no scan with positions was given.": (
            material.positions is None
        ),
    }
    return [*notes, *(note for note, holds in left_out.items() if holds)]


def _settings(material: Material) -> dict[str, str]:
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
    if isinstance(manifest.source.get("model"), str):
        rows["network"] = manifest.source["model"]
    rows["layer"] = _layer(scan.layer)
    rows |= {"weights hash": manifest.weights, "number format": manifest.dtype}
    for name, one in (("validation", scan), ("training", material.train_scan)):
        if one is None:
            continue
        broken, classes = one.broken(), one.manifest.classes
        images = f"{one.manifest.n_images - len(broken):,}"
        if classes is not None:
            images += f" of {count(len(classes), 'class', 'classes')}"
        if broken:
            places = ", ".join(map(str, broken[:10])) + (" …" if len(broken) > 10 else "")
            images += f"; {count(len(broken), 'broken image')} left out (places {places})"
        rows |= {f"{name} images": images, f"{name} data fingerprint": one.manifest.data}
    rows["preprocessing"] = manifest.preprocessing or "unknown"
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in manifest.versions.items())
    return rows


def _layer(layer: LayerSpec) -> str:
    shape = f"{layer.name}: {layer.kind}, {layer.n_in:,} → {layer.n_out:,} channels"
    if layer.channels_last:
        return shape
    groups = f", {layer.groups} groups" if layer.groups > 1 else ""
    return f"{shape}, kernel {' x '.join(map(str, layer.kernel))}{groups}"
