"""The published rule for dividing weights: Hesse et al. 2025, "Split" in docs/method.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unbraid.base.progress import QUIET, Progress
from unbraid.finding.findings import Concept
from unbraid.finding.membership import Members
from unbraid.networks.spec import respond, widen

RHOS = tuple(k / 20 for k in range(1, 21))
_EPSILON = 1e-5  # the published guard against division by zero


def published_masks(arvs: Sequence[Tensor], rho: float, taps_per_input: int) -> Tensor:
    """Say which taps each concept channel keeps, (K, J), zeros and ones, by ARVs (C,).

    Input channel i belongs to concept k if rho * v_k[i] > v_l[i] for every other concept l, and to
    no concept before k. Concept k keeps all but the input channels that belong to others.
    """
    taken = torch.zeros(len(arvs[0]), dtype=torch.bool)
    owned = []
    for k, own in enumerate(arvs):
        wins = [rho * own > other for n, other in enumerate(arvs) if n != k]
        mine = torch.stack(wins).all(0) & ~taken
        taken = taken | mine
        owned.append(mine)
    masks = torch.stack([~taken | mine for mine in owned])
    return masks.repeat_interleave(taps_per_input, 1).double()


def choose_rho(
    members: Members,
    concepts: Mapping[int, Sequence[Concept]],
    arvs: Mapping[int, Sequence[Tensor]],
    progress: Progress = QUIET,
) -> dict[int, float]:
    """Choose rho per channel, in one reading of a scan with positions; the lowest wins a tie.

    Channels without images of all their concepts are left out.

    The criterion sums over concepts the mean of its own response over the others', on its images.
    """
    scan, layer = members.scan, members.scan.layer
    n_images = {o: torch.zeros(len(own), 1, dtype=torch.int64) for o, own in concepts.items()}
    sums = {o: torch.zeros(len(own), len(RHOS), dtype=torch.float64) for o, own in concepts.items()}
    rows: dict[int, Tensor] = {}  # (rho * K, J), those that every rho would make
    for o in concepts:
        masks = [published_masks(arvs[o], rho, layer.taps_per_input) for rho in RHOS]
        rows[o] = torch.cat(masks).to(scan.weight.dtype) * scan.weight[o]
    with progress.of("Choosing rho", scan.n_by_label.total(), "images") as advance:
        for records in scan.shards():
            assert records.input_map is not None
            for o, own in concepts.items():
                concept = members.concept_of(records, own)
                bias = widen(scan.bias[o]).expand(len(rows[o]))
                for k in concept[concept >= 0].unique().tolist():
                    maps = widen(records.input_map[concept == k])
                    z = respond(layer, maps, widen(rows[o]), bias, [o] * len(bias))
                    summed = z.clamp(min=0).flatten(2).sum(2, dtype=torch.float64)
                    responses = summed.view(len(maps), len(RHOS), -1)  # (n, rho, K)
                    others = responses.sum(2) - responses[:, :, k]
                    sums[o][k] += (responses[:, :, k] / (others + _EPSILON)).sum(0)
                    n_images[o][k] += len(responses)
            advance(len(records))
    chosen = {}
    for o in concepts:
        if not n_images[o].all():
            continue
        criterion = (sums[o] / n_images[o]).sum(0)
        # Equal rows are equally good, whatever the rounding made of them.
        by_rho = rows[o].view(len(RHOS), -1)
        first_equal = [int((by_rho == own).all(1).nonzero()[0]) for own in by_rho]
        chosen[o] = RHOS[int(criterion[first_equal].argmax())]
    return chosen
