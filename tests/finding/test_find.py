"""Findings: which class uses which channel, for what reasons, and how these are grouped."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import UnbraidError, UsageError
from unbraid.finding.arv import (
    averaged_relevance,
    class_cosines,
    class_sums,
    concept_mean,
    group_classes,
    uses,
)
from unbraid.finding.findings import Findings, Pair
from unbraid.scanning.records import Records, Scan, write_shard

N_CLASSES, N_OUTPUTS = 6, 6


@dataclass
class Case:
    scan: Scan
    truth: Truth


def six_class_network(kind: str) -> torch.nn.Module:
    network = build(kind)
    head = torch.nn.Linear(network.head.in_features, N_OUTPUTS).double()
    with torch.no_grad():
        head.weight.copy_(
            torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(5))
        )
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


def all_cosines(truth: Truth, channel: int, classes: Sequence[int]) -> dict[tuple[int, int], float]:
    pairs = itertools.combinations(sorted(classes), 2)
    return {(s, t): truth.cosine(channel, s, t) for s, t in pairs}


def middle_cosine(case: Case, tau: float, p: float) -> float:
    """A gamma that some pairs are below and some are not."""
    cosines = sorted(pair.cosine for pair in unbraid.find(case.scan, tau=tau, p=p, gamma=1).pairs)
    assert len(cosines) >= 8
    return (cosines[len(cosines) // 2 - 1] + cosines[len(cosines) // 2]) / 2


# --- against the oracle ---------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "p"), [(0.05, 0.5), (0.1, 0.5), (0.1, 5 / 7), (0.2, 1.0)])
def test_a_class_uses_a_channel_that_matters_in_enough_of_its_images(case, tau, p):
    (found,) = uses(class_sums(case.scan, [tau]), p)
    assert found.any()
    assert not found.all()
    assert_uses(found, case.truth, tau, p)


def test_several_taus_are_counted_in_one_reading(case):
    taus = [0.3, 0.05, 0.1]
    for found, tau in zip(uses(class_sums(case.scan, taus), 0.5), taus, strict=True):
        assert_uses(found, case.truth, tau, 0.5)


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
    gamma = middle_cosine(case, 0.05, 0.5) if gamma == "middle" else gamma
    found = unbraid.find(case.scan, tau=tau, p=p, gamma=gamma)
    assert_pairs(found.pairs, case.truth, tau, p, gamma)
    assert (found.tau, found.p, found.gamma) == (tau, p, gamma)
    assert bool(found.hint) == (not found.pairs)


def test_the_middle_gamma_finds_some_pairs_and_leaves_some(case):
    gamma = middle_cosine(case, 0.05, 0.5)
    some = unbraid.find(case.scan, tau=0.05, p=0.5, gamma=gamma)
    every = unbraid.find(case.scan, tau=0.05, p=0.5, gamma=1.0)
    assert 0 < len(some) < len(every)


def test_concepts_are_complete_linkage_groups_of_the_classes_that_use_a_channel(case):
    tau, p = 0.05, 0.5
    gamma = middle_cosine(case, tau, p)
    found = unbraid.find(case.scan, tau=tau, p=p, gamma=gamma)
    (used,) = uses(class_sums(case.scan, [tau]), p)
    assert set(found.concepts) == {pair.channel for pair in found.pairs}
    for channel, concepts in found.concepts.items():
        classes = used[:, channel].nonzero()[:, 0].tolist()
        assert_grouped(concepts, classes, all_cosines(case.truth, channel, classes), gamma)
    assert any(len(concept) > 1 for groups in found.concepts.values() for concept in groups)


def test_every_pair_is_across_two_concepts_of_its_channel(case):
    found = unbraid.find(case.scan, tau=0.05, p=0.5, gamma=middle_cosine(case, 0.05, 0.5))
    for pair in found.pairs:
        own = [{pair.class1, pair.class2} & set(c) for c in found.concepts[pair.channel]]
        assert sorted(len(part) for part in own if part) == [1, 1]


def test_channels_and_classes_are_all_those_of_the_concepts(case):
    found = unbraid.find(case.scan, tau=0.05, p=0.5, gamma=middle_cosine(case, 0.05, 0.5))
    assert found.channels == tuple(sorted(found.concepts))
    named = {c for groups in found.concepts.values() for concept in groups for c in concept}
    assert found.classes == tuple(sorted(named))


# --- scans written by hand: every figure is known -------------------------------------------------


def handmade_scan(
    folder: Path,
    template: Scan,
    *,
    directions: Sequence[Sequence[float]],
    shares: Sequence[Sequence[float]],
    labels: Sequence[int],
    shard_size: int = 5,
    min_share: float = 0.005,
    class_names: Sequence[str] = (),
) -> Scan:
    """A fully connected layer with all weights one, so that an ARV is the mean pooled input.

    directions: pooled input of the images of each class. shares: (class, channel).
    """
    folder.mkdir(parents=True, exist_ok=True)
    n_taps, n_out = len(directions[0]), len(shares[0])
    layer = replace(
        template.layer, n_in=n_taps, n_out=n_out, groups=1, kernel=(1,), channels_last=True
    )
    manifest = replace(
        template.manifest,
        layer=layer,
        n_images=len(labels),
        shard_size=shard_size,
        min_share=min_share,
        class_names=tuple(class_names),
    )
    for shard in range(manifest.n_shards):
        images = range(shard * shard_size, min((shard + 1) * shard_size, len(labels)))
        label = torch.tensor([labels[n] for n in images])
        dense = torch.tensor([shares[t] for t in label.tolist()], dtype=torch.float64)
        kept = dense >= min_share
        records = Records(
            index=torch.tensor(list(images)),
            label=label,
            prediction=label.clone(),
            n_positions=torch.ones_like(label),
            pooled=torch.tensor([[directions[t]] for t in label.tolist()], dtype=torch.float64),
            share_start=torch.cat([torch.zeros(1).long(), kept.sum(1).cumsum(0)]),
            share_channel=kept.nonzero()[:, 1].int(),
            share_value=dense[kept],
            broken=torch.zeros(0).long(),
        )
        write_shard(folder, shard, records)
    return Scan(folder, manifest, torch.ones(n_out, n_taps).double(), torch.zeros(n_out).double())


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Scan:
    return unbraid.scan(build("head"), "layer", SyntheticImages(4), tmp_path_factory.mktemp("t"))


def at_angle(cosine: float) -> tuple[float, float]:
    """A direction whose cosine with (1, 0) is known."""
    return (cosine, math.sqrt(1 - cosine**2))


@pytest.mark.parametrize("shard_size", [1, 4, 100])
def test_findings_do_not_depend_on_how_records_are_divided_among_shards(
    shard_size, template, tmp_path
):
    scan = handmade_scan(
        tmp_path,
        template,
        directions=[(1, 0), at_angle(0.9), at_angle(0.2)],
        shares=[(0.5, 0.1), (0.5, 0.01), (0.5, 0.1)],
        labels=[0, 1, 2, 2, 1, 0, 0, 2, 1],
        shard_size=shard_size,
    )
    found = unbraid.find(scan, tau=0.05)
    assert [(pair.channel, pair.class1, pair.class2) for pair in found.pairs] == [
        (0, 0, 2),
        (1, 0, 2),
    ]
    assert_close([pair.cosine for pair in found.pairs], [0.2, 0.2])
    assert found.concepts == {0: ((0, 1), (2,)), 1: ((0,), (2,))}


def test_a_share_of_exactly_tau_matters_and_a_fraction_of_exactly_p_is_enough(template, tmp_path):
    scan = handmade_scan(
        tmp_path,
        template,
        directions=[(1, 0), (0, 1)],
        shares=[(0.3,), (0.3,)],
        labels=[0, 1],
    )
    assert len(unbraid.find(scan, tau=0.3, p=1.0)) == 1
    assert len(unbraid.find(scan, tau=math.nextafter(0.3, 1), p=1.0)) == 0


def test_a_cosine_of_exactly_gamma_is_no_pair_and_one_concept(template, tmp_path):
    scan = handmade_scan(
        tmp_path,
        template,
        directions=[(1, 0), (3, 4), (-1, 0)],
        shares=[(0.3,), (0.3,), (0.3,)],
        labels=[0, 1, 2],
    )
    gamma = float(class_cosines(scan, class_sums(scan, []), 0, [0, 1])[0, 1])
    found = unbraid.find(scan, gamma=gamma)
    assert [(pair.class1, pair.class2) for pair in found.pairs] == [(0, 2), (1, 2)]
    assert found.concepts == {0: ((0, 1), (2,))}


def test_negative_cosines_are_pairs_too(template, tmp_path):
    scan = handmade_scan(
        tmp_path,
        template,
        directions=[(1, 0), at_angle(-0.7)],
        shares=[(0.3,), (0.3,)],
        labels=[0, 1],
    )
    (pair,) = unbraid.find(scan).pairs
    assert_close(pair.cosine, -0.7)


def test_a_class_without_relevance_makes_no_pair(template, tmp_path):
    scan = handmade_scan(
        tmp_path,
        template,
        directions=[(0, 0), (1, 0), (0, 1)],
        shares=[(0.3,), (0.3,), (0.3,)],
        labels=[0, 1, 2],
    )
    found = unbraid.find(scan)
    assert [(pair.class1, pair.class2) for pair in found.pairs] == [(1, 2)]


def test_classes_without_names_or_images_are_no_hindrance(template, tmp_path):
    scan = handmade_scan(
        tmp_path,
        template,
        directions=[(1, 0)] * 7 + [(0, 1)],
        shares=[(0.3,)] * 8,
        labels=[0, 0, 7, 7, 7, 0],
        class_names=["zero", ""],
    )
    found = unbraid.find(scan)
    assert [(pair.class1, pair.class2) for pair in found.pairs] == [(0, 7)]
    assert [found.name(label) for label in (0, 1, 7)] == ["zero", "1", "7"]


@pytest.mark.parametrize("gamma", [-0.5, 0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_grouping_holds_for_any_cosines(seed, gamma):
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


# --- what comes nearest ---------------------------------------------------------------------------


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


def follow(scan: Scan, hint: str, tau: float, p: float, gamma: float) -> Findings:
    """Search with the thresholds that a hint names, a gamma to exceed by a little."""
    advice = read_hint(hint)
    if advice.gamma is not None:
        gamma = advice.gamma + 1e-9
    assert advice.tau <= tau
    found = unbraid.find(scan, tau=advice.tau, p=p, gamma=gamma)
    assert advice.channel in found.channels, hint
    return found


def test_a_lower_tau_that_is_hinted_at_finds_the_channel(case):
    tau, p = 0.9, 0.5
    gamma = middle_cosine(case, 0.05, 0.5)
    found = unbraid.find(case.scan, tau=tau, p=p, gamma=gamma)
    assert not found.pairs
    follow(case.scan, found.hint, tau, p, gamma)


def test_a_higher_gamma_that_is_hinted_at_finds_the_channel(case):
    found = unbraid.find(case.scan, tau=0.05, p=0.5, gamma=-1.0)
    assert not found.pairs
    advice = read_hint(found.hint)
    lowest = unbraid.find(case.scan, tau=advice.tau, p=0.5, gamma=1.0).pairs[0]
    assert lowest.channel == advice.channel
    assert abs(lowest.cosine - advice.gamma) < 2e-3


@pytest.mark.parametrize("cosine", [0.5, 0.8484, 0.8486, 0.99, -0.2, -0.20049])
def test_a_gamma_just_above_the_hinted_cosine_is_enough(cosine, template, tmp_path):
    scan = handmade_scan(
        tmp_path,
        template,
        directions=[(1, 0), at_angle(cosine)],
        shares=[(0.0, 0.3), (0.0, 0.3)],
        labels=[0, 1, 0, 1],
    )
    found = unbraid.find(scan, gamma=-0.9)
    follow(scan, found.hint, 0.03, 0.75, -0.9)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
def test_the_hinted_tau_is_enough_even_for_a_share_of_just_that_size(step, template, tmp_path):
    share = 0.03 * 0.9**step
    scan = handmade_scan(
        tmp_path,
        template,
        directions=[(1, 0), (0, 1)],
        shares=[(0.0, share), (0.0, share)],
        labels=[0, 1],
    )
    found = unbraid.find(scan)
    follow(scan, found.hint, 0.03, 0.75, 0.5)


@pytest.mark.parametrize("step", [4, 5])  # 0.019683 and 0.0177147, rounded 0.0197 and 0.0177
def test_a_hinted_tau_is_not_below_what_the_scan_kept(step, template, tmp_path):
    kept = 0.03 * 0.9**step
    scan = handmade_scan(
        tmp_path,
        template,
        directions=[(1, 0), (0, 1)],
        shares=[(kept,), (kept,)],
        labels=[0, 1],
        min_share=kept,
    )
    follow(scan, unbraid.find(scan).hint, 0.03, 0.75, 0.5)


def test_without_a_shared_channel_the_hint_says_so_and_a_lower_p_finds_it(template, tmp_path):
    scan = handmade_scan(
        tmp_path,
        template,
        directions=[(1, 0), (0, 1), (0, 1)],
        shares=[(0.3, 0.0), (0.0, 0.3), (0.0, 0.0)],
        labels=[0, 1],
    )
    found = unbraid.find(scan, p=1.0)
    assert found.hint.startswith("No two classes use the same channel")
    assert "lower p" in found.hint
    assert str(found).endswith(found.hint)


# --- the user's own concepts ----------------------------------------------------------------------


def test_own_concepts_are_taken_as_given_with_all_pairs_across_them(case):
    own = {2: [[4, 0], [3], [5]], 0: [[1], [2]]}
    found = unbraid.find(case.scan, channels=own)
    assert found.concepts == {2: ((4, 0), (3,), (5,)), 0: ((1,), (2,))}
    assert found.channels == (0, 2)
    assert found.classes == (0, 1, 2, 3, 4, 5)
    expected = {(2, 3, 4), (2, 4, 5), (2, 0, 3), (2, 0, 5), (2, 3, 5), (0, 1, 2)}
    assert {(pair.channel, pair.class1, pair.class2) for pair in found.pairs} == expected
    for pair in found.pairs:
        assert_close(pair.cosine, case.truth.cosine(pair.channel, pair.class1, pair.class2))
    assert [pair.cosine for pair in found.pairs] == sorted(pair.cosine for pair in found.pairs)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        pytest.param({8: [[0], [1]]}, "names channel 8, but .* channels 0 to 7", id="channel"),
        pytest.param({-1: [[0], [1]]}, "names channel -1", id="negative channel"),
        pytest.param({1: [[0, 1]]}, "two or more groups", id="one group"),
        pytest.param({1: []}, "two or more groups", id="no group"),
        pytest.param({1: [[0], []]}, "two or more groups", id="empty group"),
        pytest.param({1: [[0, 1], [1]]}, "share no class", id="overlap"),
        pytest.param({1: [[0, 0], [1]]}, "share no class", id="repeated"),
        pytest.param({1: [0, 1]}, "two or more groups", id="classes instead of groups"),
        pytest.param({1: [[0], [6]]}, "class 6, of which the scan has no image", id="class"),
        pytest.param({1: [[-1], [0]]}, "class -1, of which", id="negative class"),
    ],
)
def test_own_concepts_that_make_no_sense_are_refused(some_scan, channels, message):
    with pytest.raises(UsageError, match=message):
        unbraid.find(some_scan, channels=channels)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"tau": 0.0}, "tau is 0; a share must lie above 0"),
        ({"tau": -0.1}, "tau is -0.1"),
        ({"tau": 1.1}, "tau is 1.1"),
        ({"tau": math.nan}, "tau is nan"),
        ({"tau": 0.004}, "tau is 0.004, but the scan keeps no share below 0.005"),
        ({"p": 0.0}, "p is 0"),
        ({"p": 1.01}, "p is 1.01"),
        ({"p": math.nan}, "p is nan"),
        ({"gamma": 1.01}, "gamma is 1.01; a cosine must lie between -1 and 1"),
        ({"gamma": -1.01}, "gamma is -1.01"),
        ({"gamma": math.nan}, "gamma is nan"),
    ],
)
@pytest.mark.parametrize("channels", [None, {1: [[0], [1]]}])
def test_thresholds_out_of_range_are_refused(some_scan, thresholds, message, channels):
    with pytest.raises(UsageError, match=message):
        unbraid.find(some_scan, channels=channels, **thresholds)


# --- for people and files -------------------------------------------------------------------------


SIDE = ("used in", "halves")
COLUMNS = "channel,class1,class2,cosine,use1,use2,name1,name2,low,high,half1,half2,uncertain"


@pytest.fixture(scope="module")
def findings() -> Findings:
    return Findings(
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


def test_the_csv_file_holds_the_pairs(findings, tmp_path):
    findings.to_csv(tmp_path / "findings.csv")
    head = (tmp_path / "findings.csv").read_text().splitlines()[0]
    assert head == COLUMNS
    assert_csv(tmp_path / "findings.csv", findings)


def test_the_csv_file_of_a_search_holds_its_pairs(case, tmp_path):
    found = unbraid.find(case.scan, tau=0.05, p=0.5, gamma=1.0)
    found.to_csv(tmp_path / "new folder" / "findings.csv")
    assert_csv(tmp_path / "new folder" / "findings.csv", found)


def test_pandas_gets_the_columns_of_the_csv_file(findings):
    table = findings.to_pandas()
    assert ",".join(table.columns) == COLUMNS
    assert table.channel.tolist() == [12, 3, 3]
    assert table.cosine.tolist() == [1 / 3, 0.4, 0.45]
    assert table.name2.tolist() == ["cauliflower\nhead", "4", "cauliflower\nhead"]
    assert table.low.isna().tolist() == [False, True, False]
    assert table.uncertain.tolist() == [False, True, True]


def test_without_pandas_it_says_how_to_get_it(findings, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnbraidError, match="pip install pandas"):
        findings.to_pandas()


def test_findings_print_as_a_table(findings):
    named = replace(findings, class_names=("clock", "snake", "cauliflower"))
    head, *table, legend, mark = str(named).splitlines()
    assert head == "3 pairs of classes in 2 polysemantic channels (tau 0.03, p 0.75, gamma 0.5)"
    assert [line.split("  ")[0] for line in table] == ["channel", "12", "3", "3"]
    assert [re.split("  +", line) for line in table] == [
        ["channel", "cosine", "interval", "class 1", *SIDE, "class 2", *SIDE],
        ["12", "0.3333", "0.300 to 0.412", "clock", "100%", "0.988", "cauliflower", "80%", "1.000"],
        ["3", "0.4000", "- *", "snake", "88%", "0.750", "4", "100%", "-"],
        [
            "3",
            "0.4500",
            "-0.250 to 0.500 *",
            "snake",
            "88%",
            "0.750",
            "cauliflower",
            "80%",
            "0.500",
        ],
    ]
    assert legend.startswith("interval: where, with 95 % confidence, the cosine lies")
    assert mark.startswith("* 2 of 3 pairs uncertain: ")
    assert len(named) == 3


def test_without_an_uncertain_pair_nothing_is_said_of_them(findings):
    sure = replace(findings, pairs=findings.pairs[:1])
    assert "*" not in str(sure)
    assert "uncertain" not in str(sure)


def test_no_finding_prints_the_hint(findings):
    none = replace(findings, pairs=(), concepts={}, hint="Nearest: tau 0.02 finds channel 7.")
    assert str(none) == (
        "0 pairs of classes in 0 polysemantic channels (tau 0.03, p 0.75, gamma 0.5). "
        "Nearest: tau 0.02 finds channel 7."
    )
    assert none.classes == ()
