"""Least-squares masks: the optimum against scipy, its optimality, and what it is good for."""

from dataclasses import replace

import pytest
import torch

import unbraid
from checks import assert_close, assert_same_split, truth_of
from tiny_networks import SyntheticImages, build
from unbraid.finding.membership import Members
from unbraid.measuring.formulas import separation_error
from unbraid.networks.layers import describe
from unbraid.networks.spec import pooled_input, tap_inputs
from unbraid.splitting import least_squares as ls
from unbraid.splitting.box_solver import Rows
from unbraid.splitting.rectified import images_of, pose_rectified, refine

OWN = {1: [[0], [1]], 4: [[0, 1], [2], [3]]}


@pytest.fixture(scope="module", params=["1x1", "3x3", "groups", "tokens"])
def case(request, tmp_path_factory):
    """A scan with positions, and findings of K = 2 and K = 3 concepts in it."""
    network, images = build(request.param), SyntheticImages(80)
    folder = tmp_path_factory.mktemp(request.param)
    scan = unbraid.scan(network, "layer", images, folder, positions=True)
    return scan, unbraid.find(scan, channels=OWN)


def slow_objective(scan, channel, concepts, masks):
    """METHOD.md section 5 without its penalty, image by image."""
    records = next(scan.shards())
    group, row = scan.layer.group_of(channel), ls.augmented_row(scan, channel)
    taps = ls.augment(records.pooled[:, group], records.n_positions) * row
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
    fits = ls.fit_least_squares(Members(scan), found.concepts, 0.1, ls.sample_images(scan))
    records = next(scan.shards())
    for channel, concepts in found.concepts.items():
        group = scan.layer.group_of(channel)
        moments = []
        for concept in concepts:
            chosen = torch.isin(records.label, torch.tensor(concept))
            inputs = ls.augment(records.pooled[chosen, group], records.n_positions[chosen])
            moments.append(ls.Moment([Rows(inputs)], len(inputs)))
        problem = ls.pose(ls.augmented_row(scan, channel), moments)
        for masks in (fits[channel].masks, problem.prior, torch.rand_like(problem.prior)):
            slow = slow_objective(scan, channel, concepts, masks)
            assert problem.loss(masks).tolist() == pytest.approx(slow, rel=1e-6)
        assert fits[channel].kkt_residual < 1e-8
        torch.testing.assert_close(problem.prior.sum(0), torch.ones(scan.layer.n_taps).double())


