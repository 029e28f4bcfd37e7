"""The report: how large the file is, how soon a browser shows it, how often a picture comes twice.

    python benchmarks/report.py                          # the demo's page
    python benchmarks/report.py --pages lite0 hundred    # EfficientNet-Lite0, ImageNet weights
    python benchmarks/report.py --keep FOLDER            # also leave the pages there
    python benchmarks/report.py --duplicates demo lite0  # reference images instead

`lite0` is a whole run over crops of photographs, half of them to find and fit, half to measure,
with ablation, semantic measures and visualisations of all its channels. `hundred` is its first 100
channels, each split between the two photographs that drive it most, told apart or not, with
visualisations of few steps. Pages need `pip install playwright` and Chromium; `lite0` and `hundred`
also what `benchmarks/lite0.py` says.

Duplicates: of the rows of eight reference images of every split channel and concept channel, from
images that were not split by, pairs of pictures that look the same, judged without the network, by
the correlation of their thumbnails (grey, 16 pixels a side, the best of a few shifts and of both
ways around). Then copies planted on purpose: how many the layer sees more alike than the two
limits. The crops are shown with and without a word on which photograph each is of.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import unbraid
from lite0 import LAYER as LITE0_LAYER
from lite0 import Crops, crop_photographs, load_lite0
from timing import print_head, print_row
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.measuring.reference_images import ALIKE, COPY, TopImages, reference_images

N_LOADS = 7
QUICK = {"steps": 16, "size": (112, 112)}  # visualisations of a hundred channels
_TIMES = """() => {
    const page = performance.getEntriesByType('navigation')[0];
    const paint = performance.getEntriesByName('first-contentful-paint')[0];
    return [paint.startTime, page.domContentLoadedEventEnd, page.loadEventEnd];
}"""
SIDE, REACH = 16, 2  # pixels of a thumbnail, and of its shifts
N_COPIED = 200  # images
LIKE = (0.9, 0.95)  # correlations of thumbnails from which on pictures look the same


def lite0() -> tuple[nn.Module, Crops, Crops]:
    """The network, crops to find and fit with, crops to measure."""
    model = load_lite0()
    images = crop_photographs(model)
    return model, images.part(0), images.part(1)


def demo_page(folder: Path) -> Path:
    """The page of `unbraid demo`."""
    command = [sys.executable, "-m", "unbraid", "demo", "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "report.html"


def lite0_page(folder: Path) -> Path:
    """A page with all there is."""
    model, train, val = lite0()
    train_scan, val_scan = (
        unbraid.scan(model, LITE0_LAYER, images, folder / name, batch_size=24, positions=True)
        for name, images in (("train", train), ("val", val))
    )
    found = unbraid.find(train_scan, tau="auto")
    split = unbraid.split(train_scan, found)
    model2 = unbraid.apply(model, split)
    evaluation = unbraid.evaluate(
        split,
        val_scan,
        baseline=unbraid.split(train_scan, found, method="published"),
        output=unbraid.compare_outputs(model, model2, val, batch_size=24),
        ablation=unbraid.ablate(model2, val, batch_size=24),
        semantics=unbraid.measure_semantics(split, val_scan, val, unbraid.Penultimate(model)),
    )
    by_cosine = list(dict.fromkeys(pair.channel for pair in found.pairs))
    return unbraid.report(
        folder / "report.html",
        scan=val_scan,
        found=found,
        split=split,
        evaluation=evaluation,
        train_scan=train_scan,
        sensitivity=unbraid.sensitivity(train_scan, found=found),
        features=unbraid.visualize(model2, LITE0_LAYER, train, by_cosine),
        dataset=val,
        title="EfficientNet-Lite0 on crops of photographs",
    )


def hundred_page(folder: Path) -> Path:
    """A page of 100 channels."""
    model, train, _ = lite0()
    scan = unbraid.scan(model, LITE0_LAYER, train, folder / "s", batch_size=24, positions=True)
    records = list(scan.shards())
    pooled = torch.cat([r.pooled[:, 0] for r in records])
    labels = torch.cat([r.label for r in records])
    classes = labels.unique()
    means = torch.stack([pooled[labels == label].mean(0) for label in classes])  # (T, J)
    strongest = (means @ scan.weight[:100].T).topk(2, dim=0).indices.T  # (100, 2)
    chosen = {o: [[int(classes[a])], [int(classes[b])]] for o, (a, b) in enumerate(strongest)}
    found = unbraid.find(scan, channels=chosen)
    split = unbraid.split(scan, found)
    return unbraid.report(
        folder / "report.html",
        scan=scan,
        found=found,
        split=split,
        evaluation=unbraid.evaluate(split, scan),
        train_scan=scan,
        features=unbraid.visualize(unbraid.apply(model, split), LITE0_LAYER, train, **QUICK),
        dataset=train,
        title="A hundred channels of EfficientNet-Lite0",
    )


PAGES = {"demo": demo_page, "lite0": lite0_page, "hundred": hundred_page}


def load_times(file: Path) -> list[float]:
    """Milliseconds to the first paint, to a page that answers, and to the last picture."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        loads = []
        for _ in range(N_LOADS):
            page = browser.new_page()
            page.goto(file.resolve().as_uri())
            page.wait_for_timeout(200)  # until the paint is on record
            loads.append(page.evaluate(_TIMES))
            page.close()
        browser.close()
    return [statistics.median(column) for column in zip(*loads, strict=True)]


