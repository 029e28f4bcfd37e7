"""Least-squares masks: the optimum against scipy, its optimality, and what it is good for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import UsageError
from unbraid.finding.membership import Members
from unbraid.measuring.evaluate import separation_error
from unbraid.networks.layers import describe
from unbraid.networks.spec import channels_first, pooled_input, tap_inputs
from unbraid.splitting import box_solver as box
from unbraid.splitting.box_solver import (
    Rows,
    System,
    Whole,
    add,
    kkt_residual,
    solve_box,
)
from unbraid.splitting.least_squares import (
    PENALTIES,
    Moment,
    augment,
    augmented_row,
    choose_penalty,
    fit_least_squares,
    pose,
    sample_images,
)
from unbraid.splitting.rectified import images_of, pose_rectified, refine

OWN = {1: [[0], [1]], 4: [[0, 1], [2], [3]]}


@pytest.fixture(scope="module", params=["1x1", "3x3", "groups", "tokens"])
def case(request, tmp_path_factory):
    """A scan with positions, and findings of K = 2 and K = 3 concepts in it."""
    network, images = build(request.param), SyntheticImages(80)
    folder = tmp_path_factory.mktemp(request.param)
    scan = unbraid.scan(network, "layer", images, folder, positions=True)
    return scan, unbraid.find(scan, channels=OWN)


def random_problem(size: int, images: int, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (images, size), targets (n, images) and the linear part of n problems (n, size)."""
    inputs = torch.randn(images, size, dtype=torch.float64)
    targets = torch.randn(n, images, dtype=torch.float64)
    return inputs, targets, targets @ inputs


def assert_optimal(gram, ridge: float, linear: Tensor, masks: Tensor) -> None:
    assert ((masks >= 0) & (masks <= 1)).all()
    assert kkt_residual(gram, ridge, linear, masks).max() < 1e-8


SIZES = [(3, 10), (20, 50), (40, 15), (60, 8)]


@pytest.mark.parametrize("form", ["whole", "rows"])
@pytest.mark.parametrize(("size", "images"), SIZES)
def test_the_box_solver_finds_scipys_answer(size, images, form):
    inputs, targets, linear = random_problem(size, images)
    gram = Whole(inputs.mT @ inputs) if form == "whole" else Rows(inputs)
    ridge = 1e-3
    answers = solve_box(gram, ridge, linear, torch.full_like(linear, 0.5))
    assert_optimal(gram, ridge, linear, answers)
    x = np.vstack([inputs.numpy(), np.sqrt(ridge) * np.eye(size)])
    for target, answer in zip(targets.numpy(), answers.numpy(), strict=True):
        y = np.concatenate([target, np.zeros(size)])
        expected = lsq_linear(x, y, (0, 1), method="bvls", tol=1e-14).x
        np.testing.assert_allclose(answer, expected, atol=1e-7)


@pytest.mark.parametrize("place", range(3))
def test_a_moved_answer_is_seen_not_to_be_optimal(place):
    inputs, _, linear = random_problem(6, 20, 1)
    gram = Rows(inputs)
    answer = solve_box(gram, 1e-3, linear, torch.zeros_like(linear))
    moved = answer.clone()
    moved[0, place] += 0.1 if moved[0, place] < 0.5 else -0.1
    with pytest.raises(AssertionError):
        assert_optimal(gram, 1e-3, linear, moved)


def test_the_answer_does_not_depend_on_the_start():
    inputs, _, linear = random_problem(30, 25, 4)
    starts = [torch.zeros_like(linear), torch.ones_like(linear), torch.rand_like(linear)]
    answers = [solve_box(Rows(inputs), 1e-3, linear, start) for start in starts]
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("form", ["whole", "rows"])
def test_the_interior_point_comes_near_the_answer_alone(monkeypatch, form):
    inputs, _, linear = random_problem(30, 60 if form == "whole" else 12)
    gram = Whole(inputs.mT @ inputs) if form == "whole" else Rows(inputs)
    expected = solve_box(gram, 1e-2, linear, torch.zeros_like(linear))
    monkeypatch.setattr(box, "_PATIENCE", 0)
    answer = solve_box(gram, 1e-2, linear, torch.zeros_like(linear))
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-4)


def test_guesses_that_go_round_in_circles_are_helped_out(monkeypatch):
    helped = []
    found = box._interior_point
    monkeypatch.setattr(
        box, "_interior_point", lambda *problem: helped.append(1) or found(*problem)
    )
    torch.manual_seed(1)
    inputs = torch.randn(300, 100, dtype=torch.float64)
    for tap in range(1, 100):  # neighbours much alike, as under a kernel
        inputs[:, tap] = 0.99 * inputs[:, tap - 1] + (1 - 0.99**2) ** 0.5 * inputs[:, tap]
    linear = (inputs @ (3 * torch.randn(100).double()) @ inputs)[None]
    gram = Whole(inputs.mT @ inputs)
    answer = solve_box(gram, 1e-4, linear, torch.full_like(linear, 0.5))
    assert_optimal(gram, 1e-4, linear, answer)
    assert helped


