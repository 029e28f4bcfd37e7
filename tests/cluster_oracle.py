"""Slow reference for clusters of images, written from docs/concepts.md and METHOD.md section 5."""

import itertools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from oracle import cosine

ALIKE = 0.45


def direction(relevance: Tensor, origin: Tensor) -> Tensor:
    """What feeds an image other than the mean image, of length one."""
    own = relevance - origin
    return own / own.norm() if own.norm() > 0 else own


def nearest(point: Tensor, centres: Sequence[Tensor]) -> int:
    """The most alike of some centres, -1 if none is alike."""
    nearness = [float((point * centre).sum()) for centre in centres]
    if not nearness or max(nearness) < ALIKE:
        return -1
    return nearness.index(max(nearness))


def settle(points: Sequence[Tensor], centres: Sequence[Tensor]) -> list[Tensor]:
    """Move centres eight times to the mean direction of the points that are alike to them."""
    for _ in range(8):
        own = [nearest(point, centres) for point in points]
        sums = [
            sum((p for p, k in zip(points, own, strict=True) if k == n), torch.zeros_like(centre))
            for n, centre in enumerate(centres)
        ]
        centres = [
            total / total.norm() if total.norm() > 0 else centre
            for total, centre in zip(sums, centres, strict=True)
        ]
    return list(centres)


def halves(things: Sequence[Tensor], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    order = torch.randperm(len(things), generator=torch.Generator().manual_seed(seed)).tolist()
    return [things[n] for n in order[::2]], [things[n] for n in order[1::2]]


def cover(points: Sequence[Tensor]) -> list[Tensor]:
    """Centres where points are dense that no centre has, as many as cover most unseen points."""
    half, rest = halves(points)
    tried: list[Tensor] = []
    best: tuple[int, list[Tensor]] = (0, [])
    for _ in range(8):
        free = [p for p in half if nearest(p, tried) < 0]
        if not free:
            break
        density = [sum(max(float((p * q).sum()), 0) ** 4 for q in free) for p in free]
        tried = settle(half, [*tried, free[density.index(max(density))]])
        counts = Counter(nearest(p, tried) for p in rest)
        large = [k for k in range(len(tried)) if counts[k] >= 4]
        n_covered = sum(counts[k] for k in large)
        if n_covered > best[0]:
            best = (n_covered, [tried[k] for k in large])
    centres = settle(points, best[1])
    counts = Counter(nearest(p, centres) for p in points)
    order = sorted(range(len(centres)), key=lambda k: -counts[k])
    return [centres[k] for k in order if counts[k] >= 8]


def find_clusters(relevance: Tensor, origin: Tensor) -> tuple[Tensor, float]:
    """Centres of one half of the images; the lowest cosine of ARVs of the other half.

    Halves are of images in the order of responses. An ARV is of inputs by which its images were not
    put into the cluster.
    """
    ranked = sorted(range(len(relevance)), key=lambda n: float(relevance[n].sum()))
    relevance = torch.stack([relevance[n] for n in ranked])
    half, rest = halves(list(relevance))
    centres = cover([direction(a, origin) for a in half])
    inputs = torch.randperm(len(origin), generator=torch.Generator().manual_seed(1))
    arvs = [torch.zeros_like(origin) for _ in centres]
    kept = set(range(len(centres)))
    for seen, unseen in ((inputs[::2], inputs[1::2]), (inputs[1::2], inputs[::2])):
        parts = [centre[seen] / centre[seen].norm() for centre in centres]
        own = [nearest(direction(a[seen], origin[seen]), parts) for a in rest]
        for k in range(len(centres)):
            images = [a[unseen] for a, n in zip(rest, own, strict=True) if n == k]
            if len(images) < 4:
                kept.discard(k)
            if images:
                arvs[k][unseen] = sum(images) / len(images)
    pairs = itertools.combinations(sorted(kept), 2)
    lowest = min((cosine(arvs[k], arvs[n]) for k, n in pairs), default=1.0)
    if lowest < 1 and not denser(relevance, origin):
        lowest = 1.0
    found = [centres[k] for k in sorted(kept)]
    return torch.stack(found) if found else relevance[:0], lowest


def denser(relevance: Tensor, origin: Tensor) -> bool:
    """Whether images lie a quarter denser than normal ones with their mean and covariance.

    Sums of the images' deviations with normal weights are such.
    """
    mean, n = relevance.mean(0), len(relevance)
    weights = torch.randn(n, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    cloud = [
        mean + sum(w * (a - mean) for w, a in zip(own, relevance, strict=True)) / n**0.5
        for own in weights
    ]

    def density(images: Sequence[Tensor]) -> float:
        points = [direction(a, origin) for a in images]
        return sum(max(float(p @ q), 0) ** 8 for p, q in itertools.combinations(points, 2))

    return density(list(relevance)) >= 1.25 * density(cloud)


def adjusted_rand_index(one, other):
    """Count pairs of things that two partitions put together or apart."""
    pairs = itertools.combinations(zip(one, other, strict=True), 2)
    counts = Counter((one1 == one2, other1 == other2) for (one1, other1), (one2, other2) in pairs)
    both, neither = counts[True, True], counts[False, False]
    only_one, only_other = counts[True, False], counts[False, True]
    below = (both + only_one) * (only_one + neither) + (both + only_other) * (only_other + neither)
    if below == 0:
        return 1.0
    return 2 * (both * neither - only_one * only_other) / below


def top_images(answers, relevance, n_top=1000):
    """The images that a channel answers to most, in order, and the smallest answer among them.

    They are at most n_top, answer with a quarter of the way from the mean answer to that of the
    ten strongest, or more, and have relevance at all.
    """
    order = sorted(range(len(answers)), key=lambda n: -answers[n])
    mean = sum(answers) / len(answers)
    strongest = [answers[n] for n in order[:10]]
    bound = mean + (sum(strongest) / len(strongest) - mean) / 4
    bound = min(bound, max(answers))
    kept = [n for n in order[:n_top] if answers[n] >= bound]
    least = min(answers[n] for n in kept)
    return sorted(n for n in kept if any(a != 0 for a in relevance[n].tolist())), least


def members(answers, relevance, centres, least):
    """Per cluster, the images that belong to it: of the nearest centre by angle."""
    found = [[] for _ in centres]
    for n, answer in enumerate(answers):
        if answer < least or not relevance[n].any():
            continue
        cosines = [cosine(relevance[n], centre) for centre in centres]
        found[cosines.index(max(cosines))].append(n)
    return found
