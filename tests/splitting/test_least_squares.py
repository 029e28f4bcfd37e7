"""Least-squares masks: the objective image by image, its optimum, and what it is good for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scipy.optimize import minimize

import unbraid
from checks import assert_same_split
from tiny_networks import SyntheticImages, build
from unbraid.base.progress import QUIET
from unbraid.finding.membership import Members
from unbraid.networks.layers import describe
from unbraid.networks.spec import pooled_input, tap_inputs
from unbraid.splitting import cross_validation, silence
from unbraid.splitting import least_squares as ls
from unbraid.splitting.material import on_images
from unbraid.splitting.moments import RowPrior, augment, augmented_row, join_moments, moment
from unbraid.splitting.silence import Images, choose_rest

OWN = {1: [[0], [1]], 4: [[0, 1], [2]], 5: [[0], [1], [2]]}
WEIGHTS = ls.Weights(penalty=0.1, silence=3.0)


@pytest.fixture(scope="module", params=["1x1", "3x3", "groups", "tokens"])
def case(request, tmp_path_factory):
    """A scan, and findings of two channels in it."""
    network, images = build(request.param), SyntheticImages(80)
    scan = unbraid.scan(network, "layer", images, tmp_path_factory.mktemp(request.param))
    return scan, unbraid.find(scan, channels=OWN)


def rest_of(scan, found):
    members = found.members_in(scan)
    return members, choose_rest(members, found.concepts)


def parts_of(rest, found, n_images, work):
    """Do work on the images that the fit of each channel looks at."""
    return on_images(rest[0], found.concepts, rest, n_images, work, "", QUIET)


def pooled_of(scan, channel):
    """Each image's augmented inputs and label."""
    records = list(scan.shards())
    group = scan.layer.group_of(channel)
    inputs = [augment(r.pooled[:, group], r.n_positions) for r in records]
    return torch.cat(inputs), torch.cat([r.label for r in records])


def slow_shrunk(inputs):
    """A class's moment, pair of columns by pair of columns (METHOD.md section 5)."""
    n, size = inputs.shape
    mean = inputs.mean(0)
    u = (inputs - mean) / inputs.var(0, correction=0).sqrt()
    above = below = 0.0
    for i in range(size - 1):
        for j in range(size - 1):
            if i != j:
                w = u[:, i] * u[:, j]
                above += float(n / (n - 1) ** 3 * (w - w.mean()).square().sum())
                below += float(w.mean()) ** 2
    alpha = min(max(above / below, 0), 1)
    covariance = (inputs - mean).T @ (inputs - mean) / n
    kept = (1 - alpha) * covariance + alpha * torch.diag(covariance.diagonal())
    return kept + torch.outer(mean, mean), alpha


def slow_objective(scan, channel, concepts, k, mask, weights, part=1.0):
    """The pooled objective of one mask, without shrinkage, image by image."""
    inputs, label = pooled_of(scan, channel)
    row = augmented_row(scan, channel)
    whole = torch.cat([mask, torch.ones(1).double()])
    z, z_k = inputs @ row, (inputs * row) @ whole
    images = [torch.isin(label, torch.tensor(concept)) for concept in concepts]
    total = 0.0
    for other, own in enumerate(images):
        wanted = z[own] if other == k else 0 * z[own]
        counts = 1 if other == k else part
        total += counts * float((z_k[own] - wanted).square().mean() / z[own].square().mean())
    foreign = ~images[k]
    margin = 0.5 * max(float(z[images[k]].mean()), 0.0)
    beyond = (z_k[foreign] - margin).clamp(min=0).square().mean()
    total += weights.silence * float(beyond / z[images[k]].square().mean())
    if float(z[images[k]].mean()) > 0:
        own = z[images[k]]  # without shrinkage, a part of .6
        least = max(0.5 * float(own.square().mean().sqrt()), 0.6 * float(own.mean()))
        short = (least - z_k[images[k]]).clamp(min=0).square().mean()
        total += 3 * float(short / z[images[k]].square().mean())
    return total


def problem_of(scan, found, channel, shrink=False, part=1.0):
    inputs, label = pooled_of(scan, channel)
    parts = [
        join_moments([moment(inputs[label == number], shrink) for number in concept])
        for concept in found.concepts[channel]
    ]
    return ls.pose(augmented_row(scan, channel), parts, part)


def images_of(scan, found, channel):
    """All images, each standing for itself."""
    inputs, label = pooled_of(scan, channel)
    concept = torch.full_like(label, -1)
    for k, numbers in enumerate(found.concepts[channel]):
        concept[torch.isin(label, torch.tensor(numbers))] = k
    return Images(inputs, concept, torch.ones(len(label)).double(), torch.arange(len(label)))


