"""Split layers of every family of networks that timm and torchvision can build.

    python benchmarks/zoo.py --cache zoo.jsonl --out docs/zoo.md

Of each family the smallest network, with random weights and random norm statistics, on the smallest
images that it takes. Of each network the last and a middle layer that can be split: scan, three
concepts in three channels, outputs with `==`, gradients in float64, the plain form. Each family has
a process of its own, which may take long or much memory. What is in the cache is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import re
import resource
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset

import unbraid
from unbraid.describe import bias_of, weight_rows
from unbraid.findings import Concept
from unbraid.layers import LayerSpec
from unbraid.splits import ChannelSplit, Split
from unbraid.usable import usable_layers
from unbraid.weights import hash_weights
from zoo_table import CLOSE, page, table

SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 384, 448, 512)
CONCEPTS = [[0], [1], [2]]
SIZE_WORDS = (
    *("zepto", "atto", "femto", "pico", "nano", "xxt", "xxs", "xt", "ti", "tiny", "t", "xs"),
    *("mini", "micro", "small", "lite", "s", "m", "medium", "base", "b", "l", "large", "h", "xl"),
    *("huge", "giant", "gigantic", "enormous", "so"),
)  # smallest first
MORE = {  # whose layers pad and standardise on their own
    "efficientnet, TensorFlow's": "tf_efficientnet_lite0",
    "nfnet, DeepMind's": "dm_nfnet_f0",
    "resnetv2, standardised": "resnetv2_50x1_bit",
    "vision_transformer_hybrid, standardised": "vit_tiny_r_s16_p8_224",
}


class Pictures(Dataset[tuple[Tensor, int]]):
    """Random pictures of three classes."""

    def __init__(self, size: int, n_images: int) -> None:
        """Draw them, each class around a pattern of its own."""
        generator = torch.Generator().manual_seed(size)
        patterns = torch.randn(3, 3, size, size, generator=generator)
        own = torch.randn(n_images, 3, size, size, generator=generator)
        self.targets = [n % 3 for n in range(n_images)]
        self.images = patterns[self.targets] + own

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image with its label."""
        return self.images[index], self.targets[index]


# --- which networks -------------------------------------------------------------------------------


def families(library: str) -> dict[str, list[str]]:
    """Names of networks by the file that they are written in."""
    if library == "timm":
        by_module = {home: timm.list_models(module=home) for home in timm.list_modules()}
        return by_module | {family: [name] for family, name in MORE.items()}
    found: dict[str, list[str]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        home = torchvision.models.get_model_builder(name).__module__.rsplit(".", 1)[-1]
        found.setdefault(home, []).append(name)
    return found


def size_of(name: str) -> tuple[int, int, int]:
    """What a network's name says of its size: the largest word for a size, and its number."""
    parts = [part.rstrip("0123456789") for part in name.split("_")[1:]]
    ranks = [SIZE_WORDS.index(p) for p in parts if p in SIZE_WORDS] or [SIZE_WORDS.index("s")]
    return max(ranks), int((re.findall(r"[0-9]+", name) or ["0"])[0]), len(name)


def build(library: str, name: str) -> nn.Module:
    """Build a network with random weights."""
    if library == "timm":
        return timm.create_model(name, pretrained=False).eval()
    return torchvision.models.get_model(name, weights=None).eval()


def randomise(model: nn.Module) -> None:
    """Give norms something to do, and whatever is constant at the start some variety."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))


def smallest_size(model: nn.Module) -> int:
    """Find the smallest images that a network takes."""
    error = None
    for size in SIZES:
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
            return size
        except Exception as caught:
            error = caught
    raise RuntimeError(f"runs on images of no size ({_one_line(error)})")


def two_layers(specs: list[LayerSpec], n_classes: int) -> list[LayerSpec]:
    """The last layer that can be split, and a middle one; the classifier left out."""
    inner = [spec for spec in specs if spec.n_out != n_classes] or specs
    return list({spec.name: spec for spec in (inner[len(inner) // 2], inner[-1])}.values())


# --- what is tried --------------------------------------------------------------------------------


def try_layer(model: nn.Module, spec: LayerSpec, size: int) -> dict[str, Any]:
    """Scan and split one layer; say for each check whether it holds, or why not."""
    wanted = {channel: CONCEPTS for channel in {0, spec.n_out // 2, spec.n_out - 1}}
    row: dict[str, Any] = {"layer": spec.name, "kind": spec.kind}

    images = Pictures(size, 2).images
    try:
        with tempfile.TemporaryDirectory() as folder:
            dataset = Pictures(size, 6)
            scan = unbraid.scan(model, spec.name, dataset, folder, batch_size=3)
            concepts = unbraid.find(scan, channels=wanted).concepts
        row["scan"] = True
        split = random_split(model, spec, concepts)
        row["equal"] = outputs_equal(model, unbraid.apply(model, split), images)
        single = run(model, spec.name, images)
        plain = run(unbraid.apply(model, split, form="plain"), spec.name, images)
        double, exact = copy.deepcopy(model).double(), images.double()
        split = random_split(double, spec, concepts)
        row["gradient"] = gradients_equal(double, unbraid.apply(double, split), exact)
        wide = run(double, spec.name, exact)
        wide_plain = run(unbraid.apply(double, split, form="plain"), spec.name, exact)
        row["layer_off"], row["off"] = map(relative_error, single, plain)
        row["layer_off64"], row["off64"] = map(relative_error, wide, wide_plain)
        row["own"] = relative_error(wide[1], single[1])
        # Random weights may amplify rounding, until float32 itself gives other logits than float64.
        off = row["off64"] if row["own"] > CLOSE else row["off"]
        row["plain"] = row["layer_off"] <= CLOSE and row["layer_off64"] <= 1e-12 and off <= CLOSE
    except Exception as error:
        row["error"] = _one_line(error)
        row["where"] = traceback.format_exc()[-1500:]
    return row


def random_split(
    model: nn.Module, spec: LayerSpec, concepts: dict[int, tuple[Concept, ...]]
) -> Split:
    """Divide weights at random: what is equal must be so however they are divided."""
    layer = model.get_submodule(spec.name)
    weight, bias = weight_rows(layer), bias_of(layer)
    parts = tuple(
        ChannelSplit(
            o, own, torch.rand(len(own), spec.n_taps).to(weight), weight[o], float(bias[o]), {}
        )
        for o, own in concepts.items()
    )
    return Split(spec, hash_weights(model), "random", {}, (), parts)


def outputs_equal(model: nn.Module, changed: nn.Module, images: Tensor) -> bool:
    """To the last bit, with and without a graph."""
    with torch.no_grad():
        same = torch.equal(model(images), changed(images))
    return same and torch.equal(model(images), changed(images))


def run(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the layer, the first time that it runs, and logits."""
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda _module, _args, z: seen.append(z.clone()))
    with torch.no_grad():
        logits = model(images)
    handle.remove()
    return seen[0], logits


