"""What a planted channel's concept channels have to do with its two parts, for places.py.

A planted channel is the sum of two rows, so what it is made of is known. Shapes: U images or
places, J taps, K concept channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from statistics import fmean

import torch
from torch import Tensor

import unbraid
from unbraid.finding.clusters import adjusted_rand_index
from unbraid.finding.findings import Findings
from unbraid.measuring.formulas import auroc, rms
from unbraid.scanning.records import Scan

# What `agreement` tells, of the channels found.
AGREEMENT = (
    "adjusted Rand, of the part that answers more",
    "adjusted Rand, of the part more above its usual",
    "parts told by concepts, 0 to 1",
)
N_STRONG = 50  # images or places that excite a part most


def parts_of(weight: Tensor, channel: int, pair: tuple[int, int]) -> Tensor:
    """The two rows (2, J) whose sum a planted channel is."""
    rows = weight.double()
    both = rows[list(pair)]
    scale = torch.linalg.lstsq(both.T, rows[channel, :, None]).solution
    return both * scale


def inputs_of(scan: Scan, *, even: bool = False) -> Tensor:
    """Pooled inputs of all images or places (U, J), or of the places drawn evenly."""
    parts = [r.pooled[r.drawn > 0] if even else r.pooled for r in scan.light_shards()]  # type: ignore[operator]
    return torch.cat(parts)[:, 0].double()


def agreement(
    scan: Scan, found: Findings, truth: dict[int, Tensor]
) -> dict[int, tuple[float, ...]]:
    """How concepts divide the images or places of a channel's clusters, as its two parts do.

    The part that answers more, or more above what is usual for it, by its standard deviation:
    adjusted Rand index by each. Then in how many members that part is the one of most of their
    concept, beside the part of most members of the channel: from 0, no better, to 1.
    """
    members, known = found.members_in(scan), {}
    usual = inputs_of(scan, even=scan.manifest.places_of != "")
    for o, concepts in found.concepts.items():
        mine, theirs, above = [], [], []
        spread = usual @ truth[o].T
        for records in scan.light_shards():
            concept = members.concept_of(records, concepts)
            own = concept >= 0
            parts = records.pooled[own, 0].double() @ truth[o].T
            mine += concept[own].tolist()
            theirs += parts.argmax(1).tolist()
            above += ((parts - spread.mean(0)) / spread.std(0)).argmax(1).tolist()
        known[o] = (
            adjusted_rand_index(theirs, mine),
            adjusted_rand_index(above, mine),
            told_by(above, mine),
        )
    return known


def told_by(parts: Sequence[int], concepts: Sequence[int]) -> float:
    """How much better concepts tell parts than nothing does; NaN if all are of one part."""
    n = len(parts)
    blind = max(map(parts.count, set(parts)), default=0)
    of_concept: dict[int, list[int]] = {}
    for part, concept in zip(parts, concepts, strict=True):
        of_concept.setdefault(concept, []).append(part)
    told = sum(max(map(own.count, set(own))) for own in of_concept.values())
    return (told - blind) / (n - blind) if n > blind else float("nan")


def recovery(rows: Tensor, truth: Tensor, inputs: Tensor) -> float:
    """Mean correlation of both parts with the concept channels that are most like them."""
    answers = torch.cat([inputs @ truth.T, inputs @ rows.T], 1)
    n = len(truth)
    alike = torch.corrcoef(answers.T)[:n, n:].nan_to_num(0)
    ways = permutations(range(len(rows)), n) if len(rows) >= n else [(0, 0)]
    return max(fmean(float(alike[k, j]) for k, j in enumerate(way)) for way in ways)


def strongest(parts: Tensor, n: int = N_STRONG) -> Tensor:
    """Which of U images or places excite each part of two most, (2, U); none that excites both.

    >>> strongest(torch.tensor([[3.0, 0], [2, 2], [0, 3], [0, 0]]), 2).int().tolist()
    [[1, 0, 0, 0], [0, 0, 1, 0]]
    """
    own = torch.zeros(parts.T.shape, dtype=torch.bool)
    own.scatter_(1, parts.T.topk(min(n, len(parts))).indices, torch.ones_like(own))
    return own & ~own.flip(0)


@dataclass(frozen=True)
class OwnPart:
    """How well one channel's concept channels answer to one part of two only, each to its own."""

    auroc: float  # of images or places of its own part against those of the other
    among_all: float  # of those of its own part against all others
    copy: float  # relative error as a copy of its own part, on those of this part
    both: float  # 1 if each part has a concept channel, else 0


def own_part(rows: Tensor, truth: Tensor, train: Tensor, held_out: Tensor) -> OwnPart:
    """Judge concept channels (K, J) of a channel that is the sum of two parts (2, J).

    The part of a concept channel is the one whose strongest training images or places (U, J) it
    ranks above those of the other; the held-out ones judge.
    """
    seen = strongest(train @ truth.T)
    part = [auroc((train @ row)[seen.any(0)], seen[0, seen.any(0)]) < 0.5 for row in rows]
    parts = held_out @ truth.T
    sides = strongest(parts)
    figures = []
    for row, k in zip(rows, map(int, part), strict=True):
        z, own = held_out @ row, sides[k]
        either = sides.any(0)
        figures.append(
            (
                auroc(z[either], own[either]),
                auroc(z, own),
                float(rms(z[own] - parts[own, k]) / rms(parts[own, k])),
            )
        )
    return OwnPart(*map(fmean, zip(*figures, strict=True)), both=float(len(set(part)) == 2))


def average(every: Iterable[OwnPart]) -> OwnPart:
    """Mean over channels, of what is a number."""
    figures = list(every)
    known = (
        [v for v in (getattr(own, field.name) for own in figures) if not math.isnan(v)]
        for field in fields(OwnPart)
    )
    return OwnPart(*(fmean(own) if own else math.nan for own in known))


def known_groups(scan: Scan, truth: dict[int, Tensor]) -> Findings:
    """Findings by hand: of each channel the images or places that excite each part most."""
    inputs, index = inputs_of(scan), torch.cat(list(scan.columns("index")))
    groups = {
        o: [index[own].tolist() for own in strongest(inputs @ parts.T)]
        for o, parts in truth.items()
    }
    return unbraid.find(scan, images=groups)
