"""Scans written by hand, whose every share and ARV is known."""

from dataclasses import dataclass

import torch

from unbraid.base.files import write_tensors, write_whole
from unbraid.networks.spec import LayerSpec
from unbraid.scanning.fields import Records
from unbraid.scanning.manifest import Manifest
from unbraid.scanning.records import Scan, open_one, write_shard


def write_scan(
    folder, *, shares, labels, pooled=None, weight=None, bias=None, min_share=0.005, shard_size=7
):
    """Write a fully connected layer's scan: shares (N, C_out), pooled (N, J), weight (C_out, J)."""
    n_images, n_out = shares.shape
    pooled = torch.ones(n_images, 2).double() if pooled is None else pooled
    n_in = pooled.shape[1]
    weight = torch.ones(n_out, n_in).double() if weight is None else weight
    one, none = (1,), ((0, 0),)
    manifest = Manifest(
        layer=LayerSpec("layer", "Linear", n_out, n_in, one, one, none, one, 1, "zeros", True),
        dtype=str(pooled.dtype).removeprefix("torch."),
        **{"weights": "0" * 64, "data": "by hand", "preprocessing": "", "min_share": min_share},
        **{"n_images": n_images, "shard_size": shard_size, "batch_size": shard_size},
        **{"class_names": (), "classes": None, "positions": False, "skip_broken": False},
        **{"source": {}, "versions": {}},
    )
    for shard in range(manifest.n_shards):
        index = torch.arange(shard * shard_size, min((shard + 1) * shard_size, n_images))
        label, own = torch.tensor(labels)[index], shares[index]
        kept = own >= min_share
        records = Records(
            **{"index": index, "label": label, "prediction": label.clone()},
            n_positions=torch.ones_like(index),
            pooled=pooled[index][:, None],
            share_start=torch.cat([torch.zeros(1).long(), kept.sum(1).cumsum(0)]),
            share_channel=kept.nonzero()[:, 1].int(),
            share_value=own[kept],
            broken=torch.zeros(0).long(),
        )
        write_shard(folder, shard, records)
    layer = {"weight": weight, "bias": torch.zeros(n_out).to(weight) if bias is None else bias}
    write_tensors(folder / "layer.safetensors", layer, {})
    write_whole(folder / "manifest.json", manifest.to_json().encode())
    return open_one(folder)


def random_shares(n_images, n_channels, seed=0, spread=2.0):
    """Shares that add up to one, few large and many small, with channels and images of note."""
    generator = torch.Generator().manual_seed(seed)
    of_channel = torch.randn(n_channels, generator=generator, dtype=torch.float64)
    own = torch.randn(n_images, n_channels, generator=generator, dtype=torch.float64)
    return (spread * own + of_channel).softmax(1)


def scan_of_causes(folder, seed, n_causes=5, **options):
    """Many classes, some alike, one without images, that share channels for many reasons."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 12, (90,), generator=generator)
    labels[labels == 7] = 8
    causes = torch.randn(n_causes, 6, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(90, 6, generator=generator, dtype=torch.float64)
    return write_scan(
        folder,
        shares=random_shares(90, 20, seed),
        labels=labels.tolist(),
        pooled=causes[labels % n_causes] + noise,
        weight=torch.randn(20, 6, generator=generator, dtype=torch.float64),
        **options,
    )


CAUSES = (("A", "B"), ("A", "B", "C"), ("A",), ())  # of each channel; the last one is constant


@dataclass
class Planted:
    scan: Scan
    cause: list[int]  # of each image, -1 for none


def plant(folder, *, labels=None, seed=0, shard_size=64):
    """Images with one of three causes, four inputs each, among others (label 3) with none."""
    generator = torch.Generator().manual_seed(seed)
    cause = torch.tensor([0, 1, 2, -1]).repeat_interleave(torch.tensor([90, 60, 40, 150]))
    cause = cause[torch.randperm(len(cause), generator=generator)]
    noise = torch.randn(len(cause), 16, generator=generator, dtype=torch.float64)
    pooled = 0.1 * (0.8 * noise).exp()
    for k in range(3):
        strength = torch.rand(len(cause), 4, generator=generator, dtype=torch.float64) + 1
        pooled[:, 4 * k : 4 * k + 4] += strength * (cause == k)[:, None]
    own = torch.tensor([[name in names for name in "ABCD"] for names in CAUSES])
    weight = torch.where(own.repeat_interleave(4, 1), 1.0, 0.1).double()
    weight[3] = 0.0
    scan = write_scan(
        folder,
        shares=torch.full((len(cause), 4), 0.25),
        labels=(cause % 4).tolist() if labels is None else labels,
        pooled=pooled,
        weight=weight,
        bias=torch.tensor([0.0, -1.0, 0.5, 0.1]).double(),
        shard_size=shard_size,
    )
    return Planted(scan, cause.tolist())
