"""Split layers of every family of networks that timm and torchvision can build.

    python benchmarks/zoo.py --cache zoo.jsonl --out docs/zoo.md
    python benchmarks/zoo.py --kinds docs/benchmarks-kinds.md

Of each family the smallest network, with random weights and random norm statistics, on the smallest
images that it takes. Of each network the last and a middle layer that can be split: scan, three
concepts in three channels, outputs with `==`, gradients in float64, the plain form. Then all of its
layers at once: one scan, each split, outputs and gradients. Each family has a process of its own,
which may take long or much memory. What is in the cache is not run again.

With --kinds it takes one network of each kind (kinds.py) through every step, from scan to report,
and writes the matrix into a page. Needs `pip install timm`.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import re
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

import kinds
import unbraid
from synthetic import RandomImages, random_split
from timing import describe_machine, peak_memory
from unbraid.networks.relevance import undisturbed
from unbraid.networks.spec import LayerSpec
from unbraid.scanning.scan import usable_layers

CONCEPTS = [[0], [1], [2]]
CHECKS = ("scan", "equal", "gradient", "plain")
CHECKS_OF_ALL = ("scan", "equal", "gradient")  # of all layers of a network at once
CLOSE = 1e-5  # what the plain form in float32 is held to
SIZES = (64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 384, 448, 512)
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
    raise RuntimeError(f"runs on images of no size ({one_line(error)})")


def one_line(error: Exception | None) -> str:
    """Say what went wrong, in one cell of a table."""
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}".replace("|", "/")


def two_layers(specs: list[LayerSpec], n_classes: int) -> list[LayerSpec]:
    """The last layer that can be split, and a middle one; the classifier left out."""
    inner = [spec for spec in specs if spec.n_out != n_classes] or specs
    return list({spec.name: spec for spec in (inner[len(inner) // 2], inner[-1])}.values())


def pictures(size: int, n_images: int) -> RandomImages:
    """Random pictures of three classes."""
    return RandomImages(n_images, size, 3, patterns=True)


def try_layer(model: nn.Module, spec: LayerSpec, size: int) -> dict[str, Any]:
    """Scan and split one layer; say for each check whether it holds, or why not."""
    wanted = {channel: CONCEPTS for channel in {0, spec.n_out // 2, spec.n_out - 1}}
    row: dict[str, Any] = {"layer": spec.name, "kind": spec.kind}
    images = pictures(size, 2).images
    double, exact = copy.deepcopy(model).double(), images.double()
    try:
        with tempfile.TemporaryDirectory() as folder:
            scan = unbraid.scan(model, spec.name, pictures(size, 6), folder, batch_size=3)
            concepts = unbraid.find(scan, channels=wanted).concepts
        row["scan"] = True
        split, wide = (random_split(network, spec.name, concepts) for network in (model, double))
        row["equal"] = outputs_equal(model, unbraid.apply(model, split), images)
        row["gradient"] = gradients_equal(double, unbraid.apply(double, wide), exact)
        single = run(model, spec.name, images)
        plain = run(unbraid.apply(model, split, form="plain"), spec.name, images)
        row["layer_off"], row["off"] = map(relative_error, single, plain)
        single64 = run(double, spec.name, exact)
        plain64 = run(unbraid.apply(double, wide, form="plain"), spec.name, exact)
        row["layer_off64"], row["off64"] = map(relative_error, single64, plain64)
        row["own"] = relative_error(single64[1], single[1])
        # Random weights may amplify rounding, until float32 itself gives other logits than float64.
        off = row["off64"] if row["own"] > CLOSE else row["off"]
        row["plain"] = row["layer_off"] <= CLOSE and row["layer_off64"] <= 1e-12 and off <= CLOSE
    except Exception as error:
        row |= failure(error)
    return row


def try_all(model: nn.Module, specs: list[LayerSpec], size: int) -> dict[str, Any]:
    """Scan all layers in one pass, and split the first and the last channel of each."""
    row: dict[str, Any] = {"layer": f"all {len(specs)} at once", "kind": ""}
    images = pictures(size, 2).images
    concepts = {spec.name: {o: CONCEPTS for o in (0, spec.n_out - 1)} for spec in specs}
    try:
        with tempfile.TemporaryDirectory() as folder:
            scans = unbraid.scan(model, [*concepts], pictures(size, 4), folder, batch_size=2)
            row["scan"] = [scan.layer.name for scan in scans.values()] == [*concepts]
        double = copy.deepcopy(model).double()
        changed, changed64 = (
            unbraid.apply(network, [random_split(network, *own) for own in concepts.items()])
            for network in (model, double)
        )
        row["equal"] = outputs_equal(model, changed, images)
        row["gradient"] = gradients_equal(double, changed64, images.double())
    except Exception as error:
        row |= failure(error)
    return row


def failure(error: Exception) -> dict[str, str]:
    """What went wrong, and where."""
    return {"error": one_line(error), "where": traceback.format_exc()[-1500:]}


def outputs_equal(model: nn.Module, changed: nn.Module, images: Tensor) -> bool:
    """To the last bit, with and without a graph."""
    with torch.no_grad():
        same = torch.equal(model(images), changed(images))
    return same and torch.equal(model(images), changed(images))


def run(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the layer, the first time that it runs, and logits."""
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    with undisturbed(model), torch.no_grad():  # so that a layer that is used by its weights runs
        handle = module.register_forward_hook(lambda _module, _args, z: seen.append(z.clone()))
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
        images = pictures(row["size"], 1).images
        with torch.no_grad():
            n_classes = model(images).shape[-1]
        specs = usable_layers(model, images)
        row["n_layers"] = len(specs)
        row["tried"] = [
            try_layer(model, spec, row["size"]) for spec in two_layers(specs, n_classes)
        ]
        row["all"] = try_all(model, specs, row["size"])
    except Exception as error:
        row |= failure(error)
    return row