def test_a_problem_that_rounding_makes_indefinite_is_solved():
    inputs, _, linear = random_problem(20, 4)
    gram = Whole(inputs.mT @ inputs * 1e6)
    answer = solve_box(gram, 1e-4, linear, torch.zeros_like(linear))
    assert_optimal(gram, 1e-4, linear, answer)


@pytest.mark.parametrize("form", ["rows", "whole"])
def test_hardly_any_ridge_is_enough(form):
    """As where all inputs of the concepts are zero, and only the background says anything."""
    inputs = torch.randn(3, 36, generator=torch.Generator().manual_seed(0)).double()
    gram = Rows(inputs) if form == "rows" else Whole(inputs.T @ inputs)
    linear = 3 * torch.ones(2, 36).double()
    answer = solve_box(gram, torch.finfo(torch.float64).tiny, linear, torch.zeros_like(linear))
    assert kkt_residual(gram, 0.0, linear, answer).max() < 1e-8


def test_both_forms_of_a_gram_say_the_same():
    parts = [torch.randn(n, 60, dtype=torch.float64) for n in (4, 6)]
    weights, row, x = [0.3, 2.0], torch.randn(60).double(), torch.randn(3, 60).double()
    whole = sum(w * part.mT @ part for w, part in zip(weights, parts, strict=True))
    few = add([Rows(part) for part in parts], weights)
    many = add([Rows(parts[0]), Whole(parts[1].mT @ parts[1])], weights)
    assert isinstance(few, Rows)
    assert isinstance(many, Whole)
    matrix = (whole * row * row[:, None])[:50, :50]
    free = torch.tensor([0, 3, 4, 20, 49])
    expected = torch.linalg.solve(matrix[free][:, free] + 0.7 * torch.eye(5).double(), x[0, :5])
    for gram in (few, many):
        scaled = gram.weighted(row[:50])
        torch.testing.assert_close(scaled.times(x[:, :50]), x[:, :50] @ matrix)
        torch.testing.assert_close(scaled.diagonal, matrix.diagonal())
        system = System(scaled, 0.7, free)
        torch.testing.assert_close(system.exactly(x[0, :5]), expected)
        torch.testing.assert_close(system.nearly(x[0, :5]), expected, rtol=1e-3, atol=1e-3)


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
    fits = fit_least_squares(Members(scan), found.concepts, 0.1, sample_images(scan))
    records = next(scan.shards())
    for channel, concepts in found.concepts.items():
        group = scan.layer.group_of(channel)
        moments = []
        for concept in concepts:
            chosen = torch.isin(records.label, torch.tensor(concept))
            inputs = augment(records.pooled[chosen, group], records.n_positions[chosen])
            moments.append(Moment([Rows(inputs)], len(inputs)))
        problem = pose(augmented_row(scan, channel), moments)
        for masks in (fits[channel].masks, problem.prior, torch.rand_like(problem.prior)):
            slow = slow_objective(scan, channel, concepts, masks)
            assert problem.loss(masks).tolist() == pytest.approx(slow, rel=1e-6)
        assert fits[channel].kkt_residual < 1e-8
        torch.testing.assert_close(problem.prior.sum(0), torch.ones(scan.layer.n_taps).double())


def test_it_does_better_than_any_rho_on_what_it_minimises(case):
    scan, found = case
    fits = fit_least_squares(Members(scan), found.concepts, PENALTIES[0], sample_images(scan))
    for rho in (0.3, 0.7, 1.0):
        published = unbraid.split(scan, found, method="published", rho=rho)
        for part in published.channels:
            ours = slow_objective(scan, part.channel, part.concepts, fits[part.channel].masks)
            theirs = slow_objective(scan, part.channel, part.concepts, part.masks.double())
            assert all(a <= b + 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_a_stiff_penalty_gives_the_prior(case):
    scan, found = case
    for fit in fit_least_squares(Members(scan), found.concepts, 1e9, sample_images(scan)).values():
        torch.testing.assert_close(fit.masks, fit.prior, rtol=0, atol=1e-6)


def test_refining_never_makes_the_rectified_objective_worse(case):
    scan, found = case
    fits = fit_least_squares(Members(scan), found.concepts, 0.01, sample_images(scan))
    maps = found.members_in(scan).first(found.classes, 100, ["input_map"])
    for channel, fit in fits.items():
        images = images_of(scan, channel, found.concepts[channel], maps)
        refined = refine(pose_rectified(images, fit.prior, fit.penalty), fit.masks)
        assert ((refined >= 0) & (refined <= 1)).all()
        errors = [rectified_error(images, masks) for masks in (fit.masks, refined)]
        assert errors[1] <= errors[0] + 0.02


def rectified_error(images, masks: Tensor) -> float:
    whole, _ = images.rectified(torch.ones(1, masks.shape[1]))
    new, _ = images.rectified(masks)
    return separation_error(whole[0], new.T, images.concept)


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
    chosen = choose_penalty(Members(scan), found.concepts)
    assert chosen in PENALTIES
    assert choose_penalty(Members(scan), found.concepts) == chosen


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
