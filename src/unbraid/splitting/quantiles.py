"""How usual a response is: quantiles of each channel's among the images of a scan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unbraid.base.progress import QUIET, Progress
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import N_QUANTILES, ChannelSplit

_MOST_IMAGES = 2**13  # evenly spaced over the scan: a percentile is then off by 1 or so
_AT_ONCE = 16  # channels
_MOST_NUMBERS = 2**25  # of their pooled inputs at once: 128 MiB in float32


def with_quantiles(
    scan: Scan, parts: Sequence[ChannelSplit], progress: Progress = QUIET
) -> list[ChannelSplit]:
    """Give each division the quantiles of its channels' mean pre-activations in a scan.

    None from a scan of places, which tells nothing of means over an image's positions.
    """
    if scan.manifest.places_of:
        return [replace(part, quantiles=None) for part in parts]
    pooled, n_positions = _spaced_inputs(scan)
    if not len(pooled):
        return [replace(part, quantiles=None) for part in parts]
    by_group: dict[int, list[ChannelSplit]] = {}
    for part in parts:
        by_group.setdefault(scan.layer.group_of(part.channel), []).append(part)
    made: dict[int, ChannelSplit] = {}
    with progress.of("How usual responses are", len(parts), "channels") as advance:
        for group, own in by_group.items():
            inputs = pooled[:, group].double()
            for some in _by_rows(own):
                rows = torch.cat([torch.cat([part.weight[None], part.rows]) for part in some])
                means = inputs @ rows.double().T / n_positions[:, None]
                sizes = [len(part.concepts) + 1 for part in some]
                for part, values in zip(some, means.T.split(sizes), strict=True):
                    biased = values + torch.tensor(part.bias, dtype=torch.float64)
                    made[part.channel] = replace(part, quantiles=_quantiles(biased))
                    advance(1)
    return [made[part.channel] for part in parts]


def _by_rows(parts: Sequence[ChannelSplit]) -> Iterator[Sequence[ChannelSplit]]:
    """A few channels at a time: their responses take one passage through the images."""
    return (parts[first : first + _AT_ONCE] for first in range(0, len(parts), _AT_ONCE))


def _quantiles(values: Tensor) -> Tensor:
    """Quantiles of rows, (R, n) to (R, N_QUANTILES), between neighbours by interpolation."""
    ordered = torch.from_numpy(np.sort(values.numpy(), axis=1))  # quicker than torch's
    place = torch.linspace(0, 1, N_QUANTILES, dtype=torch.float64) * (values.shape[1] - 1)
    below, above = place.floor().long(), place.ceil().long()
    between = torch.lerp(ordered[:, below], ordered[:, above], place - below)
    return between.cummax(1).values  # interpolation may round below a neighbour


def _spaced_inputs(scan: Scan) -> tuple[Tensor, Tensor]:
    """Pooled inputs (n, G, J) and numbers of positions (n,) of evenly spaced images."""
    n_numbers = scan.layer.groups * scan.layer.n_taps
    most = max(1, min(_MOST_IMAGES, _MOST_NUMBERS // n_numbers))
    step, seen, parts = math.ceil(scan.manifest.n_images / most), 0, []
    for own in scan.tensors("pooled", "n_positions"):
        chosen = slice(-seen % step, None, step)
        seen += len(own["pooled"])
        parts.append((own["pooled"][chosen].clone(), own["n_positions"][chosen]))
    pooled, n_positions = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return pooled, n_positions


def percentile(quantiles: Tensor, response: float) -> float:
    """Say what part of a scan's images, in percent, a channel responds to less; quantiles (Q,).

    Images of the same response count half.

    >>> percentile(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), 2.5)
    62.5
    """
    values = quantiles.double()
    here = torch.tensor(response, dtype=torch.float64)
    low = int(torch.searchsorted(values, here))
    high = int(torch.searchsorted(values, here, right=True))
    last = len(values) - 1
    if low == len(values) or high == 0:
        return 100.0 if high else 0.0
    if low == high:  # between two of them
        before, behind = float(values[low - 1]), float(values[low])
        return 100 * (low - 1 + (response - before) / (behind - before)) / last
    return 100 * (low + high - 1) / 2 / last
