"""Slow reference for clusters of images, written from docs/concepts.md and METHOD.md section 5."""

import itertools
from collections import Counter

import torch
from scipy.stats import binomtest

from oracle import cosine


def scatter(points, side):
    """Sum of squared distances to the centres of the two sides."""
    total = 0.0
    for wanted in (True, False):
        own = [point for point, on in zip(points.tolist(), side, strict=True) if on == wanted]
        if not own:
            continue
        centre = [sum(column) / len(own) for column in zip(*own, strict=True)]
        total += sum(
            (value - middle) ** 2
            for point in own
            for value, middle in zip(point, centre, strict=True)
        )
    return total


def best_cut(points):
    """The cut with the least scatter, of all that there are."""
    cuts = itertools.product([False, True], repeat=len(points) - 1)
    best = min(((False, *cut) for cut in cuts), key=lambda cut: scatter(points, cut))
    return torch.tensor(best)


def chance_of_one(points, cut):
    """Cut every other point, and test on the others that as many lie half-way as at the rarer end.

    Points within a sixth of the distance between the centres count, in both directions of testing.
    """
    smaller = half_way = 0
    for start in (0, 1):
        own = [n for n in range(len(points)) if n % 2 == start]
        others = [n for n in range(len(points)) if n % 2 != start]
        side = cut(points[own]).tolist()
        if all(side) or not any(side):
            return 1.0
        centres = []
        for wanted in (False, True):
            members = [points[n] for n, on in zip(own, side, strict=True) if on == wanted]
            centres.append(sum(members) / len(members))
        line = centres[1] - centres[0]
        counts = [0, 0, 0]
        for n in others:
            place = float(((points[n] - centres[0]) * line).sum() / (line * line).sum())
            for k, at in enumerate((0.0, 0.5, 1.0)):
                counts[k] += abs(place - at) <= 1 / 6
        half_way += counts[1]
        smaller += min(counts[0], counts[2])
    if half_way + smaller == 0:
        return 1.0
    return float(binomtest(half_way, half_way + smaller, 0.5, alternative="less").pvalue)


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
