"""What a scan costs beside bare inference.

    python benchmarks/scan.py            # also three layers, and the published per-image step
    python benchmarks/scan.py command    # the command beside inference as a script of one's own
    python benchmarks/scan.py layouts    # kinds of networks, channels last to not so
    python benchmarks/scan.py formats    # bfloat16 and channels last, in inference and in a scan
    python benchmarks/scan.py files      # JPEG files, and what reading them costs alone

All ways take turns over the same images; with `command` each is a process of its own, as memory is
kept for all of a process, and its clock starts when everything is imported. Random images in memory
go through ResNet-50 with random weights, layer4.2.conv3. JPEG files are drawn, of 500 x 375 pixels
and about 110 kB as ImageNet's are on average, and go through --network. Processor time is that of
workers too.
Needs nothing but unbraid, and for lite0 what lite0.py names.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import pstats
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

import unbraid
from published import published_image_step
from synthetic import RandomImages
from timing import (
    alone,
    in_turn,
    median,
    peak_memory,
    print_head,
    print_row,
    ratios,
    seconds,
    spread,
)
from unbraid.cli import make, shared
from unbraid.finding.arv import class_cosines, class_sums
from unbraid.images.open import images_for, open_images
from unbraid.networks.formats import faster_channels_last
from unbraid.networks.models import imagenet_transform, load_model
from unbraid.scanning.scan_options import ScanOptions

LAYERS = {"resnet18": "layer4.1.conv2", "resnet50": "layer4.2.conv3", "lite0": "_conv_head"}
OWN = {"lite0": f"{Path(__file__).parent}/lite0.py:network"}  # others are torchvision's
THREE = ["layer4.0.conv3", "layer4.1.conv3", LAYERS["resnet50"]]
BATCH = 32
KINDS = (
    *("torchvision:resnet18", "torchvision:resnext50_32x4d", "torchvision:densenet121"),
    *("torchvision:squeezenet1_1", "torchvision:mobilenet_v2", "torchvision:efficientnet_b0"),
    *("torchvision:shufflenet_v2_x1_0", "torchvision:regnet_x_400mf", "torchvision:vit_b_32"),
    *("torchvision:swin_t", "torchvision:convnext_tiny", "timm:poolformer_s12", "timm:resnest14d"),
)
GRAIN = 25  # of 255; with it files are as large as those of ImageNet

Ways = dict[str, Callable[[], object]]


def infer(model: nn.Module, images: Dataset[Any], workers: int = 0, autocast: bool = False) -> None:
    """Plain inference."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for batch, _ in DataLoader(images, batch_size=BATCH, num_workers=workers):
            model(batch)


def scan(model: nn.Module, layer: str | list[str], images: Dataset[Any], **options: Any) -> int:
    """The whole of unbraid's pass, hashing and writing included; bytes of its shards."""
    with tempfile.TemporaryDirectory() as out:
        unbraid.scan(model, layer, images, out, batch_size=BATCH, **options)
        return sum(file.stat().st_size for file in Path(out).rglob("shard-*"))


def publish(model: nn.Module, images: Dataset[Any]) -> None:
    """The published step: the graph goes all the way down to the image."""
    layer = model.get_submodule(LAYERS["resnet50"])
    for batch, labels in DataLoader(images, batch_size=BATCH):
        published_image_step(model, layer, batch, labels)


def read(images: Dataset[Any], workers: int) -> None:
    """Read and preprocess, and nothing else."""
    for _ in DataLoader(images, batch_size=BATCH, num_workers=workers):
        pass


def memory_ways(model: nn.Module, images: Dataset[Any]) -> Ways:
    """A scan beside what else may be done to images in memory."""
    return {
        "inference": partial(infer, model, images),
        "scan": partial(scan, model, LAYERS["resnet50"], images),
        "three layers": partial(scan, model, THREE, images),
        "published": partial(publish, model, images),
    }


