"""How long least squares takes on a layer of ResNet-50's size, from pooled inputs alone.

    python benchmarks/split_speed.py                           # 580 channels of 512 inputs
    python benchmarks/split_speed.py --kernel 3 --channels 40  # 4608 taps each

A synthetic scan of 1000 classes: every class has causes of its own among the inputs, every image
its own mixture of them. Each channel is divided among 2 to 20 concepts of one or two classes. Told
are the time for all of `unbraid.split`, reading included, the largest KKT residual, and the peak of
memory.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
from pathlib import Path

import torch

import unbraid
from machine import describe_machine
from unbraid.base.files import write_tensors, write_whole
from unbraid.finding.findings import Concept, Findings
from unbraid.networks.spec import LayerSpec
from unbraid.scanning.manifest import Manifest
from unbraid.scanning.records import Records, Scan, write_shard

N_OUT, N_IN, N_CLASSES, SHARD = 2048, 512, 1000, 1000


def write_scan(folder: Path, n_images: int, kernel: int) -> Scan:
    """Write a scan of as many images of each class, class by class as in a folder."""
    square, one = (kernel, kernel), (1, 1)
    pad = (kernel // 2, kernel // 2)
    spec = LayerSpec(
        "layer", "Conv2d", N_OUT, N_IN, square, one, (pad, pad), one, 1, "zeros", False
    )
    manifest = Manifest(
        weights="synthetic",
        layer=spec,
        data="synthetic",
        n_images=n_images * N_CLASSES,
        class_names=tuple(map(str, range(N_CLASSES))),
        preprocessing="",
        dtype="float32",
        min_share=0.005,
        classes=None,
        positions=False,
        shard_size=SHARD,
        batch_size=64,
        skip_broken=False,
        source={},
        versions={},
    )
    weight = torch.randn(N_OUT, spec.n_taps) / 20
    bias = torch.zeros(N_OUT)
    write_tensors(folder / "layer.safetensors", {"weight": weight, "bias": bias}, {})
    causes = torch.rand(N_CLASSES, N_IN) ** 4
    offsets = 0.8 + 0.4 * torch.rand(kernel**2)  # neighbouring taps see nearly the same
    for shard in range(manifest.n_shards):
        index = torch.arange(shard * SHARD, (shard + 1) * SHARD)
        label = index // n_images
        inputs = causes[label] * 1.5 * torch.rand(SHARD, N_IN) + 0.05 * torch.rand(SHARD, N_IN)
        inputs = inputs * 49 * (0.5 + torch.rand(SHARD, 1))
        noise = 0.9 + 0.2 * torch.rand(SHARD, N_IN, kernel**2)
        records = Records(
            index=index,
            label=label,
            prediction=label.clone(),
            n_positions=torch.full_like(index, 49),
            pooled=(inputs[:, :, None] * offsets * noise).flatten(1)[:, None],
            share_start=torch.zeros(SHARD + 1, dtype=torch.int64),
            share_channel=torch.zeros(0, dtype=torch.int32),
            share_value=torch.zeros(0),
            broken=torch.zeros(0, dtype=torch.int64),
        )
        write_shard(folder, shard, records)
    write_whole(folder / "manifest.json", manifest.to_json().encode())
    return unbraid.open_scan(folder)


def findings(n_channels: int) -> Findings:
    """Concepts at random: 2 to 20 a channel, of one or two classes."""
    draw = random.Random(0)
    concepts: dict[int, tuple[Concept, ...]] = {}
    for channel in sorted(draw.sample(range(N_OUT), n_channels)):
        sizes = [draw.choice((1, 1, 2)) for _ in range(draw.randint(2, 20))]
        classes = iter(draw.sample(range(N_CLASSES), sum(sizes)))
        concepts[channel] = tuple(tuple(sorted(next(classes) for _ in range(n))) for n in sizes)
    names = tuple(map(str, range(N_CLASSES)))
    return Findings(0.01, 0.75, 0.5, (), concepts, names, "", "layer", "synthetic")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=580)
    parser.add_argument("--images", type=int, default=50, help="of each class")
    parser.add_argument("--kernel", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    found = findings(options.channels)
    n_concepts = sum(map(len, found.concepts.values()))
    with tempfile.TemporaryDirectory() as name:
        scan = write_scan(Path(name), options.images, options.kernel)
        print(f"Machine: {describe_machine()}")
        print(
            f"{options.channels} channels of {scan.layer.n_taps} taps, {n_concepts} concepts, "
            f"{options.images} images of each of {N_CLASSES} classes"
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        wall, processor = time.perf_counter(), time.process_time()
        first = unbraid.split(scan, found)
        print(
            f"split: {time.perf_counter() - wall:.1f} s, of processors "
            f"{time.process_time() - processor:.1f} s; lambda {first.channels[0].info['lambda']:g}"
        )
        wall, processor = time.perf_counter(), time.process_time()
        again = unbraid.split(scan, found, start=first)
        print(
            f"again, from that: {time.perf_counter() - wall:.1f} s, of processors "
            f"{time.process_time() - processor:.1f} s"
        )
        pairs = list(zip(first.channels, again.channels, strict=True))
        change = max(float((a.masks - b.masks).abs().max()) for a, b in pairs)
        residual = max(part.info["kkt_residual"] for part in first.channels)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"largest KKT residual {residual:.1e}; largest change of a mask {change:.1e}")
        print(f"peak memory {peak:.1f} GiB, before splitting {before:.1f} GiB")


if __name__ == "__main__":
    main()
