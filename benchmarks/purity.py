"""Whether concept channels answer to their concepts alone, beside other ways and controls.

    python benchmarks/purity.py                              # the embedded demo
    python benchmarks/purity.py --network lite0 --data DIR   # pictures in DIR/train and DIR/val
    python benchmarks/purity.py --network 3x3 wide           # those of benchmarks/split.py

All ways work on the same layer, channels and concepts, found and fitted on training images, and are
measured on the same held-out images in one run. Prints Markdown: a table of figures, and one of
differences, with 95 % intervals by drawing channels again (paired).

`lite0` needs what `benchmarks/lite0.py` says; DIR holds class folders, or Fashion-MNIST as IDX
files. The rest: `pip install unbraid[benchmarks]`; what is not installed is left out, with a word.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
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
import purity_measures as measures
import unbraid
from even_share import fit_even_share
from interpretability import Embedded
from lite0 import LAYER as LITE0_LAYER
from lite0 import load_lite0
from pipeline import Setting, setting_of
from rivals import (
    Autoencoder,
    Images,
    Linear,
    Pure,
    Sparse,
    cluster_references,
    fit_probe,
    match_clusters,
    match_units,
    of_masks,
    train_autoencoder,
)
from split import fashion_setting
from timing import print_head, print_row
from train_demo import DEBIAN_FOLDER
from truth import different_jobs
from unbraid.finding.findings import Findings
from unbraid.images.dataset import picture_of
from unbraid.images.open import open_images
from unbraid.measuring.mimic_and_silence import mimic_error, separation_error
from unbraid.measuring.semantics import MonosemanticitySums
from unbraid.networks.layers import resolve_layer
from unbraid.networks.spec import channels_first
from unbraid.splitting.splits import Split

N_DRAWS = 3  # of concepts at random
N_OUTPUTS = 64  # held-out images on which outputs are compared
PICTURES = {"tau": 0.01, "p": 0.5, "gamma": 0.5}  # thresholds that find something in a few classes
UNBRAID, PUBLISHED, EVEN = "unbraid", "published rule", "unbraid before (even share)"
PERMUTED, SHUFFLED = "control: masks permuted", "control: concepts shuffled"

Fitted = Linear | Pure | Sparse
Fit = Callable[[Images, Findings], Fitted]
PER_CONCEPT = ("R-precision", "AUROC", "retention", "mimic", "off", "MS", "C2", "MIS", "MIS solved")
PER_CHANNEL = ("coverage", "coverage of top 1 %", "explained", "separation", "rectified")
MARGIN = "margin"
Figures = dict[str, dict[int, list[float]]]  # by measure and channel


@dataclass
class Way:
    """A way to get concept channels, and what came of it."""

    fit: Fit
    figures: Figures = field(default_factory=dict)
    seconds: float = 0.0
    n_bytes: int = 0
    output: str = "-"
    planted: dict[int, list[float]] = field(default_factory=dict)


@dataclass
class Held:
    """Held-out images, and what an encoder makes of them."""

    images: Images
    embedded: Embedded


def picture_setting(folder: Path) -> Setting:
    """EfficientNet-Lite0 and photographs in class folders, in its own preprocessing."""
    model = load_lite0()
    size = v2.Resize(224, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    values = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.498] * 3, [0.502] * 3)]
    transform = v2.Compose([v2.PILToTensor(), size, *values])
    parts = [open_images(folder / part, transform, outputs=model) for part in ("train", "val")]
    return Setting("lite0", model, LITE0_LAYER, *parts, PICTURES, 64)


def load_setting(name: str, data: Path, cache: Path) -> Setting:
    """The network and images of one name."""
    if name == "lite0" and (data / "val").is_dir():
        return picture_setting(data)
    return setting_of(name, data) if name in ("demo", "lite0") else fashion_setting(name, data, cache)


def scans_of(setting: Setting, folder: Path) -> list[unbraid.Scan]:
    """Scan training and held-out images with positions, or open what is there already."""
    scans = []
    for name, images in (("train", setting.train), ("val", setting.val)):
        if not (folder / name / "manifest.json").exists():
            options: dict[str, Any] = {"positions": True, "batch_size": setting.batch_size}
            unbraid.scan(setting.model, setting.layer, images, folder / name, **options)
        scans.append(unbraid.open_scan(folder / name))
    return scans


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


# Ways: each from training images and findings to units of all channels.


def fit_whole(train: Images, found: Findings) -> Fitted:
    """The channel itself in every concept's place."""
    n_taps = train.scan.layer.n_taps
    return of_masks(train.scan, {o: torch.ones(len(c), n_taps) for o, c in found.concepts.items()}, 0)


