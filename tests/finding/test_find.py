"""Findings: which class uses which channel for what reasons, grouped, in print and in files."""

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch

import oracle
import unbraid
from checks import assert_close, assert_csv, assert_grouped, assert_pairs
from handmade import random_shares, write_scan
from unbraid.base.errors import UsageError
from unbraid.finding import arv
from unbraid.finding.findings import Candidate, Findings
from unbraid.finding.membership import Cluster
from unbraid.finding.pairs import Pair


def middle_cosine(scan):
    """A gamma that some pairs are below and some are not, at tau 0.05 and p 0.5."""
    cosines = sorted(pair.cosine for pair in unbraid.find(scan, tau=0.05, p=0.5, gamma=1).pairs)
    assert len(cosines) >= 8
    return (cosines[len(cosines) // 2 - 1] + cosines[len(cosines) // 2]) / 2


@pytest.mark.parametrize(("tau", "p"), [(0.05, 0.5), (0.1, 0.5), (0.1, 5 / 7), (0.2, 1.0)])
def test_a_class_uses_a_channel_that_matters_in_enough_of_its_images(case, tau, p):
    taus = [0.3, tau, 0.07]
    used = arv.uses(arv.class_sums(case.scan, taus), p)
    assert 0 < used[1].sum() < used[1].numel()
    for found, one in zip(used, taus, strict=True):
        assert torch.equal(found, oracle.uses(case.truth.shares, case.truth.labels, one, p))


@pytest.mark.parametrize("concept", [(0,), (3,), (1, 4), (0, 2, 5)])
def test_arvs_of_classes_and_concepts_are_means_over_their_images(case, concept):
    mean = arv.concept_mean(arv.class_sums(case.scan, []), concept)
    for channel in range(case.scan.layer.n_out):
        found = arv.averaged_relevance(case.scan, channel, mean)
        assert_close(found, case.truth.arv(concept, channel))


def test_class_cosines_are_those_of_the_arvs(case):
    classes, sums = [0, 2, 3, 5], arv.class_sums(case.scan, [])
    for channel in range(case.scan.layer.n_out):
        expected = [[case.truth.cosine(channel, s, t) for t in classes] for s in classes]
        assert_close(arv.class_cosines(case.scan, sums, channel, classes), expected)


@pytest.mark.parametrize(
    ("tau", "p"), [(0.05, 0.5), (0.05, 0.75), (0.1, 0.3), (0.1, 5 / 7), (0.2, 0.1)]
)
@pytest.mark.parametrize("gamma", ["middle", 1.0, -1.0])
def test_find_gives_the_published_pairs_whatever_the_thresholds(case, tau, p, gamma):
    gamma = middle_cosine(case.scan) if gamma == "middle" else gamma
    found = unbraid.find(case.scan, tau=tau, p=p, gamma=gamma)
    assert_pairs(found.pairs, case.truth, tau, p, gamma)
    assert (found.tau, found.p, found.gamma) == (tau, p, gamma)
    assert bool(found.hint) == (not found.pairs)


def test_find_groups_the_classes_that_use_a_channel_by_complete_linkage(case):
    tau, p, gamma = 0.05, 0.5, middle_cosine(case.scan)
    found = unbraid.find(case.scan, tau=tau, p=p, gamma=gamma)
    assert 0 < len(found) < len(unbraid.find(case.scan, tau=tau, p=p, gamma=1.0))
    used = oracle.uses(case.truth.shares, case.truth.labels, tau, p)
    assert set(found.concepts) == {pair.channel for pair in found.pairs} == set(found.channels)
    for channel, concepts in found.concepts.items():
        classes = used[:, channel].nonzero()[:, 0].tolist()
        pairs = itertools.combinations(classes, 2)
        cosines = {pair: case.truth.cosine(channel, *pair) for pair in pairs}
        assert_grouped(concepts, classes, cosines, gamma)
    for pair in found.pairs:
        own = [{pair.class1, pair.class2} & set(c) for c in found.concepts[pair.channel]]
        assert sorted(map(len, own))[-2:] == [1, 1]
    every = [concept for groups in found.concepts.values() for concept in groups]
    assert any(len(concept) > 1 for concept in every)
    assert found.classes == tuple(sorted({c for concept in every for c in concept}))


@pytest.mark.parametrize("gamma", [-0.5, 0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_group_classes_holds_for_any_cosines(seed, gamma):
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    unit /= unit.norm(dim=1, keepdim=True)
    cosines, classes = unit @ unit.T, range(10, 19)
    pairs = itertools.combinations(classes, 2)
    between = {(s, t): float(cosines[s - 10, t - 10]) for s, t in pairs}
    assert_grouped(arv.group_classes(classes, cosines, gamma), classes, between, gamma)


def handmade_scan(folder, directions, shares, **options):
    """A class an image, with the ARV and the shares that are given."""
    directions, shares = (torch.tensor(of, dtype=torch.float64) for of in (directions, shares))
    labels = range(len(directions))
    return write_scan(folder, shares=shares, labels=labels, pooled=directions, **options)


def at_angle(cosine):
    return (cosine, math.sqrt(1 - cosine**2))


def pairs_of(found):
    return [(pair.channel, pair.class1, pair.class2) for pair in found.pairs]


def test_find_on_the_edges_of_its_thresholds(tmp_path):
    for directions, arguments, pairs in (
        # A share of exactly tau matters, and a fraction of exactly p is enough.
        ([(1, 0), (0, 1)], {"tau": 0.3, "p": 1.0}, {(0, 0, 1): 0.0}),
        ([(1, 0), (0, 1)], {"tau": math.nextafter(0.3, 1), "p": 1.0}, {}),
        # Cosines may be negative, and a class without relevance makes no pair.
        ([(0, 0), (1, 0), at_angle(-0.7)], {}, {(0, 1, 2): -0.7}),
    ):
        scan = handmade_scan(tmp_path, directions, [(0.3,)] * len(directions))
        found = unbraid.find(scan, **arguments)
        assert pairs_of(found) == list(pairs)
        assert_close([pair.cosine for pair in found.pairs], list(pairs.values()))


@pytest.mark.parametrize("shard_size", [1, 4, 100])
def test_find_however_records_are_divided_and_with_classes_that_lack_images(shard_size, tmp_path):
    labels = [0, 1, 7, 7, 1, 0, 0, 7, 1]
    angles = {0: (1, 0), 1: at_angle(0.9), 7: at_angle(0.2)}
    shares = {0: (0.5, 0.1), 1: (0.5, 0.01), 7: (0.5, 0.1)}
    pooled = torch.tensor([angles[t] for t in labels], dtype=torch.float64)
    own = {"shares": torch.tensor([shares[t] for t in labels]), "labels": labels, "pooled": pooled}
    found = unbraid.find(write_scan(tmp_path, **own, shard_size=shard_size), tau=0.05)
    assert pairs_of(found) == [(0, 0, 7), (1, 0, 7)]
    assert_close([pair.cosine for pair in found.pairs], [0.2, 0.2])
    assert found.concepts == {0: ((0, 1), (7,)), 1: ((0,), (7,))}
    assert found.name(7) == "7"


def test_find_at_a_cosine_of_exactly_gamma_and_without_a_shared_channel_gives_no_pair(tmp_path):
    scan = handmade_scan(tmp_path, [(1, 0), (3, 4), (-1, 0)], [(0.3,)] * 3)
    gamma = float(arv.class_cosines(scan, arv.class_sums(scan, []), 0, [0, 1])[0, 1])
    found = unbraid.find(scan, gamma=gamma)
    assert pairs_of(found) == [(0, 0, 2), (0, 1, 2)]
    assert found.concepts == {0: ((0, 1), (2,))}
    scan = handmade_scan(tmp_path, [(1, 0), (0, 1)], [(0.3, 0.0), (0.0, 0.3)])
    found = unbraid.find(scan, p=1.0)
    assert found.hint.startswith("No two classes use the same channel")
    assert found.hint.endswith("the smallest share that the scan kept; lower p.")


@pytest.mark.parametrize("tau", [0.03, "auto"])
def test_find_of_one_class_says_that_a_search_needs_two(tau, tmp_path):
    scan = write_scan(tmp_path, shares=random_shares(8, 4), labels=[1] * 8)
    found = unbraid.find(scan, tau=tau)
    assert not found.pairs
    assert found.hint == (
        "All images are of one class, and a search among classes needs two; take "
        "concepts='clusters'."
    )


HINT = (
    r"Nearest: (?:at )?tau (\S+) (?:finds )?channel (\d+)"
    r"(?: has a cosine of \S+; gamma (\S+) finds it)?\."
)


def read_hint(hint, gamma):
    """The tau, gamma and channel that a hint names."""
    tau, channel, higher = re.fullmatch(HINT, hint).groups()
    return float(tau), float(higher) if higher else gamma, int(channel)


def assert_hint_helps(scan, tau=0.03, p=0.75, gamma=0.5):
    """Nothing is found, but with the thresholds that the hint names."""
    found = unbraid.find(scan, tau=tau, p=p, gamma=gamma)
    assert not found.pairs
    lower, higher, channel = read_hint(found.hint, gamma)
    assert lower <= tau
    assert channel in unbraid.find(scan, tau=lower, p=p, gamma=higher).channels, found.hint


def test_the_hinted_thresholds_find_the_channel(case):
    assert_hint_helps(case.scan, 0.9, 0.5, middle_cosine(case.scan))
    tau, gamma, channel = read_hint(unbraid.find(case.scan, tau=0.05, p=0.5, gamma=-1.0).hint, -1)
    lowest = unbraid.find(case.scan, tau=tau, p=0.5, gamma=1.0).pairs[0]
    assert (lowest.channel, lowest.cosine) == (channel, pytest.approx(gamma, abs=2e-3))


def test_find_hint_is_enough_for_a_cosine_or_share(tmp_path):
    for cosine, share, gamma, options in (
        *((cosine, 0.3, -0.9, {}) for cosine in (0.5, 0.8484, 0.8486, 0.99, -0.2, -0.20049)),
        *((0.0, 0.03 * 0.9**step, 0.5, {}) for step in range(1, 7)),
        (0.0, 0.0177147, 0.5, {"min_share": 0.0177147}),
    ):
        scan = handmade_scan(tmp_path, [(1, 0), at_angle(cosine)], [(0.0, share)] * 2, **options)
        assert_hint_helps(scan, gamma=gamma)


def test_find_takes_own_concepts_as_given_with_all_pairs_across_them(case):
    found = unbraid.find(case.scan, channels={2: [[4, 0], [3], [5]], 0: [[1], [2]]})
    assert found.concepts == {2: ((4, 0), (3,), (5,)), 0: ((1,), (2,))}
    assert (found.channels, found.classes) == ((0, 2), (0, 1, 2, 3, 4, 5))
    expected = {(2, 3, 4), (2, 4, 5), (2, 0, 3), (2, 0, 5), (2, 3, 5), (0, 1, 2)}
    assert set(pairs_of(found)) == expected
    for pair in found.pairs:
        assert_close(pair.cosine, case.truth.cosine(pair.channel, pair.class1, pair.class2))
    assert [pair.cosine for pair in found.pairs] == sorted(pair.cosine for pair in found.pairs)


def test_find_refuses_what_makes_no_sense(tmp_path):
    for arguments, message in (
        ({"channels": {8: [[0], [1]]}}, "names channel 8, but .* channels 0 to 7"),
        *(
            ({"channels": {1: concepts}}, "two or more groups of classes that share no class")
            for concepts in ([[0, 1]], [0, 1], [[0], []], [[0, 1], [1]], [[0, 0], [1]])
        ),
        ({"channels": {1: [[0], [6]]}}, "class 6, of which there is no image"),
        ({"channels": [[0], [1]]}, "channels is a list; give groups of classes per channel"),
        ({"channels": {1: [[0], [1]]}, "concepts": "clusters"}, "not both"),
        ({"concepts": "Clusters"}, "use 'classes', 'clusters' or 'whole'"),
        ({"tau": math.nan}, "tau is nan"),
        ({"tau": 0.004}, "tau is 0.004, but the scan keeps no share below 0.005"),
        ({"tau": "Auto"}, "tau is 'Auto'; give a share such as 0.03, or 'auto'."),
        ({"p": math.nan, "channels": {1: [[0], [1]]}}, "p is nan"),
        ({"gamma": 1.01, "concepts": "clusters"}, "gamma is 1.01; a cosine must lie between"),
    ):
        shares = torch.full((6, 8), 0.1)
        scan = write_scan(tmp_path, shares=shares, labels=list(range(6)))
        with pytest.raises(UsageError, match=message):
            unbraid.find(scan, **arguments)


COLUMNS = "channel,class1,class2,cosine,use1,use2,name1,name2,low,high,half1,half2,uncertain"
PAIRS = (
    Pair(12, 0, 2, 1 / 3, 1.0, 0.8, 0.3, 0.4123, 0.9876, 1.0),
    Pair(3, 1, 4, 0.4, 0.875, 1.0, half1=0.75),
    Pair(3, 1, 2, 0.45, 0.875, 0.8, -0.25, 0.5, 0.75, 0.5),
)
CONCEPTS = {12: ((0,), (2,)), 3: ((1,), (4,))}
NAMES = ('digital clock, "LED"', "snake", "cauliflower\nhead")
FINDINGS = Findings(0.03, 0.75, 0.5, PAIRS, CONCEPTS, NAMES, "", "layer", "0" * 64)


def test_csv_and_pandas_hold_the_pairs_and_findings_print_as_a_table(tmp_path):
    path = tmp_path / "findings.csv"
    FINDINGS.to_csv(path)
    assert_csv(path, FINDINGS)
    assert ",".join(FINDINGS.to_pandas().columns) == COLUMNS == path.read_text().splitlines()[0]
    table = FINDINGS.to_pandas()
    assert table.name2.tolist() == ["cauliflower\nhead", "4", "cauliflower\nhead"]
    assert table.low.isna().tolist() == [False, True, False]
    assert table.uncertain.tolist() == [False, True, True]
    named = replace(FINDINGS, class_names=("clock", "snake", "cauliflower"))
    _head, *table, _legend, mark = str(named).splitlines()
    assert [re.sub("  +", "  ", line) for line in table] == [
        "channel  cosine  interval  class 1  used in  halves  class 2  used in  halves",
        "12  0.3333  0.300 to 0.412  clock  100%  0.988  cauliflower  80%  1.000",
        "3  0.4000  - *  snake  88%  0.750  4  100%  -",
        "3  0.4500  -0.250 to 0.500 *  snake  88%  0.750  cauliflower  80%  0.500",
    ]
    assert mark.startswith("* 2 of 3 pairs uncertain: ")
    assert str(named).startswith(
        "1 sure, 2 uncertain pairs of classes in 1 sure, 1 uncertain polysemantic channel (tau 0.03"
    )
    sure = replace(FINDINGS, pairs=FINDINGS.pairs[:1], concepts={12: CONCEPTS[12]})
    assert "uncertain" not in str(sure)
    none = replace(FINDINGS, pairs=(), concepts={}, hint="Nearest: ...")
    head = "No polysemantic channel (tau 0.03, p 0.75, gamma 0.5). Nearest: ..."
    assert str(none) == head
    candidates = (
        Candidate(replace(PAIRS[0], cosine=0.3), 0.02, 0.5, ((7, 3), (5,))),
        Candidate(PAIRS[1], 0.005, 0.401),
    )
    first, *table, _legend = str(replace(none, nearest=candidates)).splitlines()
    assert first == head
    assert [re.sub("  +", "  ", line) for line in table[1:]] == [
        '12  0.3000  0.300 to 0.412  digital clock, "LED"  7 3  cauliflower head  5  --tau 0.02',
        "3  0.4000  -  snake  4  --tau 0.005 --gamma 0.401",
    ]


def test_uncertain_unless_the_interval_lies_on_its_side_of_gamma():
    for cosine, low, high, uncertain in (
        (0.4, 0.3, 0.49, False),
        (0.4, 0.3, 0.5, True),
        (0.4, 0.55, 0.9, True),  # what noise has made low
        (0.4, math.nan, math.nan, True),
        (0.7, 0.5, 0.9, False),
        (0.7, 0.49, 0.9, True),
        (0.7, 0.2, 0.4, True),
    ):
        pair = Pair(3, 0, 1, cosine, 1.0, 1.0, low, high)
        assert FINDINGS.uncertain(pair) is uncertain
        cluster = Cluster(3, 0, torch.eye(2), 0.0)
        assert not replace(FINDINGS, clusters={0: cluster, 1: cluster}).uncertain(pair)
