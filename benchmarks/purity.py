"""Whether concept channels answer to their concepts alone, beside other ways and controls.

    python benchmarks/purity.py                              # the embedded demo
    python benchmarks/purity.py --network lite0 --data DIR   # pictures in DIR/train and DIR/val
    python benchmarks/purity.py --network demo 1x1 3x3 linear wide jobs lite0  # as split.py has

All ways work on the same layer, channels and concepts, found and fitted on training images, and are
measured on the same held-out images in one run. Prints Markdown: a table of figures, and one of
differences, with 95 % intervals by drawing channels again (paired).

`lite0` needs what `benchmarks/lite0.py` says; DIR holds class folders, or Fashion-MNIST as IDX
files. The rest: `pip install -e ".[benchmarks]"`; what is not installed is left out, with a word.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.transforms import v2

import interpretability
import unbraid
from interpretability import Embedded
from lite0 import LAYER as LITE0_LAYER
from lite0 import load_lite0
from pipeline import Setting
from purity_measures import (
    PER_CHANNEL,
    PER_CONCEPT,
    Figures,
    Held,
    average,
    averaged,
    bootstrap,
    bootstrap_mean,
    less,
    measure,
    precision,
)
from purity_ways import (
    EVEN,
    PUBLISHED,
    UNBRAID,
    WHOLE,
    Fit,
    PureClusters,
    fit_whole,
    permuted,
    shuffled,
    ways_for,
)
from rivals import Fitted, Images, Linear, Pure, Sparse
from split import load_setting, scans_of
from timing import print_head, print_row
from train_demo import DEBIAN_FOLDER
from truth import different_jobs
from unbraid.finding.findings import Findings
from unbraid.images.dataset import picture_of
from unbraid.images.open import open_images
from unbraid.networks.layers import describe, resolve_layer
from unbraid.networks.spec import channels_first

N_DRAWS = 3  # of concepts at random
N_OUTPUTS = 64  # held-out images on which outputs are compared
PICTURES = {"tau": 0.01, "p": 0.5, "gamma": 0.5}  # thresholds that find something in a few classes
PERMUTED, SHUFFLED = "control: masks permuted", "control: concepts shuffled"
MARGIN = "margin"
MIDDLE = {"retention": "median"}  # as small responses rule the mean


@dataclass
class Way:
    """A way to get concept channels, and what came of it."""

    fit: Fit
    figures: Figures = field(default_factory=dict)
    seconds: float = 0.0
    n_bytes: int = 0
    output: str = "-"
    planted: dict[int, list[float]] = field(default_factory=dict)


def picture_setting(folder: Path) -> Setting:
    """EfficientNet-Lite0 and photographs in class folders, in its own preprocessing."""
    model = load_lite0()
    size = v2.Resize(224, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    values = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.498] * 3, [0.502] * 3)]
    transform = v2.Compose([v2.PILToTensor(), size, *values])
    parts = [open_images(folder / part, transform, outputs=model) for part in ("train", "val")]
    return Setting("lite0", model, LITE0_LAYER, *parts, PICTURES, 64)


def embed(setting: Setting, held: Images, path: Path) -> Embedded:
    """Embed held-out pictures, once; by the layer's own inputs where there is no encoder."""
    if path.exists():
        return Embedded(**torch.load(path))
    index = torch.cat(list(held.scan.columns("index"))).tolist()
    found = interpretability.embed([partial(_picture, setting.val, i) for i in index])
    if found is None:
        features = held.taps.unflatten(2, held.grid)
        return interpretability.embedded_by("the analysed layer's own inputs", features)
    torch.save(vars(found), path)
    return found


def _picture(images: Any, index: int) -> Image.Image:
    picture = picture_of(images, index)
    if picture is None:  # grey values around 0.5, as `lite0.Clothes` has them
        picture = v2.functional.to_pil_image((images[index][0] * 0.25 + 0.5).clamp(0, 1))
    return picture


