"""What `find` returns: in print, in files, and what counts as uncertain."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from checks import assert_csv
from unbraid.finding.findings import Findings, Pair
from unbraid.finding.membership import Cluster

SIDE = ("used in", "halves")
COLUMNS = "channel,class1,class2,cosine,use1,use2,name1,name2,low,high,half1,half2,uncertain"
FINDINGS = Findings(
    tau=0.03,
    p=0.75,
    gamma=0.5,
    pairs=(
        Pair(12, 0, 2, 1 / 3, 1.0, 0.8, 0.3, 0.4123, 0.9876, 1.0),
        Pair(3, 1, 4, 0.4, 0.875, 1.0, half1=0.75),
        Pair(3, 1, 2, 0.45, 0.875, 0.8, -0.25, 0.5, 0.75, 0.5),
    ),
    concepts={12: ((0,), (2,)), 3: ((1,), (4,))},
    class_names=('digital clock, "LED"', "snake", "cauliflower\nhead"),
    hint="",
    layer="layer",
    weights="0" * 64,
)


def test_csv_and_pandas_hold_the_pairs(tmp_path):
    path = tmp_path / "findings.csv"
    FINDINGS.to_csv(path)
    assert path.read_text().splitlines()[0] == COLUMNS
    assert_csv(path, FINDINGS)
    table = FINDINGS.to_pandas()
    assert ",".join(table.columns) == COLUMNS
    assert table.cosine.tolist() == [1 / 3, 0.4, 0.45]
    assert table.name2.tolist() == ["cauliflower\nhead", "4", "cauliflower\nhead"]
    assert table.low.isna().tolist() == [False, True, False]
    assert table.uncertain.tolist() == [False, True, True]


def test_findings_print_as_a_table():
    named = replace(FINDINGS, class_names=("clock", "snake", "cauliflower"))
    head, *table, legend, mark = str(named).splitlines()
    assert head == "3 pairs of classes in 2 polysemantic channels (tau 0.03, p 0.75, gamma 0.5)"
    assert [line.split("  ")[0] for line in table] == ["channel", "12", "3", "3"]
    one, other = ("snake", "88%"), ("cauliflower", "80%")
    assert [re.split("  +", line) for line in table] == [
        ["channel", "cosine", "interval", "class 1", *SIDE, "class 2", *SIDE],
        ["12", "0.3333", "0.300 to 0.412", "clock", "100%", "0.988", *other, "1.000"],
        ["3", "0.4000", "- *", *one, "0.750", "4", "100%", "-"],
        ["3", "0.4500", "-0.250 to 0.500 *", *one, "0.750", *other, "0.500"],
    ]
    assert legend.startswith("interval: where, with 95 % confidence, the cosine lies")
    assert mark.startswith("* 2 of 3 pairs uncertain: ")
    sure = str(replace(FINDINGS, pairs=FINDINGS.pairs[:1]))
    assert "*" not in sure
    assert "uncertain" not in sure
    none = replace(FINDINGS, pairs=(), concepts={}, hint="Nearest: tau 0.02 finds channel 7.")
    assert str(none) == (
        "0 pairs of classes in 0 polysemantic channels (tau 0.03, p 0.75, gamma 0.5). "
        "Nearest: tau 0.02 finds channel 7."
    )


@pytest.mark.parametrize(
    ("cosine", "low", "high", "uncertain"),
    [
        (0.4, 0.3, 0.49, False),
        (0.4, 0.3, 0.5, True),
        (0.4, 0.55, 0.9, True),  # what noise has made low
        (0.4, math.nan, math.nan, True),
        (0.7, 0.5, 0.9, False),
        (0.7, 0.49, 0.9, True),
    ],
)
def test_a_pair_is_uncertain_unless_its_interval_lies_on_its_side_of_gamma(
    cosine, low, high, uncertain
):
    pair = Pair(3, 0, 1, cosine, 1.0, 1.0, low, high)
    assert FINDINGS.uncertain(pair) is uncertain
    cluster = Cluster(3, 0, torch.eye(2), 0.0)
    assert not replace(FINDINGS, clusters={0: cluster, 1: cluster}).uncertain(pair)
