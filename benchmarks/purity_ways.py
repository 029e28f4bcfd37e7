"""The ways that benchmarks/purity.py compares: each makes units of training images and findings."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import unbraid
from even_share import fit_even_share
from rivals import (
    Autoencoder,
    Fitted,
    Images,
    Linear,
    cluster_references,
    fit_probe,
    match_clusters,
    match_units,
    of_masks,
    train_autoencoder,
)
from unbraid.finding.findings import Findings

WHOLE, PROBE, UNBRAID = "whole channel", "linear probe", "unbraid"
PUBLISHED, EVEN = "published rule", "unbraid before (even share)"

Fit = Callable[[Images, Findings], Fitted]


def fit_whole(train: Images, found: Findings) -> Fitted:
    """The channel itself in every concept's place."""
    n_taps = train.scan.layer.n_taps
    return of_masks(
        train.scan, {o: torch.ones(len(c), n_taps) for o, c in found.concepts.items()}, 0
    )


def fit_split(train: Images, found: Findings, method: str) -> Fitted:
    """What `unbraid.split` makes of it; the published rule chooses its own rho."""
    split = unbraid.split(train.scan, found, method=method)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "split.safetensors"
        split.save(path)
        n_bytes = path.stat().st_size
    return of_masks(train.scan, {p.channel: p.masks for p in split.channels}, n_bytes, split)


class EvenShare:
    """The first version, whose penalty is chosen on the concepts found and kept for all others."""

    penalty: float | None = None

    def __call__(self, train: Images, found: Findings) -> Fitted:
        """Fit."""
        masks, self.penalty = fit_even_share(train.scan, found, self.penalty)
        return of_masks(train.scan, masks, sum(4 * m.numel() for m in masks.values()))


def permuted(fitted: Linear, train: Images, seed: int = 0) -> Linear:
    """The same masks on other inputs, each concept's drawn on its own."""
    draw = torch.Generator().manual_seed(seed)
    layer, masks = train.scan.layer, {}
    for channel, rows in fitted.rows.items():
        weight = train.scan.weight[channel].double()
        mask = torch.where(weight != 0, rows / weight, 1.0).view(len(rows), layer.n_in, -1)
        orders = [torch.randperm(layer.n_in, generator=draw) for _ in rows]
        masks[channel] = torch.stack([m[n] for m, n in zip(mask, orders, strict=True)]).flatten(1)
    return of_masks(train.scan, masks, fitted.n_bytes)


class PureClusters:
    """PURE, whose clusters know of no concepts; so they are made once."""

    centres: dict[int, Tensor] | None = None

    def __call__(self, train: Images, found: Findings) -> Fitted:
        """Cluster, and match clusters to concepts."""
        if self.centres is None:
            self.centres = cluster_references(train, found)
        return match_clusters(train, found, self.centres)


class SparseUnits:
    """A sparse autoencoder, which knows of no concepts; so it is trained once."""

    def __init__(self, n_units: int, top_k: int) -> None:
        """Note its size."""
        self.n_units, self.top_k = n_units, top_k
        self.autoencoder: Autoencoder | None = None

    def __call__(self, train: Images, found: Findings) -> Fitted:
        """Train, and match units to concepts."""
        if self.autoencoder is None:
            self.autoencoder = train_autoencoder(train, self.n_units, self.top_k)
        return match_units(train, found, self.autoencoder)


def ways_for(n_out: int) -> dict[str, Fit]:
    """All ways, controls apart."""
    n_units, top_k = max(256, 2 * n_out), max(4, min(32, n_out // 4))
    return {
        WHOLE: fit_whole,
        PUBLISHED: partial(fit_split, method="published"),
        EVEN: EvenShare(),
        UNBRAID: partial(fit_split, method="least_squares"),
        PROBE: fit_probe,
        "PURE's clusters": PureClusters(),
        f"sparse autoencoder, TopK {top_k} of {n_units}": SparseUnits(n_units, top_k),
    }


def shuffled(found: Findings, classes: list[int], seed: int) -> Findings:
    """Concepts of the same sizes, of classes drawn at random for each channel."""
    draw, concepts = random.Random(seed), {}
    for channel, own in sorted(found.concepts.items()):
        drawn = iter(draw.sample(classes, sum(map(len, own))))
        concepts[channel] = tuple(tuple(next(drawn) for _ in concept) for concept in own)
    return replace(found, concepts=concepts)