def format_ways(model: nn.Module, images: Dataset[Any]) -> Ways:
    """Inference and a scan in each number and memory format."""
    ways: Ways = {}
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for name, autocast, network in (
        ("", False, model),
        (", channels last", False, last),
        (", bfloat16", True, model),
        (", bfloat16, channels last", True, last),
    ):
        ways[f"inference{name}"] = partial(infer, network, images, autocast=autocast)
        options = {"autocast": autocast, "channels_last": network is last}
        ways[f"scan{name}"] = partial(scan, model, LAYERS["resnet50"], images, **options)
    return ways


def compare_layouts(rounds: int) -> None:
    """Print how long kinds of networks take channels last, to what they take as they come."""
    unbraid.keep_memory()
    print_head("network", "ms an image", "channels last", "ratio", "chosen")
    for name in KINDS:
        model, images = load_model(name, "random").model, torch.randn(4, 3, 224, 224)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        with torch.no_grad():
            ways = {"as it comes": partial(model, images), "last": partial(last, images)}
            taken = in_turn(ways, rounds, aloud=False)
        one, other = (250 * min(processor for _, processor in own) for own in taken.values())
        cells = f"{one:.1f}", f"{other:.1f}", f"{other / one:.2f}"
        print_row(name, *cells, "yes" if faster_channels_last(model) else "no")


def file_ways(model: nn.Module, layer: str, images: Dataset[Any], workers: int) -> Ways:
    """A scan of files beside inference over the same loader."""
    return {
        "inference": partial(infer, model, images, workers),
        "scan": partial(scan, model, layer, images, workers=workers),
        "reading": partial(read, images, workers),
    }


def command_ways(name: str, folder: Path, out: Path, threads: int) -> Ways:
    """A scan by the command, beside inference by a script and a scan before memory was kept."""
    weights = None if name in OWN else "random"
    network = shared.Network(model=OWN.get(name, f"torchvision:{name}"), weights=weights)

    def script() -> None:
        torch.set_num_threads(threads)
        loaded = load_model(network.model, network.weights)
        with torch.no_grad():
            for batch, _ in DataLoader(ImageFolder(folder, loaded.transform), batch_size=BATCH):
                loaded.model(batch)

    def before() -> None:
        loaded = load_model(network.model, network.weights)
        images, _ = images_for(loaded, str(folder))
        old = {"channels_last": False, "batch_size": 64, "threads": threads}
        unbraid.scan(loaded.model, LAYERS[name], images, out / "before", **old)

    def scan(to: str, autocast: bool) -> None:
        options = ScanOptions(threads=threads, autocast=autocast)
        asked = {"layer": [LAYERS[name]], "data": str(folder), "out": out / to}
        make.scan(network=network, **asked, options=options)

    own = {"scan": partial(scan, "scan", False), "scan bfloat16": partial(scan, "bfloat16", True)}
    return {"inference": script, "scan before": before, **own}


def compare_command(asked: argparse.Namespace, folder: Path, out: Path) -> None:
    """Run the ways by turns, each in a process of its own, and print a table."""
    print_head("threads", "way", "wall, s", "to inference's", "processor, s", "ratio", "peak, GiB")
    for threads in asked.threads:
        ways = ("inference", "scan before", "scan", "scan bfloat16")
        taken: dict[str, list[list[float]]] = {way: [] for way in ways}
        for number in range(asked.rounds):
            for way in taken if number % 2 == 0 else reversed(taken):
                shutil.rmtree(out / way.removeprefix("scan "), ignore_errors=True)
                given = ("--folder", folder, "--out", out, "--only", way, "--threads", threads)
                line = alone(__file__, "command", "--network", asked.network, *given)
                taken[way].append(list(map(float, line.split())))
        least = {
            way: [min(column) for column in zip(*rows, strict=True)] for way, rows in taken.items()
        }
        base = least["inference"]
        for way, (wall, processor, _) in least.items():
            ratio = f"{wall / base[0]:.3f}", f"{processor:.1f}", f"{processor / base[1]:.3f}"
            peak = max(row[2] for row in taken[way])
            print_row(threads, way, f"{wall:.1f}", *ratio, f"{peak:.2f}")
        for other in ("scan", "bfloat16"):
            apart = cosine_difference(out / "before", out / other)
            print(f"Cosines of two classes, {other} to before: {apart:.1e} apart at most")