def compare(setting: Setting, train: Images, held: Held, found: Findings) -> dict[str, Way]:
    """Fit and measure all ways and controls."""
    ways = {name: Way(fit) for name, fit in ways_for(train.scan.layer.n_out).items()}
    classes = sorted(train.scan.labels_seen())
    draws = [shuffled(found, classes, seed) for seed in range(N_DRAWS)]
    permutation, chance = Way(fit_whole), Way(fit_whole)
    for name, way in ways.items():
        start = time.perf_counter()
        try:
            fitted = way.fit(train, found)
        except ImportError as error:
            way.output = f"left out: {error.name} is not installed"
            continue
        way.seconds, way.n_bytes = time.perf_counter() - start, fitted.n_bytes
        way.figures = measure(fitted, found, held)
        way.output = output_of(setting, fitted)
        by_chance = [way.fit(train, drawn) for drawn in draws]
        r = [precision(f, d, held.images) for f, d in zip(by_chance, draws, strict=True)]
        way.figures[MARGIN] = less(way.figures["R-precision"], averaged(r))
        if name == UNBRAID:
            assert isinstance(fitted, Linear)
            permutation.figures = measure(permuted(fitted, train), found, held)
            other = [permuted(f, train) for f in by_chance if isinstance(f, Linear)]
            r = [precision(f, d, held.images) for f, d in zip(other, draws, strict=True)]
            permutation.figures[MARGIN] = less(permutation.figures["R-precision"], averaged(r))
            own = [measure(f, d, held) for f, d in zip(by_chance, draws, strict=True)]
            chance.figures = {m: averaged([draw[m] for draw in own]) for m in own[0]}
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return {**ways, PERMUTED: permutation, SHUFFLED: chance}


