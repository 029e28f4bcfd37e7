"""What a split network costs beside the original, and what switching its channels off costs.

    python benchmarks/cost.py           # inference, hooks, gates and gradients, by channels split
    python benchmarks/cost.py ablate    # unbraid.ablate beside bare inference, and beside gates

ResNet-50 with random weights and random images; channels are divided at random among two concepts
each. 1, 80 and 580 channels of `layer4.2.conv3` are split, as many as the published scans found.
All else in the two networks is the same, so two ratios are taken: of whole networks that take
turns, which a busy machine disturbs by several per cent; and of the split layer and the original
one taking turns on the layer's own input, their difference added to the whole network's time. To
switch off: 10 channels, so 30 things, in a late layer and in one with a third of the network behind
it; a gate is moved for one concept only, and its time is scaled, since each takes a full pass.
Processor time, medians; memory is the peak of a process of its own.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
import torchvision
from torch import Tensor, nn

import unbraid
from synthetic import RandomImages, random_split
from timing import alone, in_turn, median, peak_memory, print_head, print_row, ratios
from unbraid.surgery.split_layer import SplitLayer

LAYER = "layer4.2.conv3"
COUNTS = (1, 80, 580)
ABLATED = (LAYER, "layer3.2.conv2")
N_ABLATED = 10  # channels, each with two concepts, and switched off as a whole besides


def network(layer: str = LAYER, n_channels: int = 0) -> nn.Module:
    """Build the network, with so many channels split."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    if not n_channels:
        return model
    n_out = model.get_submodule(layer).out_channels
    chosen = torch.randperm(n_out)[:n_channels].sort().values.tolist()
    return unbraid.apply(model, random_split(model, layer, {o: [[0], [1]] for o in chosen}))


def split_layers(model: nn.Module) -> list[SplitLayer]:
    """The layers that are split; none in the original."""
    return [module for module in model.modules() if isinstance(module, SplitLayer)]


def infer(model: nn.Module, x: Tensor) -> None:
    """Plain inference."""
    with torch.no_grad():
        model(x)


def infer_hooked(model: nn.Module, x: Tensor) -> None:
    """Inference while a hook reads the concept channels."""
    with ExitStack() as hooks:
        for layer in split_layers(model):
            handle = layer.concepts.register_forward_hook(lambda module, args, output: None)
            hooks.callback(handle.remove)
        infer(model, x)


def infer_gated(model: nn.Module, x: Tensor) -> None:
    """Inference with one gate moved."""
    with ExitStack() as gates:
        for layer in split_layers(model):
            channel, concept = map(int, layer.names[0].split("."))
            gates.enter_context(unbraid.gate(model, layer, channel, concept, 0.0))
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


def compare(job: str, n_channels: int, n_images: int, rounds: int) -> list[str]:
    """Cells of a job with so many channels split: both ratios of time, and that of memory."""
    model, changed = network(), network(LAYER, n_channels)
    images = torch.randn(n_images, 3, 224, 224)
    do = JOBS[job]
    ways = {"split": partial(do, changed, images), "original": partial(do, model, images)}
    whole = in_turn(ways, rounds, aloud=False)
    layer, x = changed.get_submodule(LAYER), torch.randn(n_images, 512, 7, 7).relu()
    ways = {"split": partial(do, layer, x), "original": partial(do, layer.original, x)}
    own = in_turn(ways, 20, aloud=False)
    pairs = zip(own["split"], own["original"], strict=True)
    extra = statistics.median(split[1] - original[1] for split, original in pairs)
    peaks = [float(alone(__file__, "one", job, n, "--images", n_images)) for n in (n_channels, 0)]
    return [
        f"{statistics.median(ratios(whole['split'], whole['original'], 1)):.3f}",
        f"{1 + extra / median(whole['original'], 1):.3f}",
        f"{peaks[0] / peaks[1]:.3f}",
    ]


def compare_ablation(layer: str, n_images: int, rounds: int) -> list[str]:
    """Cells of a layer: bare inference in s, and what switching off takes beside it."""
    model2, images = network(layer, N_ABLATED), RandomImages(n_images, n_classes=4)
    ways = {
        "bare": partial(infer, network(), images.images),
        "ablate": partial(unbraid.ablate, model2, images, batch_size=n_images),
        "gate": partial(infer_gated, model2, images.images),
    }
    taken = in_turn(ways, rounds, aloud=False)
    ablation, gate = (ratios(taken[name], taken["bare"], 1) for name in ("ablate", "gate"))
    gates = statistics.median(gate) * 4 * N_ABLATED  # two concepts, the rest, the whole
    return [f"{median(taken['bare'], 1):.2f}", f"{statistics.median(ablation):.2f}", f"{gates:.1f}"]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("split", "ablate", "one"), default="split")
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help="in a batch; by default 8, or 32 to switch off")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    if asked.what == "one":
        job, n_channels = asked.rest
        JOBS[job](network(LAYER, int(n_channels)), torch.randn(asked.images, 3, 224, 224))
        print(peak_memory())
    elif asked.what == "ablate":
        print_head("layer", "bare inference, s", "`unbraid.ablate` to bare", "gates to bare")
        for layer in ABLATED:
            print_row(f"`{layer}`", *compare_ablation(layer, asked.images or 32, asked.rounds))
    else:
        print_head("job", "channels split", "whole networks", "by the layers", "peak memory")
        for job in JOBS:
            for n_channels in COUNTS:
                cells = compare(job, n_channels, asked.images or 8, asked.rounds)
                print_row(job, n_channels, *cells)


if __name__ == "__main__":
    main()
