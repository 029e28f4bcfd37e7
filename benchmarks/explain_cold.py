"""How long `unbraid explain` takes in a fresh process: a saved split, a new photograph.

    python benchmarks/explain_cold.py --networks demo resnet50 lite0
    python benchmarks/explain_cold.py --networks demo --against SRC    # in turns with other sources

A run's folder is put together by hand: ResNet-50 has random weights, and concepts are images of
noise in two groups; neither changes how long it takes. Each round starts `unbraid explain RUN
photo.png` anew; given are wall and processor seconds, the smallest of several. `lite0` needs what
`benchmarks/lite0.py` says.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import unbraid
from edit import load, split_by_hand
from layers import LAST
from timing import print_head, print_row
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.running.folders import Settings, Thresholds

HERE = Path(__file__).parent
NETWORKS = ("demo", *LAST)
OWN = {  # how the folder names a network, and what the command line adds
    "demo": ({"demo": True}, []),
    "resnet50": ({"model": "torchvision:resnet50", "weights": "weights.safetensors"}, []),
    "lite0": (
        {"model": f"{HERE / 'lite0.py'}:network"},
        ["--model", f"{HERE / 'lite0.py'}:network"],
    ),
}


def prepare(network: str, folder: Path) -> list[str]:
    """Put together a run's folder; return the command's words."""
    if network == "demo":
        scan = unbraid.scan(load_network(), LAYER, load_images("train"), folder / "scan-train")
        split = unbraid.split(scan, unbraid.find(scan))
    else:
        model = load(network)
        split = split_by_hand(model, LAST[network], folder / "scan-train")
        if network == "resnet50":
            from safetensors.torch import save_file

            save_file(model.state_dict(), folder / "weights.safetensors")
    split.save(folder / "split.safetensors")
    source, words = OWN[network]
    if "weights" in source:
        source = source | {"weights": str(folder / source["weights"])}
    settings = Settings("by hand", Thresholds(), source)
    (folder / "settings.json").write_text(json.dumps(asdict(settings)))
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((800, 600), Image.Resampling.BICUBIC)
    photo.save(folder / "photo.png")
    place = [str(folder), str(folder / "photo.png"), "--out", str(folder / "explained")]
    return [sys.executable, "-m", "unbraid", "explain", *place, *words]


def seconds(words: list[str], source: str) -> tuple[float, float]:
    """Wall and processor time of a command."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        words, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": source}
    )
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure networks, in turns with other sources if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["demo"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", default=None, help="another src/ folder")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    sources = {"here": str(HERE.parent / "src")}
    if asked.against:
        sources["against"] = str(Path(asked.against).resolve())
    print_head("network", "sources", "wall", "processor")
    for network in asked.networks:
        with tempfile.TemporaryDirectory() as folder:
            words = prepare(network, Path(folder))
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
            for _ in range(asked.rounds):
                for name, source in sources.items():
                    taken[name].append(seconds(words, source))
        for name, own in taken.items():
            print_row(network, name, *(f"{min(k):.1f} s" for k in zip(*own, strict=True)))


if __name__ == "__main__":
    main()
