"""How often tau="auto" finds something where there is nothing to find: labels are shuffled.

    python benchmarks/shuffled.py              # the demo, scanned anew for each draw
    python benchmarks/shuffled.py --scan DIR   # a scan of yours, labels shuffled behind it
    python benchmarks/shuffled.py --maps DIR   # EfficientNet-Lite0's `_conv_head`, a scan with
                                               # positions: shares anew for the labels shuffled

Prints, of all draws, in how many a channel is found surely, and in how many any is found.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import unbraid
from lite0 import load_lite0
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.networks.relevance import shares
from unbraid.scanning.records import Scan, write_shard

MIN_SHARE = 0.001


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


def anew(scan: Scan, place: Path, n_images: int | None) -> Callable[[Path, int], Scan]:
    """What scans Lite0's head with its labels shuffled, all images or some of each class.

    Behind the layer all is the image's own but the row of the last weights, so the gradient of any
    logit is that row times what one pass gives; the shares are those of a scan, to 1e-7.
    """
    network = load_lite0()
    behind = nn.Sequential(network._bn1, network._swish, network._avg_pooling, nn.Flatten())
    head = nn.Sequential(network._conv_head, *behind, network._fc).eval()
    columns = {name: torch.cat(list(scan.columns(name))) for name in ("label", "input_map")}
    labels, maps, active = columns["label"], columns["input_map"], []
    for part in maps.split(100):
        z = head[0](part).detach().requires_grad_()
        slope = torch.autograd.grad(behind.eval()(z).sum(), z)[0]
        active.append((slope * z).detach().flatten(2).sum(2))
    relevance, row = torch.cat(active), network._fc.weight.detach()

    def some(seed: int) -> tuple[Tensor, Tensor]:
        """Images, in order, and their labels shuffled."""
        generator = torch.Generator().manual_seed(seed)
        kept = torch.arange(len(labels))
        if n_images is not None:
            order = torch.randperm(len(labels), generator=generator)
            of_class = [order[labels[order] == own][:n_images] for own in labels.unique().tolist()]
            kept = torch.cat(of_class).sort().values
        return kept, labels[kept][torch.randperm(len(kept), generator=generator)]

    def scanned(images: Tensor, name: str) -> Scan:
        dataset = [(maps[n], int(labels[n])) for n in images.tolist()]
        return unbraid.scan(head, "0", dataset, place / name, batch_size=250, min_share=MIN_SHARE)

    whole = scanned(torch.arange(len(labels)), "whole")
    model = whole if n_images is None else scanned(some(0)[0], "model")
    names = ("pooled", "prediction", "n_positions")
    known = {name: torch.cat(list(whole.columns(name))) for name in names}

    def draw(folder: Path, seed: int) -> Scan:
        kept, shuffled = some(seed)
        for name in ("manifest.json", "layer.safetensors"):
            shutil.copy(model.path / name, folder / name)
        for shard, records in enumerate(model.shards()):
            own, label = kept[: len(records)], shuffled[: len(records)]
            kept, shuffled = kept[len(records) :], shuffled[len(records) :]
            share = shares(row[label] * relevance[own])
            large = share >= MIN_SHARE
            changed = {name: values[own] for name, values in known.items()} | {
                "label": label,
                "share_start": torch.cat([torch.zeros(1).long(), large.sum(1).cumsum(0)]),
                "share_channel": large.nonzero()[:, 1].int(),
                "share_value": share[large],
            }
            none = {"spread": None, "spread_start": None}
            write_shard(folder, shard, replace(records, **changed, **none), model.manifest)
        return unbraid.open_scan(folder)

    return draw


def main() -> None:
    """Draw, find and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--maps", type=Path)
    parser.add_argument("--images", type=int, help="of each class, with --maps")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="seed of the first draw")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # a network is mostly wrong by shuffled labels
    n_sure = n_any = 0
    with tempfile.TemporaryDirectory() as kept:
        draw = demo
        if options.scan:
            draw = partial(behind, unbraid.open_scan(options.scan))
        elif options.maps:
            draw = anew(unbraid.open_scan(options.maps), Path(kept), options.images)
        for seed in range(options.first, options.first + options.draws):
            with tempfile.TemporaryDirectory() as folder:
                found = unbraid.find(draw(Path(folder), seed), tau="auto")
            print(f"seed {seed}: tau {found.tau:g}, {found.channels_in_words}", flush=True)
            n_sure += bool(found.sure_channels)
            n_any += bool(found.channels)
    print(f"sure in {n_sure}, any in {n_any} of {options.draws}")


if __name__ == "__main__":
    main()
