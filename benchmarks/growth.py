"""How time and memory grow: by images, channels, classes and concepts.

    python benchmarks/growth.py scan          # 1k, 10k, 100k small images; 64 to 2048 channels
    python benchmarks/growth.py find          # 2048 channels, 1000 classes of 20 images
    python benchmarks/growth.py split         # 580 channels, 1500 concepts
    python benchmarks/growth.py refit         # groups of images by hand, corrected
    python benchmarks/growth.py imagenet DIR  # all but scan on 1.28 million records

Each measurement runs in a process of its own, which tells its seconds, wall and processor, and the
most memory it held. Small scans are set beside plain inference, since tensors that no cache holds
slow down the network itself. All else works on synthetic scans, as large as those of ResNet-50's
last bottleneck, in which every class has causes of its own: for `find` each class uses 30 channels,
so that about 15 classes share a channel (with gamma 0.5 nothing is found, with 0.9 nearly all is);
for `split` channels are divided at random (--kernel 3 --channels 40 for 4608 taps each). ImageNet's
takes 3 GB in DIR and is made where it is not there yet.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import unbraid
from synthetic import FleetingImages, pointwise, write_scan
from timing import Seconds, alone, peak_memory, print_head, print_row, seconds
from unbraid.finding import find as find_module
from unbraid.finding.arv import class_sums
from unbraid.finding.findings import Findings
from unbraid.finding.thresholds import choose_tau
from unbraid.scanning.records import Scan
from unbraid.splitting import material
from unbraid.splitting import split as split_module

SIDE, BATCH = 16, 256  # of small images
N_OUT, N_IN, N_CLASSES = 2048, 512, 1000
N_TRAIN, N_VAL = 1_281_167, 50_000
GAMMA = 0.8  # causes are drawn evenly between 0 and 1, so that cosines are about 0.75

PARTS: dict[str, tuple[Any, str]] = {  # of which some are within others
    "find: sums of classes": (find_module, "class_sums"),
    "find: chance": (find_module, "with_chance"),
    "split: choose images of no concept": (split_module, "choose_rest"),
    "split: cross-validation": (split_module, "choose_weights"),
    "split: fit": (split_module, "fit_least_squares"),
    "split: in fit and cross-validation, reading and moments": (material.Reader, "read"),
    "split: quantiles": (split_module, "with_quantiles"),
}


def small_network(n_channels: int) -> nn.Module:
    """A network whose layer has so many channels."""
    torch.manual_seed(0)
    first = (nn.Conv2d(3, 64, 3, stride=4), nn.ReLU(), nn.Conv2d(64, n_channels, 1), nn.ReLU())
    return nn.Sequential(
        *first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_channels, 10)
    ).eval()


def scan_small(n_images: str, n_channels: str) -> None:
    """Scan so many images at a layer of so many channels."""
    images = FleetingImages(int(n_images), SIDE)
    with tempfile.TemporaryDirectory() as folder:
        unbraid.scan(small_network(int(n_channels)), "2", images, folder, batch_size=BATCH)


def infer_small(n_images: str, n_channels: str) -> None:
    """Plain inference on the same."""
    network = small_network(int(n_channels))
    with torch.inference_mode():
        for images, _ in DataLoader(FleetingImages(int(n_images), SIDE), batch_size=BATCH):
            network(images)


def write_shared(folder: Path, labels: Tensor, n_used: int) -> Scan:
    """Write a scan whose classes have causes of their own and use some channels each."""
    generator = torch.Generator().manual_seed(1)  # the same causes in every scan
    weight = torch.randn(N_OUT, N_IN, generator=generator)
    causes = torch.rand(N_CLASSES, N_IN, generator=generator)
    excited = (causes @ weight.T > 0).float()  # a class uses channels that it excites
    used = excited.multinomial(n_used, generator=generator).sort().values

    def pooled(label: Tensor) -> Tensor:
        return causes[label] * (0.75 + 0.5 * torch.rand(len(label), N_IN))

    layer = pointwise(N_OUT, N_IN)
    return write_scan(folder, layer, weight, labels, pooled, used, varied=True)


def write_mixed(folder: Path, n_images: int, kernel: int, varied: bool = False) -> Scan:
    """Write a scan without shares whose images mix the causes of their classes."""
    layer = pointwise(N_OUT, N_IN, kernel)
    causes = torch.rand(N_CLASSES, N_IN) ** 4
    offsets = 0.8 + 0.4 * torch.rand(kernel**2)  # neighbouring taps see nearly the same

    def pooled(label: Tensor) -> Tensor:
        n = len(label)
        inputs = causes[label] * 1.5 * torch.rand(n, N_IN) + 0.05 * torch.rand(n, N_IN)
        inputs = inputs * 49 * (0.5 + torch.rand(n, 1))
        noise = 0.9 + 0.2 * torch.rand(n, N_IN, kernel**2)
        return (inputs[:, :, None] * offsets * noise).flatten(1)

    labels = torch.arange(N_CLASSES).repeat_interleave(n_images)
    weight = torch.randn(N_OUT, layer.n_taps) / 20
    return write_scan(folder, layer, weight, labels, pooled, varied=varied)


def random_findings(scan: Scan, n_channels: int, n_concepts: int) -> Findings:
    """Concepts at random, two or more a channel, of one or two classes that excite it."""
    draw, concepts = random.Random(0), {}
    sums = class_sums(scan, []).pooled[:, 0].float()
    channels = sorted(draw.sample(range(N_OUT), n_channels))
    counts = Counter(draw.choices(channels, k=n_concepts - 2 * n_channels))
    for channel in channels:
        sizes = [draw.choice((1, 1, 2)) for _ in range(2 + counts[channel])]
        exciting = (sums @ scan.weight[channel]).topk(N_CLASSES // 4).indices.tolist()
        classes = iter(draw.sample(exciting, sum(sizes)))
        concepts[channel] = tuple(tuple(sorted(next(classes) for _ in range(n))) for n in sizes)
    names = tuple(map(str, range(N_CLASSES)))
    return Findings(0.01, 0.75, 0.5, (), concepts, names, "", "layer", "synthetic")


def choose(folder: str) -> None:
    """Choose tau."""
    choose_tau(unbraid.open_scan(folder), 0.75, 0.5)


def count(folder: str) -> None:
    """Count findings for the default grid of thresholds."""
    unbraid.sensitivity(unbraid.open_scan(folder))


def find(folder: str, tau: str, gamma: str) -> None:
    """Find channels."""
    found = unbraid.find(unbraid.open_scan(folder), tau=float(tau), gamma=float(gamma))
    print(f"{len(found)} pairs in {len(found.concepts)} channels", file=sys.stderr)


def split_found(folder: str) -> None:
    """Find and split, and tell what each part takes."""
    taken = tell_parts()
    scan = unbraid.open_scan(f"{folder}/train")
    found: list[Findings] = []
    taken["find"] = seconds(lambda: found.append(unbraid.find(scan, gamma=GAMMA)))
    made: list[unbraid.Split] = []
    taken["split"] = seconds(lambda: made.append(unbraid.split(scan, found[0])))
    made[0].save(f"{folder}/split.safetensors")
    print_parts(taken, made[0])


def evaluate(folder: str) -> None:
    """Evaluate on as many images as ImageNet has for validation."""
    split = unbraid.Split.load(f"{folder}/split.safetensors")
    print(unbraid.evaluate(split, unbraid.open_scan(f"{folder}/val")).summary, file=sys.stderr)


def split_random(folder: str, n_channels: str, n_concepts: str) -> None:
    """Split channels whose concepts are drawn, and tell what each part takes."""
    taken = tell_parts()
    scan = unbraid.open_scan(folder)
    found = random_findings(scan, int(n_channels), int(n_concepts))
    made: list[unbraid.Split] = []
    taken["split"] = seconds(lambda: made.append(unbraid.split(scan, found)))
    print_parts(taken, made[0])


def tell_parts() -> dict[str, Seconds]:
    """Have the parts of `find` and `split` told, in seconds, as they are done."""
    taken: dict[str, Seconds] = {}

    def told(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            answers: list[Any] = []
            once = seconds(lambda: answers.append(work(*arguments, **options)))
            before = taken.get(name, (0.0, 0.0))
            taken[name] = (before[0] + once[0], before[1] + once[1])
            return answers[0]

        return run

    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, told(name, getattr(owner, attribute)))
    return taken


def print_parts(taken: Mapping[str, Seconds], made: unbraid.Split) -> None:
    """Print what each part took, and how exact the masks are."""
    for name in (*PARTS, "find", "split"):
        if name in taken:
            wall, cpu = taken[name]
            print(f"{name}: {wall:.1f} s, of processors {cpu:.1f} s", file=sys.stderr)
    residual = max(part.info["kkt_residual"] for part in made.channels)
    print(f"largest KKT residual {residual:.1e}", file=sys.stderr)


def refit(n_images: int, n_groups: int, n_in_group: int) -> None:
    """Put images of a channel in groups, move one, and print what each step takes, in s."""
    with tempfile.TemporaryDirectory() as name:
        scan = write_mixed(Path(name), n_images // N_CLASSES, 1, varied=True)
        drawn = random.Random(0).sample(range(n_images), n_groups * n_in_group)
        groups = [drawn[k::n_groups] for k in range(n_groups)]
        found = unbraid.find(scan, images={5: groups})
        split = unbraid.split(scan, found)
        made: list[Any] = [split]
        for image in groups[0][:4]:  # the first round reads what is kept, and modules
            correct = partial(found.correct, scan, 5, move={image: 1})
            taken = [seconds(lambda: made.append(correct()))]  # noqa: B023
            taken.append(
                seconds(lambda: made.append(unbraid.split(scan, made[-1], refit=made[-2])))
            )
            found = made[-2]
            taken.append(seconds(lambda: unbraid.evaluate(made[-1], scan)))
        wall, cpu = (sum(own[kind] for own in taken) for kind in (0, 1))
        steps = [f"{own[1]:.2f}" for own in taken]
        print_row(n_groups, n_in_group, *steps, f"{cpu:.2f}", f"{wall:.2f}")


STEPS: dict[str, Callable[..., None]] = {
    **{"scan": scan_small, "inference": infer_small, "tau": choose, "sensitivity": count},
    **{"find": find, "find, split": split_found, "evaluate": evaluate, "split": split_random},
}


def measure(step: str, *arguments: object) -> tuple[float, float, float]:
    """Take one step in a process of its own: seconds of wall and processor, and GiB at most."""
    wall, cpu, memory = json.loads(alone(__file__, "one", step, *arguments))
    return wall, cpu, memory


def print_step(step: str, *arguments: object, name: str = "") -> None:
    """Measure one step, and print it."""
    wall, cpu, memory = measure(step, *arguments)
    print_row(name or step, f"{wall:.1f}", f"{cpu:.1f}", f"{memory:.2f}")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("scan", "find", "split", "refit", "imagenet", "one"))
    parser.add_argument("rest", nargs="*", help="for imagenet: the folder of the Scan")
    parser.add_argument("--images", type=int, help="the most to scan, or of each class")
    parser.add_argument("--channels", type=int, default=580, help="to split")
    parser.add_argument("--concepts", type=int, default=1500, help="of all channels to split")
    parser.add_argument("--kernel", type=int, default=1, help="of the layer that is split")
    asked = parser.parse_args()
    torch.manual_seed(0)
    if asked.what == "one":
        step, *arguments = asked.rest
        taken = seconds(lambda: STEPS[step](*arguments))
        print(json.dumps([*taken, peak_memory()]))
        return
    columns = ("s", "processor s", "peak memory, GiB")
    if asked.what == "scan":
        print_head("images", "channels", *columns, "plain inference, processor s")
        sizes = [(n, 64) for n in (1_000, 10_000, 100_000)]
        sizes += [(10_000, n_channels) for n_channels in (256, 1024, 2048)]
        for size in [size for size in sizes if size[0] <= (asked.images or size[0])]:
            wall, cpu, memory = measure("scan", *size)
            plain = measure("inference", *size)[1]
            print_row(*size, f"{wall:.1f}", f"{cpu:.1f}", f"{memory:.2f}", f"{plain:.1f}")
        return
    if asked.what == "refit":
        steps = ("correct, processor s", "split", "evaluate", "all three", "all three, s")
        print_head("groups", "images each", *steps)
        for n_groups, n_in_group in ((2, 10), (2, 100), (5, 100)):
            refit(asked.images or 10_000, n_groups, n_in_group)
        return
    print_head("step", *columns)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(asked.rest[0] if asked.what == "imagenet" else name)
        if asked.what == "find":
            write_shared(folder, torch.arange(N_CLASSES).repeat(asked.images or 20), 30)
            for step in ("tau", "sensitivity"):
                print_step(step, folder)
            for gamma in (0.5, 0.9):
                print_step("find", folder, 0.01, gamma, name=f"find, gamma {gamma}")
        elif asked.what == "split":
            write_mixed(folder, asked.images or 50, asked.kernel, varied=True)
            print_step("split", folder, asked.channels, asked.concepts)
        else:
            for part, n_images in (("train", N_TRAIN), ("val", N_VAL)):
                if not (folder / part / "manifest.json").exists():
                    labels = torch.arange(n_images) * N_CLASSES // n_images  # as in folders
                    write_shared(folder / part, labels, 3)
            print_step("find", folder / "train", 0.03, GAMMA)
            print_step("find, split", folder)
            print_step("sensitivity", folder / "train")
            print_step("evaluate", folder)


if __name__ == "__main__":
    main()