def cosine_difference(*folders: Path) -> float:
    """How far cosines of ARVs of two classes, at any channel, lie apart in two scans."""
    found = []
    for folder in folders:
        scan = unbraid.open_scan(folder)
        sums, classes = class_sums(scan, [0.01]), sorted(scan.labels_seen())
        channels = range(scan.layer.n_out)
        found.append(torch.stack([class_cosines(scan, sums, o, classes) for o in channels]))
    return float((found[0] - found[1]).abs().max())


def draw_pictures(folder: Path, n_images: int) -> None:
    """Draw JPEG pictures with something to decode: smooth colours and some grain."""
    random = np.random.default_rng(0)
    for n in range(n_images):
        coarse = random.integers(0, 255, (9, 9, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC))
        grain = random.normal(0, GRAIN, smooth.shape)
        path = folder / str(n % 10) / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("memory", "command", "layouts", "formats", "files")
    parser.add_argument("what", nargs="?", choices=kinds, default="memory")
    parser.add_argument("--images", type=int, default=256, help="drawn; not with --folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network", choices=LAYERS, help="for files and command")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="for command")
    parser.add_argument("--folder", type=Path, help="pictures in class folders, for command")
    parser.add_argument("--workers", type=int, default=0, help="for files")
    parser.add_argument("--profile", action="store_true", help="where a scan's time goes")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.manual_seed(0)
    if asked.what == "layouts":
        compare_layouts(asked.rounds)
        return
    if asked.what == "command":
        asked.network = asked.network or "resnet50"
        if asked.only:
            ways = command_ways(asked.network, asked.folder, asked.out, asked.threads[0])
            wall, processor = seconds(ways[asked.only])
            print(f"\n{wall} {processor} {peak_memory()}")
            return
        with tempfile.TemporaryDirectory() as drawn:
            if asked.folder is None:
                asked.folder = Path(drawn) / "pictures"
                draw_pictures(asked.folder, asked.images)
            compare_command(asked, asked.folder, Path(drawn))
        return
    name = asked.network or "resnet18" if asked.what == "files" else "resnet50"
    weights = None if name in OWN else "random"
    model = load_model(OWN.get(name, f"torchvision:{name}"), weights, "cpu").model
    with tempfile.TemporaryDirectory() as folder:
        if asked.what == "files":
            draw_pictures(Path(folder), asked.images)
            images: Any = open_images(folder, imagenet_transform())
            ways = file_ways(model, LAYERS[name], images, asked.workers)
        else:
            images = RandomImages(asked.images)
            ways = (memory_ways if asked.what == "memory" else format_ways)(model, images)
        if asked.only:
            ways[asked.only]()
            print(peak_memory())
            return
        if asked.profile:
            with cProfile.Profile() as profile:
                ways["scan"]()
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)
            return
        taken = in_turn(ways, asked.rounds)
        n_bytes = scan(model, LAYERS[name], images) if asked.what == "memory" else 0
    print_head("way", "images/s", "wall time to inference's", "processor time", "peak memory, GiB")
    for way, times in taken.items():
        spreads = [spread(ratios(times, taken["inference"], kind)) for kind in (0, 1)]
        peak = ""
        if asked.what == "memory":
            few = min(asked.images, 2 * BATCH)
            peak = f"{float(alone(__file__, '--only', way, '--images', few)):.2f}"
        print_row(way, f"{asked.images / median(times, 0):.1f}", *spreads, peak)
    if n_bytes:
        print(f"\nBytes written per image by the scan: {n_bytes / asked.images:.0f}")


if __name__ == "__main__":
    main()
