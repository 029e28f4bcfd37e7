"""Findings: which class uses which channel, for what reasons, and how these are grouped."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unbraid
from checks import (
    Truth,
    assert_arv,
    assert_close,
    assert_csv,
    assert_grouped,
    assert_pairs,
    assert_uses,
    truth_of,
)
from handmade import write_scan
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import UsageError
from unbraid.finding.arv import (
    averaged_relevance,
    class_cosines,
    class_sums,
    concept_mean,
    group_classes,
    uses,
)
from unbraid.finding.findings import Findings
from unbraid.scanning.records import Scan

N_CLASSES, N_OUTPUTS = 6, 6


@dataclass
class Case:
    scan: Scan
    truth: Truth


def six_class_network(kind: str) -> torch.nn.Module:
    network = build(kind)
    head = torch.nn.Linear(network.head.in_features, N_OUTPUTS).double()
    with torch.no_grad():
        weights = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(5))
        head.weight.copy_(weights)
    network.head = head
    return network


@pytest.fixture(scope="module", params=["3x3", "groups", "batch norm behind", "tokens"])
def case(request, tmp_path_factory) -> Case:
    network = six_class_network(request.param)
    dataset = SyntheticImages(42, n_classes=N_CLASSES)
    scan = unbraid.scan(network, "layer", dataset, tmp_path_factory.mktemp("scan"), batch_size=16)
    return Case(scan, truth_of(network, dataset))


@pytest.fixture(scope="module")
def some_scan(tmp_path_factory) -> Scan:
    dataset = SyntheticImages(12, n_classes=N_CLASSES)
    return unbraid.scan(six_class_network("3x3"), "layer", dataset, tmp_path_factory.mktemp("some"))


def middle_cosine(case: Case) -> float:
    """A gamma that some pairs are below and some are not, at tau 0.05 and p 0.5."""
    cosines = sorted(
        pair.cosine for pair in unbraid.find(case.scan, tau=0.05, p=0.5, gamma=1).pairs
    )
    assert len(cosines) >= 8
    return (cosines[len(cosines) // 2 - 1] + cosines[len(cosines) // 2]) / 2


@pytest.mark.parametrize(("tau", "p"), [(0.05, 0.5), (0.1, 0.5), (0.1, 5 / 7), (0.2, 1.0)])
def test_a_class_uses_a_channel_that_matters_in_enough_of_its_images(case, tau, p):
    _, found, _ = uses(class_sums(case.scan, [0.3, tau, 0.07]), p)
    assert found.any()
    assert not found.all()
    assert_uses(found, case.truth, tau, p)


@pytest.mark.parametrize("concept", [(0,), (3,), (1, 4), (0, 2, 5)])
def test_arvs_of_classes_and_concepts_are_means_over_their_images(case, concept):
    mean = concept_mean(class_sums(case.scan, []), concept)
    for channel in range(case.scan.layer.n_out):
        assert_arv(averaged_relevance(case.scan, channel, mean), case.truth, concept, channel)


def test_cosines_are_those_of_the_arvs(case):
    classes = [0, 2, 3, 5]
    cosines = class_cosines(case.scan, class_sums(case.scan, []), 1, classes)
    for (i, s), (j, t) in itertools.product(enumerate(classes), repeat=2):
        assert_close(cosines[i, j], case.truth.cosine(1, s, t))


@pytest.mark.parametrize(("tau", "p"), [(0.05, 0.5), (0.05, 0.75), (0.1, 0.3), (0.2, 0.1)])
@pytest.mark.parametrize("gamma", ["middle", 1.0, -1.0])
def test_pairs_are_the_published_ones_whatever_the_thresholds(case, tau, p, gamma):
    gamma = middle_cosine(case) if gamma == "middle" else gamma
    found = unbraid.find(case.scan, tau=tau, p=p, gamma=gamma)
    assert_pairs(found.pairs, case.truth, tau, p, gamma)
    assert (found.tau, found.p, found.gamma) == (tau, p, gamma)
    assert bool(found.hint) == (not found.pairs)


def test_concepts_are_complete_linkage_groups_of_the_classes_that_use_a_channel(case, tmp_path):
    tau, p, gamma = 0.05, 0.5, middle_cosine(case)
    found = unbraid.find(case.scan, tau=tau, p=p, gamma=gamma)
    assert 0 < len(found) < len(unbraid.find(case.scan, tau=tau, p=p, gamma=1.0))
    (used,) = uses(class_sums(case.scan, [tau]), p)
    assert set(found.concepts) == {pair.channel for pair in found.pairs} == set(found.channels)
    for channel, concepts in found.concepts.items():
        classes = used[:, channel].nonzero()[:, 0].tolist()
        cosines = {
            (s, t): case.truth.cosine(channel, s, t) for s, t in itertools.combinations(classes, 2)
        }
        assert_grouped(concepts, classes, cosines, gamma)
    for pair in found.pairs:
        own = [{pair.class1, pair.class2} & set(c) for c in found.concepts[pair.channel]]
        assert sorted(len(part) for part in own if part) == [1, 1]
    every = [concept for groups in found.concepts.values() for concept in groups]
    assert any(len(concept) > 1 for concept in every)
    assert found.classes == tuple(sorted({c for concept in every for c in concept}))
    found.to_csv(tmp_path / "new folder" / "findings.csv")
    assert_csv(tmp_path / "new folder" / "findings.csv", found)


@pytest.mark.parametrize("gamma", [-0.5, 0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_group_classes_holds_for_any_cosines(seed, gamma):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosines: Tensor = unit @ unit.T
    classes = list(range(10, 19))
    between = {
        (classes[i], classes[j]): float(cosines[i, j])
        for i, j in itertools.combinations(range(9), 2)
    }
    assert_grouped(group_classes(classes, cosines, gamma), classes, between, gamma)


# Scans written by hand: every figure is known.


def handmade_scan(
    folder: Path,
    directions: Sequence[Sequence[float]],
    shares: Sequence[Sequence[float]],
    labels: Sequence[int],
    **options: Any,
) -> Scan:
    """All weights are one, so an ARV is the mean pooled input.

    directions: pooled input of the images of each class. shares: (class, channel).
    """
    return write_scan(
        folder,
        shares=torch.tensor(shares, dtype=torch.float64)[list(labels)],
        labels=labels,
        pooled=torch.tensor(directions, dtype=torch.float64)[list(labels)],
        **options,
    )


def at_angle(cosine: float) -> tuple[float, float]:
    """A direction whose cosine with (1, 0) is known."""
    return (cosine, math.sqrt(1 - cosine**2))


def pairs_of(found: Findings) -> list[tuple[int, int, int]]:
    return [(pair.channel, pair.class1, pair.class2) for pair in found.pairs]


@pytest.mark.parametrize("shard_size", [1, 4, 100])
def test_findings_do_not_depend_on_how_records_are_divided_among_shards(shard_size, tmp_path):
    found = unbraid.find(
        handmade_scan(
            tmp_path,
            directions=[(1, 0), at_angle(0.9), at_angle(0.2)],
            shares=[(0.5, 0.1), (0.5, 0.01), (0.5, 0.1)],
            labels=[0, 1, 2, 2, 1, 0, 0, 2, 1],
            shard_size=shard_size,
        ),
        tau=0.05,
    )
    assert pairs_of(found) == [(0, 0, 2), (1, 0, 2)]
    assert_close([pair.cosine for pair in found.pairs], [0.2, 0.2])
    assert found.concepts == {0: ((0, 1), (2,)), 1: ((0,), (2,))}


def test_a_share_of_exactly_tau_matters_and_a_fraction_of_exactly_p_is_enough(tmp_path):
    scan = handmade_scan(tmp_path, [(1, 0), (0, 1)], [(0.3,), (0.3,)], [0, 1])
    assert len(unbraid.find(scan, tau=0.3, p=1.0)) == 1
    assert len(unbraid.find(scan, tau=math.nextafter(0.3, 1), p=1.0)) == 0


def test_a_cosine_of_exactly_gamma_is_no_pair_and_one_concept(tmp_path):
    scan = handmade_scan(tmp_path, [(1, 0), (3, 4), (-1, 0)], [(0.3,)] * 3, [0, 1, 2])
    gamma = float(class_cosines(scan, class_sums(scan, []), 0, [0, 1])[0, 1])
    found = unbraid.find(scan, gamma=gamma)
    assert pairs_of(found) == [(0, 0, 2), (0, 1, 2)]
    assert found.concepts == {0: ((0, 1), (2,))}


def test_cosines_may_be_negative_and_a_class_without_relevance_makes_no_pair(tmp_path):
    directions = [(0, 0), (1, 0), at_angle(-0.7)]
    found = unbraid.find(handmade_scan(tmp_path, directions, [(0.3,)] * 3, [0, 1, 2]))
    assert pairs_of(found) == [(0, 1, 2)]
    assert_close(found.pairs[0].cosine, -0.7)


def test_classes_without_names_or_images_are_no_hindrance(tmp_path):
    directions, labels = [(1, 0)] * 7 + [(0, 1)], [0, 0, 7, 7, 7, 0]
    scan = handmade_scan(tmp_path, directions, [(0.3,)] * 8, labels, class_names=["zero", ""])
    found = unbraid.find(scan)
    assert pairs_of(found) == [(0, 0, 7)]
    assert [found.name(label) for label in (0, 1, 7)] == ["zero", "1", "7"]


# What comes nearest.


@dataclass
class Advice:
    tau: float
    gamma: float | None
    channel: int


def read_hint(hint: str) -> Advice:
    """The thresholds that a hint names."""
    lower = re.fullmatch(r"Nearest: tau (\S+) finds channel (\d+)\.", hint)
    if lower:
        return Advice(float(lower[1]), None, int(lower[2]))
    higher = re.fullmatch(
        r"Nearest: at tau (\S+) channel (\d+) has a cosine of (\S+), which gamma would .* exceed\.",
        hint,
    )
    assert higher, hint
    return Advice(float(higher[1]), float(higher[3]), int(higher[2]))


def assert_hint_helps(scan: Scan, tau: float = 0.03, p: float = 0.75, gamma: float = 0.5) -> None:
    """Nothing is found, but with the thresholds that the hint names; gamma to be exceeded."""
    found = unbraid.find(scan, tau=tau, p=p, gamma=gamma)
    assert not found.pairs
    advice = read_hint(found.hint)
    assert advice.tau <= tau
    gamma = gamma if advice.gamma is None else advice.gamma + 1e-9
    followed = unbraid.find(scan, tau=advice.tau, p=p, gamma=gamma)
    assert advice.channel in followed.channels, found.hint


def test_a_lower_tau_that_is_hinted_at_finds_the_channel(case):
    assert_hint_helps(case.scan, 0.9, 0.5, middle_cosine(case))


def test_a_higher_gamma_that_is_hinted_at_finds_the_channel(case):
    found = unbraid.find(case.scan, tau=0.05, p=0.5, gamma=-1.0)
    assert not found.pairs
    advice = read_hint(found.hint)
    lowest = unbraid.find(case.scan, tau=advice.tau, p=0.5, gamma=1.0).pairs[0]
    assert lowest.channel == advice.channel
    assert abs(lowest.cosine - advice.gamma) < 2e-3


@pytest.mark.parametrize("cosine", [0.5, 0.8484, 0.8486, 0.99, -0.2, -0.20049])
def test_a_gamma_just_above_the_hinted_cosine_is_enough(cosine, tmp_path):
    directions = [(1, 0), at_angle(cosine)]
    scan = handmade_scan(tmp_path, directions, [(0.0, 0.3)] * 2, [0, 1, 0, 1])
    assert_hint_helps(scan, gamma=-0.9)


@pytest.mark.parametrize("kept", [False, True])  # rounded, 0.0177147 would be 0.0177
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
def test_the_hinted_tau_is_enough_for_a_share_of_just_that_size_or_all_kept(step, kept, tmp_path):
    share = 0.03 * 0.9**step
    options = {"min_share": share} if kept else {}
    directions, shares = [(1, 0), (0, 1)], [(0.0, share)] * 2
    assert_hint_helps(handmade_scan(tmp_path, directions, shares, [0, 1], **options))


def test_without_a_shared_channel_the_hint_says_so(tmp_path):
    scan = handmade_scan(tmp_path, [(1, 0), (0, 1)], [(0.3, 0.0), (0.0, 0.3)], [0, 1])
    found = unbraid.find(scan, p=1.0)
    assert found.hint.startswith("No two classes use the same channel")
    assert "lower p" in found.hint
    assert str(found).endswith(found.hint)


# The user's own concepts.


def test_own_concepts_are_taken_as_given_with_all_pairs_across_them(case):
    own = {2: [[4, 0], [3], [5]], 0: [[1], [2]]}
    found = unbraid.find(case.scan, channels=own)
    assert found.concepts == {2: ((4, 0), (3,), (5,)), 0: ((1,), (2,))}
    assert found.channels == (0, 2)
    assert found.classes == (0, 1, 2, 3, 4, 5)
    expected = {(2, 3, 4), (2, 4, 5), (2, 0, 3), (2, 0, 5), (2, 3, 5), (0, 1, 2)}
    assert set(pairs_of(found)) == expected
    for pair in found.pairs:
        assert_close(pair.cosine, case.truth.cosine(pair.channel, pair.class1, pair.class2))
    assert [pair.cosine for pair in found.pairs] == sorted(pair.cosine for pair in found.pairs)


REFUSED = [
    ({"channels": {8: [[0], [1]]}}, "names channel 8, but .* channels 0 to 7"),
    ({"channels": {-1: [[0], [1]]}}, "names channel -1"),
    ({"channels": {1: [[0, 1]]}}, "two or more groups"),
    ({"channels": {1: []}}, "two or more groups"),
    ({"channels": {1: [[0], []]}}, "two or more groups"),
    ({"channels": {1: [0, 1]}}, "two or more groups"),
    ({"channels": {1: [[0, 1], [1]]}}, "share no class"),
    ({"channels": {1: [[0, 0], [1]]}}, "share no class"),
    ({"channels": {1: [[0], [6]]}}, "class 6, of which there is no image"),
    ({"channels": {1: [[-1], [0]]}}, "class -1, of which"),
    ({"channels": [[0], [1]]}, "channels is a list; give groups of classes per channel"),
    ({"channels": {1: [[0], [1]]}, "concepts": "clusters"}, "not both"),
    *(({"concepts": w}, "use 'classes' or 'clusters'") for w in ("cluster", "Clusters", "", None)),
    ({"tau": 0.0}, "tau is 0; a share must lie above 0"),
    ({"tau": -0.1}, "tau is -0.1"),
    ({"tau": 1.1}, "tau is 1.1"),
    ({"tau": math.nan}, "tau is nan"),
    ({"tau": 0.004}, "tau is 0.004, but the scan keeps no share below 0.005"),
    ({"p": 0.0}, "p is 0"),
    ({"p": 1.01}, "p is 1.01"),
    ({"p": math.nan, "channels": {1: [[0], [1]]}}, "p is nan"),
    ({"gamma": 1.01}, "gamma is 1.01; a cosine must lie between -1 and 1"),
    ({"gamma": -1.01}, "gamma is -1.01"),
    ({"gamma": math.nan, "concepts": "clusters"}, "gamma is nan"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_find_refuses_what_makes_no_sense(some_scan, arguments, message):
    with pytest.raises(UsageError, match=message):
        unbraid.find(some_scan, **arguments)
