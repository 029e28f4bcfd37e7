"""What the whole page shows, as plain data: no image is read and no markup is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from unbraid.base.errors import UsageError
from unbraid.base.tables import count
from unbraid.finding.findings import Findings
from unbraid.finding.pairs import Pair
from unbraid.finding.sensitivity import Sensitivity
from unbraid.finding.thresholds import top_images
from unbraid.measuring.circuit_graph import CircuitGraph
from unbraid.measuring.compare import OutputComparison
from unbraid.measuring.results import ChannelAblation, ChannelEvaluation, Evaluation
from unbraid.networks.spec import LayerSpec
from unbraid.reporting.channel import ChannelView, channel_views
from unbraid.reporting.words import bounded, number, percent, significant
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import ChannelSplit, Split
from unbraid.visualizing.features import Features

MAX_ROWS = 300  # of reference images; with two concepts or more, at most 100 channels
MAX_TEXT = 2000  # characters of a note or a setting, such as a preprocessing with many steps
_MOST_TOLD = 5  # channels that a note names
MAX_CELLS = 2000  # choices of thresholds
LOW_ACCURACY = 0.5  # below it an image's class seldom is what the network sees in it


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
    circuits: Sequence[CircuitGraph] = ()
    command: str | None = None  # that made the run, empty if unknown; None where there is no run

    @cached_property
    def through(self) -> dict[int, CircuitGraph]:
        """Circuits through an earlier layer, by channel."""
        return {circuit.channel: circuit for circuit in self.circuits}

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
        """Whether the user named the concepts: else no pair lies above the threshold."""
        found = self.found
        return found.kind == "groups" or any(pair.cosine >= found.gamma for pair in found.pairs)

    @property
    def has_too_many_thresholds(self) -> bool:
        """Whether other thresholds have more choices than a page holds."""
        return self.sensitivity is not None and len(self.sensitivity.cells) > MAX_CELLS

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
        if self.split:
            self.split.require(self.scan)

        def network(scan: Scan) -> tuple[str, str]:
            return scan.manifest.weights, scan.layer.name

        here, counted, features = network(self.scan), self.sensitivity, self.features
        strange = {
            "training scan is": self.train_scan and network(self.train_scan) != here,
            "scan with positions is": self.maps and network(self.maps) != here,
            "sensitivity is": counted and (counted.weights, counted.layer) != here,
            "feature visualisations are": features and features.layer != here[1],
        }
        for what, holds in strange.items():
            if holds:
                raise UsageError(
                    f"The {what} of another network or layer than the validation scan; pass "
                    "those of one run."
                )
        concepts = {part.channel: range(len(part.concepts)) for part in self.parts}
        for circuit in self.circuits:
            ends = [node.part for node in circuit.nodes if node.column == 0]
            if circuit.layer != here[1] or not set(ends) <= set(concepts.get(circuit.channel, ())):
                raise UsageError(
                    "A circuit is not of this split (its channel or concepts differ); pass those "
                    "of one run."
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


class Fact(NamedTuple):
    """A figure at the top."""

    figure: str
    what: str
    note: str
    warns: bool = False


@dataclass(frozen=True)
class Page:
    """What the page shows beside its material."""

    title: str
    facts: Sequence[Fact]
    channels: Sequence[ChannelView]
    notes: Sequence[str]  # what is left out and why, and what to beware of
    settings: Mapping[str, str]
    sensitivity: Sensitivity | None  # what other thresholds find
    nearest: Sequence[tuple[tuple[int, ...], ...]]  # candidates' images, of both classes


def build_page(material: Material, *, has_images: bool, title: str | None) -> Page:
    """Work out what the page shows; without a title, its heading names the layer."""
    n_rows = accumulate(1 + len(part.concepts) for part in material.parts)
    shown = [p for p, n in zip(material.parts, n_rows, strict=True) if n <= MAX_ROWS]
    channels: list[ChannelView] = []
    notes = _notes(material, has_images)
    if material.split:
        split = replace(material.split, channels=tuple(shown or material.parts[:1]))
        channels, left_out = channel_views(
            split, material.found, material.scan, material.train_scan, material.evaluation
        )
        notes += left_out
    name = material.scan.layer.name
    named = name if name.startswith("layer") else f"layer {name}"
    return Page(
        title=bounded(title or f"Polysemantic channels of {named}"),
        facts=_facts(material),
        channels=channels,
        notes=[bounded(note, MAX_TEXT) for note in notes],
        settings={k: bounded(v, MAX_TEXT) for k, v in _settings(material).items()},
        sensitivity=None if material.has_too_many_thresholds else material.sensitivity,
        nearest=top_images(material.scan, material.found.nearest),
    )


def _facts(material: Material) -> list[Fact]:
    """Choose the figures at the top: what was found, what was made of it, how well."""
    found, split, evaluation = material.found, material.split, material.evaluation
    note = f"of {count(material.scan.layer.n_out, 'channel')}"
    if not material.chosen:
        tau = "" if found.sides != "classes" else f"tau {found.tau_in_words}, p {found.p:g}, "
        note += f" at {tau}gamma {found.gamma:g}"
    # What chance may have decided does not count.
    n = len(found.concepts) if material.chosen else len(found.sure_channels)
    n_unsure, kind = len(found.concepts) - n, "chosen" if material.chosen else "polysemantic"
    if n == 0 and n_unsure:
        n, kind, note = n_unsure, "uncertain", f"none is sure; {note}"
    elif n_unsure:
        note = f"and {n_unsure:,} uncertain; {note}"
    elif n == 0 and found.nearest:
        return [Fact(f"{len(found.nearest):,}", "nearest candidates", f"none passes; {note}")]
    what = f"{kind} channel{'' if n == 1 else 's'}"
    facts = [Fact(f"{n:,}", what, note)]
    if not found.concepts:
        return facts
    cosine = min((pair.cosine for pair in material.lowest.values()), default=None)
    note = f"lowest cosine {number(cosine)}"
    n_pairs = len(found.pairs) if material.chosen else found.n_sure
    n_unsure, kind = len(found.pairs) - n_pairs, "pair"
    if n_pairs == 0 and n_unsure:
        n_pairs, kind, note = n_unsure, "uncertain pair", f"none is sure; {note}"
    elif n_unsure:
        note = f"and {n_unsure:,} uncertain; {note}"
    if agreement := found.known_agreement:
        note += f"; agreement with classes {number(sum(agreement) / len(agreement))}"
    words = f"{kind}{'' if n_pairs == 1 else 's'} of {found.sides}"
    facts.append(Fact(f"{n_pairs:,}", words, note))
    if split is not None:
        note = f"method: {split.method.replace('_', ' ')}"
        facts.append(Fact(f"{material.n_concepts:,}", "concept channels", note))
    if evaluation is not None and (output := evaluation.output):
        note, what = "of all that the network puts out", "largest output difference"
        if output.top1_agreement is not None:
            note = f"same first choice in {percent(output.top1_agreement, 1)} of the images"
            what = "largest logit difference"
        facts.append(Fact(significant(output.max_abs_logit_diff, 2), what, note))
        facts += _accuracy(material, output)
    if evaluation is not None:
        note, baseline = "ideal 0; halving a channel gives 0.5", evaluation.baseline
        if baseline is not None:
            error = baseline.summary[baseline.method]["separation_error"]
            note = f"{baseline.method.replace('_', ' ')} rule: {number(error)}; ideal 0"
        error = evaluation.summary[evaluation.method]["separation_error"]
        facts.append(Fact(number(error), "mean separation error", note))
    return facts


def output_word(scan: Scan) -> str:
    """What the network puts out, for people: logits, unless its target is another."""
    return "logits" if scan.manifest.target == "label" else "outputs"


def _accuracy(material: Material, output: OutputComparison) -> list[Fact]:
    """How often the network is right, with a warning where classes then say little."""
    if output.top1_before is None or not material.scan.manifest.is_classified:
        return []
    after, note = percent(output.top1_after, 1), "the same when split"
    if output.top1_after != output.top1_before:
        note = f"{after} when split"
    low = output.top1_before < LOW_ACCURACY
    if low:
        note = f"low: check labels and preprocessing before you trust what follows; {note}"
    return [Fact(percent(output.top1_before, 1), "top-1 accuracy", note, low)]


def _notes(material: Material, has_images: bool) -> list[str]:
    """Say what is left out and why, and what to beware of."""
    train_scan, known, features = material.train_scan, material.evaluation, material.features
    notes = [material.found.note] if material.found.note else []
    if isinstance(divided := material.scan.manifest.source.get("divided"), str):
        notes.append(divided)
    if material.scan.manifest.places_of:
        notes.append(
            "What this page calls images are places in images: those that excite a channel most, "
            "one of an image at most, and some drawn evenly from all. A picture shows what lies "
            "around its place. Figures over all images are over these places."
        )
        notes += _tell_tokens(material)
    if material.broken:
        images = count(len(material.broken), "validation image")
        notes.append(f"{images} could not be read; all figures are without.")
    if material.has_too_many_thresholds:
        notes.append(
            "Other thresholds are left out: there are too many choices for a "
            "page. `unbraid sensitivity` counts what those find that you name."
        )
    if train_scan is not None and train_scan.manifest.data == material.scan.manifest.data:
        notes.append(
            "Training and validation images are the same, so the measures flatter the split."
        )
    if not material.found.concepts:
        return notes
    if material.split is None:
        return [*notes, "Details of the channels are left out: no split was given."]
    n, n_off, positions = len(material.parts), len(material.ablated), material.positions
    n_through = len(material.through)
    drawn = features.channels if features else ()
    missing = sum(part.channel not in drawn for part in material.parts)
    why = "for lack of time" if features and features.left_out else "none were given"
    none_why = "none were given"
    if material.command is not None:  # a run's page
        none_why = "the run was asked to leave them out, or could not make them"
    whole = not material.scan.manifest.places_of  # images, not places in them
    left_out: dict[str, Any] = {
        "Measures and the output check are left out: no evaluation was given.": not known
    }
    if known:
        shaped = [one.separation_error_rectified is not None for one in known.channels]
        left_out |= {
            "The output check is left out: the evaluation compared no outputs.": known.output
            is None,
            "Rectified errors are left out: they need a scan with positions.": whole
            and shaped
            and not any(shaped),
            f"Rectified errors of {count(shaped.count(False), 'channel')} are left out: the scan "
            "with positions lacks images of a concept.": any(shaped) and not all(shaped),
            **_of_samples(material, known),
            "R-precision and coverage are left out: the evaluation had a scan of some images "
            "only.": None in [channel.coverage for channel in known.channels],
            "Nothing was switched off: the evaluation holds no ablation.": whole
            and known.ablation is None
            and material.scan.manifest.has_shares,
            "Nothing was switched off, and no relevance for the output is told: the scan has no "
            "target.": whole and not material.scan.manifest.has_shares,
            "From places nothing is switched off, and there are no rectified errors and no "
            "semantic measures, which are of whole images.": not whole,
            f"Only {n_off:,} of {count(n, 'channel')} were switched off, those with the lowest "
            "cosines unless chosen otherwise.": known.ablation and n_off < n,
            "Semantic measures are left out: the evaluation holds none.": whole
            and known.semantics is None,
        }
    left_out |= {
        "Input channels are left out: no training scan was given.": train_scan is None,
        f"Circuits through an earlier layer are shown of {n_through:,} of {count(n, 'channel')}, "
        "those with the lowest cosines.": 0 < n_through < n,
        "Pictures are left out: no data set was given.": not has_images,
        f"Feature visualisations are left out: {none_why}.": features is None,
        f"Feature visualisations of {count(missing, 'channel')} are left out: {why}.": (
            features is not None and missing
        ),
        "Where channels answer is left out: no scan with positions was given.": whole
        and positions is None,
    }
    return [*notes, *(note for note, holds in left_out.items() if holds)]


def _tell_tokens(material: Material) -> list[str]:
    """Say which channels answer more to tokens that are no part of an image than to its places."""
    n_images = material.scan.peaks.sum(1)
    channels = [o for o in material.concepts if n_images[o]]
    if not channels:
        return []
    most = sorted(channels, key=lambda o: -int(n_images[o]))[:_MOST_TOLD]
    told = ", ".join(f"{o} (in {count(int(n_images[o]), 'image')})" for o in most)
    return [
        "CLS or a register answers more than every place of some images, of "
        f"{count(len(channels), 'channel')}, most of all {told}; their places do not tell of these."
    ]


def _of_samples(material: Material, known: Evaluation) -> dict[str, bool]:
    """Say which measures are of a sample of the images."""
    n_images, seen = material.n_images, known.semantics
    sizes = {
        "comparison of outputs": known.output and known.output.n_images,
        "channels switched off": known.ablation
        and sum(one.n_images for one in known.ablation.classes),
        "likeness of images": seen and next((one.n_images for one in seen.channels.values()), None),
    }
    told = {what: n for what, n in sizes.items() if n and n < n_images}
    if not told or material.scan.manifest.places_of:  # of so many images, not places
        return {}
    what, n = ", ".join(told), max(told.values())
    return {
        f"On a sample of {n:,} of {count(n_images, 'validation image')} only: {what}; rectified "
        "errors and places of answers are of some images too. All other measures are of all "
        "images. The same command with --all measures all.": True
    }


def _settings(material: Material) -> dict[str, str]:
    """List thresholds, network, data and versions, all that it takes to do it again."""
    scan, found, split = material.scan, material.found, material.split
    manifest = scan.manifest
    rows: dict[str, str] = {"concepts": found.kind}
    if found.sides == "classes":
        rows |= {"tau": found.tau_in_words, "p": f"{found.p:g}"}
    rows["gamma"] = f"{found.gamma:g}"
    if split is not None:
        rows["method"] = split.method
    rows["labels"] = manifest.labels
    if manifest.target != "label":
        rows["target"] = manifest.target
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
        what = "places in images" if one.manifest.places_of else "images"
        rows |= {f"{name} {what}": images, f"{name} data fingerprint": one.manifest.data}
        if len(one.parts) > 1:
            parts = (f"{part.path.name} ({part.manifest.n_images:,})" for part in one.parts)
            rows[f"{name} scans"] = ", ".join(parts)
    rows["preprocessing"] = manifest.preprocessing or "unknown"
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in manifest.versions.items())
    return rows


def _layer(layer: LayerSpec) -> str:
    shape = f"{layer.name}: {layer.kind}, {layer.n_in:,} → {layer.n_out:,} channels"
    if layer.channels_last:
        return shape
    groups = f", {layer.groups} groups" if layer.groups > 1 else ""
    return f"{shape}, kernel {' x '.join(map(str, layer.kernel))}{groups}"
