"""What a whole run costs beside one plain pass over the same images, and where its time goes.

    python benchmarks/run.py --data DIR                       # EfficientNet-Lite0
    python benchmarks/run.py --data DIR --network resnet50    # random weights

DIR has the pictures, in class folders in `train` and `val`. Plain is the forward pass over both, in
inference mode, as a user's script does it. The run is `unbraid run` into an empty folder, without
and with feature visualisations; ten channels are split, those of Lite0 the ten with the lowest
cosines that are found, those of ResNet-50 named by hand, as are their concepts. Each way is a
process of its own, on --threads threads; they take turns, every second round backwards. Times are
the processor's, which other jobs disturb least. For Lite0 `benchmarks/lite0.py` says what it needs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

import unbraid
from lite0 import LAYER as LITE0_LAYER
from lite0 import load_lite0
from timing import alone, print_head, print_row, spread
from unbraid.images.open import open_images
from unbraid.networks.models import imagenet_transform
from unbraid.running import finished, measures, sample
from unbraid.running import run as running
from unbraid.running.folders import Thresholds
from unbraid.running.several import run_layers
from unbraid.scanning.scan_options import Loading

NETWORKS = {"lite0": LITE0_LAYER, "resnet50": "layer4.2.conv3"}
N_CHANNELS = 10
WAYS = ("plain", "run", "run with features")
# Functions that take a run's time, and what they are called in the table.
STEPS = {
    (running, "prepare"): "a first look",
    (running, "scan_into"): "",  # by the folder that it is for
    (running, "find"): "find",
    (finished, "sensitivity"): "other thresholds",
    (running, "split"): "split, both rules",
    (running, "apply"): "apply",
    (measures, "pass_once"): "outputs, switching off, embedding",
    (measures, "_judge"): "semantic measures",
    (measures, "draw_sample"): "draw the sample",
    (finished, "choose_for_positions"): "draw the sample",
    (running, "evaluate"): "evaluate",
    (running, "visualize"): "feature visualisations",
    (finished, "write_report"): "report",
}


def setting(name: str, data: Path, scale: int) -> tuple[nn.Module, Any, Any]:
    """A network, and its training and validation images."""
    torch.manual_seed(0)
    if name == "lite0":
        from torchvision.transforms import v2

        model = load_lite0()
        size = v2.Resize(224, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        values = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.498] * 3, [0.502] * 3)]
        transform: Any = v2.Compose([v2.PILToTensor(), size, v2.CenterCrop(224), *values])
    else:
        model, transform = torchvision.models.resnet50().eval(), imagenet_transform()
    parts = [open_images(data / part, transform, outputs=model) for part in ("train", "val")]
    return model, *(Subset(part, range(0, len(part), scale)) for part in parts)


def plain(model: nn.Module, train: Any, val: Any, batch_size: int) -> None:
    """One plain pass over all images."""
    with torch.inference_mode():
        for batch, _ in DataLoader(ConcatDataset([train, val]), batch_size=batch_size):
            model(batch)


def ten_of(found: Any) -> Any:
    """The channels with the lowest cosines."""
    channels = list(dict.fromkeys(pair.channel for pair in found.pairs))[:N_CHANNELS]
    return replace(
        found,
        pairs=tuple(pair for pair in found.pairs if pair.channel in channels),
        concepts={o: found.concepts[o] for o in channels},
    )


def find_ten(name: str, scan: unbraid.Scan, **thresholds: Any) -> Any:
    """Find ten channels in a scan, or name them."""
    if name == "lite0":
        return ten_of(unbraid.find(scan, **thresholds))
    labels = sorted(scan.labels_seen())
    named = {
        o: [[labels[(3 * o + k) % len(labels)]] for k in range(2)]
        for o in range(0, 20 * N_CHANNELS, 20)
    }
    return unbraid.find(scan, channels=named, **{**thresholds, "tau": 0.01})


@contextmanager
def told_apart(taken: dict[str, float]) -> Iterator[None]:
    """Add up the time of each step, without what other steps in it take."""
    inside: list[float] = []

    def timed(way: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            told = name or f"scan, {next(iter(args[1].values())).name}"
            inside.append(0.0)
            begun = time.process_time()
            try:
                return way(*args, **named)
            finally:
                whole = time.process_time() - begun
                taken[told] = taken.get(told, 0.0) + whole - inside.pop()
                if inside:
                    inside[-1] += whole

        return call

    with ExitStack() as stack:
        for (module, function), name in STEPS.items():
            way = getattr(module, function)
            stack.enter_context(patch.object(module, function, timed(way, name)))
        yield


def one(way: str, name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Go one way; the seconds by step, and "all"."""
    threads, batch_size, tau = asked.threads, asked.batch_size, asked.tau
    sample.LEAST, sample.MOST = sample.LEAST // asked.scale, sample.MOST // asked.scale
    torch.set_num_threads(threads)
    if way != "plain" and hasattr(unbraid, "keep_memory"):
        unbraid.keep_memory()  # as the command does
    model, train, val = setting(name, asked.data, asked.scale)
    taken: dict[str, float] = {}
    begun, begun_wall = time.process_time(), time.perf_counter()
    if way == "plain":
        plain(model, train, val, batch_size)
    else:
        find = lambda scan, **thresholds: find_ten(name, scan, **thresholds)  # noqa: E731
        with (
            tempfile.TemporaryDirectory() as out,
            patch.object(running, "find", find),
            told_apart(taken),
        ):
            done = run_layers(
                model,
                [NETWORKS[name]],
                train,
                val,
                Path(out) / "run",
                thresholds=Thresholds(tau=tau if tau == "auto" else float(tau)),
                loading=Loading(batch_size=batch_size),
                source={},
                say=lambda text: print(text, flush=True),
                title=name,
                features=way == "run with features",
            )
            (made,) = done.runs.values()
            taken["channels"] = len(made.found.concepts)
    whole, wall = time.process_time() - begun, time.perf_counter() - begun_wall
    return {**taken, "all": whole, "wall": wall, "images": len(train) + len(val)}


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=NETWORKS, default="lite0")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tau", default="auto", help="of Lite0; its channels are found")
    parser.add_argument("--scale", type=int, default=1, help="of data and sample, one in so many")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(one(asked.only, asked.network, asked)))
        return
    taken: dict[str, list[dict[str, Any]]] = {way: [] for way in asked.ways}
    given = ["--data", asked.data, "--network", asked.network, "--threads", asked.threads]
    given += ["--batch-size", asked.batch_size, "--tau", asked.tau, "--scale", asked.scale]
    for number in range(asked.rounds):
        for way in asked.ways if number % 2 == 0 else reversed(asked.ways):
            taken[way].append(json.loads(alone(__file__, *given, "--only", way)))
        line = ", ".join(f"{way} {own[-1]['all']:.0f} s" for way, own in taken.items())
        print(f"round {number + 1}: {line}", flush=True)
    base, base_wall = ([own[kind] for own in taken["plain"]] for kind in ("all", "wall"))
    n_images = taken["plain"][0]["images"]
    print(f"\n{asked.network}, {n_images:,} images, {asked.threads} threads")
    print_head("way", "processor s, least", "to one plain pass", "by wall time")
    for way, own in taken.items():
        ratios = [o["all"] / b for o, b in zip(own, base, strict=True)]
        by_wall = [o["wall"] / b for o, b in zip(own, base_wall, strict=True)]
        print_row(way, f"{min(o['all'] for o in own):.0f}", spread(ratios), spread(by_wall))
    for way in WAYS[:0:-1]:  # the fullest that was asked for
        if way in taken:
            best = min(taken[way], key=lambda own: own["all"])
            best = {k: v for k, v in best.items() if k not in ("images", "channels", "wall")}
            print_head(f"step of: {way}", "processor s", "of one plain pass")
            rest = best.pop("all") - sum(best.values())
            for step, seconds in sorted({**best, "the rest": rest}.items(), key=lambda s: -s[1]):
                print_row(step, f"{seconds:.1f}", f"{seconds / min(base):.3f}")
            break


if __name__ == "__main__":
    main()
