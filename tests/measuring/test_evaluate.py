"""Measures of separation and their bootstrap intervals, all against the oracle."""

import math
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import unbraid
from checks import (
    OF_CHANNEL,
    OVER_ALL,
    assert_close,
    assert_evaluation,
    assert_over_all,
    assert_published_table,
)
from tiny_networks import build
from unbraid.base.errors import UsageError
from unbraid.measuring import evaluate
from unbraid.measuring.formulas import mimic_error, separation_error, silence_errors
from unbraid.measuring.results import Responses

KINDS = ["no bias", "3x3", "uneven", "groups", "pooled features", "tokens"]


@pytest.mark.parametrize(("kind", "n_shards"), [*((kind, 1) for kind in KINDS), ("1x1", 2)])
def test_evaluate_any_layer_gives_the_oracles_measures(kind, n_shards, case_of):
    case = case_of(kind) if n_shards == 1 else case_of(kind, n_images=140)
    assert case.scan.manifest.n_shards == n_shards
    for tau in (0.005, 0.1, 0.2):
        result = unbraid.evaluate(case.split, case.scan, tau=tau)
        assert_evaluation(result, case.split, case.truth)
        assert_over_all(result, case.split, case.truth)
        for measured, part in zip(result.channels, case.split.channels, strict=True):
            for k, concept in enumerate(measured.concepts):
                if len(part.concepts) == 2:
                    assert_published_table(concept.ratios, part, k, case.truth, tau)
                if concept.ratios:
                    *parts, residual = (ratio.mean for ratio in concept.ratios)
                    assert len(parts) == len(part.concepts)
                    assert_close(sum(parts) - residual, 1.0, 1e-7)


def test_evaluate_copies_gives_what_is_known(case_of):
    for (
        masks,
        mimic,
        silence,
        error,
    ) in (  # whole copies, half copies; of three concepts each error counts the same
        ([1.0, 1.0], [0.0, 0.0], [1.0, 1.0], 0.5),
        ([0.5, 0.5], [0.5, 0.5], [0.5, 0.5], 0.5),
        ([1.0, 0.0, 0.25], [0.0, 1.0, 0.75], [1.0, 0.0, 0.25], (1.75 + 2 * 1.25) / 9),
    ):
        case = case_of("no bias")
        masks = torch.tensor(masks).double()
        parts = [part for part in case.split.channels if len(part.concepts) == len(masks)]
        parts = [replace(part, masks=masks[:, None].expand_as(part.masks)) for part in parts]
        result = unbraid.evaluate(replace(case.split, channels=tuple(parts)), case.scan)
        for channel in result.channels:
            assert_close(channel.separation_error, error)
            assert_close(channel.separation_error_rectified, error)
            assert_close([one.mimic_error for one in channel.concepts], mimic)
            assert_close([one.silence_error for one in channel.concepts], silence)
            assert_close([one.retention for one in channel.concepts], masks)


def test_evaluate_a_baseline_joins_the_summary_and_tau_changes_only_the_table(case):
    ours = replace(case.split, method="least_squares")
    summary = unbraid.evaluate(ours, case.scan, baseline=case.split).summary
    assert list(summary) == ["least_squares", "published"]
    assert summary["published"] == unbraid.evaluate(case.split, case.scan).summary["published"]
    table = unbraid.evaluate(ours, case.scan, baseline=case.split).summary_table()
    names = ["least squares", "published"]
    assert [name for name, *_ in table.rows] == ["means", *names]
    for (_, *cells), means in zip(table.rows[1:], summary.values(), strict=True):
        assert cells == [f"{value:.3f}" for value in means.values()]
    fewer = replace(case.split, channels=case.split.channels[1:])
    with pytest.raises(UsageError, match="baseline must divide the same channels"):
        unbraid.evaluate(ours, case.scan, baseline=fewer)
    default = replace(case.split, settings={**case.split.settings, "tau": 0.1})
    given = unbraid.evaluate(case.split, case.scan, tau=0.1)
    assert unbraid.evaluate(default, case.scan).channels == given.channels
    none = unbraid.evaluate(case.split, case.scan, tau=0.999)  # which no image reaches
    for one, other in zip(none.channels, given.channels, strict=True):
        assert one.separation_error == other.separation_error
        assert one.concepts == tuple(replace(k, ratios=()) for k in other.concepts)