def test_it_does_better_than_any_rho_on_what_it_minimises(case):
    scan, found = case
    members, sample = Members(scan), ls.sample_images(scan)
    fits = ls.fit_least_squares(members, found.concepts, ls.PENALTIES[0], sample)
    for rho in (0.3, 0.7, 1.0):
        published = unbraid.split(scan, found, method="published", rho=rho)
        for part in published.channels:
            ours = slow_objective(scan, part.channel, part.concepts, fits[part.channel].masks)
            theirs = slow_objective(scan, part.channel, part.concepts, part.masks.double())
            assert all(a <= b + 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_a_stiff_penalty_gives_the_prior_and_a_split_twice_the_same_bits(case):
    scan, found = case
    stiff = ls.fit_least_squares(Members(scan), found.concepts, 1e9, ls.sample_images(scan))
    for fit in stiff.values():
        torch.testing.assert_close(fit.masks, fit.prior, rtol=0, atol=1e-6)
    assert_same_split(*(unbraid.split(scan, found) for _ in range(2)))
    assert ls.choose_penalty(Members(scan), found.concepts) in ls.PENALTIES


def test_refining_never_makes_the_rectified_objective_worse(case):
    scan, found = case
    fits = ls.fit_least_squares(Members(scan), found.concepts, 0.01, ls.sample_images(scan))
    maps = found.members_in(scan).first(found.classes, 100, ["input_map"])
    for channel, fit in fits.items():
        images = images_of(scan, channel, found.concepts[channel], maps)
        refined = refine(pose_rectified(images, fit.prior, fit.penalty), fit.masks)
        assert ((refined >= 0) & (refined <= 1)).all()
        original = images.rectified(torch.ones(1, refined.shape[1]))[0][0]
        before, after = (
            separation_error(original, images.rectified(masks)[0].T, images.concept)
            for masks in (fit.masks, refined)
        )
        assert after <= before + 0.02


def test_one_image_a_concept_and_silent_channels_are_no_trouble(tmp_path):
    network, images = build("3x3"), SyntheticImages(4)
    network.get_submodule("layer").weight.data[1] = 0
    scan = unbraid.scan(network, "layer", images, tmp_path, positions=True)
    split = unbraid.split(scan, unbraid.find(scan, channels={1: [[0], [1]], 2: [[2], [3]]}))
    assert all(part.masks.isfinite().all() for part in split.channels)
    assert unbraid.evaluate(split, scan).summary["least_squares"]["separation_error"] is not None
    assert unbraid.compare_outputs(network, unbraid.apply(network, split), images, tolerance=0.0)


@pytest.mark.parametrize("kind", ["1x1", "3x3", "uneven", "dilation", "circular", "groups"])
def test_tap_inputs_add_up_to_the_pooled_input(kind):
    layer = build(kind).get_submodule("layer")
    spec = describe("layer", layer)
    x = torch.randn(2, layer.in_channels, 6, 7, dtype=torch.float64)
    summed = [tap_inputs(spec, x, group).sum(2) for group in range(spec.groups)]
    torch.testing.assert_close(torch.stack(summed, 1), pooled_input(spec, x))


CONCEPTS = ((0,), (2,))  # of the four classes


@pytest.fixture(scope="module", params=["3x3", "groups", "tokens"])
def scanned(request, tmp_path_factory):
    network, images = build(request.param), SyntheticImages(40)
    scan = unbraid.scan(network, "layer", images, tmp_path_factory.mktemp("scan"), batch_size=8)
    return scan, truth_of(network, images)


def expected(truth, channel, mask, weight):
    """The term of one mask, image by image: squared distance from an even share."""
    responses = truth.pooled_response(channel, weight)
    masked = truth.pooled_response(channel, mask * weight)
    error = power = 0.0
    for n, label in enumerate(truth.labels):
        if label not in (0, 2):
            error += float(masked[n] - responses[n] / 2) ** 2
            power += float(responses[n]) ** 2
    return ls.BACKGROUND_WEIGHT * error / power


def assert_term(term, truth, channel, weight):
    generator = torch.Generator().manual_seed(channel)
    for _ in range(3):
        mask = torch.rand(len(weight), generator=generator, dtype=torch.float64)
        value = (term.rows @ mask).square().sum() - 2 * term.linear @ mask
        silent = expected(truth, channel, torch.zeros_like(mask), weight)
        assert_close(value, expected(truth, channel, mask, weight) - silent, 1e-9)


@pytest.mark.parametrize("channel", [0, 3])
def test_the_term_is_the_distance_from_an_even_share(scanned, channel):
    scan, truth = scanned
    weight = scan.weight[channel].double()
    term = ls.background_term(Members(scan), ls.sample_images(scan), channel, CONCEPTS)
    assert_term(term, truth, channel, weight)
    for wrong in (ls.Term(term.rows[1:], term.linear), ls.Term(term.rows, -term.linear)):
        with pytest.raises(AssertionError):
            assert_term(wrong, truth, channel, weight)


def test_without_other_images_or_answers_nothing_is_asked(scanned):
    scan, _ = scanned
    sample = ls.sample_images(scan)
    assert ls.background_term(Members(scan), sample, 0, ((0, 1), (2, 3))) is None
    silent = replace(scan, weight=0 * scan.weight, bias=0 * scan.bias)
    assert ls.background_term(Members(silent), sample, 0, CONCEPTS) is None


@pytest.mark.parametrize(("n_sampled", "step"), [(400, 1), (200, 3), (3, 200)])
def test_sample_images_is_spread_over_all_shards(n_sampled, step, tmp_path, monkeypatch):
    monkeypatch.setattr(ls, "_N_BACKGROUND_IMAGES", n_sampled)
    scan = unbraid.scan(build("3x3"), "layer", SyntheticImages(600), tmp_path, positions=True)
    assert scan.manifest.n_shards > 4
    assert ls.sample_images(scan).index.tolist() == list(range(0, 600, step))


def test_a_scan_of_everything_stands_for_the_rest(tmp_path):
    network, images = build("3x3"), SyntheticImages(60)
    full = unbraid.scan(network, "layer", images, tmp_path / "full", positions=True)
    some = unbraid.scan(network, "layer", images, tmp_path / "some", positions=True, classes=[0, 2])
    found = unbraid.find(full, channels={1: [[0], [2]]})
    whole = unbraid.split(full, found)[1].masks
    torch.testing.assert_close(unbraid.split(some, found, everything=full)[1].masks, whole)
    assert not torch.allclose(unbraid.split(some, found)[1].masks, whole, atol=1e-4)