def fit_split(train: Images, found: Findings, method: str) -> Fitted:
    """What `unbraid.split` makes of it; the published rule chooses its own rho."""
    split = unbraid.split(train.scan, found, method=method)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "split.safetensors"
        split.save(path)
        n_bytes = path.stat().st_size
    return of_masks(train.scan, {p.channel: p.masks for p in split.channels}, n_bytes, split)


class EvenShare:
    """The first version, whose penalty is chosen on the concepts found and kept for all others."""

    penalty: float | None = None

    def __call__(self, train: Images, found: Findings) -> Fitted:
        """Fit."""
        masks, self.penalty = fit_even_share(train.scan, found, self.penalty)
        return of_masks(train.scan, masks, sum(4 * m.numel() for m in masks.values()))


def permuted(fitted: Linear, train: Images, seed: int = 0) -> Linear:
    """The same masks on other inputs, each concept's drawn on its own."""
    draw = torch.Generator().manual_seed(seed)
    layer, masks = train.scan.layer, {}
    for channel, rows in fitted.rows.items():
        weight = train.scan.weight[channel].double()
        mask = torch.where(weight != 0, rows / weight, 1.0).view(len(rows), layer.n_in, -1)
        orders = [torch.randperm(layer.n_in, generator=draw) for _ in rows]
        masks[channel] = torch.stack([m[n] for m, n in zip(mask, orders, strict=True)]).flatten(1)
    return of_masks(train.scan, masks, fitted.n_bytes)


class PureClusters:
    """PURE, whose clusters know of no concepts; so they are made once."""

    centres: dict[int, Tensor] | None = None

    def __call__(self, train: Images, found: Findings) -> Fitted:
        """Cluster, and match clusters to concepts."""
        if self.centres is None:
            self.centres = cluster_references(train, found)
        return match_clusters(train, found, self.centres)


class SparseUnits:
    """A sparse autoencoder, which knows of no concepts; so it is trained once."""

    def __init__(self, n_units: int, top_k: int) -> None:
        """Note its size."""
        self.n_units, self.top_k = n_units, top_k
        self.autoencoder: Autoencoder | None = None

    def __call__(self, train: Images, found: Findings) -> Fitted:
        """Train, and match units to concepts."""
        if self.autoencoder is None:
            self.autoencoder = train_autoencoder(train, self.n_units, self.top_k)
        return match_units(train, found, self.autoencoder)


