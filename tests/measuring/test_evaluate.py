"""Measures of separation, all against the oracle, and what evaluation.json holds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unbraid
from checks import Truth, assert_close, assert_evaluation, assert_published_table, truth_of
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import UsageError
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import Split

KINDS = ["1x1", "no bias", "3x3", "uneven", "reflect", "groups", "pooled features", "tokens"]
OWN = {1: [[0], [1]], 5: [[2, 0], [3]], 6: [[3], [0, 1], [2]]}


@dataclass
class Case:
    network: nn.Module
    split: Split
    scan: Scan  # of other images than the split was made from
    truth: Truth


def make_case(kind: str, folder: Path, n_images: int = 13) -> Case:
    network = build(kind)
    train = unbraid.scan(network, "layer", SyntheticImages(12), folder / "train")
    found = unbraid.find(train, channels=OWN)
    split = unbraid.split(train, found, method="published", rho=0.8)
    dataset = SyntheticImages(n_images, seed=1)
    scan = unbraid.scan(network, "layer", dataset, folder / "val", positions=True, batch_size=6)
    return Case(network, split, scan, truth_of(network, dataset))


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def one_case(tmp_path_factory) -> Case:
    return make_case("3x3", tmp_path_factory.mktemp("one"))


def with_masks(split: Split, *masks: float) -> Split:
    """The split's channels of as many concepts, with the same mask for all taps."""
    parts = [
        replace(part, masks=torch.tensor(masks).double()[:, None].expand_as(part.masks))
        for part in split.channels
        if len(part.concepts) == len(masks)
    ]
    return replace(split, channels=tuple(parts))


# --- against the oracle ---------------------------------------------------------------------------


def test_all_measures_are_the_oracles(case):
    assert_evaluation(unbraid.evaluate(case.split, case.scan), case.split, case.truth)


def test_masks_between_zero_and_one_are_measured_as_well(case):
    generator = torch.Generator().manual_seed(2)
    parts = tuple(
        replace(part, masks=torch.rand(part.masks.shape, generator=generator).double())
        for part in case.split.channels
    )
    split = replace(case.split, channels=parts)
    assert_evaluation(unbraid.evaluate(split, case.scan), split, case.truth)


@pytest.mark.parametrize("tau", [0.005, 0.1, 0.2])
def test_the_published_table_is_the_oracles(case, tau):
    result = unbraid.evaluate(case.split, case.scan, tau=tau)
    for measured, part in zip(result.channels, case.split.channels, strict=True):
        if len(part.concepts) == 2:
            for k, concept in enumerate(measured.concepts):
                assert_published_table(concept.ratios, part, k, case.truth, tau)


def test_the_table_leaves_out_images_below_tau(one_case):
    tau = 0.1
    (part,) = (part for part in one_case.split.channels if part.channel == 5)
    images = one_case.truth.images(part.concepts[0])
    n_above = sum(float(one_case.truth.shares[n, 5]) >= tau for n in images)
    assert 0 < n_above < len(images)


def test_concept_channels_less_the_residual_make_up_the_whole(case):
    result = unbraid.evaluate(case.split, case.scan, tau=0.005)
    for channel in result.channels:
        for concept in channel.concepts:
            if concept.ratios:
                *parts, residual = (ratio.mean for ratio in concept.ratios)
                assert len(parts) == len(channel.concepts)
                assert_close(sum(parts) - residual, 1.0, 1e-7)


def test_measures_are_the_same_over_several_shards(tmp_path):
    case = make_case("1x1", tmp_path, n_images=140)
    assert case.scan.manifest.n_shards == 2
    assert_evaluation(unbraid.evaluate(case.split, case.scan), case.split, case.truth)


def test_tau_defaults_to_that_of_the_findings_and_touches_nothing_but_the_table(one_case):
    strict = replace(one_case.split, settings={**one_case.split.settings, "tau": 0.15})
    default = unbraid.evaluate(strict, one_case.scan)
    given = unbraid.evaluate(one_case.split, one_case.scan, tau=0.15)
    other = unbraid.evaluate(one_case.split, one_case.scan, tau=0.01)
    assert default.channels == given.channels
    assert [without_ratios(c) for c in other.channels] == [
        without_ratios(c) for c in given.channels
    ]
    assert other.channels != given.channels


