"""Truth tests of METHOD.md section 7 on a Scan: nulls, shuffled labels, planted channels.

Needs nothing but unbraid.
"""

from __future__ import annotations

import itertools
import random
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import unbraid
from unbraid.scanning.manifest import read_manifest
from unbraid.scanning.records import Records, Scan, write_shard

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
    n_classes = max(scan.labels_seen()) + 1
    generator = torch.Generator().manual_seed(0)

    def half(records: Records) -> Tensor:
        return records.label + n_classes * torch.randint(2, (len(records),), generator=generator)

    halved = relabelled(scan, half, folder)
    own = [[[c], [c + n_classes]] for c in sorted(scan.labels_seen())]
    apart = total = 0
    for groups in own:
        found = unbraid.find(halved, channels=dict.fromkeys(range(scan.layer.n_out), groups))
        apart += sum(pair.cosine < gamma for pair in found.pairs)
        total += len(found.pairs)
    return apart, total


def shuffled_findings(scan: Scan, thresholds: dict[str, float], folder: Path) -> int:
    """Count the pairs found when images have random labels."""
    labels = torch.cat(list(scan.columns("label")))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    mixed = iter(labels[order].tolist())

    def shuffle(records: Records) -> Tensor:
        return torch.tensor(list(itertools.islice(mixed, len(records))))

    return len(unbraid.find(relabelled(scan, shuffle, folder), **thresholds))


def relabelled(scan, label_of, folder: Path) -> Scan:  # type: ignore[no-untyped-def]
    """Copy a scan with other labels."""
    shutil.copytree(scan.path, folder)
    manifest = read_manifest(folder)
    assert manifest is not None
    for shard, records in enumerate(scan.shards()):
        write_shard(folder, shard, replace(records, label=label_of(records)))
    return unbraid.open_scan(folder)


def planted(scan: Scan, n_concepts: int) -> dict[str, str]:
    """Add the weights of channels with different jobs into one, split it, compare with the truth.

    Of many sets of channels those are taken whose jobs differ most: each set member has a class
    to which it answers strongly and the others little.

    Returns:
        Per method, the correlation of each concept channel's pooled pre-activation with that of
        the channel it was made of, over all images: mean, least, and part of 0.95 or more.
    """
    channels_and_classes = different_jobs(scan, n_concepts)
    results: dict[str, list[float]] = {"least squares": [], "published, rho 0.7": []}
    worst_overlap = max(overlap for overlap, _, _ in channels_and_classes)
    for _, channels, classes in channels_and_classes:
        place = channels[0]
        weight, bias = scan.weight.clone(), scan.bias.clone()
        weight[place] = scan.weight[list(channels)].sum(0)
        bias[place] = scan.bias[list(channels)].sum()
        one = replace(scan, weight=weight, bias=bias)
        found = unbraid.find(one, channels={place: [[c] for c in classes]})
        for name, split in (
            ("least squares", unbraid.split(one, found)),
            ("published, rho 0.7", unbraid.split(one, found, method="published", rho=0.7)),
        ):
            results[name] += _correlations(scan, split[place].rows.double(), channels)
    return {
        f"{name} (overlap up to {worst_overlap:.2f})": (
            f"mean {torch.tensor(values).mean():.3f}, least {min(values):.3f}, "
            f"{sum(v >= 0.95 for v in values)} of {len(values)} at 0.95 or more"
        )
        for name, values in results.items()
    }


def different_jobs(
    scan: Scan, n_concepts: int
) -> list[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    """Choose sets of channels with a class each; overlap says how unlike their jobs are.

    Overlap is the largest response (rms over a class's images) of one channel to another's class,
    relative to that of the class's own channel.
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
            chosen = tuple(classes[c] for c in own)
            sets[channels] = (float(relative.max()), channels, chosen)
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
