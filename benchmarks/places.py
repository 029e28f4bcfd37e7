"""Places beside whole images: what a scan with them costs, and which find planted concepts better.

    python benchmarks/places.py cost [--images 512] [--places 1000] [--layer _conv_head]
    python benchmarks/places.py compare --data DIR [--layers _conv_head ...] [--out DIR]
    python benchmarks/places.py maps --train SCAN --val SCAN [--places 1000] [--planted 24]

`compare` adds channels to layers of EfficientNet-Lite0, each the sum of two of the layer's own,
brought to responses of one strength, which nothing behind the layer sees; so the network stays as
it is. It scans the pictures of DIR/train and DIR/val (folders of classes) as they are and pasted:
the middle half of a picture to the left of that of another. From the same scan, whole images and
places then find the planted channels by clusters and split them. `maps` does the same on the input
maps of scans with positions, which takes no network: those of two pictures are pasted. Figures for
docs/evidence-places.md; needs what lite0.py names.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

import unbraid
from lite0 import load_lite0
from planted_parts import (
    AGREEMENT,
    agreement,
    average,
    inputs_of,
    known_groups,
    own_part,
    parts_of,
    recovery,
)
from synthetic import RandomImages
from timing import in_turn, median, print_head, print_row, ratios, spread
from unbraid.finding import clusters
from unbraid.finding.arv import averaged_relevance
from unbraid.finding.clusters import find_clusters, mean_pooled
from unbraid.finding.findings import Findings
from unbraid.images.open import open_images
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import Split

LAYERS = ("_conv_head", "_blocks.8._expand_conv")
N_PLANTED = 24
N_SEEN = 64  # images that tell how strong channels respond
PLACES = 1000
SIZE = 224
PREPROCESS = v2.Compose(
    [
        v2.PILToTensor(),
        v2.Resize((SIZE, SIZE), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.498] * 3, [0.502] * 3),
    ]
)


class Pasted(Dataset[tuple[Tensor, int]]):
    """The middle half of each picture beside that of another one, drawn at random."""

    def __init__(self, images: Any) -> None:
        """Draw the others; labels are those of the picture on the left."""
        self.images, self.targets = images, list(images.targets)
        self.other = list(range(len(images)))
        random.Random(0).shuffle(self.other)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.other)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return a pasted picture and the label of its left half."""
        left, right = (self.images[n][0] for n in (index, self.other[index]))
        quarter = SIZE // 4
        halves = [image[:, :, quarter : SIZE - quarter] for image in (left, right)]
        return torch.cat(halves, 2), self.targets[index]


