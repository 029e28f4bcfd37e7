"""Least-squares masks: the optimum against scipy, its optimality, and what it is good for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

import unbraid
from networks import SyntheticImages, build
from unbraid.box import kkt_residual, solve_box
from unbraid.errors import UsageError
from unbraid.evaluate import separation_error
from unbraid.describe import describe
from unbraid.layers import channels_first, pooled_input, tap_inputs
from unbraid.least_squares import (
    PENALTIES,
    augment,
    augmented_row,
    choose_penalty,
    fit_least_squares,
    pose,
)
from unbraid.rectified import _images, _sample_maps, refine

OWN = {1: [[0], [1]], 4: [[0, 1], [2], [3]]}


@pytest.fixture(scope="module", params=["1x1", "3x3", "groups", "tokens"])
def case(request, tmp_path_factory):
    """A scan with positions, and findings of K = 2 and K = 3 concepts in it."""
    network, images = build(request.param), SyntheticImages(80)
    folder = tmp_path_factory.mktemp(request.param)
    scan = unbraid.scan(network, "layer", images, folder, positions=True)
    return scan, unbraid.find(scan, channels=OWN)


def random_problems(n: int, size: int, images: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = torch.randn(n, images, size, dtype=torch.float64)
    targets = torch.randn(n, images, dtype=torch.float64)
    hessian = inputs.mT @ inputs + 1e-3 * torch.eye(size, dtype=torch.float64)
    return inputs, targets, hessian, torch.einsum("bnj,bn->bj", inputs, targets)


def assert_optimal(hessian: Tensor, linear: Tensor, masks: Tensor) -> None:
    assert ((masks >= 0) & (masks <= 1)).all()
    assert kkt_residual(hessian, linear, masks).max() < 1e-8


@pytest.mark.parametrize(("size", "images"), [(3, 10), (20, 50), (40, 15)])
def test_the_box_solver_finds_scipys_answer(size, images):
    inputs, targets, hessian, linear = random_problems(5, size, images)
    answers = solve_box(hessian, linear, torch.full((5, size), 0.5, dtype=torch.float64))
    assert_optimal(hessian, linear, answers)
    for x, y, answer in zip(inputs.numpy(), targets.numpy(), answers.numpy(), strict=True):
        x = np.vstack([x, np.sqrt(1e-3) * np.eye(size)])
        y = np.concatenate([y, np.zeros(size)])
        expected = lsq_linear(x, y, (0, 1), method="bvls", tol=1e-14).x
        np.testing.assert_allclose(answer, expected, atol=1e-7)


@pytest.mark.parametrize("place", range(3))
def test_a_moved_answer_is_seen_not_to_be_optimal(place):
    _, _, hessian, linear = random_problems(1, 6, 20)
    answer = solve_box(hessian, linear, torch.zeros(1, 6, dtype=torch.float64))
    moved = answer.clone()
    moved[0, place] += 0.1 if moved[0, place] < 0.5 else -0.1
    with pytest.raises(AssertionError):
        assert_optimal(hessian, linear, moved)


def test_the_answer_does_not_depend_on_the_start():
    _, _, hessian, linear = random_problems(4, 30, 25)
    starts = [torch.zeros(4, 30), torch.ones(4, 30), torch.rand(4, 30)]
    answers = [solve_box(hessian, linear, start.double()) for start in starts]
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=0, atol=1e-7)


def slow_objective(scan, channel: int, concepts, masks: Tensor) -> list[float]:
    """METHOD.md section 5 without its penalty, image by image."""
    records = next(scan.shards())
    group, row = scan.layer.group_of(channel), augmented_row(scan, channel)
    taps = augment(records.pooled[:, group], records.n_positions) * row
    images = [torch.isin(records.label, torch.tensor(concept)) for concept in concepts]
    power = [taps[chosen].sum(1).square().mean() for chosen in images]
    values = []
    for k, mask in enumerate(masks):
        whole = torch.cat([mask, torch.ones(1, dtype=torch.float64)])
        total = 0.0
        for other, chosen in enumerate(images):
            z, z_k = taps[chosen].sum(1), taps[chosen] @ whole
            wanted = z if k == other else torch.zeros_like(z)
            total += float((z_k - wanted).square().mean() / power[other])
        values.append(total)
    return values


def test_the_problem_is_that_of_the_method_page(case):
    scan, found = case
    fits = fit_least_squares(scan, found.concepts, 0.1)
    records = next(scan.shards())
    for channel, concepts in found.concepts.items():
        group = scan.layer.group_of(channel)
        moments = []
        for concept in concepts:
            chosen = torch.isin(records.label, torch.tensor(concept))
            inputs = augment(records.pooled[chosen, group], records.n_positions[chosen])
            moments.append(inputs.T @ inputs / len(inputs))
        problem = pose(augmented_row(scan, channel), moments)
        for masks in (fits[channel].masks, problem.prior, torch.rand_like(problem.prior)):
            slow = slow_objective(scan, channel, concepts, masks)
            assert problem.loss(masks).tolist() == pytest.approx(slow, rel=1e-6)
        assert fits[channel].kkt_residual < 1e-8
        torch.testing.assert_close(problem.prior.sum(0), torch.ones(scan.layer.n_taps).double())


def test_it_does_better_than_any_rho_on_what_it_minimises(case):
    scan, found = case
    fits = fit_least_squares(scan, found.concepts, PENALTIES[0])
    for rho in (0.3, 0.7, 1.0):
        published = unbraid.split(scan, found, method="published", rho=rho)
        for part in published.channels:
            ours = slow_objective(scan, part.channel, part.concepts, fits[part.channel].masks)
            theirs = slow_objective(scan, part.channel, part.concepts, part.masks.double())
            assert all(a <= b + 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_a_stiff_penalty_gives_the_prior(case):
    scan, found = case
    for fit in fit_least_squares(scan, found.concepts, 1e9).values():
        torch.testing.assert_close(fit.masks, fit.prior, rtol=0, atol=1e-6)


def test_refining_never_makes_the_rectified_objective_worse(case):
    scan, found = case
    fits = fit_least_squares(scan, found.concepts)
    maps = _sample_maps(scan, set(range(4)))
    for channel, concepts in found.concepts.items():
        images = _images(scan, channel, concepts, maps)
        fit = fits[channel]
        refined = refine(images, fit.masks, fit.prior, fit.penalty)
        assert ((refined >= 0) & (refined <= 1)).all()
        errors = [rectified_error(images, masks) for masks in (fit.masks, refined)]
        assert errors[1] <= errors[0] + 0.02


def rectified_error(images, masks: Tensor) -> float:
    whole, _ = images.rectified(torch.ones(masks.shape[1]))
    new = torch.stack([images.rectified(mask)[0] for mask in masks], 1)
    return separation_error(whole, new, images.concept)


def test_tap_inputs_add_up_to_the_pooled_input():
    for kind in ("1x1", "3x3", "uneven", "dilation", "circular", "groups"):
        network = build(kind)
        layer = network.get_submodule("layer")
        spec = describe("layer", layer)
        x = channels_first(spec, torch.randn(2, layer.in_channels, 6, 7, dtype=torch.float64))
        pooled = pooled_input(spec, x)
        for group in range(spec.groups):
            torch.testing.assert_close(tap_inputs(spec, x, group).sum(2), pooled[:, group])


def test_the_penalty_is_one_of_those_tried_and_steady(case):
    scan, found = case
    chosen = choose_penalty(scan, found.concepts)
    assert chosen in PENALTIES
    assert choose_penalty(scan, found.concepts) == chosen


def test_one_image_a_concept_and_silent_channels_are_no_trouble(tmp_path):
    network, images = build("3x3"), SyntheticImages(4)
    network.get_submodule("layer").weight.data[1] = 0
    scan = unbraid.scan(network, "layer", images, tmp_path, positions=True)
    split = unbraid.split(scan, unbraid.find(scan, channels={1: [[0], [1]], 2: [[2], [3]]}))
    for part in split.channels:
        assert part.masks.isfinite().all()
    evaluation = unbraid.evaluate(split, scan)
    assert unbraid.compare_outputs(network, unbraid.apply(network, split), images, tolerance=0.0)
    assert evaluation.to_dict()["summary"]["least_squares"]["separation_error"] is not None


def test_split_is_deterministic_and_says_how_the_masks_were_chosen(case):
    scan, found = case
    first, second = (unbraid.split(scan, found) for _ in range(2))
    for one, other in zip(first.channels, second.channels, strict=True):
        assert torch.equal(one.masks, other.masks)
        assert set(one.info) == {"lambda", "kkt_residual"}
    assert first.method == "least_squares"


def test_a_baseline_joins_the_summary_and_must_fit(case):
    scan, found = case
    ours = unbraid.split(scan, found)
    published = unbraid.split(scan, found, method="published", rho=0.7)
    summary = unbraid.evaluate(ours, scan, baseline=published).to_dict()["summary"]
    assert list(summary) == ["least_squares", "published"]
    alone = unbraid.evaluate(published, scan).to_dict()["summary"]
    assert summary["published"] == alone["published"]
    fewer = dataclasses.replace(published, channels=published.channels[:1])
    for wrong in (ours, fewer):
        with pytest.raises(UsageError, match="same channels"):
            unbraid.evaluate(ours, scan, baseline=wrong)


def test_rho_belongs_to_the_published_method(case):
    scan, found = case
    with pytest.raises(UsageError, match="published method"):
        unbraid.split(scan, found, rho=0.7)