def cut(x: Tensor, part: float = 0.96) -> Tensor:
    """Enlarge the inner part of images (N, C, H, W)."""
    side = round(part * x.shape[-1])
    first = (x.shape[-1] - side) // 2
    inner = x[..., first : first + side, first : first + side]
    return F.interpolate(inner, x.shape[-2:], mode="bilinear", antialias=True)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {  # of images (N, C, H, W) from 0 to 1
    "noise of 1 %": lambda x: x + 0.01 * torch.randn_like(x),
    "10 % brighter": lambda x: 1.1 * x,
    "moved by 1/28": lambda x: x.roll(x.shape[-1] // 28, -1),
    "inner 96 %": cut,
    "mirrored": lambda x: x.flip(-1),
}


def correlations(images: Tensor) -> Tensor:
    """Correlation of each two images' thumbnails where they overlap, the best of shifts, (N, N)."""
    grey = images.mean(1, keepdim=True)
    small = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0]
    best = torch.full((len(small), len(small)), -1.0)
    shifts = range(-REACH, REACH + 1)
    for other in (small, small.flip(-1)):
        for down, right in ((down, right) for down in shifts for right in shifts):
            a, b = _part(small, down, right), _part(other, -down, -right)
            best = torch.maximum(best, a @ b.T)
    return torch.maximum(best, best.T)


def _part(small: Tensor, down: int, right: int) -> Tensor:
    rows = slice(max(0, down), SIDE + min(0, down))
    columns = slice(max(0, right), SIDE + min(0, right))
    values = small[:, rows, columns].flatten(1)
    return F.normalize(values - values.mean(1, keepdim=True), dim=1)


def describe(rows: Sequence[TopImages], every: Sequence[TopImages], x: Tensor) -> list[object]:
    """Cells of a kind of rows: how many pairs of pictures look the same, and what they excite."""
    same, n_pairs, strength = [0] * len(LIKE), 0, []
    for images, strongest in zip(rows, every, strict=True):
        pairs = torch.ones(len(images.index), len(images.index)).triu(1).bool()
        found = correlations(x[images.index])[pairs]
        n_pairs += len(found)
        same = [n + int((found > limit).sum()) for n, limit in zip(same, LIKE, strict=True)]
        strength.append(float(images.activation.mean() / strongest.activation.mean()))
    shown = [len(images.index) for images in rows]
    length = f"{sum(shown) / len(shown):.1f} (least {min(shown)})"
    return [length, *same, n_pairs, f"{100 * sum(strength) / len(strength):.0f} %"]