def relative_error(before: Tensor, after: Tensor) -> float:
    """Largest difference, by the largest value."""
    return float((before - after).abs().max() / before.abs().max())


def gradients_equal(model: nn.Module, changed: nn.Module, images: Tensor) -> bool:
    """Gradients of some logits by the image, in float64."""
    found = []
    for network in (model, changed):
        x = images.clone().requires_grad_()
        network(x)[:, :5].sum().backward()
        found.append(x.grad)
    scale = float(found[0].abs().max())
    return scale > 0 and float((found[0] - found[1]).abs().max()) <= 1e-9 * scale


def try_family(library: str, family: str, names: list[str]) -> dict[str, Any]:
    """Try the smallest network of a family."""
    row: dict[str, Any] = {"library": library, "family": family}
    try:
        real = [name for name in names if not name.startswith("test_")]
        row["model"] = min(real, key=size_of)
        torch.manual_seed(0)
        model = build(library, row["model"])
        randomise(model)
        row["size"] = smallest_size(model)
        images = Pictures(row["size"], 1).images
        with torch.no_grad():
            n_classes = model(images).shape[-1]
        specs = usable_layers(model, images)
        row["n_layers"] = len(specs)
        row["tried"] = [
            try_layer(model, spec, row["size"]) for spec in two_layers(specs, n_classes)
        ]
    except Exception as error:
        row["error"] = _one_line(error)
        row["where"] = traceback.format_exc()[-1500:]
    return row


def in_a_process(library: str, family: str, names: list[str], seconds: int) -> dict[str, Any]:
    """Try a family in a process of its own, for so long; add its time and its peak of memory."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        row = try_family(library, family, names)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        send.send({**row, "peak": round(peak, 1)})

    start = time.perf_counter()
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    send.close()  # this side's; so that the end of the process is the end of what can be received
    try:
        row = receive.recv() if receive.poll(seconds) else None
        error = f"not done in {seconds} s"
    except EOFError:
        row, error = None, "the process was killed, perhaps for its memory"
    process.kill()
    process.join()
    row = row or {"library": library, "family": family, "error": error}
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def _one_line(error: Exception | None) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}".replace("|", "/")


def main() -> None:
    """Run what is not in the cache, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="JSON lines, one per family")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--seconds", type=int, default=600, help="limit for one family")
    parser.add_argument("--only", nargs="*", help="families to run, whatever the cache holds")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = options.cache.read_text().splitlines() if options.cache.exists() else []
    rows = {(row["library"], row["family"]): row for row in map(json.loads, lines)}
    for library in ("timm", "torchvision"):
        for family, names in families(library).items():
            key = (library, family)
            if family not in options.only if options.only else key in rows:
                continue
            rows[key] = in_a_process(library, family, names, options.seconds)
            with options.cache.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
            print(table([rows[key]]).split("\n", 2)[2], rows[key]["seconds"], "s", flush=True)
    if options.out is not None:
        options.out.write_text(page(list(rows.values())))


if __name__ == "__main__":
    main()