def output_of(setting: Setting, fitted: Fitted) -> str:
    """How far the network's logits move, and how often its top class stays."""
    if isinstance(fitted, Pure):
        return "0 (changes nothing)"
    step = max(1, len(setting.val) // N_OUTPUTS)  # type: ignore[arg-type]
    images = Subset(setting.val, range(0, len(setting.val), step))  # type: ignore[arg-type]
    changed: nn.Module
    if isinstance(fitted, Sparse):
        changed = _reconstructing(setting, fitted)
    elif fitted.split is not None:
        changed = unbraid.apply(setting.model, fitted.split)
    else:
        return "-"
    worst, n_same = 0.0, 0
    with torch.no_grad():
        for n in range(len(images)):
            image = images[n][0][None]
            before, after = setting.model(image), changed(image)
            worst = max(worst, float((before - after).abs().max()))
            n_same += int((before.argmax(1) == after.argmax(1)).all())
    return f"{worst:.2g} ({n_same / len(images):.0%} same top class)"


def _reconstructing(setting: Setting, fitted: Sparse) -> nn.Module:
    """The network with the autoencoder's reconstruction in place of the layer's output."""
    changed = copy.deepcopy(setting.model)
    layer = resolve_layer(changed, setting.layer)[1]

    def reconstruct(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        first = channels_first(spec, output).flatten(2)  # (N, C_out, P)
        rows = fitted.autoencoder.reconstruct(first.movedim(1, 2).flatten(0, 1))
        back = rows.unflatten(0, (len(first), -1))
        return back.reshape(output.shape) if spec.channels_last else back.mT.reshape(output.shape)

    spec = describe(*resolve_layer(changed, setting.layer))
    layer.register_forward_hook(reconstruct)
    return changed


def plant(train: Images, found: Findings, ways: dict[str, Way], n_sets: int) -> None:
    """Give back channels whose weights were added into one: correlations by number of concepts."""
    weight, bias = train.scan.weight, train.scan.bias
    for n_concepts in (2, 3, 5):
        for _, channels, classes in different_jobs(train.scan, n_concepts)[:n_sets]:
            place, together = channels[0], list(channels)
            one = replace(train.scan, weight=weight.clone(), bias=bias.clone())
            one.weight[place], one.bias[place] = weight[together].sum(0), bias[together].sum()
            images = replace(train, scan=one)
            found = replace(found, concepts={place: tuple((c,) for c in classes)})
            truth = [train.response(o) for o in channels]
            for name, way in ways.items():
                if not way.figures or name.startswith(("sparse", "control")):
                    continue
                fit = PureClusters() if isinstance(way.fit, PureClusters) else way.fit
                answers = fit(images, found).pooled(place, images)
                pairs = zip(truth, answers.T, strict=True)
                r = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
                way.planted.setdefault(n_concepts, []).extend(r)


# Tables


def print_figures(setting: Setting, ways: dict[str, Way], encoder: str, n_images: int) -> None:
    """Print what was measured, a row for each way."""
    print(
        f"\n{setting.name}, layer `{setting.layer}`, {n_images} held-out images; MS, C2 and MIS by "
        f"{encoder}; output: largest logit difference; bytes: of what is kept; planted r at K = 2, "
        "3, 5 (whole channel: unsplit)"
    )
    columns = ("R-precision", MARGIN, *PER_CONCEPT[1:5], *PER_CHANNEL, *PER_CONCEPT[5:])
    print_head("way", *columns, "planted r", "output", "fit, s", "bytes")
    for name, way in ways.items():
        fit = f"{way.seconds:.1f}" if way.seconds else "-"
        cells = [*main_cells(way, columns), planted_cell(way)]
        print_row(name, *cells, way.output, fit, way.n_bytes or "-")


def print_differences(ways: dict[str, Way]) -> None:
    """Print differences to the published rule and, of unbraid, to controls and first version."""
    columns = ("R-precision", MARGIN, *PER_CONCEPT[1:5], *PER_CHANNEL[2:], *PER_CONCEPT[5:])
    print("\nDifferences, with 95 % intervals over channels, paired")
    print_head("difference", *columns)
    pairs = [(name, PUBLISHED) for name in ways if name != PUBLISHED]
    pairs += [(UNBRAID, base) for base in (WHOLE, EVEN, PERMUTED, SHUFFLED)]
    pairs += [(PUBLISHED, base) for base in (PERMUTED, SHUFFLED)]
    for name, base in dict.fromkeys(pairs):
        cells = []
        for column in columns:
            own, other = (ways[n].figures.get(column) for n in (name, base))
            cells.append("-")
            if own and other:
                cells[-1] = difference(bootstrap(own, other, MIDDLE.get(column, "mean")))
        print_row(f"{name} - {base}", *cells)


def print_networks(results: dict[str, dict[str, Way]]) -> None:
    """Print the main figures of all networks, and differences to the published rule."""
    columns = ("R-precision", MARGIN, *PER_CONCEPT[1:5], "explained", "separation", "rectified")
    print("\nAll networks")
    print_head("network", "way", *columns, "planted r")
    for network, ways in results.items():
        for name, way in ways.items():
            if way.figures:
                print_row(network, name, *main_cells(way, columns), planted_cell(way))
    print("\nunbraid - published rule, with 95 % intervals over channels, paired")
    compared = (*columns[:3], "off", "separation", "rectified")
    print_head("network", *compared)
    pairs = {
        column: [
            (ways[UNBRAID].figures[column], ways[PUBLISHED].figures[column])
            for ways in results.values()
        ]
        for column in compared
    }
    for place, network in enumerate(results):
        print_row(network, *(difference(bootstrap(*pairs[column][place])) for column in compared))
    print_row("mean", *(difference(bootstrap_mean(pairs[column])) for column in compared))


def main_cells(way: Way, columns: Sequence[str]) -> list[str]:
    """Means over concepts or channels, of retention the median."""
    all_figures = [way.figures.get(column) for column in columns]
    return [
        figure(average(own, MIDDLE.get(column, "mean")) if own else None)
        for column, own in zip(columns, all_figures, strict=True)
    ]


def planted_cell(way: Way) -> str:
    """Mean correlations with planted channels, by number of concepts."""
    return " / ".join(figure(sum(own) / len(own)) for own in way.planted.values()) or "-"


def difference(found: tuple[float, float, float]) -> str:
    """A difference and its interval, a dash for none."""
    mean, low, high = found
    return "-" if mean != mean else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def figure(value: float | None) -> str:
    """Three digits behind the point, a dash for none."""
    return "-" if value is None or value != value else f"{value:.3f}"


def main() -> None:
    """Run what was asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=["demo"])
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER)
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
    parser.add_argument(
        "--scans", type=Path, help="folder that keeps scans and embeddings, by network"
    )
    parser.add_argument("--channels", type=int, help="at most so many, evenly spaced")
    parser.add_argument("--planted", type=int, default=10, help="sets of planted channels")
    asked = parser.parse_args()
    results = {}
    for name in asked.network:
        pictures = name == "lite0" and (asked.data / "val").is_dir()
        setting = (
            picture_setting(asked.data) if pictures else load_setting(name, asked.data, asked.cache)
        )
        with tempfile.TemporaryDirectory() as folder:
            kept = (asked.scans or Path(folder)) / name
            scans = scans_of(setting, kept)
            found = unbraid.find(scans[0], **setting.thresholds)
            chosen = sorted(found.concepts.items())
            step = max(1, -(-len(chosen) // asked.channels)) if asked.channels else 1
            found = replace(found, concepts=dict(chosen[::step]))
            n_concepts = sum(map(len, found.concepts.values()))
            print(f"{len(found.concepts)} of {len(chosen)} channels, {n_concepts} concepts")
            train, images = map(Images.of, scans)
            held = Held(images, embed(setting, images, kept / "embedded.pt"))
            ways = compare(setting, train, held, found)
            plant(train, found, ways, asked.planted)
            print_figures(setting, ways, held.embedded.name, len(images.label))
            print_differences(ways)
            results[name] = ways
    if len(results) > 1:
        print_networks(results)


if __name__ == "__main__":
    main()
