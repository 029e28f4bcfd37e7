"""The whole job for one layer: scan, find, split, apply, compare, evaluate, report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from unbraid.ablate import ablate
from unbraid.data import ImageFolder, name_of
from unbraid.errors import DataError, RunError
from unbraid.evaluate import evaluate
from unbraid.evaluation import Evaluation, read_ablation, read_output
from unbraid.files import write_whole
from unbraid.find import find
from unbraid.findings import Findings
from unbraid.output import compare_outputs
from unbraid.records import Scan, open_scan, read_manifest
from unbraid.report import report
from unbraid.scan import MIN_SHARE, scan
from unbraid.split import check_rho, split
from unbraid.splits import Split
from unbraid.surgery import apply
from unbraid.tables import count
from unbraid.thresholds import check_thresholds

MAX_ABLATED = 32  # channels; each takes a pass from the layer on per concept, and one for the whole

# Results, in the order of writing; the scans they were made from are kept apart.
_RESULTS = (
    "settings.json",
    "findings.csv",
    "split.safetensors",
    "split-published.safetensors",
    "evaluation.json",
    "report.html",
)


@dataclass(frozen=True)
class Thresholds:
    """When a channel counts as polysemantic; METHOD.md section 3."""

    tau: float = 0.03
    p: float = 0.75
    gamma: float = 0.5
    rho: float | None = None  # of the published baseline; None: chosen per channel


@dataclass(frozen=True)
class Loading:
    """How images go through the network."""

    batch_size: int = 64
    workers: int = 0
    skip_broken: bool = False


@dataclass(frozen=True)
class Run:
    """What a run leaves: also in its folder, as findings.csv and so on."""

    found: Findings
    evaluation: Evaluation | None  # None if nothing was found
    report: Path
    broken: list[str]  # images left out


def run(
    model: nn.Module,
    layer: str,
    train: Dataset[Any],
    val: Dataset[Any],
    out: Path,
    *,
    thresholds: Thresholds,
    loading: Loading,
    source: dict[str, Any],
    say: Callable[[str], None],
    title: str,
) -> Run:
    """Do everything for one layer; started again, finished scans are not repeated.

    Args:
        model: gives logits for a batch of images.
        layer: a `named_modules()` name.
        train: images to find and split with.
        val: images to evaluate on.
        out: the run's folder.
        thresholds: when a channel counts as polysemantic.
        loading: how images go through the network.
        source: how to find network and images again.
        say: told of each step.
        title: of the report.
    """
    check_thresholds(thresholds.tau, thresholds.p, thresholds.gamma, MIN_SHARE)
    check_rho(thresholds.rho)
    settings = {"title": title, "thresholds": vars(thresholds), "source": source}
    before = _read_settings(out)
    options = {**vars(loading), "progress": True, "source": source}
    train_scan = scan(model, layer, train, out / "scan-train", **options)
    val_scan = scan(model, layer, val, out / "scan-val", **options)
    # Only now is it sure that the folder is this network's and these images'.
    if before is not None and before != json.loads(json.dumps(settings)):
        _remove_results(out)
    found = find(train_scan, **{k: v for k, v in vars(thresholds).items() if k != "rho"})
    found.to_csv(out / "findings.csv")
    broken = [name_of(train, index) for index in train_scan.broken()]
    broken += [name_of(val, index) for index in val_scan.broken()]
    write_whole(out / "settings.json", (json.dumps(settings, indent=2) + "\n").encode())
    page = out / "report.html"
    if not found.concepts:
        report(page, scan=val_scan, train_scan=train_scan, found=found, dataset=val, title=title)
        return Run(found, None, page, broken)
    _refuse_unseen(val_scan, found)
    pairs, channels = count(len(found), "pair"), count(len(found.concepts), "channel")
    say(f"Found {pairs} in {channels}; scanning their classes again, with positions.")
    with_positions = {**options, "classes": found.classes, "positions": True}
    train_maps = _scan_positions(model, layer, train, out / "positions-train", with_positions)
    val_maps = _scan_positions(model, layer, val, out / "positions-val", with_positions)
    say("Splitting and checking the outputs.")
    divided = split(train_maps, found)
    divided.save(out / "split.safetensors")
    baseline = split(train_maps, found, method="published", rho=thresholds.rho)
    baseline.save(out / "split-published.safetensors")
    model2 = apply(model, divided)
    output = compare_outputs(model, model2, val, tolerance=0.0, progress=True, **vars(loading))
    ablated = _clearest(found)
    if len(ablated) < len(found.concepts):
        say(f"Switching off only the {len(ablated)} channels with the lowest cosines.")
    ablation = ablate(model2, val, channels=ablated, progress=True, **vars(loading))
    evaluation = evaluate(divided, val_maps, baseline=baseline, output=output, ablation=ablation)
    evaluation.save(out / "evaluation.json")
    report(
        page,
        scan=val_scan,
        train_scan=train_scan,
        found=found,
        split=divided,
        evaluation=evaluation,
        dataset=val,
        title=title,
    )
    return Run(found, evaluation, page, broken)


def report_again(out: Path) -> Path:
    """Write a finished run's report again from its folder.

    Raises:
        RunError: the folder holds no finished run.
    """
    settings = _read_settings(out)
    if settings is None:
        raise RunError(f"{out} holds no finished run; make one with `unbraid run`.")
    thresholds = Thresholds(**settings["thresholds"])
    source, title = settings["source"], settings["title"]
    train_scan, val_scan = open_scan(out / "scan-train"), open_scan(out / "scan-val")
    found = find(train_scan, tau=thresholds.tau, p=thresholds.p, gamma=thresholds.gamma)
    divided = evaluation = None
    if found.concepts:
        divided = Split.load(out / "split.safetensors")
        output = read_output(out / "evaluation.json")
        ablation = read_ablation(out / "evaluation.json")
        baseline = Split.load(out / "split-published.safetensors")
        val_maps = open_scan(out / "positions-val")
        evaluation = evaluate(
            divided, val_maps, baseline=baseline, output=output, ablation=ablation
        )
    return report(
        out / "report.html",
        scan=val_scan,
        train_scan=train_scan,
        found=found,
        split=divided,
        evaluation=evaluation,
        dataset=_validation_images(source, val_scan),
        title=title,
    )


def _read_settings(out: Path) -> dict[str, Any] | None:
    """Read a run's settings, None if there is no run.

    Raises:
        RunError: settings.json is something else.
    """
    path = out / "settings.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        Thresholds(**settings["thresholds"])
        settings["source"], settings["title"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not that of a run ({error!r}); name another folder.") from None
    return settings


def _remove_results(out: Path) -> None:
    """Remove the results of a run with other settings, so that a folder never mixes two."""
    for name in _RESULTS:
        (out / name).unlink(missing_ok=True)


def _validation_images(source: dict[str, Any], scan: Scan) -> Dataset[Any]:
    """Open a run's validation images again, for looking at.

    Raises:
        DataError: they are gone; a new page would lack the pictures that the old one has.
    """
    if "demo" in source:
        from unbraid.demo.network import load_images

        return load_images("test")
    return ImageFolder(Path(source["data"]) / "val", class_names=scan.class_names)


def _scan_positions(
    model: nn.Module, layer: str, dataset: Dataset[Any], folder: Path, options: dict[str, Any]
) -> Scan:
    """Scan with positions; input maps of other classes, from other thresholds, make room."""
    before = read_manifest(folder)
    if before is not None and before.classes != tuple(options["classes"]):
        shutil.rmtree(folder)
    return scan(model, layer, dataset, folder, **options)


def _clearest(found: Findings) -> list[int]:
    """The channels whose causal effect is measured, lowest cosine first."""
    by_cosine = dict.fromkeys(pair.channel for pair in found.pairs)
    return list(by_cosine | dict.fromkeys(found.channels))[:MAX_ABLATED]


def _refuse_unseen(val_scan: Scan, found: Findings) -> None:
    """Every class that uses a polysemantic channel must have validation images."""
    seen = val_scan.labels_seen()
    missing = [found.name(label) for label in found.classes if label not in seen]
    if missing:
        raise DataError(
            f"The validation images have none of class {', '.join(missing[:5])}, which uses a "
            "polysemantic channel; add some."
        )