def without_ratios(channel: Any) -> Any:
    return replace(channel, concepts=tuple(replace(c, ratios=()) for c in channel.concepts))


def test_a_tau_that_no_image_reaches_leaves_the_table_empty(one_case):
    result = unbraid.evaluate(one_case.split, one_case.scan, tau=0.999)
    for channel in result.channels:
        assert [concept.ratios for concept in channel.concepts] == [()] * len(channel.concepts)


# --- what is known beforehand ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mask", "mimic", "silence"),
    [
        *((kind, 1.0, 0.0, 1.0) for kind in ("no bias", "groups", "tokens")),
        ("no bias", 0.5, 0.5, 0.5),
    ],
)
def test_copies_of_a_channel_have_a_separation_error_of_a_half(
    kind, mask, mimic, silence, tmp_path
):
    """Whole copies mimic it and are not silent, halves do both by half."""
    case = make_case(kind, tmp_path)
    for channel in unbraid.evaluate(with_masks(case.split, mask, mask), case.scan).channels:
        assert_close(channel.separation_error, 0.5)
        assert_close(channel.separation_error_rectified, 0.5)
        for concept in channel.concepts:
            assert_close([concept.retention, concept.leakage], [mask, mask])
            assert_close([concept.mimic_error, concept.silence_error], [mimic, silence])


def test_of_three_concepts_each_error_counts_the_same(tmp_path):
    case = make_case("no bias", tmp_path)
    result = unbraid.evaluate(with_masks(case.split, 1.0, 0.0, 0.25), case.scan)
    (channel,) = result.channels
    assert_close([c.mimic_error for c in channel.concepts], [0.0, 1.0, 0.75])
    assert_close([c.silence_error for c in channel.concepts], [1.0, 0.0, 0.25])
    assert_close(channel.separation_error, (0 + 1 + 0.75 + 2 * 1 + 2 * 0 + 2 * 0.25) / 9)


def test_images_of_classes_that_are_in_no_concept_do_not_count(one_case, tmp_path):
    split = replace(one_case.split, channels=(one_case.split[1],))  # classes 0 and 1 alone
    only = unbraid.scan(
        one_case.network,
        "layer",
        SyntheticImages(13, seed=1),
        tmp_path,
        classes=[0, 1],
        positions=True,
    )
    assert unbraid.evaluate(split, only).channels == unbraid.evaluate(split, one_case.scan).channels


# --- what cannot be measured ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pooled_only(one_case, tmp_path_factory) -> Scan:
    out = tmp_path_factory.mktemp("pooled")
    return unbraid.scan(one_case.network, "layer", SyntheticImages(13, seed=1), out)


def test_without_positions_all_but_the_rectified_measures_are_there(one_case, pooled_only):
    result = unbraid.evaluate(one_case.split, pooled_only)
    whole = unbraid.evaluate(one_case.split, one_case.scan)
    for channel, expected in zip(result.channels, whole.channels, strict=True):
        assert expected.separation_error_rectified is not None
        assert channel == replace(expected, separation_error_rectified=None)
    assert result.summary["published"]["separation_error_rectified"] is None
    assert result.to_dict()["channels"][0]["separation_error_rectified"] is None


def test_scans_that_do_not_fit_are_refused(one_case, tmp_path):
    network, images = one_case.network, SyntheticImages(12)
    some = unbraid.scan(network, "layer", images, tmp_path / "some", classes=[0, 1, 2])
    for scan, message in (
        (unbraid.scan(build("3x3", seed=1), "layer", images, tmp_path / "a"), "another network"),
        (unbraid.scan(network, "stem", images, tmp_path / "b"), "another network or layer"),
        (some, "no image of class 3, concept 1 of channel 5"),
    ):
        with pytest.raises(UsageError, match=message):
            unbraid.evaluate(one_case.split, scan)
    fewer = replace(one_case.split, channels=one_case.split.channels[1:], method="other")
    for options, message in (
        ({"tau": 1.5}, r"tau is 1\.5; a share must lie between 0 and 1"),
        ({"baseline": one_case.split}, "baseline must divide the same .* by another method"),
        ({"baseline": fewer}, "baseline must divide the same channels"),
    ):
        with pytest.raises(UsageError, match=message):
            unbraid.evaluate(one_case.split, one_case.scan, **options)


