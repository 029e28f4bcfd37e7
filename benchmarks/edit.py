"""What an edit costs when the network runs, and how near its files are to the gated network.

    python benchmarks/edit.py --networks resnet50 lite0

For each network one concept channel is switched off and another scaled. Original and edited network
are exported, to ONNX and by torch.export, and run on one image at a time, on one thread, in turns:
each round runs every way once, every second round backwards. Given are the ratio of the medians and
that of the smallest times, edited to original, wall and processor; beside them that of the original
exported twice, which is what the machine's own noise makes of a ratio of 1. Differences are of the
edited network's logits from the split network's under gates at the same values, relative to the
largest logit.

ResNet-50 has random weights, and concepts are put together by hand of images of noise: neither
figure depends on them. `lite0` needs what `benchmarks/lite0.py` says; ONNX
`pip install "unbraid[onnx]"`.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

import unbraid
from layers import LAST, Noise
from timing import in_turn, print_head, print_row
from unbraid.running.edit import _as_onnx, _export
from unbraid.surgery.edit import check_edit

CHANNELS, SCALES = (3, 11), {"3.1": 0.0, "11.0": 2.0}
N_IMAGES = 40  # of noise that are scanned
N_TRIED = 8  # that logits are compared on
WAYS = ("original", "original again", "edited")


def load(network: str) -> nn.Module:
    """Load a network."""
    if network == "resnet50":
        torch.manual_seed(0)
        return models.resnet50().eval()
    from lite0 import load_lite0

    return load_lite0()


def split_by_hand(model: nn.Module, layer: str, folder: Path) -> unbraid.Split:
    """Split two channels between images of even and odd places."""
    scan = unbraid.scan(model, layer, Noise(N_IMAGES), folder, batch_size=8)
    chosen = {channel: [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]] for channel in CHANNELS}
    return unbraid.split(scan, unbraid.find(scan, channels=chosen))


def gated(model: nn.Module, split: unbraid.Split, images: Tensor) -> Tensor:
    """Logits of the split network under gates."""
    model2 = unbraid.apply(model, split)
    for name, value in SCALES.items():
        channel, concept = map(int, name.split("."))
        model2.gate(split.layer.name, channel, concept, value)
    with torch.no_grad():
        return model2(images)


def runners(model: nn.Module, example: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """What runs a network's two files."""
    import onnxruntime

    program, _ = _export(model, example)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        _as_onnx(program), options, providers=["CPUExecutionProvider"]
    )
    (entry,) = session.get_inputs()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()

    def run_onnx(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {entry.name: images.numpy()})[0])

    def run_program(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return {"ONNX": run_onnx, "torch.export": run_program}


def measure(network: str, rounds: int) -> None:
    """Print a row for each kind of file."""
    model, layer = load(network), LAST[network]
    images = torch.stack([Noise(100)[k][0] for k in range(N_TRIED)])
    with tempfile.TemporaryDirectory() as folder:
        split = split_by_hand(model, layer, Path(folder))
    edited = unbraid.edit(model, split, SCALES)
    check_edit(model, split, SCALES, edited, images)
    expected = gated(model, split, images)
    made = {
        name: runners(own, images[:2])
        for name, own in zip(WAYS, (model, model, edited), strict=True)
    }
    for kind in ("ONNX", "torch.export"):
        found = made["edited"][kind](images)
        difference = float((found - expected).abs().max() / expected.abs().max())
        ways: dict[str, Callable[[], Any]] = {
            name: lambda run=made[name][kind]: run(images[:1]) for name in WAYS
        }
        taken = in_turn(ways, rounds, aloud=False)
        cells = []
        for other in ("edited", "original again"):
            for which in (statistics.median, min):
                both = [
                    which([own[k] for own in taken[other]])
                    / which([own[k] for own in taken["original"]])
                    for k in (0, 1)
                ]
                cells.append(" / ".join(f"{ratio:.3f}" for ratio in both))
        milliseconds = 1000 * min(own[0] for own in taken["original"])
        print_row(network, kind, f"{difference:.1e}", f"{milliseconds:.1f} ms", *cells)


def main() -> None:
    """Measure networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=LAST, default=["resnet50"])
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print_head(
        *("network", "file", "difference", "original"),
        *("edited, medians (wall / processor)", "smallest"),
        *("original twice, medians", "smallest"),
    )
    for network in asked.networks:
        measure(network, asked.rounds)


if __name__ == "__main__":
    main()