def test_evaluate_scans_of_some_classes_needs_images_of_each_concept(case, tmp_path):
    scan = unbraid.scan(case.network, "layer", case.images, tmp_path, classes=[2, 3])
    of_2_0_and_3 = replace(case.split, channels=(case.split[6],))
    (channel,) = unbraid.evaluate(of_2_0_and_3, scan).channels
    assert [concept.n_images for concept in channel.concepts] == [3, 3]
    with pytest.raises(UsageError, match="no image of class 0, concept 0 of channel 1"):
        unbraid.evaluate(case.split, scan)


def without_all(channels):
    """The measures without those over all images."""
    none = dict.fromkeys(OVER_ALL)
    return tuple(
        replace(
            channel,
            concepts=tuple(replace(concept, **none) for concept in channel.concepts),
            **dict.fromkeys(OF_CHANNEL),
        )
        for channel in channels
    )


@pytest.mark.parametrize("some", [{"classes": [0, 1, 2, 3]}, {"indices": [*range(12)]}])
def test_evaluate_a_scan_of_some_images_needs_one_of_all(some, case, case_of, tmp_path):
    scan = unbraid.scan(case.network, "layer", case.images, tmp_path, positions=True, **some)
    alone = unbraid.evaluate(case.split, scan)
    assert alone.channels == without_all(alone.channels)
    summary = alone.summary["published"]
    over_all = {*OVER_ALL[:3], *OF_CHANNEL}
    assert {name for name, value in summary.items() if value is None} == over_all
    assert "over all images is left out: the scan is of some" in str(alone)
    assert len(alone.summary_table().rows[0]) == 1 + len(summary) - len(over_all)
    assert "left out" not in str(unbraid.evaluate(case.split, case.scan))
    ours = replace(case.split, method="ours")
    both = unbraid.evaluate(ours, scan, baseline=case.split, everything=case.scan)
    assert without_all(both.channels) == alone.channels
    for result in (both, both.baseline):
        assert_over_all(result, replace(case.split, method=result.method), case.truth)
    others = case_of("reflect", n_images=14).scan
    for other, told in (
        (scan, "of some images only, or of others"),
        (others, "of some images only, or of others"),
        (case_of("groups").scan, "another network"),
    ):
        with pytest.raises(UsageError, match=told):
            unbraid.evaluate(case.split, scan, everything=other)


@pytest.mark.parametrize("n_bytes", [1, 13 * 8 * 5 * 2])
def test_evaluate_over_all_images_goes_by_portions(n_bytes, case, monkeypatch):
    monkeypatch.setattr(evaluate, "_MAX_BYTES", n_bytes)  # of one channel, of two
    respond = Mock(wraps=evaluate._respond_to_all)
    monkeypatch.setattr(evaluate, "_respond_to_all", respond)
    assert_over_all(unbraid.evaluate(case.split, case.scan), case.split, case.truth)
    assert max(len(call.args[1]) for call in respond.call_args_list) == (1 if n_bytes == 1 else 2)


def test_evaluate_loses_no_channel_without_a_word(case, monkeypatch):
    every = list(evaluate.respond_to_all(case.split, case.scan))
    monkeypatch.setattr(evaluate, "respond_to_all", lambda *_: iter(every[:-1]))
    with pytest.raises(ValueError, match="shorter"):
        unbraid.evaluate(case.split, case.scan)


def test_evaluate_tells_how_far_it_is_if_asked(case, monkeypatch, capsys):
    monkeypatch.setattr("unbraid.base.progress.PATIENCE", 0.0)
    quiet = unbraid.evaluate(case.split, case.scan)
    assert capsys.readouterr().err == ""
    told = unbraid.evaluate(case.split, case.scan, progress=True)
    assert told.channels == quiet.channels
    n_channels, n_images = len(case.split.channels), case.scan.manifest.n_images
    read, measured = capsys.readouterr().err.splitlines()
    assert read.startswith(f"Reading responses: {n_images} of {n_images}, ")
    assert measured.startswith(f"Measuring: {n_channels} of {n_channels}, ")


def test_evaluate_without_positions_or_of_what_does_not_fit(case, case_of, other_weights):
    result = unbraid.evaluate(case.split, case_of("reflect", positions=False).scan)
    expected = unbraid.evaluate(case.split, case.scan).channels
    assert all(channel.separation_error_rectified for channel in expected)
    for one, whole in zip(result.channels, expected, strict=True):  # sums differ in the last bit
        same = [replace(c, concepts=(), separation_error_rectified=None) for c in (one, whole)]
        assert same[0] == same[1]
        for k, known in zip(one.concepts, whole.concepts, strict=True):
            assert replace(k, off=known.off) == known
            assert k.off == pytest.approx(known.off, rel=1e-12)
    for scan, options, told in (
        (other_weights.scan, {}, "another network"),
        (case_of(case.network, layer="stem").scan, {}, "another network or layer"),
        (case.scan, {"baseline": case.split}, "baseline must divide the same .* another method"),
    ):
        with pytest.raises(UsageError, match=told):
            unbraid.evaluate(case.split, scan, **options)