@pytest.mark.parametrize("n", [4, 9, 60])
def test_moment_is_shrunk_as_pair_by_pair(n):
    torch.manual_seed(n)
    inputs = torch.randn(n, 6).double() @ torch.randn(6, 6).double() + 1
    expected, alpha = slow_shrunk(inputs)
    found = moment(inputs)
    x = torch.randn(6).double()
    assert found.shrinkage == pytest.approx(alpha)
    torch.testing.assert_close(found.times(x), expected @ x)
    plain = moment(inputs, shrink=False)
    torch.testing.assert_close(plain.times(x), inputs.T @ inputs @ x / n)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(plain.times(x), expected @ x)
    both = join_moments([plain, moment(2 * inputs[:3], shrink=False)])
    every = torch.cat([inputs, 2 * inputs[:3]])
    torch.testing.assert_close(both.times(x), every.T @ every @ x / len(every))
    torch.testing.assert_close(both.mean, every.mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moment_of_what_is_no_number_is_none(dtype):
    inputs = torch.randn(9, 4, dtype=dtype)
    inputs[2, 1] = float("nan")
    assert moment(inputs).square.isnan().any()


def test_moment_of_many_float32_inputs_is_as_exact_as_they_are():
    torch.manual_seed(0)
    inputs = (torch.randn(900, 40) @ torch.randn(40, 40) + torch.rand(40) * 100).float()
    for scale in (1.0, 1e-18, 1e18):
        scaled = (scale * inputs).float()
        exact, found = moment(scaled.double()), moment(scaled)
        x = torch.randn(40).double()
        assert found.shrinkage == pytest.approx(exact.shrinkage, rel=1e-4)
        difference = found.times(x) - exact.times(x)
        assert difference.norm() < 1e-6 * exact.times(x).norm()
        assert (moment(1.001 * scaled).times(x) - exact.times(x)).norm() > 1e-4 * difference.norm()


def test_moment_of_constant_inputs_or_few_images_is_its_diagonal():
    for inputs in (torch.ones(8, 4), torch.eye(2, 4)):
        found = moment(inputs.double())
        assert found.shrinkage == 1
        assert found.rows.isfinite().all()


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_problem_and_silence_are_those_of_the_method_page(case, part):
    scan, found = case
    for channel, concepts in found.concepts.items():
        problem = problem_of(scan, found, channel, part=part)
        images = images_of(scan, found, channel)
        for masks in (torch.rand_like(problem.linear), torch.ones_like(problem.linear)):
            quadratic = problem.loss(masks)
            for k, mask in enumerate(masks):
                beyond = problem.beyond(images, WEIGHTS.silence, k)
                fast = float(quadratic[k] + beyond.near(mask).errors.square().sum())
                slow = slow_objective(scan, channel, concepts, k, mask, WEIGHTS, part)
                curved = mask @ problem.curvature(k) @ mask - 2 * mask @ problem.linear[k]
                assert float(curved + problem.constant[k]) == pytest.approx(float(quadratic[k]))
                assert fast == pytest.approx(slow, rel=1e-9)
                assert fast != pytest.approx(
                    slow_objective(scan, channel, concepts, k, 0.9 * mask, WEIGHTS, part), rel=1e-6
                )


def test_more_is_asked_of_own_images_the_fewer_there_are(case):
    scan, found = case
    problem, images = problem_of(scan, found, 5), images_of(scan, found, 5)
    nothing = torch.zeros(scan.layer.n_taps).double()
    without_bias = torch.cat([problem.row[:-1], nothing[:1]])
    problem = replace(problem, row=without_bias)
    rms = problem.power.sqrt()
    for mean, alpha, part in (
        (1.0, 0.0, 0.6),
        (1.0, 0.3, 0.9),
        (1.0, 0.9, 1.2),
        (0.1, 0.0, 0.5),
        (-1.0, 0.0, 0.0),
    ):
        own = replace(problem, shrinkage=alpha, mean=mean * rms)
        asked = float(own.beyond(images, 0.0, 0).near(nothing).errors.square().sum())
        assert asked == pytest.approx(3 * part**2)


def test_silence_on_other_concepts_counts_once_where_clusters_are_among_them(case):
    scan, found = case
    index = torch.cat(list(scan.columns("index")))
    label = torch.cat(list(scan.columns("label")))
    groups = {5: [index[label == number].tolist() for number in range(3)]}
    for own, expected in ((found, 1.0), (unbraid.find(scan, images=groups), 0.5)):
        rest = rest_of(scan, own)
        parts = parts_of(rest, own, 20, lambda images, _: images.part)
        assert parts[5] == expected


def test_background_is_the_relative_response_to_images_of_no_concept(case):
    scan, found = case
    for channel in found.concepts:
        problem, images = problem_of(scan, found, channel), images_of(scan, found, channel)
        quiet, rest = ls.background(problem, images), images.concept < 0
        row = augmented_row(scan, channel)
        z = (images.inputs @ row)[rest]
        rows = quiet.root[:, None] * images.inputs[:, :-1] * row[:-1]
        torch.testing.assert_close(quiet.diagonal(), rows.square().sum(0), rtol=1e-5, atol=1e-9)
        for mask in torch.rand_like(problem.linear):
            z_k = ((images.inputs * row) @ torch.cat([mask, torch.ones(1).double()]))[rest]
            slow = 0.2 * float(z_k.square().sum() / z.square().sum())
            for weight in (1.0, 0.5):
                errors = quiet.times(weight).near(mask).errors
                assert float(errors.square().sum()) == pytest.approx(weight * slow)
            assert float(quiet.near(0.9 * mask).errors.square().sum()) != pytest.approx(slow)
        alone = images.of(images.concept >= 0)
        assert not ls.background(problem, alone).near(mask).errors.any()


def test_row_prior_is_from_the_other_rows(case):
    scan, _ = case
    prior, n_per_group = RowPrior(scan), scan.layer.n_out // scan.layer.groups
    for channel in (1, 4):
        group = scan.layer.group_of(channel)
        rows = scan.weight.double()[group * n_per_group : (group + 1) * n_per_group]
        outer = rows.T @ rows
        ridge = 0.1 * outer.diagonal().mean()
        own = scan.weight[channel].double()
        others = outer - torch.outer(own, own) + ridge * torch.eye(len(own)).double()
        expected = torch.linalg.inv(others) * torch.outer(own, own)
        expected = expected / expected.diagonal().mean()
        torch.testing.assert_close(prior.matrix(channel), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("rectified", [False, True])
def test_solve_finds_the_optimum_that_scipy_finds(case, rectified, part):
    scan, found = case
    for channel in found.concepts:
        problem = problem_of(scan, found, channel, True, part)
        images = images_of(scan, found, channel)
        if rectified:  # else only where a channel is positive on its concepts
            problem = replace(problem, mean=problem.mean.abs() + 1e-3)
        prior = RowPrior(scan).matrix(channel)
        spread = scan.spread(scan.layer.group_of(channel)) if rectified else None
        fit = ls.solve(problem, images, WEIGHTS, prior, spread=spread, gain=1e-12)
        assert ((fit.masks >= 0) & (fit.masks <= 1)).all()
        share = 0.45 + 0.55 * problem.shrinkage if rectified else 1.0
        quiet = ls.background(problem, images)
        for k, mask in enumerate(fit.masks):
            curvature = problem.curvature(k)
            least = max(WEIGHTS.penalty, 5 * problem.shrinkage)
            scale = float((curvature.diagonal() + quiet.diagonal()).mean())
            penalty = least * scale * prior
            even = torch.full_like(mask, 1 / len(fit.masks))
            beyond = problem.beyond(images, WEIGHTS.silence, k)
            terms = [beyond.times(share), quiet.times(share)]
            if rectified:
                shape = ls.Shape.of(problem.row, images, spread)
                terms.append(ls.Rectified.of(shape, k, WEIGHTS.silence, 1 - share, part))
            gram = share * curvature + penalty
            objective = ls.Objective(gram, share * problem.linear[k] + penalty @ even, terms)

            def value(m, objective=objective):
                return objective.value(torch.as_tensor(m))

            best = minimize(value, mask.numpy(), method="L-BFGS-B", bounds=[(0, 1)] * len(mask))
            # What rectified responses ask for is not convex.
            slack = (5e-3 if rectified else 1e-5) * abs(best.fun)
            assert value(mask) <= best.fun + slack
            worse = torch.rand_like(mask)
            assert value(worse) > best.fun + slack


def test_solve_leaves_out_rectified_responses_of_a_channel_that_is_negative(case):
    scan, found = case
    problem, images = problem_of(scan, found, 1), images_of(scan, found, 1)
    problem = replace(problem, mean=torch.tensor([1.0, -1.0]).double())
    prior, spread = RowPrior(scan).matrix(1), scan.spread(scan.layer.group_of(1))
    fits = [ls.solve(problem, images, WEIGHTS, prior, spread=own) for own in (spread, None)]
    assert torch.equal(fits[0].masks, fits[1].masks)


def test_a_stiff_penalty_gives_even_shares_and_a_split_twice_the_same_bits(case):
    scan, found = case
    stiff = ls.Weights(1e9, 0.0)
    fits = ls.fit_least_squares(Members(scan), found.concepts, stiff, rest_of(scan, found))
    for fit in fits.values():
        even = torch.full_like(fit.masks, 1 / len(fit.masks))
        torch.testing.assert_close(fit.masks, even, rtol=0, atol=1e-4)
    assert_same_split(*(unbraid.split(scan, found) for _ in range(2)))
    chosen = cross_validation.choose_weights(Members(scan), found.concepts, rest_of(scan, found))
    assert chosen.penalty in cross_validation.PENALTIES
    assert chosen.silence in cross_validation.SILENCES


def test_more_silence_is_asked_for_only_while_concepts_are_kept(case, monkeypatch):
    scan, found = case
    chosen = []
    for least in (0.0, 2.0):
        monkeypatch.setattr(cross_validation, "RETENTION", least)
        weights = cross_validation.choose_weights(
            Members(scan), found.concepts, rest_of(scan, found)
        )
        chosen.append(weights.silence)
    assert chosen == [cross_validation.SILENCES[0], cross_validation.SILENCES[-1]]


@pytest.mark.parametrize(("n_top", "n_even"), [(1000, 1000), (5, 10), (0, 7)])
def test_choose_rest_takes_the_most_exciting_and_evenly_spaced_images(
    n_top, n_even, tmp_path, monkeypatch
):
    monkeypatch.setattr(silence, "N_TOP", n_top)
    monkeypatch.setattr(silence, "N_EVEN", n_even)
    scan = unbraid.scan(build("3x3"), "layer", SyntheticImages(80), tmp_path)
    found = unbraid.find(scan, channels=OWN)
    members, rest = rest_of(scan, found)
    read = parts_of((members, rest), found, 1, lambda images, _: images.images)
    for channel, concepts in found.concepts.items():
        inputs, label = pooled_of(scan, channel)
        foreign = ~torch.isin(label, torch.tensor([n for concept in concepts for n in concept]))
        z = inputs @ augmented_row(scan, channel)
        places = foreign.nonzero()[:, 0].tolist()
        top = sorted(places, key=lambda n: -float(z[n]))[:n_top]
        step = max(1, 80 // n_even)
        even = [n for n in places if n % step == 0 and n not in top]
        assert rest.place[channel].tolist() == sorted(top + even)
        counted = dict(
            zip(rest.place[channel].tolist(), rest.weight[channel].tolist(), strict=True)
        )
        assert all(counted[n] == 1 for n in top)
        assert len(even) == 0 or sum(counted.values()) == pytest.approx(len(places))
        own = read[channel].of(read[channel].concept < 0)
        torch.testing.assert_close(own.inputs, inputs[rest.place[channel]])
        assert torch.equal(own.weight, rest.weight[channel])


def test_images_that_excite_a_channel_equally_are_not_all_held(monkeypatch):
    """As where a channel's input is zero in most images."""
    monkeypatch.setattr(silence, "N_TOP", 20)
    n, n_shards, layer = 40, 60, SimpleNamespace(group_of=lambda _: 0)
    scan = SimpleNamespace(
        **{"weight": torch.ones(3, 2), "bias": torch.zeros(3), "layer": layer},
        manifest=SimpleNamespace(n_images=n * n_shards),
    )
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(0, 3, (n_shards, n), generator=generator)
    z[1:][z[1:] == 2] = 0  # so that few are not among equals
    top, held = silence._Top(scan, range(3)), []
    for shard in torch.randperm(n_shards, generator=generator).tolist():
        pooled = torch.stack([z[shard], 0 * z[shard]], 1)[:, None].float()
        records = SimpleNamespace(pooled=pooled, n_positions=torch.ones(n).long())
        places = shard * n + torch.arange(n)
        top.add(records, torch.ones(n, 3, dtype=torch.bool), places)
        held.append(sum(len(own) for own, _, _ in top._found))
    assert max(held) <= 3 * (3 * 20 + n)
    wanted = z.flatten().argsort(descending=True, stable=True)[:20].tolist()
    assert [places.tolist() for places in top.places()] == [wanted] * 3


def test_one_image_a_concept_and_silent_channels_are_no_trouble(tmp_path):
    network, images = build("3x3"), SyntheticImages(4)
    network.get_submodule("layer").weight.data[1] = 0
    scan = unbraid.scan(network, "layer", images, tmp_path)
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


def test_a_scan_of_everything_stands_for_the_rest(tmp_path):
    network, images = build("3x3"), SyntheticImages(60)
    full = unbraid.scan(network, "layer", images, tmp_path / "full", positions=True)
    some = unbraid.scan(network, "layer", images, tmp_path / "some", positions=True, classes=[0, 2])
    found = unbraid.find(full, channels={1: [[0], [2]]})
    whole = unbraid.split(full, found)[1].masks
    torch.testing.assert_close(unbraid.split(some, found, everything=full)[1].masks, whole)
    assert not torch.allclose(unbraid.split(some, found)[1].masks, whole, atol=1e-4)