def in_a_process(library: str, family: str, names: list[str], seconds: int) -> dict[str, Any]:
    """Try a family in a process of its own, for so long; add its time and its peak of memory."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        row = try_family(library, family, names)
        send.send({**row, "peak": round(peak_memory(), 1)})

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


def page(rows: list[dict[str, Any]]) -> str:
    """Write the whole page: what was tried, what holds, and every family."""
    remarks = "".join(f"- {line}\n" for row in in_order(rows) for line in remarks_on(row))
    return (
        "# Every family of networks\n\n"
        "This page shows that unbraid works on the smallest network of every family that timm and "
        f"torchvision can build. {summary(rows)}\n\n{EXPLANATION}\n"
        f"{describe_machine()}, torchvision {torchvision.__version__}, timm {timm.__version__}."
        f"\n\n## What holds in each family?\n\n{table(rows)}"
        f"{REMARKS + remarks if remarks else ''}"
    )


EXPLANATION = """The page is written by

```sh
python benchmarks/zoo.py --cache zoo.jsonl --out docs/zoo.md
```

**What was asked.** Each network has random weights. In a middle layer and in the last one, three \
channels are split into three concepts each, and four things must hold:

- *scan*: the layer can be scanned;
- *equal*: the split network's outputs equal the original's, to the last bit;
- *gradient*: the gradients of both agree in float64;
- *plain*: the [plain form](tools.md) computes the same up to rounding.

Then channels of all layers are split at once, for which the first three must hold. *Image* is the \
side of the image in pixels.
"""
REMARKS = """
## Where is the plain form judged in float64?

Where random weights make a network amplify rounding, float32 itself is far off. There the plain \
form is judged in float64.

"""


def summary(rows: list[dict[str, Any]]) -> str:
    """Count what was tried and what holds."""
    tried = [layer for row in rows for layer in row.get("tried", [])]
    failing = [f"{row['library']} {row['family']}" for row in rows if not passed(row)]
    n_all = sum(row.get("n_layers", 0) for row in rows)
    amplified = [layer for layer in tried if layer.get("plain") and layer["off"] > CLOSE]
    most = max(rows, key=lambda row: row.get("peak", 0))
    return (
        f"All checks hold in {len(rows) - len(failing)} of {len(rows)} families"
        f"{', not in ' if failing else ''}{', '.join(failing)}: for {len(tried)} layers one by "
        f"one, and for {n_all} layers at once. In {len(amplified)} layers the plain form is judged "
        f"in float64. The most memory was {most['peak']} GiB ({most['model']})."
    )


def passed(row: dict[str, Any]) -> bool:
    """Whether every check of every layer that was tried holds."""
    return bool(row.get("tried")) and not failures(row)


def failures(row: dict[str, Any]) -> list[str]:
    """What does not hold of a family, layer by layer."""
    if "error" in row:
        return [row["error"]]
    together = row.get("all", {})
    layers = [(tried["layer"], tried, CHECKS) for tried in row.get("tried", [])]
    layers.append(("all at once", together, CHECKS_OF_ALL))
    return [
        f"{name}: {tried.get('error') or ', '.join(failing)}"
        for name, tried, checks in layers
        if (failing := [check for check in checks if tried.get(check) is not True])
    ]


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By library and family."""
    return sorted(rows, key=lambda row: (row["library"], row["family"]))


def table(rows: list[dict[str, Any]]) -> str:
    """Write one line for each family."""
    head = ("network", "image", "layers one by one", "all at once", "all checks hold")
    lines = [head, ("---",) * len(head)]
    for row in in_order(rows):
        layers = ", ".join(f"`{tried['layer']}` {tried['kind']}" for tried in row.get("tried", []))
        holds = "yes" if passed(row) else f"**no**: {'; '.join(failures(row))}"
        name = f"{row['library']} {row['family']}: {row.get('model', '')}"
        lines.append((name, row.get("size", ""), layers, row.get("n_layers", ""), holds))
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def remarks_on(row: dict[str, Any]) -> list[str]:
    """Say where float32 is too coarse to judge the plain form by."""
    return [
        f"{row['model']}, `{tried['layer']}`: the layer is off by {tried['layer_off']:.0e}, logits "
        f"by {tried['off']:.0e}, in float64 by {tried['off64']:.0e}; float32 itself is off by "
        f"{tried['own']:.0e}"
        for tried in row.get("tried", [])
        if tried.get("off", 0) > CLOSE
    ]


def try_kinds(page: Path, only: list[str] | None) -> None:
    """Take every kind of network through every step, and write the matrix into a page."""
    rows = []
    for kind in kinds.KINDS:
        if only and kind.name not in only:
            continue
        start = time.perf_counter()
        rows.append(kinds.try_kind(kind))
        print(f"{kinds.table(rows[-1:]).splitlines()[-1]} {time.perf_counter() - start:.0f} s")
    if not only:
        kinds.write_into(page, rows)
    print("{} of {} cells hold".format(*kinds.n_green(rows)))


def main() -> None:
    """Run what is not in the cache, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, help="JSON lines, one per family")
    parser.add_argument("--kinds", type=Path, help="page for the matrix of kinds")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--seconds", type=int, default=600, help="limit for one family")
    parser.add_argument("--only", nargs="*", help="families to run, whatever the cache holds")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.kinds:
        try_kinds(options.kinds, options.only)
        return
    if not options.cache:
        parser.error("give --cache or --kinds")
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
