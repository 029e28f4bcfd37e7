"""Truth tests on a Scan: halves of a class, shuffled labels, planted channels.

Needs nothing but unbraid.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import unbraid
from unbraid.scanning.records import Scan, write_shard

N_PLANTED = 10  # channels planted per number of concepts
N_TRIED = 20000  # sets of channels looked at for those with the most different jobs


def halves_told_apart(scan: Scan, gamma: float, folder: Path) -> tuple[int, int]:
    """Count channels at which two random halves of one class look like two concepts.

    Args:
        scan: of the training images.
        gamma: cosine below which two halves count as different.
        folder: for the records with halves as classes.

    Returns:
        How many (channel, class) came out different, and how many there are.
    """
    classes = sorted(scan.labels_seen())
    n_classes = classes[-1] + 1
    generator = torch.Generator().manual_seed(0)
    labels = scan.columns("label")
    halves = (own + n_classes * torch.randint(2, own.shape, generator=generator) for own in labels)
    halved = relabelled(scan, halves, folder)
    cosines = []
    for c in classes:
        channels = {channel: [[c], [c + n_classes]] for channel in range(scan.layer.n_out)}
        cosines += [pair.cosine for pair in unbraid.find(halved, channels=channels).pairs]
    return sum(cosine < gamma for cosine in cosines), len(cosines)


def shuffled_findings(scan: Scan, thresholds: dict[str, float], folder: Path) -> int:
    """Count the pairs found when images have random labels."""
    shards = list(scan.columns("label"))
    labels = torch.cat(shards)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    mixed = labels[order].split([len(own) for own in shards])
    return len(unbraid.find(relabelled(scan, mixed, folder), **thresholds))


def relabelled(scan: Scan, labels: Iterable[Tensor], folder: Path) -> Scan:
    """Copy a scan with other labels, shard by shard."""
    shutil.copytree(scan.path, folder)
    for shard, (records, label) in enumerate(zip(scan.shards(), labels, strict=True)):
        write_shard(folder, shard, replace(records, label=label.clone()))
    return unbraid.open_scan(folder)


def planted(scan: Scan, n_concepts: int) -> dict[str, str]:
    """Add the weights of channels with different jobs into one, split it, compare with the truth.

    Returns:
        Per method, the correlation of each concept channel's pooled pre-activation with that of
        the channel it was made of, over all images: mean, least, and part of 0.95 or more.
    """
    sets = different_jobs(scan, n_concepts)
    methods = {
        "least squares": {},
        "published, rho 0.7": {"method": "published", "rho": 0.7},
    }
    results: dict[str, list[float]] = {name: [] for name in methods}
    for _, channels, classes in sets:
        place = channels[0]
        weight, bias = scan.weight.clone(), scan.bias.clone()
        weight[place] = scan.weight[list(channels)].sum(0)
        bias[place] = scan.bias[list(channels)].sum()
        one = replace(scan, weight=weight, bias=bias)
        found = unbraid.find(one, channels={place: [[c] for c in classes]})
        for name, options in methods.items():
            rows = unbraid.split(one, found, **options)[place].rows.double()
            results[name] += _correlations(scan, rows, channels)
    return {
        f"{name} (overlap up to {sets[-1][0]:.2f})": (
            f"mean {torch.tensor(values).mean():.3f}, least {min(values):.3f}, "
            f"{sum(v >= 0.95 for v in values)} of {len(values)} at 0.95 or more"
        )
        for name, values in results.items()
    }


def different_jobs(
    scan: Scan, n_concepts: int
) -> list[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    """Choose sets of channels with a class each, those with the most different jobs first.

    Before each stands the overlap: the largest response (rms over a class's images) of one channel
    to another's class, relative to that of the class's own channel.
    """
    answers, labels = _answers(scan)
    classes = sorted(scan.labels_seen())
    rms = torch.stack([answers[labels == c].square().mean(0).sqrt() for c in classes])
    best = rms.argmax(0)
    draw = random.Random(0)
    sets: dict[tuple[int, ...], tuple[float, tuple[int, ...], tuple[int, ...]]] = {}
    for _ in range(N_TRIED):
        channels = tuple(sorted(draw.sample(range(scan.layer.n_out), n_concepts)))
        own = best[list(channels)].tolist()
        if len(set(own)) == n_concepts and channels not in sets:
            table = rms[own][:, list(channels)]  # (class of l, channel k)
            relative = (table / table.diagonal()[:, None]).fill_diagonal_(0)
            sets[channels] = (float(relative.max()), channels, tuple(classes[c] for c in own))
    return sorted(sets.values())[:N_PLANTED]


def _answers(scan: Scan) -> tuple[Tensor, Tensor]:
    """Pooled pre-activations of all channels to all images, (N, C_out), and labels (N,)."""
    assert scan.layer.groups == 1
    parts = [
        r.pooled[:, 0].double() @ scan.weight.double().T + r.n_positions[:, None] * scan.bias
        for r in scan.shards()
    ]
    return torch.cat(parts), torch.cat(list(scan.columns("label")))


def _correlations(scan: Scan, rows: Tensor, channels: tuple[int, ...]) -> list[float]:
    """Correlations of the truth with what rows (K, J) answer, the same constant apart."""
    truth = _answers(scan)[0][:, list(channels)]
    recovered = torch.cat([records.pooled[:, 0].double() @ rows.T for records in scan.shards()])
    both = zip(truth.T, recovered.T, strict=True)
    return [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in both]
