"""Split layers of every family of networks that timm and torchvision can build.

    python benchmarks/zoo.py --cache zoo.jsonl --out docs/zoo.md

Of each family the smallest network, with random weights and random norm statistics, on the smallest
images that it takes. Of each network the last and a middle layer that can be split: scan, three
concepts in three channels, outputs with `==`, gradients in float64, the plain form. Then all of its
layers at once: one scan, each split, outputs and gradients. Each family has a process of its own,
which may take long or much memory. What is in the cache is not run again.
Needs `pip install timm`.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import unbraid
from unbraid.networks.layers import bias_of, describe, weight_rows
from unbraid.networks.spec import LayerSpec
from unbraid.networks.weights import hash_weights
from unbraid.scanning.scan import usable_layers
from unbraid.splitting.splits import ChannelSplit, Split
from zoo_networks import Pictures, build, families, one_line, randomise, size_of, smallest_size
from zoo_table import CLOSE, page, table

CONCEPTS = [[0], [1], [2]]


def two_layers(specs: list[LayerSpec], n_classes: int) -> list[LayerSpec]:
    """The last layer that can be split, and a middle one; the classifier left out."""
    inner = [spec for spec in specs if spec.n_out != n_classes] or specs
    return list({spec.name: spec for spec in (inner[len(inner) // 2], inner[-1])}.values())


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
        (split,) = random_splits(model, {spec.name: concepts})
        row["equal"] = outputs_equal(model, unbraid.apply(model, split), images)
        single = run(model, spec.name, images)
        plain = run(unbraid.apply(model, split, form="plain"), spec.name, images)
        double, exact = copy.deepcopy(model).double(), images.double()
        (split,) = random_splits(double, {spec.name: concepts})
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
        row["error"] = one_line(error)
        row["where"] = traceback.format_exc()[-1500:]
    return row


def try_all(model: nn.Module, specs: list[LayerSpec], size: int) -> dict[str, Any]:
    """Scan all layers in one pass, and split the first and the last channel of each."""
    row: dict[str, Any] = {"layer": f"all {len(specs)} at once", "kind": ""}
    images = Pictures(size, 2).images
    concepts = {spec.name: {o: CONCEPTS for o in (0, spec.n_out - 1)} for spec in specs}
    try:
        with tempfile.TemporaryDirectory() as folder:
            dataset = Pictures(size, 4)
            scans = unbraid.scan(model, [*concepts], dataset, folder, batch_size=2)
            row["scan"] = [scan.layer.name for scan in scans.values()] == [*concepts]
        splits = random_splits(model, concepts)
        row["equal"] = outputs_equal(model, unbraid.apply(model, splits), images)
        double = copy.deepcopy(model).double()
        splits = random_splits(double, concepts)
        row["gradient"] = gradients_equal(double, unbraid.apply(double, splits), images.double())
    except Exception as error:
        row["error"] = one_line(error)
        row["where"] = traceback.format_exc()[-1500:]
    return row


def random_splits(
    model: nn.Module, concepts: Mapping[str, Mapping[int, Sequence[Sequence[int]]]]
) -> list[Split]:
    """Divide weights at random: what is equal must be so however they are divided."""
    hashed, splits = hash_weights(model), []
    for name, channels in concepts.items():
        layer = model.get_submodule(name)
        weight, bias = weight_rows(layer), bias_of(layer)
        masks = {o: torch.rand(len(own), weight.shape[1]).to(weight) for o, own in channels.items()}
        parts = tuple(
            ChannelSplit(o, own, masks[o], weight[o], float(bias[o]), {})
            for o, own in channels.items()
        )
        splits.append(Split(describe(name, layer), hashed, "random", {}, (), parts))
    return splits


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
        found += torch.autograd.grad(network(x)[:, :5].sum(), x)
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
        row["all"] = try_all(model, specs, row["size"])
    except Exception as error:
        row["error"] = one_line(error)
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