def copies(model: nn.Module, layer: str, x: Tensor, mean: Tensor) -> list[list[str]]:
    """Rows of the second table: how alike the layer sees images and their copies."""

    def directions(images: Tensor) -> Tensor:
        kept: list[Tensor] = []
        hook = model.get_submodule(layer).register_forward_pre_hook(
            lambda _, inputs: kept.append(inputs[0].flatten(2).sum(2))
        )
        with torch.no_grad():
            for some in images.split(24):
                model(some)
        hook.remove()
        return F.normalize(torch.cat(kept) - mean, dim=1)

    torch.manual_seed(0)
    x = x[torch.randperm(len(x))[:N_COPIED]]
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    original, rows = directions(x), []
    for name, change in CHANGES.items():
        changed = change((x - low) / (high - low)).clamp(0, 1) * (high - low) + low
        cosine = (directions(changed) * original).sum(1)
        parts = [f"{100 * float((cosine > limit).float().mean()):.0f} %" for limit in (ALIKE, COPY)]
        rows.append([name, f"{float(cosine.median()):.3f}", *parts])
    return rows


def measure_duplicates(name: str, folder: Path) -> list[list[str]]:
    """Print how often pictures come twice; return rows on copies. Both layers have kernel 1."""
    model, layer, tau = load_network(), LAYER, 0.03
    train: Dataset[Any] = load_images("train")
    shown: Dataset[Any] = load_images("test")
    if name == "lite0":
        model, train, shown = lite0()
        layer, tau = LITE0_LAYER, "auto"
    fitted = unbraid.scan(model, layer, train, folder / "a", batch_size=24)
    split = unbraid.split(fitted, unbraid.find(fitted, tau=tau))
    scans = {"that differ": unbraid.scan(model, layer, shown, folder / "b", batch_size=24)}
    if isinstance(shown, Crops):
        scans = {"that differ, a photograph once": scans["that differ"]}
        shown.groups = None
        scans["that differ"] = unbraid.scan(model, layer, shown, folder / "c", batch_size=24)
    x = torch.stack([shown[index][0] for index in range(len(shown))])
    scan = next(iter(scans.values()))

    def rows(of: unbraid.Scan, **options: Any) -> list[TopImages]:
        tops = reference_images(of, split, **options).values()
        return [images for top in tops for images in (top.original, *top.concepts)]

    every = rows(scan)
    print_row(name, "the strongest", *describe(every, every, x))
    for kind, own in scans.items():
        print_row(name, kind, *describe(rows(own, alike=ALIKE), every, x))
    mean = torch.cat([records.pooled.flatten(1) for records in scan.shards()]).mean(0)
    return [[name, *row] for row in copies(model, layer, x, mean)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=["demo"])
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--duplicates", nargs="+", choices=("demo", "lite0"))
    asked = parser.parse_args()
    if asked.duplicates:
        alike = [f"pairs alike ({limit})" for limit in LIKE]
        print_head("network", "images", "a row", *alike, "of pairs", "excite the channel")
        rows = []
        for name in asked.duplicates:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure_duplicates(name, Path(folder))
        print_head("network", "copy", "cosine, median", f"above {ALIKE}", f"above {COPY}")
        for row in rows:
            print_row(*row)
        return
    print_head("page", "channels", "MB", "first paint, ms", "answers, ms", "all loaded, ms")
    for name in asked.pages:
        with tempfile.TemporaryDirectory() as temporary:
            file = PAGES[name](Path(temporary) if asked.keep is None else asked.keep / name)
            n_articles = file.read_text(encoding="utf-8").count("<article ")
            times = [f"{t:.0f}" for t in load_times(file)]
            print_row(name, n_articles, f"{file.stat().st_size / 1e6:.2f}", *times)


if __name__ == "__main__":
    main()