@pytest.mark.parametrize("silence", ["bias", "weight"])
def test_evaluate_a_silent_channel_has_unknown_measures(silence, case_of):
    network = build("3x3")
    with torch.no_grad():
        if silence == "weight":
            network.layer.weight[1], network.layer.bias[1] = 0.0, 0.0
        else:
            network.layer.bias[1] = -100.0  # never above zero
    case = case_of(network)
    result = unbraid.evaluate(case.split, case.scan)
    channel = result.to_dict()["channels"][0]
    assert (channel["separation_error"] is None) == (silence == "weight")
    assert channel["separation_error_rectified"] is None
    known = [one.separation_error_rectified for one in result.channels]
    known = [value for value in known if math.isfinite(value)]
    assert_close(result.summary["published"]["separation_error_rectified"], sum(known) / len(known))


@pytest.fixture
def responses():
    """Of three concepts' images, each of which one concept channel answers to the most."""
    concept = torch.arange(60) % 3
    z = 2 + torch.rand(60).double() + concept
    new = z[:, None] * (0.2 + 0.6 * torch.nn.functional.one_hot(concept) + torch.rand(60, 3) / 2)
    return Responses(concept, concept, z / 9, z, new, z, None)


def measures_on(responses, images):
    z, new = responses.original[images], responses.concepts[images]
    concept = responses.concept[images]
    rows = []
    for k in range(3):
        z_k, own = new[:, k], concept == k
        leaks = [float(z_k[concept == o].mean() / z[concept == o].mean()) for o in {0, 1, 2} - {k}]
        silences = silence_errors(z, new, concept, k)
        retention, mimic = float(z_k[own].mean() / z[own].mean()), mimic_error(z, z_k, own)
        rows.append([retention, sum(leaks) / 2, mimic, sum(silences) / 2, evaluate.auroc(z_k, own)])
    return rows


def draws(responses, n):
    rng = np.random.default_rng(5)
    members = [np.flatnonzero(responses.concept == k) for k in range(3)]
    return [np.concatenate([rng.choice(own, len(own)) for own in members]) for _ in range(n)]


@pytest.mark.parametrize("step", [1e-9, 0.5])
def test_resampled_measures_are_those_of_the_repeated_images(step, responses):
    responses = replace(responses, concepts=(responses.concepts / step).round() * step)  # ties
    chosen = draws(responses, 6)
    counts = np.array([np.bincount(images, minlength=60) for images in chosen], dtype=float)
    members = [np.flatnonzero(responses.concept == k) for k in range(3)]
    z, new = responses.original.numpy(), responses.concepts.numpy()
    fast = evaluate.resampled(counts, z, new, members)
    slow = [measures_on(responses, images) for images in chosen]
    np.testing.assert_allclose(fast, slow, rtol=1e-9)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(fast, slow[::-1])


@pytest.mark.parametrize("n_at_a_time", [7, 200])
def test_intervals_are_percentiles_of_many_draws(n_at_a_time, responses, monkeypatch):
    monkeypatch.setattr(evaluate, "_MAX_CELLS", n_at_a_time * 60)
    draw = Mock(wraps=evaluate._draw)
    monkeypatch.setattr(evaluate, "_draw", draw)
    found = evaluate.intervals(responses)
    assert max(call.args[1] for call in draw.call_args_list) == n_at_a_time
    assert found == evaluate.intervals(responses)
    z, new, concept = responses.original, responses.concepts, responses.concept
    chosen = draws(responses, 600)
    measures = [measures_on(responses, images) for images in chosen]
    errors = [separation_error(z[i], new[i], concept[i]) for i in chosen]
    means = [[float(z[i][concept[i] == k].mean()) for k in range(3)] for i in chosen]
    for measured, values in (
        ([list(vars(concept).values()) for concept in found.concepts], measures),
        (found.separation_error, errors),
        (found.means, means),
    ):
        low, high = np.quantile(values, [0.025, 0.975], axis=0)
        away = np.abs(np.array(measured) - np.stack([low, high], -1)).max(-1)
        assert (away < 0.35 * (high - low).clip(min=1e-9)).all()
    concept = (torch.arange(60) == 0).long()  # a single image tells nothing of others
    assert evaluate.intervals(replace(responses, concept=concept, concepts=new[:, :2])) is None