class Maps(Dataset[tuple[Tensor, int]]):
    """A layer's input maps, as images; pasted, the left half of one beside the right of another."""

    def __init__(self, scan: Scan, *, pasted: bool) -> None:
        """Read all of them."""
        maps, labels = [], []
        for records in scan.shards():
            assert records.input_map is not None
            maps.append(records.input_map)
            labels += records.label.tolist()
        self.maps, self.targets = torch.cat(maps), labels
        if pasted:
            order = list(range(len(labels)))
            random.Random(0).shuffle(order)
            half = (self.maps.shape[3] + 1) // 2
            other = self.maps[order]
            self.maps = torch.cat([self.maps[..., :half], other[..., half:]], 3)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return a map and the label of its left half."""
        return self.maps[index], self.targets[index]


class Planted(nn.Module):
    """A 1 x 1 convolution or linear layer with more channels, which it does not hand on."""

    def __init__(
        self, own: nn.Conv2d | nn.Linear, pairs: Sequence[tuple[int, int]], strength: Tensor
    ) -> None:
        """Add a channel for each pair: the sum of both rows, by their strength (C_out,)."""
        super().__init__()
        rows = own.weight.detach()
        scaled = rows / strength.view(-1, *[1] * (rows.dim() - 1))
        new = torch.stack([scaled[a] + scaled[b] for a, b in pairs])
        self.n_out, n_all = len(rows), len(rows) + len(new)
        self.axis = 1 if isinstance(own, nn.Conv2d) else -1
        if isinstance(own, nn.Conv2d):
            self.layer: nn.Module = nn.Conv2d(rows.shape[1], n_all, 1, bias=False)
        else:
            self.layer = nn.Linear(rows.shape[1], n_all, bias=own.bias is not None)
        self.layer.weight = nn.Parameter(torch.cat([rows, new]))
        if own.bias is not None:
            self.layer.bias = nn.Parameter(torch.cat([own.bias.detach(), rows.new_zeros(len(new))]))

    def forward(self, x: Tensor) -> Tensor:
        """Give what the layer gave."""
        return self.layer(x).narrow(self.axis, 0, self.n_out)


def strength_of(model: nn.Module, layer: nn.Module, images: Dataset[Any]) -> Tensor:
    """What the strongest of a thousand places of some images give a layer's channels, (C_out,)."""
    kept: list[Tensor] = []
    some = range(0, len(images), max(1, len(images) // N_SEEN))  # type: ignore[arg-type]

    def keep(_: nn.Module, __: Any, z: Tensor) -> None:
        kept.append(z.mT if isinstance(layer, nn.Linear) else z.flatten(2))

    with layer.register_forward_hook(keep), torch.no_grad():
        for n in some:
            model(images[n][0][None])
    return torch.cat(kept, 2)[0].quantile(0.999, dim=1).clamp(min=1e-6)


def plant(
    model: nn.Module, name: str, images: Dataset[Any], n: int = N_PLANTED
) -> list[tuple[int, int]]:
    """Add n channels to a layer; of which two each is the sum."""
    own = model.get_submodule(name)
    assert isinstance(own, nn.Linear) or (own.bias is None and own.kernel_size == (1, 1))
    draw = random.Random(name)
    channels = draw.sample(range(len(own.weight)), 2 * n)
    pairs = list(zip(channels[::2], channels[1::2], strict=True))
    parent, _, last = name.rpartition(".")
    new = Planted(own, pairs, strength_of(model, own, images))
    setattr(model.get_submodule(parent) if parent else model, last, new)
    return pairs


def search(scan: Scan, channels: Sequence[int]) -> Findings:
    """Find by clusters, in some channels only."""
    some = partial(clusters.top_images, channels=channels)
    with mock.patch.object(clusters, "top_images", some):
        return unbraid.find(scan, concepts="clusters")


def false_splits(scan: Scan, channels: Sequence[int]) -> int:
    """In how many channels a normal cloud, of the mean and covariance of what is real, is found."""
    everywhere, n = mean_pooled(scan), 0
    for o, top in clusters.top_images(scan, channels):
        origin = averaged_relevance(scan, o, everywhere)
        draw, size = torch.Generator().manual_seed(o), (len(top.relevance),) * 2
        mean = top.relevance.mean(0)
        mix = torch.randn(size, generator=draw, dtype=torch.float64) / size[0] ** 0.5
        n += find_clusters(mean + mix @ (top.relevance - mean), origin)[1] < 0.5
    return n


def n_clustered(scan: Scan, channels: Sequence[int]) -> int:
    """How many channels have two clusters or more, however alike what feeds them is."""
    everywhere = mean_pooled(scan)
    tops = clusters.top_images(scan, channels)
    origins = ((top, averaged_relevance(scan, o, everywhere)) for o, top in tops)
    return sum(len(find_clusters(top.relevance, origin)[0]) > 1 for top, origin in origins)


def compare(
    train: Scan, val: Scan, pairs: Sequence[tuple[int, int]], *, recover: bool = True
) -> Iterator[tuple[Any, ...]]:
    """Figures of whole images and of places, on held-out images and places.

    Splits take the most time; they are made if `recover`, to see what of the parts comes back.
    """
    channels = range(train.layer.n_out - len(pairs), train.layer.n_out)
    truth = {o: parts_of(train.weight, o, pair) for o, pair in zip(channels, pairs, strict=True)}
    ways = {"images": (train, val), "places": (train.places, val.places)}
    split_by: dict[str, Split] = {}
    for way, (own, held_out) in ways.items():
        found = search(own, channels)
        yield way, "found", f"{len(found.concepts)} of {len(pairs)}"
        clustered = f"{n_clustered(own, channels)} of {len(pairs)}"
        yield way, "two clusters or more, alike or not", clustered
        yield way, "false: normal clouds found", f"{false_splits(own, channels)} of {len(pairs)}"
        if recover:
            split_by[f"{way}, parts known"] = unbraid.split(own, known_groups(own, truth))
        if not found.concepts:
            continue
        if recover:
            split_by[way] = unbraid.split(own, found)
        scores = agreement(held_out, found, truth)
        n_concepts = fmean(map(len, found.concepts.values()))
        yield way, "concepts a channel", f"{n_concepts:.2f}"
        for what, figures in zip(AGREEMENT, zip(*scores.values(), strict=True), strict=True):
            known = [figure for figure in figures if not math.isnan(figure)]
            yield way, what, f"{fmean(known):.3f}" if known else "none"
    if recover:
        yield from recovered(split_by, truth, train, val)


def recovered(
    split_by: Mapping[str, Split], truth: Mapping[int, Tensor], train: Scan, val: Scan
) -> Iterator[tuple[Any, ...]]:
    """What concept channels have of the parts, on held-out images and on held-out places.

    Each way is judged by all channels it found, and by those that both found. Beside them stand
    the whole channel, and the same masks with their inputs in another order.
    """
    judged = {
        "images": (inputs_of(train), inputs_of(val)),
        "places": (inputs_of(train.places), inputs_of(val.places)),
    }
    by_way = {way: {part.channel: part for part in own.channels} for way, own in split_by.items()}
    both = set(by_way.get("images", ())) & set(by_way.get("places", ()))
    for way, split in by_way.items():
        some = {way: set(split)}
        if way in ("images", "places") and both:
            some[f"{way}, of channels both found"] = both
        for name, channels in some.items():
            order = torch.randperm(train.layer.n_taps, generator=torch.Generator().manual_seed(0))
            rows = {o: split[o].rows.double() for o in channels}
            mixed = {o: split[o].masks[:, order].double() * truth[o].sum(0)[None] for o in channels}
            yield from judge(name, rows, truth, judged)
            yield from judge(f"{name}, masks permuted", mixed, truth, judged)
    whole = {o: parts.sum(0)[None] for o, parts in truth.items()}
    yield from judge("whole channel", whole, truth, judged)
    yield from judge("the parts themselves", truth, truth, judged)


def judge(
    way: str,
    rows: Mapping[int, Tensor],
    truth: Mapping[int, Tensor],
    judged: Mapping[str, tuple[Tensor, Tensor]],
) -> Iterator[tuple[Any, ...]]:
    """Means over channels of what `own_part` and `recovery` tell of rows, on images and places."""
    for on, (seen, held_out) in judged.items():
        one = average(own_part(own, truth[o], seen, held_out) for o, own in rows.items())
        alike = fmean(recovery(own, truth[o], held_out) for o, own in rows.items())
        yield (
            way,
            f"{len(rows)} channels, on {on}",
            f"AUROC own part against other {one.auroc:.3f}",
            f"against all {one.among_all:.3f}",
            f"error as a copy {one.copy:.3f}",
            f"each part has one {one.both:.2f}",
            f"correlation {alike:.3f}",
        )


def run_compare(data: Path, layers: Sequence[str], out: Path, n_images: int | None) -> None:
    """Scan pictures as they are and pasted, and print all figures."""
    unbraid.keep_memory()
    model = load_lite0()
    seen: Any = open_images(str(data / "train"), PREPROCESS)
    pairs = {f"{name}.layer": plant(model, name, seen) for name in layers}
    for kind in ("whole", "pasted"):
        scans = {}
        for part in ("train", "val"):
            images: Any = open_images(str(data / part), PREPROCESS)
            images = images if kind == "whole" else Pasted(images)
            options = {"labels": "predicted", "places": PLACES, "progress": True}
            if n_images is not None:
                options["indices"] = range(0, len(images), max(1, len(images) // n_images))
            where = out / f"{kind}-{part}"
            scans[part] = unbraid.scan(model, list(pairs), images, where, **options)
        for name, own in pairs.items():
            for row in compare(scans["train"][name], scans["val"][name], own):
                print_row(kind, name, *row)


def alone(
    planted: Planted, pairs: Sequence[tuple[int, int]]
) -> tuple[nn.Module, list[tuple[int, int]]]:
    """The planted channels and their parts as a layer, without all others, which take time."""
    parts = [o for pair in pairs for o in pair]
    rows = planted.layer.weight.detach()
    rows = torch.cat([rows[parts], rows[planted.n_out :]])
    layer = nn.Conv2d(rows.shape[1], len(rows), 1, bias=False)
    layer.weight = nn.Parameter(rows)
    return layer, [(2 * k, 2 * k + 1) for k in range(len(pairs))]


def run_maps(
    train: Scan,
    val: Scan,
    n_places: int,
    n_images: int | None,
    n_planted: int,
    *,
    recover: bool = True,
) -> None:
    """Do the same on the input maps of scans with positions."""
    own = nn.Conv2d(train.layer.n_in, train.layer.n_out, 1, bias=False)
    own.weight.data = train.weight.view_as(own.weight)
    parts = {"layer": own, "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    model = nn.Sequential(OrderedDict(parts)).eval()
    pairs = plant(model, "layer", Maps(train, pasted=False), n_planted)
    model.layer, pairs = alone(model.layer, pairs)  # type: ignore[arg-type]
    for kind in ("whole", "pasted"):
        with tempfile.TemporaryDirectory() as out:
            options: Any = {"labels": "predicted", "places": n_places}
            scans = []
            for part, own_scan in (("train", train), ("val", val)):
                images = Maps(own_scan, pasted=kind == "pasted")
                some = range(0, len(images), max(1, len(images) // (n_images or len(images))))
                where = Path(out) / part
                scans.append(unbraid.scan(model, "layer", images, where, indices=some, **options))
            for row in compare(*scans, pairs, recover=recover):
                print_row(kind, train.layer.name, *row)


def run_cost(layer: str, n_images: int, n_places: int, rounds: int) -> None:
    """Print what a scan with places takes, to one without, in turns."""
    unbraid.keep_memory()
    model, images = load_lite0(), RandomImages(n_images)

    def scan(places: int) -> int:
        with tempfile.TemporaryDirectory() as out:
            made = unbraid.scan(
                model, layer, images, out, places=places, batch_size=32, labels="predicted"
            )
            if not places:
                return 0
            return sum(file.stat().st_size for file in made.places.path.glob("*"))

    ways = {"without": partial(scan, 0), "with places": partial(scan, n_places)}
    taken = in_turn(ways, rounds)
    print_head("layer", "way", "s", "wall time", "processor time", "least to least")
    base = taken["without"]
    for way, times in taken.items():
        least = min(own[1] for own in times) / min(own[1] for own in base)
        spreads = [spread(ratios(times, base, kind)) for kind in (0, 1)]
        print_row(layer, way, f"{median(times, 0):.1f}", *spreads, f"{least:.3f}")
    print(f"\nBytes of the scan of places: {scan(n_places):,}")


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("cost", "compare", "maps"))
    parser.add_argument("--train", help="a scan with positions")
    parser.add_argument("--val", help="likewise")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--layer", default=LAYERS[0])
    parser.add_argument("--images", type=int)
    parser.add_argument("--places", type=int, default=PLACES)
    parser.add_argument("--planted", type=int, default=N_PLANTED, help="channels, for maps")
    parser.add_argument("--no-split", action="store_true", help="only find, which is fast")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="for scans, which are taken up again")
    asked = parser.parse_args()
    if asked.what == "cost":
        run_cost(asked.layer, asked.images or 512, asked.places, asked.rounds)
        return
    if asked.what == "maps":
        scans = (unbraid.open_scan(asked.train), unbraid.open_scan(asked.val))
        told = asked.places, asked.images, asked.planted
        run_maps(*scans, *told, recover=not asked.no_split)
        return
    with tempfile.TemporaryDirectory() as scratch:
        run_compare(asked.data, asked.layers, asked.out or Path(scratch), asked.images)


if __name__ == "__main__":
    main()
