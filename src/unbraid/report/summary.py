"""The page's figures at the top and its list of settings, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unbraid.evaluation import Evaluation
from unbraid.layers import LayerSpec
from unbraid.records import Scan
from unbraid.report.material import Material
from unbraid.report.text import ABSENT, bounded, number, percent, significant
from unbraid.tables import count

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