def test_a_concept_of_two_classes_needs_images_of_one(one_case, tmp_path):
    split = replace(one_case.split, channels=(one_case.split[5],))  # classes 2 and 0, class 3
    scan = unbraid.scan(one_case.network, "layer", SyntheticImages(12), tmp_path, classes=[2, 3])
    (channel,) = unbraid.evaluate(split, scan).channels
    assert [concept.n_images for concept in channel.concepts] == [3, 3]


@pytest.mark.parametrize(
    ("silence", "unknown"),
    [
        pytest.param("bias", ["separation_error_rectified"], id="never above zero"),
        pytest.param("weight", ["separation_error", "separation_error_rectified"], id="all zero"),
    ],
)
def test_a_channel_that_is_silent_has_unknown_measures_and_no_crash(silence, unknown, tmp_path):
    network = build("3x3")
    with torch.no_grad():
        if silence == "weight":
            network.layer.weight[1], network.layer.bias[1] = 0.0, 0.0
        else:
            network.layer.bias[1] = -100.0
    scan = unbraid.scan(network, "layer", SyntheticImages(8), tmp_path, positions=True)
    found = unbraid.find(scan, channels={1: [[0], [1]]})
    split = unbraid.split(scan, found, method="published", rho=0.7)
    (channel,) = unbraid.evaluate(split, scan).to_dict()["channels"]
    for name in ("separation_error", "separation_error_rectified"):
        assert (channel[name] is None) == (name in unknown)


def test_the_summary_is_over_the_channels_that_could_be_measured(one_case):
    result = unbraid.evaluate(one_case.split, one_case.scan)
    unknown = replace(
        result.channels[0], separation_error=math.nan, separation_error_rectified=None
    )
    some = replace(result, channels=(unknown, *result.channels[1:]))
    rest = replace(result, channels=result.channels[1:])
    assert some.summary == rest.summary
    assert some.summary != result.summary
    none = replace(result, channels=(unknown,)).summary["published"]
    assert none == {"separation_error": None, "separation_error_rectified": None}


# --- evaluation.json ------------------------------------------------------------------------------

CONCEPT = {"classes", "retention", "leakage", "mimic_error", "silence_error", "auroc"}
BESIDES = {"name", "n_images", "ratios"}  # of a concept, for the report and the published table
ERRORS = {"separation_error", "separation_error_rectified"}


def test_to_dict_has_the_measures_under_the_keys_of_the_contract(one_case, tmp_path):
    changed = unbraid.apply(one_case.network, one_case.split)
    output = unbraid.compare_outputs(one_case.network, changed, SyntheticImages(8))
    result = unbraid.evaluate(one_case.split, one_case.scan, output=output)
    content = result.to_dict()
    assert set(content) == {"output", "channels", "summary", "ablation"}
    assert content["output"] == {
        "max_abs_logit_diff": 0.0,
        "top1_agreement": 1.0,
        "top1_before": output.top1_before,
        "top1_after": output.top1_after,
    }
    assert content["summary"] == result.summary
    assert set(content["summary"]["published"]) == ERRORS
    for entry, channel in zip(content["channels"], result.channels, strict=True):
        assert set(entry) == {"layer", "channel", "concepts", *ERRORS, "ablation", "semantics"}
        assert entry["layer"] == channel.layer == "layer"
        assert entry["channel"] == channel.channel
        assert entry["separation_error"] == channel.separation_error
        for part, concept in zip(entry["concepts"], channel.concepts, strict=True):
            assert set(part) == CONCEPT | BESIDES
            assert tuple(part["classes"]) == concept.classes
            for name in CONCEPT - {"classes"}:
                assert part[name] == getattr(concept, name)
    result.save(tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(content))


def test_json_has_null_for_what_is_no_number(one_case, tmp_path):
    result = unbraid.evaluate(one_case.split, one_case.scan)
    first = replace(result.channels[0], separation_error=math.nan)
    first = replace(first, concepts=tuple(replace(c, leakage=math.inf) for c in first.concepts))
    broken = replace(result, channels=(first, *result.channels[1:]))
    broken.save(tmp_path / "evaluation.json")
    channel = json.loads((tmp_path / "evaluation.json").read_text())["channels"][0]
    assert channel["separation_error"] is None
    assert channel["concepts"][0]["leakage"] is None
    assert channel["concepts"][0]["auroc"] == first.concepts[0].auroc