def ways_for(n_out: int) -> dict[str, Way]:
    """All ways, controls apart."""
    n_units, top_k = max(256, 2 * n_out), max(4, min(32, n_out // 4))
    fits: dict[str, Fit] = {
        "whole channel": fit_whole,
        PUBLISHED: partial(fit_split, method="published"),
        EVEN: EvenShare(),
        UNBRAID: partial(fit_split, method="least_squares"),
        "linear probe": fit_probe,
        "PURE's clusters": PureClusters(),
        f"sparse autoencoder, TopK {top_k} of {n_units}": SparseUnits(n_units, top_k),
    }
    return {name: Way(fit) for name, fit in fits.items()}


def shuffled(found: Findings, classes: list[int], seed: int) -> Findings:
    """Concepts of the same sizes, of classes drawn at random for each channel."""
    draw, concepts = random.Random(seed), {}
    for channel, own in sorted(found.concepts.items()):
        drawn = iter(draw.sample(classes, sum(map(len, own))))
        concepts[channel] = tuple(tuple(next(drawn) for _ in concept) for concept in own)
    return replace(found, concepts=concepts)


# Figures


def measure(fitted: Fitted, found: Findings, held: Held) -> Figures:
    """All measures of all channels on held-out images."""
    figures: Figures = {name: {} for name in (*PER_CONCEPT, *PER_CHANNEL)}
    for channel, concepts in found.concepts.items():
        own = measure_channel(fitted, channel, held, held.images.concept(concepts))
        for name, values in own.items():
            figures[name][channel] = values
    return figures


def measure_channel(
    fitted: Fitted, channel: int, held: Held, concept: Tensor
) -> dict[str, list[float]]:
    """All measures of one channel; NaN for what a way has not."""
    images, embedded = held.images, held.embedded
    z, new = images.response(channel), fitted.pooled(channel, images)
    maps = fitted.maps(channel, images)  # (N, K, P)
    positive = maps.clamp(min=0).sum(2, dtype=torch.float64)
    sums = MonosemanticitySums()
    sums.add(positive, embedded.whole)
    figures: dict[str, list[float]] = {name: [] for name in PER_CONCEPT}
    figures["MS"] = sums.scores().tolist()
    for k, score in enumerate(new.T):
        own = concept == k
        figures["R-precision"].append(measures.r_precision(score, own))
        figures["AUROC"].append(measures.auroc(score, own))
        figures["off"].append(measures.off_concept(score, own))
        figures["retention"].append(measures.retention(z, score, own))
        figures["mimic"].append(mimic_error(z, score, own))
        patches = interpretability.onto_grid(maps[:, k], images.grid, embedded.grid)
        figures["C2"].append(interpretability.c2_score(positive[:, k], patches, embedded))
        probability, solved = interpretability.mis(score, embedded.whole)
        figures["MIS"].append(probability)
        figures["MIS solved"].append(solved)
    whole = torch.einsum("njp,j->np", images.taps, images.scan.weight[channel].float())
    rectified = (whole + float(images.scan.bias[channel])).clamp(min=0).sum(1, dtype=torch.float64)
    some = concept >= 0
    figures["explained"] = [measures.explained_share(z, new)]
    figures["separation"] = [separation_error(z[some], new[some], concept[some])]
    figures["rectified"] = [separation_error(rectified[some], positive[some], concept[some])]
    if not fitted.in_units:
        for name in ("retention", "mimic", "explained", "separation", "rectified"):
            figures[name] = [float("nan")] * len(figures[name])
    for name, value in zip(PER_CHANNEL, measures.coverage(z, concept), strict=False):
        figures[name] = [value]
    return figures


def precision(fitted: Fitted, found: Findings, images: Images) -> dict[int, list[float]]:
    """R-precision alone."""
    return {
        o: [
            measures.r_precision(score, images.concept(concepts) == k)
            for k, score in enumerate(fitted.pooled(o, images).T)
        ]
        for o, concepts in found.concepts.items()
    }


def averaged(draws: list[dict[int, list[float]]]) -> dict[int, list[float]]:
    """Mean over draws, of each concept."""
    return {o: torch.tensor([d[o] for d in draws]).mean(0).tolist() for o in draws[0]}


def less(one: Mapping[int, list[float]], other: Mapping[int, list[float]]) -> dict[int, list[float]]:
    """Differences, of each concept."""
    return {o: [a - b for a, b in zip(own, other[o], strict=True)] for o, own in one.items()}


def compare(
    setting: Setting, train: Images, held: Held, found: Findings, folder: Path
) -> dict[str, Way]:
    """Fit and measure all ways and controls."""
    ways = ways_for(train.scan.layer.n_out)
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

    spec = unbraid_spec(changed, setting.layer)
    layer.register_forward_hook(reconstruct)
    return changed


def unbraid_spec(model: nn.Module, name: str) -> Any:
    """What a layer computes."""
    from unbraid.networks.layers import describe

    return describe(*resolve_layer(model, name))


def plant(train: Images, ways: dict[str, Way], n_sets: int) -> None:
    """Give back channels whose weights were added into one: correlations by number of concepts."""
    weight, bias = train.scan.weight, train.scan.bias
    for n_concepts in (2, 3, 5):
        for _, channels, classes in different_jobs(train.scan, n_concepts)[:n_sets]:
            place, together = channels[0], list(channels)
            one = replace(train.scan, weight=weight.clone(), bias=bias.clone())
            one.weight[place], one.bias[place] = weight[together].sum(0), bias[together].sum()
            images = replace(train, scan=one)
            found = unbraid.find(one, channels={place: [[c] for c in classes]})
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
        cells = []
        for column in columns:
            figures = way.figures.get(column)
            middle = "median" if column == "retention" else "mean"
            cells.append(figure(measures.bootstrap(figures, middle=middle)[0] if figures else None))
        r = [sum(own) / len(own) for own in way.planted.values()]
        planted = " / ".join(map(figure, r)) or "-"
        fit = f"{way.seconds:.1f}" if way.seconds else "-"
        print_row(name, *cells, planted, way.output, fit, way.n_bytes or "-")


def print_differences(ways: dict[str, Way]) -> None:
    """Print differences to the published rule and, of unbraid, to controls and first version."""
    columns = ("R-precision", MARGIN, *PER_CONCEPT[1:5], *PER_CHANNEL[2:], *PER_CONCEPT[5:])
    print("\nDifferences of means, with 95 % intervals over channels, paired")
    print_head("difference", *columns)
    pairs = [(name, PUBLISHED) for name in ways if name != PUBLISHED]
    pairs += [(UNBRAID, base) for base in ("whole channel", EVEN, PERMUTED, SHUFFLED)]
    pairs += [(PUBLISHED, base) for base in (PERMUTED, SHUFFLED)]
    for name, base in dict.fromkeys(pairs):
        cells = []
        for column in columns:
            own, other = (ways[n].figures.get(column) for n in (name, base))
            cells.append("-")
            if own and other:
                mean, low, high = measures.bootstrap(own, other)
                if mean == mean:
                    cells[-1] = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        print_row(f"{name} - {base}", *cells)


def figure(value: float | None) -> str:
    """Three digits behind the point, a dash for none."""
    return "-" if value is None or value != value else f"{value:.3f}"


def main() -> None:
    """Run what was asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=["demo"])
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER)
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
    parser.add_argument("--scans", type=Path, help="folder that keeps scans and embeddings")
    parser.add_argument("--channels", type=int, help="at most so many, evenly spaced")
    parser.add_argument("--planted", type=int, default=10, help="sets of planted channels")
    asked = parser.parse_args()
    for name in asked.network:
        setting = load_setting(name, asked.data, asked.cache)
        with tempfile.TemporaryDirectory() as folder:
            kept = asked.scans or Path(folder)
            scans = scans_of(setting, kept)
            found = unbraid.find(scans[0], **setting.thresholds)
            chosen = sorted(found.concepts.items())
            step = max(1, -(-len(chosen) // asked.channels)) if asked.channels else 1
            found = replace(found, concepts=dict(chosen[::step]))
            n_concepts = sum(map(len, found.concepts.values()))
            print(f"{len(found.concepts)} of {len(chosen)} channels, {n_concepts} concepts")
            train, images = map(Images.of, scans)
            held = Held(images, embed(setting, images, kept / "embedded.pt"))
            ways = compare(setting, train, held, found, Path(folder))
            print_figures(setting, ways, held.embedded.name, len(images.label))
            print_differences(ways)
            if asked.planted:
                plant(train, ways, asked.planted)
                print_figures(setting, ways, held.embedded.name, len(images.label))


if __name__ == "__main__":
    main()
