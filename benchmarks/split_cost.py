"""What a split network costs beside the original, by the number of channels split.

    python benchmarks/split_cost.py

ResNet-50 with random weights and random images, channels of `layer4.2.conv3` divided at random
among two concepts each: 1, 80 and 580 channels, as many as the published scans found. Four jobs:
inference; inference while a hook reads the concept channels; inference with one gate moved; and the
gradient by the input. All else in the two networks is the same, so two ratios are taken: of whole
networks that take turns, which a busy machine disturbs by several per cent; and of the split layer
and the original layer taking turns on the layer's own input, their difference added to the whole
network's time. Processor time, medians. Memory is the peak of a process of its own while it does
the job.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import unbraid
from machine import describe_machine
from unbraid.networks.layers import describe, weight_rows
from unbraid.networks.weights import hash_weights
from unbraid.splitting.splits import ChannelSplit, Split
from unbraid.surgery.split_layer import SplitLayer

LAYER = "layer4.2.conv3"
COUNTS = (1, 80, 580)


def random_split(model: nn.Module, n_channels: int) -> Split:
    """Divide channels at random; what a split is does not matter here."""
    spec = describe(LAYER, model.get_submodule(LAYER))
    rows = weight_rows(model.get_submodule(LAYER))
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randperm(spec.n_out, generator=generator)[:n_channels].sort().values.tolist()
    parts = [
        ChannelSplit(
            o, ((0,), (1,)), torch.rand(2, spec.n_taps, generator=generator), rows[o], 0.0, {}
        )
        for o in chosen
    ]
    return Split(spec, hash_weights(model), "random", {}, (), tuple(parts))


def infer(model: nn.Module, x: Tensor) -> None:
    """Plain inference."""
    with torch.no_grad():
        model(x)


def infer_hooked(model: nn.Module, x: Tensor) -> None:
    """Inference while a hook reads the concept channels; plain inference of the original."""
    handles = [
        module.concepts.register_forward_hook(lambda module, args, output: None)
        for module in model.modules()
        if isinstance(module, SplitLayer)
    ]
    infer(model, x)
    for handle in handles:
        handle.remove()


def infer_gated(model: nn.Module, x: Tensor) -> None:
    """Inference with one gate moved; plain inference of the original."""
    with ExitStack() as moves:
        for module in model.modules():
            if isinstance(module, SplitLayer):
                channel, concept = map(int, module.names[0].split("."))
                moves.enter_context(unbraid.gate(model, module, channel, concept, 0.0))
        infer(model, x)


def explain(model: nn.Module, x: Tensor) -> None:
    """Gradient by the input."""
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x)[:, 0].sum(), x)


JOBS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "inference": infer,
    "inference, a hook reading": infer_hooked,
    "inference, a gate moved": infer_gated,
    "gradient": explain,
}


def seconds(job: Callable[[nn.Module, Tensor], None], model: nn.Module, images: Tensor) -> float:
    """Measure a job's processor time."""
    start = time.process_time()
    job(model, images)
    return time.process_time() - start


def peak(job: str, n_channels: int, batch: int) -> float:
    """Peak memory of a job in a process of its own, MiB; 0 channels for the original."""
    command = [sys.executable, __file__, "--measure", job, str(n_channels), "--batch", str(batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak_of(run: Callable[[], object]) -> float:
    """Peak memory of this process while something runs, MiB; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def setting(n_channels: int, batch: int) -> tuple[nn.Module, Tensor]:
    """The network, split or not, and images."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    if n_channels:
        model = unbraid.apply(model, random_split(model, n_channels))
    return model, torch.randn(batch, 3, 224, 224)


def extra_seconds(job: Callable[[nn.Module, Tensor], None], layer: SplitLayer, x: Tensor) -> float:
    """Median time that the split layer takes beyond the original layer."""
    pairs = [(seconds(job, layer, x), seconds(job, layer.original, x)) for _ in range(21)]
    return statistics.median(own - original for own, original in pairs[1:])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--measure", nargs=2, metavar=("JOB", "CHANNELS"), help="memory only")
    options = parser.parse_args()
    if options.measure:
        job, n_channels = options.measure
        model, images = setting(int(n_channels), options.batch)
        print(peak_of(lambda: JOBS[job](model, images)))
        return
    print(describe_machine())
    print(f"{LAYER}, {options.batch} images, {options.rounds} rounds")
    print("| job | channels split | whole networks | by the layers | peak memory |")
    print("| --- | --- | --- | --- | --- |")
    model, images = setting(0, options.batch)
    x = torch.randn(options.batch, 512, 7, 7).relu()
    for name, job in JOBS.items():
        job(model, images)
        bare = peak(name, 0, options.batch)
        for n in COUNTS:
            network = setting(n, options.batch)[0]
            job(network, images)
            rounds = [
                (seconds(job, network, images), seconds(job, model, images))
                for _ in range(options.rounds)
            ]
            ratio = statistics.median(own / original for own, original in rounds)
            whole = statistics.median(original for _, original in rounds)
            extra = extra_seconds(job, network.get_submodule(LAYER), x)
            memory = peak(name, n, options.batch) / bare
            print(
                f"| {name} | {n} | {ratio:.3f} | {1 + extra / whole:.3f} | {memory:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
