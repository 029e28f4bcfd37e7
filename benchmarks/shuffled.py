"""How often tau="auto" finds something where there is nothing to find: labels are shuffled.

    python benchmarks/shuffled.py              # the demo, scanned anew for each draw
    python benchmarks/shuffled.py --scan DIR   # a scan of yours, labels shuffled behind it

Prints, of all draws, in how many a channel is found surely, and in how many any is found.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch

import unbraid
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.scanning.records import Scan, write_shard


def demo(folder: Path, seed: int) -> Scan:
    """Scan the demo's training images with their labels shuffled."""
    images = load_images("train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [(images[n][0], images.targets[k]) for n, k in enumerate(order)]
    return unbraid.scan(load_network(), LAYER, shuffled, folder, batch_size=250)


def behind(scan: Scan, folder: Path, seed: int) -> Scan:
    """Copy a scan with its labels shuffled; shares stay those of the labels that were given."""
    for name in ("manifest.json", "layer.safetensors"):
        shutil.copy(scan.path / name, folder / name)
    labels = torch.cat(list(scan.columns("label")))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    for shard, records in enumerate(scan.shards()):
        own, labels = labels[: len(records)], labels[len(records) :]
        write_shard(folder, shard, replace(records, label=own))
    return unbraid.open_scan(folder)


def main() -> None:
    """Draw, find and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--draws", type=int, default=40)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # a network is mostly wrong by shuffled labels
    n_sure = n_any = 0
    for seed in range(options.draws):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            scan = options.scan and unbraid.open_scan(options.scan)
            shuffled = behind(scan, place, seed) if scan else demo(place, seed)
            found = unbraid.find(shuffled, tau="auto")
        n_sure += bool(found.sure_channels)
        n_any += bool(found.channels)
    print(f"sure in {n_sure}, any in {n_any} of {options.draws}")


if __name__ == "__main__":
    main()
