"""What `find` returns: in print, in files, and what counts as uncertain."""

import math
import re
from dataclasses import replace

import pytest
import torch

from checks import assert_csv
from unbraid.finding.findings import Candidate, Findings, Pair
from unbraid.finding.membership import Cluster

COLUMNS = "channel,class1,class2,cosine,use1,use2,name1,name2,low,high,half1,half2,uncertain"
PAIRS = (
    Pair(12, 0, 2, 1 / 3, 1.0, 0.8, 0.3, 0.4123, 0.9876, 1.0),
    Pair(3, 1, 4, 0.4, 0.875, 1.0, half1=0.75),
    Pair(3, 1, 2, 0.45, 0.875, 0.8, -0.25, 0.5, 0.75, 0.5),
)
CONCEPTS = {12: ((0,), (2,)), 3: ((1,), (4,))}
NAMES = ('digital clock, "LED"', "snake", "cauliflower\nhead")
FINDINGS = Findings(0.03, 0.75, 0.5, PAIRS, CONCEPTS, NAMES, "", "layer", "0" * 64)


def test_csv_and_pandas_hold_the_pairs(tmp_path):
    path = tmp_path / "findings.csv"
    FINDINGS.to_csv(path)
    assert_csv(path, FINDINGS)
    assert ",".join(FINDINGS.to_pandas().columns) == COLUMNS == path.read_text().splitlines()[0]
    table = FINDINGS.to_pandas()
    assert table.name2.tolist() == ["cauliflower\nhead", "4", "cauliflower\nhead"]
    assert table.low.isna().tolist() == [False, True, False]
    assert table.uncertain.tolist() == [False, True, True]


def test_findings_print_as_a_table():
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
    assert str(sure).startswith("1 pair of classes in 1 polysemantic channel (tau 0.03")
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


@pytest.mark.parametrize(
    ("cosine", "low", "high", "uncertain"),
    [
        (0.4, 0.3, 0.49, False),
        (0.4, 0.3, 0.5, True),
        (0.4, 0.55, 0.9, True),  # what noise has made low
        (0.4, math.nan, math.nan, True),
        (0.7, 0.5, 0.9, False),
        (0.7, 0.49, 0.9, True),
        (0.7, 0.2, 0.4, True),
    ],
)
def test_uncertain_unless_the_interval_lies_on_its_side_of_gamma(cosine, low, high, uncertain):
    pair = Pair(3, 0, 1, cosine, 1.0, 1.0, low, high)
    assert FINDINGS.uncertain(pair) is uncertain
    cluster = Cluster(3, 0, torch.eye(2), 0.0)
    assert not replace(FINDINGS, clusters={0: cluster, 1: cluster}).uncertain(pair)
