"""What `find` returns: in print, in files, and what counts as uncertain."""

import math
import re
from dataclasses import replace

import torch

from checks import assert_csv
from unbraid.finding.findings import Findings, Pair
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
    assert "uncertain" not in str(replace(FINDINGS, pairs=FINDINGS.pairs[:1]))
    none = replace(FINDINGS, pairs=(), concepts={}, hint="Nearest: ...")
    head = "0 pairs of classes in 0 polysemantic channels (tau 0.03, p 0.75, gamma 0.5)."
    assert str(none) == f"{head} Nearest: ..."


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
